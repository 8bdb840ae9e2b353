"""Readers, which return chosen frames of a video file or of a folder of images.

A reader is `read(path, choose) -> (F, 3, H, W) uint8`; `choose(total) -> indices` chooses among the `total` frames.
Readers seek to a keyframe before each chosen frame where seeking is exact, so they rarely decode a whole file.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import av.filter
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from datasets.video_index import (
    LONG,
    BadClip,
    VideoIndex,
    check_aspect,
    decode_in_order,
    find_index,
    kept_index,
    set_up_decoder,
)

VIDEO_SUFFIXES = {".avi", ".mp4", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".gif"}
READERS = ("pyav", "decord")  # see `read_video`
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
EIGHT_BIT = ("yuv420p", "yuvj420p")  # the usual pixel formats
ASPECT_ROUNDING = 0.01  # pixels that are less than this from square are taken as square
MAX_ASPECT = 8  # wider or higher pixels are an error of the file
MAX_SLANT = 0.0175  # tangent of a degree: what FFmpeg still takes as a multiple of 90 degrees

Choose = Callable[[int], Sequence[int]]  # number of frames -> increasing indices of frames to read
Read = Callable[[Path, Choose], torch.Tensor]


def has_suffix(name: str, suffixes: set[str]) -> bool:
    """Returns whether `name` ends in one of `suffixes` (upper or lower case) and is not that of a hidden file."""
    return Path(name).suffix.lower() in suffixes and not name.startswith(".")  # macOS adds a hidden ._name


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Returns a sort key that orders numbers by value: frame_9 before frame_10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


class ToPixels:
    """Converts frames of a video to upright frames of square pixels, (H, W, 3) uint8, as the ffmpeg command line does.

    The conversion is the filter graph of that program, so the pixels are the same bit for bit. swscale alone is quicker
    and does the same to usual frames; in 10-bit, 4:2:2 and interlaced video it sites and filters chroma in another way.

    Args:
        aspect: the width of a pixel over its height.
    """

    def __init__(self, aspect: float):
        self.aspect, self.reformatter = aspect, VideoReformatter()
        self.graph, self.layout, self.matrix = None, None, None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        layout = frame.width, frame.height, frame.format.name
        if layout != self.layout:
            self.graph, self.layout, self.matrix = None, layout, display_matrix(frame)
        if self.aspect == 1 and frame.format.name in EIGHT_BIT and not frame.interlaced_frame:
            # One thread: the processes that read are the parallelism.
            rgb = self.reformatter.reformat(frame, format="rgb24", interpolation="BICUBIC", threads=1)
        else:
            self.graph = self.graph or self._make_graph(*layout)
            self.graph.vpush(frame)
            rgb = self.graph.vpull()
        return upright(rgb.to_ndarray(), self.matrix)

    def _make_graph(self, width: int, height: int, pixel_format: str) -> av.filter.Graph:
        graph = av.filter.Graph()
        graph.threads = 1
        nodes = [graph.add_buffer(width=width, height=height, format=pixel_format, time_base=Fraction(1))]
        if self.aspect != 1:
            nodes.append(graph.add("scale", f"{round(width * self.aspect)}:{height}"))
        graph.link_nodes(*nodes, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
        return graph


def pixel_aspect(stream: av.VideoStream) -> float:
    """Returns the width of a video's pixels over their height; raises BadClip if that cannot be meant."""
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        raise BadClip(f"its pixels are {aspect:g} times as wide as high")
    return aspect if abs(aspect - 1) > ASPECT_ROUNDING else 1


def display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """Returns the matrix that turns a frame upright, 9 integers, or None."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the type of other side data, such as EXIF
        if frame.rotation:
            raise BadClip(f"it is turned by {frame.rotation} degrees in a way that cannot be read") from None
        return None
    return None if matrix is None else np.frombuffer(matrix, np.int32)


def upright(pixels: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Returns pixels (H, W, 3) turned and mirrored by a display matrix (a, b, _, c, d, ...).

    The matrix takes a pixel to x' = a x + c y and y' = b x + d y.

    Raises:
        BadClip: the angle is not a multiple of 90 degrees.
    """
    if matrix is None:
        return pixels
    a, b, _, c, d = map(float, matrix[:5])
    if max(abs(b), abs(c)) <= min(abs(a), abs(d)) * MAX_SLANT:
        x, y = a, d
    elif max(abs(a), abs(d)) <= min(abs(b), abs(c)) * MAX_SLANT:
        pixels, x, y = pixels.swapaxes(0, 1), c, b
    else:
        raise BadClip("it is turned by an angle that is no multiple of 90 degrees")
    return pixels[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1]


