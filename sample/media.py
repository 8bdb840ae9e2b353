"""Writing videos as mp4, gif and PNG files, atomically. A video is (F, 3, H, W) in [-1, 1], a batch (B, F, 3, H, W)."""

import math
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from configs import UserError
from configs.files import atomic_path


def to_uint8(video: Tensor) -> np.ndarray:
    """Returns rounded pixels: (..., 3, H, W) in [-1, 1] -> (..., H, W, 3) in 0 ... 255."""
    pixels = ((video.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def save_video(path: str | Path, video: Tensor, fps: float) -> None:
    """Writes a video (F, 3, H, W) as .mp4 (H.264, yuv420p, which every player reads) or as .gif."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".mp4", ".gif"):
        raise UserError(f"{path}: a video's suffix is .mp4 or .gif")
    with atomic_path(path) as temporary:
        if suffix == ".mp4":
            _write_mp4(temporary, video, fps)
        else:
            first, *rest = (Image.fromarray(frame) for frame in to_uint8(video))
            first.save(temporary, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def save_grid(path: str | Path, videos: Tensor, fps: float, columns: int | None = None, scale: int = 1) -> None:
    """Writes (B, F, 3, H, W) as one .mp4 or .gif that shows all videos side by side.

    Args:
        columns: videos per row; None: about as many as there are rows.
        scale: a whole number by which videos are enlarged.
    """
    columns = columns or math.ceil(math.sqrt(len(videos)))
    padded = F.pad(videos, (0, 0) * 4 + (0, -len(videos) % columns), value=-1)  # (R*K, F, 3, H, W), the last ones black
    rows = padded.unflatten(0, (-1, columns))  # (R, K, F, 3, H, W)
    grid = rows.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)  # (F, 3, R*H, K*W)
    save_video(path, _enlarge(grid, scale), fps)


class Inline:
    """Videos side by side that a notebook shows and plays: the last value of a cell, or display(Inline(videos)).

    Args:
        videos: (B, F, 3, H, W), or one video (F, 3, H, W).
        fps: frames per second.
        scale: a whole number by which videos are enlarged.
    """

    def __init__(self, videos: Tensor, fps: float = 8, scale: int = 1):
        with TemporaryDirectory() as folder:
            path = Path(folder, "videos.mp4")
            save_grid(path, videos if videos.ndim == 5 else videos[None], fps, scale=scale)
            self.mp4 = path.read_bytes()

    def _repr_html_(self) -> str:
        data = b64encode(self.mp4).decode()
        return f'<video autoplay loop muted controls src="data:video/mp4;base64,{data}"></video>'


def save_contact_sheet(
    path: str | Path, videos: Tensor, labels: Sequence[str], columns: int = 8, scale: int = 1
) -> None:
    """Writes a PNG with a row for each video of (B, F, 3, H, W): its label and `columns` evenly spaced frames."""
    num_frames = videos.shape[1]
    chosen = torch.linspace(0, num_frames - 1, min(columns, num_frames)).round().long()
    frames = to_uint8(_enlarge(videos[:, chosen], scale))  # (B, K, H, W, 3)
    B, K, H, W, _ = frames.shape
    font = ImageFont.load_default(size=max(12, H // 6))
    margin = math.ceil(max(font.getlength(label) for label in labels)) + 16
    sheet = Image.new("RGB", (margin + K * (W + 2), B * (H + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (video, label) in enumerate(zip(frames, labels, strict=True)):
        draw.text((8, row * (H + 2) + H // 2), label, "black", font, anchor="lm")
        for column, frame in enumerate(video):
            sheet.paste(Image.fromarray(frame), (margin + column * (W + 2), row * (H + 2)))
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")


def find_ffmpeg() -> str:
    """Returns the path of ffmpeg; raises UserError if there is none."""
    try:
        if path := shutil.which(get_ffmpeg_exe()):
            return path
    except RuntimeError:  # of imageio_ffmpeg, which finds none
        pass
    raise UserError("no ffmpeg to write videos: install imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to its path")


def _write_mp4(path: Path, video: Tensor, fps: float) -> None:
    # In yuv420p, 2 x 2 pixels share a colour. So an odd last row or column is repeated.
    video = F.pad(video, (0, video.shape[-1] % 2, 0, video.shape[-2] % 2), mode="replicate")
    frames = to_uint8(video)  # (F, H, W, 3)
    size = f"{frames.shape[2]}x{frames.shape[1]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    target = ["-c:v", "libx264", "-crf", "17", "-pix_fmt", "yuv420p", "-movflags", "+faststart", "-f", "mp4", str(path)]
    # imageio-ffmpeg's writer ignores an encoder that fails at the end, for example on a full disk.
    command = [find_ffmpeg(), "-v", "error", "-y", *source, *target]
    result = subprocess.run(command, input=frames.tobytes(), stderr=subprocess.PIPE)
    if result.returncode:
        reason = " ".join(result.stderr.decode(errors="replace").split())[:300] or f"code {result.returncode}"
        raise UserError(f"ffmpeg cannot write a video in {path.absolute().parent} ({reason}); is the disk full?")


def _enlarge(video: Tensor, scale: int) -> Tensor:
    """Returns (..., scale * H, scale * W): each pixel becomes a square of scale x scale pixels."""
    return video.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
