"""Readers, which return chosen frames of a video file or of a folder of images.

A reader is `read(path, choose) -> (F, 3, H, W) uint8`; `choose(total) -> indices` chooses among the `total` frames.
Readers seek to a keyframe before each chosen frame where seeking is exact, so they rarely decode a whole file.
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
READERS = ("pyav", "decord")  # see `read_video`
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}

Choose = Callable[[int], Sequence[int]]  # number of frames -> increasing indices of frames to read
Read = Callable[[Path, Choose], torch.Tensor]


class BadClip(Exception):
    """A video cannot be used. The message is the reason: it is too short, or does not decode."""


def has_suffix(name: str, suffixes: set[str]) -> bool:
    """Returns whether `name` ends in one of `suffixes` (upper or lower case) and is not that of a hidden file."""
    return Path(name).suffix.lower() in suffixes and not name.startswith(".")  # macOS adds a hidden ._name


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Returns a sort key that orders numbers by value: frame_9 before frame_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


class Packet(NamedTuple):
    """The times and flags of one encoded frame. Packets come in the order of the file, which is decoding order."""

    pts: int  # presentation time
    dts: int | None  # decoding time
    is_keyframe: bool
    is_discard: bool  # decoded but not shown, because an edit list cuts it off


def read_video(path: Path, choose: Choose, reader: str = "pyav") -> torch.Tensor:
    """Returns the chosen frames of a video file, (F, 3, H, W) uint8.

    The times of all packets are read first, without decoding; they tell how many frames there are and where to seek.

    Args:
        reader: pyav, or decord: decord for files in which it seeks exactly, PyAV for the others.

    Raises:
        BadClip: the file does not decode, or `choose` raises it.
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
    # IndexError: there is no video stream. ValueError: frames differ in size.
    except (av.FFmpegError, OSError, IndexError, ValueError) as error:
        raise BadClip(f"does not decode ({type(error).__name__})") from error
    return torch.from_numpy(frames).permute(0, 3, 1, 2)  # (F, H, W, 3) -> (F, 3, H, W)


def _decord_is_exact(container: av.container.InputContainer, packets: list[Packet]) -> bool:
    """Returns whether decord's seek finds the right frames of this file.

    decord silently returns wrong frames with an edit list, in MPEG-PS and MPEG-TS, in .avi with H.264 or B-frames, and
    in an open group of pictures (B-frames that refer across a keyframe). Packets do not always show the last, so every
    file with B-frames is refused.
    """
    codec, file_format = container.streams.video[0].codec_context, container.format.name
    if codec.has_b_frames or any(packet.is_discard for packet in packets):
        return False
    return codec.name != "h264" if file_format == "avi" else file_format.startswith(("mov", "matroska"))


