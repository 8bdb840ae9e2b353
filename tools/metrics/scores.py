"""Scores of sets of features, a function for each kind of metric in options.DETECTORS.

Letters: N and M clips, n rows of features a clip (1, or one a frame), D width.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tools.metrics.options import KINDS
from tools.metrics.statistics import jackknife, mean_and_margin, positive_interval, swap_test, wilson

NEAR = 3  # clips a feature, below which a Fréchet distance is marked
FEWEST = 4  # clips of an interval: the half that is left of fewer has no covariance
NEIGHBOURS = 5  # k of precision, recall, density and coverage, as Naeem et al. 2020 have it
DYNAMIC = 24  # grey levels: the largest 5 % of a change between frames, from which on something moves

Moments = tuple[Tensor, Tensor]  # the mean (D,), and a root R of the covariance: R' R = cov


def score(
    metric: str, real: Tensor | Moments | None, fake: Tensor, groups: int, seed: int, correction: int
) -> dict[str, Any]:
    """A metric of features real (M, n, D) and fake (N, n, D): its value, its spread, and the sizes of both sets.

    Args:
        real: not used by the kinds in `ONE_SIDED`; a Fréchet distance also takes the moments of a set.
        groups: of clips that are left out in turn for an interval; 0 or 1: no interval.
        correction: 1: covariances are over N - 1, 0: over N.
    """
    kind, facts = KINDS[metric], {"fake_rows": fake.shape[0] * fake.shape[1], "width": fake.shape[2]}
    if isinstance(real, Tensor):
        facts["real_rows"] = real.shape[0] * real.shape[1]
    if kind == "frechet":
        return distance_to_real(real, fake, groups, seed, correction) | facts
    if kind == "kid":
        return kernel_distance(real.flatten(0, 1), fake.flatten(0, 1), seed) | facts
    if kind == "polynomial_mmd":
        return with_interval(partial(jedi, real.flatten(0, 1)), fake, groups, seed)[0] | facts
    if kind == "prdc":
        return neighbourhoods(real.flatten(0, 1), fake.flatten(0, 1)) | facts
    if kind == "inception_score":
        return inception_score(fake.flatten(0, 1), seed) | facts
    if kind == "dynamic":
        hits = dynamic(fake)
        return {"value": hits.mean().item(), "interval": list(wilson(int(hits.sum()), len(hits)))} | facts
    still = mean_and_margin(flickering(fake).tolist())
    return {"value": still["mean"], "interval": [still["mean"] + s * still["margin"] for s in (-1, 1)]} | facts


def with_interval(
    distance: Callable[[Tensor], float], fake: Tensor, groups: int, seed: int
) -> tuple[dict[str, Any], float, float]:
    """The distance of fake (N, n, D) with its interval over fakes, half the interval's width, and the bias.

    Rows of one clip are not independent: whole clips are left out.

    Args:
        distance: from rows (N n, D) to a number.
    """
    if groups < 2 or len(fake) < FEWEST:
        return {"value": distance(fake.flatten(0, 1))}, 0.0, 0.0
    of_clips = lambda clips: distance(fake[clips.to(fake.device)].flatten(0, 1))  # noqa: E731
    value, margin, bias = jackknife(of_clips, len(fake), groups, seed)
    return {"value": value, "interval": positive_interval(value, margin)}, margin, bias


def distance_to_real(
    real: Tensor | Moments, fake: Tensor, groups: int, seed: int = 0, correction: int = 1
) -> dict[str, Any]:
    """The Fréchet distance of fake (N, n, D) to real (M, n, D), with its interval over fakes; the real set is fixed.

    Args:
        groups, correction: see `score`.

    Returns:
        value, and with groups
        interval: 95 % of the mean distance of N fakes.
        infinite, infinite_interval: the same for infinitely many fakes; absent with fewer than NEAR x D fakes, where
            the distance is no line over 1/N.
    """
    moments = _moments(real.flatten(0, 1), correction) if isinstance(real, Tensor) else real
    row, margin, bias = with_interval(lambda x: _distance(moments, _moments(x, correction)), fake, groups, seed)
    if "interval" in row and len(fake) >= NEAR * fake.shape[2]:
        infinite = row["value"] - bias
        row |= {"infinite": infinite, "infinite_interval": positive_interval(infinite, margin)}
    return row


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


def _moments(x: Tensor, correction: int = 1) -> Moments:
    """The moments of x (N, D); the root is (min(N, D), D)."""
    x = x.double()
    mean = x.mean(0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / (len(x) - correction) ** 0.5


def moments_of_sums(sums: Tensor, correction: int) -> Moments:
    """The moments of rows x (N, D) of which `sums` (D + 1, D + 1) holds the sum of [1, x] [1, x]'."""
    N, mean = sums[0, 0], sums[0, 1:] / sums[0, 0]
    covariance = (sums[1:, 1:] / N - mean.outer(mean)) * N / (N - correction)
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1] * len(values) * torch.finfo(values.dtype).eps  # what rounding makes of an eigenvalue of 0
    return mean, torch.where(values > noise, values, 0).sqrt()[:, None] * vectors.T


def _distance(a: Moments, b: Moments) -> float:
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


def jedi(real: Tensor, fake: Tensor) -> float:
    """JEDi (arXiv:2410.05203): 100 x MMD^2 of real (M, D) and fake (N, D) with the kernel (x y / D)^2, biased.

    The mean of (x y)^2 over all pairs is the product of both second moments, tr(X'X Y'Y) / (N M).
    """
    difference = _second_moment(real) - _second_moment(fake)
    return 100 * difference.square().sum().item() / real.shape[1] ** 2


def _second_moment(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def neighbourhoods(real: Tensor, fake: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage of fake (N, D) against real (M, D), by their k nearest neighbours.

    Naeem et al. 2020 (arXiv:2002.09797): precision is the share of fakes inside a ball around a real, recall the share
    of reals inside a ball around a fake, density the number of balls around a fake over k, coverage the share of reals
    whose ball holds a fake. A ball reaches to the k-th neighbour of its own set. The value is the coverage.
    """
    real, fake = real.double(), fake.double()
    k = min(NEIGHBOURS, len(real) - 1, len(fake) - 1)
    distances = torch.cdist(real, fake, compute_mode="donot_use_mm_for_euclid_dist")  # (M, N)
    real_radius, fake_radius = (
        torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1).values for x in (real, fake)
    )
    in_real, in_fake = distances < real_radius[:, None], distances < fake_radius
    shares = {"precision": in_real.any(0), "recall": in_fake.any(1), "coverage": in_real.any(1)}
    found = {name: inside.double().mean().item() for name, inside in shares.items()}
    return {"value": found["coverage"], **found, "density": in_real.sum(0).double().mean().item() / k, "neighbours": k}


def flickering(motion: Tensor) -> Tensor:
    """VBench's temporal flickering (arXiv:2311.17982) of each clip, of motion (N, F - 1, 2): 1 for a still clip."""
    return 1 - motion[..., 0].double().mean(1) / 255


def dynamic(motion: Tensor) -> Tensor:
    """Whether each clip is dynamic, 0 or 1, of motion (N, F - 1, 2); the mean is the dynamic degree.

    As in VBench, in 4 of 16 frames the largest 5 % of the motion must exceed a limit. There it is optical flow of RAFT,
    which needs weights; here it is the difference of neighbouring frames, and the limit `DYNAMIC`. Values do not
    compare with VBench's.
    """
    enough = round(4 * (motion.shape[1] + 1) / 16)
    return ((motion[..., 1] > DYNAMIC).sum(1) >= enough).double()
