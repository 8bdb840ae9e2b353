"""From seeds and labels to videos: what sample.py, sample_ddp.py and the tools that sample share.

    cfg = resolve(load_config(SampleConfig, "configs/demo/demo_sample.yaml"), device)
    pipe = load(cfg, device)
    videos = generate(pipe, seeds=[0, 1], labels=[3, 5])  # (2, F, 3, H, W) in [-1, 1]

Letters: B batch, F frames, C channels of the latents, h = w = H / 8.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from configs import CacheOptions, SampleConfig, UserError, choice, require_path
from diffusion import Diffusion, create_diffusion
from diffusion.guidance import Guided
from diffusion.sampling import SAMPLERS
from models import get_models, parse_name
from models.autoencoder import LatentCodec, load_codec
from models.checkpoint import load_checkpoint
from models.latte import Latte, fastest_attention
from models.skip_cache import (
    SkipCache,
    cached_step,
    check_cache_depth,
    compile_steps,
    forecast_weights,
    full_step,
    interval_plan,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Pipeline:
    """All that runs share, loaded once. A run leaves nothing in it, however it ends."""

    cfg: SampleConfig  # resolved
    model: Latte
    codec: LatentCodec
    diffusion: Diffusion
    device: torch.device
    uncached: Callable[..., Tensor]  # the model, or its compiled form
    steps: tuple[Callable, Callable] = (full_step, cached_step)  # what SkipCache calls, or their compiled forms


def generate(
    pipe: Pipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    cache: CacheOptions | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Videos (B, F, 3, H, W) in [-1, 1]; see `sample_latents`."""
    return pipe.codec.decode(sample_latents(pipe, seeds, labels, cache, on_step))


def sample_latents(
    pipe: Pipeline,
    seeds: Sequence[int],
    labels: Sequence[int] | None,
    cache: CacheOptions | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """Latents (B, F, C, h, w) in fp32, one clip a seed: the same clip whatever else is in the batch.

    labels: one a seed; None for a model without classes.
    cache: the plan, None: that of pipe.cfg. Two plans with the same seeds give clips that pair.
    on_step: called after each step, for a progress bar.

    Raises:
        UserError: latents that are not finite.
    """
    cfg, model, cache = pipe.cfg, pipe.model, cache or pipe.cfg.cache
    generators = [torch.Generator(pipe.device).manual_seed(seed) for seed in seeds]
    y = None if labels is None else torch.tensor(labels, device=pipe.device)  # (B,)

    plan = plan_steps(pipe.diffusion, cache)
    denoiser = pipe.uncached if all(plan) else SkipCache(model, plan, cache.depth, cache.order, pipe.steps)
    denoiser = Guided(denoiser, cfg.cfg_scale, null_label=model.num_classes)
    for out in pipe.diffusion.sample_loop_progressive(
        denoiser,
        (len(seeds), model.num_frames, model.in_channels, model.input_size, model.input_size),
        clip_denoised=False,  # latents are not bounded by 1
        model_kwargs={"y": y},
        device=pipe.device,
        eta=cfg.eta,
        generators=generators,
        method=cfg.sample_method,
    ):
        latents = out["sample"]
        if on_step:
            on_step()
    check_finite(latents, seeds, cfg.precision)
    return latents


def check_finite(latents: Tensor, seeds: Sequence[int], precision: str) -> None:
    """Raises UserError for latents with NaN or infinity, which files and figures would hide. Waits for the device."""
    if not latents.isfinite().all():
        hint = "are its weights sound?" if precision == "fp32" else "try precision=fp32"
        raise UserError(f"the model's latents of seeds {list(seeds)} are not finite in {precision}; {hint}")


def plan_steps(diffusion: Diffusion, cache: CacheOptions) -> list[bool]:
    """For each step, from noise to clean, whether it runs in full."""
    return interval_plan(diffusion.timestep_map[::-1], cache.interval, cache.start, cache.stop)


def load(cfg: SampleConfig, device: torch.device) -> Pipeline:
    """The checkpoint and the VAE of a resolved configuration, on `device`."""
    checkpoint, codec = cfg.ckpt or require_path(cfg, "ckpt"), load_codec(cfg, device)
    with torch.device("meta"):  # no time for initial values: the checkpoint has them all
        model = get_models(cfg)
    model = model.to(DTYPES[cfg.precision]).to_empty(device=device)
    load_checkpoint(model, checkpoint)
    model.eval().requires_grad_(False)
    model.set_attention(cfg.attention_mode)
    return Pipeline(
        cfg=cfg,
        model=model,
        codec=codec,
        diffusion=make_diffusion(cfg),
        device=device,
        uncached=torch.compile(model, fullgraph=True) if cfg.use_compile else model,
        steps=compile_steps() if cfg.use_compile else (full_step, cached_step),
    )


def make_diffusion(cfg: SampleConfig) -> Diffusion:
    """The noise process over the steps that are sampled."""
    return create_diffusion(
        str(cfg.num_sampling_steps),
        cfg.noise_schedule,
        cfg.prediction,
        cfg.learn_sigma,
        diffusion_steps=cfg.diffusion_steps,
    )


def resolve(cfg: SampleConfig, device: torch.device) -> SampleConfig:
    """The options with all that depends on others or on the device filled in.

    Raises:
        UserError: options that contradict each other, as far as they show without weights.
    """
    choice("sample_method", cfg.sample_method, list(SAMPLERS))
    choice("attention_mode", cfg.attention_mode, ["auto", "sdpa", "math"])
    for key in ("num_sampling_steps", "per_proc_batch_size", "samples_per_class", "num_fvd_samples"):
        if getattr(cfg, key) < 1:
            raise UserError(f"{key}: {getattr(cfg, key)} is less than 1")
    with torch.device("meta"):
        model = get_models(cfg)
    if cfg.cfg_scale != 1 and (model.num_classes is None or not cfg.class_dropout_prob):
        lacks = "classes" if model.num_classes is None else "null label (class_dropout_prob is 0)"
        raise UserError(f"cfg_scale: {cfg.cfg_scale} asks for guidance, but this model has no {lacks}; use cfg_scale=1")
    cache = cfg.cache
    if cache.interval is None:
        cache = replace(cache, interval=parse_name(cfg.model).cache_interval)
    if cache.interval > 1:
        check_cache_depth(model.num_skips, cache.depth)
    forecast_weights(plan_steps(make_diffusion(cfg), cache), cache.order)  # raises where they make no sense
    precision = choose_precision(cfg, device)
    automatic = fastest_attention(device, DTYPES[precision])
    return replace(
        cfg,
        num_classes=model.num_classes,
        precision=precision,
        attention_mode=automatic if cfg.attention_mode == "auto" else cfg.attention_mode,
        cache=cache,
    )


def choose_precision(cfg: SampleConfig, device: torch.device) -> str:
    """The type of the weights; the sampler's state is fp32 whatever it is."""
    choice("precision", cfg.precision, ["auto", *DTYPES])
    if cfg.precision == "fp16" and device.type == "cpu":
        raise UserError("precision: fp16 runs in software on a CPU, slower than fp32 by far; use auto, bf16 or fp32")
    if cfg.precision != "auto":
        return cfg.precision
    if cfg.use_fp16 and device.type == "cuda":
        return "fp16"
    return "bf16" if has_bf16_units(device) else "fp32"


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 products are computed in hardware; where they are not, they run, but slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"amx_bf16", "avx512_bf16"} & cpu_flags())


def cpu_flags() -> set[str]:
    """The instruction sets of the CPU, as Linux names them; none on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
