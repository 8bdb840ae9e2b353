"""Encode a training set's frames once, so that training reads latents instead of pixels.

    python tools/encode_latents.py --config configs/demo/demo_train.yaml
    torchrun --standalone --nproc_per_node=8 tools/encode_latents.py --config configs/ucf101/ucf101_train.yaml \\
        latents_path=/data/ucf101_latents                     # then train with the same latents_path
    python tools/encode_latents.py --config ... --dry-run     # what would run; checks its files

Reads `data_path`, writes `latents_path` (see datasets/latents.py). The same command again encodes what is missing, and
videos that were replaced. Latents whose video is gone move to `latents_path`/.dropped, where training does not look.
Letters: N frames of a video, n <= PIECE of them, S image_size, V variants (as it is, mirrored), C channels of latents;
with a VAE that compresses time, W clips of F frames, f frames of latents each.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import TrainConfig, UserError, cli, load_config

parser = cli.Parser(__doc__, TrainConfig)
parser.add_argument("--compare-content", action="store_true", help="replaced: by SHA-256 instead of size and time")
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from configs.files import atomic_path, check_writable, file_hash, write_json
from datasets import class_changes, get_dataset
from datasets.clips import ClipDataset, ShortClip, crop_at, summary, survey
from datasets.latents import RECORD, SUFFIX, check_latents_record, latent_settings
from datasets.readers import IMAGE_SUFFIXES, BadClip, Read, has_suffix
from datasets.transforms import square
from models.autoencoder import LatentCodec, load_codec, vae_file
from models.vaes import describe_vae, own_class, vae_spec
from sample.distributed import Environment, distributed

PIECE = 256  # frames of a video that are in memory at full size: 1.6 GB of 1920 x 1080


def source_videos(cfg: TrainConfig) -> ClipDataset:
    """The videos to encode, without stills."""
    dataset = cfg.dataset.removesuffix("_img")
    return get_dataset(replace(cfg, latents_path=None, use_image_num=0, dataset=dataset))


def encoding_settings(cfg: TrainConfig, of_clips: bool) -> dict[str, Any]:
    """The options that the latents of a folder share: those that training compares, and the number of clips."""
    return latent_settings(cfg, of_clips) | ({"latents_clips": cfg.latents_clips} if of_clips else {})


def latents_file(cfg: TrainConfig, video: Path) -> Path:
    """Where the latents of a video are written: the video's place in `data_path`, in `latents_path`."""
    return Path(cfg.latents_path, f"{video.relative_to(cfg.data_path)}{SUFFIX}")


def video_facts(video: Path, content: bool) -> dict[str, str]:
    """The size, the time of change and, with `content`, the SHA-256 of a video file or of a folder of frames."""
    files = [video]
    if video.is_dir():
        files = [path for path in sorted(video.iterdir()) if has_suffix(path.name, IMAGE_SUFFIXES)]
    stats = [file.stat() for file in files]
    facts = {"size": sum(each.st_size for each in stats), "changed": max(each.st_mtime_ns for each in stats)}
    if content:
        facts["sha256"] = hashlib.sha256(" ".join(map(file_hash, files)).encode()).hexdigest()
    return {key: str(value) for key, value in facts.items()}


def is_encoded(cfg: TrainConfig, video: Path, compare_content: bool = False) -> bool:
    """Whether the latents of a video are there, whole, and of the video as it is now."""
    try:
        with safe_open(latents_file(cfg, video), framework="np") as file:
            made = file.metadata() or {}
        now = video_facts(video, compare_content and "sha256" in made)
    except (SafetensorError, OSError):
        return False
    if not made:  # by an earlier version of this program
        return latents_file(cfg, video).stat().st_mtime_ns >= int(now["changed"])
    return made["sha256"] == now["sha256"] if compare_content else made | now == made


def drop(cfg: TrainConfig, file: Path) -> None:
    """Moves a file of latents to `latents_path`/.dropped."""
    target = Path(cfg.latents_path, ".dropped", file.relative_to(cfg.latents_path))
    target.parent.mkdir(parents=True, exist_ok=True)
    file.replace(target)


