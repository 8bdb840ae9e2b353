"""Turn videos of any format into folders of frames: a data set of frames, or the stills of joint training.

    python tools/convert_videos_to_frames.py data_path=/data/videos frame_data_path=/data/frames image_size=256
    python train.py --config ... dataset=frame_folder data_path=/data/frames             # class folders are kept
    bash train_scripts/taichi_train.sh data_path=/data/frames                            # or sky: without classes

Stills, and the list of them that training reads as frame_data_txt (without data_path, nothing is converted):

    python tools/convert_videos_to_frames.py data_path=/data/UCF101/videos frame_data_path=/data/UCF101/frames \\
        stride=5 frame_data_txt=/data/UCF101/frames.txt
    python tools/convert_videos_to_frames.py frame_data_path=... frame_data_txt=... shuffle_seed=0    # in random order
    bash train_scripts/ucf101_train.sh data_path=/data/UCF101/videos \\
        frame_data_path=/data/UCF101/frames frame_data_txt=/data/UCF101/frames.txt

`A/b.avi` becomes the folder `A/b` of 000000.jpg, 000001.jpg, ..., which lies in `{frame_data_path}.partial` until it is
complete. The same command again converts what is missing (one run at a time). A process holds one frame in memory.
A line of the list is an image under frame_data_path, relative to it: `A/b/000000.jpg`.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, cli, load_config, option, require_path


@dataclass(kw_only=True)
class FrameOptions:
    """The conversion, and the list; paths have their names in training"""

    data_path: str | None = option(None, "the videos, at any depth; empty: only the list is written", path=True)
    frame_data_path: str | None = option(None, "the folder of the frames", path=True)
    frame_data_txt: str | None = option(None, "the list to write of all images there; empty: none", path=True)
    shuffle_seed: int | None = option(None, "the list in the random order of this seed; empty: sorted", least=0)
    image_size: int | None = option(
        None, "short edge resized to this, a square cut from the centre; empty: as in the video", least=1
    )
    fps: float | None = option(None, "frames of a second; empty: as in the video", above=0)
    stride: int = option(1, "of those, every stride-th", least=1)
    frame_format: str = option("jpg", "format of a frame; png is exact", choices=("jpg", "png"))
    quality: int = option(95, "of jpg", least=1, most=100)
    num_workers: int = option(os.cpu_count, "processes that convert; 0: this one", least=0)
    max_bad_fraction: float = option(
        0.1, "an error at the end if more of the videos than this cannot be converted", least=0, most=1
    )


parser = cli.Parser(__doc__, FrameOptions)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import av
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs.files import atomic_path, check_record, write_json
from datasets.clips import find_videos, summary, survey
from datasets.readers import IMAGE_SUFFIXES, BadClip, ToPixels, natural_order, pixel_aspect
from datasets.transforms import square
from datasets.video_index import decode_in_order, find_index

RECORD = "frames.json"  # in frame_data_path: the options that its frames were made with
RECORDED = ("image_size", "fps", "stride", "frame_format", "quality")


def find_folders(cfg: FrameOptions) -> dict[Path, Path]:
    """The folder of frames to write for each video -> the video.

    Raises:
        UserError: there are no videos, or the frames of two of them would mix.
    """
    source, videos = require_path(cfg, "data_path", folder=True), {}
    for video in find_videos(source):  # a.avi comes before a/b.avi
        folder = Path(cfg.frame_data_path) / video.relative_to(source).with_suffix("")
        if taken := videos.keys() & {folder, *folder.parents}:
            raise UserError(f"data_path: frames of {videos[taken.pop()]} and {video} would mix; rename one of the two")
        videos[folder] = video
    if not videos:
        raise UserError(f"data_path: there are no video files under {source}")
    return videos


def convert_all(videos: dict[Path, Path], cfg: FrameOptions) -> None:
    """Converts those of `videos` (the folder to write -> the file) whose folder is missing.

    Raises:
        UserError: frame_data_path was made with other options, or too many videos cannot be converted.
    """
    record, settings = Path(cfg.frame_data_path, RECORD), {key: getattr(cfg, key) for key in RECORDED}
    if not check_record(record, settings, "frame_data_path"):
        write_json(record, settings)
    staging = Path(f"{cfg.frame_data_path}.partial")  # not in frame_data_path, where loaders look
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left
    jobs = [(video, folder, staging, cfg) for folder, video in videos.items() if not folder.exists()]
    # A loader is a pool of processes, each side of which notices the other's end; collate_fn is what they do.
    loader = DataLoader(jobs, batch_size=None, collate_fn=convert, num_workers=cfg.num_workers, in_order=False)
    bad = []
    for failure in filter(None, tqdm(loader, unit="video")):
        tqdm.write(f"skipped {failure}")
        bad.append(failure)
    shutil.rmtree(staging, ignore_errors=True)
    print(f"{len(jobs) - len(bad)} videos converted, {len(videos) - len(jobs)} before, {len(bad)} skipped")
    if len(bad) > cfg.max_bad_fraction * len(videos):
        raise UserError(f"{len(bad)} of {len(videos)} failed, max_bad_fraction={cfg.max_bad_fraction}: {summary(bad)}")


def convert(job: tuple[Path, Path, Path, FrameOptions]) -> str | None:
    """Writes all chosen frames of a video, or none; returns None, or the video and why it failed."""
    video, folder, staging, cfg = job
    unfinished, written = staging / str(os.getpid()), 0
    try:
        unfinished.mkdir(parents=True)
        for image in chosen_frames(video, cfg):
            image.save(unfinished / f"{written:06d}.{cfg.frame_format}", quality=cfg.quality)
            written += 1
        if not written:
            raise ValueError("no frames")
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(folder)
    except (BadClip, av.FFmpegError, OSError, ValueError) as error:  # broken, no video, or a full disk
        return f"{video}: {type(error).__name__} ({getattr(error, 'strerror', None) or error})"
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def chosen_frames(video: Path, cfg: FrameOptions) -> Iterator[Image.Image]:
    """The frames of a video that fps and stride choose, in one pass over the file, where `read_video` seeks."""
    with av.open(str(video)) as container:
        index = find_index(container)
        to_pixels = ToPixels(pixel_aspect(container.streams[index.stream]))
    chosen = index.at_rate(cfg.fps)[:: cfg.stride]
    times = np.bincount(chosen, minlength=len(index))  # more than once where the video is slower than fps
    with av.open(str(video)) as container:
        count, size = 0, None
        for frame in decode_in_order(container, index.stream, skip_broken=index.clock == "count"):
            if times[count]:
                pixels = to_pixels(frame).copy()  # (H, W, 3)
                if pixels.shape != (size := size or pixels.shape):
                    raise BadClip("its frames differ in size")
                if cfg.image_size:
                    pixels = square(torch.from_numpy(pixels).permute(2, 0, 1), cfg.image_size, flip=False)
                    pixels = pixels.permute(1, 2, 0).numpy()
                for _ in range(times[count]):
                    yield Image.fromarray(pixels)
            count += 1
    if count < len(index):
        raise BadClip("frames are missing")


def list_frames(root: Path, shuffle_seed: int | None = None) -> list[str]:
    """Every image under `root`, relative to it: by folder and number, or in the random order of `shuffle_seed`.

    Raises:
        UserError: there are none.
    """
    found = survey(root, IMAGE_SUFFIXES)
    for note in found.notes():
        print(note)
    lines = [
        (folder / name).relative_to(root).as_posix()
        for folder, names in found.folders
        for name in sorted(names, key=natural_order)
    ]
    if not lines:
        raise UserError(f"frame_data_path: there are no images under {root}")
    if shuffle_seed is not None:
        lines = [lines[i] for i in np.random.default_rng(shuffle_seed).permutation(len(lines))]
    return lines


def main() -> None:
    args = parser.parse_args()
    cfg = load_config(FrameOptions, args.config, args.overrides)
    if not cfg.frame_data_path:
        raise UserError("frame_data_path is not set: give the folder of the frames as frame_data_path=PATH")
    videos = find_folders(cfg) if cfg.data_path or not cfg.frame_data_txt else {}
    if args.dry_run:
        lines = [f"{len(videos)} videos, {sum(not folder.exists() for folder in videos)} to convert"]
        return cli.dry_run(cfg, lines + [f"list of the frames: {cfg.frame_data_txt}"] * bool(cfg.frame_data_txt))

    if videos:
        convert_all(videos, cfg)
    if cfg.frame_data_txt:
        lines = list_frames(Path(cfg.frame_data_path), cfg.shuffle_seed)
        with atomic_path(cfg.frame_data_txt) as temporary:
            temporary.write_bytes(os.fsencode("\n".join(lines) + "\n"))  # names that are not UTF-8 as they are
        print(f"{cfg.frame_data_txt}: {len(lines)} images")


if __name__ == "__main__":
    cli.run(main)
