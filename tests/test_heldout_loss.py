"""tools/heldout_loss.py: checkpoints are compared on the same clips, timesteps and noise."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_random_weights

from configs import ROOT, UserError, load_config
from datasets import collate, get_dataset
from diffusion import make_diffusion
from models import get_models, made_of
from models.autoencoder import load_codec
from models.checkpoint import save_checkpoint
from tools import heldout_loss
from tools.common import training
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


def test_x0_errors_are_those_of_the_training_log(cfg, twins):
    """The program measures what `training.validate` logs, on the same clips and noise, and tells each level."""
    cfg = replace(cfg, measure="x0", log_snrs=[-2.0, 0.0, 4.0])
    model = heldout_loss.load_model(cfg, str(twins["skip"]), torch.device("cpu"))
    errors = heldout_loss.measure_losses(cfg, {"a": model}, torch.device("cpu"))["a"]
    assert errors.shape == (3, 3) and (errors > 0).all()
    clips = get_dataset(cfg)
    index = [0, round((len(clips) - 1) / 2), len(clips) - 1]
    batch = collate([clips[0, i] for i in index])
    noise = torch.Generator().manual_seed(cfg.global_seed)
    x = load_codec(cfg, torch.device("cpu")).encode(batch["video"])
    held = dict(
        x_start=x,
        t=torch.zeros(3, dtype=torch.int64),
        model_kwargs={"y": batch["label"]},
        noise=torch.cat([torch.randn(x[:1].shape, generator=noise) for _ in range(3)]),
    )
    logged = training.validate(model, make_diffusion(cfg), held, cfg.log_snrs)
    assert logged["x0_mse"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert [logged[f"x0_mse_{each}"] for each in (-2, 0, 4)] == pytest.approx(errors.mean(0).tolist(), rel=1e-4)
    head, _, row = heldout_loss.table({"a": errors}, cfg.log_snrs).splitlines()
    assert "x_0 error of 3 clips" in head and all(f" {level} |" in head for level in ("-2", "+0", "+4"))
    assert row.endswith(f"{errors.mean(0)[2]:.4f} |")


def test_x0_errors_compare_processes(cfg, twins, tiny, tmp_path, monkeypatch, capsys):
    """Each model is measured in the process of its own weights; their losses do not compare, and are refused."""
    flow = replace(
        cfg, process="flow", prediction="v", learn_sigma=False, num_skips=2, measure="x0", log_snrs=[-1.0, 2.0]
    )
    torch.manual_seed(3)
    model, file = get_models(flow), tmp_path / "flow.pt"
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(file, ema=model.state_dict(), options=made_of(flow, None))
    alone = heldout_loss.measure_losses(flow, {"flow": model.eval()}, torch.device("cpu"))["flow"]

    options = [*SIZES, f"data_path={TEST_CLIPS}", f"pretrained_model_path={tiny.parent}", "num_clips=3"]
    options += ["model=Latte-B/2-skip", "num_skips=null", "learn_sigma=True", "prediction=eps", "log_snrs=[-1,2]"]
    argv = ["heldout_loss.py", "--model", f"ddpm={twins['skip']}", "--model", f"flow={file}", *options]
    monkeypatch.setattr(sys, "argv", [*argv, "measure=x0"])
    heldout_loss.main()
    *_, row = capsys.readouterr().out.splitlines()
    assert row.startswith("| flow") and row.endswith(f"{alone.mean(0)[1]:.4f} |")
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match="process=gaussian, not flow"):
        heldout_loss.main()


def test_program(cfg, twins, tiny, monkeypatch, capsys):
    models = [text for name, file in twins.items() for text in ("--model", f"{name}={file}")]
    options = [*SIZES, f"data_path={TEST_CLIPS}", f"pretrained_model_path={tiny.parent}"]
    options += ["model=Latte-B/2-skip", "num_skips=null", "learn_sigma=True"]  # not the demo's
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
