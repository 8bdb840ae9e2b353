"""Metrics between clips and their twins, which are the same seeds and labels sampled another way.

Letters: B batch, F frames, C channels of the latents, h = H / 8, N clips of a set, D features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from datasets.readers import read_video
from sample.media import save_video
from sample.similarity import frame_psnr, psnr, ssim
from tools.metrics.scores import frechet_distance
from tools.metrics.statistics import mean_and_margin

PAIR_METRICS = {  # -> title in tables, digits
    "relative_l1": ("relative L1", 4),
    "psnr": ("PSNR, dB", 1),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "motion_error": ("motion error", 4),
    "mp4_psnr": ("PSNR of mp4 frames, dB", 1),
    "mp4_ssim": ("SSIM of mp4", 4),
    "mp4_lpips": ("LPIPS of mp4", 4),
}

Lpips = Callable[[Tensor, Tensor], float]  # two clips (F, 3, H, W) in [-1, 1]


def compare(
    latents: Tensor,
    videos: Tensor,
    twin_latents: Tensor,
    twin_videos: Tensor,
    lpips: Lpips | None = None,
    fidelity: str = "ours",
) -> dict[str, list[float]]:
    """The metrics of each clip a against its twin b: latents (B, F, C, h, w), videos (B, F, 3, H, W) in [-1, 1].

    Args:
        fidelity: a protocol; teacache adds the metrics of papers on caches: mp4_psnr, mp4_ssim, mp4_lpips.

    Returns:
        A value for each clip, by metric.
        relative_l1: |a - b|_1 / |b|_1 of the latents.
        psnr, ssim, lpips: of the videos; PSNR is that of a clip's total squared error, SSIM and LPIPS are means over
            frames.
        motion_error: mean |Da - Db| / mean |Db| of the videos, where D is the difference of neighbouring frames; 0 if
            a and b move alike, 1 if a is still.
        mp4_psnr, mp4_ssim, mp4_lpips: of both videos as mp4 files; means over frames, that of PSNR, too.
    """
    change, twin_change = videos.diff(dim=1), twin_videos.diff(dim=1)  # (B, F - 1, 3, H, W)
    pairs = list(zip(videos, twin_videos, strict=True))
    metrics = {
        "relative_l1": _relative_error(latents, twin_latents),
        "psnr": [psnr(a, b) for a, b in pairs],
        "ssim": [ssim(a, b) for a, b in pairs],
        "motion_error": _relative_error(change, twin_change),
    }
    metrics |= {"lpips": [lpips(a, b) for a, b in pairs]} if lpips else {}
    if fidelity == "teacache":
        pairs = [(through_mp4(a), through_mp4(b)) for a, b in pairs]
        metrics["mp4_psnr"] = [frame_psnr(a, b) for a, b in pairs]
        metrics["mp4_ssim"] = [ssim(a, b) for a, b in pairs]
        metrics |= {"mp4_lpips": [lpips(a, b) for a, b in pairs]} if lpips else {}
    return metrics


def through_mp4(video: Tensor) -> Tensor:
    """The video (F, 3, H, W) in [-1, 1] as it is read from the mp4 file that sample.py would write."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        save_video(path, video, fps=8)
        frames = read_video(path, range)[..., : video.shape[-2], : video.shape[-1]]  # without rows that pad odd sizes
    return (frames / 127.5 - 1).to(video.device)


def lpips_weights() -> tuple[Path, str]:
    """The path at which torch looks for LPIPS's AlexNet, and its URL; torchmetrics ships LPIPS's own weights."""
    from torchvision.models import AlexNet_Weights

    url = AlexNet_Weights.DEFAULT.url
    return Path(torch.hub.get_dir(), "checkpoints", Path(url).name), url


def load_lpips(device: torch.device) -> Lpips | None:
    """LPIPS (AlexNet, arXiv:1801.03924) as a mean over frames; None if `lpips_weights` are not on the disk."""
    if not lpips_weights()[0].is_file():
        return None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity("alex").to(device)
    return lambda a, b: metric(a, b).item()


def aggregate(values: Sequence[float], classes: Sequence[str]) -> dict[str, Any]:
    """`mean_and_margin` of `values` over all clips and by class, and the values themselves.

    Args:
        classes: the class of each clip; empty without classes.
    """
    names = sorted(set(classes))
    own = {name: [v for v, c in zip(values, classes, strict=True) if c == name] for name in names}
    return {
        **mean_and_margin(values),
        "by_class": {name: mean_and_margin(own[name]) for name in names},
        "each": list(values),
    }


def distance_to_others(features: Tensor, twins: Tensor) -> float:
    """Fréchet distance of features (N, D) to the features of twins (N, D) with other seeds.

    The clips are split into every other one and the rest. Each half is compared with the twins of the other half, and
    the two distances are averaged. No clip meets its own twin, so a set that shares its noise with the twins gets no
    credit for that. The distance of the twins themselves shows how far apart equal sets are.
    """
    there, back = frechet_distance(features[::2], twins[1::2]), frechet_distance(features[1::2], twins[::2])
    return (there + back) / 2


def _relative_error(a: Tensor, b: Tensor) -> list[float]:
    """|a - b|_1 / |b|_1 of each row of a and b (B, ...); 0 where both are 0."""
    return ((a - b).abs().flatten(1).sum(1) / b.abs().flatten(1).sum(1).clamp(min=1e-8)).tolist()
