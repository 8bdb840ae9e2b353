"""Stability of a model's features: the analysis of the Skip-DiT paper (arXiv:2411.17616), of one model or of several.

    python tools/stability.py                                                  # the demo's Skip-DiT
    python tools/stability.py --model Skip-DiT=skip.pt --model Latte=latte.pt  # twins, alike but for their skips
    python tools/stability.py --config configs/ucf101/ucf101_sample_skip.yaml num_clips=4 points=2 precision=bf16

The program answers three questions in cosine similarities over the width, averaged over tokens and clips:
  neighbours  How alike are the features of neighbouring steps, by layer and timestep? It compares each layer's output,
              as the paper does, and its update, which attention and MLP add to the layer's input. Outputs carry the
              position embeddings, which are the same at every step and make outputs alike; updates do not.
  cached      How alike are the deep feature that Skip-Cache reuses (it enters the outer tail) and that of a full step?
              It compares them by age in steps along the uncached run, also for a Latte, which cannot run a cache, and
              along the cached run. The plan is that of the options, with cache.interval=4 if they have none. Means by
              age are over the steps that this plan could cache with some interval.
  landscape   How alike are the features of weights theta + a u + b v and of theta? u and v are random directions, each
              filter as long as the model's own; biases and norms stay (Li et al. 2018, arXiv:1712.09913, section 4).
              It compares the deep feature, the last layer's output, and the prediction, whose tokens are frames. A
              Skip-DiT has a second landscape, in which only its trunk moves: the weights that a Latte also has.
              The inputs are those of the uncached run at a quarter, a half and three quarters of its steps.
The models sample the same seeds with the same options, in fp32 unless `precision` says otherwise. With guidance, only
the rows with a label count. The program writes {neighbours,cached,landscape}.png and stability.json to `output`.
Letters: N clips of a batch, F frames, T tokens of a frame, D width, L layers, S steps, K ages, P points of a direction.
"""

import sys
from collections import defaultdict, deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import SampleConfig, UserError, cli, option, require_path
from sample.options import DEMO, file_checks, load_sampling


@dataclass(kw_only=True)
class StabilityConfig(SampleConfig):
    """The analysis."""

    num_clips: int = option(7, "seeds seed, seed + 1, ...", least=1)
    radius: float = option(0.5, "largest |a| and |b| of the landscape; 1: a filter's length", above=0)
    points: int = option(5, "points of the landscape to each side of 0", least=1)
    output: str = option("results/stability", "the folder to write", path=True)


parser = cli.Parser(__doc__, StabilityConfig, DEMO)
parser.add_argument(
    "--model", action="append", dest="models", metavar="NAME=CKPT", help="repeat it to compare; default: ckpt"
)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs.files import check_writable, write_json
from configs.tables import markdown_table
from diffusion import make_diffusion
from models.checkpoint import count_skips
from models.hardware import default_device
from models.latte import Latte
from models.skip_cache import cached_step, full_step
from sample.folder import labels_of, make_record
from sample.pipeline import Pipeline, load, resolve, sample_latents
from sample.plans import UNCACHED, Plan, describe_run, make_plan
from tools.common.models import named_checkpoints
from tools.common.plots import new_figure, save_figure

AGES = 5  # steps back: the paper's plans go to N = 6
INTERVAL = 4  # N of the plan where the options have none
PLACES = (0.25, 0.5, 0.75)  # of the run: the steps from which the landscape has its inputs
FEATURES = ("deep feature", "last layer's output", "prediction")  # of the landscape
STILL = {  # key of a landscape -> names of parameters that it does not move; the tables are not learned
    "landscape": ("pos_embed", "temp_embed"),
    "landscape_trunk": ("pos_embed", "temp_embed", "skip_"),
}
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)  # of the landscape's contour lines

Inputs = tuple[Tensor, Tensor, Tensor | None]  # x (N, F, C, H, W), t (N,), y (N,) of a step


