"""Draw the training loss of one run or of several in one picture, from their log.jsonl.

python tools/plot_loss.py results/000-Latte-skip-ucf101 --output loss.png
python tools/plot_loss.py results/000-* results/001-* --names "Skip-DiT" "Latte" --steps 20000
python tools/plot_loss.py results/000-* --key validation_loss --smooth 1
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError
from tools.common import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their log.jsonl")
    parser.add_argument("--names", nargs="+", help="what to call them (default: the folders' names)")
    parser.add_argument("--key", default="loss", help="the figure to draw (default: loss)")
    parser.add_argument("--smooth", type=int, default=9, help="logged values in a mean around each (default: 9)")
    parser.add_argument("--steps", type=float, default=math.inf, help="leave out later steps")
    parser.add_argument("--output", type=Path, default=Path("loss.png"))
    args = parser.parse_args()
    names = args.names or [(run.parent if run.is_file() else run).name for run in args.runs]
    if len(names) != len(args.runs):
        raise UserError(f"--names: {len(names)} names for {len(args.runs)} runs")
    plot([read(run, args.key, args.steps) for run in args.runs], names, args.key, args.smooth, args.output)
    print(args.output)


def read(run: Path, key: str, last: float = math.inf) -> tuple[list[int], list[float]]:
    """The steps up to `last` at which `key` was logged, and its values."""
    file = run if run.is_file() else run / "log.jsonl"
    if not file.is_file():
        raise UserError(f"no log {file}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {line["step"]: line[key] for line in lines if key in line and line["step"] <= last}
    if not found:
        raise UserError(f"{file} has no {key}; it has {', '.join(sorted({name for line in lines for name in line}))}")
    return list(found), list(found.values())


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean of `width` values around each, of fewer towards the ends: centred, so that it does not lag behind."""
    reach = [min(width // 2, i, len(values) - 1 - i) for i in range(len(values))]
    return [fmean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]


def plot(curves: list[tuple[list[int], list[float]]], names: list[str], key: str, width: int, output: Path) -> None:
    """Each curve as logged, faintly, and smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (steps, values), name in zip(curves, names, strict=True):
        (line,) = axes.plot(steps, smoothed(values, width), label=name)
        axes.plot(steps, values, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel=key, yscale="log")
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}", minor_formatter="")
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    cli.run(main)
