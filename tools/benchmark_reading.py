"""Time a pass over video files, clip by clip as training reads them, against decoding whole files.

    python tools/benchmark_reading.py                                  # files like UCF101's, made in a temporary folder
    python tools/benchmark_reading.py --reader-only                    # without the resizing that all ways share
    python tools/benchmark_reading.py frame_interval=1 image_size=128 --output reading.json
    python tools/benchmark_reading.py --config configs/ucf101/ucf101_train.yaml data_path=/data/UCF101/videos
    python tools/benchmark_reading.py --config configs/demo/demo_train.yaml    # encoded latents beside their pixels

Files like UCF101's: 320 x 240, 200 frames, .avi (Xvid) and .mp4 (H.264), a keyframe every 12 frames or every 250.
Every way reads the same clips through training's loader, in this process unless num_workers=N: `whole files` decodes
all frames of a file as torchvision's read_video did, and picks; `pyav` and `decord` are the values of video_reader;
`latents` reads latents_path, and `+ VAE` encodes the pixels instead. All ways take turns, an epoch each, and the median
counts.
"""

import copy
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import torch
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import ROOT, TrainConfig, load_config, to_yaml
from datasets import SOURCES, ClipSampler, get_dataset, load_batches
from datasets.clips import Choose, find_videos
from datasets.transforms import square
from models.autoencoder import LatentCodec, load_codec
from tools.common import cli
from tools.common.records import describe_machine, write_json

SIZE, NUM_FRAMES = (320, 240), 200
ENCODERS = {  # at about UCF101's bytes a frame
    "avi": ["-c:v", "mpeg4", "-vtag", "xvid", "-b:v", "550k"],
    "mp4": ["-c:v", "libx264", "-b:v", "550k"],
}
KEYFRAME_INTERVALS = (12, 250)


def main() -> None:
    parser = cli.Parser(__doc__, TrainConfig)
    parser.add_argument("--files", type=int, default=24, help="files of a kind that are made (default: 24)")
    parser.add_argument("--epochs", type=int, default=5, help="timed passes of each way (default: 5)")
    parser.add_argument("--reader-only", action="store_true", help="leave out the resizing and what follows it")
    parser.add_argument("--output", metavar="JSON", help="also write the figures here")
    args = parser.parse_args()
    cfg = load_config(TrainConfig, args.config, ["num_workers=0", *args.overrides])
    if args.dry_run:
        print(to_yaml(cfg))
        return
    report = {"machine": describe_machine(torch.device("cpu"))}
    print(
        f"clips of {cfg.num_frames} frames, {cfg.frame_interval} apart, at {cfg.image_size} x {cfg.image_size}, "
        f"{cfg.num_workers} workers; {report['machine']}"
    )
    if args.config:
        report[str(cfg.data_path)] = benchmark(cfg, args.epochs, args.reader_only)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for suffix, interval in itertools.product(ENCODERS, KEYFRAME_INTERVALS):
                kind = f".{suffix}, a keyframe every {interval}"
                print(kind)
                root = make_videos(Path(folder, f"{suffix}{interval}"), suffix, interval, args.files)
                made = replace(cfg, dataset="ffs", num_classes=None, data_path=str(root))
                report[kind] = benchmark(made, args.epochs, args.reader_only)
    if args.output:
        write_json(args.output, report)


def make_videos(folder: Path, suffix: str, keyframe_interval: int, number: int) -> Path:
    """Files of the demo's clips, nine behind each other, enlarged and with a little grain as a camera's."""
    folder.mkdir()
    clips = find_videos(ROOT / "datasets" / "demo" / "train")
    width, height = SIZE
    change = f"scale={width}:{height},setpts=N/25/TB,noise=alls=6:allf=t"
    for i in range(number):
        parts = folder / "parts.txt"
        parts.write_text("".join(f"file '{clips[(i * 101 + j * 31) % len(clips)]}'\n" for j in range(9)))
        source = ["-f", "concat", "-safe", "0", "-i", parts, "-vf", change, "-r", "25", "-frames:v", NUM_FRAMES]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *ENCODERS[suffix], "-g", keyframe_interval]
        subprocess.run([*map(str, command), folder / f"{i}.{suffix}"], check=True)
    parts.unlink()
    return folder


def benchmark(cfg: TrainConfig, epochs: int, reader_only: bool) -> dict[str, dict]:
    """Clips per second of every way to read the data of `cfg`, and how often that is the first way's."""
    cfg = replace(cfg, use_image_num=0, dataset=cfg.dataset.removesuffix("_img"))  # clips alone
    pixels = replace(cfg, latents_path=None)
    prepare = corner if reader_only else square
    ways = {"pixels": get_dataset(pixels, prepare)}
    if SOURCES[cfg.dataset].files == "video":
        ways = {reader: get_dataset(replace(pixels, video_reader=reader), prepare) for reader in ("pyav", "decord")}
        whole = copy.copy(ways["pyav"])
        whole.read = read_whole
        assert torch.equal(whole[0]["video"], ways["pyav"][0]["video"])
        ways = {"whole files": whole} | ways
    codec = None
    if cfg.latents_path:
        codec = load_codec(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        ways |= {"pixels + VAE": get_dataset(pixels), "latents": get_dataset(cfg)}
    rates = {name: [] for name in ways}
    for epoch in range(epochs + 1):
        for name, dataset in ways.items():
            rate = clips_per_second(dataset, cfg, epoch, codec if name.endswith("VAE") else None)
            if epoch:  # the first one fills the file cache
                rates[name].append(rate)
    first = next(iter(ways))
    report = {}
    for name in ways:
        ratios = [rate / base for rate, base in zip(rates[name], rates[first], strict=True)]
        report[name] = {
            "clips_per_second": statistics.median(rates[name]),
            "ratio": statistics.median(ratios),
            "all_clips_per_second": rates[name],
        }
        print(f"  {name:12}{report[name]['clips_per_second']:>9.1f} clips/s{report[name]['ratio']:>8.2f}x")
    return report


def clips_per_second(dataset: Dataset, cfg: TrainConfig, epoch: int, codec: LatentCodec | None) -> float:
    """Of one epoch through training's loader, and through `codec`."""
    batch_size = min(cfg.local_batch_size, len(dataset))
    sampler = ClipSampler(len(dataset), batch_size, start=epoch * len(dataset))
    batches = load_batches(dataset, sampler, cfg.num_workers, cfg.max_bad_fraction)
    number = len(dataset) // batch_size
    next(batches)  # workers start
    start = time.perf_counter()
    for batch in islice(batches, number):
        if codec:
            codec.moments(batch["video"].to(codec.vae.device))[0].cpu()  # cpu: wait for the GPU
    return number * batch_size / (time.perf_counter() - start)


def read_whole(path: Path, choose: Choose) -> torch.Tensor:
    """`read_video` by way of all the frames of the file."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return torch.from_numpy(frames[choose(len(frames))]).permute(0, 3, 1, 2)  # (F, H, W, 3) -> (F, 3, H, W)


def corner(frames: torch.Tensor, size: int, flip: bool) -> torch.Tensor:
    """Next to nothing, in place of `square`."""
    return frames[..., :8, :8]


if __name__ == "__main__":
    cli.run(main)
