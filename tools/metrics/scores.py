"""Scores of sets of features: Fréchet distance, kernel distance, Inception score.

Letters: N and M clips, n rows of features a clip (1, or one a frame), D width.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

ONE_SIDED = ("is", "video_is")  # metrics of the fakes alone


def score(metric: str, real: Tensor | None, fake: Tensor, bootstrap: int, seed: int) -> dict[str, Any]:
    """A metric of features real (M, n, D) and fake (N, n, D): its value, its spread, and the sizes of both sets.

    Args:
        real: not used by the metrics in `ONE_SIDED`.
        bootstrap: draws behind the interval of a Fréchet distance; 0: no interval.
    """
    facts = {"fake_rows": fake.shape[0] * fake.shape[1], "width": fake.shape[2]}
    if metric in ONE_SIDED:
        return inception_score(fake.flatten(0, 1), seed) | facts
    facts["real_rows"] = real.shape[0] * real.shape[1]
    if metric == "kid":
        return kernel_distance(real.flatten(0, 1), fake.flatten(0, 1), seed) | facts
    value = frechet_distance(real.flatten(0, 1), fake.flatten(0, 1))
    spread = distance_spread(real, fake, value, bootstrap, seed) if bootstrap else {}
    return {"value": value, **spread, **facts}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features a (N, D), b (M, D) with covariances A, B; float64.

    With centred features a = Q_a R_a, A is R_a' R_a / (N - 1). The square roots of the eigenvalues of A B are then the
    singular values of R_a R_b' over sqrt((N - 1) (M - 1)). This is also exact if a covariance is singular.
    """
    return _distance(_moments(a), _moments(b))


def bootstrap_distances(real: Tensor, fake: Tensor, repeats: int, seed: int) -> Tensor:
    """Distances (repeats,) of real (M, n, D) to N clips drawn with replacement from fake (N, n, D), n rows a clip."""
    moments, generator = _moments(real.flatten(0, 1)), torch.Generator().manual_seed(seed)
    draws = torch.randint(len(fake), (repeats, len(fake)), generator=generator).to(fake.device)
    return torch.tensor([_distance(moments, _moments(fake[draw].flatten(0, 1))) for draw in draws])


def distance_spread(real: Tensor, fake: Tensor, value: float, repeats: int, seed: int) -> dict[str, Any]:
    """The 95 % interval of the distance `value` of real (M, n, D) to fake (N, n, D), and its bias, by bootstrap."""
    draws = bootstrap_distances(real, fake, repeats, seed)
    bias = draws.mean().item() - value
    # Draws repeat clips. Their mean is about as far above `value` as `value` is above that of infinitely many clips.
    return {"interval": [draws.quantile(q).item() - bias for q in (0.025, 0.975)], "bias": bias}


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,) of x (N, D), and a root R (min(N, D), D) of its covariance: R' R = cov(x)."""
    x = x.double()
    mean = x.mean(0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / (len(x) - 1) ** 0.5


def _distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    (mean_a, root_a), (mean_b, root_b) = a, b
    shift = (mean_a - mean_b).square().sum()
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return (shift + root_a.square().sum() + root_b.square().sum() - 2 * cross).item()


def inception_score(probabilities: Tensor, seed: int, splits: int = 10) -> dict[str, Any]:
    """Inception score of class probabilities (N, D): mean and standard deviation over `splits` of the shuffled rows."""
    from torchmetrics.image.inception import InceptionScore  # slow to import

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # a warning of the memory
        torch.manual_seed(seed)
        metric = InceptionScore(nn.Identity(), splits, sync_on_compute=False)
        metric.update(probabilities.double().clamp(min=1e-30).log())  # it takes logits; log 0 would give NaN
        mean, std = metric.compute()
    return {"value": mean.item(), "std": std.item(), "splits": splits}


def kernel_distance(real: Tensor, fake: Tensor, seed: int, largest: int = 1000) -> dict[str, Any]:
    """KID of features real (M, D) and fake (N, D): mean and standard deviation over 100 subsets of `largest` rows.

    There is no deviation if every subset is the whole of both sets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance  # slow to import

    size = min(largest, len(real), len(fake))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # a warning of the memory
        torch.manual_seed(seed)
        distance = KernelInceptionDistance(nn.Identity(), subset_size=size, sync_on_compute=False)
        distance.update(real.double(), real=True)
        distance.update(fake.double(), real=False)
        mean, std = distance.compute()
    spread = {} if size == len(real) == len(fake) else {"std": std.item()}
    return {"value": mean.item(), **spread, "subset_size": size}
