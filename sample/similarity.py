"""How alike two videos are, pixel by pixel."""

from torch import Tensor

PSNR_LIMIT = 100.0  # dB; of clips that are equal, so that means stay finite


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two clips (F, 3, H, W) in [-1, 1], over all pixels: dB, at most PSNR_LIMIT."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # slow to import, as the other below

    return min(peak_signal_noise_ratio((a + 1) / 2, (b + 1) / 2, data_range=1.0).item(), PSNR_LIMIT)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two clips (F, 3, H, W) in [-1, 1], the mean over frames."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure((a + 1) / 2, (b + 1) / 2, data_range=1.0).item()
