"""Sampling: one loop from noise to data, and one function per method that makes its step.

A sampler knows a denoiser only as a callable. Nothing in the DDPM and DDIM loops waits for the device or copies to it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from configs import UserError

if TYPE_CHECKING:
    from diffusion import Diffusion

Step = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]  # (x_t, t, p(x_{t-1} | x_t)) -> x_{t-1}


def randn_per_sample(
    shape: Sequence[int],
    generators: Sequence[torch.Generator] | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of a shape (B, ...), sample i drawn from generators[i] whatever the batch around it.

    None draws from the device's global generator, the same numbers as torch.randn_like.
    """
    if generators is None:
        return torch.randn(shape, device=device, dtype=dtype)
    assert len(generators) == shape[0], f"{len(generators)} generators for {shape[0]} samples"
    return torch.stack([torch.randn(shape[1:], generator=g, device=device, dtype=dtype) for g in generators])


def ddpm(diffusion: "Diffusion", draw: Callable[[], Tensor], device: torch.device, eta: float) -> Step:
    """Ancestral sampling, Ho et al. 2020, algorithm 2; also the last step draws, and multiplies by zero."""

    def step(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
        noise_scale = torch.exp(0.5 * p["log_variance"]) * (diffusion.at(t, x).sigma_prev > 0)
        return p["mean"] + noise_scale * draw()

    return step


def ddim(diffusion: "Diffusion", draw: Callable[[], Tensor], device: torch.device, eta: float) -> Step:
    """Song et al. 2021, eq. 12: eta = 0 is deterministic and draws nothing, eta = 1 has the posterior's variance."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: want a number from 0 (deterministic) to 1 (as random as DDPM)")

    def step(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
        c = diffusion.at(t, x)
        eps = (x - c.alpha * p["pred_xstart"]) / c.sigma
        x = c.alpha_prev * p["pred_xstart"] + c.sigma_prev * torch.sqrt(1 - eta**2 * c.fresh) * eps
        return x + eta * c.sigma_prev * torch.sqrt(c.fresh) * draw() if eta else x

    return step


def multistep(name: str, diffusion: "Diffusion", draw: Callable[[], Tensor], device: torch.device, eta: float) -> Step:
    """A second-order solver of diffusers, by class name, over our timesteps and noise levels; deterministic.

    It is fed our estimate of x_0, so every kind of prediction, clipping and a learned variance mean here what they
    mean to DDIM. UniPC solves a 2 x 2 system each step, and torch.linalg.solve waits for a GPU to report its success.
    """
    import diffusers

    steps = diffusion.num_timesteps
    solver = getattr(diffusers, name)(num_train_timesteps=steps, prediction_type="sample", timestep_spacing="trailing")
    solver.set_timesteps(steps)  # trailing: steps - 1 ... 0, every step of the respaced process
    solver.set_begin_index(0)  # else the first step searches for its timestep
    # All that the solvers read of a noise process. Made from fp32 betas these would be off where a beta is close to 1;
    # left on the CPU UniPC would copy them at each step.
    sigmas = np.append(np.sqrt(1 / diffusion.alphas_cumprod - 1)[::-1], 0.0)
    solver.sigmas = torch.from_numpy(sigmas).float().to(device)

    def step(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
        # Our lists end at timestep 0, a far larger step in log SNR than the one before it: a second-order step there
        # extrapolates so far that with 20 steps the solvers fall behind DDIM (on Gaussian data, where the exact result
        # is known). So it is first order.
        if solver.step_index == steps - 2:
            solver.lower_order_nums = 0
        return solver.step(p["pred_xstart"], t, x).prev_sample

    return step


SAMPLERS: dict[str, Callable[..., Step]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmsolver++": partial(multistep, "DPMSolverMultistepScheduler"),
    "unipc": partial(multistep, "UniPCMultistepScheduler"),
}


@torch.no_grad()
def sample_loop_progressive(
    diffusion: "Diffusion",
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    *,
    method: str,
) -> Iterator[dict[str, Tensor]]:
    """Sample from noise to data and yield {"sample", "pred_xstart"} after each step, (B, ..., C, H, W) in fp32.

    model: called as model(x, t, **model_kwargs) with t (B,) the original timesteps, the last one first
    noise: the starting point (B, ..., C, H, W); drawn when None
    clip_denoised: clip the estimates of x_0 to [-1, 1]; right for pixels, wrong for latents
    device: where to sample; None: where `noise` is, or torch's default device
    eta: DDIM's randomness, 0 ... 1; the other methods have none to choose
    generators: one per sample, on the sampling device, for every draw; None: the global generator
    method: one of SAMPLERS, else UserError
    """
    if method not in SAMPLERS:
        raise UserError(f'unknown sample_method "{method}"; valid are {", ".join(SAMPLERS)}')
    x = randn_per_sample(shape, generators, device) if noise is None else noise.to(device, torch.float32)
    step = SAMPLERS[method](diffusion, partial(randn_per_sample, x.shape, generators, x.device), x.device, eta)
    diffusion.tables(x.device)  # copied now, not in the loop
    for i in tqdm(range(diffusion.num_timesteps)[::-1], desc=method, disable=not progress):
        t = torch.full((len(x),), i, device=x.device)  # (B,)
        p = diffusion.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        x = step(x, t, p)
        yield {"sample": x, "pred_xstart": p["pred_xstart"]}


def sample_loop(diffusion: "Diffusion", *args: Any, **kwargs: Any) -> Tensor:
    """The finished samples (B, ..., C, H, W) of sample_loop_progressive, which says what the arguments are."""
    for out in sample_loop_progressive(diffusion, *args, **kwargs):
        sample = out["sample"]
    return sample
