"""The noise process: betas, respacing, their tables, q(x_t | x_0) and the posterior q(x_{t-1} | x_t, x_0)."""

from itertools import accumulate, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs import UserError


def linear_betas(num_steps: int) -> np.ndarray:
    """Ho et al. 2020: 1e-4 ... 0.02 over 1000 steps, scaled to any other number of steps; (num_steps,) float64."""
    if num_steps <= 20:
        raise UserError(f"diffusion_steps is {num_steps}: linear betas need more than 20 to stay below 1")
    scale = 1000 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps)


def cosine_betas(num_steps: int) -> np.ndarray:
    """Nichol & Dhariwal 2021, eq. 17, betas capped at 0.999; (num_steps,) float64."""
    s = np.arange(num_steps + 1) / num_steps
    alphas_cumprod = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


NOISE_SCHEDULES = {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas}


def space_timesteps(num_steps: int, respacing: str | int | None) -> list[int]:
    """Choose the timesteps of a shorter process out of 0 ... num_steps - 1, ascending.

    `respacing` is a count ("50": evenly spread, both ends included), "ddimN" (the integer stride of the DDIM paper that
    takes exactly N steps), a list of sections ("10,20,30": thirds with so many steps each), or "" | None for all steps.
    Raises UserError when the steps cannot be had.
    """
    text = str(num_steps if respacing in ("", None) else respacing)
    counts = text.removeprefix("ddim").split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f'timestep_respacing is "{text}": want "50", "ddim50", sections "10,20,30", or "" for all')
    counts = [int(count) for count in counts]

    if text.startswith("ddim"):
        strides = {len(range(0, num_steps, stride)): stride for stride in range(num_steps - 1, 0, -1)}
        if len(counts) > 1 or counts[0] not in strides:
            nearest = min(strides, key=lambda count: abs(count - counts[0]))
            raise UserError(f'no integer stride over {num_steps} steps gives "{text}"; the nearest is "ddim{nearest}"')
        return list(range(0, num_steps, strides[counts[0]]))

    timesteps, start = [], 0
    for section, count in enumerate(counts):
        size = num_steps // len(counts) + (section < num_steps % len(counts))
        if count > size:
            raise UserError(f'timestep_respacing "{text}" asks for {count} steps where there are only {size}')
        stride = (size - 1) / (count - 1) if count > 1 else 1
        # Added up, not multiplied: the rounding errors decide ties, and these are the lists of the original.
        timesteps += [start + round(offset) for offset in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += size
    return timesteps


class Coefficients(NamedTuple):
    """What the formulas need at timestep t, each of shape (B, 1, ..., 1); a = cumulative product of 1 - beta."""

    alpha: Tensor  # sqrt(a_t): x_t = alpha x_0 + sigma eps
    sigma: Tensor  # sqrt(1 - a_t)
    alpha_prev: Tensor  # the same one step nearer to the data; 1 and 0 at the first timestep
    sigma_prev: Tensor
    fresh: Tensor  # beta_t / (1 - a_t): the share of the remaining noise that is drawn anew when eta = 1
    posterior_x0: Tensor  # mean of q(x_{t-1} | x_t, x_0) = posterior_x0 x_0 + posterior_xt x_t
    posterior_xt: Tensor
    posterior_variance: Tensor  # 0 at the first timestep
    posterior_log_variance: Tensor  # finite: the first timestep has the second one's
    beta_log_variance: Tensor  # log beta_t, upper end of the learned range
    large_log_variance: Tensor  # the same with the posterior's value at the first timestep, for fixed variances


class Schedule:
    """A Gaussian noise process over `timestep_map`, a subset of the timesteps the model was trained on.

    Here and in all that takes a Schedule, `t` counts the steps of this process, 0 ... num_timesteps - 1;
    `timestep_map[t]` is the original timestep, which is what a model sees.
    """

    def __init__(self, original_betas: np.ndarray, timestep_map: list[int]):
        self.timestep_map = timestep_map
        self.num_timesteps = len(timestep_map)
        self.alphas_cumprod = np.cumprod(1 - original_betas)[timestep_map]  # a, (N,) like all tables, float64
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        floor = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(floor, self.posterior_variance[1:]))
        self._tables = np.stack(
            Coefficients(
                alpha=np.sqrt(self.alphas_cumprod),
                sigma=np.sqrt(1 - self.alphas_cumprod),
                alpha_prev=np.sqrt(self.alphas_cumprod_prev),
                sigma_prev=np.sqrt(1 - self.alphas_cumprod_prev),
                fresh=self.betas / (1 - self.alphas_cumprod),
                posterior_x0=self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod),
                posterior_xt=(1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod),
                posterior_variance=self.posterior_variance,
                posterior_log_variance=self.posterior_log_variance_clipped,
                beta_log_variance=np.log(self.betas),
                large_log_variance=np.log(np.append(floor, self.betas[1:])),
            )
        )
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}  # copies of constants, kept for good

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The (K, N) fp32 coefficients and the (N,) int64 original timesteps, copied to a device once."""
        if device not in self._on_device:
            coefficients = torch.from_numpy(self._tables).float().to(device)
            self._on_device[device] = coefficients, torch.tensor(self.timestep_map, device=device)
        return self._on_device[device]

    def at(self, t: Tensor, x: Tensor) -> Coefficients:
        """The coefficients at timesteps t (B,), shaped to be multiplied with x (B, ...)."""
        return Coefficients(*self.tables(x.device)[0][:, t].unflatten(1, (-1, *[1] * (x.ndim - 1))))

    def original_timesteps(self, t: Tensor) -> Tensor:
        """t (B,) as the model sees it."""
        return self.tables(t.device)[1][t]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t from q(x_t | x_0), Ho et al. 2020, eq. 4; x_start, noise (B, ...), t (B,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        c = self.at(t, x_start)
        return c.alpha * x_start + c.sigma * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), Ho et al. 2020, eqs. 6 and 7."""
        c = self.at(t, x_t)
        mean = c.posterior_x0 * x_start + c.posterior_xt * x_t
        return mean, c.posterior_variance.expand_as(x_t), c.posterior_log_variance.expand_as(x_t)
