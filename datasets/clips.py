"""Clips from video files, frame folders or latents: finding the files, choosing frames, and the data set.

A data set is a list of paths, one per video, and a reader (datasets/readers.py) that returns chosen frames of a path.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from configs.errors import UserError
from datasets.readers import IMAGE_SUFFIXES, VIDEO_SUFFIXES, BadClip, Read, has_suffix
from datasets.transforms import square

LEFT_BY_TOOLS = {  # in lower case: folders that file systems, archivers, file servers and Python leave beside data
    "__macosx", "lost+found", "found.000", "$recycle.bin", "system volume information", "temporary items",
    "network trash folder", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot",
    "__pycache__",
}  # fmt: skip
MAX_TRIES = 100  # unusable files in a row before `read_usable` gives up
MAX_NAMED = 10  # unusable files that a message names

logger = logging.getLogger(__name__)

Prepare = Callable[[torch.Tensor, int, bool], torch.Tensor]  # (frames read, image_size, flip) -> an item's frames


class ShortClip(BadClip):
    """A video with too few frames for a clip."""


# ---------------------------------------------------------------------------------------------------------------------
# Finding clips
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Survey:
    """The files of a kind under a folder, and what the search could not read or did not enter."""

    root: Path
    folders: list[tuple[Path, list[str]]]  # the folders that hold such files and the files' names, sorted
    unreadable: list[str]  # folders, links and special files that cannot be read, with the reasons
    ignored: list[str]  # hidden folders, folders of tools, links to folders that are found without them

    @property
    def files(self) -> list[Path]:
        """The files, sorted folder by folder."""
        return [folder / name for folder, names in self.folders for name in names]

    def notes(self) -> list[str]:
        """Returns what a user should know about the search, a line each."""
        kinds = (("cannot be read", self.unreadable), ("ignored", self.ignored))
        return [f"{self.root}: {len(paths)} {kind}: {summary(paths)}" for kind, paths in kinds if paths]


def survey(root: Path, suffixes: set[str]) -> Survey:
    """Searches `root`, at any depth, for files with one of `suffixes`.

    Each real folder is entered once: links are followed last, and only to folders that are not found without them.
    """
    found = Survey(root, [], [], [])
    entered: set[str] = set()
    real_root = os.path.realpath(root)
    folders, links = deque([(root, real_root)]), deque()  # (path, real path)
    while folders or links:
        folder, real = (folders or links).popleft()
        if real in entered or (folder != root and _contains(real, real_root)):
            found.ignored.append(f"{folder} (a link to {real})")
            continue
        entered.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            found.unreadable.append(f"{folder} ({error.strerror})")
            continue
        names = []
        for entry in entries:
            path = Path(entry.path)
            try:
                if entry.is_dir():
                    if _is_left_by_tools(entry.name):
                        found.ignored.append(str(path))
                    elif entry.is_symlink():
                        links.append((path, os.path.realpath(path)))
                    else:
                        folders.append((path, str(Path(real, entry.name))))
                elif has_suffix(entry.name, suffixes) and (entry.is_file() or not path.exists()):
                    names.append(entry.name)  # also a broken link, which is unusable when drawn
                elif not entry.name.startswith(".") and not entry.is_file():
                    found.unreadable.append(f"{path} ({'not a file' if path.exists() else 'a link to nothing'})")
            except OSError as error:
                found.unreadable.append(f"{path} ({error.strerror})")
        if names:
            found.folders.append((folder, names))
    found.folders.sort()
    return found


def class_folders(root: Path) -> list[str]:
    """Returns the sorted names of the class folders in `root`; a class's label is its index in this list.

    Hidden folders, folders of tools, and links to a folder in `root` or above it are not classes.
    """
    real_root = os.path.realpath(root)

    def is_class(entry: os.DirEntry) -> bool:
        if _is_left_by_tools(entry.name) or not entry.is_symlink():
            return not _is_left_by_tools(entry.name) and entry.is_dir()
        real = os.path.realpath(entry.path)
        if _contains(real_root, real) and not any(map(_is_left_by_tools, Path(real).relative_to(real_root).parts)):
            return False  # `survey` finds that folder without the link
        return os.path.isdir(real) and not _contains(real, real_root)  # noqa: PTH112 (Path.is_dir can raise)

    return sorted(entry.name for entry in os.scandir(root) if is_class(entry))


def find_videos(root: Path) -> list[Path]:
    """Returns every video file under `root`, at any depth, sorted; logs what cannot be read and what is ignored."""
    return _said(survey(root, VIDEO_SUFFIXES)).files


def find_frame_folders(root: Path) -> list[Path]:
    """Returns every folder under `root` (`root` included) that holds images, sorted; each folder is one video."""
    return [folder for folder, _ in _said(survey(root, IMAGE_SUFFIXES)).folders]


def _said(found: Survey) -> Survey:
    for note in found.notes():
        logger.warning(note)
    return found


def _is_left_by_tools(name: str) -> bool:
    """Returns whether a folder of this name is hidden, or made by a file system, an archiver or a tool."""
    return name.startswith(".") or name.casefold() in LEFT_BY_TOOLS


def _contains(folder: str, path: str) -> bool:
    """Returns whether `path` is `folder` or lies below it; both are real paths."""
    return Path(path).is_relative_to(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing frames
# ---------------------------------------------------------------------------------------------------------------------


def temporal_crop(
    total: int, num_frames: int, frame_interval: int, rng: np.random.Generator, short_clips: str = "spread"
) -> Sequence[int]:
    """Returns the indices of a clip's frames in a video of `total` frames.

    They are `frame_interval` apart and start at random. In a video too short for that, they are spread evenly from the
    first frame to the last.

    Raises:
        ShortClip: the video has fewer than `num_frames` frames, or is too short and `short_clips` is skip.
    """
    starts = total - num_frames * frame_interval + 1
    start = int(rng.integers(starts)) if starts > 0 else 0
    return crop_at(start, total, num_frames, frame_interval, short_clips)


def crop_at(start: int, total: int, num_frames: int, frame_interval: int, short_clips: str = "spread") -> Sequence[int]:
    """Returns the indices of the frames of `temporal_crop` from `start` on; raises ShortClip as it does."""
    span = num_frames * frame_interval
    if total < (needed := span if short_clips == "skip" else num_frames):
        raise ShortClip(f"{total} frames, {needed} needed")
    if total >= span:
        return list(range(start, start + span, frame_interval))
    return [i * (total - 1) // max(num_frames - 1, 1) for i in range(num_frames)]


def check_frame_rate(fps: float | None, interval: int, images: str | None, keys: Sequence[str]) -> None:
    """Raises UserError if frames by time (`fps`; None: by number) contradict the interval or the files.

    Args:
        images: what the clips are, if they are folders of images.
        keys: the names of the options `fps` and `interval`.
    """
    if fps and interval > 1:
        raise UserError(
            f"{keys[0]}: {fps:g} chooses frames by time, {keys[1]}: {interval} by number; "
            f"set {keys[1]}=1, or leave {keys[0]} empty"
        )
    if fps and images:
        raise UserError(f"{keys[0]}: the frames of {images} are images without times; use {keys[1]}")


def read_usable(
    paths: Sequence[Path], index: int, read: Callable[[Path], torch.Tensor], rng: np.random.Generator
) -> tuple[torch.Tensor, int, list[BadClip]]:
    """Reads `paths[index]`, or a random other path in place of an unusable one.

    Returns:
        The frames, the index of the path they come from, and the error (path and reason) of each unusable path.

    Raises:
        UserError: `MAX_TRIES` paths in a row are unusable.
    """
    skipped: list[BadClip] = []
    while len(skipped) < MAX_TRIES:
        try:
            return read(paths[index]), index, skipped
        except BadClip as error:
            skipped.append(type(error)(f"{paths[index]}: {error}"))
            index = int(rng.integers(len(paths)))
    raise UserError(f"none of {MAX_TRIES} files drawn in a row can be used: {summary(map(str, skipped))}")


def summary(skipped: Iterable[str]) -> str:
    """Returns the first skipped files in one line, each of them once, and the number of the others."""
    names = list(dict.fromkeys(skipped))
    return "; ".join(names[:MAX_NAMED]) + (f"; and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Clips as training items. `dataset[epoch, index]` always returns the same item; `dataset[index]` is epoch 0.

    `classes` are the names of the labels, None without classes; `num_unreadable` is the number of folders whose clips
    are missing because they cannot be read.

    An item is a dict:
        video: (F, 3, S, S) uint8, or the moments of latents.
        label: int; 0 without classes.
        name: the path of the video.
        skipped: list of str, the unusable videos that this one replaces, with the reasons.
        notes: list of (note, video), what `load_batches` shall count and name.
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
        classes: Sequence[str] | None = None,
        num_unreadable: int = 0,
        short_clips: str = "spread",
        note: Callable[[Path], str] | None = None,
    ):
        self.paths, self.labels, self.read, self.prepare = paths, labels, read, prepare
        self.num_frames, self.frame_interval, self.image_size = num_frames, frame_interval, image_size
        self.flip, self.seed, self.classes, self.num_unreadable = flip, seed, classes, num_unreadable
        self.short_clips, self.note = short_clips, note

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng((self.seed, epoch, index))
        video, index, skipped, total = self.draw(index, self.num_frames, self.frame_interval, rng)
        path, span = self.paths[index], self.num_frames * self.frame_interval
        notes = [(self.note(path), str(path))] if self.note else []
        short = f"shorter than num_frames x frame_interval = {span} frames and"
        if total < span:
            notes.append((f"{short} used whole", str(path)))
        left_out = [each for each in skipped if self.short_clips == "skip" and isinstance(each, ShortClip)]
        notes += [(f"{short} left out", str(each)) for each in left_out]
        skipped = [str(each) for each in skipped if each not in left_out]
        return dict(video=video, label=self.labels[index], name=str(path), skipped=skipped, notes=notes)

    def draw(
        self, index: int, num_frames: int, frame_interval: int, rng: np.random.Generator
    ) -> tuple[torch.Tensor, int, list[BadClip], int]:
        """Returns `num_frames` frames of video `index` from a random start, or of another video if it is unusable.

        Returns:
            The frames (num_frames, 3, S, S), the index of the video used, the unusable videos, and the number of frames
            of the video used.
        """
        total = 0

        def choose(number: int) -> Sequence[int]:
            nonlocal total
            total = number
            return temporal_crop(total, num_frames, frame_interval, rng, self.short_clips)

        frames, index, skipped = read_usable(self.paths, index, lambda path: self.read(path, choose), rng)
        flip = self.flip and rng.random() < 0.5
        return self.prepare(frames, self.image_size, flip), index, skipped, total
