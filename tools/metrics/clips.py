"""Sets of clips for a detector: windows of video files or of folders of frames, and clips sampled in memory.

The seed and the names of the clips alone settle which clips are used and where their windows begin. Folders, the order
of a listing and the number of processes change nothing.
Letters: F frames, H and W as read, S pixels of a side.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from configs import SampleConfig, require_path
from configs.errors import UserError
from configs.files import file_hash, flatten
from datasets.clips import check_frame_rate, crop_at, find_frame_folders, find_videos
from datasets.readers import BadClip, Choose, has_suffix, read_frame_folder, read_video
from datasets.transforms import square
from models.checkpoint import weights_hash
from models.hardware import timed
from sample import DDP_RECORD
from sample.folder import clips_of_one_plan, labels_of, make_record, video_path
from sample.media import to_uint8
from sample.options import DEMO, load_sampling
from sample.pipeline import generate, load, resolve
from sample.plans import make_plan
from tools.metrics.options import ClipOptions, EvaluateConfig

PIECE = 256  # frames of a whole video that are read at once
Clip = Tensor | BadClip  # (F, 3, S, S) uint8, or why a video gives no clip


def choose_window(
    total: int, num_frames: int, stride: int, name: str | None, seed: int, short_clips: str = "skip"
) -> Sequence[int]:
    """The indices of a clip's frames, as StyleGAN-V's data sets choose them; (seed, name) settle the first one.

    Args:
        name: None: the window begins at the first frame, as those of samples do.

    Raises:
        ShortClip: there are fewer than num_frames x stride frames; with short_clips=spread, fewer than num_frames.
    """
    if total < num_frames * stride:
        return crop_at(0, total, num_frames, stride, short_clips)
    length = (num_frames - 1) * stride + 1
    draw = random.Random(f"offset of {name} by {seed}").randrange
    first = 0 if name is None else draw(total - length + 1)
    return range(first, first + length, stride)


def shuffle_key(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on (seed, name) alone. Sorting clips by it shuffles them."""
    return random.Random(f"place of {name} by {seed}").random()


def fit_square(frames: Tensor, size: int, resize_filter: str) -> Tensor:
    """Resizes the short edge and crops the centre: (F, 3, H, W) uint8 -> (F, 3, S, S) uint8.

    `lanczos` crops before it resizes.
    """
    if resize_filter.startswith("lanczos"):  # only Pillow has it
        if resize_filter == "lanczos":
            frames = F.center_crop(frames, [min(frames.shape[-2:])] * 2)
        images = [F.resize(F.to_pil_image(frame), [size], F.InterpolationMode.LANCZOS) for frame in frames]
        frames, resize_filter = torch.stack([F.pil_to_tensor(image) for image in images]), "bilinear"  # resized already
    frames = square(frames, size, flip=False, resize_filter=resize_filter)
    return frames.contiguous()  # readers differ in layout, which changes last digits


def through_jpeg(frames: Tensor) -> Tensor:
    """Frames (F, 3, S, S) uint8 as Pillow reads them from the JPEG files that it writes by default: quality 75."""

    def read_back(frame: Tensor) -> Tensor:
        file = BytesIO()
        F.to_pil_image(frame).save(file, "JPEG")
        return F.pil_to_tensor(Image.open(file))

    return torch.stack([read_back(frame) for frame in frames])


def read_clip(
    read: Callable[[Choose], Tensor], choose: Choose, where: object, cfg: ClipOptions, jpeg: bool | None
) -> Clip:
    """The clip (F, 3, S, S) of a video, or the BadClip that says why there is none, for a process to hand over.

    Args:
        read: from a choice of frames to the frames (F, 3, H, W) uint8.
        where: the video, for the message of a BadClip.
        jpeg: whether the frames pass through JPEG.
    """
    try:
        frames = fit_square(read(choose), cfg.image_size, cfg.resize_filter)
    except BadClip as error:
        return type(error)(f"{where}: {error}")
    return through_jpeg(frames) if jpeg else frames


