"""Means over clips and their confidence intervals."""

import math
from collections.abc import Sequence
from typing import Any

import torch


def mean_and_margin(values: Sequence[float]) -> dict[str, Any]:
    """The mean over clips, and half the width of its 95 % interval by Student's t (None for one clip)."""
    from scipy.stats import t  # slow to import

    x, n = torch.tensor(values, dtype=torch.float64), len(values)  # (N,)
    margin = t.ppf(0.975, n - 1) * x.std().item() / n**0.5 if n > 1 else None
    return {"mean": x.mean().item(), "margin": margin, "clips": n}


def plus_minus(summary: dict[str, Any] | None, digits: int) -> str:
    """The text "mean ± margin" of a summary that `mean_and_margin` made; empty for None."""
    if summary is None:
        return ""
    margin = "" if summary["margin"] is None else f" ± {summary['margin']:.{digits}f}"
    return f"{summary['mean']:.{digits}f}{margin}"


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm of positive values; 0 if one of them is 0."""
    return math.exp(sum(math.log(value) for value in values) / len(values)) if min(values) > 0 else 0.0


def ratio_interval(values: Sequence[float], controls: Sequence[float]) -> dict[str, float]:
    """The geometric mean of paired ratios of positive values, and its 95 % interval by Student's t on logarithms."""
    logs = mean_and_margin([math.log(a / b) for a, b in zip(values, controls, strict=True)])
    mean, margin = logs["mean"], logs["margin"] or 0.0
    return {"ratio": math.exp(mean), "low": math.exp(mean - margin), "high": math.exp(mean + margin)}
