"""How stable a model's features are: the analysis of the Skip-DiT paper (arXiv:2411.17616), also of twins side by side.

    python tools/stability.py                                                  # the demo's Skip-DiT
    python tools/stability.py --model Skip-DiT=skip.pt --model Latte=latte.pt  # twins, alike but for their skips
    python tools/stability.py --config configs/ucf101/ucf101_sample_skip.yaml --clips 4 --points 2 precision=bf16

Three questions, answered in cosine similarities over the width, averaged over tokens and clips:
  neighbours  How alike are the features of neighbouring steps, by layer and timestep? Of each layer's output, as in the
              paper, and of its update: what attention and MLP add to the layer's input. Outputs carry the position
              embeddings, which stay the same at every step and make them alike; updates do not.
  cached      How alike are the deep feature that Skip-Cache reuses (it enters the outer tail) and that of a full step?
              By its age in steps along the uncached run, also of a Latte, where no cache can run; and along the run
              that really is cached. The plan is that of the options, with cache.interval=4 if they have none; means by
              age are over the steps that it could cache with some interval.
  landscape   How alike are the features of weights theta + a u + b v and of theta? u and v are random directions, each
              filter as long as the model's own; biases and norms stay (Li et al. 2018, arXiv:1712.09913, section 4).
              Of the deep feature, the last layer's output, and the prediction, whose frames are the tokens. Of a
              Skip-DiT once more with only its trunk moved: the weights that a Latte has, too.
              The inputs are those of the uncached run at a quarter, a half and three quarters of its steps.
The models sample the same seeds with the same options, in fp32 unless `precision` says otherwise. With guidance, the
rows with a label count. Writes {neighbours,cached,landscape}.png and stability.json.
Letters: N clips of a batch, F frames, T tokens of a frame, D width, L layers, S steps, K ages, P points of a direction.
"""

import math
import sys
from collections import defaultdict, deque
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs import ROOT, CacheOptions, SampleConfig, UserError, load_config, require_path
from models.checkpoint import atomic_path, load_state_dict
from models.latte import Latte
from models.skip_cache import cached_step, full_step
from sample.options import describe, dry_run, make_record, plan_name
from sample.pipeline import Pipeline, load, make_diffusion, plan_steps, resolve, sample_latents
from sample.sample_ddp import labels_of
from tools.common import cli
from tools.common.records import write_json

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


