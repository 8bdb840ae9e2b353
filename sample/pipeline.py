"""The sampling pipeline: `generate` makes videos from seeds and labels.

    pipe = load("pretrained/demo", sample_method="ddim", num_sampling_steps=50, cfg_scale=2.5)
    videos = generate(pipe, seeds=[0, 1], labels=["Cup", 5], plan="N2-o1")  # (2, F, 3, H, W) in [-1, 1]

Letters: B batch, F frames; of the latents f frames, C channels, h, w (models/vaes.py).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import CacheOptions, SampleConfig, check_options, require_path
from configs.errors import UserError
from configs.files import flatten
from diffusion import Diffusion, make_diffusion
from diffusion.guidance import Guided
from diffusion.sampling import linear_multistep
from models import check_made_of, get_models, model_dimensions
from models.autoencoder import LatentCodec, load_codec
from models.checkpoint import load_checkpoint, load_options
from models.hardware import DTYPES, check_compiler, choose_precision, default_device, fastest_attention
from models.latte import Latte
from models.skip_cache import SkipCache, cached_step, compile_steps, full_step
from sample.options import DEMO, load_sampling
from sample.plans import UNCACHED, Plan, make_plan, parse_plan
from sample.recipes import check_recipe

WARM_UP_STEPS = 4


def resolve(cfg: SampleConfig, device: torch.device) -> SampleConfig:
    """Returns the options with the values filled in that depend on the device or on other options.

    Raises:
        UserError: options contradict each other. The weights are not read for this.
    """
    check_options(cfg)
    dimensions = model_dimensions(cfg)
    num_classes = dimensions["num_classes"]
    if cfg.cfg_scale != 1 and (num_classes is None or not cfg.class_dropout_prob):
        lacks = "classes" if num_classes is None else "null label (class_dropout_prob is 0)"
        raise UserError(f"cfg_scale: {cfg.cfg_scale} asks for guidance, but this model has no {lacks}; use cfg_scale=1")
    precision = choose_precision(cfg.precision, cfg.use_fp16, device)
    automatic = fastest_attention(device, DTYPES[precision])
    cfg = replace(
        cfg,
        num_classes=num_classes,
        in_channels=dimensions["in_channels"],
        precision=precision,
        attention_mode=automatic if cfg.attention_mode == "auto" else cfg.attention_mode,
    )
    plan = make_plan(cfg)
    if plan.timesteps == (0,) and cfg.process == "gaussian":
        raise UserError(
            "num_sampling_steps: the only timestep of 1 step is 0, where the model expects a clip almost without noise "
            "and returns the noise as it is; take 2 steps or more"
        )
    if cfg.eta and plan.solver != "ddim":
        raise UserError(f"eta: {plan.solver} ignores eta={cfg.eta:g}; use sample_method=ddim or eta=0")
    if cfg.use_compile:
        check_compiler()
    return replace(cfg, cache=plan.cache)


@dataclass(frozen=True)
class Pipeline:
    """The model, the VAE and the noise process, loaded once for many runs. A run does not change them."""

    cfg: SampleConfig  # resolved
    model: Latte
    codec: LatentCodec
    diffusion: Diffusion
    device: torch.device
    plan: Plan  # the plan of cfg
    uncached: Callable[..., Tensor]  # the model or its compiled form, for plans without cached steps
    steps: tuple[Callable, Callable] = (full_step, cached_step)  # or their compiled forms, for SkipCache


def load(source: SampleConfig | str | Path, device: torch.device | str | None = None, **options: Any) -> Pipeline:
    """Returns a pipeline, with the checkpoint and the VAE on `device`.

    Args:
        source: a checkpoint, a folder of `save_pretrained`, a YAML file, or resolved options.
        device: None: the first GPU, or the CPU.
        options: of sampling, in place of those of the YAML file; `cache` may be a plan as --cache takes it.

    Raises:
        UserError: a file is missing, or options contradict the weights or each other.
    """
    device = default_device() if device is None else torch.device(device)
    if isinstance(options.get("cache"), str):
        options["cache"] = parse_plan(options["cache"])
    if isinstance(source, SampleConfig):
        cfg = resolve(replace(source, **options), device) if options else source
    else:
        is_yaml = Path(source).suffix in (".yaml", ".yml")
        if isinstance(options.get("cache"), CacheOptions):
            options["cache"] = asdict(options["cache"])
        options = flatten(options if is_yaml else {"ckpt": str(source)} | options)
        is_text = {key: isinstance(value, str | Path) for key, value in options.items()}
        overrides = [f"{key}={value if is_text[key] else json.dumps(value)}" for key, value in options.items()]
        cfg = resolve(load_sampling(SampleConfig, source if is_yaml else DEMO, overrides), device)
    if cfg.recipe:
        check_recipe(cfg)
    checkpoint, codec = require_path(cfg, "ckpt"), load_codec(cfg, device)
    made_of = load_options(checkpoint)
    check_made_of(cfg, made_of, checkpoint)
    with torch.device("meta"):  # skips initialization: the checkpoint has all weights
        model = get_models(cfg)
    model = model.to(DTYPES[cfg.precision]).to_empty(device=device)
    load_checkpoint(model, checkpoint, weights=cfg.weights)
    model.options = made_of
    model.eval().requires_grad_(False)
    model.set_attention(cfg.attention_mode)
    return Pipeline(
        cfg=cfg,
        model=model,
        codec=codec,
        diffusion=make_diffusion(cfg, cfg.num_sampling_steps),
        device=device,
        plan=make_plan(cfg),
        uncached=torch.compile(model, fullgraph=True) if cfg.use_compile else model,
        steps=compile_steps() if cfg.use_compile else (full_step, cached_step),
    )


def with_options(pipe: Pipeline, **changes: Any) -> Pipeline:
    """Returns a pipeline of the same weights with other SamplerOptions: `with_options(pipe, num_sampling_steps=20)`."""
    cfg = replace(pipe.cfg, **{"recipe": None} | changes)
    return replace(pipe, cfg=cfg, diffusion=make_diffusion(cfg, cfg.num_sampling_steps), plan=make_plan(cfg))


def shortened(pipe: Pipeline, plan: Plan) -> Pipeline:
    """Returns a pipeline of a few steps, full and cached like those of `plan`, to warm up before runs are timed."""
    cache = replace(plan.cache, full_steps=[0]) if plan.cached_steps else UNCACHED
    return with_options(pipe, num_sampling_steps=WARM_UP_STEPS, cache=cache)


def choose_plan(pipe: Pipeline, plan: "Plan | str | Path | Sequence[int] | None") -> Plan:
    """Returns the plan that `plan` describes for the pipeline.

    Args:
        plan: "N2-o1" or "0,1,4" as --cache takes it, the path of a recipe (*.json), a list of the numbers of the full
            steps, a list of a bool for each step, or None for the pipeline's own plan. Steps are calls of the model,
            of which Heun's method has two a step but the last.
    """
    if plan is None or isinstance(plan, Plan):
        return plan or pipe.plan
    if isinstance(plan, str | Path):
        if Path(plan).suffix != ".json":
            return make_plan(pipe.cfg, parse_plan(str(plan)))
        cfg = replace(pipe.cfg, recipe=str(plan))
        check_recipe(cfg)
        return make_plan(cfg)
    steps = list(plan)
    if steps and all(isinstance(step, bool) for step in steps):
        if len(steps) != (calls := len(make_plan(pipe.cfg, UNCACHED).full)):
            raise UserError(f"plan: {len(steps)} steps, but the run has {calls}")
        steps = [number for number, full in enumerate(steps) if full]
    return make_plan(pipe.cfg, CacheOptions(full_steps=steps))


def choose_labels(pipe: Pipeline, seeds: Sequence[int], labels: Sequence[int | str] | None) -> list[int] | None:
    """Returns the labels of classes that are given by index or name; UserError if they do not suit model or seeds."""
    num_classes = pipe.model.num_classes
    if labels is None or num_classes is None:
        if labels is not None or num_classes is not None:
            raise UserError(f"labels: {'leave them out: this model has no classes' if labels else 'give one a seed'}")
        return None
    if len(labels) != len(seeds):
        raise UserError(f"labels: {len(labels)} for {len(seeds)} seeds; give one for each")
    if all(type(label) is int and 0 <= label < num_classes for label in labels):
        return list(labels)  # without the video reader that `datasets` imports
    from datasets import class_index, class_names

    names = class_names(pipe.cfg) if any(isinstance(label, str) for label in labels) else None
    return [class_index(label, names, num_classes) for label in labels]


def generate(
    pipe: Pipeline,
    seeds: Sequence[int],
    labels: Sequence[int | str] | None = None,
    plan: "Plan | str | Path | Sequence[int] | None" = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Returns videos (B, F, 3, H, W) in [-1, 1]; the arguments are those of `sample_latents`."""
    return pipe.codec.decode(sample_latents(pipe, seeds, labels, plan, on_step))


