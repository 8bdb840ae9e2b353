"""Growth of errors along a run, the choice of a fitted solver's steps, and the fit of its moves.

Letters: B batch, N steps of the recorded run, K evaluated steps, F frames, C channels of the latents, h = w = H / 8.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion import Diffusion, make_diffusion
from diffusion.sampling import randn_per_sample
from sample.distributed import Environment
from sample.pipeline import Pipeline, make_denoiser
from sample.plans import Plan
from tools.recipes.fit import batch_products, fit_move, place_steps, prior_move, step_errors
from tools.recipes.trajectories import Trajectories, labels_tensor, load_trajectories

STALENESS = 3  # steps; age of the prediction that makes the errors whose growth is measured


@dataclass(frozen=True)
class Fit:
    """The moves of a fitted solver."""

    moves: list[list[float]]  # for each evaluated step, (a, b0, b1, b2, e)
    errors: list[float]  # relative L2 of the calibration seeds' latents


def angles_of(diffusion: Diffusion) -> list[float]:
    """phi = atan(sigma / alpha) (of a flow: its time s) of states 0 ... N, from noise to clean; the last is 0."""
    signal = diffusion.alphas_cumprod[::-1]
    return [*diffusion.clock(*map(torch.from_numpy, (np.sqrt(signal), np.sqrt(1 - signal)))).tolist(), 0.0]


def relative_l2(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b| of each clip of (B, ...): (B,)."""
    return (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)


def x0_effect(diffusion: Diffusion, method: str, t: Tensor, x: Tensor) -> Tensor:
    """By how much a change of the predicted x_0 at timesteps t (B,) moves the next state: DDPM's, or else DDIM's."""
    c = diffusion.at(t, x)
    return c.posterior_x0 if method == "ddpm" else c.alpha_prev - c.sigma_prev * c.alpha / c.sigma


