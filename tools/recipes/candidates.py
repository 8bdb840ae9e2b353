"""The samplers that compete at a budget, and what is measured of them on paired seeds.

A budget is a share of the MACs of N uncached steps of the options' sampler; c is the share of a cached step in a full
one.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import CacheOptions, SampleConfig
from models.hardware import timed
from models.skip_cache import forecast_weights
from sample.folder import labels_of
from sample.pipeline import Pipeline, sample_latents
from sample.plans import UNCACHED, Plan, count_macs, make_plan
from sample.recipes import FITTED, Recipe, Step
from sample.similarity import is_flat, psnr
from tools.metrics.statistics import geometric_mean, ratio_interval
from tools.recipes.search import relative_l2

SOLVERS = ("ddim", "dpmsolver++", "unipc")  # that draw no noise on their way
LARGEST_INTERVAL = 12
ORDERS = (0, 1, 2)  # of the forecast
EXPONENTS = (0.5, 1.0)  # of the growth, in the weight of an error
UNGUIDED = 0.25  # share of the steps, the last ones, that the candidate with a guidance interval leaves unguided
ROUNDING = 1e-9  # budgets are fractions, and 0.43 * 100 is less than 43


@dataclass(frozen=True)
class Candidate:
    """A sampler at a budget."""

    name: str  # that of its measurements
    kind: str  # plain | interval | placed | held | fitted | fitted+cached | fitted+unguided
    plan: Plan
    order: int = 0  # of the forecast in its cached steps


def plain_candidates(cfg: SampleConfig, budget: float) -> list[Candidate]:
    """Every solver with as many uncached steps as the budget pays for.

    A sampler that draws noise on its way draws other noise in fewer steps. It takes all of its steps, evaluates the
    model at as many, evenly spaced ones, and holds x_0 between them.
    """
    N, found = cfg.num_sampling_steps, []
    num_steps = int(budget * N + ROUNDING)
    if num_steps < 2:
        return []
    if cfg.sample_method not in SOLVERS:
        return [held_candidate(cfg, even_steps(N, num_steps), "evenly", "plain")]
    for solver in SOLVERS:
        options = replace(cfg, sample_method=solver, num_sampling_steps=num_steps)
        found.append(Candidate(f"{solver}, {num_steps} steps", "plain", make_plan(options, UNCACHED)))
    return found


def even_steps(num_steps: int, count: int) -> list[int]:
    """`count` of `num_steps` steps, evenly spaced, beginning with the first."""
    return [n * num_steps // count for n in range(count)]


def interval_candidates(cfg: SampleConfig, budget: float) -> list[Candidate]:
    """The paper's plan with the smallest interval that the budget pays for, with each order of the forecast."""
    for interval in range(2, LARGEST_INTERVAL + 1):
        caches = [CacheOptions(interval=interval, depth=cfg.cache.depth, order=order) for order in ORDERS]
        plans = [make_plan(cfg, cache) for cache in caches]
        if plans[0].share <= budget and plans[0].cached_steps:
            return [Candidate(plan.name, "interval", plan, plan.cache.order) for plan in plans]
    return []


def cached_share(cfg: SampleConfig) -> float:
    """c, the MACs of a cached step divided by those of a full one."""
    return count_macs(cfg, 0, 1, cfg.cache.depth) / count_macs(cfg, 1)


def num_placed(cfg: SampleConfig, budget: float) -> int:
    """Full steps of N that the budget pays for if all others are cached; possibly 0 or less."""
    c = cached_share(cfg)
    return int((budget - c) / (1 - c) * cfg.num_sampling_steps + ROUNDING)


