"""The outputs of the original code in tests/data/reference, computed by ours on any device and in any type."""

from collections.abc import Iterator
from functools import partial

import torch
from safetensors.torch import load_file
from torch import Tensor

from configs import ROOT
from diffusion import create_diffusion
from diffusion.guidance import Guided
from models.hardware import fastest_attention
from models.latte import Latte
from models.skip_cache import SkipCache, interval_plan

LIMITS = {  # relative L2 errors of a forward pass or loss, and of a sampling loop
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (5e-2, 5e-2),  # a CPU's largest are 2.2e-2 here, and in fp16 2.7e-3
    torch.float16: (6e-3, 6e-3),
}
REFERENCE = ROOT / "tests" / "data" / "reference"
CACHED = ((2, 1), (2, 3), (3, 1), (4, 2), (5, 1))  # interval, depth
SIZE = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=16, num_heads=2, num_frames=4)


def load_reference(name: str, device: torch.device, dtype: torch.dtype, **options: int | None) -> Latte:
    """Returns our model with the original's weights, loaded strictly."""
    model = Latte(**SIZE | dict(depth=28, num_skips=7, num_classes=5) | options).eval()
    state = load_file(REFERENCE / f"{name}.safetensors")
    if name == "partial":  # the original numbers the two skips of this variant from the outside
        inside_out = {"0": "1", "1": "0"}
        parts = {key: key.split(".") for key in state if key.startswith("skip_")}
        state |= {f"{kind}.{inside_out[i]}.{'.'.join(rest)}": state[key] for key, (kind, i, *rest) in parts.items()}
    model.load_state_dict(state, strict=True)
    model.set_attention(fastest_attention(device, dtype))
    return model.to(device, dtype)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """Returns the relative L2 error of tensors that must have one shape."""
    assert ours.shape == reference.shape, f"{tuple(ours.shape)}, not {tuple(reference.shape)}"
    ours, reference = ours.double().cpu(), reference.double().cpu()
    return float((ours - reference).norm() / reference.norm())


def is_loop(key: str) -> bool:
    """Returns whether a recorded output is that of a sampling loop."""
    return "/dd" in key


@torch.no_grad()
def conformance_errors(device: torch.device, dtype: torch.dtype, loops: bool = True) -> Iterator[tuple[str, float]]:
    """Yields the name of each recorded output and the relative error of ours.

    The DDPM loop is left out: its noise comes from the global generator of the device, and was recorded on a CPU.

    Args:
        loops: also those of the sampling loops.
    """
    recorded = load_file(REFERENCE / "outputs.safetensors", device=str(device))
    load = partial(load_reference, device=device, dtype=dtype)
    everything, fifty = create_diffusion(""), create_diffusion("50")
    labels = {name: torch.tensor(y, device=device) for name, y in [("cond", [2, 4]), ("guided", [3, 1])]}
    t = torch.tensor([37, 641], device=device)

    def error(key: str, ours: Tensor) -> tuple[str, float]:
        return key, relative_error(ours, recorded[key])

    plain, partial_skips = load("plain12", depth=12, num_skips=0), load("partial", num_skips=2)
    yield error("plain/forward", plain(recorded["cond/x"], t, labels["guided"]))
    yield error("partial/forward", partial_skips(recorded["joint/x"], t, labels["guided"], recorded["joint/y_image"]))
    for condition, num_classes in (("cond", 5), ("uncond", None)):
        model = load(f"skip_{condition}", num_classes=num_classes)
        given = {name: recorded.get(f"{condition}/{name}") for name in ("x", "t", "y", "z", "loss_x", "loss_t")}
        joint, loop_labels = recorded["joint/x"], {"y": labels.get(condition)}
        yield error(f"{condition}/forward", model(given["x"], given["t"], given["y"]))
        if num_classes:
            joint_labels = given["y"], recorded["joint/y_image"]
            yield error("joint/forward", model(joint, recorded["cond/t"], *joint_labels))
            guided = Guided(model, scale=7.0, null_label=5)(given["x"], torch.full_like(t, 400), labels["guided"])
            yield "cond/cfg7", relative_error(guided, recorded["cond/cfg7"][:2])  # the original's has both halves
        else:
            yield error("joint/forward_uncond", model(joint, recorded["cond/t"]))

        noise = recorded[f"{condition}/loss_noise"]
        terms = everything.training_losses(model, given["loss_x"], given["loss_t"], loop_labels, noise)
        moments = everything.p_mean_variance(model, given["loss_x"], given["loss_t"], False, loop_labels)
        for kind, values in (("loss", terms), ("pmv", moments)):
            for name, value in values.items():
                yield error(f"{condition}/{kind}_{name}", value)

        if not loops:
            continue
        plan = partial(interval_plan, fifty.timestep_map[::-1])
        denoisers = {"ddim50": model}
        denoisers |= {f"ddim50_cache_N{n}_b{depth}": SkipCache(model, plan(n), depth) for n, depth in CACHED}
        if num_classes:
            for n in (2, 3):
                denoisers[f"ddim50_cfg4_cache_N{n}"] = Guided(SkipCache(model, plan(n)), scale=4.0, null_label=5)
        for name, denoiser in denoisers.items():
            z = given["z"]
            ours = fifty.ddim_sample_loop(denoiser, z.shape, z, clip_denoised=False, model_kwargs=loop_labels)
            yield error(f"{condition}/{name}", ours)
