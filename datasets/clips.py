"""Clips from video files and from folders of frames: finding them, choosing frames, reading those, the data set.

A source of clips is a list of paths and a reader. A reader is `read(path, choose) -> (F, 3, H, W) uint8`, where
`choose(total) -> indices` picks from the frames that there are; the readers seek, they never decode a whole file.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from configs import UserError
from datasets.transforms import fit

VIDEO_SUFFIXES = {".avi", ".mp4", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".gif"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MAX_TRIES = 100  # clips drawn in place of unusable ones before a read gives up

Choose = Callable[[int], Sequence[int]]  # number of frames there are -> indices of those to read, increasing
Read = Callable[[Path, Choose], torch.Tensor]


class BadClip(Exception):
    """A clip that cannot be used, and why: too short, does not decode, no image."""


# ---------------------------------------------------------------------------------------------------------------------
# Finding clips
# ---------------------------------------------------------------------------------------------------------------------


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted by Python; a class's label is its place in this list."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_videos(root: Path) -> list[Path]:
    """Every video file under `root`, at any depth, sorted."""
    return [folder / name for folder, names in _walk(root, VIDEO_SUFFIXES) for name in sorted(names)]


def find_frame_folders(root: Path) -> list[Path]:
    """Every folder under `root` (or `root` itself) that holds images, sorted: each one is a video."""
    return [folder for folder, _ in _walk(root, IMAGE_SUFFIXES)]


def _walk(root: Path, suffixes: set[str]) -> list[tuple[Path, list[str]]]:
    found = []
    for folder, _, names in os.walk(root, followlinks=True):
        names = [name for name in names if _has_suffix(name, suffixes)]
        if names:
            found.append((Path(folder), names))
    return sorted(found)


def _has_suffix(name: str, suffixes: set[str]) -> bool:
    return Path(name).suffix.lower() in suffixes and not name.startswith(".")  # macOS leaves ._name beside name


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key that reads digits as numbers: frame_9 before frame_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


# ---------------------------------------------------------------------------------------------------------------------
# Choosing frames
# ---------------------------------------------------------------------------------------------------------------------


def temporal_crop(total: int, num_frames: int, frame_interval: int, rng: np.random.Generator) -> list[int]:
    """Indices of the frames of a clip: a random window at the exact stride, or the whole of a video shorter than that.

    Raises:
        BadClip: there are fewer than `num_frames` frames.
    """
    if total < num_frames:
        raise BadClip(f"{total} frames, {num_frames} needed")
    span = num_frames * frame_interval
    if total >= span:
        begin = int(rng.integers(total - span + 1))
        return list(range(begin, begin + span, frame_interval))
    return [i * (total - 1) // max(num_frames - 1, 1) for i in range(num_frames)]  # spread evenly, first to last


# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------


def read_video(path: Path, choose: Choose, reader: str = "decord") -> torch.Tensor:
    """The chosen frames of a video file, (F, 3, H, W) uint8.

    `reader` decord: decord where its seeking is exact, PyAV elsewhere; pyav: PyAV always.

    Raises:
        BadClip: the file does not decode, or `choose` refuses it.
    """
    try:
        frames = _read_decord(path, choose) if reader == "decord" and _decord_is_exact(path) else None
        if frames is None:
            frames = _read_pyav(path, choose)
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:  # no video stream; frames that differ in size
        raise BadClip(f"does not decode: {type(error).__name__}") from error
    return torch.from_numpy(frames).permute(0, 3, 1, 2)  # (F, H, W, 3) -> (F, 3, H, W)


def _decord_is_exact(path: Path) -> bool:
    """Whether decord's seek finds the right frames: it does not with B-frames in .avi, HEVC, MPEG-PS and MPEG-TS."""
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        if path.suffix.lower() == ".avi":
            return not codec.has_b_frames
        return path.suffix.lower() in {".mp4", ".mkv", ".mov"} and codec.name == "h264"


def _read_decord(path: Path, choose: Choose) -> np.ndarray | None:
    """(F, H, W, 3) uint8, or None where decord fails: PyAV reads some of those files."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(str(path), num_threads=1)
        return video.get_batch(choose(len(video))).asnumpy()
    except (decord.DECORDError, RuntimeError):
        return None


def _read_pyav(path: Path, choose: Choose) -> np.ndarray:
    """(F, H, W, 3) uint8. The packets' times, read without decoding, say where each frame and each keyframe is."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [
            (packet.pts, packet.dts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.pts is not None and not packet.is_discard
        ]
    times = sorted(pts for pts, _, _ in packets)
    wanted = [times[i] for i in choose(len(times))]
    keyframe = max((packet for packet in packets if packet[2] and packet[0] <= wanted[0]), default=None)
    starts = [None] if keyframe is None else [keyframe[0] if keyframe[1] is None else keyframe[1], None]
    for start in starts:  # from the start of the file where the container's seek misses the keyframe (MPEG-PS)
        frames = _decode(path, start, wanted)
        if len(frames) == len(wanted):
            return np.stack(frames)
    raise BadClip("does not decode: frames are missing")


