"""PSNR and SSIM of two videos."""

from torch import Tensor

PSNR_LIMIT = 100.0  # dB; that of equal clips, so that means are finite


def psnr(a: Tensor, b: Tensor) -> float:
    """Returns the peak signal-to-noise ratio of two clips (F, 3, H, W) in [-1, 1] in dB, at most PSNR_LIMIT."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # slow to import

    return min(peak_signal_noise_ratio((a + 1) / 2, (b + 1) / 2, data_range=1.0).item(), PSNR_LIMIT)


def ssim(a: Tensor, b: Tensor) -> float:
    """Returns the structural similarity of two clips (F, 3, H, W) in [-1, 1], the mean over their frames."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure((a + 1) / 2, (b + 1) / 2, data_range=1.0).item()
