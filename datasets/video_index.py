"""The index of a video file: when its frames are shown, and where its keyframes lie.

One pass over the packets makes it, without decoding if the times of the packets tell the frames apart. It is kept in
memory, and that of a long video in a file.
"""

import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.codec.context import Flags
from av.stream import Disposition

from configs.files import atomic_path

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files of indices
ARRAYS = ("shown_at", "packets", "keyframes", "times", "dts")
MAX_FOLDER = 2**28  # bytes of a folder of indices
MAX_KEPT = 2_000_000  # frames of all the indices that a process keeps, which are about 60 MB
NUM_PROBED = 48  # frames that are decoded to see their order, where it is in doubt
LONG = 5_000  # frames of a long video
CLOCK_ERROR = 0.006  # seconds; .gif rounds times to 0.01 s


class BadClip(Exception):
    """A video cannot be used. The message is the reason: it is too short, or does not decode."""


@dataclass
class VideoIndex:
    """The N frames of a video in the order shown, and its P packets in the order of the file, which is decoding order.

    A packet holds an encoded frame. `clock` says how a decoded frame is identified:

    - pts: by the pts of its packet, which the frame carries too. This is the usual way.
    - dts: .avi stores no pts, and FFmpeg guesses it wrongly where MPEG-4 packs two frames into one packet (part of
      UCF101). The MPEG-4 decoder returns a frame with each packet but the first, so the dts of the *next* packet
      identifies the frame.
    - count: by its number, decoding from the start of the file. This is for files in which times or seeking cannot be
      relied on (`_needs_counting`).
    """

    stream: int  # the video among the streams of the file
    clock: str
    time_base: Fraction  # seconds, the unit of all times
    shown_at: np.ndarray  # (N,) when each frame is shown
    packets: np.ndarray  # (N,) the packet that identifies each frame; P: the end of the file. Empty with clock=count
    keyframes: np.ndarray  # the packets that are keyframes. Empty with clock=count, as the next two
    times: np.ndarray  # (P,) pts or dts, as `clock` says
    dts: np.ndarray  # (P,) decoding times, which a seek needs
    decodes_from_keyframes: bool = True  # whether H.264 and MPEG-4 keyframes are as their packets say
    not_decord: str | None = None  # why decord cannot read the file; empty: it can; None: not found out yet

    def __len__(self) -> int:
        return len(self.shown_at)

    def at_rate(self, fps: float | None) -> np.ndarray:
        """Returns the frames of the video at `fps` frames per second, from its first frame on; None: all frames.

        Each is the first frame that is shown at its time or later. A slower video repeats frames.
        """
        if not fps:
            return np.arange(len(self))
        ticks = ((self.shown_at - self.shown_at[0]) * float(self.time_base) + CLOCK_ERROR) * fps  # (N,)
        return np.searchsorted(ticks, np.arange(int(ticks[-1]) + 1))


class Packet(NamedTuple):
    """The times and flags of a packet."""

    pts: int | None  # presentation time
    dts: int | None  # decoding time
    is_keyframe: bool
    is_shown: bool  # not cut off by an edit list, and not a frame that others refer to but nobody sees


def find_index(container: av.container.InputContainer, folder: str | None = None) -> VideoIndex:
    """Returns the index of an open video file. It is made once, as long as the file's size and time stay the same.

    Args:
        folder: where indices of long videos are kept for other processes; empty: nowhere.

    Raises:
        BadClip: the file has no video stream or no frames, or FFmpeg does not know the codec.
        av.FFmpegError: the file does not decode.
    """
    key = _key(container.name)
    index = _kept.pop(key, None)
    if index is None:
        file = Path(folder, f"{sha256(repr((FORMAT, key)).encode()).hexdigest()[:32]}.npz") if folder else None
        index = _load(file) if file else None
        if index is None:
            index = _make_index(container)
            if file and len(index) >= LONG:
                _save(index, file)
    if not len(index):
        raise BadClip("has no frames")
    _kept[key] = index  # the newest is the last
    while sum(map(len, _kept.values())) > MAX_KEPT and len(_kept) > 1:
        del _kept[next(iter(_kept))]
    return index


_kept: dict[tuple[str, int, int], VideoIndex] = {}


