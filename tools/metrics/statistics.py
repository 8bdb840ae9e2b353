"""Means over clips and their confidence intervals."""

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
