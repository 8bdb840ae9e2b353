"""The networks behind the metrics: published TorchScript files, fetched once and called as StyleGAN-V does; the proxy.

The published ones take uint8 pixels and resize them to their own input size.
Letters: B batch, F frames, N rows (B for clips, B F for single frames), D width of the features.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlparse

import torch
from torch import Tensor

from configs import UserError
from configs.files import file_hash
from models.download import download
from tools.metrics.efficientnet import efficientnet_file, load_proxy


class Detector(NamedTuple):
    """A published file of a detector."""

    url: str
    sha256: str | None  # None: no public source states it

    @property
    def name(self) -> str:
        return PurePosixPath(urlparse(self.url).path).name


DETECTORS = {
    # StyleGAN-V's port of FVD's Kinetics-400 I3D; SHA-256: Stability-AI/SemanTok, scripts/download_eval_models.sh
    "i3d": Detector(
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
        "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    ),
    # NVIDIA's port of FID's Inception; SHA-256: crowsonkb/k-diffusion, k_diffusion/evaluation.py
    "inception": Detector(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    ),
    # StyleGAN-V's port of TGAN2's C3D, trained on UCF101
    "c3d": Detector("https://www.dropbox.com/s/jxpu7avzdc9n97q/c3d_ucf101.pt?dl=1", None),
}


class Output(NamedTuple):
    """One output of a detector, and how the detector is called for it."""

    detector: str
    by_frame: bool = False
    width: int | None = None  # D of features; None: class probabilities
    options: dict[str, bool] = {}  # of the call


OUTPUTS = {
    "proxy": Output("proxy", width=80),
    "i3d": Output("i3d", width=400, options=dict(rescale=True, resize=True, return_features=True)),
    "inception": Output("inception", by_frame=True, width=2048, options=dict(return_features=True)),
    "inception_classes": Output("inception", by_frame=True, options=dict(no_output_bias=True)),
    "c3d_classes": Output("c3d"),
}


class DetectorFile(NamedTuple):
    """A detector's file on this machine."""

    path: str
    sha256: str
    published: bool | None  # whether it is the published file; None: unknown


def find_detector(name: str, given: str | None, folder: Path) -> DetectorFile:
    """The file `given`, or else the published one in `folder`, fetched if it is not there.

    Raises:
        UserError: there is no such file, it cannot be fetched, or `folder` holds another file under its name.
    """
    if name == "proxy":
        return DetectorFile(str(efficientnet_file()), file_hash(efficientnet_file()), None)
    detector = DETECTORS[name]
    path = Path(given) if given else folder / detector.name
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
    detector, by_frame, width, options = OUTPUTS[name]
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
        x = clips.flatten(0, 1) if by_frame else clips.transpose(1, 2)  # (B F, 3, H, W) | (B, 3, F, H, W)
        try:
            y = net(x.to(device), **options)  # (N, D)
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
