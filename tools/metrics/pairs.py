"""Metrics between clips and their twins, which are the same seeds and labels sampled another way.

Letters: B batch, F frames, C channels of the latents, h = H / 8, N clips of a set, D features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sample.similarity import psnr, ssim
from tools.metrics.scores import frechet_distance
from tools.metrics.statistics import mean_and_margin

PAIR_METRICS = {  # -> title in tables, digits
    "relative_l1": ("relative L1", 4),
    "psnr": ("PSNR, dB", 1),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "flicker": ("flicker", 4),
}

Lpips = Callable[[Tensor, Tensor], float]  # two clips (F, 3, H, W) in [-1, 1]


def compare(
    latents: Tensor, videos: Tensor, twin_latents: Tensor, twin_videos: Tensor, lpips: Lpips | None = None
) -> dict[str, list[float]]:
    """The metrics of each clip a against its twin b: latents (B, F, C, h, w), videos (B, F, 3, H, W) in [-1, 1].

    Returns:
        A value for each clip, by metric.
        relative_l1: |a - b|_1 / |b|_1 of the latents.
        psnr, ssim, lpips: of the videos; SSIM and LPIPS are means over frames.
        flicker: mean |Da - Db| / mean |Db| of the videos, where D is the difference of neighbouring frames; 0 if a and
            b move alike, 1 if a is still.
    """
    change, twin_change = videos.diff(dim=1), twin_videos.diff(dim=1)  # (B, F - 1, 3, H, W)
    pairs = list(zip(videos, twin_videos, strict=True))
    metrics = {
        "relative_l1": _relative_error(latents, twin_latents),
        "psnr": [psnr(a, b) for a, b in pairs],
        "ssim": [ssim(a, b) for a, b in pairs],
        "flicker": _relative_error(change, twin_change),
    }
    return metrics | ({"lpips": [lpips(a, b) for a, b in pairs]} if lpips else {})


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
    """|a - b|_1 / |b|_1 of each row of a and b (B, ...)."""
    return ((a - b).abs().flatten(1).sum(1) / b.abs().flatten(1).sum(1)).tolist()