def _read_decord(path: Path, indices: Sequence[int]) -> np.ndarray | None:
    """Returns the frames, (F, H, W, 3) uint8, or None if decord fails; PyAV can read some of those files."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        frames = decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError):
        return None
    return frames if frames.shape[-1] == 3 else None  # decord returns a rotated video with four channels


def _read_pyav(container: av.container.InputContainer, packets: list[Packet], indices: Sequence[int]) -> np.ndarray:
    """Returns the frames `indices`, (F, H, W, 3) uint8. A frame is found in one of three ways:

    - By the pts of its packet, which the decoded frame carries too. This is the usual way.
    - .avi stores no pts, and FFmpeg guesses it wrongly where MPEG-4 packs two frames into one packet (part of UCF101).
      The MPEG-4 decoder returns a frame with each packet but the first, so the dts of the *next* packet identifies it.
    - By counting from the start of the file: H.264 with B-frames in .avi, whose decoder returns frames irregularly, and
      MPEG-PS, whose times can be others after a seek.
    """
    codec, file_format = container.streams.video[0].codec_context, container.format.name
    reordered_avi = file_format == "avi" and codec.has_b_frames
    if file_format == "mpeg" or (reordered_avi and codec.name == "h264"):
        frames = _decode_from_start(container.name, indices)
    else:
        frames = _seek_and_decode(container, packets, indices, clock="dts" if reordered_avi else "pts")
    if len(frames) < len(indices):
        raise BadClip("does not decode (frames are missing)")
    return np.stack(frames)


def _seek_and_decode(
    container: av.container.InputContainer, packets: list[Packet], indices: Sequence[int], clock: str
) -> list[np.ndarray]:
    """Seeks to the keyframes before the frames `indices`; returns those of the frames that decode from there.

    `clock` is pts or dts, the time that identifies frames and packets. For each frame, `first` is the keyframe to
    decode from, and `last` the packet whose time identifies the frame.
    """
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    if clock == "dts":
        last = [i + 1 for i in indices]  # the decoder returns frame i with packet i + 1
        # Packet k, a keyframe, can be frame k + 2: then the 2 B-frames after it in the file are shown before it.
        first = [max((k for k in keyframes if k <= i - 2), default=0) for i in indices]
        start = 0  # always decode packet 0: its header says whether frames are packed
    else:
        shown = [i for i, packet in enumerate(packets) if not packet.is_discard]
        shown.sort(key=lambda i: packets[i].pts)
        last = [shown[i] for i in indices]
        first = [max((k for k in keyframes if packets[k].pts <= packets[i].pts), default=0) for i in last]
        start = first[0]
    times = [*(getattr(packet, clock) for packet in packets), None]  # None: the empty packet at the end of a file
    wanted = [times[i] for i in last]
    runs = dict(sorted(zip(first, last, strict=True)))  # keyframe -> the last packet to decode from there
    needed = {times[start]} | {times[i] for begin, end in runs.items() for i in range(begin, end + 1)}
    seek_time = packets[start].pts if packets[start].dts is None else packets[start].dts
    container.seek(seek_time, stream=container.streams.video[0])
    frames = _decode(container, clock, wanted, needed)
    if len(frames) < len(wanted):  # an open group of pictures: decode the whole file
        with av.open(container.name) as reopened:
            frames = _decode(reopened, clock, wanted, set(times))
    return frames


def _decode(
    container: av.container.InputContainer, clock: str, wanted: list[int | None], needed: set[int | None]
) -> list[np.ndarray]:
    """Decodes packets from the position of `container` on; returns those of the frames `wanted` that it finds.

    Args:
        clock: pts or dts, the time that identifies frames and packets.
        wanted: the times of the frames; the result has their order.
        needed: the times of the packets to decode; the others are skipped.
    """
    images, waiting, chosen = {}, set(wanted), set(wanted)  # waiting: frames whose packet has not been read yet
    reformatter = VideoReformatter()
    stream = container.streams.video[0]
    codec = stream.codec_context
    codec.thread_count = 1  # the loader's workers run in parallel already
    for packet in container.demux(stream):
        time, frames = getattr(packet, clock), []
        if packet.size and time in needed:
            if codec.name == "h264":  # decode an unwanted frame only if others refer to it
                codec.skip_frame = "DEFAULT" if time in waiting else "NONREF"
            frames = codec.decode(packet)
        waiting.discard(time)
        if not waiting or time not in needed:  # the decoder can return the frames it holds: flush it
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


def _decode_from_start(path: str, wanted: Sequence[int]) -> list[np.ndarray]:
    """Decodes a file from its start; returns those of the frames with numbers `wanted` that decode."""
    with av.open(path) as container:
        container.streams.video[0].codec_context.thread_count = 1
        frames, reformatter = islice(container.decode(video=0), wanted[-1] + 1), VideoReformatter()
        return [_pixels(frame, reformatter) for i, frame in enumerate(frames) if i in wanted]


def _pixels(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Returns the pixels of a frame, (H, W, 3) uint8, upright. `reformatter` keeps tables for all frames of a file."""
    return np.rot90(reformatter.reformat(frame, format="rgb24").to_ndarray(), frame.rotation // 90)


def read_frame_folder(path: Path, choose: Choose) -> torch.Tensor:
    """Returns the chosen frames of a folder of images, (F, 3, H, W) uint8; numbers in the names order the frames.

    Raises:
        BadClip: a chosen file is not an image, frames differ in size, or `choose` raises it.
    """
    try:
        names = sorted((p.name for p in path.iterdir() if has_suffix(p.name, IMAGE_SUFFIXES)), key=natural_order)
    except OSError as error:  # the folder was deleted, or this user may not read it
        raise BadClip(f"cannot be read ({type(error).__name__})") from error
    frames = [read_image(path / names[i]) for i in choose(len(names))]
    if len({frame.shape for frame in frames}) > 1:
        raise BadClip("its frames differ in size")
    return torch.stack(frames)


def read_image(path: Path) -> torch.Tensor:
    """Returns the pixels of an image file, (3, H, W) uint8; raises BadClip if the file is not an image."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    except Exception as error:  # on a broken file Pillow raises anything from OSError to SyntaxError
        raise BadClip(f"{path.name} is not an image ({type(error).__name__})") from error
