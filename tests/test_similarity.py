"""sample/similarity.py against scikit-image."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from sample.similarity import PSNR_LIMIT, frame_psnr, psnr, ssim


def clips(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(F, 3, H, W) in [-1, 1]: a smooth video, and the same with noise that grows from frame to frame."""
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.interpolate(torch.rand(3, 3, 9, 9, generator=generator) * 2 - 1, size, mode="bicubic")
    noise = torch.randn(a.shape, generator=generator) * torch.tensor([0.02, 0.1, 0.3])[:, None, None, None]
    return a.clamp(-1, 1), (a + noise).clamp(-1, 1)


def as_images(clip: Tensor) -> np.ndarray:
    """(F, H, W, 3) in [0, 1], float64."""
    return (clip.double().movedim(1, -1).numpy() + 1) / 2


@pytest.mark.parametrize("size", [(64, 64), (32, 48), (11, 16)])
def test_ssim_is_scikit_images(size):
    """With the settings of Wang et al. 2004. Windows that reach over the border do not count: the border is noisy."""
    a, b = clips(size)
    settings = dict(channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    expected = np.mean(
        [structural_similarity(x, y, **settings) for x, y in zip(as_images(a), as_images(b), strict=True)]
    )
    assert ssim(a, b) == pytest.approx(expected, abs=1e-6)
    assert ssim(a, a) == pytest.approx(1, abs=1e-9)


def test_psnr_is_scikit_images():
    """That of a clip is of its total squared error; the mean over frames is another, higher number."""
    a, b = clips((32, 48))
    x, y = as_images(a), as_images(b)
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), rel=1e-5)
    each = [peak_signal_noise_ratio(*pair, data_range=1) for pair in zip(x, y, strict=True)]
    assert frame_psnr(a, b) == pytest.approx(np.mean(each), rel=1e-5)
    assert frame_psnr(a, b) > psnr(a, b) + 1
    assert psnr(a, a) == frame_psnr(a, a) == PSNR_LIMIT
