"""Find the cheapest sampler of a checkpoint: recipes at given shares of the reference sampler's cost.

    python tools/calibrate.py budgets=[0.43,0.475,0.65]                            # the demo's model
    python tools/calibrate.py --config configs/ucf101/ucf101_sample_skip.yaml --dry-run      # work and disk
    python sample/sample.py --recipe results/calibrate/recipe-43.json              # sample by what was found

The reference is the uncached sampler of the options, with all its steps; a recipe should lead each seed to the same
clip for less. Three kinds of candidates compete at each budget, a share of the reference's MACs:
  plain    DDIM, DPM-Solver++ and UniPC with as many uncached steps as the budget pays for
  cached   Skip-Cache as in the paper (every N-th step in full), by reuse and by forecasts of order 1 and 2
  fitted   a linear multistep solver: its steps are chosen among the reference's by dynamic programming over the errors
           of single steps, weighted by how much an error made there grows until the end; the coefficients of each step
           are fitted by least squares to recorded runs, on the solver's own states
Fitted solvers and the winner are chosen on calibration seeds. The report is on other, held-out seeds: every candidate's
error, and the ratio of errors, seed by seed, to the best plain solver of the budget.

Writes to `output`: recipe-{percent}.json for each budget (sample.py, sample_ddp.py: --recipe), calibrate.md, and as it
goes trajectories/ (the recorded runs) and results.jsonl. The same command again does only what is missing.
Only samplers that draw no noise on their way have a twin at fewer steps: ddim with eta=0, dpmsolver++ and unipc.
"""

import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import SampleConfig, UserError, cli, load_config, option
from sample.options import DEMO, file_checks


@dataclass(kw_only=True)
class CalibrateConfig(SampleConfig):
    """The calibration."""

    budgets: list[float] = option(lambda: [0.43, 0.475, 0.65], "shares of the reference's MACs", above=0, most=1)
    num_calibration: int = option(14, "seeds that steps and coefficients are chosen on", least=2)
    calibration_seed: int = option(20000, "the first of them")
    num_clips: int = option(28, "held-out seeds that the report is on", least=2)
    held_out_seed: int = option(30000, "the first of them")
    output: str = option("results/calibrate", "the folder to write", path=True)


parser = cli.Parser(__doc__, CalibrateConfig, DEMO)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import numpy as np
from tqdm import tqdm

from configs.files import check_record, check_writable, write_json, write_text
from configs.tables import markdown_table
from models.hardware import default_device, describe_machine
from models.macs import readable
from sample.folder import clip_settings, make_record
from sample.pipeline import Pipeline, load, resolve
from sample.plans import UNCACHED, describe_run, make_plan
from sample.recipes import fingerprint, save_recipe
from tools.metrics.statistics import interval_text
from tools.recipes.candidates import (
    ORDERS,
    SOLVERS,
    Candidate,
    Results,
    best,
    cached_candidates,
    fit_path,
    fitted_candidate,
    measure,
    plain_candidates,
    rows,
    to_recipe,
)
from tools.recipes.search import (
    EXPONENTS,
    Fit,
    angles_of,
    choose_steps,
    fit_solver,
    gram_of,
    interpolate_growth,
    measure_growth,
)
from tools.recipes.trajectories import bytes_per_clip, load_trajectories, record, trajectory_path

GROWTH_POSITIONS = 6  # states of a run from which the growth of errors is measured
GROWTH_CLIPS = 4


