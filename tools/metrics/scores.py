"""Scores of sets of features: Fréchet distance, kernel distance, Inception score.

Letters: N and M clips, n rows of features a clip (1, or one a frame), D width.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tools.metrics.statistics import jackknife, positive_interval, swap_test

ONE_SIDED = ("is", "video_is")  # metrics of the fakes alone
NEAR = 3  # clips a feature, below which a Fréchet distance is marked


def score(metric: str, real: Tensor | None, fake: Tensor, groups: int, seed: int) -> dict[str, Any]:
    """A metric of features real (M, n, D) and fake (N, n, D): its value, its spread, and the sizes of both sets.

    Args:
        real: not used by the metrics in `ONE_SIDED`.
        groups: of clips that are left out in turn for the interval of a Fréchet distance; 0: no interval.
    """
    facts = {"fake_rows": fake.shape[0] * fake.shape[1], "width": fake.shape[2]}
    if metric in ONE_SIDED:
        return inception_score(fake.flatten(0, 1), seed) | facts
    facts["real_rows"] = real.shape[0] * real.shape[1]
    if metric == "kid":
        return kernel_distance(real.flatten(0, 1), fake.flatten(0, 1), seed) | facts
    return distance_to_real(real, fake, groups, seed) | facts


def distance_to_real(real: Tensor, fake: Tensor, groups: int, seed: int = 0) -> dict[str, Any]:
    """The Fréchet distance of fake (N, n, D) to real (M, n, D), with its interval over fakes; the real set is fixed.

    Rows of one clip are not independent: whole clips are left out.

    Args:
        groups: see `statistics.jackknife`; 0: the value alone.

    Returns:
        value, and with groups
        interval: 95 % of the mean distance of N fakes.
        infinite, infinite_interval: the same for infinitely many fakes; None with fewer than NEAR x D fakes, where the
            distance is no line over 1/N.
    """
    moments = _moments(real.flatten(0, 1))
    if not groups:
        return {"value": _distance(moments, _moments(fake.flatten(0, 1)))}

    def distance(clips: Tensor) -> float:
        return _distance(moments, _moments(fake[clips.to(fake.device)].flatten(0, 1)))

    value, margin, bias = jackknife(distance, len(fake), groups, seed)
    few = len(fake) < NEAR * fake.shape[2]
    infinite = {} if few else {"infinite": value - bias, "infinite_interval": positive_interval(value - bias, margin)}
    return {"value": value, "interval": positive_interval(value, margin), **infinite}


def change_of_distance(real: Tensor, fake: Tensor, twin: Tensor, seed: int = 0) -> dict[str, float]:
    """How much farther fake (N, D) is from real (M, D) than its twins (N, D) of the same seeds are: Fréchet distances.

    Returns:
        value, low, high: the difference and its interval; p: that of `swap_test`.
    """
    moments, both = _moments(real), torch.stack([fake, twin])  # (2, N, D)

    def difference(clips: Tensor, swapped: Tensor) -> float:
        a = swapped.long().to(fake.device)
        return _distance(moments, _moments(both[a, clips])) - _distance(moments, _moments(both[1 - a, clips]))

    everything, unchanged = torch.arange(len(fake)), torch.zeros(len(fake), dtype=torch.bool)
    value, margin, _ = jackknife(lambda clips: difference(clips, unchanged[clips]), len(fake), seed=seed)
    p = swap_test(lambda swapped: difference(everything, swapped), len(fake), seed)
    return {"value": value, "low": value - margin, "high": value + margin, "p": p}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features a (N, D), b (M, D) with covariances A, B; float64.

    With centred features a = Q_a R_a, A is R_a' R_a / (N - 1). The square roots of the eigenvalues of A B are then the
    singular values of R_a R_b' over sqrt((N - 1) (M - 1)). This is also exact if a covariance is singular.
    """
    return _distance(_moments(a), _moments(b))


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
    used = len(probabilities.chunk(splits))  # torch cuts 53 rows that are to be 10 parts into 9
    return {"value": mean.item(), "std": std.item(), "splits": used}


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
