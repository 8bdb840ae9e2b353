"""Figures without a screen, written atomically. matplotlib is imported when the first one is made."""

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
