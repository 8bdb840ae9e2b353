"""Figures without a screen, written atomically. matplotlib is imported when the first one is made."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from configs.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)) -> "tuple[Figure, np.ndarray]":
    """A figure and its axes (rows, columns), of `size` inches in all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")


def save_figure(path: str | Path, figure: "Figure", dpi: int = 110) -> None:
    """Writes `figure` as PNG and closes it; the file appears whole or not at all."""
    from matplotlib import pyplot

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
    pyplot.close(figure)


def draw_ratios(path: str | Path, rows: Sequence[tuple[str, dict[str, float], str]], label: str) -> None:
    """Draws paired ratios to a control; 1 is as good as the control.

    Args:
        rows: a name, its interval ("value", "low", "high") and a colour for each.
    """
    figure, ((axes,),) = new_figure(size=(9, 1.2 + 0.3 * len(rows)))
    for y, (_, interval, colour) in enumerate(rows):
        left, right = interval["value"] - interval["low"], interval["high"] - interval["value"]
        axes.errorbar(interval["value"], y, xerr=[[left], [right]], fmt="o", color=colour, capsize=3)
    axes.axvline(1, color="0.6", zorder=0)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=8)
    axes.set_xscale("log")
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
    axes.set_xlabel(label)
    axes.invert_yaxis()
    figure.suptitle("Paired over clips, with 95 % intervals; an interval that holds 1 resolves nothing", fontsize=10)
    save_figure(path, figure)
