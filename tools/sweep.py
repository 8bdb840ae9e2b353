"""A grid of cache plans, solvers, steps and guidance over paired seeds: table, CSV and Pareto plots.

    python tools/sweep.py --cache N2 N4 methods=[ddim,dpmsolver++] steps=[20,50] num_clips=14        # the demo
    python tools/sweep.py --cache N2 N3 N4 steps=[50] guidance=[1,2.5] reference=ddim-250 real_path=datasets/demo/test
    torchrun --standalone --nproc_per_node=8 tools/sweep.py --config sweep.yaml     # a YAML may hold the grid, too

Each cell of the grid is compared with the uncached run of its own solver, steps and guidance, which always runs. With
`reference`, it is also compared with one uncached run of its guidance, so that different solvers and steps compare.
With `real_path`, it is compared with real clips by a proxy distance. tools/fidelity.py explains the metrics, and which
clips pair.

The program writes to `output`: sweep.md, sweep.csv, sweep.json, pareto_fidelity.png, with `reference` paired.png (the
paired ratio of each plan's error to that of its control, the best uncached run that costs no more) and, with real
clips, pareto_proxy.png; clips/ grows during the run. The same command again measures only what is missing, and a larger
grid only what it adds.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, cli, option
from sample.options import DEMO, add_cache_flag, load_sampling
from tools.metrics.options import MeasureConfig


@dataclass(kw_only=True)
class SweepConfig(MeasureConfig):
    """The grid."""

    plans: list[str] = option(lambda: ["N2", "N3", "N4"], "cache plans, or recipes (*.json), beside uncached: --cache")
    methods: list[str] | None = option(None, "solvers; empty: sample_method")
    steps: list[int] | None = option(None, "sampling steps; empty: num_sampling_steps", least=1)
    guidance: list[float] | None = option(None, "guidance scales; empty: cfg_scale", least=0, most=100)
    reference: str | None = option(None, "METHOD-STEPS, as ddim-250: an uncached run that all others are compared with")
    output: str = option("results/sweep", "the folder to write", path=True)


parser = cli.Parser(__doc__, SweepConfig, DEMO)
add_cache_flag(parser)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

from configs.files import write_text
from configs.tables import csv_table, markdown_table
from sample.distributed import distributed
from sample.pipeline import resolve
from sample.plans import Plan
from tools.common.plots import draw_ratios, new_figure, save_figure
from tools.metrics.cells import Cell, Task, columns, notes, planner, run_cells, write_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COSTS = {"macs": "MACs a clip", "seconds": "seconds a clip, sampling alone"}
OFFSETS = ((6, 5), (6, -12), (-6, -12), (-6, 5), (-6, -24), (-6, 17))  # of a label from its point, the best first

Row = dict[str, Any]
Series = tuple[str, int, float]  # solver, steps, guidance


def make_grid(cfg: SweepConfig) -> list[Task]:
    """The tasks of the grid: each cell once, after the cells that it is compared with."""
    axes = cfg.methods or [cfg.sample_method], cfg.steps or [cfg.num_sampling_steps], cfg.guidance or [cfg.cfg_scale]
    references = {guidance: reference_cell(cfg, guidance) for guidance in axes[2]}
    tasks = [Task(cell, cell) for cell in references.values() if cell]
    for method, steps, guidance in product(*axes):
        twin = Cell(method, steps, guidance)
        cells = [twin, *map(twin.with_plan, cfg.plans)]
        tasks += [Task(cell, twin, references[guidance]) for cell in cells]
    return list({task.cell: task for task in tasks}.values())


def with_controls(tasks: list[Task], plan_of: Callable[[Cell], Plan]) -> list[Task]:
    """The tasks, in which each cached cell has controls: of every solver, the costliest uncached cell it can afford."""
    plain = sorted((task.cell for task in tasks if task.cell == task.twin), key=lambda cell: cell.steps)

    def controls(task: Task) -> tuple[Cell, ...]:
        macs, guidance = plan_of(task.cell).macs, task.cell.guidance
        affordable = [other for other in plain if other.guidance == guidance and plan_of(other).macs <= macs]
        return tuple({other.method: other for other in affordable}.values())

    return [task if task.cell == task.twin else task._replace(controls=controls(task)) for task in tasks]


def reference_cell(cfg: SweepConfig, guidance: float) -> Cell | None:
    """The uncached cell that all others of this guidance are compared with; None without `reference`."""
    if cfg.reference is None:
        return None
    match = re.fullmatch(r"(.+)-(\d+)", cfg.reference)
    if not match:
        raise UserError(f"reference: {cfg.reference} is no METHOD-STEPS, as ddim-250")
    return Cell(match[1], int(match[2]), guidance)


def to_csv(rows: Sequence[Row]) -> str:
    """CSV with a line for each row. {role}_{metric} is the mean over clips, {role}_{metric}_margin its margin.

    {role}_{metric}_control_{value,low,high} is the paired difference or ratio to the row's control, and its interval.
    """
    lines = []
    for row in rows:
        line = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
        for role in ("twin", "reference"):
            for metric, summary in row[role].items():
                line |= {f"{role}_{metric}": summary["mean"], f"{role}_{metric}_margin": summary["margin"]}
            for metric, interval in row[f"{role}_control"].items():
                line |= {f"{role}_{metric}_control_{key}": value for key, value in interval.items()}
        lines.append(line)
    return csv_table(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points on the Pareto front, by rising x. Less is better, in x and in y."""
    front, best = [], float("inf")
    for i in sorted(range(len(points)), key=points.__getitem__):
        if points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front


def series(row: Row) -> Series:
    """The sampler of a row, whatever its plan: the points of one line."""
    return row["method"], row["steps"], row["guidance"]