def sample_latents(
    pipe: Pipeline,
    seeds: Sequence[int],
    labels: Sequence[int | str] | None = None,
    plan: "Plan | str | Path | Sequence[int] | None" = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Returns latents (B, f, C, h, w) in fp32, one clip per seed. A clip does not depend on the rest of the batch.

    Args:
        labels: a class per seed, its index or name; None for an unconditional model.
        plan: see `choose_plan`. A seed draws the same noise with every plan.
        on_step: called after each step, for a progress bar.

    Raises:
        UserError: seeds, labels or the plan make no sense, or latents are not finite.
    """
    cfg, model, plan = pipe.cfg, pipe.model, choose_plan(pipe, plan)
    if not len(seeds) or not all(-(2**63) <= seed < 2**64 for seed in seeds):
        raise UserError(f"seeds: {list(seeds)[:3]}; give a list of integers of 64 bits")
    labels = choose_labels(pipe, seeds, labels)
    generators = [torch.Generator(pipe.device).manual_seed(int(seed)) for seed in seeds]
    y = None if labels is None else torch.tensor(labels, device=pipe.device)  # (B,)

    diffusion = pipe.diffusion
    if plan.timesteps != tuple(diffusion.timestep_map[::-1]):  # a recipe's own
        diffusion = make_diffusion(cfg, plan.timesteps)
    for out in diffusion.sample_loop_progressive(
        make_denoiser(pipe, plan),
        (len(seeds), model.num_frames, model.in_channels, model.input_size, model.input_size),
        clip_denoised=False,  # latents exceed [-1, 1]
        model_kwargs={"y": y},
        device=pipe.device,
        eta=cfg.eta,
        generators=generators,
        method=partial(linear_multistep, plan.moves) if plan.moves else plan.solver,
        held=() if plan.cache.depth else plan.weights,
    ):
        latents = out["sample"]
        if on_step:
            on_step()
    check_finite(latents, seeds, cfg.precision)
    return latents


def make_denoiser(pipe: Pipeline, plan: Plan) -> Guided:
    """Returns the guided model for one sampling run by `plan`, whose state it holds."""
    denoiser = pipe.uncached
    if plan.cached_steps and plan.cache.depth:
        denoiser = SkipCache(pipe.model, plan.full, plan.cache.depth, steps=pipe.steps, weights=plan.weights)
    return Guided(denoiser, pipe.cfg.cfg_scale, pipe.model.num_classes, plan.guided or repeat(True))


def check_finite(latents: Tensor, seeds: Sequence[int], precision: str) -> None:
    """Raises UserError for latents with NaN or infinity, which would not show in a video. Waits for the device."""
    if not latents.isfinite().all():
        hint = "check its weights" if precision == "fp32" else "try precision=fp32"
        raise UserError(f"the model's latents of seeds {list(seeds)} are not finite in {precision}; {hint}")
