"""Find the cheapest sampler of a checkpoint: recipes at given shares of a sampler's cost, or at a given quality.

    python tools/calibrate.py budgets=[0.43,0.475,0.65]                            # the demo's model
    python tools/calibrate.py budget=0.4                   # one budget
    python tools/calibrate.py min_psnr=45                  # the cheapest recipe with that PSNR to the reference
    python tools/calibrate.py target=converged budgets=[0.16,0.24,0.32,0.4]
    python tools/calibrate.py target=ddpm-250 budgets=[0.45]
    python tools/calibrate.py --config configs/ucf101/ucf101_sample_skip.yaml --dry-run      # work, memory, disk
    torchrun --standalone --nproc_per_node=8 tools/calibrate.py ...                # shares out the seeds
    python sample/sample.py --recipe results/calibrate/recipe-43.json              # sample by what was found

A recipe should lead each seed to the reference's clip for less. The reference is the uncached sampler of the options
(target=twin), the same with DDPM in 250 steps (target=ddpm-250), or a nearly converged sample, DPM-Solver++ in 100
steps (target=converged). A budget is a share of the MACs of the options' own sampler. At each budget compete:
  plain            DDIM, DPM-Solver++ and UniPC, uncached, with as many steps as the budget pays for
  interval         Skip-Cache as in the paper (every N-th step in full), by reuse and by forecasts of order 1 and 2
  placed           Skip-Cache with full steps where they matter, around each solver: dynamic programming minimises the
                   errors of cached steps, weighted by how much an error grows until the end
  fitted           a linear multistep solver: dynamic programming chooses its steps among the reference's; the
                   coefficients of each step are fitted by least squares to recorded runs, on the solver's own states
  fitted+cached    the same with every second step cached
  fitted+unguided  the same with the last steps unguided, where guidance is on
The best two of the placed and fitted ones are then improved by hill climbing: a step moves by one, and stays there if
the final error falls. All is chosen on calibration seeds. The report is on other, held-out seeds, with the ratio of
errors, seed by seed, to the best plain solver. A sampler that draws noise at every step (ddpm) leads to the same clip
only by all of its steps. There two kinds take the place of the plain and fitted solvers:
  plain            the same noise; the model is evaluated at evenly spaced steps, and its estimate of x_0 is held
  held             the same, but evaluated where dynamic programming puts it

Writes to `output`: recipe-{percent}.json for each budget (sample.py, sample_ddp.py: --recipe), calibrate.md, and as it
goes what was recorded, fitted and measured. The same command again does only what is missing.
"""

import math
import sys
from dataclasses import fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import SampleConfig, UserError, cli
from sample.options import DEMO, file_checks, load_sampling
from tools.recipes.options import CalibrateConfig

parser = cli.Parser(__doc__, CalibrateConfig, DEMO)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

from configs.files import check_record, check_writable, write_json, write_text
from configs.tables import markdown_table
from models.hardware import describe_machine
from models.macs import readable
from sample.distributed import Environment, distributed
from sample.folder import clip_settings, make_record
from sample.pipeline import Pipeline, load, resolve
from sample.plans import UNCACHED, describe_run, make_plan
from sample.recipes import fingerprint, save_recipe
from sample.similarity import doubts
from tools.metrics.statistics import interval_text
from tools.recipes.calibration import Calibration, percent
from tools.recipes.candidates import SOLVERS, to_recipe
from tools.recipes.cost import disk_bytes, peak_bytes, work


def report(calibration: Calibration, tables: dict[float, list[dict]]) -> str:
    """The tables in Markdown, with how to read them."""
    cfg, target, parts = calibration.cfg, calibration.target.cfg, []
    for budget, table in tables.items():
        lines = []
        for row in sorted(table, key=lambda row: row.get("l2_geometric", math.inf)):
            cells = {
                "sampler": f"**{row['sampler']}**" if row["chosen"] else row["sampler"],
                "kind": row["kind"],
                "MACs": f"{row['share']:.1%}",
                "calibration": "" if row["calibration"] is None else f"{row['calibration']:.4f}",
            }
            for key, name, digits in (
                ("l2_geometric", "held out", 4),
                ("l2", "mean", 4),
                ("l1", "relative L1", 4),
                ("psnr", "PSNR, dB", 1),
                ("seconds", "seconds a clip", 2),
            ):
                cells[name] = f"{row[key]:.{digits}f}" if key in row else ""
            cells["ratio to the control"] = interval_text(row.get("ratio"), digits=2, equal=1)
            lines.append(cells)
        parts.append(f"## {percent(budget)} % of the MACs\n\n{markdown_table(lines)}")
    seeds, first = calibration.held_out, calibration.calibration
    notes = [
        f"Reference: {target.sample_method}, {target.num_sampling_steps} steps, guidance {cfg.cfg_scale:g}, uncached. "
        f"100 % of the MACs: {cfg.num_sampling_steps} uncached steps, {readable(calibration.reference.macs)} a clip.",
        "Errors are relative L2 of the latents against the reference's clip of the same seed. Calibration: geometric "
        f"mean over seeds {first[0]} to {first[-1]} ({len(first)}), on which all was chosen, also the sampler in bold. "
        f"Held out: geometric mean over seeds {seeds[0]} to {seeds[-1]} ({len(seeds)}); the columns right of it are "
        "means over these seeds. Of each kind the best was measured there, and every plain solver.",
        "Ratio: geometric mean of the clips' own ratios of errors, with its 95 % interval (Student's t on logarithms). "
        "The control is the best plain solver on these same seeds.",
        f"Seconds: sampling alone, medians over batches; the samplers took turns. On "
        f"{describe_machine(calibration.pipe.device)}.",
    ]
    flat: dict[int, bool] = {}  # reference clips that show nothing, by seed
    for line in calibration.results.lines:
        flat |= dict(zip(line["seeds"], line.get("flat", ()), strict=False))
    notes += [f"**{doubt}.**" for doubt in doubts(flat.values())]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)]) + "\n"