def draw_all(cfg: SweepConfig, rows: Sequence[Row], folder: Path) -> None:
    """Draws fidelity over cost and, with real clips, the proxy distance over cost."""
    names = list(dict.fromkeys(map(series, rows)))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    role = "reference" if cfg.reference else "twin"
    fidelity = [(row, row[role]["relative_l1"]["mean"]) for row in rows if row[role]]
    if cfg.reference:
        label, comparable = f"relative L1 of latents to uncached {cfg.reference}", lambda row: row["guidance"]
    else:
        label, comparable = "relative L1 of latents to the uncached run of each series", series
    if fidelity:
        draw(folder / "pareto_fidelity.png", fidelity, label, comparable, colours)
    paired = [(row, row["reference_control"]["relative_l1"]) for row in rows if row["reference_control"]]
    if paired:
        points = [(f"{row['name']}  against {row['control']}", interval, series(row)) for row, interval in paired]
        label = f"relative L1 to uncached {cfg.reference}, over the control's"
        draw_ratios(folder / "paired.png", [(name, i, colours[own]) for name, i, own in points], label)
    if cfg.real_path:
        label = f"proxy distance of {cfg.num_clips} clips to real clips (no FVD)"
        points = [(row, row["proxy_real"]) for row in rows]
        draw(folder / "pareto_proxy.png", points, label, lambda row: None, colours)


def draw(
    path: Path,
    points: Sequence[tuple[Row, float]],
    label: str,
    comparable: Callable[[Row], Any],
    colours: dict[Series, str],
) -> None:
    """Draws points (row, y) over MACs and over seconds, with a Pareto front for each set of rows whose y compare.

    Args:
        comparable: from a row to a key that is equal for rows whose y compare.
    """
    several = len({row["guidance"] for row, _ in points}) > 1
    figure, (panels,) = new_figure(1, 2, size=(14, 6))
    panels[1].sharey(panels[0])
    panels[1].tick_params(labelleft=False)
    for axes, (key, title) in zip(panels, COSTS.items(), strict=True):
        for kind in dict.fromkeys(comparable(row) for row, _ in points):
            own = [(row[key], y) for row, y in points if comparable(row) == kind]
            front = [own[i] for i in pareto(own)]
            axes.plot(*zip(*front, strict=True), color="0.87", linewidth=9, solid_capstyle="round", zorder=0)
        texts = []  # x, y, text, colour
        for name in dict.fromkeys(series(row) for row, _ in points):
            own = sorted((row[key], y, row["plan"]) for row, y in points if series(row) == name)
            x, y, plans = zip(*own, strict=True)
            axes.plot(x, y, "o-", color=colours[name], linewidth=1, markersize=5)
            names = [*plans[:-1], f"{plans[-1]}: {name[0]} {name[1]}" + f", guidance {name[2]:g}" * several]
            texts += [(*place, text, colours[name]) for *place, text in zip(x, y, names, strict=True)]
        axes.set_xlabel(title)
        scale(axes, "x", [row[key] for row, _ in points])
        scale(axes, "y", [y for _, y in points])
        axes.margins(0.15)
        axes.grid(alpha=0.3)
        label_points(axes, texts)
    panels[0].set_ylabel(label)
    figure.suptitle("A line is a solver with its steps and guidance; grey: Pareto front", fontsize=10)
    save_figure(path, figure)


def scale(axes: "Axes", which: str, values: Sequence[float]) -> None:
    """Makes the axis logarithmic if the largest value is more than 5 times the least."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    if max(values) > 5 * min(values) > 0:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(EngFormatter(sep="") if which == "x" else "{x:g}")


def label_points(axes: "Axes", texts: Sequence[tuple[float, float, str, str]]) -> None:
    """Writes each (x, y, text, colour) beside its point, inside the axes and, if possible, over no earlier text."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # computes the positions
    taken = [Bbox.from_bounds(*axes.transData.transform((x, y)) - 4, 8, 8) for x, y, _, _ in texts]
    for x, y, text, colour in texts:
        for offset in OFFSETS:
            side = "left" if offset[0] > 0 else "right"
            note = axes.annotate(text, (x, y), offset, textcoords="offset points", ha=side, color=colour, fontsize=8)
            box = note.get_window_extent()
            free = box.x1 < axes.bbox.x1 and not any(box.overlaps(other) for other in taken)
            if free or offset == OFFSETS[-1]:
                taken.append(box)
                break
            note.remove()


def main() -> None:
    args = parser.parse_args()
    with distributed() as env:
        cfg = resolve(load_sampling(SweepConfig, args.config, args.overrides), env.device)
        cfg = replace(cfg, plans=args.cache or cfg.plans)
        plan_of = planner(cfg, env.device)
        tasks = with_controls(make_grid(cfg), plan_of)
        rows, real = run_cells(cfg, tasks, plan_of, args.dry_run, env)
    if rows:
        rows, folder = list(rows.values()), Path(cfg.output)
        keys = ("method", "steps", "guidance", "plan")
        table = markdown_table([{key: str(row[key]) for key in keys} | columns(row) for row in rows])
        text = f"{table}\n\n{notes(cfg, tasks, rows, real)}\n"
        if cfg.reference:
            text += f"- Reference: uncached {cfg.reference} with the row's guidance. Controls are runs of the grid.\n"
        write_text(folder / "sweep.md", text)
        write_text(folder / "sweep.csv", to_csv(rows))
        write_record(folder / "sweep.json", cfg, rows, real, env)
        draw_all(cfg, rows, folder)
        print(f"\n{text}\nrecord: {cfg.output}")


if __name__ == "__main__":
    cli.run(main)
