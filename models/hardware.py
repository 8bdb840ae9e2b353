"""What a run on this machine should use, and what it ran on: attention, number type, device, timing."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from configs.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPUINFO = Path("/proc/cpuinfo")  # Linux's description of the processor

T = TypeVar("T")


def fastest_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The attention that measured fastest: on a CPU, the fused kernel loses to plain products in bf16."""
    return "math" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def choose_precision(precision: str, use_fp16: bool, device: torch.device) -> str:
    """The type of the weights: `precision`, or for `auto` the fastest of the device. The sampler's state is fp32.

    Raises:
        UserError: fp16 on a CPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision: fp16 runs in software on a CPU, slower than fp32 by far; use auto, bf16 or fp32")
    if precision != "auto":
        return precision
    if use_fp16 and device.type == "cuda":
        return "fp16"
    return "bf16" if has_bf16_units(device) else "fp32"


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 products are computed in hardware; elsewhere they run, but slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"amx_bf16", "avx512_bf16"} & set(_cpu_fact("flags").split()))


def describe_machine(device: torch.device) -> str:
    """What measured times depend on, in one line: processor, threads or GPU memory, and torch's version."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB), torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = _cpu_fact("model name") or platform.processor() or platform.machine()
    return f"{cpu} ({torch.get_num_threads()} threads on {cores} cores), torch {torch.__version__}"


def _cpu_fact(key: str) -> str:
    """A line of Linux's description of the first processor; empty on other systems."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def default_device() -> torch.device:
    """The current GPU, or the CPU on a machine without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def local_device() -> torch.device:
    """The GPU of this process under torchrun, which becomes the current one; the CPU on a machine without GPUs.

    Raises:
        UserError: more processes on this node than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} has no GPU: start at most {torch.cuda.device_count()} on this node")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def timed(device: torch.device, function: Callable[..., T], *args: Any) -> tuple[T, float]:
    """The function's result, and the seconds until the device had it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was queued before does not count
    start = time.perf_counter()
    result = function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
