"""Clips from video files and from folders of frames: finding them, choosing their frames, the data set.

A source of clips is a list of paths and a reader (datasets/readers.py).
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from configs.errors import UserError
from datasets.readers import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadClip, Read, has_suffix
from datasets.transforms import square

MAX_TRIES = 100  # clips drawn in place of unusable ones before a read gives up

Prepare = Callable[[torch.Tensor, int, bool], torch.Tensor]  # frames as read, image_size, flip -> what the item holds


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
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk enters those that stay
        names = [name for name in names if has_suffix(name, suffixes)]
        if names:
            found.append((Path(folder), names))
    return sorted(found)


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

    An item is dict(video (F, 3, S, S) uint8, label int (0 without classes), name str: the file or folder,
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
        prepare: Prepare = square,
    ):
        self.paths, self.labels, self.read, self.prepare = paths, labels, read, prepare
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
        return self.prepare(frames, self.image_size, flip), index, skipped