class VideoFiles:
    """One clip of each video under the folder in option `key`, in the order that the options say.

    Args:
        key: the option of `cfg` that gives the folder. Clips of real videos begin at random, others at the first frame.
        wanted: the number of clips to use.
        stride: frames from one to the next of a clip; None: a clip is the whole video.
    """

    def __init__(self, cfg: ClipOptions, key: str, wanted: int, stride: int | None):
        self.cfg, self.key, self.wanted, self.stride = cfg, key, wanted, stride
        self.root = require_path(cfg, key)
        videos = clips_of_one_plan(find_videos(self.root), self.root, key)
        paths = videos or find_frame_folders(self.root)
        if not paths:
            raise UserError(f"{key}: there are no video files and no folders of images under {self.root}")
        self.kind = "video files" if videos else "frames"
        fps = cfg.real_fps if key == "real_path" else None
        check_frame_rate(fps, stride or 1, None if videos else str(self.root), ("real_fps", "real_stride"))
        self.read = partial(read_video, reader=cfg.video_reader, fps=fps) if videos else read_frame_folder
        clips = [(path, path.stem if videos else path.name) for path in paths]  # one name for a file and its frames
        place = partial(shuffle_key, seed=cfg.seed) if cfg.order == "random" else str
        self.clips = sorted(clips, key=lambda clip: (place(clip[1]), clip[0].relative_to(self.root)))

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        path, name = self.clips[index]
        is_jpeg = path.is_dir() and any(has_suffix(file.name, {".jpg", ".jpeg"}) for file in path.iterdir())
        read = self.read_whole if self.stride is None else self.read
        choose = partial(self.choose, name if self.key == "real_path" else None)
        return read_clip(partial(read, path), choose, path, self.cfg, self.cfg.jpeg and not is_jpeg)

    def choose(self, name: str | None, total: int) -> Sequence[int]:
        """The indices of a clip's frames; without a stride, all frames."""
        cfg = self.cfg
        total = min(total, cfg.first_frames or total) if self.key == "real_path" else total
        if not self.stride:
            return range(total)
        short_clips = cfg.short_clips if self.key == "real_path" else "skip"
        return choose_window(total, cfg.num_frames, self.stride, name, cfg.seed, short_clips)

    def read_whole(self, path: Path, choose: Choose) -> Tensor:
        """All frames of a video at image_size, read piece by piece: at its own size a long video may not fit."""
        pieces, found = [], range(1)
        while PIECE * len(pieces) < len(found):
            start = PIECE * len(pieces)

            def next_piece(total: int, start: int = start) -> range:
                nonlocal found
                found = choose(total)
                return found[start : start + PIECE]

            pieces.append(fit_square(self.read(path, next_piece), self.cfg.image_size, self.cfg.resize_filter))
        return torch.cat(pieces)

    def batches(self, indices: Sequence[Sequence[int]]) -> Iterable[list[Clip]]:
        """Yields the clips of each list of indices."""
        workers = torch.get_num_threads() if self.cfg.num_workers is None else self.cfg.num_workers
        return DataLoader(self, batch_sampler=indices, collate_fn=list, num_workers=min(workers, len(indices)))

    def describe(self) -> dict[str, Any]:
        """The folder, the number of videos and the stride, for the record; for samples also how they were sampled."""
        facts = {"kind": self.kind, "path": str(self.root), "videos": len(self), "stride": self.stride}
        if (self.root / DDP_RECORD).is_file():
            record = json.loads((self.root / DDP_RECORD).read_text())
            names = {"config": "generate", "checkpoint": "checkpoint", "vae": "vae", "plan": "plan"}
            facts |= {ours: record[theirs] for theirs, ours in names.items() if theirs in record}
        return facts

    def fingerprint(self) -> str:
        """A hash of the names and bytes of all files, whatever clips of them the seed chooses."""
        digest = hashlib.sha256()
        for path, _ in sorted(self.clips):
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                content = file_hash(file) if file.is_file() else ""  # a broken link, a folder of other frames
                digest.update(f"{file.relative_to(self.root)}\0{content}\n".encode())
        return digest.hexdigest()


class SampledClips:
    """Clips sampled in memory, with the pixels, names and order of the files that sample_ddp.py would write."""

    key, kind = "generate", "samples in memory"

    def __init__(self, cfg: EvaluateConfig, device: torch.device):
        self.cfg, self.wanted, self.device = cfg, cfg.num_fake, device
        changes = flatten(cfg.sample).items()
        changes = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes]
        path = require_path(cfg, "generate") if cfg.generate else DEMO
        self.sampling = resolve(load_sampling(SampleConfig, path, changes), device)
        self.plan = make_plan(self.sampling)
        self.seconds: list[float] = []  # of a clip, sampled and decoded, by batch
        seeds = range(self.sampling.seed, self.sampling.seed + cfg.num_fake)
        self.clips = [(seed, video_path(Path(), seed).stem) for seed in seeds]
        if cfg.order == "random":
            self.clips.sort(key=lambda clip: shuffle_key(clip[1], cfg.seed))

    def __len__(self) -> int:
        return len(self.clips)

    def batches(self, indices: Sequence[Sequence[int]]) -> Iterable[list[Clip]]:
        """Yields the clips of each list of indices. The first batch loads the model."""
        pipe, step = load(self.sampling, self.device), self.sampling.per_proc_batch_size
        for batch in indices:
            clips: list[Clip] = []
            for i in range(0, len(batch), step):
                seeds, names = zip(*(self.clips[index] for index in batch[i : i + step]), strict=True)
                sampled, seconds = timed(self.device, generate, pipe, seeds, labels_of(seeds, self.sampling))
                self.seconds.append(seconds / len(seeds))
                videos = to_uint8(sampled)  # (B, F, H, W, 3)
                for name, video in zip(names, torch.from_numpy(videos).movedim(-1, -3), strict=True):
                    read = partial(lambda video, choose: video[list(choose(len(video)))], video)
                    clips.append(read_clip(read, self.choose, f"seed {name}", self.cfg, self.cfg.jpeg))
            yield clips

    def choose(self, total: int) -> Sequence[int]:
        """The indices of a clip's frames."""
        return choose_window(total, self.cfg.num_frames, self.cfg.fake_stride, None, self.cfg.seed)

    def describe(self) -> dict[str, Any]:
        """The options of sampling, the weights and the plan, for the record."""
        record = make_record(self.sampling, self.device)
        checkpoint = record["checkpoint"] | {"weights": weights_hash(record["checkpoint"]["path"])}
        facts = {"checkpoint": checkpoint, "vae": record["vae"], "plan": self.plan.record()}
        return {"kind": self.kind, "generate": record["config"], **facts}
