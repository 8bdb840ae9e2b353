"""sample/similarity.py against scikit-image, and every program that compares with clips that show nothing."""

import json
import sys

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from configs import ROOT
from sample import sample
from sample.similarity import PSNR_LIMIT, frame_psnr, psnr, ssim
from tools import calibrate, evaluate, fidelity, sweep


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


SMALL = ["num_clips=4", "num_sampling_steps=4"]


@pytest.mark.parametrize(
    ("program", "options", "file", "notes"),
    [
        (sample, ["--compare", "--cache", "N2"], None, ["3 of 3 reference clips are", "3 cached clips are those of"]),
        (fidelity, ["--cache", "N2", *SMALL, "controls=False"], "fidelity.md", ["4 of 4 reference", "4 cached clips"]),
        (sweep, ["--cache", "N2", *SMALL, "reference=ddim-5"], "sweep.md", ["8 of 8 reference", "4 cached clips"]),
        (calibrate, ["budget=0.5", "num_calibration=2", "num_clips=2", "num_climbs=0"], "calibrate.md", ["4 of 4 ref"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_comparison_with_clips_of_one_color_says_so(
    flat, tmp_path, monkeypatch, capsys, program, options, file, notes
):
    """It compares on: an equal clip without motion has no error of motion."""
    output = "save_video_path" if program is sample else "output"
    monkeypatch.setattr(sys, "argv", ["program", "--config", str(flat), *options, f"{output}={tmp_path}/out"])
    program.main()
    text = capsys.readouterr().out
    assert all(note in text for note in notes) and "nearly of one color, so metrics of their pixels say nothing" in text
    if file:
        assert notes[0] in (tmp_path / "out" / file).read_text()
    if program is fidelity:
        row = json.loads((tmp_path / "out/fidelity.json").read_text())["rows"][1]
        assert row["flat"] == [True] * 4 and row["twin"]["motion_error"]["mean"] == 0


def test_an_evaluation_counts_clips_of_one_color(flat, tmp_path, monkeypatch, capsys):
    argv = [
        f"generate={flat}",
        "num_fake=3",
        "metrics=flickering,proxy",
        f"output={tmp_path}/out.json",
        "num_workers=0",
    ]
    argv += [f"real_path={ROOT}/datasets/demo/test", "real_stride=1", "num_real=2", "image_size=32", "num_frames=4"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv, "feature_path="])
    evaluate.main()
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["real"]["flat"], record["fake"]["flat"]) == (0, 3)
    assert "fake: 3 of 3 clips are nearly of one color; the model may be untrained" in capsys.readouterr().out
