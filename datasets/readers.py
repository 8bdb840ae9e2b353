"""Readers: video files and folders of images to frames.

A reader is `read(path, choose) -> (F, 3, H, W) uint8`, where `choose(total) -> indices` picks from the frames that
there are. Readers seek; they never decode a whole file.
"""

import re
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image

VIDEO_SUFFIXES = {".avi", ".mp4", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".gif"}
READERS = ("pyav", "decord")  # of video files, see `read_video`
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}

Choose = Callable[[int], Sequence[int]]  # number of frames there are -> indices of those to read, increasing
Read = Callable[[Path, Choose], torch.Tensor]


class BadClip(Exception):
    """A clip that cannot be used, and why: too short, does not decode, no image."""


def has_suffix(name: str, suffixes: set[str]) -> bool:
    """Whether a file's name ends in one of `suffixes`, in any case of letters, and is not hidden."""
    return Path(name).suffix.lower() in suffixes and not name.startswith(".")  # macOS leaves ._name beside name


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key that reads digits as numbers: frame_9 before frame_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


class Packet(NamedTuple):
    """One encoded frame, in the order of the file (decoding order)."""

    pts: int  # when it is shown
    dts: int | None  # when it is decoded
    is_keyframe: bool
    is_discard: bool  # decoded but not shown: cut off by an edit list


def read_video(path: Path, choose: Choose, reader: str = "pyav") -> torch.Tensor:
    """The chosen frames of a video file, (F, 3, H, W) uint8; the packets' times, read without decoding, find them.

    `reader` pyav: PyAV; decord: decord where its seeking is exact, PyAV elsewhere.

    Raises:
        BadClip: the file does not decode, or `choose` refuses it.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise BadClip("does not decode (FFmpeg does not know its codec)")
            packets = [
                Packet(p.pts, p.dts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.pts is not None
            ]
            indices = choose(sum(not packet.is_discard for packet in packets))
            frames = None
            if reader == "decord" and _decord_is_exact(container, packets):
                frames = _read_decord(path, indices)
            if frames is None:
                frames = _read_pyav(container, packets, indices)
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:  # no video stream; frames that differ in size
        raise BadClip(f"does not decode ({type(error).__name__})") from error
    return torch.from_numpy(frames).permute(0, 3, 1, 2)  # (F, H, W, 3) -> (F, 3, H, W)


def _decord_is_exact(container: av.container.InputContainer, packets: list[Packet]) -> bool:
    """Whether decord's seek finds the right frames.

    It returns wrong ones, silently, after an edit list, in MPEG-PS and MPEG-TS, in .avi with H.264 or B-frames, and
    with B-frames around a keyframe that is no clean cut (an open group of pictures), which packets do not always tell.
    """
    codec, file_format = container.streams.video[0].codec_context, container.format.name
    if codec.has_b_frames or any(packet.is_discard for packet in packets):
        return False
    return codec.name != "h264" if file_format == "avi" else file_format.startswith(("mov", "matroska"))


def _read_decord(path: Path, indices: Sequence[int]) -> np.ndarray | None:
    """(F, H, W, 3) uint8, or None where decord fails: PyAV reads some of those files."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        frames = decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError):
        return None
    return frames if frames.shape[-1] == 3 else None  # a rotated video comes out with four channels