class Calibration:
    """One run of the program: its folder, its seeds in batches, and its progress."""

    def __init__(self, cfg: CalibrateConfig, pipe: Pipeline):
        self.cfg, self.pipe, self.folder = cfg, pipe, Path(cfg.output)
        self.calibration = range(cfg.calibration_seed, cfg.calibration_seed + cfg.num_calibration)
        self.held_out = range(cfg.held_out_seed, cfg.held_out_seed + cfg.num_clips)
        self.trajectories = self.folder / "trajectories"
        self.results = Results(self.folder / "results.jsonl")
        self.reference = Candidate("reference", "reference", make_plan(cfg, UNCACHED))

    def batches(self, seeds: range) -> list[list[int]]:
        size = self.cfg.per_proc_batch_size
        return [list(seeds[i : i + size]) for i in range(0, len(seeds), size)]

    def progress(self, what: str, total: int) -> tqdm:
        return tqdm(total=total, desc=what, unit="step", mininterval=1)

    def record_runs(self) -> None:
        """The reference runs: every step of the calibration seeds, the last state of all seeds that are compared."""
        todo = [
            (seeds, every_step)
            for all_seeds, every_step in ((self.calibration, True), (self.held_out, False))
            for seeds in self.batches(all_seeds)
            if not all(trajectory_path(self.trajectories, seed).exists() for seed in seeds)
        ]
        with self.progress("recording", len(todo) * self.pipe.diffusion.num_timesteps) as bar:
            for seeds, every_step in todo:
                record(self.pipe, self.trajectories, seeds, every_step, bar.update)

    def growth(self) -> list[float]:
        """By how much an error at each state grows until the end, measured once and kept."""
        path = self.folder / "growth.json"
        if not path.is_file():
            N = self.pipe.diffusion.num_timesteps
            positions = sorted({k * (N - 1) // GROWTH_POSITIONS for k in range(GROWTH_POSITIONS)})
            seeds = list(self.calibration[:GROWTH_CLIPS])
            runs = load_trajectories(self.trajectories, seeds)
            with self.progress("growth of errors", 2 * sum(N - p for p in positions)) as bar:
                measured = measure_growth(self.pipe, runs, seeds, positions, bar.update)
            growth = interpolate_growth(measured, positions, N + 1).tolist()
            write_json(path, {"positions": positions, "measured": measured.tolist(), "growth": growth})
        return json.loads(path.read_text())["growth"]

    def fit(self, num_steps: int, exponent: float, growth: list[float]) -> Fit:
        """A fitted solver of so many steps, kept for the next run."""
        path = fit_path(self.folder / "fits", num_steps, exponent)
        if not path.is_file():
            folder, angles = self.trajectories, angles_of(self.pipe.diffusion)
            steps = choose_steps(gram_of(folder, self.calibration), angles, np.array(growth), num_steps, exponent)
            batches = self.batches(self.calibration)
            with self.progress(f"fitting {num_steps} steps", num_steps * len(batches)) as bar:
                fit = fit_solver(self.pipe, folder, batches, steps, bar.update)
            write_json(path, asdict(fit))
        return Fit(**json.loads(path.read_text()))

    def candidates(self, budget: float, growth: list[float]) -> list[Candidate]:
        """All samplers that compete at a budget."""
        num_steps = int(budget * self.cfg.num_sampling_steps + 1e-9)
        fits = [fitted_candidate(self.cfg, self.fit(num_steps, e, growth), e) for e in EXPONENTS]
        return [*plain_candidates(self.cfg, budget), *cached_candidates(self.cfg, budget), *fits]

    def measure_all(self, candidates: list[Candidate], seeds: range, what: str) -> None:
        """Measures what is missing. The candidates of a batch take turns, so that their seconds compare."""
        batches = self.batches(seeds)
        todo = {tuple(batch): [c for c in candidates if not self.results.has(c, batch)] for batch in batches}
        with self.progress(what, sum(len(c.plan.timesteps) for each in todo.values() for c in each)) as bar:
            for batch, own in todo.items():
                if not own:
                    continue
                latents = load_trajectories(self.trajectories, batch).states[:, -1]
                videos = self.pipe.codec.decode(latents.to(self.pipe.device)).cpu()
                for candidate in own:
                    self.results.add(measure(self.pipe, candidate, batch, latents, videos))
                    bar.update(len(candidate.plan.timesteps))


def percent(budget: float) -> str:
    return f"{100 * budget:g}"


def report(calibration: Calibration, tables: dict[float, list[dict]]) -> str:
    """The tables in Markdown, with how to read them."""
    cfg, parts = calibration.cfg, []
    for budget, table in tables.items():
        lines = []
        for row in table:
            cells = {
                "sampler": f"**{row['sampler']}**" if row["chosen"] else row["sampler"],
                "MACs": f"{row['share']:.1%}",
                "seconds a clip": f"{row['seconds']:.2f}",
                "relative L2, mean": f"{row['l2']:.4f}",
                "geometric mean": f"{row['l2_geometric']:.4f}",
                "relative L1": f"{row['l1']:.4f}",
                "PSNR, dB": f"{row['psnr']:.1f}",
                "ratio to the best plain solver": interval_text(row["ratio"], digits=2, equal=1),
            }
            lines.append(cells)
        parts.append(f"## {percent(budget)} % of the reference's MACs\n\n{markdown_table(lines)}")
    seeds, first = calibration.held_out, calibration.calibration
    notes = [
        f"Reference: {cfg.sample_method}, {cfg.num_sampling_steps} steps, guidance {cfg.cfg_scale:g}, uncached, "
        f"{readable(calibration.reference.plan.macs)} a clip.",
        f"Errors are those of {len(seeds)} clips of seeds {seeds[0]} to {seeds[-1]} against the reference's clip of "
        f"the same seed. Steps, coefficients and the sampler in bold were chosen on seeds {first[0]} to {first[-1]}.",
        "Ratio: geometric mean of the clips' own ratios of errors, with its 95 % interval (Student's t on logarithms). "
        "The best plain solver is the best on these same seeds.",
        f"Seconds: sampling alone, medians over batches; the samplers took turns. On "
        f"{describe_machine(calibration.pipe.device)}.",
    ]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)]) + "\n"


