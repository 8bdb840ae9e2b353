"""Sampling: one loop from noise to data, and for each sampler a function that makes its step.

The denoiser is any callable. The DDPM and DDIM loops neither wait for the device nor copy to it.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from configs import UserError, choice

if TYPE_CHECKING:
    from diffusion import Diffusion

T = TypeVar("T")
Step = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]  # (x_t, t, p(x_{t-1} | x_t)) -> x_{t-1}


def randn_per_sample(
    shape: Sequence[int],
    generators: Sequence[torch.Generator] | None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Returns standard normal noise of shape (B, ...) in fp32; sample i is drawn from generators[i] alone.

    None draws from the device's global generator, and gives the same numbers as torch.randn_like.
    """
    if generators is None:
        return torch.randn(shape, device=device, dtype=torch.float32)
    assert len(generators) == shape[0], f"{len(generators)} generators for {shape[0]} samples"
    draws = [torch.randn(shape[1:], generator=g, device=device, dtype=torch.float32) for g in generators]
    return torch.stack(draws)


def ddpm(diffusion: "Diffusion", draw: Callable[[], Tensor], device: torch.device, eta: float) -> Step:
    """Returns the step of ancestral sampling, Ho et al. 2020, algorithm 2; the last step multiplies its draw by 0."""

    def step(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
        noise_scale = torch.exp(0.5 * p["log_variance"]) * (diffusion.at(t, x).sigma_prev > 0)
        return p["mean"] + noise_scale * draw()

    return step


def ddim(diffusion: "Diffusion", draw: Callable[[], Tensor], device: torch.device, eta: float) -> Step:
    """Returns DDIM's step, Song et al. 2021, eq. 12; eta = 0 draws no noise, eta = 1 has the posterior's variance."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}; it must be from 0 (deterministic) to 1 (as random as DDPM)")

    def step(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
        c = diffusion.at(t, x)
        eps = (x - c.alpha * p["pred_xstart"]) / c.sigma
        x = c.alpha_prev * p["pred_xstart"] + c.sigma_prev * torch.sqrt(1 - eta**2 * c.fresh) * eps
        return x + eta * c.sigma_prev * torch.sqrt(c.fresh) * draw() if eta else x

    return step


def heun(diffusion: "Diffusion", draw: Callable[[], Tensor], device: torch.device, eta: float) -> Step:
    """Returns the step of Heun's method of second order; deterministic. It is called for each evaluation of the model.

    The first evaluation of a step moves as DDIM does, which holds x_0 and eps. The second one, at the state there, adds
    half of the change of the velocity times the step in the process's own time (`Diffusion.clock`). For a flow the sum
    is x + ds (v + v') / 2. The last step, to data, has one evaluation, as in Karras et al. 2022.
    """
    hold = ddim(diffusion, draw, device, 0.0)
    begun: list[Tensor] = []  # after a first evaluation: its estimate of x_0, and half of the step in time

    def step(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
        c = diffusion.at(t, x)
        if begun:
            x_start, half = begun
            begun.clear()
            return x + half / c.sigma * (p["pred_xstart"] - x_start)
        time, following = diffusion.clock(c.alpha, c.sigma), diffusion.clock(c.alpha_prev, c.sigma_prev)
        begun.extend([p["pred_xstart"], (time - following) / 2])
        return hold(x, t, p)

    return step


def evaluations(method: str | Callable, steps: Iterable[T]) -> list[T]:
    """Returns, for each call of the model in sampling order, the step at which it is called: Heun's makes two a step.

    Args:
        method: of `sample_loop_progressive`.
        steps: from noise to clean, in any notation: numbers, timesteps.
    """
    first, *others = steps
    return [first, *(step for step in others for _ in range(2 if method == "heun" else 1))]


def multistep(name: str, diffusion: "Diffusion", draw: Callable[[], Tensor], device: torch.device, eta: float) -> Step:
    """Returns the step of a second-order, deterministic solver of diffusers, given by class name.

    The solver gets our timesteps, noise levels and estimate of x_0, so prediction and clipping work as in DDIM.
    UniPC solves a 2 x 2 system in each step; torch.linalg.solve waits for the GPU to report success.
    """
    import diffusers

    steps = diffusion.num_timesteps
    flow = diffusion.process == "flow"
    solver = getattr(diffusers, name)(
        num_train_timesteps=steps, prediction_type="sample", timestep_spacing="trailing", use_flow_sigmas=flow
    )
    solver.set_timesteps(steps)  # trailing spacing gives steps - 1 ... 0, every step of the respaced process
    solver.set_begin_index(0)  # otherwise the first step searches for its timestep
    # The solvers read only the sigmas. Their own, from fp32 betas, are inexact where a beta is close to 1, and they are
    # on the CPU, from which UniPC copies them at each step.
    if flow:  # below 1, where the solvers' log SNR would be infinite
        sigmas = np.append(np.minimum(np.array(diffusion.timestep_map[::-1]) / 1000, 1 - 1e-6), 0.0)
    else:
        sigmas = np.append(np.sqrt(1 / diffusion.alphas_cumprod - 1)[::-1], 0.0)
    solver.sigmas = torch.from_numpy(sigmas).float().to(device)

    def step(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
        # The step to timestep 0, the last but one, is first order. It changes the log SNR much more than the step
        # before it (not so in a flow). A second-order step would extrapolate so far that with 20 steps the solvers are
        # worse than DDIM (on Gaussian data, where the exact result is known).
        if solver.step_index == steps - 2 and not flow:
            solver.lower_order_nums = 0
        return solver.step(p["pred_xstart"], t, x).prev_sample

    return step


def linear_multistep(
    moves: Sequence[Sequence[float]],
    diffusion: "Diffusion",
    draw: Callable[[], Tensor],
    device: torch.device,
    eta: float,
) -> Step:
    """A solver with given coefficients, which tools/calibrate.py fits to a model; deterministic.

    With the move (a, b0, b1, b2, e) of a step, x_next = a x + b0 v + b1 v' + b2 v'' + e x'. Here v is the process's
    velocity, v' and v'' are those of the two steps before, and x' is the state of the step before.
    """
    following = iter(moves)
    velocities: deque[Tensor] = deque(maxlen=3)  # newest first
    states: deque[Tensor] = deque(maxlen=2)

    def step(x: Tensor, t: Tensor, p: dict[str, Tensor]) -> Tensor:
        velocities.appendleft(diffusion.velocity(x, p["pred_xstart"], t))
        states.appendleft(x)
        a, b0, b1, b2, e = next(following)
        terms = zip((b0, b1, b2), velocities, strict=False), zip((a, e), states, strict=False)
        return sum(weight * each for weight, each in itertools.chain(*terms))

    return step


SAMPLERS: dict[str, Callable[..., Step]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": lambda diffusion, draw, device, eta: ddim(diffusion, draw, device, 0.0),  # of a flow: x + ds v
    "heun": heun,
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
    method: str | Callable[..., Step],
    held: Sequence[Sequence[float]] = (),
) -> Iterator[dict[str, Tensor]]:
    """Samples from noise to data; yields {"sample", "pred_xstart"} after each step, (B, ..., C, H, W) in fp32.

    Heun's method, which calls the model twice in a step, yields after each call.

    Args:
        model: called as model(x, t, **model_kwargs); t (B,) are original timesteps, the largest first.
        shape: (B, ..., C, H, W).
        noise: the starting point, of that shape; None: it is drawn.
        clip_denoised: clip the estimates of x_0 to [-1, 1]; right for pixels, wrong for latents.
        device: where to sample; None: where `noise` is, or torch's default device.
        eta: DDIM's randomness, 0 ... 1; the other samplers ignore it.
        generators: one per sample, on the sampling device, for every draw; None: the global generator.
        method: a key of SAMPLERS, or a function like its values, such as partial(linear_multistep, moves).
        held: for each call of the model, weights of its last estimates of x_0, newest first. Their sum stands for the
            call. Without weights the model is called, as it must be at first. Empty: it is called at every step. A
            DDPM that holds x_0 draws the noise of all of its steps, so that its clips pair with those of the full run.

    Raises:
        UserError: `method` is unknown, `eta` is outside 0 ... 1, or `model` is a SkipCache of another number of steps.
    """
    calls = evaluations(method, range(diffusion.num_timesteps)[::-1])
    left = getattr(model, "steps_left", None)  # of a SkipCache, which lives for one run
    if left not in (None, len(calls)):
        raise UserError(
            f"the SkipCache has {left} steps left, the run has {len(calls)}: make a new one for each run, "
            "with a plan of as many steps"
        )
    sampler = method if callable(method) else SAMPLERS[choice("sample_method", method, SAMPLERS)]
    x = randn_per_sample(shape, generators, device) if noise is None else noise.to(device, torch.float32)
    step = sampler(diffusion, partial(randn_per_sample, x.shape, generators, x.device), x.device, eta)
    diffusion.tables(x.device)  # copied now, not in the loop
    held = held or [()] * len(calls)
    estimates: deque[Tensor] = deque(maxlen=max(map(len, held)) or 1)  # of x_0 by the model, newest first
    outputs: deque[Tensor] = deque(maxlen=1)  # the model's last one

    def remember(*args: Any, **kwargs: Any) -> Tensor:
        outputs.append(model(*args, **kwargs).float())
        return outputs[0]

    bar = tqdm(calls, desc=method if isinstance(method, str) else "sampling", disable=not progress)
    for i, weights in zip(bar, held, strict=True):
        t = torch.full((len(x),), i, device=x.device)  # (B,)
        if weights:
            x_start = sum(weight * each for weight, each in zip(weights, estimates, strict=False))
            p = diffusion.posterior(x_start, x, t, diffusion.split(outputs[0], x)[1])
        else:
            p = diffusion.p_mean_variance(remember, x, t, clip_denoised, model_kwargs)
            estimates.appendleft(p["pred_xstart"])
        x = step(x, t, p)
        yield {"sample": x, "pred_xstart": p["pred_xstart"]}


def sample_loop(diffusion: "Diffusion", *args: Any, **kwargs: Any) -> Tensor:
    """Returns the last sample, (B, ..., C, H, W), of `sample_loop_progressive`, which explains the arguments."""
    for out in sample_loop_progressive(diffusion, *args, **kwargs):
        sample = out["sample"]
    return sample