def drop_orphans(cfg: TrainConfig, clips: ClipDataset) -> None:
    """Drops the latents whose video is no longer in `data_path`, and says so.

    Raises:
        UserError: none of the latents is of a video there.
    """
    wanted = {latents_file(cfg, video) for video in clips.paths}
    there = survey(Path(cfg.latents_path), {SUFFIX}).files
    orphans = [str(file) for file in there if file not in wanted]
    if not orphans:
        return
    if len(orphans) == len(there):
        raise UserError(f"latents_path: {cfg.latents_path} holds latents of other videos than {cfg.data_path}")
    if clips.num_unreadable:
        return print(f"kept {len(orphans)} latents without video, as not all of {cfg.data_path} can be read")
    for file in map(Path, orphans):
        drop(cfg, file)
        for folder in file.parents:  # an empty folder would count as a class
            if folder == Path(cfg.latents_path) or any(folder.iterdir()):
                break
            folder.rmdir()
    print(f"moved {len(orphans)} latents whose videos are gone to {cfg.latents_path}/.dropped: {summary(orphans)}")


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


def encode_frames(cfg: TrainConfig, codec: LatentCodec, clips: ClipDataset, path: Path) -> dict[str, Tensor]:
    """The tensors of a file of frames (see datasets/latents.py): moments (N, V, 2C, h, w)."""
    pieces = read_in_pieces(clips.read, path)
    return {"moments": torch.cat([half_moments(codec, make_variants(cfg, clips, frames)) for frames in pieces])}


def encode_clips(cfg: TrainConfig, codec: LatentCodec, clips: ClipDataset, path: Path) -> dict[str, Tensor]:
    """The tensors of a file of clips: moments (W, f, V, 2C, h, w), starts (W + 1) and stills (W, V, 2C, h, w)."""
    starts: list[int] = []
    total, possible = 0, 1  # frames, and places where a clip can start

    def choose(number: int) -> list[int]:
        nonlocal total, possible
        total, possible = number, max(1, number - cfg.num_frames * cfg.frame_interval + 1)
        starts.append(len(starts) * possible // min(possible, cfg.latents_clips))
        return crop_at(starts[-1], total, cfg.num_frames, cfg.frame_interval)

    moments, num_stills = [], int(codec.spec.causal)
    while len(starts) < min(possible, cfg.latents_clips):
        x = make_variants(cfg, clips, clips.read(path, choose)).transpose(0, 1)  # (V, F, 3, S, S)
        x = half_moments(codec, torch.cat([x, x[:, :num_stills]], dim=1), num_stills)  # (V, f + num_stills, 2C, h, w)
        moments.append(x.transpose(0, 1))
    moments = torch.stack(moments)  # (W, f + num_stills, V, 2C, h, w)
    length = codec.spec.latent_frames(cfg.num_frames)
    parts = {"moments": moments[:, :length], "starts": torch.tensor([*starts, total])}
    return parts | ({"stills": moments[:, -1]} if num_stills else {})


def make_variants(cfg: TrainConfig, clips: ClipDataset, frames: Tensor) -> Tensor:
    """(n, 3, H, W) -> (n, V, 3, S, S)"""
    return torch.stack([square(frames, cfg.image_size, flip) for flip in ([False, True] if clips.flip else [False])], 1)


def half_moments(codec: LatentCodec, videos: Tensor, num_stills: int = 0) -> Tensor:
    """Mean and deviation of the latents of videos, (B, f, 2C, h, w) fp16; BadClip if one of them is not finite."""
    moments = torch.cat(codec.moments(videos.to(codec.device), num_stills), dim=2).half().cpu()
    if not moments.isfinite().all():
        raise BadClip("its latents are not finite numbers of half precision")
    return moments


def write_record(cfg: TrainConfig, settings: dict[str, Any], clips: ClipDataset, has_statistics: bool) -> None:
    """Writes what the latents are made with; UserError if `latents_path` holds latents of other settings."""
    path = Path(cfg.latents_path, RECORD)
    if path.is_file():
        before = check_latents_record(path, settings).get("classes")
        if before and clips.classes and (changes := class_changes(before, clips.classes)):
            print(f"the classes have changed: {changes}")
        drop_orphans(cfg, clips)
    vae = cfg.vae if own_class(cfg.vae) else str(vae_file(cfg).parent)
    places = {"data_path": cfg.data_path, "vae": vae}  # these may move
    write_json(path, settings | places | {"classes": clips.classes, "has_statistics": has_statistics})


@torch.no_grad()
def encode(cfg: TrainConfig, env: Environment, compare_content: bool = False) -> None:
    """Encodes this process's share of the videos whose latents are missing, or of an earlier version of the video.

    Args:
        compare_content: whether a video has changed is a question of its SHA-256, not of its size and time.

    Raises:
        UserError: `latents_path` holds latents made otherwise, or more than max_bad_fraction of the videos are broken.
    """
    clips, codec = source_videos(cfg), load_codec(replace(cfg, latent_mean=None), env.device, need_statistics=False)
    of_clips = codec.spec.time > 1
    settings = encoding_settings(cfg, of_clips) | {"encoder": codec.fingerprint()}
    env.from_first(lambda: write_record(cfg, settings, clips, codec.has_statistics))

    bad, changed, short = [], [], []
    span = cfg.num_frames * cfg.frame_interval
    for path in tqdm(clips.paths[env.rank :: env.world_size], disable=not env.is_main, unit="video"):
        file = latents_file(cfg, path)
        if is_encoded(cfg, path, compare_content):
            continue
        if file.exists():
            changed.append(str(path))
            drop(cfg, file)
        try:
            facts = video_facts(path, content=True)
            tensors = (encode_clips if of_clips else encode_frames)(cfg, codec, clips, path)
        except (BadClip, OSError) as error:  # OSError: it is gone since
            tqdm.write(f"skipped {path}: {error}")
            (short if isinstance(error, ShortClip) and cfg.short_clips == "skip" else bad).append(f"{path}: {error}")
            continue
        total = int(tensors["starts"][-1]) if of_clips else len(tensors["moments"])
        if total < span:
            short.append(f"{path}: {total} frames")
        with atomic_path(file) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, facts)
    bad, changed, short = env.gather(bad), env.gather(changed), env.gather(short)
    if env.is_main:
        print(f"{len(clips.paths)} videos, {len(bad)} skipped")
        if short:
            use = "leaves them out" if cfg.short_clips == "skip" else "uses them whole"
            print(f"training {use} (short_clips): {len(short)} videos below {span} frames: {summary(short)}")
        if changed:
            hint = "" if compare_content else " (by size and time; --compare-content looks at the content)"
            print(f"{len(changed)} videos have changed and were encoded again{hint}: {summary(changed)}")
    if len(bad) > cfg.max_bad_fraction * len(clips.paths):
        shares = f"{len(bad)} of {len(clips.paths)} videos failed, max_bad_fraction={cfg.max_bad_fraction}"
        raise UserError(f"{shares}: {summary(bad)}")


