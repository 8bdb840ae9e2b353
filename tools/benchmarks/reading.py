"""Times passes over video files, clip by clip as training reads them, against decoding whole files.

Every way reads the same clips through training's loader: `whole files` decodes all frames of a file as torchvision's
read_video did, and picks; `pyav` and `decord` are the values of video_reader; `latents` reads latents_path, and
`pixels + VAE` encodes the pixels instead.
"""

import copy
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import av
import imageio_ffmpeg
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from configs import ROOT, UserError, to_yaml
from datasets import SOURCES, ClipSampler, get_dataset, load_batches
from datasets.clips import find_videos, summary
from datasets.readers import READERS, BadClip, Choose, Read, ToPixels, pixel_aspect, read_video, reader_used
from datasets.transforms import square
from datasets.video_index import VideoIndex, decode_in_order, find_index, forget_indices
from models.autoencoder import LatentCodec, load_codec
from models.hardware import default_device, describe_machine
from tools.benchmarks.options import ReadingBenchmark
from tools.benchmarks.turns import take_turns

SIZE, NUM_FRAMES = (320, 240), 200  # of UCF101's files
ENCODERS = {  # at about UCF101's bytes a frame
    "avi": ["-c:v", "mpeg4", "-vtag", "xvid", "-b:v", "550k"],
    "mp4": ["-c:v", "libx264", "-b:v", "550k"],
}
KEYFRAME_INTERVALS = (12, 250)
PIECE = 64  # frames that a reader is asked for at a time when readers are compared


class Way(NamedTuple):
    """A way to read a data set."""

    dataset: Dataset
    codec: LatentCodec | None = None  # encodes what was read


def describe(cfg: ReadingBenchmark) -> str:
    """The work that is timed, or the comparison."""
    if cfg.verify:
        return f"comparing all frames of {cfg.data_path}, by {' and '.join(READERS)}, with plain decoding"
    clips = f"reading clips of {cfg.num_frames} frames, {cfg.frame_interval} apart, {cfg.num_workers} workers"
    return f"{clips}, from {cfg.data_path or f'{cfg.files} files of each kind, made for this run'}"


def benchmark(cfg: ReadingBenchmark) -> dict[str, Any]:
    """The metrics of each way to read data_path; without one, those for each kind of files that are made."""
    cfg = replace(cfg, use_image_num=0, dataset=cfg.dataset.removesuffix("_img"))  # clips alone
    machine, metrics = describe_machine(torch.device("cpu")), {}
    if cfg.verify:
        metrics = verify(cfg)
    elif cfg.data_path:
        metrics = time_ways(cfg, "")
    else:
        for suffix, interval in product(ENCODERS, KEYFRAME_INTERVALS):
            with TemporaryDirectory() as folder:
                make_videos(Path(folder), suffix, interval, cfg.files)
                made = replace(cfg, dataset="ffs", num_classes=None, data_path=folder)
                metrics |= time_ways(made, f".{suffix}, a keyframe every {interval}: ")
        if cfg.minutes:
            with TemporaryDirectory() as folder:
                make_long_video(Path(folder), cfg.minutes)
                made = replace(cfg, dataset="ffs", num_classes=None, data_path=folder, video_index_path=None)
                clips = get_dataset(made, take_corner if cfg.reader_only else square)
                anew = copy.copy(clips)
                anew.read = partial(read_anew, read=clips.read)
                ways = {"its index made for each clip": Way(anew), "its index kept": Way(clips)}
                metrics |= time_ways(made, f".mp4 of {cfg.minutes} minutes: ", ways)
    return {"machine": machine, "options": to_yaml(cfg), "ways": metrics}


def make_videos(folder: Path, suffix: str, keyframe_interval: int, num_files: int) -> None:
    """Writes files of nine demo clips each, enlarged and with a little grain, as a camera's have."""
    clips = find_videos(ROOT / "datasets" / "demo" / "train")
    width, height = SIZE
    change = f"scale={width}:{height},setpts=N/25/TB,noise=alls=6:allf=t"
    parts = folder / "parts.txt"
    for i in range(num_files):
        parts.write_text("".join(f"file '{clips[(i * 101 + j * 31) % len(clips)]}'\n" for j in range(9)))
        source = ["-f", "concat", "-safe", "0", "-i", parts, "-vf", change, "-r", "25", "-frames:v", NUM_FRAMES]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *ENCODERS[suffix], "-g", keyframe_interval]
        subprocess.run([*map(str, command), folder / f"{i}.{suffix}"], check=True)
    parts.unlink()


def make_long_video(folder: Path, minutes: int) -> None:
    """Writes one file of that length, in which the nine demo clips of a short one repeat."""
    make_videos(folder, "mp4", KEYFRAME_INTERVALS[0], 1)
    source, frames = folder / "0.mp4", minutes * 60 * 25
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-stream_loop", "-1", "-i", source, "-c", "copy"]
    subprocess.run([*map(str, command), "-frames:v", str(frames), str(folder / "long.mp4")], check=True)
    source.unlink()


def read_anew(path: Path, choose: Choose, read: Read) -> torch.Tensor:
    """The chosen frames, without an index from before."""
    forget_indices()
    return read(path, choose)


