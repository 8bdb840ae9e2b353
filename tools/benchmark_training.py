"""Time a training step against the way the original computes it, and measure the memory it takes.

    python tools/benchmark_training.py                     # 28 blocks of width 128, 16 clips of 16 x 64 x 64
    python tools/benchmark_training.py --runs 9 --output training.json use_compile=True
    python tools/benchmark_training.py --config configs/ucf101/ucf101_train.yaml local_batch_size=4

A step is forward, backward and AdamW on random latents, in fp32 and, where the device has the units, in bf16 autocast.
The original's way: plain-maths attention, and the conditioning repeated to one row a sequence. All ways take turns, and
the median counts. Memory is the peak within a step over what is held between steps (weights, optimizer state).
"""

import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import TrainConfig, load_config, to_yaml
from diffusion import Diffusion, create_diffusion
from models.latte import Latte, fastest_attention
from sample.pipeline import has_bf16_units
from tools.benchmark import as_original, timed
from tools.common import cli
from tools.common.records import describe_machine, write_json
from train import check_options, create_model

NARROW = [
    "model=Latte-skip", "hidden_size=128", "num_heads=4", "image_size=64", "num_classes=101", "local_batch_size=16"
]  # fmt: skip


def main() -> None:
    parser = cli.Parser(__doc__, TrainConfig)
    parser.add_argument("--runs", type=int, default=5, help="timed steps of each way (default: 5)")
    parser.add_argument("--output", metavar="JSON", help="also write the figures here")
    args = parser.parse_args()
    cfg = load_config(TrainConfig, args.config, [*([] if args.config else NARROW), *args.overrides])
    check_options(cfg)
    if args.dry_run:
        print(to_yaml(cfg))
        return
    report = benchmark(cfg, args.runs)
    if args.output:
        write_json(Path(args.output), report)


def benchmark(cfg: TrainConfig, runs: int) -> dict[str, Any]:
    """Time the ways, print a table, and return its figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # as in training
    theirs, ours = create_model(cfg, device), create_model(cfg, device)
    if cfg.use_compile:
        for block in ours.blocks:
            block.compile(fullgraph=True)
    optimizers = {
        model: torch.optim.AdamW(model.parameters(), cfg.learning_rate, fused=True) for model in (theirs, ours)
    }
    diffusion = create_diffusion("", cfg.noise_schedule, cfg.prediction, cfg.learn_sigma, False, cfg.diffusion_steps)
    batch = random_batch(cfg, ours, diffusion, device)

    ways: dict[str, Callable[[], None]] = {}
    for name, dtype in [("fp32", torch.float32)] + [("bf16", torch.bfloat16)] * has_bf16_units(device):
        step = partial(training_step, diffusion, batch, device, dtype)
        mode = fastest_attention(device, dtype) if cfg.attention_mode == "auto" else cfg.attention_mode
        ways[f"original, {name}"] = partial(step, optimizers[theirs], partial(as_original, theirs))
        ways[name] = partial(step, optimizers[ours], partial(as_set, ours, mode, False))
        ways[f"{name}, checkpointing"] = partial(step, optimizers[ours], partial(as_set, ours, mode, True))

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(runs + 1):
        for name, way in ways.items():
            duration = timed(device, way)
            if i > 0:  # the first turn warms up
                seconds[name].append(duration)

    machine = describe_machine(device)
    print(f"{cfg.model}, {sum(p.numel() for p in ours.parameters()):,} parameters, {machine}")
    print(f"a training step on {cfg.local_batch_size} x {tuple(batch['x_start'].shape[1:])} latents")
    print(f"{'':24}{'seconds':>10}{'clips/s':>10}{'speed-up':>10}{'memory':>12}")
    report = {"machine": machine, "options": to_yaml(cfg), "ways": {}}
    for name, way in ways.items():
        median = statistics.median(seconds[name])
        figures = {
            "seconds": median,
            "all_seconds": seconds[name],
            "clips_per_s": cfg.local_batch_size / median,
            "speedup": statistics.median(seconds[f"original, {name.removeprefix('original, ')[:4]}"]) / median,
            "peak_bytes": peak_bytes(device, way),
        }
        report["ways"][name] = figures
        memory = f"{figures['peak_bytes'] / 1e9:.2f} GB"
        print(f"{name:24}{median:>10.3f}{figures['clips_per_s']:>10.2f}{figures['speedup']:>9.2f}x{memory:>12}")
    return report


def random_batch(cfg: TrainConfig, latte: Latte, diffusion: Diffusion, device: torch.device) -> dict[str, Any]:
    """Arguments of `training_losses`: clips without stills."""
    B = cfg.local_batch_size
    shape = (B, latte.num_frames, latte.in_channels, latte.input_size, latte.input_size)
    return dict(
        x_start=torch.randn(shape, device=device),
        t=torch.randint(diffusion.num_timesteps, (B,), device=device),
        model_kwargs={} if latte.num_classes is None else {"y": torch.randint(latte.num_classes, (B,), device=device)},
        noise=torch.randn(shape, device=device),
    )


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


def as_set(latte: Latte, mode: str, checkpointing: bool, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The model with the attention of `mode`, with gradient checkpointing or without: the ways share it."""
    latte.set_attention(mode)
    latte.gradient_checkpointing = checkpointing
    return latte(*args, **kwargs)


def peak_bytes(device: torch.device, step: Callable[[], None]) -> int:
    """The most that torch's allocator holds during `step`, over what it holds before."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - held
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler would complain that there is no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


if __name__ == "__main__":
    cli.run(main)
