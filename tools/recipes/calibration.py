"""A calibration: what is recorded of a checkpoint once, and the search for the best sampler at a budget.

Letters: N steps of a run, p a state of it.
"""

import hashlib
import json
import math
import random
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs import UserError
from configs.files import write_json
from sample.distributed import Environment
from sample.pipeline import Pipeline, with_options
from sample.plans import UNCACHED, make_plan
from tools.recipes.cached import LARGEST_GAP, FeatureChanges, estimate_changes, gap_errors, measure_features
from tools.recipes.candidates import (
    EXPONENTS,
    ORDERS,
    ROUNDING,
    SOLVERS,
    Candidate,
    Results,
    fitted_candidate,
    held_candidate,
    interval_candidates,
    measure,
    num_placed,
    placed_candidate,
    plain_candidates,
    rows,
    with_moves,
)
from tools.recipes.fit import place_steps
from tools.recipes.options import CalibrateConfig
from tools.recipes.search import (
    angles_of,
    choose_steps,
    fit_moves,
    gram_of,
    growth_positions,
    interpolate_growth,
    measure_growth,
)
from tools.recipes.trajectories import load_trajectories, record, trajectory_path

PROBED_CLIPS = 4  # calibration seeds on which growth and deep features are measured
GROWTH_POSITIONS = 6  # states of a run from which the growth of errors is measured
SCREENED_CLIPS = 7  # calibration seeds on which the variants of placed plans are compared
CONVERGED = {"sample_method": "dpmsolver++", "num_sampling_steps": 100}


def target_options(cfg: CalibrateConfig) -> CalibrateConfig:
    """The options of the reference runs."""
    return replace(cfg, **CONVERGED) if cfg.target == "converged" else cfg


