"""Times a training step and measures its memory, as the original computes it and as we do.

A step is forward, backward and optimizer on random latents, in fp32 and, where the device has the units, in bf16
autocast.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from configs import TrainConfig, to_yaml
from diffusion import Diffusion, make_diffusion
from models import model_dimensions
from models.hardware import default_device, describe_machine, fastest_attention, has_bf16_units
from models.latte import Latte
from models.macs import count_parameters
from tools.benchmarks.options import TrainingBenchmark
from tools.benchmarks.turns import run_as_original, time_steps


def describe(cfg: TrainingBenchmark) -> str:
    """The work that is timed.

    Raises:
        UserError: options that no training can have.
    """
    from tools.common.training import check_training_options  # here and below: it imports what reads videos

    check_training_options(cfg)
    d = model_dimensions(cfg)
    latents = (d["num_frames"] + cfg.use_image_num, d["in_channels"], d["input_size"], d["input_size"])
    work = f"on {cfg.local_batch_size} x {latents} latents"
    return f"a training step of {cfg.model}, {count_parameters(cfg):,} parameters, {work}"


def benchmark(cfg: TrainingBenchmark) -> dict[str, Any]:
    """The metrics of each way; the speed-up is over the original's way in the same type."""
    device = default_device()
    torch.set_float32_matmul_precision("high")  # as in training
    metrics = time_steps(
        device, make_ways(cfg, device), cfg.runs, lambda name: f"original, {'bf16' if 'bf16' in name else 'fp32'}"
    )
    for way in metrics.values():
        way["clips_per_second"] = cfg.local_batch_size / way["seconds"]
    return {"machine": describe_machine(device), "options": to_yaml(cfg), "ways": metrics}


def make_ways(cfg: TrainingBenchmark, device: torch.device) -> dict[str, Callable[[], None]]:
    """For each type: the original's way, ours, and ours with gradient checkpointing."""
    from tools.common.training import create_model, create_optimizer

    original, ours = create_model(cfg, device), create_model(cfg, device)
    if cfg.use_compile:
        for block in ours.blocks:
            block.compile(fullgraph=True)
    original_optimizer, our_optimizer = (create_optimizer(cfg, model) for model in (original, ours))
    diffusion = make_diffusion(cfg)
    batch = random_batch(cfg, ours, diffusion, device)

    ways: dict[str, Callable[[], None]] = {}
    for name, dtype in [("fp32", torch.float32)] + [("bf16", torch.bfloat16)] * has_bf16_units(device):
        step = partial(training_step, diffusion, batch, device, dtype)
        mode = fastest_attention(device, dtype) if cfg.attention_mode == "auto" else cfg.attention_mode
        ways[f"original, {name}"] = partial(step, original_optimizer, partial(run_as_original, original))
        ways[name] = partial(step, our_optimizer, partial(run_with, ours, mode, False))
        ways[f"{name}, checkpointing"] = partial(step, our_optimizer, partial(run_with, ours, mode, True))
    return ways


def random_batch(cfg: TrainConfig, latte: Latte, diffusion: Diffusion, device: torch.device) -> dict[str, Any]:
    """Arguments of `training_losses`: random latents with random labels, stills included."""
    B, K, size = cfg.local_batch_size, cfg.use_image_num, latte.input_size
    x, noise = torch.randn(2, B, latte.num_frames + K, latte.in_channels, size, size, device=device)
    t = torch.randint(diffusion.num_timesteps, (B,), device=device)
    labels = {}
    if cfg.num_classes is not None:
        labels["y"] = torch.randint(cfg.num_classes, (B,), device=device)
        if K:
            labels["y_image"] = torch.randint(cfg.num_classes, (B, K), device=device)
    return dict(x_start=x, t=t, model_kwargs=labels, noise=noise)


def training_step(
    diffusion: Diffusion,
    batch: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    optimizer: torch.optim.Optimizer,
    denoiser: Callable[..., Tensor],
) -> None:
    """Forward (in `dtype`), backward, optimizer."""

    def autocast(*args: Tensor, **kwargs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return denoiser(*args, **kwargs)

    diffusion.training_losses(autocast, **batch)["loss"].mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def run_with(latte: Latte, mode: str, checkpointing: bool, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The model's output; attention and checkpointing are set anew each time as the ways share the model."""
    latte.set_attention(mode)
    latte.gradient_checkpointing = checkpointing
    return latte(*args, **kwargs)