def configure(
    cfg: StabilityConfig, wanted: list[str] | None, device: torch.device
) -> tuple[Plan, dict[str, StabilityConfig]]:
    """The plan, and the resolved options of each model by name, uncached.

    Args:
        wanted: NAME=CKPT each; None: the model of `cfg`.

    Raises:
        UserError: a checkpoint is missing, there are too few steps, the plan caches no step or does not fit a model.
    """
    files = named_checkpoints(wanted or [f"{cfg.model}={require_path(cfg, 'ckpt')}"])
    if cfg.num_sampling_steps <= AGES:
        raise UserError(f"num_sampling_steps: {cfg.num_sampling_steps} is too few to look {AGES} steps back")
    cache = resolve(cfg, device).cache
    if not cache.depth:
        raise UserError("cache.depth: 0 keeps no deep feature to look at; give 1 or more")
    plan = make_plan(cfg, replace(cache, interval=INTERVAL) if cache.is_off else cache)
    if len(plan.full) > len(plan.timesteps):
        raise UserError(f"sample_method: {cfg.sample_method} runs the model twice in a step; choose one that does not")
    if not plan.cached_steps:
        raise UserError(f"cache: {plan.name} runs all {cfg.num_sampling_steps} steps in full: nothing is reused")
    models = {}
    for name, ckpt in files.items():
        models[name] = resolve(replace(cfg, ckpt=ckpt, num_skips=count_skips(ckpt), cache=UNCACHED), device)
    return plan, models


def analyse(models: dict[str, StabilityConfig], plan: Plan, device: torch.device) -> dict[str, Any]:
    """The record in stability.json: all similarities of all models."""
    cfg = next(iter(models.values()))  # the options below are the same for all models
    timesteps = make_diffusion(cfg, cfg.num_sampling_steps).timestep_map[::-1]
    seeds = list(range(cfg.seed, cfg.seed + cfg.num_clips))
    kept = [int(place * len(timesteps)) for place in PLACES]
    axis = cfg.radius * torch.arange(-cfg.points, cfg.points + 1) / cfg.points  # (P,), exactly 0 in its middle
    record = {
        "what": "cosine similarities of features, see tools/stability.py; null: nothing to compare",
        "plan": plan.name,
        "full_steps": list(plan.full),
        "timesteps": timesteps,
        # Steps that could be cached: not before cache.start, and not once the cache is emptied for good.
        "window": [a >= plan.cache.stop and b < plan.cache.start for a, b in pairwise([-1, *timesteps])],
        "seeds": seeds,
        "labels": labels_of(seeds, cfg),
        "landscape_axis": axis.tolist(),
        "landscape_timesteps": [timesteps[step] for step in kept],
        "models": {},
    }
    pipes = {name: load(each, device) for name, each in models.items()}  # load all of them before hours with the first
    for name, pipe in pipes.items():
        model, inputs = compare_steps(pipe, name, seeds, plan, kept)
        for key, still in STILL.items():
            if key == "landscape" or pipe.model.num_skips:
                grid = compare_weights(pipe.model, f"{name}: {key}", inputs, plan.cache.depth, axis, still, cfg.seed)
                model[key] = dict(zip(FEATURES, to_lists(grid), strict=True))
        record["models"][name] = {**make_record(pipe.cfg, device), "summary": summarize(model, record), **model}
    return record


def compare_steps(
    pipe: Pipeline, name: str, seeds: list[int], plan: Plan, kept: list[int]
) -> tuple[dict[str, Any], list[Inputs]]:
    """Similarities along an uncached run and along the cached one, and the inputs of the steps `kept`.

    Returns:
        Nested lists by key, with None for nan:
            outputs, updates: (L, S - 1), steps 1 ... S - 1 with the step before.
            ages: (K, S), the deep feature with that of 1 ... K steps before; nan if there was none.
            reused: (S,), the deep feature with that of the plan's last full step; nan at full steps.
            reused_cached: (S,), along the cached run: the deep feature with the one that is reused (a forecast, with
                cache.order). Only of a model with skips.
        The inputs of each batch at the steps `kept`.
    """
    model, size = pipe.model, pipe.cfg.per_proc_batch_size
    batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    runs: dict[str, list[list[Tensor]]] = defaultdict(list)  # key -> batches -> steps
    inputs: list[Inputs] = []
    with tqdm(total=len(batches) * len(plan.full) * (2 if model.num_skips else 1), desc=name, unit="step") as bar:
        for batch in batches:
            labels = labels_of(batch, pipe.cfg)
            watch = Watch(model, len(batch), plan, kept)
            sample_latents(replace(pipe, uncached=watch), batch, labels, on_step=bar.update)
            for key in ("neighbours", "ages", "reused"):
                runs[key].append(getattr(watch, key))
            inputs += watch.inputs
            if model.num_skips:
                runs["reused_cached"].append(watch_cached_run(pipe, batch, labels, plan, bar.update))
    similarities = {key: over_clips(batches) for key, batches in runs.items()}  # (S or S - 1, ...)
    similarities["outputs"], similarities["updates"] = similarities.pop("neighbours").T.chunk(2)
    similarities["ages"] = similarities["ages"].T
    return {key: to_lists(values) for key, values in similarities.items()}, inputs


