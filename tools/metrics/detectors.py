"""The networks behind the metrics: TorchScript files, fetched once and called as options.DETECTORS says; our own.

Letters: B batch, F frames, N rows (B for clips, B F for single frames), D width of the features.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlparse

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import UserError
from configs.files import file_hash
from models.download import download
from tools.metrics.efficientnet import efficientnet_file, load_proxy
from tools.metrics.options import DETECTOR_OF, DETECTORS, OUTPUTS, Pixels


class DetectorFile(NamedTuple):
    """A detector's file on this machine."""

    path: str
    sha256: str
    published: bool | None  # whether it is the published file; None: unknown


def file_name(url: str) -> str:
    """The name of the file at a URL."""
    return PurePosixPath(urlparse(url).path).name


def find_detector(name: str, given: str | None, folder: Path) -> DetectorFile:
    """The file `given`, or else the published one in `folder`, fetched if it is not there.

    Raises:
        UserError: there is no such file, it cannot be fetched, or `folder` holds another file under its name.
    """
    if name == "proxy":
        return DetectorFile(str(efficientnet_file()), file_hash(efficientnet_file()), None)
    detector = DETECTORS[name]
    if not detector.is_file:
        return DetectorFile("", "", None)
    if not given and not detector.url:
        raise UserError(f"{name}: not published as TorchScript: give {name}=FILE, see tools/README.md")
    path = Path(given) if given else folder / file_name(detector.url)
    if given and not path.is_file():
        raise UserError(f"{name}: no file {path}")
    if not path.exists():
        print(f"fetching {detector.url} -> {path}", flush=True)
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # a line for each of its attempts
        try:
            download(detector.url, path, (detector.sha256 or "unknown")[:8], sha256=detector.sha256)
        except UserError:
            raise
        except Exception as error:  # the client's and the system's errors share no base class
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"cannot fetch {detector.url} ({reason}): fetch it elsewhere, put it at {path}") from None
    sha256 = file_hash(path)
    published = None if detector.sha256 is None else sha256 == detector.sha256
    if published is False and not given:
        raise UserError(f"{path} has SHA-256 {sha256}, not {detector.sha256}: remove it, or use it as {name}={path}")
    return DetectorFile(str(path), sha256, published)


def load_output(name: str, file: DetectorFile, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from clips (B, F, 3, H, W) uint8 to rows of output `name`, (B, 1 or F, D) fp32.

    Raises:
        UserError: the file is no TorchScript. The function raises it if the network cannot be called as this detector,
            or returns something else.
    """
    detector, output = DETECTOR_OF[name], OUTPUTS[name]
    by_frame, width, pixels = output.by_frame, output.width, DETECTORS[detector].pixels
    if name == "motion":
        return motion_rows
    if name == "proxy":
        proxy = load_proxy(device)
        return lambda clips: proxy(clips / 127.5 - 1)[:, None]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch.jit is deprecated; the files are not
        try:
            net = torch.jit.load(file.path, map_location=device).eval()
        except RuntimeError:
            raise UserError(f"{detector}: {file.path} is no TorchScript file, or one that is cut off") from None

    @torch.no_grad()
    # No TF32, and no optimisations that set in after some calls: equal clips give equal rows anywhere in a run.
    @torch.jit.optimized_execution(False)
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def rows(clips: Tensor) -> Tensor:
        x = clips.to(device)
        if pixels:
            x = resize_and_scale(x, pixels)
        x = x.flatten(0, 1) if by_frame else x.transpose(1, 2)  # (B F, 3, H, W) | (B, 3, F, H, W)
        try:
            y = net(x, **output.options)  # (N, D)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{detector}: {file.path} cannot be called as this detector ({reason})") from None
        if y.ndim != 2 or len(y) != len(x) or (width and y.shape[1] != width):
            wanted = f"({len(x)}, {width or 'classes'})"
            raise UserError(f"{detector}: {file.path} returns {tuple(y.shape)} where {wanted} is expected")
        if width is None and ((y < 0).any() or (y.sum(1) - 1).abs().max() > 1e-3):
            raise UserError(f"{detector}: {file.path} returns no probabilities")
        return y.float().unflatten(0, (len(clips), -1))  # (B, 1 or F, D)

    return rows


def resize_and_scale(clips: Tensor, pixels: Pixels) -> Tensor:
    """Clips (B, F, 3, H, W) uint8 as a detector takes them: (B, F, 3, size, size) in fp32."""
    x = clips.flatten(0, 1).float() / 255
    x = F.interpolate(x, (pixels.size, pixels.size), mode="bilinear", align_corners=False)  # as content-debiased FVD
    mean, std = (x.new_tensor(each)[:, None, None] for each in (pixels.mean, pixels.std))
    return ((x - mean) / std).unflatten(0, clips.shape[:2])


def motion_rows(clips: Tensor) -> Tensor:
    """The motion of clips (B, F, 3, H, W) uint8 between neighbouring frames, (B, F - 1, 2), in grey levels.

    The mean |difference|, and the mean of the largest 5 % of it (averaged over colours), which sees small things move.
    """
    change = clips.float().diff(dim=1).abs().mean(2).flatten(2)  # (B, F - 1, H W)
    largest = change.topk(max(1, change.shape[-1] // 20)).values
    return torch.stack([change.mean(2), largest.mean(2)], dim=2).cpu()
