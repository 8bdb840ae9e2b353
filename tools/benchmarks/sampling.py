"""Times one step of a model: as the original computes it, as we do, and from the cache.

Weights are random: the time does not depend on them.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from configs import to_yaml
from models import get_models
from models.hardware import default_device, describe_machine, fastest_attention, has_bf16_units, timed
from models.latte import Latte
from models.macs import readable, step_macs
from models.skip_cache import cached_step, compile_steps, full_step
from tools.benchmarks.options import SamplingBenchmark
from tools.benchmarks.turns import run_as_original, time_steps

MATMUL_SIZE = 2048
ORIGINAL = "original, fp32"


@dataclass(frozen=True)
class Way:
    """A way to compute a step."""

    run: Callable[[], object]
    dtype: torch.dtype
    macs: int  # of a clip


def describe(cfg: SamplingBenchmark) -> str:
    """The work that is timed."""
    macs = readable(cfg.batch * step_macs(cfg).full)
    return f"a step of {cfg.model}, {cfg.batch} clips of {cfg.num_frames} frames at {cfg.image_size}, {macs} in full"


@torch.inference_mode()
def benchmark(cfg: SamplingBenchmark) -> dict[str, Any]:
    """The metrics of each way; the speed-up is over the original's way."""
    device = default_device()
    torch.set_float32_matmul_precision("highest")  # fp32 means fp32 on a GPU, too
    ways = make_ways(cfg, device)
    rates = {dtype: matmul_rate(device, dtype) for dtype in {way.dtype for way in ways.values()}}  # MACs/s
    metrics = time_steps(device, {name: way.run for name, way in ways.items()}, cfg.runs, lambda name: ORIGINAL)
    for name, way in ways.items():
        rate = rates[way.dtype]
        share = cfg.batch * way.macs / metrics[name]["seconds"] / rate
        metrics[name] |= {"share_of_matmul_rate": share, "matmul_gflops": 2 * rate / 1e9}
    return {"machine": describe_machine(device), "options": to_yaml(cfg), "ways": metrics}


def make_ways(cfg: SamplingBenchmark, device: torch.device) -> dict[str, Way]:
    """The ways by name: the original's, then for each type the full and the cached step, eager and compiled."""
    latte = get_models(cfg).to(device).eval()
    x = torch.randn(cfg.batch, latte.num_frames, latte.in_channels, latte.input_size, latte.input_size, device=device)
    t = torch.full((cfg.batch,), 500, device=device)
    y = None if latte.num_classes is None else torch.zeros(cfg.batch, dtype=torch.long, device=device)
    depth = cfg.cache.depth
    macs = step_macs(cfg, depth)
    forms = {"": (full_step, cached_step)} | ({", compiled": compile_steps()} if cfg.use_compile else {})

    ways = {ORIGINAL: Way(partial(run_as_original, latte, x, t, y), torch.float32, macs.full)}
    for name, dtype in [("fp32", torch.float32)] + [("bf16", torch.bfloat16)] * has_bf16_units(device):
        model = latte if dtype == torch.float32 else get_models(cfg).to(device, dtype).eval()
        mode = fastest_attention(device, dtype)
        kept = full_step(model, depth, x, t, y)[1]
        for form, (full, cached) in forms.items():
            run = partial(run_with_attention, mode, full, model, depth, x, t, y)
            ways[name + form] = Way(run, dtype, macs.full)
            run = partial(run_with_attention, mode, cached, model, depth, x, t, y, kept)
            ways[f"{name}, cached{form}"] = Way(run, dtype, macs.cached)
    return ways


def run_with_attention(mode: str, step: Callable, model: Latte, *args: object) -> object:
    """A step with the attention of `mode`, which is set anew each time as the ways share the fp32 model."""
    model.set_attention(mode)
    return step(model, *args)


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Multiply-adds per second of a large matrix product, the median of `repeats`."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype) for _ in range(2))
    timed(device, torch.matmul, a, b)
    return MATMUL_SIZE**3 / statistics.median(timed(device, torch.matmul, a, b)[1] for _ in range(repeats))
