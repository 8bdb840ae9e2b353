"""Clips followed by still images, for joint image-video training."""

import codecs
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from configs import UserError
from datasets.clips import ClipDataset, read_usable, summary
from datasets.readers import BadClip, read_image

BYTE_ORDER_MARKS = {  # at the start of a text file -> its encoding
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # starts with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class WithStills(Dataset):
    """The items of `clips`, with K = `num_stills` random images after the frames of each.

    The images come from a list (`paths` and `labels`, see `read_frame_list`), or else are frames of random clips.
    An item is that of ClipDataset with video (F+K, 3, S, S), and has image_labels (K,) int64 as well.
    """

    def __init__(
        self,
        clips: ClipDataset,
        num_stills: int,
        paths: Sequence[Path] | None = None,
        labels: Sequence[int] | None = None,
    ):
        self.clips, self.num_stills, self.paths, self.labels = clips, num_stills, paths, labels
        self.classes, self.num_unreadable = clips.classes, clips.num_unreadable

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        item = self.clips[key]
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng((self.clips.seed, epoch, index, 1))  # 1: not the stream of the clip
        stills, labels, skipped = zip(*(self._draw(rng) for _ in range(self.num_stills)), strict=True)
        return item | {
            "video": torch.cat([item["video"], *stills]),  # (F+K, 3, S, S)
            "image_labels": torch.tensor(labels),
            "skipped": item["skipped"] + [str(error) for errors in skipped for error in errors],
        }

    def _draw(self, rng: np.random.Generator) -> tuple[torch.Tensor, int, list[BadClip]]:
        """Returns a random image (1, 3, S, S), its label, and the errors of unusable files."""
        if self.paths is None:
            still, index, skipped, _ = self.clips.draw(int(rng.integers(len(self.clips))), 1, 1, rng)
            return still, self.clips.labels[index], skipped
        image, index, skipped = read_usable(self.paths, int(rng.integers(len(self.paths))), read_image, rng)
        flip = self.clips.flip and rng.random() < 0.5
        return self.clips.prepare(image[None], self.clips.image_size, flip), self.labels[index], skipped


def read_frame_list(path: Path, root: Path, classes: Sequence[str] | None) -> tuple[list[Path], list[int]]:
    """Returns the images in a list file, a path relative to `root` per line, and their labels (0 without classes).

    The first part of a line that is the name of a class (upper or lower case) gives the label: the folder in
    `Archery/v_Archery_g01_c01/000000.jpg`, the second word in `v_HandStandPushups_g01_c01/000000.jpg`.

    The list is UTF-8, or UTF-16 or UTF-32 with a byte order mark. Bytes of another encoding stay as they are, as in
    names of files.

    Raises:
        UserError: the list is empty, or a line contains no class.
    """
    content = path.read_bytes()
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    lines = content.decode(encoding, "surrogateescape" if "utf-8" in encoding else "replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"frame_data_txt: {path} names no images")
    if classes is None:
        return [root / line for line in lines], [0] * len(lines)
    label_of = {name.casefold(): label for label, name in enumerate(classes)}
    labels = []
    for line in lines:
        pieces = [*line.split("/"), *re.split("[/_]", line)]
        label = next((label_of[piece.casefold()] for piece in pieces if piece.casefold() in label_of), None)
        if label is None:
            raise UserError(f"frame_data_txt: {path}: no class of data_path is in the line {line[:200]!r}")
        labels.append(label)
    return [root / line for line in lines], labels


def check_frame_list(paths: Sequence[Path], max_bad_fraction: float, say: Callable[[str], object]) -> None:
    """Says which of the images of a list are missing; raises UserError if they are more than `max_bad_fraction`."""
    present: dict[Path, set[str]] = {}  # a listing of each folder takes less time than a look at each file
    for folder in {path.parent for path in paths}:
        try:
            present[folder] = {entry.name for entry in os.scandir(folder)}
        except OSError:
            present[folder] = set()
    if not (missing := [str(path) for path in paths if path.name not in present[path.parent]]):
        return
    message = f"frame_data_txt: {len(missing)} of {len(paths)} images cannot be found: {summary(missing)}"
    if len(missing) > max_bad_fraction * len(paths):
        raise UserError(f"{message}; max_bad_fraction={max_bad_fraction}, lines start from frame_data_path")
    say(message)