def _decode(path: Path, start: int | None, wanted: list[int]) -> list[np.ndarray]:
    """The frames at the times `wanted`, decoding from the keyframe at `start` (None: the first)."""
    frames, wanted_times = [], set(wanted)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if start is not None:
            container.seek(start, stream=stream)
        for frame in container.decode(stream):
            if frame.pts in wanted_times:
                frames.append(frame.to_ndarray(format="rgb24"))
            if frame.pts is not None and frame.pts >= wanted[-1]:
                break
    return frames


def read_frame_folder(path: Path, choose: Choose) -> torch.Tensor:
    """The chosen frames of a folder of images in natural-number order, (F, 3, H, W) uint8.

    Raises:
        BadClip: a chosen file is no image, frames differ in size, or `choose` refuses the folder.
    """
    names = sorted((p.name for p in path.iterdir() if _has_suffix(p.name, IMAGE_SUFFIXES)), key=natural_order)
    frames = [read_image(path / names[i]) for i in choose(len(names))]
    if len({frame.shape for frame in frames}) > 1:
        raise BadClip("its frames differ in size")
    return torch.stack(frames)


def read_image(path: Path) -> torch.Tensor:
    """An image file as (3, H, W) uint8.

    Raises:
        BadClip: the file is no image.
    """
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    except Exception as error:  # Pillow's decoders raise anything, from OSError to SyntaxError, on a broken file
        raise BadClip(f"{path.name} is no image ({type(error).__name__})") from error


def read_usable(
    paths: Sequence[Path], index: int, read: Callable[[Path], torch.Tensor], rng: np.random.Generator
) -> tuple[torch.Tensor, int, list[str]]:
    """`read(paths[index])`, or of random others in place of a bad one -> (frames, its index, what was skipped and why).

    Raises:
        UserError: `MAX_TRIES` in a row are bad.
    """
    skipped: list[str] = []
    while len(skipped) < MAX_TRIES:
        try:
            return read(paths[index]), index, skipped
        except BadClip as error:
            skipped.append(f"{paths[index]}: {error}")
            index = int(rng.integers(len(paths)))
    raise UserError(f"none of {MAX_TRIES} files drawn in a row can be used: {summary(skipped)}")


def summary(skipped: Sequence[str], shown: int = 10) -> str:
    """The skipped files in one line, each once."""
    names = list(dict.fromkeys(skipped))
    return "; ".join(names[:shown]) + (f"; and {len(names) - shown} more" if len(names) > shown else "")


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Clips as training items; `dataset[epoch, index]` (or `dataset[index]`, epoch 0) always gives the same item.

    An item is dict(video (F, 3, S, S) float in [-1, 1], label int (0 without classes), name str: the file or folder,
    skipped list[str]: the unusable clips in whose place this one was drawn, each with its reason).
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        read: Read,
        num_frames: int,
        frame_interval: int,
        image_size: int,
        flip: bool,
        seed: int,
    ):
        self.paths, self.labels, self.read = paths, labels, read
        self.num_frames, self.frame_interval, self.image_size = num_frames, frame_interval, image_size
        self.flip, self.seed = flip, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng((self.seed, epoch, index))
        video, index, skipped = self.draw(index, self.num_frames, self.frame_interval, rng)
        return dict(video=video, label=self.labels[index], name=str(self.paths[index]), skipped=skipped)

    def draw(
        self, index: int, num_frames: int, frame_interval: int, rng: np.random.Generator
    ) -> tuple[torch.Tensor, int, list[str]]:
        """A random cut of clip `index` -> ((num_frames, 3, S, S), the index of the clip used, what was skipped)."""

        def read(path: Path) -> torch.Tensor:
            return self.read(path, lambda total: temporal_crop(total, num_frames, frame_interval, rng))

        frames, index, skipped = read_usable(self.paths, index, read, rng)
        flip = self.flip and rng.random() < 0.5
        return fit(frames, self.image_size, flip), index, skipped
