"""Encode a training set's frames once, so that training reads latents instead of pixels.

    python tools/encode_latents.py --config configs/demo/demo_train.yaml
    torchrun --standalone --nproc_per_node=8 tools/encode_latents.py --config configs/ucf101/ucf101_train.yaml \\
        latents_path=/data/ucf101_latents                     # then train with the same latents_path

Reads `data_path`, writes `latents_path` (see datasets/latents.py). The same command again encodes what is missing.
Letters: N frames of a video, n <= PIECE of them, S image_size, V variants (as it is, mirrored), C channels of latents.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import TrainConfig, UserError, load_config, require_path, to_yaml
from datasets import get_dataset
from datasets.clips import BadClip, Read, summary
from datasets.latents import RECORD, SUFFIX
from datasets.transforms import square
from models.autoencoder import load_codec
from models.checkpoint import atomic_path
from tools.common import cli
from tools.common.distributed import Environment, distributed
from tools.common.records import write_json

PIECE = 256  # frames of a video that are in memory at full size: 1.6 GB of 1920 x 1080


def main() -> None:
    args = cli.Parser(__doc__, TrainConfig).parse_args()
    cfg = load_config(TrainConfig, args.config, args.overrides)
    if not cfg.latents_path:
        raise UserError("latents_path is not set: give the folder to write as latents_path=PATH")
    with distributed(timeout=timedelta(days=1)) as env:  # the last process may finish long after the first
        if not args.dry_run:
            encode(cfg, env)
        elif env.is_main:
            print(to_yaml(cfg))


@torch.no_grad()
def encode(cfg: TrainConfig, env: Environment) -> None:
    """Encode the videos whose latents are missing, this process its share.

    Raises:
        UserError: `latents_path` holds latents made otherwise, or more than max_bad_fraction of the videos are broken.
    """
    target, source = Path(cfg.latents_path), require_path(cfg, "data_path")
    clips = get_dataset(replace(cfg, latents_path=None, use_image_num=0, dataset=cfg.dataset.removesuffix("_img")))
    codec = load_codec(cfg, env.device)
    settings = {"dataset": cfg.dataset.removesuffix("_img"), "image_size": cfg.image_size}
    settings |= {"horizontal_flip": cfg.horizontal_flip, "encoder": codec.fingerprint()}
    places = {"data_path": str(source), "vae": str(Path(cfg.pretrained_model_path, cfg.vae))}  # which may move
    env.from_first(lambda: write_record(target / RECORD, settings, places))

    bad = []
    for path in tqdm(clips.paths[env.rank :: env.world_size], disable=not env.is_main, unit="video"):
        file = target / f"{path.relative_to(source)}{SUFFIX}"
        if file.exists():
            continue
        moments = []
        try:
            for frames in pieces(clips.read, path):  # (n, 3, H, W)
                variants = [square(frames, cfg.image_size, flip) for flip in ([False, True] if clips.flip else [False])]
                mean, std = codec.moments(torch.stack(variants, dim=1).to(env.device))  # (n, V, C, h, w)
                moments.append(torch.cat([mean, std], dim=2).half().cpu())
        except BadClip as error:
            tqdm.write(f"skipped {path}: {error}")
            bad.append(f"{path}: {error}")
            continue
        with atomic_path(file) as temporary:
            save_file({"moments": torch.cat(moments)}, temporary)  # (N, V, 2C, h, w)
    bad = env.gather(bad)
    if env.is_main:
        print(f"{len(clips.paths)} videos, {len(bad)} skipped")
    if len(bad) > cfg.max_bad_fraction * len(clips.paths):
        shares = f"{len(bad)} of {len(clips.paths)} videos failed, max_bad_fraction={cfg.max_bad_fraction}"
        raise UserError(f"{shares}: {summary(bad)}")


def write_record(path: Path, settings: dict[str, Any], places: dict[str, str]) -> None:
    """Write what the latents are made with; UserError if those already there were made with other `settings`."""
    made = json.loads(path.read_text()) if path.is_file() else settings
    if differ := [key for key in settings if made.get(key) != settings[key]]:
        then, now = (", ".join(f"{key}={values.get(key)}" for key in differ) for values in (made, settings))
        raise UserError(f"latents_path: {path.parent} was made with {then}, not {now}; give another folder")
    write_json(path, settings | places)


def pieces(read: Read, path: Path) -> Iterator[Tensor]:
    """All frames of a video in order, (n, 3, H, W) at a time."""
    total = 0

    def choose(number: int) -> range:
        nonlocal total
        total = number
        return range(start, min(start + PIECE, number))

    start = 0
    while start == 0 or start < total:
        yield read(path, choose)
        start += PIECE


if __name__ == "__main__":
    cli.run(main)
