"""Time one step of a model: against the way the original computes it, and a cached step against a full one.

    python tools/benchmark.py                                            # Skip-DiT XL/2, one 16 x 256 x 256 clip
    python tools/benchmark.py --runs 5 --output benchmark.json
    python tools/benchmark.py model=Latte-B/2-skip use_compile=False     # any option of a SampleConfig; eager only

The original's way: plain-maths attention, and the conditioning repeated to one row a sequence before each adaLN linear
layer, in fp32, eager. Weights are random: the time does not depend on them. All ways take turns, and the median counts.
The share is that of the machine's own matrix-product rate in the same type, measured in the same run.
Letters: B batch, F frames, G sequences of a sample, C channels, D width.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import SampleConfig, load_config, to_yaml
from models import get_models
from models.latte import Latte, fastest_attention
from models.layers import Block
from models.skip_cache import cached_step, compile_steps, full_step
from sample.pipeline import has_bf16_units
from tools.common import cli
from tools.common.macs import readable, step_macs
from tools.common.records import describe_machine, write_json

MATMUL_SIZE = 2048


def main() -> None:
    parser = cli.Parser(__doc__, SampleConfig)
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each way (default: 3)")
    parser.add_argument("--batch", type=int, default=1, help="clips in a step (default: 1)")
    parser.add_argument("--output", metavar="JSON", help="also write the figures here")
    args = parser.parse_args()
    defaults = [] if args.config else ["model=Latte-skip", "num_classes=101", "use_compile=True"]
    cfg = load_config(SampleConfig, args.config, [*defaults, *args.overrides])
    if args.dry_run:
        print(to_yaml(cfg))
        return
    report = benchmark(cfg, args.runs, args.batch)
    if args.output:
        write_json(Path(args.output), report)


@torch.inference_mode()
def benchmark(cfg: SampleConfig, runs: int, batch: int) -> dict:
    """Time the ways, print a table, and return its figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("highest")  # fp32 means fp32 on a GPU, too
    latte = get_models(cfg).to(device).eval()
    x = torch.randn(batch, cfg.num_frames, cfg.in_channels, latte.input_size, latte.input_size, device=device)
    t = torch.full((batch,), 500, device=device)
    y = None if latte.num_classes is None else torch.zeros(batch, dtype=torch.long, device=device)
    forms = {"": (full_step, cached_step)} | ({", compiled": compile_steps()} if cfg.use_compile else {})
    depth = cfg.cache.depth

    ways = {"original, fp32": (torch.float32, lambda: as_original(latte, x, t, y))}
    for name, dtype in [("fp32", torch.float32)] + [("bf16", torch.bfloat16)] * has_bf16_units(device):
        model = latte if dtype == torch.float32 else get_models(cfg).to(device, dtype).eval()
        mode = fastest_attention(device, dtype)
        deep = full_step(model, depth, x, t, y)[1] if latte.num_skips else None
        for form, (full, cached) in forms.items():
            ways[name + form] = (dtype, partial(with_attention, mode, full, model, depth, x, t, y))
            if latte.num_skips:
                ways[f"{name}, cached{form}"] = (
                    dtype,
                    partial(with_attention, mode, cached, model, depth, x, t, y, deep),
                )

    rates = {dtype: matmul_rate(device, dtype) for dtype in {dtype for dtype, _ in ways.values()}}  # MACs/s
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peak: dict[str, int] = {}
    for i in range(runs + 1):
        for name, (_, way) in ways.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            duration = timed(device, way)
            if i > 0:  # the first turn warms up
                seconds[name].append(duration)
            if device.type == "cuda":
                peak[name] = torch.cuda.max_memory_allocated(device)

    macs = step_macs(cfg, cfg.cache.depth)
    machine = describe_machine(device)
    print(f"{cfg.model}, {batch} x {tuple(x.shape[1:])} latents, full step {readable(batch * macs.full)}; {machine}")
    print(f"{'':24}{'seconds':>10}{'speed-up':>10}{'of matmul rate':>16}" + f"{'peak GB':>10}" * bool(peak))
    report = {"machine": machine, "model": cfg.model, "batch": batch, "ways": {}}
    for name, (dtype, _) in ways.items():
        median = statistics.median(seconds[name])
        step = batch * (macs.cached if "cached" in name else macs.full)
        figures = {
            "seconds": median,
            "all_seconds": seconds[name],
            "speedup": statistics.median(seconds["original, fp32"]) / median,
            "share_of_matmul_rate": step / median / rates[dtype],
            "matmul_gflops": 2 * rates[dtype] / 1e9,
            "peak_bytes": peak.get(name),
        }
        report["ways"][name] = figures
        memory = f"{peak[name] / 1e9:>10.2f}" if peak else ""
        print(f"{name:24}{median:>10.3f}{figures['speedup']:>9.2f}x{figures['share_of_matmul_rate']:>15.0%} {memory}")
    for dtype, rate in rates.items():
        print(f"matmul rate in {str(dtype).removeprefix('torch.')}: {2 * rate / 1e9:,.0f} GFLOP/s")
    return report


def with_attention(mode: str, step: Callable, model: Latte, *args: object) -> object:
    """A step with the attention of `mode`: the ways share the fp32 model."""
    model.set_attention(mode)
    return step(model, *args)


def as_original(latte: Latte, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """The same function of the same weights, computed as the original does."""
    latte.set_attention("math")
    for block in latte.blocks:
        block.forward = partial(original_block, block)
    try:
        return latte(x, t, y)
    finally:
        for block in latte.blocks:
            del block.forward  # the class's own again


def original_block(block: Block, x: Tensor, c: Tensor) -> Tensor:
    """x (B, G, S, D), c (B, 1, D) -> (B, G, S, D); each sequence has its own copy of the conditioning."""
    B, G = x.shape[:2]
    x, c = x.flatten(0, 1), c.repeat_interleave(G, dim=1).flatten(0, 1)  # (B*G, S, D), (B*G, D)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
    x = x + gate_a * block.attn(block.norm1(x) * (1 + scale_a) + shift_a)
    x = x + gate_m * block.mlp(block.norm2(x) * (1 + scale_m) + shift_m)
    return x.unflatten(0, (B, G))


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Multiply-adds per second of a large matrix product, the median of `repeats`."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype) for _ in range(2))
    timed(device, lambda: a @ b)
    return MATMUL_SIZE**3 / statistics.median(timed(device, lambda: a @ b) for _ in range(repeats))


def timed(device: torch.device, function: Callable[[], Tensor]) -> float:
    """Seconds until the device has the function's result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main)
