"""The recorded outputs of the original Skip-DiT code: weights load strictly, and every output is reproduced.

Tolerance is the relative L2 error: 1e-5 for a forward or a loss, 1e-4 for a sampling loop.
"""

import pytest
import torch
from safetensors.torch import load_file

from diffusion import create_diffusion
from models.latte import Latte
from tools.benchmarks.conformance import LIMITS, REFERENCE, conformance_errors, is_loop, load_reference, relative_error

OUTPUTS = load_file(REFERENCE / "outputs.safetensors")
CPU = torch.device("cpu")
CONDITIONS = ["cond", "uncond"]
INPUTS = {"x", "t", "y", "y_image", "z", "loss_x", "loss_t", "loss_noise"}
DDPM = [f"{condition}/ddpm25_seeded" for condition in CONDITIONS]
RECORDED = [key for key in OUTPUTS if not key.startswith("diff/") and key.split("/")[1] not in INPUTS]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    """The error of each of our outputs, in fp32 on a CPU."""
    return dict(conformance_errors(CPU, torch.float32))


def load_skip(condition: str) -> tuple[Latte, torch.Tensor | None]:
    """The skip model and the labels of its loops."""
    model = load_reference(f"skip_{condition}", CPU, torch.float32, num_classes=5 if condition == "cond" else None)
    return model, torch.tensor([2, 4]) if condition == "cond" else None


def test_the_limits_are_those_promised():
    assert LIMITS[torch.float32] == (1e-5, 1e-4)
    assert {key for key in RECORDED if is_loop(key)} >= {"cond/ddim50", "uncond/ddim50_cache_N2_b3", *DDPM}
    assert not any(is_loop(key) for key in RECORDED if "forward" in key or "loss" in key or "pmv" in key)


@pytest.mark.parametrize("key", [key for key in RECORDED if key not in DDPM])
def test_output(key, errors):
    """Forwards with and without stills and skips, guidance, losses, moments, and DDIM loops, plain and cached."""
    assert errors[key] < LIMITS[torch.float32][is_loop(key)]


def test_an_error_is_seen(monkeypatch):
    """The comparison is no formality: weights that are 1 % off fail."""
    monkeypatch.setattr(Latte, "init_weights", lambda self: self.register_forward_hook(lambda m, x, out: out * 1.01))
    errors = dict(conformance_errors(CPU, torch.float32, loops=False))
    assert min(error for key, error in errors.items() if "forward" in key or key == "cond/cfg7") > 9e-3
    with pytest.raises(AssertionError, match=r"\(1, 3\), not \(2, 3\)"):
        relative_error(torch.zeros(1, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_forward_with_plain_maths_attention(condition):
    model, _ = load_skip(condition)
    model.set_attention("math")
    y = OUTPUTS["cond/y"] if condition == "cond" else None
    out = model(OUTPUTS[f"{condition}/x"], OUTPUTS[f"{condition}/t"], y)
    assert relative_error(out, OUTPUTS[f"{condition}/forward"]) < 1e-5


@pytest.mark.parametrize("condition", CONDITIONS)
@torch.no_grad()
def test_ddpm_loop_draws_the_original_noise(condition):
    model, y = load_skip(condition)
    z = OUTPUTS[f"{condition}/z"]
    torch.manual_seed(11)
    out = create_diffusion("25").p_sample_loop(model, z.shape, z, clip_denoised=False, model_kwargs={"y": y})
    assert relative_error(out, OUTPUTS[f"{condition}/ddpm25_seeded"]) < 1e-4
