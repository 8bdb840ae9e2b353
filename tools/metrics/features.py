"""Features of a set of clips: extracted on any number of processes, and kept for the next run.

Letters: N clips, n rows of features a clip (1, or one a frame), D width, B batch, F frames, S pixels of a side.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from configs.files import atomic_path
from datasets.clips import ShortClip, summary
from datasets.readers import BadClip
from sample.distributed import Environment
from sample.similarity import is_flat
from tools.metrics.clips import SampledClips, VideoFiles
from tools.metrics.detectors import DetectorFile
from tools.metrics.options import DETECTOR_OF, OUTPUTS, ClipOptions, EvaluateConfig

# The options that settle the features of all frames, and those of clips.
FRAMES_KEPT_BY = ("first_frames", "image_size", "resize_filter", "jpeg", "video_reader")
CLIPS_KEPT_BY = (*FRAMES_KEPT_BY, "num_real", "num_frames", "real_stride", "order", "seed")
ADDED = {"real_fps": None, "short_clips": "skip"}  # options of both that are newer than kept features, which had these
SHOWN = 8  # clips whose pixels are kept
VERSION = 2  # of kept features; raise it when the code computes other features from the same files

Networks = dict[str, Callable[[Tensor], Tensor]]  # output -> function from (B, F, 3, S, S) uint8 to (B, n, D)


class Features(NamedTuple):
    """The features of a set of clips, and a report on how the clips were read."""

    rows: dict[str, Tensor]  # output -> (N, n, D)
    report: dict[str, Any]
    shown: Sequence[Tensor] = ()  # the first clips, (F, 3, S, S) uint8 each, on the first process


def extract(source: VideoFiles | SampledClips, networks: Networks, cfg: ClipOptions, env: Environment) -> Features:
    """Features of the first `source.wanted` usable clips, the same on every process.

    Batches are formed before the processes share them out, so the number of processes changes no clip's neighbours.

    Raises:
        UserError: too many videos are broken, or fewer than two clips are usable.
    """
    rows: list[dict[str, Tensor]] = []  # by batch: output -> (B, n, D)
    failed: list[BadClip] = []
    flat = 0  # clips nearly of one color
    shown: list[Tensor] = []
    clips, seen = 0, 0
    while clips < source.wanted and seen < len(source):  # again: other clips replace those that failed
        indices = range(seen, min(seen + source.wanted - clips, len(source)))
        share = [indices[i : i + cfg.batch_size] for i in range(0, len(indices), cfg.batch_size)]
        share = share[env.rank :: env.world_size]
        reading = tqdm(source.batches(share), source.key, len(share), unit="batch", disable=not env.is_main)
        found = []
        for batch, read in zip(share, reading, strict=True):
            usable = [clip for clip in read if isinstance(clip, Tensor)]
            shown += usable[: SHOWN - len(shown)]
            outputs = {name: network(torch.stack(usable)).cpu() for name, network in networks.items() if usable}
            bad = [clip for clip in read if isinstance(clip, BadClip)]
            found.append((batch.start, outputs, bad, sum(map(is_flat, usable))))
        for _, outputs, bad, plain in sorted(env.gather(found), key=lambda batch: batch[0]):
            rows += [outputs] if outputs else []
            failed += bad
            flat += plain
        seen = indices.stop
        clips = seen - len(failed)

    broken = [str(clip) for clip in failed if not isinstance(clip, ShortClip)]
    check_broken(source.key, broken, seen, cfg)
    short = [str(clip) for clip in failed if isinstance(clip, ShortClip)]
    if clips < 2:
        hint = f" ({short[0]}: num_frames x stride)" if short else ""
        raise UserError(f"{source.key}: {clips} clips where two are needed: {len(short)} videos are too short{hint}")
    report = {"read": seen, "clips": clips, "too_short": len(short), "short": short, "flat": flat, "broken": broken}
    return Features({name: torch.cat([batch[name] for batch in rows]) for name in networks}, report, shown)


def scatter_of_frames(source: VideoFiles, networks: Networks, cfg: ClipOptions, env: Environment) -> Features:
    """The sums of [1, x] [1, x]' (1, D + 1, D + 1), float64, over the features x of all frames of all videos.

    The rows of millions of frames would not fit into memory; their mean and covariance follow from these sums.

    Args:
        source: gives whole videos.

    Raises:
        UserError: too many videos are broken.
    """
    sums: dict[str, Tensor] = {}
    broken: list[str] = []
    share = [[i] for i in range(len(source))][env.rank :: env.world_size]
    for (clip,) in tqdm(source.batches(share), "all frames", len(share), unit="video", disable=not env.is_main):
        if isinstance(clip, BadClip):
            broken.append(str(clip))
            continue
        for piece in clip.split(cfg.batch_size * cfg.num_frames):
            for name, network in networks.items():
                x = network(piece[None])[0].double()  # (n, D)
                x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
                sums[name] = sums.get(name, 0) + (x.T @ x).cpu()
    broken = env.gather(broken)
    check_broken(source.key, broken, len(source), cfg)
    if len(broken) == len(source):
        raise UserError(f"{source.key}: none of {len(source)} videos can be read")
    total = {name: sum(part[name] for part in env.gather([sums]) if name in part)[None] for name in networks}
    frames = int(next(iter(total.values()))[0, 0, 0])
    return Features(total, {"read": len(source), "frames": frames, "broken": broken})


def check_broken(key: str, broken: list[str], seen: int, cfg: ClipOptions) -> None:
    """Raises UserError if too many of the videos read are broken."""
    if len(broken) > cfg.max_bad_fraction * seen:
        rule = f"max_bad_fraction={cfg.max_bad_fraction}"
        raise UserError(f"{key}: {len(broken)} of {seen} videos are broken, {rule}: {summary(broken)}")


def real_features(
    source: VideoFiles,
    sha256: str,
    networks: Networks,
    found: dict[str, DetectorFile],
    cfg: EvaluateConfig,
    env: Environment,
) -> Features:
    """Features of the real set, kept in `feature_path` for the next run. Only the first process surely has them.

    Args:
        source: clips, for `extract`; or whole videos, for `scatter_of_frames`.
        sha256: the fingerprint of its files, which takes long to compute.
    """
    compute, kept_by = (extract, CLIPS_KEPT_BY) if source.stride else (scatter_of_frames, FRAMES_KEPT_BY)
    files: dict[str, Path] = {}
    if cfg.feature_path:
        facts = [VERSION, compute.__name__, sha256, *(getattr(cfg, key) for key in kept_by)]
        facts += [f"{key}={getattr(cfg, key)}" for key, before in ADDED.items() if getattr(cfg, key) != before]
        for name in networks:
            key = json.dumps([*facts, OUTPUTS[name], found[DETECTOR_OF[name]].sha256])
            files[name] = Path(cfg.feature_path) / name / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if files and env.from_first(lambda: all(file.exists() for file in files.values())):
        if not env.is_main:
            return Features({}, {})
        with safe_open(next(iter(files.values())), "pt") as file:
            report = json.loads(file.metadata()["report"]) | {"from_cache": True}
        check_broken(source.key, report["broken"], report["read"], cfg)
        return Features({name: load_file(file)["rows"] for name, file in files.items()}, report)

    features = compute(source, networks, cfg, env)
    if env.is_main:
        for name, file in files.items():
            with atomic_path(file) as temporary:
                save_file({"rows": features.rows[name]}, temporary, {"report": json.dumps(features.report)})
    return features