def _key(path: str | Path) -> tuple[str, int, int]:
    """Returns the path, the size and the time of a file."""
    status = Path(path).stat()
    return str(Path(path).absolute()), status.st_size, status.st_mtime_ns


def kept_index(path: Path) -> VideoIndex | None:
    """Returns the index of a video if this process keeps it."""
    return _kept.get(_key(path))


def forget_indices() -> None:
    """Drops all indices that this process keeps."""
    _kept.clear()


def _load(file: Path) -> VideoIndex | None:
    """Returns the index in a file, or None if there is none or it is damaged."""
    try:
        with np.load(file) as arrays:
            stream, clock, *time_base, decodes = json.loads(str(arrays["facts"]))
            steps = [arrays[key] for key in ARRAYS]
        with suppress(OSError):
            os.utime(file)  # used now
        return VideoIndex(stream, clock, Fraction(*time_base), *map(np.cumsum, steps), decodes)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _save(index: VideoIndex, file: Path) -> None:
    """Writes an index to a file. If the folder is too large then, the files that were not used for longest go."""
    base = index.time_base
    facts = [index.stream, index.clock, base.numerator, base.denominator, index.decodes_from_keyframes]
    steps = {key: np.diff(getattr(index, key), prepend=0) for key in ARRAYS}  # which compress well
    try:
        with atomic_path(file) as temporary, temporary.open("wb") as target:
            np.savez_compressed(target, facts=json.dumps(facts), **steps)
        files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in file.parent.glob("*.npz"))
        excess = sum(size for _, size, _ in files) - MAX_FOLDER
        for _, size, path in files:
            if excess > 0:
                path.unlink(missing_ok=True)
            excess -= size
    except OSError as error:
        logger.warning("video_index_path: %s cannot be used: %s", file.parent, error)


def _make_index(container: av.container.InputContainer) -> VideoIndex:
    stream = choose_stream(container)
    codec = stream.codec_context
    if codec is None:
        raise BadClip("does not decode (FFmpeg does not know its codec)")
    packets, decodes_from_keyframes, is_vp8 = [], True, codec.name == "vp8"
    for p in container.demux(stream):
        if p.size:
            # VP8 has a bit for it. Other codecs put a frame that nobody sees into the packet of another frame.
            is_shown = not p.is_discard and (not is_vp8 or bool(memoryview(p)[0] & 0x10))
            packets.append(packet := Packet(p.pts, p.dts, p.is_keyframe, is_shown))
            if packet.is_keyframe and decodes_from_keyframes:
                decodes_from_keyframes = _decodes_alone(codec, p)
    # The times in .avi are those of decoding.
    even = (1 / Fraction(stream.average_rate or stream.guessed_rate or 25)).limit_denominator(1_000_000)
    is_avi = container.format.name == "avi"
    if not packets or _needs_counting(container, stream, packets):
        times = _times_in_order(container, stream)
        if is_avi or None in times or times != sorted(times):
            times, time_base = range(len(times)), even
        else:
            time_base = stream.time_base
        none = np.zeros(0, np.int64)
        return VideoIndex(stream.index, "count", time_base, np.array(times, np.int64), none, none, none, none)
    keyframes = np.flatnonzero([packet.is_keyframe for packet in packets])
    if is_avi and codec.has_b_frames:
        dts, number = np.array([packet.dts for packet in packets]), np.arange(len(packets))
        return VideoIndex(stream.index, "dts", even, number, number + 1, keyframes, dts, dts)
    pts = np.array([packet.pts for packet in packets])
    dts = np.array([packet.pts if packet.dts is None else packet.dts for packet in packets])
    shown = np.flatnonzero([packet.is_shown for packet in packets])
    shown = shown[np.argsort(pts[shown])]
    time_base = stream.time_base
    return VideoIndex(stream.index, "pts", time_base, pts[shown], shown, keyframes, pts, dts, decodes_from_keyframes)


