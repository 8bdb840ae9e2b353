"""Clips from video files, frame folders or latents: finding the files, choosing frames, and the data set.

A data set is a list of paths, one per video, and a reader (datasets/readers.py) that returns chosen frames of a path.
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

MAX_TRIES = 100  # unusable files in a row before `read_usable` gives up
MAX_NAMED = 10  # unusable files that a message names

Prepare = Callable[[torch.Tensor, int, bool], torch.Tensor]  # (frames read, image_size, flip) -> an item's frames


# ---------------------------------------------------------------------------------------------------------------------
# Finding clips
# ---------------------------------------------------------------------------------------------------------------------


def class_folders(root: Path) -> list[str]:
    """Returns the sorted names of the folders in `root`; a class's label is its index in this list."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_videos(root: Path) -> list[Path]:
    """Returns every video file under `root`, at any depth, sorted."""
    return [folder / name for folder, names in _walk(root, VIDEO_SUFFIXES) for name in sorted(names)]


def find_frame_folders(root: Path) -> list[Path]:
    """Returns every folder under `root` (`root` included) that holds images, sorted; each folder is one video."""
    return [folder for folder, _ in _walk(root, IMAGE_SUFFIXES)]


def _walk(root: Path, suffixes: set[str]) -> list[tuple[Path, list[str]]]:
    """Returns the folders under `root` that hold files with one of `suffixes`, sorted, and the names of the files."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # os.walk enters those that remain
        names = [name for name in names if has_suffix(name, suffixes)]
        if names:
            found.append((Path(folder), names))
    return sorted(found)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing frames
# ---------------------------------------------------------------------------------------------------------------------


def temporal_crop(total: int, num_frames: int, frame_interval: int, rng: np.random.Generator) -> list[int]:
    """Returns the indices of a clip's frames in a video of `total` frames.

    They are `frame_interval` apart and start at random. In a video too short for that, they are spread evenly from the
    first frame to the last.

    Raises:
        BadClip: the video has fewer than `num_frames` frames.
    """
    if total < num_frames:
        raise BadClip(f"{total} frames, {num_frames} needed")
    span = num_frames * frame_interval
    if total >= span:
        begin = int(rng.integers(total - span + 1))
        return list(range(begin, begin + span, frame_interval))
    return [i * (total - 1) // max(num_frames - 1, 1) for i in range(num_frames)]


def read_usable(
    paths: Sequence[Path], index: int, read: Callable[[Path], torch.Tensor], rng: np.random.Generator
) -> tuple[torch.Tensor, int, list[str]]:
    """Reads `paths[index]`, or a random other path in place of an unusable one.

    Returns:
        The frames, the index of the path they come from, and a line (path and reason) for each unusable path.

    Raises:
        UserError: `MAX_TRIES` paths in a row are unusable.
    """
    skipped: list[str] = []
    while len(skipped) < MAX_TRIES:
        try:
            return read(paths[index]), index, skipped
        except BadClip as error:
            skipped.append(f"{paths[index]}: {error}")
            index = int(rng.integers(len(paths)))
    raise UserError(f"none of {MAX_TRIES} files drawn in a row can be used: {summary(skipped)}")


def summary(skipped: Sequence[str]) -> str:
    """Returns the first skipped files in one line, each of them once, and the number of the others."""
    names = list(dict.fromkeys(skipped))
    return "; ".join(names[:MAX_NAMED]) + (f"; and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Clips as training items. `dataset[epoch, index]` always returns the same item; `dataset[index]` is epoch 0.

    An item is a dict:
        video: (F, 3, S, S) uint8, or the moments of latents.
        label: int; 0 without classes.
        name: the path of the video.
        skipped: list of str, the unusable videos that this one replaces, with the reasons.
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
        """Returns `num_frames` frames of video `index` from a random start, or of another video if it is unusable.

        Returns:
            The frames (num_frames, 3, S, S), the index of the video used, and the unusable videos.
        """

        def read(path: Path) -> torch.Tensor:
            return self.read(path, lambda total: temporal_crop(total, num_frames, frame_interval, rng))

        frames, index, skipped = read_usable(self.paths, index, read, rng)
        flip = self.flip and rng.random() < 0.5
        return self.prepare(frames, self.image_size, flip), index, skipped
