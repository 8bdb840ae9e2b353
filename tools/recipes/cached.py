"""Where the full steps of a cached plan belong: how deep features change along a run, and what cached steps lose by it.

A cached step at step n uses a forecast of the deep feature d_n from those of full steps before it. Products of features
with each other give the error of every forecast, whichever steps run in full. How much an error of the feature moves
the next state is measured on a few cached steps. Where x_0 is held, d_n is the estimate of x_0, and how much it moves
the next state is known.
Letters: B batch, N steps of the run, F frames, T tokens of a frame, D width, G the largest distance of full steps.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion import Diffusion
from diffusion.guidance import Guided
from diffusion.sampling import SAMPLERS, randn_per_sample
from models.skip_cache import lagrange_weights
from sample.pipeline import Pipeline
from tools.recipes.search import x0_effect, x0_of_velocity
from tools.recipes.trajectories import labels_tensor, load_trajectories

AGES = (1, 2, 4)  # distances to a full step at which cached steps are run
LARGEST_GAP = 12  # G
WINDOW = 2 * LARGEST_GAP  # features kept: a forecast of order 1 or 2 looks no further back


@dataclass(frozen=True)
class FeatureChanges:
    """What `measure_features` finds, as lists for JSON."""

    gram: list[list[float]]  # <d_n, d_m>, (N, N); 0 where |n - m| > WINDOW, or of x_0 > LARGEST_GAP
    sensitivity: list[float]  # of the next state's relative error to |error of d_n|, (N,)


@torch.no_grad()
def measure_features(
    pipe: Pipeline, batches: Sequence[Sequence[int]], depth: int, on_step: Callable[[], object]
) -> FeatureChanges:
    """Samples `batches` of seeds uncached and measures the deep features of `depth` outer layers on the way.

    Memory holds the features of WINDOW steps of one batch.
    """
    diffusion, cfg, model = pipe.diffusion, pipe.cfg, pipe.model
    (full_step, cached_step), N = pipe.steps, diffusion.num_timesteps
    gram = torch.zeros(N, N, dtype=torch.float64)
    moved, differed, size = (torch.zeros(N, len(AGES), dtype=torch.float64) for _ in range(3))
    guided = partial(Guided, scale=cfg.cfg_scale, null_label=model.num_classes)
    for seeds in batches:
        generators = [torch.Generator(pipe.device).manual_seed(seed) for seed in seeds]
        shape = (len(seeds), model.num_frames, model.in_channels, model.input_size, model.input_size)
        x, inputs = randn_per_sample(shape, generators, pipe.device), {"y": labels_tensor(pipe, seeds)}
        draw = partial(randn_per_sample, shape, generators, pipe.device)
        step = SAMPLERS[cfg.sample_method](diffusion, draw, pipe.device, cfg.eta)
        kept: deque[Tensor] = deque(maxlen=WINDOW + 1)  # features, newest first

        def full(x: Tensor, t: Tensor, y: Tensor | None, kept: deque[Tensor] = kept) -> Tensor:
            out, deep = full_step(model, depth, x, t, y)
            kept.appendleft(deep)
            return out

        for n in range(N):
            t = torch.full((len(x),), N - 1 - n, device=x.device)
            p = diffusion.p_mean_variance(guided(full), x, t, False, inputs)
            deep = kept[0].float().flatten()
            for k, earlier in enumerate(kept):
                gram[n, n - k] += deep @ earlier.float().flatten()
            for column, age in enumerate(AGES[: sum(age <= n for age in AGES)]):
                cached = guided(lambda x, t, y, deep=kept[age]: cached_step(model, depth, x, t, y, deep))
                x0 = diffusion.p_mean_variance(cached, x, t, False, inputs)["pred_xstart"]
                moved[n, column] += float((x0 - p["pred_xstart"]).square().sum())
                differed[n, column] += float((kept[age].float() - kept[0].float()).square().sum())
            effect = x0_effect(diffusion, cfg.sample_method, t, x)
            x = step(x, t, p)
            size[n] += float(x.square().sum() / effect.square().mean())
            on_step()
    ratios = (moved / differed.clamp(min=1e-30) / size)[1:]  # (N - 1, ages), squared
    known = torch.where(differed[1:] > 0, ratios.clamp(min=1e-30).log(), torch.nan).nanmean(1)  # of squares
    sensitivity = (known / 2).exp()
    gram = gram + gram.tril(-1).T
    return FeatureChanges(gram.tolist(), [float(sensitivity[0]), *sensitivity.tolist()])


def estimate_changes(diffusion: Diffusion, method: str, folder: Path, seeds: Sequence[int]) -> FeatureChanges:
    """The same of the estimates of x_0 in recorded runs of `method`."""
    N = diffusion.num_timesteps
    gram, size = torch.zeros(N, N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    t = torch.arange(N).flip(0)  # of each step
    effect = x0_effect(diffusion, method, t, t).double()
    for seed in seeds:
        run = load_trajectories(folder, [seed])
        x, v = run.states[0], run.velocities[0]  # (N + 1, F, C, h, w), (N, F, C, h, w)
        estimates = x0_of_velocity(diffusion, x[:-1], v, t).flatten(1).double()
        gram += estimates @ estimates.T
        size += x[1:].double().square().flatten(1).sum(1)
    gram = gram.triu(-LARGEST_GAP).tril(LARGEST_GAP)
    return FeatureChanges(gram.tolist(), (effect.abs() / size.sqrt()).tolist())


def gap_errors(changes: FeatureChanges, growth: np.ndarray, order: int) -> np.ndarray:
    """Errors that the cached steps between two full steps make: E[i, i - h, j - i], (N, G + 1, G + 1).

    i is a full step, h the full step before it, j the next one, and all steps between i and j are cached. Their errors
    add up, each weighted by its growth until the end. E[i, 0, :] is for i = 0, which has no full step before it.
    """
    gram, sensitivity = np.array(changes.gram), np.array(changes.sensitivity)
    N = len(gram)
    errors = np.full((N, LARGEST_GAP + 1, LARGEST_GAP + 1), np.inf)
    for i in range(N):
        for back in range(1, min(i, LARGEST_GAP) + 1) if i else (0,):
            full = [i - k * back for k in range(order + 1) if i - k * back >= 0 and k * back <= WINDOW - LARGEST_GAP]
            full = full if i else [0]
            total = 0.0
            for gap in range(1, min(LARGEST_GAP, N - i) + 1):
                errors[i, back, gap] = total
                n = i + gap
                if n < N:
                    weights = np.array(lagrange_weights(n, full))
                    squared = gram[n, n] - 2 * weights @ gram[full, n] + weights @ gram[np.ix_(full, full)] @ weights
                    total += growth[n + 1] * sensitivity[n] * math.sqrt(max(0.0, squared))
    return errors