def _decodes_alone(codec: av.VideoCodecContext, packet: av.Packet) -> bool:
    """Returns whether a packet that is called a keyframe is an IDR picture of H.264, or an I-VOP of MPEG-4.

    True for other codecs. Within a packet of .mp4 and .mkv, the length of each part of H.264 comes before it.
    """
    if codec.name == "mpeg4":
        data = bytes(packet)
        return not data[data.find(b"\0\0\1\xb6") + 4 :][:1] >= b"\x40"
    if codec.name != "h264" or not (codec.extradata or b"").startswith(b"\1"):
        return codec.name != "h264"
    data, at, size = memoryview(packet), 0, (codec.extradata[4] & 3) + 1
    while at + size < len(data):
        if data[at + size] & 31 == 5:
            return True
        at += size + int.from_bytes(data[at : at + size], "big")
    return False


def _times_in_order(
    container: av.container.InputContainer, stream: av.VideoStream, most: int | None = None
) -> list[int | None]:
    """Returns the times of the frames that a decoder returns, in its order; at most the first `most`."""
    with av.open(container.name) as reopened:
        return [frame.pts for frame in islice(decode_in_order(reopened, stream.index, skip_broken=True), most)]


def choose_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Returns the video stream that the ffmpeg command line chooses; raises BadClip if there is none.

    It is the stream marked as default, then the one with the most pixels; an attached picture only if it is alone.
    """

    def rank(stream: av.VideoStream) -> int:
        codec = stream.codec_context
        if codec is None or stream.disposition & Disposition.attached_pic:
            return 1
        return codec.width * codec.height + 5_000_000 * bool(stream.disposition & Disposition.default)

    if not container.streams.video:
        raise BadClip("does not decode (it has no video stream)")
    return max(container.streams.video, key=rank)


def _needs_counting(container: av.container.InputContainer, stream: av.VideoStream, packets: list[Packet]) -> bool:
    """Returns whether the times of the packets, or a seek, cannot be relied on."""
    codec, file_format = stream.codec_context, container.format.name
    reordered_avi = file_format == "avi" and codec.has_b_frames
    if (
        file_format == "mpeg"  # MPEG-PS: the times can be others after a seek
        or (reordered_avi and codec.name == "h264")  # its decoder returns frames irregularly
        or codec.pix_fmt == "pal8"  # the first packet alone carries the palette
        or not packets[0].is_keyframe
    ):
        return True
    dts = [packet.dts for packet in packets if packet.dts is not None]
    if dts != sorted(dts):  # a clock that restarts
        return True
    if reordered_avi:
        return len(set(dts)) < len(packets)
    pts = [packet.pts for packet in packets]
    keyframes = [packet.pts for packet in packets if packet.is_keyframe]
    if (
        None in pts
        or len(set(pts)) < len(pts)
        or keyframes != sorted(keyframes)
        # Frames before the first keyframe do not decode.
        or min((packet.pts for packet in packets if packet.is_shown), default=pts[0]) < pts[0]
    ):
        return True
    if codec.has_b_frames and pts == sorted(pts):  # no B-frames after all, or times in the order of decoding
        times = _times_in_order(container, stream, most=NUM_PROBED)
        return None in times or times != sorted(times)
    return False


def set_up_decoder(stream: av.VideoStream) -> None:
    """Sets a decoder up before its first packet."""
    stream.codec_context.thread_count = 1  # the processes that read are the parallelism
    stream.codec_context.flags |= Flags.unaligned  # otherwise a crop on the left is rounded


def check_aspect(stream: av.VideoStream, aspect: Fraction | None) -> None:
    """Raises BadClip if the pixels of a stream are no longer of the shape `aspect`, as those of some recordings."""
    if (stream.codec_context.sample_aspect_ratio or 1) != (aspect or 1):
        raise BadClip("the shape of its pixels changes")


def decode_in_order(
    container: av.container.InputContainer, stream: int, skip_broken: bool = False
) -> Iterator[av.VideoFrame]:
    """Yields all frames of a newly opened file in the order shown.

    Args:
        skip_broken: whether a packet that does not decode is left out, as the ffmpeg command line does; otherwise it
            raises av.FFmpegError.

    Raises:
        BadClip: the shape of its pixels changes.
    """
    video = container.streams[stream]
    set_up_decoder(video)
    aspect = video.codec_context.sample_aspect_ratio
    for packet in container.demux(video):
        try:
            yield from packet.decode()
            if packet.is_keyframe:
                check_aspect(video, aspect)
        except av.InvalidDataError:
            if not skip_broken:
                raise
