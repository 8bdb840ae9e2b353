"""tools/heldout_loss.py: checkpoints are compared on the same clips, timesteps and noise."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_random_weights

from configs import ROOT, UserError, load_config
from models import get_models
from tools import heldout_loss
from tools.heldout_loss import HeldoutConfig

SIZES = ["image_size=32", "num_frames=4", "num_classes=7", "hidden_size=16", "depth=8", "num_heads=2"]
TEST_CLIPS = ROOT / "datasets" / "demo" / "test"


@pytest.fixture(scope="module")
def cfg(tiny) -> HeldoutConfig:
    values = [
        "dataset=video_folder",
        "model=Latte-skip",
        *SIZES,
        f"data_path={TEST_CLIPS}",
        "frame_interval=1",
        "num_clips=3",
        "num_timesteps=2",
    ]
    return load_config(HeldoutConfig, None, [*values, f"pretrained_model_path={tiny.parent}"])


@pytest.fixture(scope="module")
def twins(cfg, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint with skips, and one without."""
    folder = tmp_path_factory.mktemp("twins")
    files = {"skip": folder / "skip.safetensors", "latte": folder / "latte.safetensors"}
    torch.manual_seed(0)
    for file, num_skips in zip(files.values(), (2, 0), strict=True):
        save_random_weights(get_models(replace(cfg, num_skips=num_skips)), file)
    return files


def test_equal_weights_have_equal_losses_and_others_do_not(cfg, twins):
    """The noise is that of the clip, whatever models look at it, and of the seed."""
    device = torch.device("cpu")
    skip, latte = (heldout_loss.load_model(cfg, str(file), device) for file in twins.values())
    assert (skip.num_skips, latte.num_skips) == (2, 0)
    losses = heldout_loss.measure_losses(cfg, {"a": skip, "b": latte, "c": skip}, device)
    assert losses["a"].shape == (3, 2) and torch.equal(losses["a"], losses["c"])
    assert not torch.allclose(losses["a"], losses["b"])
    alone = heldout_loss.measure_losses(cfg, {"b": latte}, device)["b"]
    assert torch.equal(alone, losses["b"])
    other = heldout_loss.measure_losses(replace(cfg, global_seed=1), {"b": latte}, device)["b"]
    assert not torch.allclose(other, alone)


def test_table_has_means_and_paired_differences():
    base = torch.tensor([[1.0, 3.0], [2.0, 4.0], [6.0, 8.0]])
    lines = heldout_loss.table({"a": base, "b": base + torch.tensor([[0.5], [0.5], [0.5]])}).splitlines()
    assert "loss of 3 clips" in lines[0] and "above a's" in lines[0]
    assert "4.0000 ±" in lines[2] and "4.5000 ±" in lines[3] and "0.5000 ± 0.0000" in lines[3]


def test_program(cfg, twins, tiny, monkeypatch, capsys):
    models = [text for name, file in twins.items() for text in ("--model", f"{name}={file}")]
    options = [*SIZES, f"data_path={TEST_CLIPS}", f"pretrained_model_path={tiny.parent}"]
    options += ["num_skips=null", "learn_sigma=True"]  # not the demo's
    argv = ["heldout_loss.py", *models, "num_clips=2", "num_timesteps=2", *options]
    monkeypatch.setattr(sys, "argv", argv)
    heldout_loss.main()
    assert "loss of 2 clips" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*argv, "num_clips=1"])
    with pytest.raises(UserError, match="num_clips: 1 is less than 2"):
        heldout_loss.main()
    monkeypatch.setattr(sys, "argv", ["heldout_loss.py", "--model", "skip", *options])
    with pytest.raises(UserError, match="expected NAME=CKPT"):
        heldout_loss.main()
