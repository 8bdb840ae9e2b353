"""Draw the training loss of one run or of several, from their log.jsonl.

python tools/plot_loss.py results/000-Latte-skip-ucf101 --output loss.png
python tools/plot_loss.py results/000-* results/001-* --names "Skip-DiT" "Latte" --key gradient_norm
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError
from tools.common import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their log.jsonl")
    parser.add_argument("--names", nargs="+", help="what to call them (default: the folders' names)")
    parser.add_argument("--key", default="loss", help="the figure to draw (default: loss)")
    parser.add_argument("--smooth", type=float, default=0.9, help="weight of the running mean, 0 ... 1 (default: 0.9)")
    parser.add_argument("--output", type=Path, default=Path("loss.png"))
    args = parser.parse_args()
    names = args.names or [(run.parent if run.is_file() else run).name for run in args.runs]
    if len(names) != len(args.runs):
        raise UserError(f"--names: {len(names)} names for {len(args.runs)} runs")
    plot([read(run, args.key) for run in args.runs], names, args.key, args.smooth, args.output)
    print(args.output)


def read(run: Path, key: str) -> tuple[list[int], list[float]]:
    """The steps at which `key` was logged, and its values."""
    file = run if run.is_file() else run / "log.jsonl"
    if not file.is_file():
        raise UserError(f"no log {file}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {line["step"]: line[key] for line in lines if key in line}  # a resumed run may log a step twice
    if not found:
        raise UserError(f"{file} has no {key}; it has {', '.join(sorted({name for line in lines for name in line}))}")
    return list(found), list(found.values())


def plot(curves: list[tuple[list[int], list[float]]], names: list[str], key: str, smooth: float, output: Path) -> None:
    """Each curve as logged, faintly, and its running mean (bias-corrected, as Adam's)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (steps, values), name in zip(curves, names, strict=True):
        mean, means = 0.0, []
        for i, value in enumerate(values, start=1):
            mean = smooth * mean + (1 - smooth) * value
            means.append(mean / (1 - smooth**i))
        (line,) = axes.plot(steps, means, label=name)
        axes.plot(steps, values, color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel=key, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    cli.run(main)