def _read_pyav(container: av.container.InputContainer, packets: list[Packet], indices: Sequence[int]) -> np.ndarray:
    """The frames `indices`, (F, H, W, 3) uint8.

    A packet's pts tells its frame, but .avi stores none. FFmpeg's guess is wrong for MPEG-4 with two frames packed into
    one (part of UCF101); its decoder gives a frame for each packet but the first, so that the next one's dts tells the
    frame. H.264's decoder does not: with B-frames its frames are counted from the start. So are those of MPEG-PS, where
    times after a seek can differ from those before.
    """
    codec, file_format = container.streams.video[0].codec_context, container.format.name
    reordered_avi = file_format == "avi" and codec.has_b_frames
    if file_format == "mpeg" or (reordered_avi and codec.name == "h264"):
        frames = _count(container.name, indices)
    else:
        keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        if reordered_avi:
            clock = "dts"
            last = [i + 1 for i in indices]  # the packet that brings out the frame
            first = [max((k for k in keyframes if k <= i - 2), default=0) for i in indices]  # 2 B-frames may precede it
            start = 0  # whose header says that frames are packed
        else:
            clock = "pts"
            shown = [i for i, packet in enumerate(packets) if not packet.is_discard]
            shown.sort(key=lambda i: packets[i].pts)
            last = [shown[i] for i in indices]
            first = [max((k for k in keyframes if packets[k].pts <= packets[i].pts), default=0) for i in last]
            start = first[0]
        times = [getattr(packet, clock) for packet in packets] + [None]  # None: of the empty packet that ends the file
        wanted = [times[i] for i in last]
        runs = dict(sorted(zip(first, last, strict=True)))  # keyframe -> the last packet needed from there on
        needed = {times[start]} | {times[i] for begin, end in runs.items() for i in range(begin, end + 1)}
        at = packets[start].pts if packets[start].dts is None else packets[start].dts
        container.seek(at, stream=container.streams.video[0])
        frames = _decode(container, clock, wanted, needed)
        if len(frames) < len(wanted):  # the keyframe was no clean cut: from the start of the file
            with av.open(container.name) as unread:
                frames = _decode(unread, clock, wanted, set(times))
    if len(frames) < len(indices):
        raise BadClip("does not decode (frames are missing)")
    return np.stack(frames)


def _decode(
    container: av.container.InputContainer, clock: str, wanted: list[int | None], needed: set[int | None]
) -> list[np.ndarray]:
    """Those of the frames `wanted` that decode from the packets `needed`, from where `container` stands, in order.

    Both are told by their `clock`: pts | dts.
    """
    images, waiting, chosen = {}, set(wanted), set(wanted)
    reformatter = VideoReformatter()
    stream = container.streams.video[0]
    codec = stream.codec_context
    codec.thread_count = 1  # the loader's workers are the parallelism
    for packet in container.demux(stream):
        time, frames = getattr(packet, clock), []
        if packet.size and time in needed:
            if codec.name == "h264":  # its packets say whether other frames build on them; the rest is skipped
                codec.skip_frame = "DEFAULT" if time in waiting else "NONREF"
            frames = codec.decode(packet)
        waiting.discard(time)
        if not waiting or time not in needed:  # what the decoder still holds needs no later packet
            held = codec.decode(None)
            codec.flush_buffers()
            if clock == "pts" or time is None:
                frames += held
        for frame in frames:
            time = getattr(frame, clock)
            if time in chosen:
                images[time] = _pixels(frame, reformatter)
        if not waiting:
            break
    return [images[time] for time in wanted if time in images]


def _count(path: str, wanted: Sequence[int]) -> list[np.ndarray]:
    """Those of the frames `wanted` that decode, by their number from the start of the file."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames, reformatter = islice(container.decode(video=0), wanted[-1] + 1), VideoReformatter()
        return [_pixels(frame, reformatter) for i, frame in enumerate(frames) if i in wanted]


def _pixels(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """(H, W, 3) uint8, upright; the frames of a file share the tables that `reformatter` keeps."""
    return np.rot90(reformatter.reformat(frame, format="rgb24").to_ndarray(), frame.rotation // 90)


def read_frame_folder(path: Path, choose: Choose) -> torch.Tensor:
    """The chosen frames of a folder of images in natural-number order, (F, 3, H, W) uint8.

    Raises:
        BadClip: a chosen file is no image, frames differ in size, or `choose` refuses the folder.
    """
    try:
        names = sorted((p.name for p in path.iterdir() if has_suffix(p.name, IMAGE_SUFFIXES)), key=natural_order)
    except OSError as error:  # it is gone, or closed to this user
        raise BadClip(f"cannot be read ({type(error).__name__})") from error
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
