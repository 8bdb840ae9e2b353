"""Draw the training loss of one run or of several in one picture, from their log.jsonl.

python tools/plot_loss.py results/000-Latte-skip-ucf101 --output loss.png
python tools/plot_loss.py results/000-* results/001-* --names "Skip-DiT" "Latte" --steps 20000
python tools/plot_loss.py results/000-* --key validation_loss --smooth 1
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, cli
from tools.common.plots import new_figure, save_figure

parser = cli.Parser(__doc__)
parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their log.jsonl")
parser.add_argument("--names", nargs="+", help="what to call them (default: the folders' names)")
parser.add_argument("--key", default="loss", help="the metric to draw (default: loss)")
parser.add_argument("--smooth", type=int, default=9, help="logged values in a mean around each (default: 9)")
parser.add_argument("--steps", type=float, default=math.inf, help="leave out later steps")
parser.add_argument("--output", type=Path, default=Path("loss.png"), help="PNG file (default: %(default)s)")

Curve = tuple[list[int], list[float]]  # steps, and the values logged there


def read_curve(run: Path, key: str, last_step: float = math.inf) -> Curve:
    """The steps up to `last_step` at which `key` was logged, and its values.

    Raises:
        UserError: there is no log, or it has no `key`; the message lists the keys that it has.
    """
    file = run if run.is_file() else run / "log.jsonl"
    if not file.is_file():
        raise UserError(f"no log {file}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    values = {line["step"]: line[key] for line in lines if key in line and line["step"] <= last_step}
    if not values:
        raise UserError(f"{file} has no {key}; it has {', '.join(sorted({name for line in lines for name in line}))}")
    return list(values), list(values.values())


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of `width` values around each, of fewer towards the ends: centred, so that it does not lag behind."""
    reach = [min(width // 2, i, len(values) - 1 - i) for i in range(len(values))]
    return [fmean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]


def plot_curves(curves: Sequence[Curve], names: Sequence[str], key: str, width: int, output: Path) -> None:
    """Draws each curve as logged, faintly, and smoothed over `width` values."""
    from matplotlib.ticker import LogLocator

    figure, [[axes]] = new_figure()
    for (steps, values), name in zip(curves, names, strict=True):
        (line,) = axes.plot(steps, smooth(values, width), label=name)
        axes.plot(steps, values, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel=key, yscale="log")
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}", minor_formatter="")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(output, figure)


def main() -> None:
    args = parser.parse_args()
    names = args.names or [(run.parent if run.is_file() else run).name for run in args.runs]
    if len(names) != len(args.runs):
        raise UserError(f"--names: {len(names)} names for {len(args.runs)} runs")
    curves = [read_curve(run, args.key, args.steps) for run in args.runs]
    if args.dry_run:
        print(f"would draw {args.key} of {', '.join(names)} to {args.output}")
        return
    plot_curves(curves, names, args.key, args.smooth, args.output)
    print(args.output)


if __name__ == "__main__":
    cli.run(main)
