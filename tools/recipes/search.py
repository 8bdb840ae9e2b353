"""Fitted solvers of a checkpoint: how errors grow along a run, which steps to evaluate, and the moves between them.

Letters: B batch, N steps of the reference run, K evaluated steps, F frames, C channels of the latents, h = w = H / 8.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion import Diffusion
from diffusion.guidance import Guided
from sample.pipeline import Pipeline
from tools.recipes.fit import batch_products, fit_move, place_steps, prior_move, step_errors
from tools.recipes.trajectories import Trajectories, labels_tensor, load_trajectories

PERTURBATION = 0.01  # relative size of the errors whose growth is measured
EXPONENTS = (0.5, 1.0)  # of the growth, in the weight of an error; which is best is measured


@dataclass(frozen=True)
class Fit:
    """A fitted solver."""

    steps: list[int]  # evaluated steps of the reference run, ascending from noise
    moves: list[list[float]]  # for each, (a, b0, b1, b2, e)
    errors: list[float]  # relative L2 of the calibration seeds' latents


def angles_of(diffusion: Diffusion) -> list[float]:
    """phi = atan(sigma / alpha) of states 0 ... N, from noise to clean; the last is 0."""
    signal = diffusion.alphas_cumprod[::-1]
    return [*np.arctan2(np.sqrt(1 - signal), np.sqrt(signal)).tolist(), 0.0]


def relative_l2(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b| of each clip of (B, ...): (B,)."""
    return (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)


@torch.no_grad()
def measure_growth(
    pipe: Pipeline, runs: Trajectories, seeds: Sequence[int], positions: Sequence[int], on_step: Callable[[], object]
) -> Tensor:
    """By how much a relative error made at state `p` has grown at the end of a DDIM run: (positions, B).

    Random errors of relative size PERTURBATION are added to the recorded states. Each perturbed run is compared with an
    unperturbed one from the same state.
    """
    diffusion = pipe.diffusion
    denoiser = Guided(pipe.uncached, pipe.cfg.cfg_scale, pipe.model.num_classes)
    y, generator = labels_tensor(pipe, seeds), torch.Generator().manual_seed(0)

    def finish(x: Tensor, start: int) -> Tensor:
        for number in range(start, diffusion.num_timesteps):
            t = torch.full((len(x),), diffusion.num_timesteps - 1 - number, device=x.device)
            c = diffusion.at(t, x)
            x0 = diffusion.p_mean_variance(denoiser, x, t, False, {"y": y})["pred_xstart"]
            x = c.alpha_prev * x0 + c.sigma_prev * (x - c.alpha * x0) / c.sigma
            on_step()
        return x

    growth = []
    for p in positions:
        x = runs.states[:, p].to(pipe.device)
        error = torch.randn(x.shape, generator=generator).to(x.device)
        scale = x.flatten(1).norm(dim=1) / error.flatten(1).norm(dim=1)
        moved = x + PERTURBATION * scale.view(-1, *[1] * (x.ndim - 1)) * error
        growth.append(relative_l2(finish(moved, p), finish(x, p)).cpu() / PERTURBATION)
    return torch.stack(growth)


def interpolate_growth(growth: Tensor, positions: Sequence[int], num_states: int) -> np.ndarray:
    """The geometric mean of `growth` (positions, B) over clips, for every state, (N + 1,); 1 at the end."""
    known = [*positions, num_states - 1]
    logs = [*growth.log().mean(1).tolist(), 0.0]
    return np.exp(np.interp(np.arange(num_states), known, logs))


def gram_of(folder: Path, seeds: Sequence[int]) -> Tensor:
    """Products of all states and velocities with each other, summed over recorded runs: (2N + 1, 2N + 1), float64."""
    total = torch.zeros(())
    for seed in seeds:
        run = load_trajectories(folder, [seed])
        vectors = torch.cat([run.states[0], run.velocities[0]]).flatten(1).double()  # (2N + 1, F C h w)
        total = total + vectors @ vectors.T
    return total


def choose_steps(
    gram: Tensor, angles: Sequence[float], growth: np.ndarray, num_steps: int, exponent: float
) -> list[int]:
    """The `num_steps` states to evaluate that minimise the errors of single steps, weighted by growth^exponent."""
    N = len(angles) - 1
    max_gap = min(N, max(12, math.ceil(4 * N / num_steps)))
    errors = step_errors(gram, angles, max_gap)
    for i in range(N):
        reach = min(max_gap, N - i)
        errors[i, :, 1 : reach + 1] *= growth[i + 1 : i + reach + 1] ** exponent
    return place_steps(errors, num_steps)


@torch.no_grad()
def fit_solver(
    pipe: Pipeline, folder: Path, batches: Sequence[Sequence[int]], steps: Sequence[int], on_step: Callable[[], object]
) -> Fit:
    """Fits the moves between `steps` on the solver's own states, so that later moves mend the errors of earlier ones.

    All batches go side by side: a move is fitted to the states that the moves before it led to, and its target is the
    recorded state of the reference run.
    """
    diffusion, angles = pipe.diffusion, angles_of(pipe.diffusion)
    denoiser = Guided(pipe.uncached, pipe.cfg.cfg_scale, pipe.model.num_classes)
    runs = [load_trajectories(folder, seeds).states for seeds in batches]  # (B, N + 1, F, C, h, w) each
    labels = [labels_tensor(pipe, seeds) for seeds in batches]
    x = [states[:, 0].to(pipe.device) for states in runs]
    history: list[list[Tensor]] = [[] for _ in batches]  # velocities, newest first
    before: list[Tensor | None] = [None] * len(batches)  # the state of the evaluated step before
    moves, previous = [], None
    for current, following in zip(steps, [*steps[1:], len(angles) - 1], strict=True):
        products = torch.zeros(())
        prior = prior_move(angles, previous, current, following)
        for b, y in enumerate(labels):
            t = torch.full((len(x[b]),), diffusion.num_timesteps - 1 - current, device=pipe.device)
            x0 = diffusion.p_mean_variance(denoiser, x[b], t, False, {"y": y})["pred_xstart"]
            history[b] = [diffusion.velocity(x[b], x0, t), *history[b][:2]]
            columns = [x[b], *history[b]] + ([] if before[b] is None else [before[b]])
            products = products + batch_products(columns, runs[b][:, following].to(pipe.device)).cpu()
            on_step()
        known = len(history[0])  # velocities there are
        weights = fit_move(products, prior[: 1 + known] + ([] if previous is None else prior[4:]))
        move = weights[: 1 + known] + [0.0] * (3 - known) + (weights[1 + known :] or [0.0])
        for b in range(len(batches)):
            new = move[0] * x[b] + sum(w * v for w, v in zip(move[1:4], history[b], strict=False))
            new = new if before[b] is None else new + move[4] * before[b]
            before[b], x[b] = x[b], new
        moves.append(move)
        previous = current
    errors = [relative_l2(x[b].cpu(), runs[b][:, -1]) for b in range(len(batches))]
    return Fit(list(steps), moves, torch.cat(errors).tolist())
