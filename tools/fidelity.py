"""Fidelity of cached clips to their uncached twins, beside the best plain solver that costs no more.

    python tools/fidelity.py --cache N2 N3 N4 N5 N6 num_clips=70 seed=10000       # the demo
    python tools/fidelity.py --cache N2 N4 sample_method=ddpm num_sampling_steps=250 controls=False
    python tools/fidelity.py --config configs/ucf101/ucf101_sample_skip.yaml --cache N2 num_clips=202
    python tools/fidelity.py --cache N4 pretrained/demo/recipe-43.json            # a recipe of tools/calibrate.py
    torchrun --standalone --nproc_per_node=8 tools/fidelity.py --config ... --cache N2 N3     # shares out the seeds

A clip's twin has its seed and label and is sampled uncached. Clips are compared with their twins one by one
(tools/metrics/pairs.py): relative L1 of the latents, PSNR, SSIM, LPIPS if its weights are on the disk, and the error of
motion, which is that of frame differences. fidelity=teacache adds PSNR, SSIM and LPIPS of mp4 files as means over
frames, which is how papers on caches report them. Each plan has controls: DDIM, DPM-Solver++ and UniPC, uncached, with
as many steps as the plan's MACs pay for. They draw no noise after the first step, and lead a seed to nearly the same
clip in fewer steps. A sampler that draws noise at every step (ddpm) draws other noise in fewer steps. Its control takes
all steps with their noise, but evaluates the model at as many, evenly spaced ones, and holds the estimate of x_0
between them (cache.depth=0). Table and record have the paired difference or ratio of each plan to the best control,
with intervals.

Sets of clips compare by proxy distances (Fréchet distance of tools/metrics/efficientnet.py, no FVD). One is the
distance to the uncached clips of the other half of the seeds, which share no noise; its row "uncached" shows how far
apart equal sets are. The other is the distance to the real clips in real_path.

The program writes to `output`: fidelity.md, paired.png (ratios to the controls), fidelity.json with the metrics of
each clip, and clips/, which grows during the run (a line for each batch, and the twins' latents). The same command
measures only what is missing. Other plans, steps, guidance or seeds add to the same folder, and so does tools/sweep.py.
Other settings need another folder.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import CacheOptions, UserError, cli, option
from sample.options import DEMO, add_cache_flag, load_sampling
from tools.metrics.options import MeasureConfig


@dataclass(kw_only=True)
class FidelityConfig(MeasureConfig):
    """Fidelity to the uncached run."""

    controls: bool = option(True, "measure also uncached solvers with as many steps as each plan's MACs pay for")


parser = cli.Parser(__doc__, FidelityConfig, DEMO)
add_cache_flag(parser)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

from configs.files import write_text
from configs.tables import markdown_table
from sample.distributed import distributed
from sample.pipeline import resolve
from tools.common.plots import draw_ratios
from tools.metrics.cells import Cell, Task, by_class_table, columns, notes, planner, run_cells, write_record
from tools.metrics.pairs import PAIR_METRICS
from tools.recipes.candidates import ROUNDING, SOLVERS, even_steps


def main() -> None:
    args = parser.parse_args()
    with distributed() as env:
        cfg = resolve(load_sampling(FidelityConfig, args.config, args.overrides), env.device)
        twin = Cell(cfg.sample_method, cfg.num_sampling_steps, cfg.cfg_scale)
        cells = [twin.with_plan(text) for text in args.cache] or [twin.with_cache(cfg.cache)]
        if twin in cells:
            raise UserError("uncached clips are their own twins: give plans with cached steps, as in --cache N2 N4")
        plan_of = planner(cfg, env.device)
        runs = {twin.plan: twin}  # the name of a row -> its cell
        controls = {}
        solvers = (twin.method,) if twin.draws_noise(cfg.eta) else SOLVERS
        for cell in cells:
            runs[cell.plan] = cell
            own = {}
            for solver in solvers if cfg.controls else ():
                uncached = plan_of(replace(twin, method=solver))  # heun runs the model twice in a step, others once
                num = int(twin.steps * plan_of(cell).macs / uncached.macs + ROUNDING)
                if 1 < num < twin.steps and twin.draws_noise(cfg.eta):
                    held = CacheOptions(full_steps=even_steps(twin.steps, num), depth=0)
                    own[f"x_0 held, {num} evaluated"] = twin.with_cache(held)
                elif num > 1:
                    own[f"{solver}, {num} steps"] = Cell(solver, num, twin.guidance)
            controls[cell] = tuple(own.values())
            runs |= {name: each for name, each in own.items() if each != twin}
        tasks = [Task(cell, twin, controls=controls.get(cell, ())) for cell in dict.fromkeys(runs.values())]
        rows, real = run_cells(cfg, tasks, plan_of, args.dry_run, env)
    if rows:
        rows = [{"run": name, **rows[cell]} for name, cell in runs.items()]
        table = markdown_table([{"run": row["run"], **columns(row)} for row in rows])
        text = f"{table}\n\n{notes(cfg, tasks, rows, real)}"
        metrics = [metric for metric in PAIR_METRICS if cfg.num_classes and metric in rows[1]["twin"]]
        by_class = [by_class_table(rows, metric) for metric in metrics]
        write_text(Path(cfg.output, "fidelity.md"), "\n\n".join([text, *by_class]) + "\n")
        write_record(Path(cfg.output, "fidelity.json"), cfg, rows, real, env)
        named = {row["name"]: row["run"] for row in rows}
        ratios = [
            (f"{row['run']} ({row['share']:.1%})  against {named[row['control']]}", interval, "C0")
            for row in rows
            if (interval := row["twin_control"].get("relative_l1"))
        ]
        if ratios:
            draw_ratios(Path(cfg.output, "paired.png"), ratios, "relative L1 to the twins, over the control's")
        print(f"\n{text}\n\nrecord: {cfg.output}")


if __name__ == "__main__":
    cli.run(main)
