"""Plans: which steps of a sampling run are full and which are cached, their name, and their cost.

`parse_plan` reads --cache, `make_plan` computes the plan of some options, and `describe_plan` puts it into words.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from configs import PLAN_FORM, CacheOptions, SampleConfig
from configs.errors import UserError
from diffusion import make_diffusion
from diffusion.sampling import evaluations
from models import model_dimensions, parse_name
from models.macs import count_parameters, readable, step_macs
from models.skip_cache import check_cache_depth, explicit_plan, forecast_weights, interval_plan
from models.vaes import describe_vae
from sample.recipes import FITTED, Recipe, load_recipe

UNCACHED = CacheOptions(interval=1)
LONGEST_NAME = 32  # characters of a plan's name, which names folders


@dataclass(frozen=True)
class Plan:
    """The steps of a sampling run and their cost, which is that of one clip with guidance, without the VAE."""

    name: str  # "uncached", as --cache takes it, or a recipe's
    cache: CacheOptions
    solver: str  # a sample_method, or recipes.FITTED
    timesteps: tuple[float, ...]  # original ones, from noise to clean
    weights: tuple[tuple[float, ...], ...]  # for each step: of the kept deep features, newest first; none: a full step
    # With cache.depth 0 they are of the estimates of x_0, and nothing of the model runs at cached steps.
    # weights and `full` count a step for each call of the model, of which Heun's method makes two a timestep
    macs: int  # of all steps
    macs_uncached: int  # of the reference run; of a plan from options: if all steps were full
    moves: tuple[tuple[float, ...], ...] = ()  # for each step, the coefficients of a fitted solver
    guided: tuple[bool, ...] = ()  # for each step, whether it is guided; empty: all are

    @property
    def full(self) -> tuple[bool, ...]:
        """For each step, whether it runs in full."""
        return tuple(not weights for weights in self.weights)

    @property
    def full_steps(self) -> int:
        return sum(self.full)

    @property
    def cached_steps(self) -> int:
        return len(self.full) - sum(self.full)

    @property
    def share(self) -> float:
        """MACs divided by those of the uncached run; the inverse is the expected speed-up."""
        return self.macs / self.macs_uncached

    def record(self) -> dict[str, Any]:
        """Returns the plan for a JSON record; `steps` has a letter per step, F for full and c for cached."""
        return {
            "name": self.name,
            "text": plan_text(self.cache),
            "cache": asdict(self.cache),
            "solver": self.solver,
            "steps": "".join("F" if full else "c" for full in self.full),
            "full_steps": self.full_steps,
            "cached_steps": self.cached_steps,
            "macs": self.macs,
            "macs_uncached": self.macs_uncached,
        }


def parse_plan(text: str) -> CacheOptions:
    """Returns the options behind `uncached`, `N2`, `N2-900-50`, `N4-b2-o1`, ...; omitted parts have their defaults."""
    if text == "uncached":
        return UNCACHED
    match = re.fullmatch(
        r"(N(?P<interval>\d+)(-(?P<start>\d+)-(?P<stop>\d+))?|(?P<full_steps>0(,\d+)*))"
        r"(-b(?P<depth>\d+))?(-o(?P<order>\d+))?",
        text,
    )
    if not match:
        raise UserError(f"--cache {text}: expected {PLAN_FORM}, such as N2-900-50, N4-o1 or 0,1,4,9")
    options: dict[str, Any] = {key: value for key, value in match.groupdict().items() if value is not None}
    steps = options.pop("full_steps", None)
    options = {key: int(value) for key, value in options.items()}
    return CacheOptions(**options, full_steps=steps and [int(step) for step in steps.split(",")])


def plan_text(cache: CacheOptions) -> str:
    """Returns the shortest text that `parse_plan` reads as `cache`: uncached, N2, N2-800-100-b3, 0,1,4,9-o1, ..."""
    if cache.is_off:
        return "uncached"
    default = CacheOptions()
    window = "" if (cache.start, cache.stop) == (default.start, default.stop) else f"-{cache.start}-{cache.stop}"
    steps = f"N{cache.interval}{window}" if cache.full_steps is None else ",".join(map(str, cache.full_steps))
    depth = "" if cache.depth == default.depth else f"-b{cache.depth}"
    return steps + depth + ("" if cache.order == default.order else f"-o{cache.order}")


def plan_name(cache: CacheOptions) -> str:
    """Returns `plan_text`, or for a long list of full steps their number and a hash, such as 17full-3f2a9c81."""
    text = plan_text(cache)
    if len(text) <= LONGEST_NAME:
        return text
    return f"{len(cache.full_steps or ())}full-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def make_plan(cfg: SampleConfig, cache: CacheOptions | None = None) -> Plan:
    """Returns the plan of `cache` (None: the options of `cfg`) for the model, sampler and guidance of `cfg`.

    Raises:
        UserError: the model has too few layers for the plan, or a value is invalid.
    """
    if cfg.recipe and cache is None:
        return recipe_plan(load_recipe(cfg.recipe), cfg)
    cache = cache or cfg.cache
    if cache.interval is None and cache.full_steps is None:
        cache = replace(cache, interval=parse_name(cfg.model).cache_interval)
    if not cache.is_off and cache.depth:
        check_cache_depth(model_dimensions(cfg)["depth"] // 2, cache.depth)
    timesteps = make_diffusion(cfg, cfg.num_sampling_steps).timestep_map[::-1]
    calls = evaluations(cfg.sample_method, timesteps)
    if cache.full_steps is None:
        full = interval_plan(calls, cache.interval, cache.start, cache.stop)
    else:
        full = explicit_plan(cache.full_steps, len(calls))
    return Plan(
        name=plan_name(cache),
        cache=cache,
        solver=cfg.sample_method,
        timesteps=tuple(timesteps),
        weights=tuple(map(tuple, forecast_weights(full, cache.order))),
        macs=count_macs(cfg, sum(full), len(full) - sum(full), cache.depth),
        macs_uncached=count_macs(cfg, len(full)),
    )


def recipe_plan(recipe: Recipe, cfg: SampleConfig) -> Plan:
    """Returns the plan of a recipe for the model and guidance of `cfg`."""
    full = sum(not step.feature for step in recipe.steps)
    if full < len(recipe.steps) and recipe.depth:
        check_cache_depth(model_dimensions(cfg)["depth"] // 2, recipe.depth)
    return Plan(
        name=recipe.name,
        cache=replace(UNCACHED, depth=recipe.depth),
        solver=recipe.solver,
        timesteps=tuple(step.t for step in recipe.steps),
        weights=tuple(step.feature for step in recipe.steps),
        moves=tuple(step.move for step in recipe.steps) if recipe.solver == FITTED else (),
        guided=tuple(step.guided for step in recipe.steps),
        macs=count_macs(cfg, full, len(recipe.steps) - full, recipe.depth, sum(not s.guided for s in recipe.steps)),
        macs_uncached=count_macs(cfg, recipe.reference["num_sampling_steps"]),
    )


def count_macs(cfg: SampleConfig, full: int, cached: int = 0, depth: int = 1, unguided: int = 0) -> int:
    """Returns the MACs of one clip in so many full and cached steps; guidance doubles them, but not in `unguided`."""
    step = step_macs(cfg, depth if cached else 1)
    rows = 1 if cfg.cfg_scale == 1 else 2  # guidance runs each clip with its label and with the null label
    return rows * (full * step.full + cached * step.cached) - (rows - 1) * unguided * step.full


def describe_plan(cfg: SampleConfig, plan: Plan) -> str:
    """Returns a plan in one line: its steps, its MACs, and the expected speed-up."""
    guidance = "" if cfg.cfg_scale == 1 else f" with guidance {cfg.cfg_scale:g}"
    line = (
        f"plan: {plan.name}, {plan.solver} {len(plan.timesteps)}{guidance}: {plan.full_steps} full and "
        f"{plan.cached_steps} cached steps; {readable(plan.macs)} a clip"
    )
    if plan.share < 1:
        uncached = readable(plan.macs_uncached)
        line += f", {plan.share:.1%} of uncached ({uncached}); expected speed-up {1 / plan.share:.2f}x"
    return line


def describe_run(cfg: SampleConfig, plans: Sequence[Plan], device: torch.device) -> list[str]:
    """Returns lines that describe a run: the model, then each plan."""
    size = count_parameters(cfg)
    return [
        f"model: {cfg.model}, {size:,} parameters, {cfg.precision} on {device.type}, attention {cfg.attention_mode}",
        describe_vae(cfg),
        *(describe_plan(cfg, plan) for plan in plans),
    ]