def read_video(
    path: Path, choose: Choose, reader: str = "pyav", fps: float | None = None, index_path: str | None = None
) -> torch.Tensor:
    """Returns the chosen frames of a video file, (F, 3, H, W) uint8, as the ffmpeg command line shows them.

    They stand upright, and their pixels are square.

    Args:
        reader: pyav, or decord: decord for files in which it seeks exactly, PyAV for the others.
        fps: frames per second among which `choose` chooses, see `VideoIndex.at_rate`; None: all frames of the video.
        index_path: the folder that keeps indices of long videos for other processes; empty: none.

    Raises:
        BadClip: the file does not decode, or `choose` raises it.
    """
    try:
        with av.open(str(path)) as container:
            index = find_index(container, index_path)
            at_rate = index.at_rate(fps)
            indices = [int(at_rate[i]) for i in choose(len(at_rate))]
            frames = None
            if reader == "decord":
                if index.not_decord is None:
                    index.not_decord = _why_not_decord(container, index)
                if not index.not_decord:
                    frames = _read_decord(path, index, indices)
            if frames is None:
                frames = _read_pyav(container, index, indices)
    except (av.FFmpegError, OSError) as error:
        raise BadClip(f"does not decode ({type(error).__name__})") from error
    return torch.from_numpy(frames).permute(0, 3, 1, 2)  # (F, H, W, 3) -> (F, 3, H, W)


def reader_used(path: Path) -> str:
    """Returns, for a log, what reads a video that was read with reader=decord before."""
    index = kept_index(path)
    if index is None or index.not_decord is None:
        return "read by PyAV or decord"
    return f"read by PyAV, not decord ({index.not_decord})" if index.not_decord else "read by decord"


def _why_not_decord(container: av.container.InputContainer, index: VideoIndex) -> str:
    """Returns why decord cannot be trusted with this file, or an empty string.

    decord silently returns wrong frames in many kinds of files. It is used for those in which it was always right: one
    upright stream of H.264, MPEG-4 or MJPEG in 8 bits, from time 0 on, without B-frames, in groups of pictures that
    decode alone. It reads a whole file when it opens it, so long files are PyAV's too.
    """
    stream, file_format = container.streams[index.stream], container.format.name
    codec = stream.codec_context
    if codec.name not in ("h264", "mpeg4", "mjpeg") or not file_format.startswith(("avi", "mov", "matroska")):
        return f"{codec.name} in {file_format}"
    if codec.name == "h264" and file_format == "avi":
        return "H.264 in .avi"
    if codec.has_b_frames:
        return "B-frames"
    if index.clock != "pts" or index.shown_at[0] != 0 or len(index) < len(index.times):
        return "edit list or irregular times"
    if not index.decodes_from_keyframes or sum(e.is_keyframe for e in stream.index_entries) > len(index.keyframes):
        return "keyframes that are none"
    if len(container.streams.video) > 1:
        return "several video streams"
    if pixel_aspect(stream) != 1:
        return "pixels that are not square"
    if len(index) >= LONG:
        return "long file"
    with av.open(container.name) as reopened:
        frame = next(decode_in_order(reopened, index.stream), None)
    if frame is None:
        return "no first frame"
    if display_matrix(frame) is not None:
        return "turned"
    if frame.planes[0].buffer_ptr % 64:  # decord rounds the crop
        return "cropped on the left"
    return "" if frame.format.name in EIGHT_BIT else frame.format.name


