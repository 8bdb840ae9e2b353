"""Recipes: a sampler of one checkpoint as a file, step by step, with what it was made for and the table that shows why.

tools/calibrate.py makes them. A sampler executes a recipe and knows nothing of how its steps were chosen.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs import SampleConfig, require_path
from configs.errors import UserError, choice
from configs.files import differences, write_json
from diffusion.sampling import SAMPLERS, evaluations
from models.checkpoint import weights_hash

FORMAT = 1  # of the file; raise it when older code cannot execute newer files
FITTED = "fitted"  # the solver whose steps are the recipe's own moves
NUM_COEFFICIENTS = 5  # of a move, see diffusion.sampling.linear_multistep
MADE_FOR = (  # options that a recipe depends on, beside the checkpoint
    "process", "noise_schedule", "prediction", "diffusion_steps", "learn_sigma",
    "cfg_scale", "num_frames", "image_size",
)  # fmt: skip
FORGIVEN = {"cfg_scale", "num_frames", "image_size"}  # those that recipe_anyway lets differ


@dataclass(frozen=True)
class Step:
    """One step of a recipe."""

    t: float  # the original timestep that the model sees; of a flow 1000 s
    feature: tuple[float, ...] = ()  # weights of the last full steps' deep features, newest first; none: a full step
    # with depth 0, of their estimates of x_0
    move: tuple[float, ...] = ()  # of the fitted solver; none: another solver moves
    guided: bool = True  # False: the model runs with its labels alone


@dataclass(frozen=True)
class Recipe:
    """A sampler of one checkpoint."""

    name: str
    solver: str  # FITTED, or a sample_method
    depth: int  # outer layers at each end that run on cached steps; 0: none
    steps: tuple[Step, ...]  # from noise to clean
    reference: dict[str, Any]  # SamplerOptions of the run whose cost is 1
    made_for: dict[str, Any]  # see `fingerprint`
    table: tuple[dict[str, Any], ...] = ()  # what was measured on held-out seeds, losers included

    def __post_init__(self) -> None:
        timesteps = [step.t for step in self.steps]
        if not self.steps or timesteps != sorted(set(timesteps), reverse=True) or timesteps[-1] < 0:
            raise UserError(f"recipe {self.name}: its timesteps must fall from step to step, down to 0 or more")
        one_call = [name for name in SAMPLERS if len(evaluations(name, (1, 0))) == 2]  # of the model a step
        choice(f"recipe {self.name}: solver", self.solver, (FITTED, *one_call))
        full = 0
        for step in self.steps:
            if len(step.feature) > full:
                raise UserError(
                    f"recipe {self.name}: step t={step.t} reuses the deep features of {len(step.feature)} full steps, "
                    f"but {full} are before it"
                )
            full += not step.feature
            if not step.guided and any(each.feature for each in self.steps):
                raise UserError(
                    f"recipe {self.name}: step t={step.t} is not guided, but cached steps need the features"
                )
            if len(step.move) != (NUM_COEFFICIENTS if self.solver == FITTED else 0):
                raise UserError(f"recipe {self.name}: step t={step.t} has {len(step.move)} coefficients")
            if not all(map(math.isfinite, (*step.move, *step.feature))):
                raise UserError(f"recipe {self.name}: step t={step.t} has a number that is not finite")


def fingerprint(cfg: SampleConfig) -> dict[str, Any]:
    """What a recipe for resolved options depends on: the hash of the weights, and the options in MADE_FOR."""
    checkpoint = weights_hash(require_path(cfg, "ckpt"), cfg.weights)
    return {"checkpoint": checkpoint} | {key: getattr(cfg, key) for key in MADE_FOR}


def save_recipe(path: str | Path, recipe: Recipe) -> None:
    """Writes a recipe as JSON; the file appears whole or not at all."""
    blank = asdict(Step(t=-1))  # values that need no mention
    steps = [{key: value for key, value in asdict(step).items() if value != blank[key]} for step in recipe.steps]
    write_json(path, {"format": FORMAT} | asdict(recipe) | {"steps": steps})


def load_recipe(path: str | Path) -> Recipe:
    """Reads a recipe.

    Raises:
        UserError: no such file, no recipe, or one of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"recipe: nothing at {path}; make one with tools/calibrate.py")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise UserError(f"recipe: {path} is of another format than {FORMAT}: make it anew with tools/calibrate.py")
        steps = tuple(
            Step(step["t"], tuple(step.get("feature", ())), tuple(step.get("move", ())), step.get("guided", True))
            for step in content.pop("steps")
        )
        made_for = {"process": "gaussian"} | content.pop("made_for")  # older files do not name it
        return Recipe(steps=steps, made_for=made_for, **content | {"table": tuple(content.pop("table", ()))})
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # ValueError: no JSON, no UTF-8
        raise UserError(f"recipe: {path} is no recipe ({type(error).__name__}: {error})") from None


def check_recipe(cfg: SampleConfig) -> None:
    """Raises UserError unless the recipe of resolved options was made for their checkpoint and settings."""
    recipe = load_recipe(cfg.recipe)
    found = fingerprint(cfg)
    grave = differences(recipe.made_for, found, ignore=FORGIVEN)
    differ = grave if cfg.recipe_anyway else differences(recipe.made_for, found)
    if differ:
        hint = "" if grave else "; recipe_anyway=True runs it all the same"
        raise UserError(f"recipe: {cfg.recipe} was made for {differ}{hint}")
