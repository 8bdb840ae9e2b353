"""The training sets, and the names of their classes.

This package has the name of Hugging Face's `datasets`, so it is never installed into site-packages.
"""

import difflib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unicodedata import normalize

from torch.utils.data import Dataset

from configs import UserError, choice, require_path
from datasets.clips import ClipDataset, Prepare, check_frame_rate, class_folders, summary, survey
from datasets.joint import WithStills, check_frame_list, read_frame_list
from datasets.latents import SUFFIX, check_latents, pick_variant, read_latents
from datasets.loader import collate, load_batches
from datasets.readers import IMAGE_SUFFIXES, READERS, VIDEO_SUFFIXES, read_frame_folder, read_video, reader_used
from datasets.sampler import ClipSampler
from datasets.transforms import square

__all__ = [
    "SOURCES",
    "ClipSampler",
    "class_changes",
    "class_index",
    "class_names",
    "collate",
    "get_dataset",
    "load_batches",
]

MAX_LISTED = 120  # class folders that an error lists

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The layout and the augmentation of a data set."""

    files: str  # a clip's source: "video": a video file; "frames": a folder of images; "latents": a file of latents
    has_classes: bool  # whether data_path may hold a folder for each class
    flip: bool  # whether half of the clips are mirrored


SOURCES = {
    "ucf101": Source(files="video", has_classes=True, flip=True),
    "ffs": Source(files="video", has_classes=False, flip=True),
    "taichi": Source(files="frames", has_classes=False, flip=True),
    "sky": Source(files="frames", has_classes=False, flip=False),
    "video_folder": Source(files="video", has_classes=True, flip=False),  # user data, which may not allow mirroring
    "frame_folder": Source(files="frames", has_classes=True, flip=False),
}
SOURCES |= {f"{name}_img": SOURCES[name] for name in ("ucf101", "ffs", "taichi", "sky")}  # with stills


def get_dataset(args: Any, prepare: Prepare = square, say: Callable[[str], object] = logger.warning) -> Dataset:
    """Returns the training set that `args` describes: a ClipDataset, or WithStills if `use_image_num` > 0.

    Pixels are uint8, a quarter of the traffic of fp32 between processes and to the GPU; `LatentCodec` scales them.

    Args:
        args: has configs.DataOptions, num_frames, image_size, num_classes and global_seed.
        prepare: turns the frames read into those of an item.
        say: called with a line for each thing about the folders that a user should know.

    Raises:
        UserError: the dataset or the reader is unknown, data_path holds no clips, or num_classes is not the number of
            class folders.
    """
    source = SOURCES[choice("dataset", args.dataset, sorted(SOURCES))]
    choice("video_reader", args.video_reader, READERS)
    if args.dataset.endswith("_img") and not args.use_image_num:
        raise UserError(f"dataset: {args.dataset} needs use_image_num > 0; for clips alone use {args.dataset[:-4]}")
    images = args.dataset if source.files == "frames" else None
    check_frame_rate(args.fps, args.frame_interval, images, ("fps", "frame_interval"))
    if args.latents_path:
        check_latents(args)
        source = replace(source, files="latents")
    key = "latents_path" if args.latents_path else "data_path"
    root = require_path(args, key, folder=True)
    paths, labels, classes, num_unreadable = _labelled_clips(source, root, key, args, say)
    flip = source.flip if args.horizontal_flip is None else args.horizontal_flip
    read = {
        "video": partial(read_video, reader=args.video_reader, fps=args.fps, index_path=args.video_index_path),
        "frames": read_frame_folder,
        "latents": partial(read_latents, num_variants=1 + flip),
    }[source.files]
    clips = ClipDataset(
        paths,
        labels,
        read,
        num_frames=args.num_frames,
        frame_interval=args.frame_interval,
        short_clips=args.short_clips,
        note=reader_used if source.files == "video" and args.video_reader == "decord" else None,
        image_size=args.image_size,
        flip=flip,
        seed=args.global_seed,
        prepare=pick_variant if args.latents_path else prepare,
        classes=classes,
        num_unreadable=num_unreadable,
    )
    if not args.use_image_num:
        return clips
    if not args.frame_data_txt:
        return WithStills(clips, args.use_image_num)
    images = require_path(args, "frame_data_path", folder=True) if args.frame_data_path else root
    stills, image_labels = read_frame_list(require_path(args, "frame_data_txt", folder=False), images, classes)
    check_frame_list(stills, args.max_bad_fraction, say)
    return WithStills(clips, args.use_image_num, stills, image_labels)


def _labelled_clips(
    source: Source, root: Path, key: str, args: Any, say: Callable[[str], object]
) -> tuple[list[Path], list[int], list[str] | None, int]:
    """Returns the paths and labels of the clips under `root` (option `key`), the classes, and the unreadable folders.

    A label is the position of the class folder in sorted order, or 0 without classes.
    """
    if args.num_classes is not None and not source.has_classes:
        raise UserError(f"dataset: {args.dataset} has no classes; leave num_classes empty, not {args.num_classes}")
    kind, suffixes = {
        "video": ("video files", VIDEO_SUFFIXES),
        "frames": ("folders of images", IMAGE_SUFFIXES),
        "latents": ("files of latents", {SUFFIX}),
    }[source.files]
    found = survey(root, suffixes)
    paths = [folder for folder, _ in found.folders] if source.files == "frames" else found.files
    if source.files == "latents":
        paths.sort()  # by path, not folder by folder: the order that runs from latents have always had
    notes, labels, classes = found.notes(), [0] * len(paths), None
    if not paths:
        raise UserError("; ".join([f"{key}: there are no {kind} under {root}", *notes]))
    if args.num_classes is not None:
        classes = class_folders(root)
        label_of = {name: label for label, name in enumerate(classes)}
        depth = len(root.parts)
        folder_of = ["".join(path.parts[depth : depth + 1]) for path in paths]
        clips = [(path, label_of[name]) for path, name in zip(paths, folder_of, strict=True) if name in label_of]
        if empty := sorted(label_of.keys() - set(folder_of)):
            notes.append(f"{root}: {len(empty)} class folders without {kind}: {', '.join(empty[:MAX_LISTED])}")
        if len(clips) < len(paths):
            notes.append(f"{root}: {len(paths) - len(clips)} {kind} outside the class folders are not used")
        if len(classes) != args.num_classes:
            listed = ", ".join(classes[:MAX_LISTED]) + ", ..." * (len(classes) > MAX_LISTED)
            counts = f"{key}: {root} has {len(classes)} class folders, but num_classes is {args.num_classes}"
            raise UserError("; ".join([f"{counts}: {listed or 'none'}", *notes]))
        paths, labels = [path for path, _ in clips], [label for _, label in clips]
    for note in notes:
        say(note)
    return paths, labels, classes, len(found.unreadable)


def class_names(args: Any) -> list[str] | None:
    """Returns the class names by label: class_names, data_path's class folders or UCF101's list; None if none fits."""
    if getattr(args, "class_names", None):
        if len(args.class_names) != args.num_classes:
            raise UserError(f"class_names: {len(args.class_names)} names, but num_classes is {args.num_classes}")
        return list(args.class_names)
    if args.num_classes and args.data_path and Path(args.data_path).is_dir():
        names = class_folders(Path(args.data_path))
        if len(names) == args.num_classes:
            return names
    if (args.dataset or "").startswith("ucf101") and args.num_classes == 101:
        return Path(__file__).with_name("ucf101_classes.txt").read_text().split()
    return None


def class_changes(before: Sequence[str], now: Sequence[str]) -> str:
    """Returns how the classes of two lists differ, label by label; empty if they are the same."""
    before, now = ([normalize("NFC", name) for name in names] for names in (before, now))  # macOS writes NFD
    if before == now:
        return ""
    gone, new = ([name for name in one if name not in other] for one, other in ((before, now), (now, before)))
    changes = [f"{names} {what}" for what, names in (("gone", ", ".join(gone)), ("new", ", ".join(new))) if names]
    pairs = enumerate(zip_longest(before, now, fillvalue="none"))
    return summary([*changes, *(f"label {i} was {old}, is {ours}" for i, (old, ours) in pairs if old != ours)])


def class_index(wanted: str | int, names: Sequence[str] | None, num_classes: int) -> int:
    """Returns the label of a class that is given by its index or its name (upper or lower case).

    Raises:
        UserError: there is no such class; the error suggests the nearest names.
    """
    wanted = str(wanted)
    if wanted.isdecimal():
        if int(wanted) < num_classes:
            return int(wanted)
        raise UserError(f"class {wanted}: indices go from 0 to {num_classes - 1}")
    if names is None:
        raise UserError(f"class {wanted!r}: these classes have no names; give an index from 0 to {num_classes - 1}")
    folded = [name.casefold() for name in names]
    if wanted.casefold() in folded:
        return folded.index(wanted.casefold())
    near = difflib.get_close_matches(wanted.casefold(), folded, n=3, cutoff=0.4)
    hint = (
        f"did you mean {' or '.join(names[folded.index(name)] for name in near)}?"
        if near
        else f"valid: {', '.join(names)}"
    )
    raise UserError(f"class {wanted!r} is unknown; {hint}")
