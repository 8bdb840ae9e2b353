"""Features of a set of clips: extracted on any number of processes, and kept for the next run.

Letters: N clips, n rows of features a clip (1, or one a frame), D width, B batch, F frames, S pixels of a side.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from configs.files import atomic_path
from datasets.clips import summary
from datasets.readers import BadClip
from sample.distributed import Environment
from tools.metrics.clips import SampledClips, ShortClip, VideoFiles
from tools.metrics.detectors import OUTPUTS, DetectorFile
from tools.metrics.options import ClipOptions, EvaluateConfig

# The options that settle the features of a real set.
KEPT_BY = ("num_real", "num_frames", "real_stride", "image_size", "resize_filter", "seed", "video_reader")
VERSION = 1  # of kept features; raise it when the code computes other features from the same files

Networks = dict[str, Callable[[Tensor], Tensor]]  # output -> function from (B, F, 3, S, S) uint8 to (B, n, D)


class Features(NamedTuple):
    """The features of a set of clips, and a report on how the clips were read."""

    rows: dict[str, Tensor]  # output -> (N, n, D)
    report: dict[str, Any]


def extract(source: VideoFiles | SampledClips, networks: Networks, cfg: ClipOptions, env: Environment) -> Features:
    """Features of the first `source.wanted` usable clips, the same on every process.

    Batches are formed before the processes share them out, so the number of processes changes no clip's neighbours.

    Raises:
        UserError: too many videos are broken, or fewer than two clips are usable.
    """
    rows: list[dict[str, Tensor]] = []  # by batch: output -> (B, n, D)
    failed: list[BadClip] = []
    clips, seen = 0, 0
    while clips < source.wanted and seen < len(source):  # again: other clips replace those that failed
        indices = range(seen, min(seen + source.wanted - clips, len(source)))
        share = [indices[i : i + cfg.batch_size] for i in range(0, len(indices), cfg.batch_size)]
        share = share[env.rank :: env.world_size]
        reading = tqdm(source.batches(share), source.key, len(share), unit="batch", disable=not env.is_main)
        found = []
        for batch, read in zip(share, reading, strict=True):
            usable = [clip for clip in read if isinstance(clip, Tensor)]
            outputs = {name: network(torch.stack(usable)).cpu() for name, network in networks.items() if usable}
            found.append((batch.start, outputs, [clip for clip in read if isinstance(clip, BadClip)]))
        for _, outputs, bad in sorted(env.gather(found), key=lambda batch: batch[0]):
            rows += [outputs] if outputs else []
            failed += bad
        seen = indices.stop
        clips = seen - len(failed)

    short = [clip for clip in failed if isinstance(clip, ShortClip)]
    broken = [str(clip) for clip in failed if not isinstance(clip, ShortClip)]
    check_broken(source.key, broken, seen, cfg)
    if clips < 2:
        hint = f" ({short[0]}: num_frames x stride)" if short else ""
        raise UserError(f"{source.key}: {clips} clips where two are needed: {len(short)} videos are too short{hint}")
    report = {"read": seen, "clips": clips, "too_short": len(short), "broken": broken}
    return Features({name: torch.cat([batch[name] for batch in rows]) for name in networks}, report)


def check_broken(key: str, broken: list[str], seen: int, cfg: ClipOptions) -> None:
    """Raises UserError if too many of the videos read are broken."""
    if len(broken) > cfg.max_bad_fraction * seen:
        rule = f"max_bad_fraction={cfg.max_bad_fraction}"
        raise UserError(f"{key}: {len(broken)} of {seen} videos are broken, {rule}: {summary(broken)}")


def real_features(
    source: VideoFiles, networks: Networks, found: dict[str, DetectorFile], cfg: EvaluateConfig, env: Environment
) -> Features:
    """Features of the real set, kept in `feature_path` for the next run. Only the first process surely has them."""
    files: dict[str, Path] = {}
    if cfg.feature_path:
        facts = [VERSION, env.from_first(source.fingerprint), *(getattr(cfg, key) for key in KEPT_BY)]
        for name in networks:
            key = json.dumps([*facts, OUTPUTS[name], found[OUTPUTS[name].detector].sha256])
            files[name] = Path(cfg.feature_path) / name / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if files and env.from_first(lambda: all(file.exists() for file in files.values())):
        if not env.is_main:
            return Features({}, {})
        with safe_open(next(iter(files.values())), "pt") as file:
            report = json.loads(file.metadata()["report"]) | {"from_cache": True}
        check_broken(source.key, report["broken"], report["read"], cfg)
        return Features({name: load_file(file)["rows"] for name, file in files.items()}, report)

    features = extract(source, networks, cfg, env)
    if env.is_main:
        for name, file in files.items():
            with atomic_path(file) as temporary:
                save_file({"rows": features.rows[name]}, temporary, {"report": json.dumps(features.report)})
    return features
