"""The training sets, and the names of their classes.

This package has the name of Hugging Face's `datasets`, so it is never installed into site-packages.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from configs import UserError, choice, require_path
from datasets.clips import ClipDataset, Prepare, class_folders, find_frame_folders, find_videos
from datasets.joint import WithStills, read_frame_list
from datasets.latents import check_latents, find_latents, pick_variant, read_latents
from datasets.loader import collate, load_batches
from datasets.readers import READERS, read_frame_folder, read_video
from datasets.sampler import ClipSampler
from datasets.transforms import square

__all__ = ["SOURCES", "ClipSampler", "class_index", "class_names", "collate", "get_dataset", "load_batches"]


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


def get_dataset(args: Any, prepare: Prepare = square) -> Dataset:
    """Returns the training set that `args` describes: a ClipDataset, or WithStills if `use_image_num` > 0.

    Pixels are uint8, a quarter of the traffic of fp32 between processes and to the GPU; `LatentCodec` scales them.

    Args:
        args: has configs.DataOptions, num_frames, image_size, num_classes and global_seed.
        prepare: turns the frames read into those of an item.

    Raises:
        UserError: the dataset or the reader is unknown, data_path holds no clips, or num_classes is not the number of
            class folders.
    """
    source = SOURCES[choice("dataset", args.dataset, sorted(SOURCES))]
    choice("video_reader", args.video_reader, READERS)
    if args.dataset.endswith("_img") and not args.use_image_num:
        raise UserError(f"dataset: {args.dataset} needs use_image_num > 0; for clips alone use {args.dataset[:-4]}")
    if args.latents_path:
        check_latents(args)
        source, root = replace(source, files="latents"), Path(args.latents_path)
    else:
        root = require_path(args, "data_path")
    paths, labels = _labelled_clips(source, root, args)
    flip = source.flip if args.horizontal_flip is None else args.horizontal_flip
    read = {
        "video": partial(read_video, reader=args.video_reader),
        "frames": read_frame_folder,
        "latents": read_latents,
    }[source.files]
    clips = ClipDataset(
        paths,
        labels,
        read,
        num_frames=args.num_frames,
        frame_interval=args.frame_interval,
        image_size=args.image_size,
        flip=flip,
        seed=args.global_seed,
        prepare=pick_variant if args.latents_path else prepare,
    )
    if not args.use_image_num:
        return clips
    if not args.frame_data_txt:
        return WithStills(clips, args.use_image_num)
    images = require_path(args, "frame_data_path") if args.frame_data_path else root
    classes = None if args.num_classes is None else class_folders(root)
    return WithStills(
        clips, args.use_image_num, *read_frame_list(require_path(args, "frame_data_txt"), images, classes)
    )


def _labelled_clips(source: Source, root: Path, args: Any) -> tuple[list[Path], list[int]]:
    """Returns the path and the label of every clip under `root`.

    A label is the position of the class folder in sorted order, or 0 without classes.
    """
    find = {"video": find_videos, "frames": find_frame_folders, "latents": find_latents}[source.files]
    if args.num_classes is None:
        paths = find(root)
        labels = [0] * len(paths)
    elif source.has_classes:
        classes = class_folders(root)
        if len(classes) != args.num_classes:
            raise UserError(
                f"data_path: {root} has {len(classes)} class folders, but num_classes is {args.num_classes}"
            )
        labelled = [(path, label) for label, name in enumerate(classes) for path in find(root / name)]
        paths, labels = [path for path, _ in labelled], [label for _, label in labelled]
    else:
        raise UserError(f"dataset: {args.dataset} has no classes; leave num_classes empty, not {args.num_classes}")
    if not paths:
        kind = {"video": "video files", "frames": "folders of images", "latents": "files of latents"}[source.files]
        raise UserError(f"{'latents_path' if args.latents_path else 'data_path'}: there are no {kind} under {root}")
    return paths, labels


def class_names(args: Any) -> list[str] | None:
    """Returns the class names by label, from data_path's class folders or UCF101's list; None if neither fits."""
    if args.num_classes and args.data_path and Path(args.data_path).is_dir():
        names = class_folders(Path(args.data_path))
        if len(names) == args.num_classes:
            return names
    if (args.dataset or "").startswith("ucf101") and args.num_classes == 101:
        return Path(__file__).with_name("ucf101_classes.txt").read_text().split()
    return None


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
