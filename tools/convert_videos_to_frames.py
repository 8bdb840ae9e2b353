"""Turn videos of any format into folders of frames: a data set of frames, or the stills of joint training.

    python tools/convert_videos_to_frames.py data_path=/data/videos frame_data_path=/data/frames image_size=256
    python train.py --config ... dataset=frame_folder data_path=/data/frames             # class folders are kept
    bash train_scripts/taichi_train.sh data_path=/data/frames                            # or sky: without classes

    python tools/convert_videos_to_frames.py data_path=/data/UCF101 frame_data_path=/data/stills stride=5
    python tools/make_frame_list.py frame_data_path=/data/stills frame_data_txt=/data/stills.txt   # and see its --help

`A/b.avi` becomes the folder `A/b` of 000000.jpg, 000001.jpg, ..., which lies in `{frame_data_path}.partial` until it is
complete. The same command again converts what is missing (one run at a time). A process holds one frame in memory.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, choice, load_config, path_option, require_path, to_yaml
from datasets.clips import find_videos, summary
from datasets.transforms import square
from tools.common import cli
from tools.common.records import write_json


@dataclass(kw_only=True)
class FrameOptions:
    """Options of the conversion."""

    data_path: str | None = path_option()  # the videos, at any depth
    frame_data_path: str | None = path_option()  # the folder to write
    image_size: int | None = None  # short edge resized to this, a square cut from the centre; None: as in the video
    fps: float | None = None  # frames of a second; None: as in the video
    stride: int = 1  # of those, every stride-th
    frame_format: str = "jpg"  # jpg | png (exact)
    quality: int = 95  # of jpg, 1 ... 100
    num_workers: int = field(default_factory=torch.get_num_threads)  # processes: by default, one for each core
    max_bad_fraction: float = 0.1  # an error at the end when more of the videos than this cannot be converted


def main() -> None:
    args = cli.Parser(__doc__, FrameOptions).parse_args()
    cfg = load_config(FrameOptions, args.config, args.overrides)
    choice("frame_format", cfg.frame_format, ["jpg", "png"])
    if min(cfg.image_size or 1, cfg.fps or 1, cfg.stride - 1) < 0:
        raise UserError(f"image_size, fps and stride are above 0, not {cfg.image_size}, {cfg.fps}, {cfg.stride}")
    if not cfg.frame_data_path:
        raise UserError("frame_data_path is not set: give the folder to write as frame_data_path=PATH")
    source, target, videos = require_path(cfg, "data_path"), Path(cfg.frame_data_path), {}
    for video in find_videos(source):  # a.avi comes before a/b.avi
        folder = target / video.relative_to(source).with_suffix("")
        if taken := videos.keys() & {folder, *folder.parents}:
            raise UserError(f"data_path: frames of {videos[taken.pop()]} and {video} would mix; rename one of the two")
        videos[folder] = video
    if not videos:
        raise UserError(f"data_path: there are no video files under {source}")
    if args.dry_run:
        print(f"{to_yaml(cfg)}{len(videos)} videos, {sum(not folder.exists() for folder in videos)} to convert")
    else:
        convert_all(videos, cfg)


def convert_all(videos: dict[Path, Path], cfg: FrameOptions) -> None:
    """Convert those of `videos` (the folder to write -> the file) whose folder is missing."""
    record = {key: getattr(cfg, key) for key in ("image_size", "fps", "stride", "frame_format", "quality")}
    made, staging = Path(cfg.frame_data_path, "frames.json"), Path(f"{cfg.frame_data_path}.partial")
    if made.is_file() and json.loads(made.read_text()) != record:
        raise UserError(f"frame_data_path: {made} names other options than now, {record}; give another folder")
    write_json(made, record)
    shutil.rmtree(staging, ignore_errors=True)  # what a killed run left; not in frame_data_path, where loaders look
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
    """Write all frames of a video, or none -> why that is; decodes in one pass, where clips.read_video seeks."""
    video, folder, staging, cfg = job
    unfinished, start, written = staging / str(os.getpid()), None, 0
    try:
        unfinished.mkdir(parents=True)
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            codec = stream.codec_context
            if codec is None:
                raise ValueError("FFmpeg does not know its codec")
            codec.thread_count = 1  # the processes are the parallelism
            even = codec.has_b_frames and container.format.name == "avi"  # whose times are those of decoding
            for i, frame in enumerate(container.decode(stream)):
                now = i / float(stream.average_rate) if even else frame.time
                start = now if start is None else start
                tick = int((now - start + 0.006) * cfg.fps) if cfg.fps else i  # .gif rounds times to 0.01 s
                while written * cfg.stride <= tick:  # more than once where the video is slower than fps
                    pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90).copy()  # (H, W, 3)
                    if cfg.image_size:
                        pixels = square(torch.from_numpy(pixels).permute(2, 0, 1), cfg.image_size, flip=False)
                        pixels = pixels.permute(1, 2, 0).numpy()
                    Image.fromarray(pixels).save(unfinished / f"{written:06d}.{cfg.frame_format}", quality=cfg.quality)
                    written += 1
        if not written:
            raise ValueError("no frames")
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(folder)
    except (av.FFmpegError, OSError, IndexError, ValueError, TypeError) as error:  # broken, no video, or a full disk
        return f"{video}: {type(error).__name__} ({getattr(error, 'strerror', None) or error})"
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    cli.run(main)
