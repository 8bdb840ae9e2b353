"""The Fréchet distance of two sets of features, each taken for a Gaussian (Heusel et al. 2017, eq. 6)."""

from typing import Any

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of features a (N, D), b (M, D) with covariances A, B; float64.

    With centred features a = Q_a R_a, so that A = R_a' R_a / (N - 1), the square roots of the eigenvalues of A B are
    the singular values of R_a R_b' over sqrt((N - 1) (M - 1)): exact where a covariance is singular, too.
    """
    return _distance(_moments(a), _moments(b))


def bootstrap_distances(real: Tensor, fake: Tensor, repeats: int, seed: int) -> Tensor:
    """Distances (repeats,) of real (M, n, D) to N clips drawn with replacement from fake (N, n, D), each n rows."""
    moments, generator = _moments(real.flatten(0, 1)), torch.Generator().manual_seed(seed)
    draws = torch.randint(len(fake), (repeats, len(fake)), generator=generator).to(fake.device)
    return torch.tensor([_distance(moments, _moments(fake[draw].flatten(0, 1))) for draw in draws])


def distance_spread(real: Tensor, fake: Tensor, value: float, repeats: int, seed: int) -> dict[str, Any]:
    """95 % interval around the distance `value` of real (M, n, D) to fake (N, n, D), and its bias; by bootstrap."""
    draws = bootstrap_distances(real, fake, repeats, seed)
    bias = draws.mean().item() - value
    # Draws repeat clips, which puts them above the figure about as far as it is above that of infinitely many.
    return {"interval": [draws.quantile(q).item() - bias for q in (0.025, 0.975)], "bias": bias}


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) of x (N, D), and a root of its covariance: R (min(N, D), D) with R' R = cov(x)."""
    x = x.double()
    mean = x.mean(0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / (len(x) - 1) ** 0.5


def _distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    (mean_a, root_a), (mean_b, root_b) = a, b
    shift = (mean_a - mean_b).square().sum()
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return (shift + root_a.square().sum() + root_b.square().sum() - 2 * cross).item()