def build_plan(
    cfg: SampleConfig,
    name: str,
    solver: str,
    timesteps: Sequence[int],
    full: Sequence[bool],
    order: int = 0,
    guided: Sequence[bool] = (),
) -> Plan:
    """A plan of own timesteps and full steps, costed against N uncached steps of `cfg`."""
    unguided = len(guided) - sum(guided)
    return Plan(
        name=name,
        cache=replace(UNCACHED, depth=cfg.cache.depth),
        solver=solver,
        timesteps=tuple(timesteps),
        weights=tuple(map(tuple, forecast_weights(full, order))),
        macs=count_macs(cfg, sum(full), len(full) - sum(full), cfg.cache.depth, unguided),
        macs_uncached=count_macs(cfg, cfg.num_sampling_steps),
        guided=tuple(guided),
    )


def placed_candidate(cfg: SampleConfig, full_steps: Sequence[int], solver: str, order: int, origin: str) -> Candidate:
    """All N steps of `cfg` by `solver`, in full at `full_steps` and cached at the others."""
    timesteps = make_plan(cfg, UNCACHED).timesteps
    full = [n in set(full_steps) for n in range(len(timesteps))]
    name = f"{solver}, {len(full_steps)} of {len(full)} full, order {order}, {origin}"
    return Candidate(name, "placed", build_plan(cfg, name, solver, timesteps, full, order), order)


def held_candidate(cfg: SampleConfig, full_steps: Sequence[int], origin: str, kind: str = "held") -> Candidate:
    """All N steps of `cfg`: the model is evaluated at `full_steps`, and its estimate of x_0 is held at the others."""
    cfg = replace(cfg, cache=replace(cfg.cache, depth=0))
    return replace(placed_candidate(cfg, full_steps, cfg.sample_method, 0, f"x_0 held, {origin}"), kind=kind)


def fitted_candidate(cfg: SampleConfig, kind: str, timesteps: Sequence[int], origin: str) -> Candidate:
    """A solver at `timesteps` whose moves are still to be fitted.

    fitted+cached: every second step is cached, with a forecast of order 1.
    fitted+unguided: the last steps, a share of UNGUIDED, run without guidance.
    """
    K, cached = len(timesteps), kind == "fitted+cached"
    unguided = math.ceil(UNGUIDED * K) if kind == "fitted+unguided" else 0
    full = [n % 2 == 0 or not cached for n in range(K)]
    guided = [n < K - unguided for n in range(K)] if unguided else ()
    extra = ", every second cached" if cached else f", the last {unguided} unguided" if unguided else ""
    name = f"fitted, {K} steps{extra}, {origin}"
    return Candidate(name, kind, build_plan(cfg, name, FITTED, timesteps, full, int(cached), guided), int(cached))


def with_moves(candidate: Candidate, moves: Sequence[Sequence[float]]) -> Candidate:
    """The candidate with its fitted moves."""
    return replace(candidate, plan=replace(candidate.plan, moves=tuple(map(tuple, moves))))


def to_recipe(name: str, candidate: Candidate, cfg: SampleConfig, made_for: dict[str, Any], table: Any) -> Recipe:
    """The candidate as a recipe."""
    plan = candidate.plan
    blank = ((),) * len(plan.timesteps)
    columns = plan.timesteps, plan.weights, plan.moves or blank, plan.guided or (True,) * len(blank)
    steps = tuple(Step(*step) for step in zip(*columns, strict=True))
    reference = {"sample_method": cfg.sample_method, "num_sampling_steps": cfg.num_sampling_steps}
    return Recipe(name, plan.solver, plan.cache.depth, steps, reference, made_for, tuple(table))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def measure(
    pipe: Pipeline, candidate: Candidate, seeds: Sequence[int], reference: Tensor, reference_videos: Tensor
) -> dict[str, Any]:
    """Samples a batch and compares it with the reference run, clip by clip.

    Args:
        reference: the reference run's latents, (B, F, C, h, w).
        reference_videos: what they decode to, (B, F, 3, H, W).
    """
    labels = labels_of(seeds, pipe.cfg)
    latents, seconds = timed(pipe.device, sample_latents, pipe, seeds, labels, candidate.plan)
    a, b = latents.cpu(), reference
    videos = pipe.codec.decode(latents).cpu()
    return {
        "candidate": candidate.name,
        "seeds": list(seeds),
        "seconds": seconds,
        "l2": relative_l2(a, b).tolist(),
        "l1": ((a - b).abs().flatten(1).sum(1) / b.abs().flatten(1).sum(1)).tolist(),
        "psnr": [psnr(x, y) for x, y in zip(videos, reference_videos, strict=True)],
        "flat": [*map(is_flat, reference_videos)],
    }


