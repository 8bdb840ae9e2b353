"""Encode a training set's frames once, so that training reads latents instead of pixels.

    python tools/encode_latents.py --config configs/demo/demo_train.yaml
    torchrun --standalone --nproc_per_node=8 tools/encode_latents.py --config configs/ucf101/ucf101_train.yaml \\
        latents_path=/data/ucf101_latents                     # then train with the same latents_path
    python tools/encode_latents.py --config ... --dry-run     # what would run; checks its files

Reads `data_path`, writes `latents_path` (see datasets/latents.py). The same command again encodes what is missing.
Letters: N frames of a video, n <= PIECE of them, S image_size, V variants (as it is, mirrored), C channels of latents.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import TrainConfig, UserError, cli, load_config

parser = cli.Parser(__doc__, TrainConfig)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from configs.files import atomic_path, check_record, check_writable, write_json
from datasets import get_dataset
from datasets.clips import ClipDataset, summary
from datasets.latents import RECORD, SUFFIX, latent_settings
from datasets.readers import BadClip, Read
from datasets.transforms import square
from models.autoencoder import load_codec, vae_file
from sample.distributed import Environment, distributed

PIECE = 256  # frames of a video that are in memory at full size: 1.6 GB of 1920 x 1080


def source_videos(cfg: TrainConfig) -> ClipDataset:
    """The videos to encode, without stills."""
    dataset = cfg.dataset.removesuffix("_img")
    return get_dataset(replace(cfg, latents_path=None, use_image_num=0, dataset=dataset))


def latents_file(cfg: TrainConfig, video: Path) -> Path:
    """Where the latents of a video are written: the video's place in `data_path`, in `latents_path`."""
    return Path(cfg.latents_path, f"{video.relative_to(cfg.data_path)}{SUFFIX}")


def read_in_pieces(read: Read, path: Path) -> Iterator[Tensor]:
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


def write_record(cfg: TrainConfig, settings: dict[str, Any]) -> None:
    """Writes what the latents are made with; UserError if `latents_path` holds latents of other settings."""
    path = Path(cfg.latents_path, RECORD)
    check_record(path, settings, "latents_path")
    places = {"data_path": cfg.data_path, "vae": str(Path(cfg.pretrained_model_path, cfg.vae))}  # these may move
    write_json(path, settings | places)


@torch.no_grad()
def encode(cfg: TrainConfig, env: Environment) -> None:
    """Encodes this process's share of the videos whose latents are missing.

    Raises:
        UserError: `latents_path` holds latents made otherwise, or more than max_bad_fraction of the videos are broken.
    """
    clips, codec = source_videos(cfg), load_codec(cfg, env.device)
    settings = latent_settings(cfg) | {"encoder": codec.fingerprint()}
    env.from_first(lambda: write_record(cfg, settings))

    bad = []
    for path in tqdm(clips.paths[env.rank :: env.world_size], disable=not env.is_main, unit="video"):
        file = latents_file(cfg, path)
        if file.exists():
            continue
        moments = []
        try:
            for frames in read_in_pieces(clips.read, path):  # (n, 3, H, W)
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


def describe_encoding(cfg: TrainConfig) -> list[str]:
    """What would run, a line each."""
    try:
        videos = source_videos(cfg).paths
    except UserError:  # the checks of the files say why
        videos = []
    there = sum(latents_file(cfg, video).exists() for video in videos)
    return [
        f"videos: {len(videos):,} in {cfg.data_path}, {there:,} of them encoded before, processes: {cli.world_size()}",
        f"latents: of frames at {cfg.image_size} x {cfg.image_size}, in {cfg.latents_path}",
    ]


def main() -> None:
    args = parser.parse_args()
    cfg = load_config(TrainConfig, args.config, args.overrides)
    if not cfg.latents_path:
        raise UserError("latents_path is not set: give the folder to write as latents_path=PATH")
    check_writable(cfg, "latents_path", folder=True)
    if not args.dry_run:
        with distributed() as env:
            encode(cfg, env)
    elif cli.rank() == 0:
        checks = [
            lambda: source_videos(cfg),
            lambda: vae_file(cfg),
            lambda: check_record(Path(cfg.latents_path, RECORD), latent_settings(cfg), "latents_path"),
        ]
        cli.dry_run(cfg, describe_encoding(cfg), checks)


if __name__ == "__main__":
    cli.run(main)