def verify(cfg: ReadingBenchmark) -> dict[str, dict[str, Any]]:
    """Compares all frames of the videos in data_path with plain decoding, for each reader.

    Each reader seeks to each piece of a video, so that its seeking is compared, too.

    Returns:
        For each reader: files, frames and wrong frames; for decord also the files that PyAV reads in its place.

    Raises:
        UserError: frames differ; the error names the files.
    """
    counts = {name: {"files": 0, "frames": 0, "wrong": 0, "by_pyav": 0} for name in READERS}
    wrong: list[str] = []
    for path in tqdm(get_dataset(cfg).paths, unit="video"):
        for name, count in counts.items():
            try:
                bad, frames = compare_with_decoding(path, name, cfg)
            except (BadClip, av.FFmpegError, OSError) as error:
                tqdm.write(f"skipped {path}: {error}")
                break
            count["files"] += 1
            count["frames"] += frames
            count["wrong"] += bad
            count["by_pyav"] += name == "decord" and reader_used(path) != "read by decord"
            wrong += [f"{path}: {bad} of {frames} frames by {name}"] * bool(bad)
    if wrong:
        raise UserError(f"data_path: frames differ from plain decoding: {summary(wrong)}")
    return counts


def compare_with_decoding(path: Path, reader: str, cfg: ReadingBenchmark) -> tuple[int, int]:
    """Returns how many frames of a video a reader reads wrongly, and how many it has; frames in excess are wrong."""
    index, plain = decode_plainly(path, cfg.video_index_path)
    bad = start = 0
    while start < len(index):
        piece = range(start, min(start + PIECE, len(index)))
        frames = read_video(path, lambda _, piece=piece: piece, reader).permute(0, 2, 3, 1).numpy()  # (n, H, W, 3)
        expected = list(islice(plain, len(frames)))
        bad += sum(not np.array_equal(frame, other) for frame, other in zip(frames, expected, strict=False))
        bad += len(frames) - len(expected)
        start += PIECE
    bad += sum(1 for _ in plain)
    return bad, len(index)


def decode_plainly(path: Path, index_path: str | None = None) -> tuple[VideoIndex, Iterator[np.ndarray]]:
    """Returns the index of a video, and all its frames (H, W, 3) in order, decoded without a seek."""
    with av.open(str(path)) as container:
        index = find_index(container, index_path)
        to_pixels = ToPixels(pixel_aspect(container.streams[index.stream]))

    def decode() -> Iterator[np.ndarray]:
        with av.open(str(path)) as container:
            yield from map(to_pixels, decode_in_order(container, index.stream, skip_broken=index.clock == "count"))

    return index, decode()


def time_ways(cfg: ReadingBenchmark, prefix: str, ways: dict[str, Way] | None = None) -> dict[str, dict[str, Any]]:
    """Clips per second of each way, and its speed-up over the first, both medians; `prefix` begins the names."""
    seconds = take_turns(
        ways or make_ways(cfg), cfg.epochs, lambda way, epoch: read_epoch(way, cfg, epoch)
    )  # of a clip
    first = next(iter(seconds.values()))
    return {
        prefix + name: {
            "clips_per_second": statistics.median(1 / value for value in values),
            "speedup": statistics.median(base / value for base, value in zip(first, values, strict=True)),
            "all_clips_per_second": [1 / value for value in values],
        }
        for name, values in seconds.items()
    }


def make_ways(cfg: ReadingBenchmark) -> dict[str, Way]:
    """The ways to read the data of `cfg`; the first is the one that the others are compared with."""
    pixels = replace(cfg, latents_path=None)
    prepare = take_corner if cfg.reader_only else square
    if SOURCES[cfg.dataset].files == "video":
        pyav, decord = (get_dataset(replace(pixels, video_reader=name), prepare) for name in ("pyav", "decord"))
        whole = copy.copy(pyav)
        whole.read = partial(read_whole, fps=cfg.fps)
        assert torch.equal(whole[0]["video"], pyav[0]["video"])
        ways = {"whole files": Way(whole), "pyav": Way(pyav), "decord": Way(decord)}
    else:
        ways = {"pixels": Way(get_dataset(pixels, prepare))}
    if cfg.latents_path:
        codec = load_codec(cfg, default_device(), need_statistics=False)
        ways |= {"pixels + VAE": Way(get_dataset(pixels), codec), "latents": Way(get_dataset(cfg))}
    return ways


def read_epoch(way: Way, cfg: ReadingBenchmark, epoch: int) -> float:
    """Seconds a clip, over the whole batches of an epoch that training's loader reads."""
    batch_size = min(cfg.local_batch_size, len(way.dataset))
    num_batches = len(way.dataset) // batch_size
    sampler = ClipSampler(len(way.dataset), batch_size, start=epoch * len(way.dataset))
    batches = load_batches(way.dataset, sampler, cfg.num_workers, cfg.max_bad_fraction)
    next(batches)  # workers start
    start = time.perf_counter()
    for batch in islice(batches, num_batches):
        if way.codec:
            way.codec.moments(batch["video"].to(way.codec.device))[0].cpu()  # cpu: wait for the GPU
    return (time.perf_counter() - start) / (num_batches * batch_size)


def read_whole(path: Path, choose: Choose, fps: float | None) -> torch.Tensor:
    """The chosen frames (F, 3, H, W), as `read_video` gives them, picked from all the frames of the file."""
    try:
        index, plain = decode_plainly(path)
        at_rate, frames = index.at_rate(fps), np.stack(list(plain))
    except (av.FFmpegError, OSError) as error:
        raise BadClip(f"does not decode ({type(error).__name__})") from error
    return torch.from_numpy(frames[at_rate[choose(len(at_rate))]]).permute(0, 3, 1, 2)  # (F, H, W, 3) -> (F, 3, H, W)


def take_corner(frames: torch.Tensor, size: int, flip: bool) -> torch.Tensor:
    """A few pixels of each frame, at negligible cost, in place of `square`."""
    return frames[..., :8, :8]
