"""The recorded outputs of the original Skip-DiT code: weights load strictly, and every output is reproduced.

Tolerance is the relative L2 error: 1e-5 for a forward or a loss, 1e-4 for a sampling loop.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion import create_diffusion
from diffusion.guidance import Guided
from models.latte import Latte
from models.skip_cache import SkipCache, interval_plan

REFERENCE = Path(__file__).parent / "data" / "reference"
OUTPUTS = load_file(REFERENCE / "outputs.safetensors")
CONDITIONS = ["cond", "uncond"]


def load(name: str, **options) -> Latte:
    """The original's weights in our model, strictly."""
    size = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=16, num_heads=2, num_frames=4, num_classes=5)
    model = Latte(**{"depth": 28, "num_skips": 7, **size, **options}).eval()
    state = load_file(REFERENCE / f"{name}.safetensors")
    if name == "partial":  # the original numbers the skips of this variant from the outside
        state = {reversed_skip(key): value for key, value in state.items()}
    model.load_state_dict(state, strict=True)
    return model


def reversed_skip(key: str) -> str:
    prefix, _, rest = key.partition(".")
    return f"{prefix}.{1 - int(rest[0])}{rest[1:]}" if prefix.startswith("skip_") else key


def load_skip(condition: str) -> tuple[Latte, torch.Tensor | None]:
    """The skip model and the labels of its loops."""
    if condition == "cond":
        return load("skip_cond"), torch.tensor([2, 4])
    return load("skip_uncond", num_classes=None), None


def error(ours: torch.Tensor, key: str) -> float:
    reference = OUTPUTS[key].double()
    assert ours.shape == reference.shape
    return float((ours.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("mode", ["sdpa", "math"])
@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_forward(condition, mode):
    model, _ = load_skip(condition)
    model.set_attention(mode)
    y = OUTPUTS["cond/y"] if condition == "cond" else None
    out = model(OUTPUTS[f"{condition}/x"], OUTPUTS[f"{condition}/t"], y)
    assert error(out, f"{condition}/forward") < 1e-5


@torch.no_grad()
def test_forward_of_plain_and_partial_skips():
    t, y = torch.tensor([37, 641]), torch.tensor([3, 1])
    plain = load("plain12", depth=12, num_skips=0)
    assert error(plain(OUTPUTS["cond/x"], t, y), "plain/forward") < 1e-5
    partial = load("partial", num_skips=2)
    assert error(partial(OUTPUTS["joint/x"], t, y, OUTPUTS["joint/y_image"]), "partial/forward") < 1e-5


@torch.no_grad()
def test_forward_of_clips_with_stills():
    """Frames past num_frames are stills with labels of their own; without a class condition they need none."""
    t, y = OUTPUTS["cond/t"], OUTPUTS["cond/y"]
    joint = load("skip_cond")(OUTPUTS["joint/x"], t, y, OUTPUTS["joint/y_image"])
    assert error(joint, "joint/forward") < 1e-5
    assert error(load("skip_uncond", num_classes=None)(OUTPUTS["joint/x"], t), "joint/forward_uncond") < 1e-5


@torch.no_grad()
def test_guidance():
    """Two rows and scale 7 give the four rows of the original, which runs both halves on the same x."""
    guided = Guided(load("skip_cond"), scale=7.0, null_label=5)
    out = guided(OUTPUTS["cond/x"], torch.tensor([400, 400]), torch.tensor([3, 1]))
    reference = OUTPUTS["cond/cfg7"][:2]
    assert float((out - reference).norm() / reference.norm()) < 1e-5


@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_losses_and_posterior(condition):
    model, y = load_skip(condition)
    diffusion = create_diffusion("")
    x, t = OUTPUTS[f"{condition}/loss_x"], OUTPUTS[f"{condition}/loss_t"]
    terms = diffusion.training_losses(model, x, t, {"y": y}, noise=OUTPUTS[f"{condition}/loss_noise"])
    for name in ("mse", "vb", "loss"):
        assert error(terms[name], f"{condition}/loss_{name}") < 1e-5
    moments = diffusion.p_mean_variance(model, x, t, clip_denoised=False, model_kwargs={"y": y})
    for name in ("mean", "variance", "log_variance", "pred_xstart"):
        assert error(moments[name], f"{condition}/pmv_{name}") < 1e-5


def ddim50(denoiser, condition: str, y: torch.Tensor | None) -> torch.Tensor:
    z = OUTPUTS[f"{condition}/z"]
    return create_diffusion("50").ddim_sample_loop(denoiser, z.shape, z, clip_denoised=False, model_kwargs={"y": y})


def plan50(interval: int) -> list[bool]:
    return interval_plan(create_diffusion("50").timestep_map[::-1], interval)


@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_ddim_loop(condition):
    model, y = load_skip(condition)
    assert error(ddim50(model, condition, y), f"{condition}/ddim50") < 1e-4


@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_ddpm_loop_draws_the_original_noise(condition):
    model, y = load_skip(condition)
    z = OUTPUTS[f"{condition}/z"]
    torch.manual_seed(11)
    out = create_diffusion("25").p_sample_loop(model, z.shape, z, clip_denoised=False, model_kwargs={"y": y})
    assert error(out, f"{condition}/ddpm25_seeded") < 1e-4


@pytest.mark.parametrize(("interval", "depth"), [(2, 1), (2, 3), (3, 1), (4, 2), (5, 1)])
@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_cached_loop(condition, interval, depth):
    model, y = load_skip(condition)
    out = ddim50(SkipCache(model, plan50(interval), depth), condition, y)
    assert error(out, f"{condition}/ddim50_cache_N{interval}_b{depth}") < 1e-4


@pytest.mark.parametrize("interval", [2, 3])
@torch.no_grad()
def test_cached_loop_with_guidance(interval):
    model, y = load_skip("cond")
    out = ddim50(Guided(SkipCache(model, plan50(interval)), scale=4.0, null_label=5), "cond", y)
    assert error(out, f"cond/ddim50_cfg4_cache_N{interval}") < 1e-4
