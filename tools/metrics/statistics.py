"""Means, paired ratios and differences over clips, and distances between sets of clips: intervals and tests.

All intervals are of 95 %. `tests/test_statistics.py` checks in simulations how often they hold the true value.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

GROUPS = 20  # of clips that `jackknife` leaves out in turn
PERMUTATIONS = 199  # of `swap_test`


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.stats import t  # slow to import

    return float(t.ppf(0.975, freedom))


def mean_and_margin(values: Sequence[float]) -> dict[str, Any]:
    """The mean over clips, and half the width of its interval by Student's t (None for one clip)."""
    x, n = torch.tensor(values, dtype=torch.float64), len(values)  # (N,)
    margin = student_quantile(n - 1) * x.std().item() / n**0.5 if n > 1 else None
    return {"mean": x.mean().item(), "margin": margin, "clips": n}


def plus_minus(summary: dict[str, Any] | None, digits: int) -> str:
    """The text "mean ± margin" of a summary that `mean_and_margin` made; empty for None."""
    if summary is None:
        return ""
    margin = "" if summary["margin"] is None else f" ± {summary['margin']:.{digits}f}"
    return f"{summary['mean']:.{digits}f}{margin}"


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Wilson's interval of the share hits / total."""
    z = 1.96  # of 95 %
    centre = (hits + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(hits * (total - hits) / total + z * z / 4)
    return centre - half, centre + half


# ---------------------------------------------------------------------------------------------------------------------
# Pairs: two ways to sample, measured on the same seeds
# ---------------------------------------------------------------------------------------------------------------------


def difference_interval(values: Sequence[float], controls: Sequence[float]) -> dict[str, float]:
    """The mean of paired differences, and its interval by Student's t: {"value", "low", "high"}; two pairs or more."""
    return _interval(mean_and_margin([a - b for a, b in zip(values, controls, strict=True)]))


def ratio_interval(values: Sequence[float], controls: Sequence[float]) -> dict[str, float]:
    """The geometric mean of paired ratios of positive values, and its interval by Student's t on logarithms."""
    logs = _interval(mean_and_margin([math.log(a / b) for a, b in zip(values, controls, strict=True)]))
    return {key: math.exp(value) for key, value in logs.items()}


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm of positive values; 0 if one of them is 0."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if min(values) > 0 else 0.0


def interval_text(interval: dict[str, float] | None, digits: int, equal: float) -> str:
    """The text "value (low to high)", with "not resolved" if the interval holds `equal`; empty for None."""
    if interval is None:
        return ""
    value, low, high = (f"{interval[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})" + ", not resolved" * (interval["low"] <= equal <= interval["high"])


def swap_test(difference: Callable[[Tensor], float], num_pairs: int, seed: int = 0) -> float:
    """The p-value of "which of two paired sets a clip belongs to makes no difference", two-sided, by permutation.

    Args:
        difference: from a mask (N,) of the pairs whose clips change sets to the difference of both sets.
    """
    masks = torch.rand(PERMUTATIONS, num_pairs, generator=torch.Generator().manual_seed(seed)) < 0.5
    limit = abs(difference(torch.zeros(num_pairs, dtype=torch.bool))) * (1 - 1e-9)  # equal but for rounding
    return (1 + sum(abs(difference(mask)) >= limit for mask in masks)) / (1 + PERMUTATIONS)


# ---------------------------------------------------------------------------------------------------------------------
# Sets: any function of a set of clips
# ---------------------------------------------------------------------------------------------------------------------


def jackknife(
    statistic: Callable[[Tensor], float], num_clips: int, groups: int = GROUPS, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of all clips, half the width of its interval, and its bias, by leaving out groups of clips in turn.

    The bias is the part that falls as 1/N, as in Quenouille 1956: `value - bias` is the line through the statistics of
    N and of fewer clips, continued to infinitely many. FD-infinity (arXiv:1911.07023) does so for FID.

    Args:
        statistic: from the indices of the clips in a set to a number.
    """
    order = torch.randperm(num_clips, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(min(groups, num_clips))
    G, value = len(parts), statistic(torch.arange(num_clips))
    left = torch.tensor([statistic(torch.cat([*parts[:i], *parts[i + 1 :]])) for i in range(G)], dtype=torch.float64)
    error = ((G - 1) / G * (left - left.mean()).square().sum()).sqrt().item()
    return value, student_quantile(G - 1) * error, (G - 1) * (left.mean().item() - value)


def positive_interval(value: float, margin: float) -> list[float]:
    """The interval value ± margin of a distance, which is cut at 0."""
    return [max(0.0, value - margin), max(0.0, value + margin)]


def _interval(summary: dict[str, Any]) -> dict[str, float]:
    mean, margin = summary["mean"], summary["margin"]
    return {"value": mean, "low": mean - margin, "high": mean + margin}
