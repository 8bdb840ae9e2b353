"""What the benchmarks measure with: turns, memory, and the way in which the original code computes a model."""

import os
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from models.hardware import timed
from models.latte import Latte
from models.layers import Block

Way = TypeVar("Way")


def take_turns(ways: Mapping[str, Way], num_turns: int, measure: Callable[[Way, int], float]) -> dict[str, list[float]]:
    """Measures each way once a turn, so that a machine that slows down slows all of them.

    Args:
        ways: what is compared, by name.
        measure: a way and the number of the turn -> seconds.

    Returns:
        The seconds of each way in turns 1 ... num_turns. Turn 0 warms up and does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=len(ways) * (num_turns + 1), unit="run", disable=None) as bar:
        for turn in range(num_turns + 1):
            for name, way in ways.items():
                duration = measure(way, turn)
                if turn > 0:
                    seconds[name].append(duration)
                bar.update()
    return seconds


def time_steps(
    device: torch.device, steps: Mapping[str, Callable[[], object]], num_turns: int, base: Callable[[str], str]
) -> dict[str, dict[str, Any]]:
    """Seconds (median, and each), speed-up over the step named `base(name)`, and memory of each of `steps`."""
    seconds = take_turns(steps, num_turns, lambda step, _: timed(device, step)[1])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {
            "seconds": medians[name],
            "all_seconds": seconds[name],
            "speedup": medians[base(name)] / medians[name],
            "peak_bytes": peak_bytes(device, step),
        }
        for name, step in steps.items()
    }


def peak_bytes(device: torch.device, step: Callable[[], object]) -> int:
    """The most memory that torch's allocator holds during `step`, over what it holds before."""
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


def run_as_original(latte: Latte, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The output of `latte`, computed as the original does.

    The attention is plain maths, and the conditioning is repeated to one row a sequence before each adaLN linear layer.
    """
    latte.set_attention("math")
    for block in latte.blocks:
        block.forward = partial(_original_block, block)
    try:
        return latte(*args, **kwargs)
    finally:
        for block in latte.blocks:
            del block.forward  # the class's own again


def _original_block(block: Block, x: Tensor, c: Tensor) -> Tensor:
    """x (B, G, S, D): G sequences of S tokens; c (B, 1 or G, D) -> (B, G, S, D)."""
    B, G = x.shape[:2]
    c = c.repeat_interleave(G // c.shape[1], dim=1)  # (B, G, D); stills come with a row for each frame
    x, c = x.flatten(0, 1), c.flatten(0, 1)  # (B*G, S, D), (B*G, D)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
    x = x + gate_a * block.attn(block.norm1(x) * (1 + scale_a) + shift_a)
    x = x + gate_m * block.mlp(block.norm2(x) * (1 + scale_m) + shift_m)
    return x.unflatten(0, (B, G))
