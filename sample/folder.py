"""Folders of samples: file names, labels, the record of a run, and the clips that are missing."""

import platform
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from configs import SampleConfig, require_path
from configs.errors import UserError
from configs.files import check_same_settings, claim_folder, file_hash, read_record, write_json
from models.autoencoder import vae_file
from models.hardware import describe_machine
from sample import DDP_RECORD, SAMPLE_RECORD
from sample.plans import Plan

SUMMARIES = ("grid.mp4", "grid.gif", "compare.mp4")  # videos of many clips, which sample.py also writes
INCIDENTAL = {  # options that two runs with the same clips may set differently
    "ckpt", "pretrained_model_path", "vae",  # the hashes of the files are compared
    "save_video_path", "num_fvd_samples", "per_proc_batch_size", "vae_chunk_frames", "attention_mode", "use_compile",
    "use_fp16",  # resolved into precision
    "dataset", "data_path", "class_names", "sample_names", "samples_per_class",
    "recipe", "recipe_anyway",  # the hash of the file is compared
}  # fmt: skip


def video_path(folder: Path, seed: int, class_name: str = "") -> Path:
    """Returns the path of a clip: `{seed}.mp4`, or `{seed}_{class}.mp4`."""
    return folder / (f"{seed:06d}" + (f"_{class_name}" if class_name else "") + ".mp4")


def labels_of(seeds: Sequence[int], cfg: SampleConfig) -> list[int] | None:
    """Returns the classes of sample_ddp.py's clips, each a function of the seed alone; None without classes."""
    if cfg.num_classes is None:
        return None
    if cfg.labels == "balanced":
        return [seed % cfg.num_classes for seed in seeds]
    return [random.Random(f"label of {seed}").randrange(cfg.num_classes) for seed in seeds]


def make_record(cfg: SampleConfig, device: torch.device) -> dict[str, Any]:
    """Returns the part of a JSON record that all runs have: options, hashes of the weights, machine and versions."""
    return {
        "config": asdict(cfg),
        "vae": {"path": str(vae_file(cfg).parent), "sha256": file_hash(vae_file(cfg))},
        "checkpoint": {"path": cfg.ckpt, "sha256": file_hash(require_path(cfg, "ckpt"))},
        "recipe": {"path": cfg.recipe, "sha256": file_hash(cfg.recipe)} if cfg.recipe else None,
        "machine": describe_machine(device),
        "device": device.type,  # a seed draws other noise on CUDA than on a CPU
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "diffusers")}},
    }


def clip_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings in a record (see `make_record`) that determine the clip of a seed."""
    defaults = asdict(SampleConfig())  # those of options that are newer than the record
    config = defaults | record["config"] | {"cache": defaults["cache"] | record["config"]["cache"]}
    config = {key: value for key, value in config.items() if key not in INCIDENTAL}
    hashes = {key: (record.get(key) or {}).get("sha256", "none")[:12] for key in ("checkpoint", "vae", "recipe")}
    return config | hashes | {"device": record["device"]}


def earlier_record(path: Path, record: dict[str, Any], clips: Iterable[Path]) -> dict[str, Any] | None:
    """Returns the record of an earlier run with the same settings in the same folder; None if there was none.

    Args:
        path: SAMPLE_RECORD or DDP_RECORD in the folder.
        record: that of this run.
        clips: the files that this run is to write, and those of their kind that are there.

    Raises:
        UserError: the folder holds clips of other or unknown settings, or cannot hold these clips.
    """
    for clip in clips:
        if clip.is_dir() or clip.parent.is_file():
            blocker = clip if clip.is_dir() else clip.parent
            raise UserError(f"save_video_path: {blocker} stands where a clip or its folder is to be written: move it")
        if clip.exists() and not path.exists():
            raise UserError(f"{clip.parent} holds videos of unknown settings (no {path.name}): choose another output")
    if not path.exists():
        return None
    earlier, now = read_record(path, "save_video_path"), clip_settings(record)
    try:
        before, _ = clip_settings(earlier), earlier["runs"]
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"save_video_path: {path} is damaged: choose another folder, or remove it") from None
    if path.name == SAMPLE_RECORD:  # the name of a file has its seed and class, and that of its folder the plan
        before["recipes"], free = earlier.get("recipes", {}), ("seed", "labels", "cache", "recipe")
        now = {key: value for key, value in now.items() if key not in free}
        now["recipes"] = {name: digest for name, digest in record["recipes"].items() if name in before["recipes"]}
    check_same_settings(before, now, "save_video_path", path.parent)
    return earlier


def open_folder(folder: Path, cfg: SampleConfig, plan: Plan, device: torch.device, dry: bool = False) -> list[int]:
    """Writes the record of a folder of sample_ddp.py, or checks the record of an earlier run; `dry` only checks.

    Returns:
        The seeds whose clips are missing or damaged.

    Raises:
        UserError: the folder holds clips made with other settings.
    """
    path, seeds = folder / DDP_RECORD, range(cfg.seed, cfg.seed + cfg.num_fvd_samples)
    record = make_record(cfg, device) | {"plan": plan.record(), "labels": labels_of(seeds, cfg), "runs": []}
    clips = [*folder.glob("[0-9]*.mp4"), *(video_path(folder, seed) for seed in seeds)]
    earlier = earlier_record(path, record, clips)
    if dry:
        return []
    if earlier:
        record["runs"] = earlier["runs"]
        if cfg.num_fvd_samples < earlier["config"]["num_fvd_samples"]:
            record = earlier  # keep it: it describes more clips than this run asks for
    claim_folder(folder, "save_video_path")
    write_json(path, record)
    return [seed for seed in seeds if not is_whole(video_path(folder, seed))]


def is_whole(path: Path) -> bool:
    """Returns whether an mp4 file is there and ends where its last box does; a copy that was cut short does not."""
    if not path.is_file():
        return False
    size, end = path.stat().st_size, 0
    with path.open("rb") as file:
        while end < size and (length := int.from_bytes(file.read(4))) >= 8:
            end += length
            file.seek(end)
    return 0 < size == end


def clips_of_one_plan(videos: list[Path], root: Path, key: str) -> list[Path]:
    """Returns the single clips among `videos`, the video files below `root`.

    Args:
        key: the option that holds `root`, named in the error.

    Raises:
        UserError: `root` holds clips of several plans.
    """
    videos = [path for path in videos if path.name not in SUMMARIES]
    if (root / DDP_RECORD).exists():
        return [path for path in videos if path.parent == root]
    if (root / SAMPLE_RECORD).exists():
        plans = ", ".join(sorted({str(path.parent) for path in videos}))
        raise UserError(f"{key}: {root} holds clips of sample.py, a folder for each plan; give one of {plans}")
    return videos


def labelled_clips(folder: Path, class_names: Sequence[str]) -> tuple[list[Path], list[int]]:
    """Returns the clips in a folder of sample_ddp.py, or in one plan's folder of sample.py, and their labels.

    Raises:
        UserError: there are no clips, or the class of a clip is not in `class_names`.
    """
    files = sorted(folder.glob("[0-9]*.mp4"))
    if (folder / DDP_RECORD).exists():
        record = read_record(folder / DDP_RECORD, "samples_path")
        labels = [record["labels"][int(file.stem) - record["config"]["seed"]] for file in files]
    else:
        named = [file.stem.partition("_")[2] for file in files]
        labels = [class_names.index(name) for name in named if name in class_names]
    if not files or len(labels) < len(files) or max(labels) >= len(class_names):
        raise UserError(f"samples_path: {folder} holds no samples of {', '.join(class_names)}, or of other classes too")
    return files, labels
