"""What a program leaves beside its results: JSON records, and the machine they were made on."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from configs import UserError
from models.checkpoint import atomic_path


def write_json(path: str | Path, record: Any) -> None:
    """Writes `record`, readably; the file appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def check_place(cfg: Any, key: str, folder: bool = False) -> None:
    """Raises UserError, before the work, where no file (or folder) can be written at the path in option `key`."""
    path = Path(getattr(cfg, key)).absolute()
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if nearest.is_dir() != (folder or nearest != path):
        there, wanted = ("folder", "file") if nearest.is_dir() else ("file", "folder")
        raise UserError(f"{key}: {nearest} is a {there}, where a {wanted} is to be written: choose another path")


def describe_machine(device: torch.device) -> str:
    """What figures depend on, in one line: processor, threads or GPU memory, and torch's version."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB), torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_model()} ({torch.get_num_threads()} threads on {cores} cores), torch {torch.__version__}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
