"""Fitting a linear multistep solver to recorded runs, and choosing the steps that it evaluates.

A step of the solver goes from state x_i at evaluated step i to state x_j:
    x_j = a x_i + b0 v_i + b1 v_h + b2 v_g + e x_h,
where h and g are the evaluated steps before i, and v is the velocity: alpha eps - sigma x_0 (Salimans & Ho 2022), or
eps - x_0 of a flow. The five numbers of a step, its move, are fitted by ridge regression around those of a second-order
solver in the angle phi = atan(sigma / alpha), see `prior_move`.
Letters: N steps of the reference run, so that x_0 ... x_N are its states; K evaluated steps; G the largest gap.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

RIDGE = 1e-6  # for columns of unit norm


def prior_move(
    angles: Sequence[float], previous: int | None, current: int, following: int, straight: bool = False
) -> list[float]:
    """The move of a second-order solver, (a, b0, b1, b2, e); DDIM's if there is no previous step.

    DDIM holds x_0 and eps: x_j = x_i cos d - v_i sin d with d = phi_i - phi_j. Held from step h on, they would give the
    velocity v_h cos d' + x_h sin d' at step i, with d' = phi_h - phi_i. By how much v_i differs is the change of the
    prediction over d', and half of the change to be expected over d is added to v_i.

    Args:
        angles: phi of states 0 ... N, from noise to clean; the last is 0.
        straight: of a flow, whose paths are lines: angles are its times s, and x_0 and eps held give the velocity v_h.
    """
    cos, sin = (lambda d: 1.0, lambda d: d) if straight else (math.cos, math.sin)
    d = angles[current] - angles[following]
    if previous is None:
        return [cos(d), -sin(d), 0.0, 0.0, 0.0]
    before = angles[previous] - angles[current]
    half = sin(d) * min(1.0, d / (2 * before))
    return [cos(d), -sin(d) - half, half * cos(before), 0.0, 0.0 if straight else half * sin(before)]


def ridge(gram: Tensor, cross: Tensor, prior: Tensor) -> Tensor:
    """The weights w that minimise |target - w . columns|^2 + RIDGE |(w - prior) norms|^2.

    Args:
        gram: products of the columns with each other, (..., K, K), float64.
        cross: their products with the target, (..., K).
        prior: the weights without data, (..., K).
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()  # (..., K)
    scaled = gram / norms[..., :, None] / norms[..., None, :] + RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype)
    missing = (cross - (gram @ prior[..., None])[..., 0]) / norms
    return prior + torch.linalg.solve(scaled, missing[..., None])[..., 0] / norms


def step_errors(gram: Tensor, angles: Sequence[float], max_gap: int, straight: bool = False) -> np.ndarray:
    """Relative errors of single fitted steps along the reference run: E[i, i - h, j - i], (N, G + 1, G + 1).

    E[i, 0, :] is for a first step i = 0, which has no previous one. Impossible steps have an infinite error.

    Args:
        gram: products of x_0 ... x_N, v_0 ... v_(N-1) with each other, summed over runs, (2N + 1, 2N + 1), float64.
        angles: phi of the states.
        max_gap: G, the largest distance of neighbouring evaluated steps.
        straight: see `prior_move`.
    """
    N = len(angles) - 1
    errors = np.full((N, max_gap + 1, max_gap + 1), np.inf)
    triples = [
        (h, i, j)
        for i in range(1, N)
        for h in range(max(0, i - max_gap), i)
        for j in range(i + 1, min(N, i + max_gap) + 1)
    ]
    for chunk, first in ((triples, False), ([(0, 0, j) for j in range(1, min(N, max_gap) + 1)], True)):
        h, i, j = (torch.tensor(column) for column in zip(*chunk, strict=True))
        columns = [i, N + 1 + i] if first else [i, N + 1 + i, N + 1 + h, h]
        index = torch.stack(columns, dim=1)  # (M, 2 or 4)
        moves = [prior_move(angles, None if first else h_, i_, j_, straight) for h_, i_, j_ in chunk]
        prior = torch.tensor(moves, dtype=torch.float64)[:, [0, 1] if first else [0, 1, 2, 4]]
        products = gram[index[:, :, None], index[:, None, :]]  # (M, K, K)
        cross = gram[index, j[:, None]]  # (M, K)
        weights = ridge(products, cross, prior)
        squared = gram[j, j] - 2 * (weights * cross).sum(1) + torch.einsum("mk,mkl,ml->m", weights, products, weights)
        error = (squared.clamp(min=0) / gram[j, j]).sqrt()
        errors[i.numpy(), 0 if first else (i - h).numpy(), (j - i).numpy()] = error.numpy()
    return errors


def place_steps(errors: np.ndarray, num_steps: int) -> list[int]:
    """The `num_steps` evaluated steps, beginning with step 0, that minimise the sum of squared errors to state N.

    Dynamic programming over (previous, current) evaluated step.

    Args:
        errors: E[i, i - h, j - i], see `step_errors`, possibly weighted.

    Raises:
        ValueError: no such path; max_gap is too small for so few steps.
    """
    N, width, _ = errors.shape
    squared = errors**2
    best = np.full((N + 1, width), np.inf)  # cost of having evaluated `current`, by (current, current - previous)
    best[0, 0] = 0.0
    came_from: list[np.ndarray] = []
    for step in range(num_steps):
        total = best[:N, :, None] + squared  # (N, G + 1 previous gaps, G + 1 next gaps)
        choice, cost = total.argmin(1), total.min(1)  # (N, G + 1) each, by (current, next gap)
        best = np.full((N + 1, width), np.inf)
        for gap in range(1, width):
            last = step == num_steps - 1
            reach = np.arange(N - gap, N - gap + 1) if last else np.arange(0, max(0, N - gap))
            reach = reach[reach >= 0]
            best[reach + gap, gap] = cost[reach, gap]
        came_from.append(choice)
    gap = int(best[N].argmin())
    if not np.isfinite(best[N, gap]):
        raise ValueError(f"no path of {num_steps} steps with gaps of at most {width - 1} leads from 0 to {N}")
    steps, current = [], N
    for choice in reversed(came_from):
        current -= gap
        steps.append(current)
        gap = int(choice[current, gap])
    return steps[::-1]


def batch_products(columns: Sequence[Tensor], target: Tensor) -> Tensor:
    """Products of the columns of a step and of its target with each other, the target last: (K + 1, K + 1), float64.

    Those of several batches add up.
    """
    stacked = torch.stack([each.double().flatten() for each in (*columns, target)])
    return stacked @ stacked.T


def fit_move(products: Tensor, prior: Sequence[float]) -> list[float]:
    """The move that fits best: products as `batch_products` makes them, for the first K coefficients of `prior`."""
    gram, cross = products[:-1, :-1], products[:-1, -1]
    return ridge(gram, cross, torch.tensor(prior, dtype=torch.float64)).tolist()