def describe_encoding(cfg: TrainConfig, compare_content: bool) -> list[str]:
    """What would run, a line each."""
    try:
        videos = source_videos(cfg).paths
    except UserError:  # the checks of the files say why
        videos = []
    there = sum(is_encoded(cfg, video, compare_content) for video in videos)
    return [
        f"videos: {len(videos):,} in {cfg.data_path}, {there:,} of them encoded before, processes: {cli.world_size()}",
        f"latents: of frames at {cfg.image_size} x {cfg.image_size}, in {cfg.latents_path}",
        describe_vae(cfg),
    ]


def main() -> None:
    args = parser.parse_args()
    overrides = [re.sub("^output=", "latents_path=", item) for item in args.overrides]
    cfg = load_config(TrainConfig, args.config, overrides)
    if not cfg.latents_path:
        raise UserError("latents_path is not set: give the folder to write as latents_path=PATH")
    check_writable(cfg, "latents_path", folder=True)
    if not args.dry_run:
        with distributed() as env:
            encode(cfg, env, args.compare_content)
    elif cli.rank() == 0:
        settings, record = encoding_settings(cfg, vae_spec(cfg).time > 1), Path(cfg.latents_path, RECORD)
        checks = [
            lambda: source_videos(cfg),
            lambda: vae_file(cfg),
            lambda: record.is_file() and check_latents_record(record, settings),
        ]
        cli.dry_run(cfg, describe_encoding(cfg, args.compare_content), checks)


if __name__ == "__main__":
    cli.run(main)
