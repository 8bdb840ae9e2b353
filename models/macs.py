"""Multiply-adds (MACs) of a model's steps, counted on the meta device without computing them.

The count is half of torch's flop count: all matrix products and convolutions, including those in attention.
The paper omits the products in attention, and counts the conditioning once for every frame and token.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from configs import ModelOptions
from models import meta_model
from models.latte import Latte
from models.skip_cache import cached_step, full_step


@dataclass(frozen=True)
class StepMacs:
    """MACs of one step on one sample, without guidance (which doubles them)."""

    full: int
    cached: int


def step_macs(options: ModelOptions, depth: int = 1) -> StepMacs:
    """Returns the MACs of a full step, and of a cached step with `depth` outer layers, of the model of `options`."""
    return _count(meta_model(options), depth)


@cache
@torch.no_grad()
def _count(model: Latte, depth: int) -> StepMacs:
    with torch.device("meta"):
        x = torch.empty(1, model.num_frames, model.in_channels, model.input_size, model.input_size)
        t = torch.empty(1, dtype=torch.long)
        y = None if model.num_classes is None else torch.empty(1, dtype=torch.long)
    model.set_attention("math")  # the counter cannot see into the fused kernel

    with FlopCounterMode(display=False) as full:
        _, deep = full_step(model, depth, x, t, y)
    with FlopCounterMode(display=False) as cached:
        cached_step(model, depth, x, t, y, deep)
    return StepMacs(full.get_total_flops() // 2, cached.get_total_flops() // 2)


def readable(macs: int) -> str:
    """Returns MACs with a unit: 1938926813184 -> 1.94 TMACs."""
    size, unit = next((size, unit) for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1, "")) if macs >= size)
    return f"{macs / size:.3g} {unit}MACs"