def calibrate(cfg: CalibrateConfig, pipe: Pipeline, env: Environment) -> None:
    """Makes a recipe for each budget, and writes the report."""
    calibration = Calibration(cfg, pipe, env)
    calibration.record_runs()
    made_for, tables = env.from_first(lambda: fingerprint(cfg)), {}
    wanted = {f"recipe-{percent(budget)}": budget for budget in cfg.budgets}
    if cfg.min_psnr:
        wanted = {f"recipe-{cfg.min_psnr:g}dB": calibration.cheapest(cfg.min_psnr)}
    for name, budget in wanted.items():
        chosen, tables[budget] = calibration.report_on(budget)
        if env.is_main:
            recipe = to_recipe(name, chosen, cfg, made_for, tables[budget])
            save_recipe(calibration.folder / f"{name}.json", recipe)
    if env.is_main:
        text = report(calibration, tables)
        write_text(calibration.folder / "calibrate.md", text)
        print(f"\n{text}\nrecipes: {calibration.folder}")


def check(cfg: CalibrateConfig) -> None:
    """Raises UserError for options that make no sense together."""
    N = cfg.num_sampling_steps
    if cfg.sample_method == "heun":
        raise UserError("sample_method: heun runs the model twice in a step; calibrate against another sampler")
    if not cfg.cache.depth:
        raise UserError("cache.depth: 0 leaves no layers to cached steps; plans that hold x_0 compete in any case")
    if cfg.eta:
        raise UserError(f"eta: {cfg.eta:g} draws other noise in every sampler; valid: 0")
    if fewest := [budget for budget in cfg.budgets if budget * N < 2]:
        raise UserError(f"budgets: {fewest[0]:g} of {N} steps is less than two steps")
    if too_much := [budget for budget in cfg.budgets if int(budget * N + 1e-9) >= N]:
        raise UserError(f"budgets: {too_much[0]:g} pays for the options' own sampler; give shares below 1")
    if cfg.target == "converged" and cfg.sample_method not in SOLVERS:
        raise UserError(f"sample_method: {cfg.sample_method} converges to no clip; with target=converged use ddim")
    ours = range(cfg.calibration_seed, cfg.calibration_seed + cfg.num_calibration)
    if set(ours) & set(range(cfg.held_out_seed, cfg.held_out_seed + cfg.num_clips)):
        raise UserError("calibration_seed: these seeds are also held out; leave num_calibration seeds between the two")
    check_writable(cfg, "output", folder=True)


def describe(cfg: CalibrateConfig) -> list[str]:
    """What the calibration will do, and what that takes."""
    steps, world = work(cfg), cli.world_size()
    one = make_plan(cfg, UNCACHED)
    goal = f"at least {cfg.min_psnr:g} dB" if cfg.min_psnr else f"budgets {cfg.budgets}"
    return [
        f"calibration: {cfg.target}, {cfg.num_calibration} clips, {cfg.num_clips} held out, {goal}, to {cfg.output}",
        f"work: {steps:,.0f} full steps of a clip, as {steps / cfg.num_sampling_steps:,.0f} uncached clips, "
        f"{readable(int(steps / cfg.num_sampling_steps * one.macs))}; processes: {world}",
        f"memory: {peak_bytes(cfg) / 1e9:,.1f} GB a process; disk: {disk_bytes(cfg) / 1e6:,.0f} MB of recorded runs",
    ]


def main() -> None:
    args = parser.parse_args()
    with distributed() as env:
        cfg = load_sampling(CalibrateConfig, args.config, args.overrides)
        if cfg.target == "ddpm-250":
            cfg = replace(cfg, sample_method="ddpm", num_sampling_steps=250)
        if cfg.sample_method == "euler":
            cfg = replace(cfg, sample_method="ddim")  # the same sampler, under the name of its recipes
        cfg = resolve(replace(cfg, recipe=None), env.device)
        check(cfg)
        lines = [*describe_run(cfg, [make_plan(cfg, UNCACHED)], env.device), *describe(cfg)]
        if args.dry_run:
            return cli.dry_run(cfg, lines, file_checks(cfg)) if env.is_main else None
        env.from_first(lambda: open_folder(cfg, env))
        if env.is_main:
            print("\n".join(lines), flush=True)
        calibrate(cfg, load(cfg, env.device), env)


def open_folder(cfg: CalibrateConfig, env: Environment) -> None:
    """Writes what the folder is made with, or raises UserError if it was made with other settings."""
    settings = clip_settings(make_record(cfg, env.device))
    own = {each.name for each in fields(cfg)} - {each.name for each in fields(SampleConfig)} | {"cache", "fps", "seed"}
    settings = {key: value for key, value in settings.items() if key not in own}
    settings |= {key: getattr(cfg, key) for key in ("target", "num_calibration", "calibration_seed")}
    settings["cache.depth"] = cfg.cache.depth
    check_record(Path(cfg.output) / "settings.json", settings, "output")
    write_json(Path(cfg.output) / "settings.json", settings)


if __name__ == "__main__":
    cli.run(main)