def _read_decord(path: Path, index: VideoIndex, indices: Sequence[int]) -> np.ndarray | None:
    """Returns the frames, (F, H, W, 3) uint8, or None if decord fails; PyAV can read some of those files."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        video = decord.VideoReader(str(path), num_threads=1)
        if len(video) == len(index):
            return video.get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError):
        pass
    index.not_decord = "decord fails"
    return None


class Clip:
    """The frames of a clip, (F, H, W, 3) uint8, while they are decoded. A key identifies each; keys may repeat."""

    def __init__(self, keys: Sequence[int | None], to_pixels: ToPixels):
        self.num_frames, self.to_pixels = len(keys), to_pixels
        self.rows: dict[int | None, list[int]] = {}
        for row, key in enumerate(keys):
            self.rows.setdefault(key, []).append(row)
        self.pixels, self.missing = np.empty(0, np.uint8), set(self.rows)

    def add(self, key: int | None, frame: av.VideoFrame) -> None:
        """Keeps `frame` if the clip has a frame of this key."""
        if key not in self.rows:
            return
        pixels = self.to_pixels(frame)  # (H, W, 3)
        if not self.pixels.size:
            self.pixels = np.empty((self.num_frames, *pixels.shape), np.uint8)
        if pixels.shape != self.pixels.shape[1:]:
            raise BadClip("its frames differ in size")
        for row in self.rows[key]:
            self.pixels[row] = pixels
        self.missing.discard(key)


def _read_pyav(container: av.container.InputContainer, index: VideoIndex, indices: Sequence[int]) -> np.ndarray:
    """Returns the frames `indices`, (F, H, W, 3) uint8."""
    to_pixels = ToPixels(pixel_aspect(container.streams[index.stream]))
    if index.clock == "count":
        clip = Clip(indices, to_pixels)
        with av.open(container.name) as reopened:
            frames = decode_in_order(reopened, index.stream, skip_broken=True)
            for number, frame in enumerate(islice(frames, max(indices) + 1)):
                clip.add(number, frame)
    else:
        clip = _seek_and_decode(container, index, np.array(indices), to_pixels)
    if clip.missing:
        raise BadClip("does not decode (frames are missing)")
    return clip.pixels


def _seek_and_decode(
    container: av.container.InputContainer, index: VideoIndex, indices: np.ndarray, to_pixels: ToPixels
) -> Clip:
    """Seeks to the keyframes before the frames `indices`, and decodes from there.

    For each frame, `first` is the keyframe to decode from, and `last` the packet whose time identifies the frame.
    """
    last = index.packets[indices]
    if index.clock == "dts":
        # Packet k, a keyframe, can be frame k + 2: then the 2 B-frames after it in the file are shown before it.
        position = np.searchsorted(index.keyframes, indices - 2, side="right")
    else:
        position = np.searchsorted(index.times[index.keyframes], index.times[last], side="right")
    first = index.keyframes[np.maximum(position - 1, 0)]
    start = 0 if index.clock == "dts" else first.min()  # dts: the header of packet 0 says whether frames are packed

    def times_of(packets: Iterable[int]) -> list[int | None]:
        return [int(index.times[i]) if i < len(index.times) else None for i in packets]  # None: the end of the file

    clip = Clip(times_of(last), to_pixels)
    runs = dict(sorted(zip(first.tolist(), last.tolist(), strict=True)))  # keyframe -> the last packet to decode
    needed = set(times_of([start, *chain(*(range(begin, end + 1) for begin, end in runs.items()))]))
    container.seek(int(index.dts[start]), stream=container.streams[index.stream])
    if not _decode(container, index, clip, needed, set(times_of(runs))) or clip.missing:
        # An open group of pictures, or no true keyframe: decode the whole file.
        with av.open(container.name) as reopened:
            _decode(reopened, index, clip)
    return clip


def _decode(
    container: av.container.InputContainer,
    index: VideoIndex,
    clip: Clip,
    needed: Collection[int | None] | None = None,
    keyframes: Collection[int | None] = (),
) -> bool:
    """Decodes packets from the position of `container` on, and gives the frames to `clip`.

    Args:
        needed: the times of the packets to decode; the others are skipped. None: all packets.
        keyframes: the times of packets that are called keyframes.

    Returns:
        Whether `keyframes` are keyframes.
    """
    waiting = set(clip.rows)  # frames whose packet has not been read yet
    stream = container.streams[index.stream]
    codec = stream.codec_context
    set_up_decoder(stream)
    aspect = codec.sample_aspect_ratio
    for packet in container.demux(stream):
        time, frames = getattr(packet, index.clock), []
        is_needed = needed is None or time in needed
        if packet.size and is_needed:
            if codec.name == "h264":  # decode an unwanted frame only if others refer to it
                codec.skip_frame = "DEFAULT" if time in waiting else "NONREF"
            frames = codec.decode(packet)
        waiting.discard(time)
        if not waiting or not is_needed:  # the decoder can return the frames it holds: flush it
            held = codec.decode(None)
            codec.flush_buffers()
            if index.clock == "pts" or time is None:
                frames += held
        for frame in frames:
            time = getattr(frame, index.clock)
            if index.clock == "pts" and time in keyframes and not frame.key_frame:
                return False
            clip.add(time, frame)
        if not waiting:
            break
    check_aspect(stream, aspect)
    return True


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
    """Returns the pixels of an image file, (3, H, W) uint8, upright and without transparency.

    Raises:
        BadClip: the file is not one image, or its white or the shape of its pixels is not known.
    """
    try:
        with Image.open(path) as image:
            pixels = _image_pixels(image)
    except BadClip as error:
        raise BadClip(f"{path.name}: {error}") from None
    except Exception as error:  # on a broken file Pillow raises anything from OSError to SyntaxError
        raise BadClip(f"{path.name} is not an image ({type(error).__name__})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def _image_pixels(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an opened image, (H, W, 3) uint8; see `read_image` for the errors."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photograph and previews of it
        raise BadClip(f"it holds {image.n_frames} frames or pages, where one image is needed")
    for key in ("jfif_density", "dpi", "aspect", "resolution"):
        x, y = map(float, image.info.get(key, (1, 1)))
        # Programs disagree which of the two numbers is the wider pixel, so it cannot be mended here.
        if x and y and abs(x / y - 1) > ASPECT_ROUNDING:
            raise BadClip(f"its pixels are not square ({key} {x:g} x {y:g}); resize it, and store it without")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))  # as Pillow reduces 16-bit colors
    elif image.mode == "F":
        values = np.array(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise BadClip(f"its numbers lie between {values.min():g} and {values.max():g}; 0 to 1 is needed")
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    elif image.mode == "I":
        raise BadClip("its numbers have 32 bits, of which white is not known; 8 or 16 bits are needed")
    return np.array(image.convert("RGB"))