def over_clips(batches: list[list[Tensor]]) -> Tensor:
    """The mean over all clips: (..., N) for each step of each batch -> (S, ...)."""
    return torch.cat([torch.stack(steps) for steps in batches], dim=-1).mean(-1)


class Watch:
    """The denoiser of one sampling run: a model that compares the features of each step with those of earlier steps.

    It holds the features of one step, and the deep features of `AGES` steps; similarities are (N,) tensors.

    Args:
        model: the Latte that denoises.
        clips: N, the number of rows that count: the first ones of a call.
        plan: gives the steps that run in full, and b, the number of layers after the deep feature.
        kept: the steps whose inputs are kept.
    """

    def __init__(self, model: Latte, clips: int, plan: Plan, kept: list[int]):
        self.model, self.clips, self.kept = model, clips, kept
        self.depth, self.full = plan.cache.depth, plan.full
        self.before: list[Tensor] = []
        self.past: deque[Tensor] = deque(maxlen=AGES)  # deep features, the newest first
        self.neighbours: list[Tensor] = []  # (2L, N) each, of all steps but the first
        self.ages: list[Tensor] = []  # (K, N)
        self.reused: list[Tensor] = []  # (N,)
        self.inputs: list[Inputs] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, F, C, H, W), t (B,), y (B,) -> (B, F, 2C, H, W)."""
        step, N = len(self.ages), self.clips
        if step in self.kept:
            self.inputs.append((x[:N], t[:N], None if y is None else y[:N]))
        out, outputs, updates = run_layers(self.model, x, t, y)
        features = [feature[:N] for feature in outputs + updates]
        deep = outputs[-1 - self.depth][:N]
        if self.before:
            self.neighbours.append(torch.stack([similarity(*pair) for pair in zip(features, self.before, strict=True)]))
        ages = [similarity(deep, old) for old in self.past]
        self.ages.append(torch.stack(ages + [no_similarity(N)] * (AGES - len(ages))))
        if self.full[step]:
            self.cached = deep
        self.reused.append(no_similarity(N) if self.full[step] else similarity(deep, self.cached))
        self.before = features
        self.past.appendleft(deep)
        return out


def no_similarity(clips: int) -> Tensor:
    """(N,) nan, for a step without a feature to compare with."""
    return torch.full([clips], torch.nan, dtype=torch.float64)


def run_layers(model: Latte, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`model(x, t, y)`, each layer's output, and each layer's update of its input: (B, F, T, D) each."""
    x, c = model.embed(x, t, y)
    skips: list[Tensor] = []
    outputs, updates = [], []
    for i in range(model.num_layers):
        x = model.merge(i, x, skips)
        outputs.append(model.layer(i, x, c))
        updates.append(outputs[-1] - x)
        x = outputs[-1]
        if i < model.num_skips:
            skips.append(x)
    return model.unembed(x, c), outputs, updates


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine over the width, mean over the tokens of a clip: (N, F, T, D) twice -> (N,) on the CPU.

    float64 and one square root give equal features a similarity of exactly 1.
    """
    a, b = a.double(), b.double()
    dot, squares_a, squares_b = ((p * q).sum(-1) for p, q in ((a, b), (a, a), (b, b)))  # (N, F, T) each
    return (dot / (squares_a * squares_b).sqrt()).flatten(1).mean(1).cpu()


def watch_cached_run(
    pipe: Pipeline, seeds: list[int], labels: list[int] | None, plan: Plan, on_step: Callable[[], object]
) -> list[Tensor]:
    """Similarities (N,) at each step of a cached run: the deep feature that it reuses with that of a full step."""
    N, similarities = len(seeds), []

    def full(*args: Any) -> tuple[Tensor, Tensor]:
        similarities.append(no_similarity(N))
        return full_step(*args)

    def cached(model: Latte, depth: int, x: Tensor, t: Tensor, y: Tensor | None, deep: Tensor) -> Tensor:
        _, fresh = full_step(model, depth, x, t, y)
        similarities.append(similarity(deep[:N], fresh[:N]))
        return cached_step(model, depth, x, t, y, deep)

    sample_latents(replace(pipe, steps=(full, cached)), seeds, labels, plan, on_step)
    return similarities


@torch.no_grad()
def compare_weights(
    model: Latte, name: str, inputs: list[Inputs], depth: int, axis: Tensor, still: tuple[str, ...], seed: int
) -> Tensor:
    """Similarities (3, P, P): each of FEATURES at weights theta + axis[i] u + axis[j] v with that at theta."""
    generator = torch.Generator().manual_seed(seed)
    u, v = random_direction(model, still, generator), random_direction(model, still, generator)
    own = [last_features(model, depth, *each) for each in inputs]
    other = deepcopy(model)  # only the copy's weights move
    grid = torch.empty(3, len(axis), len(axis), dtype=torch.float64)
    for i, j in tqdm(list(product(range(len(axis)), repeat=2)), desc=name, unit="point"):
        for key in u:
            weight = model.get_parameter(key)
            other.get_parameter(key).copy_(weight + axis[i] * u[key] + axis[j] * v[key])
        moved = [last_features(other, depth, *each) for each in inputs]
        for k in range(len(FEATURES)):
            grid[k, i, j] = torch.cat([similarity(a[k], b[k]) for a, b in zip(own, moved, strict=True)]).mean()
    return grid


def random_direction(model: Latte, still: tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Noise shaped like the weights of at least two dimensions; each filter (row) is as long as the model's.

    Args:
        still: weights whose names begin with one of these are left out.
    """
    direction = {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and not name.startswith(still):
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            length, own = (x.float().flatten(1).norm(dim=1) for x in (noise, weight))
            direction[name] = noise * (own / length).view(-1, *[1] * (weight.ndim - 1))
    return direction


def last_features(model: Latte, depth: int, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The three FEATURES of a step: (N, F, T, D) twice, and the prediction as (N, F, 1, C * H * W)."""
    x, c = model.embed(x, t, y)
    skips: list[Tensor] = []
    deep = model.run(range(model.num_layers - depth), x, c, skips)
    last = model.run(range(model.num_layers - depth, model.num_layers), deep, c, skips)
    prediction = model.unembed(last, c)[:, :, : model.in_channels]  # (N, F, C, H, W)
    return deep, last, prediction.flatten(2)[:, :, None]


def to_lists(x: Tensor) -> Any:
    """`x` as nested lists, with None for nan, which JSON does not have; `from_lists` is the inverse."""
    if x.ndim:
        return [to_lists(row) for row in x]
    return None if x.isnan() else x.item()


def from_lists(nested: list[Any]) -> np.ndarray:
    """The array of which `to_lists` made the lists; None becomes nan."""
    return np.array(nested, dtype=float)


def draw_neighbours(record: dict[str, Any], path: Path) -> None:
    """Draws maps over layers and timesteps: a column for each model, a row for outputs and one for updates."""
    from matplotlib.colors import LogNorm

    models = record["models"]
    figure, grid = new_figure(2, len(models), size=(4.6 * len(models) + 1, 6.4))
    for row, key in zip(grid, ("outputs", "updates"), strict=True):
        maps = [1 - from_lists(model[key]) for model in models.values()]  # (L, S - 1) each
        norm = LogNorm(min(map(np.nanmin, maps)), max(map(np.nanmax, maps)))
        for axes, name, values in zip(row, models, maps, strict=True):
            image = axes.imshow(values, norm=norm, origin="lower", aspect="auto", interpolation="nearest")
            axes.set(title=f"{name}: {key} of layers", ylabel="layer", yticks=range(len(values)))
            label_timesteps(axes, record["timesteps"][1:])
            if skips := models[name]["config"]["num_skips"]:
                first = len(values) - skips - 0.5
                axes.axhline(first, color="white", linestyle="--")
                axes.text(0, first, " skips merge from here on", color="white", size=8, va="bottom")
        figure.colorbar(image, ax=list(row), label="1 - cosine similarity\nwith the step before")
    save_figure(path, figure)


def draw_cached(record: dict[str, Any], path: Path) -> None:
    """Draws the similarity of the deep feature to the reused one: by age, and at the cached steps of the plan."""
    figure, ((by_age, by_step),) = new_figure(1, 2, size=(12, 4.4))
    for i, (name, model) in enumerate(record["models"].items()):
        means = 1 - means_by_age(model, record)  # (K,)
        by_age.plot(range(1, len(means) + 1), means, "o-", color=f"C{i}")
        by_step.plot(1 - from_lists(model["reused"]), "o-", color=f"C{i}", label=f"{name}, uncached run")
        if "reused_cached" in model:
            by_step.plot(1 - from_lists(model["reused_cached"]), "x:", color="black", label=f"{name}, cached run")
    by_age.set(title="uncached run, mean over steps that could be cached", xlabel="age of the deep feature in steps")
    by_age.set_xticks(range(1, len(means) + 1))
    by_step.set(title=f"at the cached steps of {record['plan']}")
    label_timesteps(by_step, record["timesteps"])
    for axes in (by_age, by_step):
        axes.set(ylabel="1 - cosine similarity\nwith a full step's deep feature", yscale="log")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    save_figure(path, figure)


def draw_landscape(record: dict[str, Any], path: Path) -> None:
    """Draws maps over the two directions: a column for each landscape of each model, a row for each feature."""
    axis, landscapes = record["landscape_axis"], {}
    for name, model in record["models"].items():
        landscapes[name] = model["landscape"]
        if "landscape_trunk" in model:
            landscapes[f"{name}'s trunk"] = model["landscape_trunk"]
    figure, grid = new_figure(len(FEATURES), len(landscapes), size=(4 * len(landscapes) + 1, 3.4 * len(FEATURES)))
    for row, what in zip(grid, FEATURES, strict=True):
        maps = [from_lists(landscape[what]).T for landscape in landscapes.values()]  # (P, P) each, b upwards
        for axes, name, values in zip(row, landscapes, maps, strict=True):
            image = axes.pcolormesh(axis, axis, values, vmin=min(map(np.min, maps)), vmax=1, shading="nearest")
            levels = [level for level in LEVELS if level > values.min()]  # matplotlib warns of others
            axes.clabel(axes.contour(axis, axis, values, levels, colors="white", linewidths=1), fmt="%g", fontsize=8)
            axes.set(title=f"{name}: {what}", xlabel="a", ylabel="b", aspect="equal")
        figure.colorbar(image, ax=list(row), label="cosine similarity\nwith a = b = 0")
    save_figure(path, figure)


def label_timesteps(axes: Any, timesteps: list[float]) -> None:
    """Labels an axis of steps with their timesteps."""
    ticks = np.linspace(0, len(timesteps) - 1, num=min(7, len(timesteps))).round().astype(int)
    axes.set_xticks(ticks, [f"{timesteps[i]:.0f}" for i in ticks])
    axes.set_xlabel("timestep, from noise to clean")


def summarize(model: dict[str, Any], record: dict[str, Any]) -> dict[str, float]:
    """The similarities of a model that are printed, means and least ones, by label."""
    summary = {}
    for key in ("outputs", "updates"):
        summary[f"{key} of layers, step before: mean"] = np.nanmean(from_lists(model[key]))
        summary[f"{key} of layers, step before: least"] = np.nanmin(from_lists(model[key]))
    for age, mean in enumerate(means_by_age(model, record), start=1):
        summary[f"deep feature, age {age}: mean"] = mean
    for key, run in (("reused", "uncached"), ("reused_cached", "cached")):
        if key in model:
            summary[f"deep feature that {record['plan']} reuses, {run} run: mean"] = np.nanmean(from_lists(model[key]))
    for key in STILL:
        for what, values in model.get(key, {}).items():
            summary[f"{what}, {key.replace('_', ' of the ')}: mean"] = np.mean(values)
    return {what: float(value) for what, value in summary.items()}


def means_by_age(model: dict[str, Any], record: dict[str, Any]) -> np.ndarray:
    """Similarities (K,) of the deep feature by age: means over the steps that could be cached.

    There are fewer than K if all of these steps come too early in the run to look so far back.
    """
    ages = from_lists(model["ages"])[:, record["window"]]
    return np.nanmean(ages[~np.isnan(ages).all(axis=1)], axis=1)


def summary_table(record: dict[str, Any]) -> str:
    """A Markdown table of the summaries, a column for each model."""
    summaries = {name: model["summary"] for name, model in record["models"].items()}
    rows = []
    for label in dict.fromkeys(label for summary in summaries.values() for label in summary):
        cells = {name: f"{summary[label]:.5f}" if label in summary else "" for name, summary in summaries.items()}
        rows.append({"cosine similarity": label} | cells)
    return markdown_table(rows)


def main() -> None:
    args = parser.parse_args()
    device = default_device()
    cfg = load_sampling(StabilityConfig, args.config, ["precision=fp32", *args.overrides])
    check_writable(cfg, "output", folder=True)
    plan, models = configure(cfg, args.models, device)
    lines = [
        f"{name}: {each.num_skips} skips, {describe_run(each, [], device)[0].partition(', ')[2]}"
        for name, each in models.items()
    ]
    lines.append(f"task: {cfg.num_clips} clips of each model, cached by {plan.name}, to {cfg.output}")
    if args.dry_run:
        first = next(iter(models.values()))
        return cli.dry_run(first, lines, file_checks(first))
    print("\n".join(lines), flush=True)
    record, folder = analyse(models, plan, device), Path(cfg.output)
    write_json(folder / "stability.json", record)
    draw_neighbours(record, folder / "neighbours.png")
    draw_cached(record, folder / "cached.png")
    draw_landscape(record, folder / "landscape.png")
    print(summary_table(record))
    print(f"plots and record: {cfg.output}")


if __name__ == "__main__":
    cli.run(main)
