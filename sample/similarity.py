"""PSNR and SSIM of two videos, and when they say nothing."""

from collections.abc import Iterable

from torch import Tensor

PSNR_LIMIT = 100.0  # dB; that of equal clips, so that means are finite
SSIM_BORDER = 5  # half of SSIM's window of 11 pixels: nearer to the edge, the window would need padding

FLAT = 0.02  # standard deviation of a clip in [-1, 1], 2.5 of 255 levels, below which it shows nothing
TOO_ALIKE = 80.0  # dB; pixels rounded to 8 bits are 59 dB from themselves
UNTRAINED = "the model may be untrained, or its average young: weights=model samples the weights themselves"


def psnr(a: Tensor, b: Tensor) -> float:
    """Returns the peak signal-to-noise ratio of two clips (F, 3, H, W) in [-1, 1] in dB, at most PSNR_LIMIT.

    It is that of the clip's total squared error. A mean of the frames' own ratios (`frame_psnr`) is never lower.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # slow to import

    return min(peak_signal_noise_ratio((a + 1) / 2, (b + 1) / 2, data_range=1.0).item(), PSNR_LIMIT)


def frame_psnr(a: Tensor, b: Tensor) -> float:
    """Returns the mean over frames of `psnr`, as papers on caches have it."""
    return sum(psnr(x[None], y[None]) for x, y in zip(a, b, strict=True)) / len(a)


def ssim(a: Tensor, b: Tensor) -> float:
    """Returns the structural similarity of two clips (F, 3, H, W) in [-1, 1], the mean over their frames.

    It is that of Wang et al. 2004: Gaussian windows of 11 pixels, sigma 1.5, only where they lie inside the frame.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = (a.double() + 1) / 2, (b.double() + 1) / 2
    _, full = structural_similarity_index_measure(x, y, data_range=1.0, return_full_image=True)  # (F, 3, H, W)
    inside = slice(SSIM_BORDER, -SSIM_BORDER)  # torchmetrics pads the border by reflection, and counts it
    return full[..., inside, inside].mean().item()


def is_flat(clip: Tensor) -> bool:
    """Returns whether a clip (F, 3, H, W), uint8 or in [-1, 1], is nearly of one color.

    Likeness to such a clip means nothing. The color channel that varies most decides.
    """
    scale = 1.0 if clip.is_floating_point() else 127.5
    return clip.float().std((0, 2, 3)).max().item() < FLAT * scale


def doubts(flat: Iterable[bool], psnrs: Iterable[float] = ()) -> list[str]:
    """Returns why similarities to reference clips tell nothing of a sampler, a sentence each; often none.

    Args:
        flat: `is_flat` of each reference clip.
        psnrs: of cached clips to their references, in dB.
    """
    flat, alike = list(flat), sum(value >= TOO_ALIKE for value in psnrs)
    found = [f"{sum(flat)} of {len(flat)} reference clips are nearly of one color"] * any(flat)
    found += [f"{alike} cached clips are those of the uncached run to {TOO_ALIKE:g} dB"] * bool(alike)
    return [f"{each}, so metrics of their pixels say nothing of a sampler; {UNTRAINED}" for each in found]
