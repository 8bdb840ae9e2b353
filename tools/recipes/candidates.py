"""The samplers that compete at a budget, and what is measured of them on paired seeds.

Letters: B batch, F frames, C channels of the latents, h = H / 8, n clips.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from configs import CacheOptions, SampleConfig
from models.hardware import timed
from sample.folder import labels_of
from sample.pipeline import Pipeline, sample_latents
from sample.plans import UNCACHED, Plan, make_plan
from sample.recipes import FITTED, Recipe, Step
from sample.similarity import psnr
from tools.metrics.statistics import geometric_mean, ratio_interval
from tools.recipes.search import EXPONENTS, Fit, relative_l2

SOLVERS = ("ddim", "dpmsolver++", "unipc")  # that draw no noise on their way
LARGEST_INTERVAL = 12
ORDERS = (0, 1, 2)  # of the forecast


@dataclass(frozen=True)
class Candidate:
    """A sampler at a budget."""

    name: str
    kind: str  # plain | cached | fitted
    plan: Plan


def plain_candidates(cfg: SampleConfig, budget: float) -> list[Candidate]:
    """Every solver with as many uncached steps as cost at most `budget` of the reference; at least two steps."""
    num_steps = int(budget * cfg.num_sampling_steps + 1e-9)
    found = []
    for solver in SOLVERS if num_steps > 1 else ():
        options = replace(cfg, sample_method=solver, num_sampling_steps=num_steps)
        found.append(Candidate(f"{solver}, {num_steps} steps", "plain", make_plan(options, UNCACHED)))
    return found


def cached_candidates(cfg: SampleConfig, budget: float) -> list[Candidate]:
    """The paper's plan with the smallest interval that costs at most `budget`, with each order of the forecast."""
    for interval in range(2, LARGEST_INTERVAL + 1):
        plans = [make_plan(cfg, CacheOptions(interval=interval, order=order)) for order in ORDERS]
        if plans[0].share <= budget and plans[0].cached_steps:
            return [Candidate(plan.name, "cached", plan) for plan in plans]
    return []


def fitted_name(num_steps: int, exponent: float) -> str:
    return f"fitted, {num_steps} steps, growth^{exponent:g}"


def fitted_candidate(cfg: SampleConfig, fit: Fit, exponent: float) -> Candidate:
    """A fitted solver; its steps are some of those of the reference."""
    reference = make_plan(cfg, UNCACHED)
    plan = Plan(
        name=fitted_name(len(fit.steps), exponent),
        cache=UNCACHED,
        solver=FITTED,
        timesteps=tuple(reference.timesteps[i] for i in fit.steps),
        weights=((),) * len(fit.steps),
        macs=reference.macs * len(fit.steps) // len(reference.timesteps),
        macs_uncached=reference.macs,
        moves=tuple(map(tuple, fit.moves)),
    )
    return Candidate(plan.name, "fitted", plan)


def to_recipe(name: str, candidate: Candidate, cfg: SampleConfig, made_for: dict[str, Any], table: Any) -> Recipe:
    """The candidate as a recipe."""
    plan = candidate.plan
    moves = plan.moves or ((),) * len(plan.timesteps)
    steps = [Step(t, weights, move) for t, weights, move in zip(plan.timesteps, plan.weights, moves, strict=True)]
    reference = {"sample_method": cfg.sample_method, "num_sampling_steps": cfg.num_sampling_steps}
    return Recipe(name, plan.solver, plan.cache.depth, tuple(steps), reference, made_for, tuple(table))


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
    }


class Results:
    """What was measured, a line of JSON for each batch of a candidate; a later run goes on where one stopped."""

    def __init__(self, path: Path):
        self.path = path
        text = path.read_text() if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed process may have left part of a line
        if whole != text:
            path.write_text(whole)
        self.lines = [json.loads(line) for line in whole.splitlines()]

    def has(self, candidate: Candidate, batch: Sequence[int]) -> bool:
        """Whether the candidate was measured on a batch of seeds."""
        return any(line["candidate"] == candidate.name and line["seeds"] == list(batch) for line in self.lines)

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def values(self, candidate: Candidate, metric: str, seeds: Sequence[int]) -> list[float]:
        """A metric of the candidate, one value a seed."""
        found = {}
        for line in self.lines:
            if line["candidate"] == candidate.name:
                found |= dict(zip(line["seeds"], line[metric], strict=True))
        return [found[seed] for seed in seeds]

    def seconds(self, candidate: Candidate, seeds: Sequence[int]) -> float:
        """Seconds of sampling a clip, the median over the batches of `seeds`."""
        own = [line for line in self.lines if line["candidate"] == candidate.name and set(line["seeds"]) <= set(seeds)]
        return statistics.median(line["seconds"] / len(line["seeds"]) for line in own)


def best(results: Results, candidates: Sequence[Candidate], seeds: Sequence[int]) -> Candidate:
    """The candidate with the least geometric mean of errors."""
    return min(candidates, key=lambda candidate: geometric_mean(results.values(candidate, "l2", seeds)))


def rows(
    results: Results, candidates: Sequence[Candidate], seeds: Sequence[int], chosen: Candidate, reference_macs: int
) -> list[dict[str, Any]]:
    """A row for each candidate: cost, mean and geometric mean of errors, and the ratio to the best plain solver.

    The ratio is the geometric mean of the seeds' own ratios, with its 95 % interval. "Best" is judged on these same
    seeds, which favours the plain solver.
    """
    plain = [candidate for candidate in candidates if candidate.kind == "plain"]
    control = best(results, plain, seeds) if plain else None
    table = []
    for candidate in candidates:
        errors = results.values(candidate, "l2", seeds)
        row = {
            "sampler": candidate.name,
            "kind": candidate.kind,
            "chosen": candidate is chosen,
            "share": candidate.plan.macs / reference_macs,
            "seconds": results.seconds(candidate, seeds),
            "l2": sum(errors) / len(errors),
            "l2_geometric": geometric_mean(errors),
            "l1": sum(results.values(candidate, "l1", seeds)) / len(errors),
            "psnr": sum(results.values(candidate, "psnr", seeds)) / len(errors),
            "ratio": None,
        }
        if control and candidate is not control:
            row["ratio"] = ratio_interval(errors, results.values(control, "l2", seeds))
        table.append(row)
    return table


def fit_path(folder: Path, num_steps: int, exponent: float) -> Path:
    assert exponent in EXPONENTS
    return folder / f"{num_steps}-{exponent:g}.json"