def x0_of_velocity(diffusion: Diffusion, x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The x_0 of states x (B, ...) whose velocity at timesteps t (B,) is v; a velocity is linear in x_0."""
    return diffusion.at(t, x).sigma * (diffusion.velocity(x, torch.zeros_like(x), t) - v)


# ---------------------------------------------------------------------------------------------------------------------
# Growth of errors
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_growth(
    pipe: Pipeline, runs: Trajectories, seeds: Sequence[int], positions: Sequence[int], on_step: Callable[[], object]
) -> Tensor:
    """By how much a relative error of state `p` has grown at the end of the run: (positions, B).

    The error is what a stale prediction makes: state p is reached with the x_0 that was predicted STALENESS steps
    before. (Random errors would not do: the model removes most of them as noise.) The run goes on from the state with
    and without the error, on the same noise.
    """
    cfg, diffusion = pipe.cfg, pipe.diffusion
    N, timesteps, y = diffusion.num_timesteps, diffusion.timestep_map, labels_tensor(pipe, seeds)

    def prediction(n: int) -> Tensor:
        x, v = runs.states[:, n].to(pipe.device), runs.velocities[:, n].to(pipe.device)
        return x0_of_velocity(diffusion, x, v, torch.full((len(x),), N - 1 - n, device=x.device))

    def finish(x: Tensor, p: int) -> Tensor:
        generators = [torch.Generator(pipe.device).manual_seed(seed) for seed in seeds]
        for _ in range(p + 1):  # the first noise and that of p steps
            randn_per_sample(x.shape, generators, pipe.device)
        rest = make_diffusion(cfg, timesteps[: N - p])
        loop = rest.sample_loop_progressive(
            make_denoiser(pipe, pipe.plan),
            x.shape,
            x,
            clip_denoised=False,
            model_kwargs={"y": y},
            eta=cfg.eta,
            generators=generators,
            method=cfg.sample_method,
        )
        for out in loop:
            x = out["sample"]
            on_step()
        return x

    growth = []
    for p in positions:
        x = runs.states[:, p].to(pipe.device)
        t = torch.full((len(x),), N - p, device=x.device)  # of the step that leads to state p
        stale = prediction(max(0, p - 1 - STALENESS)) - prediction(p - 1)
        moved = x + x0_effect(diffusion, cfg.sample_method, t, x) * stale
        growth.append((relative_l2(finish(moved, p), finish(x, p)) / relative_l2(moved, x)).cpu())
    return torch.stack(growth)


def growth_positions(num_steps: int, count: int) -> list[int]:
    """States from which growth is measured, denser near the noise, where it changes most."""
    return sorted({min(num_steps - 1, round(2 + (num_steps - 2) * (k / count) ** 1.5)) for k in range(count)})


def interpolate_growth(growth: Tensor, positions: Sequence[int], num_states: int) -> np.ndarray:
    """The geometric mean of `growth` (positions, B) over clips, for every state, (N + 1,); 1 at the end."""
    known = [*positions, num_states - 1]
    logs = [*growth.log().mean(1).tolist(), 0.0]
    return np.exp(np.interp(np.arange(num_states), known, logs))


# ---------------------------------------------------------------------------------------------------------------------
# Fitted solvers
# ---------------------------------------------------------------------------------------------------------------------


def gram_of(folder: Path, seeds: Sequence[int]) -> Tensor:
    """Products of all states and velocities with each other, summed over recorded runs: (2N + 1, 2N + 1), float64."""
    total = torch.zeros(())
    for seed in seeds:
        run = load_trajectories(folder, [seed])
        vectors = torch.cat([run.states[0], run.velocities[0]]).flatten(1).double()  # (2N + 1, F C h w)
        total = total + vectors @ vectors.T
    return total


def choose_steps(
    gram: Tensor, angles: Sequence[float], growth: np.ndarray, num_steps: int, exponent: float, straight: bool = False
) -> list[int]:
    """The `num_steps` states to evaluate that minimise the errors of single steps, weighted by growth^exponent."""
    N = len(angles) - 1
    max_gap = min(N, max(12, math.ceil(4 * N / num_steps)))
    errors = step_errors(gram, angles, max_gap, straight)
    for i in range(N):
        reach = min(max_gap, N - i)
        errors[i, :, 1 : reach + 1] *= growth[i + 1 : i + reach + 1] ** exponent
    return place_steps(errors, num_steps)


@torch.no_grad()
def fit_moves(
    pipe: Pipeline,
    folder: Path,
    batches: Sequence[Sequence[int]],
    plan: Plan,
    env: Environment,
    on_step: Callable[[], object],
) -> Fit:
    """Fits the moves of `plan` to the runs recorded in `folder` with `pipe`'s sampler, on the solver's own states.

    All batches go side by side, shared out to the processes: a move is fitted to the states that the moves before it
    led to, so that later moves mend the errors of earlier ones. Its target is the recorded state.
    """
    diffusion, angles = pipe.diffusion, angles_of(pipe.diffusion)
    steps = [diffusion.num_timesteps - 1 - diffusion.timestep_map.index(t) for t in plan.timesteps]
    mine = range(env.rank, len(batches), env.world_size)
    runs = {b: load_trajectories(folder, batches[b]).states for b in mine}  # (B, N + 1, F, C, h, w) each
    labels = {b: labels_tensor(pipe, batches[b]) for b in mine}
    denoisers = {b: make_denoiser(pipe, plan) for b in mine}
    x = {b: runs[b][:, 0].to(pipe.device) for b in mine}
    history: dict[int, list[Tensor]] = {b: [] for b in mine}  # velocities, newest first
    before: dict[int, Tensor] = {}  # the state of the evaluated step before
    moves, previous = [], None
    for number, (current, following) in enumerate(zip(steps, [*steps[1:], len(angles) - 1], strict=True)):
        products, prior = [], prior_move(angles, previous, current, following, diffusion.process == "flow")
        for b in mine:
            t = torch.full((len(x[b]),), diffusion.num_timesteps - 1 - current, device=pipe.device)
            x0 = diffusion.p_mean_variance(denoisers[b], x[b], t, False, {"y": labels[b]})["pred_xstart"]
            history[b] = [diffusion.velocity(x[b], x0, t), *history[b][:2]]
            columns = [x[b], *history[b]] + ([before[b]] if number else [])
            products.append((b, batch_products(columns, runs[b][:, following].to(pipe.device)).cpu()))
            on_step()
        # In the order of the batches, so that the sum does not depend on the number of processes.
        total = sum(each for _, each in sorted(env.gather(products), key=lambda pair: pair[0]))
        known = min(number + 1, 3)  # velocities there are
        weights = fit_move(total, prior[: 1 + known] + (prior[4:] if number else []))
        move = weights[: 1 + known] + [0.0] * (3 - known) + (weights[1 + known :] or [0.0])
        for b in mine:
            new = move[0] * x[b] + sum(w * v for w, v in zip(move[1:4], history[b], strict=False))
            new = new + move[4] * before[b] if number else new
            before[b], x[b] = x[b], new
        moves.append(move)
        previous = current
    errors = [(b, relative_l2(x[b].cpu(), runs[b][:, -1]).tolist()) for b in mine]
    return Fit(moves, [error for _, each in sorted(env.gather(errors)) for error in each])
