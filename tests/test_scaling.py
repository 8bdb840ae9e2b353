"""`tools/benchmark.py plan`: its memory is what a step takes here, its time is arithmetic, checked by hand."""

import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL

from configs import UserError, load_config
from diffusion import make_diffusion
from models import get_models
from models.macs import count_parameters, step_macs
from models.skip_cache import full_step
from tools import benchmark
from tools.benchmarks import scaling
from tools.benchmarks.options import DEFAULTS, ScalingPlan
from tools.benchmarks.training import random_batch, run_with, training_step
from tools.benchmarks.turns import peak_bytes

CPU = torch.device("cpu")
MIDDLE = [
    "model=Latte-skip", "num_classes=7", "hidden_size=192", "depth=12", "num_heads=4", "image_size=64",
    "dataset=ucf101_img", "use_image_num=2", "local_batch_size=2",
]  # fmt: skip


def plan(*overrides: str) -> ScalingPlan:
    return load_config(ScalingPlan, None, [*DEFAULTS["plan"], *overrides])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_counted_memory_of_a_training_step_is_the_measured_one(precision, checkpointing):
    cfg = plan(*MIDDLE, f"mixed_precision={precision}")
    model, diffusion = get_models(cfg), make_diffusion(cfg)
    optimizer, batch = torch.optim.AdamW(model.parameters(), fused=True), random_batch(cfg, model, diffusion, CPU)
    dtype = torch.float32 if precision == "no" else torch.bfloat16
    run = partial(run_with, model, "sdpa", checkpointing)
    step = partial(training_step, diffusion, batch, CPU, dtype, optimizer, run)
    step()
    assert scaling.training_bytes(cfg, 2, checkpointing)[1] == pytest.approx(peak_bytes(CPU, step), rel=0.02)


def test_the_counted_memory_of_sampling_is_the_measured_one():
    cfg = plan(*MIDDLE, "sampling_batch=2", "pretrained_model_path=pretrained/demo")
    model = get_models(cfg).to(torch.bfloat16)
    x, t, y = torch.randn(4, 16, 4, 8, 8), torch.full((4,), 500), torch.zeros(4, dtype=torch.long)
    with torch.no_grad():
        full = peak_bytes(CPU, partial(full_step, model, 1, x, t, y))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config("pretrained/demo/vae"))
        codec = scaling.LatentCodec(vae)
        decoding = peak_bytes(CPU, partial(codec.decode, torch.randn(2, 16, 4, 8, 8)))
    counted = scaling.sampling_bytes(cfg)
    assert counted[0] == pytest.approx(full, rel=0.1)
    assert 0.6 * decoding < counted[1] < 1.05 * decoding  # convolutions also have workspaces, which are not counted


def test_times_by_hand():
    """Four forward passes' worth of products with checkpointing; gradients in a ring within nodes, then across them."""
    shares = ["training_share=0.5", "vae_share=0.25", "overlap=0", "gpu_link_gbs=100", "node_link_gbs=10"]
    cfg = plan(*shares, "bf16_tflops=100", "fp32_tflops=50", "memory_gbs=1000", "gradient_checkpointing=True")
    step = scaling.training_step_seconds(cfg, encode_macs=10**11, gpus=16, nodes=2)
    weights = count_parameters(cfg)
    assert step["products"] == pytest.approx(4 * 4 * 2 * step_macs(cfg, stills=8).full / 50e12)
    assert step["vae"] == pytest.approx(4 * 24 * 2 * 1e11 / 12.5e12)
    assert step["update"] == pytest.approx(44e-12 * weights)
    assert step["network"] == pytest.approx(4e-9 * weights * (2 * 7 / 8 / 100 + 2 * 1 / 2 / 10))
    parts = sum(step[key] for key in ("products", "vae", "update", "network"))
    assert step["seconds"] == pytest.approx(parts) and step["reading"] == pytest.approx(4 / (8 * 56))
    slow = scaling.training_step_seconds(plan("read_clips=0.01", "num_workers=2"), 0, 1, 1)
    assert slow["seconds"] == slow["reading"] == pytest.approx(4 / 0.02) and slow["network"] == 0


def test_the_published_vae_is_counted():
    """83.7 million weights; half of torch's flops for a frame of 256 x 256."""
    with torch.device("meta"):
        codec = scaling.make_codec(plan("pretrained_model_path=/nowhere"))
        encode, decode = scaling.vae_macs(codec, plan("num_frames=1"))
    assert sum(p.numel() for p in codec.vae.parameters()) == pytest.approx(83.7e6, rel=1e-3)
    assert 1.2e11 < encode < 1.5e11 and 2.8e11 < decode < 3.4e11


def test_the_optimizer_is_that_of_the_options():
    """AdamW keeps two fp32 moments of each weight; Muon one, of its matrices; frozen weights have none."""
    cfg = plan(*MIDDLE)
    adamw, muon, skip = (
        scaling.training_bytes(replace(cfg, **changes), 1, False)[0]
        for changes in ({}, {"optimizer": "muon"}, {"train_only": "skip"})
    )
    assert adamw == pytest.approx(8 * count_parameters(cfg), rel=1e-3) and 0.5 < muon / adamw < 0.6
    assert 0 < skip < 0.2 * adamw


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="train_only: Latte has no skip branches"):
        scaling.describe(plan("model=Latte", "train_only=skip"))
    with pytest.raises(UserError, match="vae: a plan counts the VAEs of diffusers, not test_vae_runs:"):
        scaling.make_codec(plan("vae=test_vae_runs:Squares"))


def test_the_page(monkeypatch, tmp_path, capsys):
    argv = [*MIDDLE, "nodes=[1,2]", "gpu_memory=2.2", f"output={tmp_path}/plan.json", "read_clips=0.1"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "plan", *argv])
    benchmark.main()
    report, out = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert list(report["ways"]) == ["1 GPU", "8 GPUs", "16 GPUs, 2 nodes"]
    assert [name for name in report["sampling"] if "2 nodes" in name] == [
        f"{n}, 16 GPUs, 2 nodes" for n in ("uncached", "N2")
    ]
    one, eight = (report["sampling"][f"N2, {name}"]["clips_per_hour"] for name in ("1 GPU", "8 GPUs"))
    assert eight == pytest.approx(8 * one)
    assert "reading saturates first, busy 100%" in out and "computed, not measured" in out