class Calibration:
    """One run of the program: its folder, its seeds in batches, and its progress."""

    def __init__(self, cfg: CalibrateConfig, pipe: Pipeline, env: Environment):
        self.cfg, self.pipe, self.env, self.folder = cfg, pipe, env, Path(cfg.output)
        self.target = with_options(pipe, **CONVERGED) if cfg.target == "converged" else pipe
        self.calibration = range(cfg.calibration_seed, cfg.calibration_seed + cfg.num_calibration)
        self.held_out = range(cfg.held_out_seed, cfg.held_out_seed + cfg.num_clips)
        self.trajectories = self.folder / "trajectories"
        self.results = Results(self.folder / "results", env.rank)
        self.fit_errors: dict[str, list[float]] = {}  # of fitted candidates, for each calibration seed
        self.reference = make_plan(cfg, UNCACHED)

    # What is recorded once

    def batches(self, seeds: range, num_processes: int | None = None) -> list[list[int]]:
        """Seeds in batches, small enough for each of `num_processes` (None: of all) to have one."""
        size = min(self.cfg.per_proc_batch_size, math.ceil(len(seeds) / (num_processes or self.env.world_size)))
        return [list(seeds[i : i + size]) for i in range(0, len(seeds), size)]

    def progress(self, what: str, total: int) -> tqdm:
        return tqdm(total=total, desc=what, unit="step", mininterval=1, disable=not self.env.is_main)

    def record_runs(self) -> None:
        """The reference runs: every step of the calibration seeds, the last state of all seeds that are compared."""
        sets = (self.calibration, True), (self.held_out, False)
        batches = [(batch, every_step) for seeds, every_step in sets for batch in self.batches(seeds)]
        todo = [
            (seeds, every_step)
            for seeds, every_step in batches[self.env.rank :: self.env.world_size]
            if not all(trajectory_path(self.trajectories, seed).exists() for seed in seeds)
        ]
        with self.progress("recording", len(todo) * self.target.diffusion.num_timesteps) as bar:
            for seeds, every_step in todo:
                record(self.target, self.trajectories, seeds, every_step, bar.update)
        self.env.barrier()

    @cached_property
    def growth(self) -> np.ndarray:
        """By how much an error of each state of the reference run grows until the end, (N + 1,)."""
        path, N = self.folder / "growth.json", self.target.diffusion.num_timesteps
        positions = growth_positions(N, GROWTH_POSITIONS)
        if not self.env.from_first(path.is_file):
            batches = self.batches(self.calibration[:PROBED_CLIPS])[self.env.rank :: self.env.world_size]
            with self.progress("growth of errors", 2 * len(batches) * sum(N - p for p in positions)) as bar:
                own = [
                    measure_growth(
                        self.target, load_trajectories(self.trajectories, seeds), seeds, positions, bar.update
                    )
                    for seeds in batches
                ]
            measured = torch.cat(self.env.gather(own), dim=1)  # (positions, clips)
            growth = interpolate_growth(measured, positions, N + 1).tolist()
            if self.env.is_main:
                write_json(path, {"positions": positions, "measured": measured.tolist(), "growth": growth})
        return np.array(self.env.from_first(lambda: json.loads(path.read_text()))["growth"])

    @cached_property
    def own_growth(self) -> np.ndarray:
        """The growth at the states of the options' own sampler."""
        known, wanted = ([*pipe.diffusion.timestep_map[::-1], -1] for pipe in (self.target, self.pipe))
        return np.exp(np.interp(wanted, known[::-1], np.log(self.growth)[::-1]))

    @cached_property
    def features(self) -> FeatureChanges:
        """How deep features change along a run of the options' own sampler."""

        def read() -> dict:
            path, seeds = self.folder / "features.json", self.calibration[:PROBED_CLIPS]
            if not path.is_file():
                batches = self.batches(seeds, num_processes=1)
                with self.progress("deep features", len(batches) * self.pipe.diffusion.num_timesteps) as bar:
                    found = measure_features(self.pipe, batches, self.cfg.cache.depth, bar.update)
                write_json(path, asdict(found))
            return json.loads(path.read_text())

        return FeatureChanges(**self.env.from_first(read))

    @cached_property
    def gram(self) -> Tensor:
        """Products of the recorded states and velocities."""
        return gram_of(self.trajectories, self.calibration)

    # Candidates and their errors on the calibration seeds

    def measure_all(self, candidates: list[Candidate], seeds: range, what: str) -> None:
        """Measures what is missing. The candidates of a batch take turns, so that their seconds compare."""
        self.results.read()
        batches = self.batches(seeds)[self.env.rank :: self.env.world_size]
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
        self.env.barrier()
        self.results.read()

    def error(self, candidate: Candidate, seeds: range) -> float:
        """The geometric mean of a candidate's relative L2 over calibration seeds, from its fit or its measurements."""
        if own := self.fit_errors.get(candidate.name):
            return math.exp(np.log(own[: len(seeds)]).mean())
        return self.results.error(candidate, seeds)

    def fit(self, candidate: Candidate) -> Candidate:
        """The candidate with fitted moves."""
        plan = candidate.plan
        key = hashlib.sha256(repr((plan.timesteps, plan.weights, plan.guided)).encode()).hexdigest()[:16]
        path, batches = self.folder / "fits" / f"{key}.json", self.batches(self.calibration)
        if not self.env.from_first(path.is_file):
            total = len(plan.timesteps) * len(batches[self.env.rank :: self.env.world_size])
            with self.progress(f"fitting {candidate.name}", total) as bar:
                fit = fit_moves(self.target, self.trajectories, batches, plan, self.env, bar.update)
            if self.env.is_main:
                write_json(path, {"name": candidate.name} | asdict(fit))
        fit = self.env.from_first(lambda: json.loads(path.read_text()))
        self.fit_errors[candidate.name] = fit["errors"]
        return with_moves(candidate, fit["moves"])

    def can_place(self, num_evaluated: int) -> bool:
        """Whether so many evaluated steps, at most LARGEST_GAP apart, reach over all steps."""
        return num_evaluated >= 2 and num_evaluated * LARGEST_GAP >= self.cfg.num_sampling_steps

    def placed(self, budget: float) -> list[Candidate]:
        """The best plan of placed full steps around each solver, measured on all calibration seeds."""
        num_full = num_placed(self.cfg, budget)
        if not self.can_place(num_full):
            return []
        screened = self.calibration[:SCREENED_CLIPS]
        variants = {
            placed_candidate(self.cfg, steps, self.cfg.sample_method, order, f"growth^{exponent:g}"): steps
            for order in ORDERS
            for exponent in EXPONENTS
            for steps in [place_steps(gap_errors(self.features, self.own_growth**exponent, order), num_full)]
        }
        self.measure_all(list(variants), screened, f"{percent(budget)} %, placed")
        best = min(variants, key=lambda variant: self.error(variant, screened))
        origin = best.name.rpartition(", ")[2]
        others = [s for s in SOLVERS if s != self.cfg.sample_method] if self.cfg.sample_method in SOLVERS else []
        found = [best, *(placed_candidate(self.cfg, variants[best], s, best.order, origin) for s in others)]
        self.measure_all(found, self.calibration, f"{percent(budget)} %, placed")
        return found

    def held(self, budget: float) -> list[Candidate]:
        """Plans that hold x_0 between placed evaluations, of a sampler that draws noise on its way.

        Only by reuse: the estimates follow the noise of each step, and a forecast would carry it on.
        """
        num_steps = int(budget * self.cfg.num_sampling_steps + ROUNDING)
        if self.cfg.sample_method in SOLVERS or not self.can_place(num_steps):
            return []
        changes = estimate_changes(self.pipe.diffusion, self.cfg.sample_method, self.trajectories, self.calibration)
        found = []
        for exponent in EXPONENTS:
            steps = place_steps(gap_errors(changes, self.own_growth**exponent, 0), num_steps)
            found.append(held_candidate(self.cfg, steps, f"growth^{exponent:g}"))
        self.measure_all(found, self.calibration, f"{percent(budget)} %, held")
        return found

    def fitted(self, budget: float) -> list[Candidate]:
        """The fitted solvers of a budget, of every kind."""
        cfg = self.cfg
        if cfg.sample_method not in SOLVERS:
            return []
        angles, timesteps = angles_of(self.target.diffusion), self.target.diffusion.timestep_map[::-1]

        def fitted(kind: str, exponent: float) -> Candidate:
            """The candidate of a kind with as many steps as the budget pays for."""
            for count in range(len(timesteps), 1, -1):
                candidate = fitted_candidate(cfg, kind, timesteps[:count], "")  # costs as much as that with other steps
                if candidate.plan.share <= budget + ROUNDING or count == 2:
                    steps = choose_steps(self.gram, angles, self.growth, count, exponent, cfg.process == "flow")
                    chosen = [timesteps[i] for i in steps]
                    return self.fit(fitted_candidate(cfg, kind, chosen, f"growth^{exponent:g}"))
            raise AssertionError("two steps of the reference at least")

        found = [fitted("fitted", exponent) for exponent in EXPONENTS]
        exponent = EXPONENTS[int(np.argmin([self.error(each, self.calibration) for each in found]))]
        kinds = ["fitted+cached"] + ["fitted+unguided"] * (cfg.cfg_scale != 1)
        return found + [fitted(kind, exponent) for kind in kinds]

    def climb(self, candidate: Candidate) -> Candidate:
        """The candidate after `num_climbs` trials to move one of its steps by one."""
        draw, best = random.Random(candidate.name), candidate
        for trial in range(1, self.cfg.num_climbs + 1):
            moved = self.neighbor(best, draw, f"{candidate.name}, climb {trial}")
            if moved.kind == "fitted":
                moved = self.fit(moved)
            else:
                self.measure_all([moved], self.calibration, moved.name)
            if self.error(moved, self.calibration) < self.error(best, self.calibration):
                best = moved
        return best

    def neighbor(self, candidate: Candidate, draw: random.Random, name: str) -> Candidate:
        """The candidate with one of its full steps (all that are evaluated, if it is fitted) moved by one."""
        fitted = candidate.kind == "fitted"
        grid = (self.target if fitted else self.pipe).diffusion.timestep_map[::-1]
        plan = candidate.plan
        steps = [grid.index(t) for t, full in zip(plan.timesteps, plan.full, strict=True) if full]
        free = [(i, s + d) for i, s in enumerate(steps) for d in (-1, 1) if i and s + d < len(grid)]
        free = [(i, step) for i, step in free if step not in steps]
        if free:
            i, step = draw.choice(free)
            steps[i] = step
        if fitted:
            moved = fitted_candidate(self.cfg, candidate.kind, [grid[s] for s in steps], "")
        elif candidate.kind == "held":
            moved = held_candidate(self.cfg, steps, "")
        else:
            moved = placed_candidate(self.cfg, steps, plan.solver, candidate.order, "")
        return replace(moved, name=name, plan=replace(moved.plan, name=name))

    def solve(self, budget: float) -> dict[Candidate, float]:
        """All candidates of a budget with their errors on the calibration seeds."""
        plain = plain_candidates(self.cfg, budget)
        self.measure_all(plain, self.calibration, f"{percent(budget)} %, plain")
        found = [*plain, *self.placed(budget), *self.held(budget), *self.fitted(budget)]
        errors = {candidate: self.error(candidate, self.calibration) for candidate in found}
        movable = sorted((c for c in found if c.kind in ("placed", "held", "fitted")), key=errors.__getitem__)
        for candidate in movable[: 2 if self.cfg.num_climbs else 0]:
            climbed = self.climb(candidate)
            errors[climbed] = self.error(climbed, self.calibration)
        return errors

    def cheapest(self, min_psnr: float) -> float:
        """The smallest budget, in steps of N, whose recipe has the PSNR on the calibration seeds; by bisection.

        Raises:
            UserError: not even the largest budget reaches it.
        """
        N = self.cfg.num_sampling_steps
        low, high = 1, N - 1  # steps that do not suffice; steps that do

        def reached(num_steps: int) -> float:
            errors = self.solve(num_steps / N)
            chosen = min(errors, key=errors.__getitem__)
            self.measure_all([chosen], self.calibration, chosen.name)
            return float(np.mean(self.results.values(chosen, "psnr", self.calibration)))

        if (most := reached(high)) < min_psnr:
            raise UserError(f"min_psnr: {min_psnr:g} dB is out of reach; {high} of {N} steps' MACs give {most:.1f} dB")
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) >= min_psnr else (middle, high)
        return high / N

    def report_on(self, budget: float) -> tuple[Candidate, list[dict]]:
        """The chosen candidate of a budget, and its table on the held-out seeds."""
        errors = self.solve(budget)
        best = {c.kind: c for c in sorted(errors, key=errors.__getitem__, reverse=True)}  # of each kind
        chosen, rivals = min(best.values(), key=errors.__getitem__), interval_candidates(self.cfg, budget)
        finalists = [c for c in errors if c.kind == "plain" or c is best[c.kind]]
        self.measure_all([*rivals, *finalists], self.held_out, f"{percent(budget)} %, held-out seeds")
        errors = {**dict.fromkeys(rivals), **errors}
        return chosen, rows(self.results, errors, self.held_out, chosen, self.reference.macs)


def percent(budget: float) -> str:
    return f"{100 * budget:.3g}"