def calibrate(cfg: CalibrateConfig, pipe: Pipeline) -> None:
    """Makes a recipe for each budget, and writes the report."""
    calibration = Calibration(cfg, pipe)
    calibration.record_runs()
    growth = calibration.growth()
    made_for, tables = fingerprint(cfg), {}
    for budget in cfg.budgets:
        candidates = calibration.candidates(budget, growth)
        competing = [candidate for candidate in candidates if candidate.kind != "cached"]
        calibration.measure_all(competing, calibration.calibration, f"{percent(budget)} %, calibration seeds")
        calibration.measure_all(candidates, calibration.held_out, f"{percent(budget)} %, held-out seeds")
        chosen = best(calibration.results, competing, calibration.calibration)
        reference = calibration.reference.plan.macs
        tables[budget] = rows(calibration.results, candidates, calibration.held_out, chosen, reference)
        name = f"recipe-{percent(budget)}"
        save_recipe(calibration.folder / f"{name}.json", to_recipe(name, chosen, cfg, made_for, tables[budget]))
    text = report(calibration, tables)
    write_text(calibration.folder / "calibrate.md", text)
    print(f"\n{text}\nrecipes: {calibration.folder}")


def check(cfg: CalibrateConfig) -> None:
    """Raises UserError for options that make no sense together."""
    if cfg.sample_method not in SOLVERS or cfg.eta:
        drawn = f"{cfg.sample_method} with eta={cfg.eta:g}"
        raise UserError(f"sample_method: {drawn} draws noise at every step; valid: {', '.join(SOLVERS)}, with eta=0")
    if fewest := [budget for budget in cfg.budgets if budget * cfg.num_sampling_steps < 2]:
        raise UserError(f"budgets: {fewest[0]:g} of {cfg.num_sampling_steps} steps is less than two steps")
    N = cfg.num_sampling_steps
    if too_much := [budget for budget in cfg.budgets if int(budget * N + 1e-9) >= N]:
        raise UserError(f"budgets: {too_much[0]:g} pays for the reference itself; give shares below 1")
    ours = range(cfg.calibration_seed, cfg.calibration_seed + cfg.num_calibration)
    if set(ours) & set(range(cfg.held_out_seed, cfg.held_out_seed + cfg.num_clips)):
        raise UserError("calibration_seed: these seeds are also held out; leave num_calibration seeds between the two")
    check_writable(cfg, "output", folder=True)


def describe(cfg: CalibrateConfig) -> list[str]:
    """What the calibration will do, and what that takes."""
    plan = make_plan(cfg, UNCACHED)
    clips, N = cfg.num_calibration + cfg.num_clips, cfg.num_sampling_steps
    grown = GROWTH_CLIPS * N * (GROWTH_POSITIONS + 1)
    spent = N * sum(cfg.budgets)  # steps of one clip by one sampler at each budget
    plain, fitted, cached = len(SOLVERS), len(EXPONENTS), len(ORDERS)
    fitting = fitted * cfg.num_calibration * spent
    measured = spent * (cfg.num_calibration * (plain + fitted) + cfg.num_clips * (plain + fitted + cached))
    steps = clips * N + grown + fitting + measured
    return [
        f"calibration: {cfg.num_calibration} clips, {cfg.num_clips} held out, budgets {cfg.budgets}, to {cfg.output}",
        f"work: at most {steps:,.0f} steps of a clip, as {steps / N:,.0f} clips of the reference, "
        f"{readable(int(steps / N * plan.macs))}",
        f"disk: {cfg.num_calibration * bytes_per_clip(cfg) / 1e6:,.1f} MB of recorded runs",
    ]


def main() -> None:
    args = parser.parse_args()
    if cli.world_size() > 1:
        raise UserError(f"calibrate.py is one process, but torchrun started {cli.world_size()}: start it with python")
    cfg = load_config(CalibrateConfig, args.config, args.overrides)
    device = default_device()
    cfg = resolve(replace(cfg, recipe=None), device)
    check(cfg)
    lines = [*describe_run(cfg, [make_plan(cfg, UNCACHED)], device), *describe(cfg)]
    if args.dry_run:
        return cli.dry_run(cfg, lines, file_checks(cfg))
    settings = clip_settings(make_record(cfg, device))
    own = {each.name for each in fields(cfg)} - {each.name for each in fields(SampleConfig)} | {"cache", "fps", "seed"}
    settings = {key: value for key, value in settings.items() if key not in own}
    settings |= {key: getattr(cfg, key) for key in ("num_calibration", "calibration_seed")}  # which fits depend on
    check_record(Path(cfg.output) / "settings.json", settings, "output")
    write_json(Path(cfg.output) / "settings.json", settings)
    print("\n".join(lines), flush=True)
    pipe = load(cfg, device)
    calibrate(cfg, pipe)


if __name__ == "__main__":
    cli.run(main)