def main() -> None:
    parser = cli.Parser(__doc__, SampleConfig, config=str(ROOT / "configs/demo/demo_sample.yaml"))
    parser.add_argument("--model", action="append", metavar="NAME=CKPT", help="repeat it to compare; default: ckpt")
    parser.add_argument("--clips", type=int, default=7, help="seeds: seed, seed + 1, ... (default: 7)")
    parser.add_argument(
        "--radius", type=float, default=0.5, help="of the landscape; 1: a filter's length (default: 0.5)"
    )
    parser.add_argument("--points", type=int, default=5, help="of the landscape to each side of 0 (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("results/stability"), metavar="FOLDER")
    args = parser.parse_args()
    for key in ("clips", "radius", "points"):
        if not 0 < getattr(args, key) < math.inf:
            raise UserError(f"--{key}: {getattr(args, key)} is no number above 0")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = load_config(SampleConfig, args.config, ["precision=fp32", *args.overrides])
    cache, models = configure(cfg, args.model, device)
    lines = [
        f"{name}: {each.num_skips} skips, {describe(each, [], device)[0].partition(', ')[2]}"
        for name, each in models.items()
    ]
    lines.append(f"task: {args.clips} clips of each model, cached by {plan_name(cache)}, to {args.output}")
    if args.dry_run:
        return dry_run(next(iter(models.values())), lines)
    print("\n".join(lines), flush=True)
    record = analyse(models, cache, args.clips, args.radius, args.points, device)
    write_json(args.output / "stability.json", record)
    draw_neighbours(record, args.output / "neighbours.png")
    draw_cached(record, args.output / "cached.png")
    draw_landscape(record, args.output / "landscape.png")
    print(table(record))
    print(f"figures and record: {args.output}")


def named_checkpoints(wanted: list[str]) -> dict[str, str]:
    """NAME=CKPT each -> files by name."""
    files = dict(item.partition("=")[::2] for item in wanted)
    if len(files) < len(wanted) or not all(files.values()):
        raise UserError(f"--model {' --model '.join(wanted)}: expected NAME=CKPT, each name once")
    return files


def count_skips(ckpt: str) -> int:
    """Skip branches of a checkpoint."""
    return sum(key.startswith("skip_linears.") and key.endswith(".weight") for key in load_state_dict(ckpt))


def configure(
    cfg: SampleConfig, wanted: list[str] | None, device: torch.device
) -> tuple[CacheOptions, dict[str, SampleConfig]]:
    """The plan, and the resolved options of each model by name; those without skips run no cache.

    wanted: NAME=CKPT each; None: the model of `cfg`.
    """
    files = named_checkpoints(wanted or [f"{cfg.model}={cfg.ckpt or require_path(cfg, 'ckpt')}"])
    cache = resolve(cfg, device).cache
    if cache.interval == 1:
        cache = replace(cache, interval=INTERVAL)
    if all(plan_steps(make_diffusion(cfg), cache)):
        raise UserError(f"cache: {plan_name(cache)} runs all {cfg.num_sampling_steps} steps in full: nothing is reused")
    if cfg.num_sampling_steps <= AGES:
        raise UserError(f"num_sampling_steps: {cfg.num_sampling_steps} is too few to look {AGES} steps back")
    models = {}
    for name, ckpt in files.items():
        skips = count_skips(ckpt)
        own = cache if skips else replace(cache, interval=1)
        models[name] = resolve(replace(cfg, ckpt=ckpt, num_skips=skips, cache=own), device)
    return cache, models


def analyse(
    models: dict[str, SampleConfig], cache: CacheOptions, clips: int, radius: float, points: int, device: torch.device
) -> dict[str, Any]:
    """All similarities, as stability.json has them."""
    cfg = next(iter(models.values()))  # what follows is the same for all
    diffusion = make_diffusion(cfg)
    timesteps, full = diffusion.timestep_map[::-1], plan_steps(diffusion, cache)
    seeds = list(range(cfg.seed, cfg.seed + clips))
    kept = [int(place * len(timesteps)) for place in PLACES]
    axis = radius * torch.arange(-points, points + 1) / points  # (P,), exactly 0 in its middle
    record = {
        "what": "cosine similarities of features, see tools/stability.py; null: nothing to compare",
        "plan": plan_name(cache),
        "full_steps": full,
        "timesteps": timesteps,
        # Steps that could be cached: not before cache.start, and not once the cache is emptied for good.
        "window": [a >= cache.stop and b < cache.start for a, b in pairwise([-1, *timesteps])],
        "seeds": seeds,
        "labels": labels_of(seeds, cfg),
        "landscape_axis": axis.tolist(),
        "landscape_timesteps": [timesteps[step] for step in kept],
        "models": {},
    }
    pipes = {name: load(each, device) for name, each in models.items()}  # all of them, before hours with the first
    for name, pipe in pipes.items():
        if not 1 <= cache.depth <= pipe.model.num_layers // 2:  # of a Latte nobody has asked yet
            half = pipe.model.num_layers // 2
            raise UserError(f"cache.depth: {cache.depth} is outside 1 ... {half}, half of the layers")
        model, inputs = compare_steps(pipe, name, seeds, cache, full, kept)
        for key, still in STILL.items():
            if key == "landscape" or pipe.model.num_skips:
                grid = compare_weights(pipe.model, f"{name}: {key}", inputs, cache.depth, axis, still, cfg.seed)
                model[key] = dict(zip(FEATURES, plain(grid), strict=True))
        record["models"][name] = {**make_record(pipe.cfg, device), "summary": summarize(model, record), **model}
    return record


def compare_steps(
    pipe: Pipeline, name: str, seeds: list[int], cache: CacheOptions, full: list[bool], kept: list[int]
) -> tuple[dict[str, Any], list[Inputs]]:
    """Similarities along an uncached run and along the cached one, and the inputs of the steps `kept`.

    Returns:
        outputs, updates: (L, S - 1), steps 1 ... S - 1 with the step before.
        ages: (K, S), the deep feature with that of 1 ... K steps before; nan where there was none.
        reused: (S,), the deep feature with that of the plan's last full step; nan at full steps.
        reused_cached: (S,), along the cached run, with what stands in for it (a forecast, with cache.order); of a model
            with skips.
    """
    model, size = pipe.model, pipe.cfg.per_proc_batch_size
    batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    runs: dict[str, list[list[Tensor]]] = defaultdict(list)  # key -> batches -> steps
    inputs: list[Inputs] = []
    with tqdm(total=len(batches) * len(full) * (2 if model.num_skips else 1), desc=name, unit="step") as bar:
        for batch in batches:
            labels = labels_of(batch, pipe.cfg)
            watch = Watch(model, len(batch), cache.depth, full, kept)
            sample_latents(replace(pipe, uncached=watch), batch, labels, replace(cache, interval=1), bar.update)
            for key in ("neighbours", "ages", "reused"):
                runs[key].append(getattr(watch, key))
            inputs += watch.inputs
            if model.num_skips:
                runs["reused_cached"].append(watch_cached_run(pipe, batch, labels, cache, bar.update))
    figures = {key: over_clips(batches) for key, batches in runs.items()}  # (S or S - 1, ...)
    figures["outputs"], figures["updates"] = figures.pop("neighbours").T.chunk(2)
    figures["ages"] = figures["ages"].T
    return {key: plain(figure) for key, figure in figures.items()}, inputs


def over_clips(batches: list[list[Tensor]]) -> Tensor:
    """The mean over all clips: (..., N) for each step of each batch -> (S, ...)."""
    return torch.cat([torch.stack(steps) for steps in batches], dim=-1).mean(-1)


class Watch:
    """A model as the denoiser of one sampling run, which compares the features of steps while they pass.

    It holds the features of one step, and as many deep ones as there are ages; similarities are (N,) tensors.

    Args:
        model: the Latte that denoises.
        clips: N, the rows that count: the first ones of a call.
        depth: b, the layers after the deep feature.
        full: the plan, by step.
        kept: the steps whose inputs are kept.
    """

    def __init__(self, model: Latte, clips: int, depth: int, full: list[bool], kept: list[int]):
        self.model, self.clips, self.depth, self.full, self.kept = model, clips, depth, full, kept
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
        self.ages.append(torch.stack(ages + [nothing(N)] * (AGES - len(ages))))
        if self.full[step]:
            self.cached = deep
        self.reused.append(nothing(N) if self.full[step] else similarity(deep, self.cached))
        self.before = features
        self.past.appendleft(deep)
        return out


def nothing(clips: int) -> Tensor:
    """(N,) nan, where there is nothing to compare."""
    return torch.full([clips], torch.nan, dtype=torch.float64)


def run_layers(model: Latte, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`model(x, t, y)`, each layer's output, and what its attention and MLP added to its input: (B, F, T, D) each."""
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

    In float64 and with one square root, so that equal features have exactly 1.
    """
    a, b = a.double(), b.double()
    dot, squares_a, squares_b = ((p * q).sum(-1) for p, q in ((a, b), (a, a), (b, b)))  # (N, F, T) each
    return (dot / (squares_a * squares_b).sqrt()).flatten(1).mean(1).cpu()


def watch_cached_run(
    pipe: Pipeline, seeds: list[int], labels: list[int] | None, cache: CacheOptions, on_step: Callable[[], object]
) -> list[Tensor]:
    """(N,) for each step of a cached run: the deep feature that it reuses with what a full step computes."""
    N, similarities = len(seeds), []

    def full(*args: Any) -> tuple[Tensor, Tensor]:
        similarities.append(nothing(N))
        return full_step(*args)

    def cached(model: Latte, depth: int, x: Tensor, t: Tensor, y: Tensor | None, deep: Tensor) -> Tensor:
        _, fresh = full_step(model, depth, x, t, y)
        similarities.append(similarity(deep[:N], fresh[:N]))
        return cached_step(model, depth, x, t, y, deep)

    sample_latents(replace(pipe, steps=(full, cached)), seeds, labels, cache, on_step)
    return similarities


@torch.no_grad()
def compare_weights(
    model: Latte, name: str, inputs: list[Inputs], depth: int, axis: Tensor, still: tuple[str, ...], seed: int
) -> Tensor:
    """(3, P, P): each of FEATURES at weights theta + axis[i] u + axis[j] v with that at theta."""
    generator = torch.Generator().manual_seed(seed)
    u, v = random_direction(model, still, generator), random_direction(model, still, generator)
    own = [last_features(model, depth, *each) for each in inputs]
    other = deepcopy(model)  # its weights move, the model's stay
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
    """Noise like the weights of two and more dimensions, by name; each filter (row) as long as the model's own.

    still: how the names of weights begin that are left out.
    """
    direction = {}
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and not name.startswith(still):
            noise = torch.randn(weight.shape, generator=generator).to(weight.device)
            length, own = (x.float().flatten(1).norm(dim=1) for x in (noise, weight))
            direction[name] = noise * (own / length).view(-1, *[1] * (weight.ndim - 1))
    return direction


def last_features(model: Latte, depth: int, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What FEATURES names: (N, F, T, D) twice, and the prediction as (N, F, 1, C * H * W)."""
    x, c = model.embed(x, t, y)
    skips: list[Tensor] = []
    deep = model.run(range(model.num_layers - depth), x, c, skips)
    last = model.run(range(model.num_layers - depth, model.num_layers), deep, c, skips)
    prediction = model.unembed(last, c)[:, :, : model.in_channels]  # (N, F, C, H, W)
    return deep, last, prediction.flatten(2)[:, :, None]


def plain(x: Tensor) -> Any:
    """Nested lists, with None for nan, which JSON does not have; `array` is the way back."""
    if x.ndim:
        return [plain(row) for row in x]
    return None if x.isnan() else x.item()


def array(nested: list[Any]) -> np.ndarray:
    """What `plain` made into lists, None as nan."""
    return np.array(nested, dtype=float)


def draw_neighbours(record: dict[str, Any], path: Path) -> None:
    """Maps over layers and timesteps: a column for each model, a row for outputs and one for updates."""
    from matplotlib.colors import LogNorm

    models = record["models"]
    figure, grid = new_figure(2, len(models), width=4.6, height=3.2)
    for row, key in zip(grid, ("outputs", "updates"), strict=True):
        maps = [1 - array(model[key]) for model in models.values()]  # (L, S - 1) each
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
    save(figure, path)


def draw_cached(record: dict[str, Any], path: Path) -> None:
    """The deep feature and the one that is reused: by age, and at the cached steps of the plan."""
    figure, ((by_age, by_step),) = new_figure(1, 2, width=5.5, height=4.4)
    for i, (name, model) in enumerate(record["models"].items()):
        means = 1 - means_by_age(model, record)  # (K,)
        by_age.plot(range(1, len(means) + 1), means, "o-", color=f"C{i}")
        by_step.plot(1 - array(model["reused"]), "o-", color=f"C{i}", label=f"{name}, uncached run")
        if "reused_cached" in model:
            by_step.plot(1 - array(model["reused_cached"]), "x:", color="black", label=f"{name}, cached run")
    by_age.set(title="uncached run, mean over steps that could be cached", xlabel="age of the deep feature in steps")
    by_age.set_xticks(range(1, len(means) + 1))
    by_step.set(title=f"at the cached steps of {record['plan']}")
    label_timesteps(by_step, record["timesteps"])
    for axes in (by_age, by_step):
        axes.set(ylabel="1 - cosine similarity\nwith a full step's deep feature", yscale="log")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    save(figure, path)


def draw_landscape(record: dict[str, Any], path: Path) -> None:
    """Maps over the two directions: a column for each model, and each trunk moved alone; a row for each feature."""
    axis, landscapes = record["landscape_axis"], {}
    for name, model in record["models"].items():
        landscapes[name] = model["landscape"]
        if "landscape_trunk" in model:
            landscapes[f"{name}'s trunk"] = model["landscape_trunk"]
    figure, grid = new_figure(len(FEATURES), len(landscapes), width=4, height=3.4)
    for row, what in zip(grid, FEATURES, strict=True):
        maps = [array(landscape[what]).T for landscape in landscapes.values()]  # (P, P) each, b upwards
        for axes, name, values in zip(row, landscapes, maps, strict=True):
            image = axes.pcolormesh(axis, axis, values, vmin=min(map(np.min, maps)), vmax=1, shading="nearest")
            levels = [level for level in LEVELS if level > values.min()]  # matplotlib warns of others
            axes.clabel(axes.contour(axis, axis, values, levels, colors="white", linewidths=1), fmt="%g", fontsize=8)
            axes.set(title=f"{name}: {what}", xlabel="a", ylabel="b", aspect="equal")
        figure.colorbar(image, ax=list(row), label="cosine similarity\nwith a = b = 0")
    save(figure, path)


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """A figure without a screen, and its axes (rows, columns); sizes of one, in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        rows, columns, squeeze=False, figsize=(width * columns + 1, height * rows), layout="constrained"
    )


def label_timesteps(axes: Any, timesteps: list[int]) -> None:
    """Real timesteps below an axis of steps."""
    ticks = np.linspace(0, len(timesteps) - 1, num=min(7, len(timesteps))).round().astype(int)
    axes.set_xticks(ticks, [str(timesteps[i]) for i in ticks])
    axes.set_xlabel("timestep, from noise to clean")


def save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def summarize(model: dict[str, Any], record: dict[str, Any]) -> dict[str, float]:
    """What is printed of a model: mean and least similarities, by what they are of."""
    figures = {}
    for key in ("outputs", "updates"):
        figures[f"{key} of layers, step before: mean"] = np.nanmean(array(model[key]))
        figures[f"{key} of layers, step before: least"] = np.nanmin(array(model[key]))
    for age, mean in enumerate(means_by_age(model, record), start=1):
        figures[f"deep feature, age {age}: mean"] = mean
    for key, run in (("reused", "uncached"), ("reused_cached", "cached")):
        if key in model:
            figures[f"deep feature that {record['plan']} reuses, {run} run: mean"] = np.nanmean(array(model[key]))
    for key in STILL:
        for what, values in model.get(key, {}).items():
            figures[f"{what}, {key.replace('_', ' of the ')}: mean"] = np.mean(values)
    return {what: float(figure) for what, figure in figures.items()}


def means_by_age(model: dict[str, Any], record: dict[str, Any]) -> np.ndarray:
    """(K,) similarities of the deep feature, over the steps that could be cached; fewer where these come too early."""
    ages = array(model["ages"])[:, record["window"]]
    return np.nanmean(ages[~np.isnan(ages).all(axis=1)], axis=1)


def table(record: dict[str, Any]) -> str:
    """The summaries, a column for each model."""
    summaries = {name: model["summary"] for name, model in record["models"].items()}
    labels = dict.fromkeys(label for summary in summaries.values() for label in summary)
    rows = [["cosine similarity", *summaries]]
    for label in labels:
        rows.append([label, *(f"{s[label]:.5f}" if label in s else "-" for s in summaries.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


if __name__ == "__main__":
    cli.run(main)