class Results:
    """What was measured: a file for each process, with a line of JSON for each batch of a candidate.

    A later run goes on where one stopped.
    """

    def __init__(self, folder: Path, rank: int):
        self.folder, self.path = folder, folder / f"{rank}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed process may have left part of a line
        if whole != text:
            self.path.write_text(whole)
        self.lines: list[dict[str, Any]] = []

    def read(self) -> None:
        """Reads what all processes have measured."""
        files = sorted(self.folder.glob("*.jsonl"))
        self.lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def has(self, candidate: Candidate, seeds: Sequence[int]) -> bool:
        """Whether the candidate was measured on all of some seeds."""
        return bool(self.values(candidate, "l2", seeds))

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def values(self, candidate: Candidate, metric: str, seeds: Sequence[int]) -> list[float]:
        """A metric of the candidate, one value a seed; empty if a seed was not measured."""
        found = {}
        for line in self.lines:
            if line["candidate"] == candidate.name:
                found |= dict(zip(line["seeds"], line[metric], strict=True))
        return [found[seed] for seed in seeds] if found.keys() >= set(seeds) else []

    def seconds(self, candidate: Candidate, seeds: Sequence[int]) -> float:
        """Seconds of sampling a clip, the median over the batches of `seeds`."""
        own = [line for line in self.lines if line["candidate"] == candidate.name and set(line["seeds"]) <= set(seeds)]
        return statistics.median(line["seconds"] / len(line["seeds"]) for line in own)

    def error(self, candidate: Candidate, seeds: Sequence[int]) -> float:
        """The geometric mean of the candidate's relative L2 over seeds that were measured."""
        return geometric_mean(self.values(candidate, "l2", seeds))


def rows(
    results: Results,
    errors: dict[Candidate, float | None],
    seeds: Sequence[int],
    chosen: Candidate,
    reference_macs: int,
) -> list[dict[str, Any]]:
    """A row for each candidate: cost, error on the calibration seeds, and what was measured on the held-out `seeds`.

    "ratio" is the geometric mean of the seeds' own ratios of errors to the control, with its 95 % interval. The control
    is the best plain solver. It is the best on these same seeds, which favours it.

    Args:
        errors: candidate -> error on calibration seeds; None: not measured there.
    """
    held_out = [candidate for candidate in errors if results.values(candidate, "l2", seeds)]
    rivals = [c for c in held_out if c.kind == "plain"]
    control = min(rivals, key=lambda rival: results.error(rival, seeds), default=None)
    table = []
    for candidate, calibration in errors.items():
        row = {
            "sampler": candidate.name,
            "kind": candidate.kind,
            "chosen": candidate is chosen,
            "share": candidate.plan.macs / reference_macs,
            "calibration": calibration,
        }
        if candidate in held_out:
            own = results.values(candidate, "l2", seeds)
            row |= {
                "seconds": results.seconds(candidate, seeds),
                "l2": statistics.fmean(own),
                "l2_geometric": geometric_mean(own),
                "l1": statistics.fmean(results.values(candidate, "l1", seeds)),
                "psnr": statistics.fmean(results.values(candidate, "psnr", seeds)),
                "ratio": ratio_interval(own, results.values(control, "l2", seeds))
                if control not in (None, candidate)
                else None,
            }
        table.append(row)
    return table
