"""The machine: the attention and number type that suit it, its description, the device, and timing on it."""

import os
import platform
import shutil
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
    """Returns the attention that was measured to be fastest: in bf16 on a CPU, plain products beat the fused kernel."""
    return "math" if device.type == "cpu" and dtype == torch.bfloat16 else "sdpa"


def choose_precision(precision: str, use_fp16: bool, device: torch.device) -> str:
    """Returns the number type of the weights: `precision`, or for `auto` the fastest on the device.

    Args:
        use_fp16: the original's switch: `auto` means fp16 on CUDA.

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
    """Returns whether the hardware computes bf16 products; in software they are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"amx_bf16", "avx512_bf16"} & set(_cpu_fact("flags").split()))


def check_compiler() -> None:
    """Raises UserError if there is no compiler, which torch.compile calls for its kernels."""
    compiler = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
    if not shutil.which(compiler):
        raise UserError(f"use_compile: there is no compiler {compiler}: install it, or name yours in CXX")


def describe_machine(device: torch.device) -> str:
    """Returns what timings depend on, in one line: processor, threads or GPU memory, and torch's version."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB), torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = _cpu_fact("model name") or platform.processor() or platform.machine()
    return f"{cpu} ({torch.get_num_threads()} threads on {cores} cores), torch {torch.__version__}"


def _cpu_fact(key: str) -> str:
    """Returns a value from Linux's description of the first processor; empty on other systems."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def default_device() -> torch.device:
    """Returns the current GPU, or the CPU on a machine without GPUs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def local_device() -> torch.device:
    """Returns the GPU of this torchrun process and makes it current, or the CPU on a machine without GPUs.

    Raises:
        UserError: this node has more processes than GPUs.
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
    """Returns the result of `function(*args)` and the seconds until the device has finished computing it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # earlier work is not timed
    start = time.perf_counter()
    result = function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start
