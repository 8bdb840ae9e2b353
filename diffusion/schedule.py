"""The noise process: betas, respacing, tables of coefficients, q(x_t | x_0) and q(x_{t-1} | x_t, x_0)."""

from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs import UserError


def linear_betas(num_steps: int) -> np.ndarray:
    """Returns betas from 1e-4 to 0.02, Ho et al. 2020, scaled by 1000 / num_steps; (num_steps,) float64."""
    if num_steps <= 20:
        raise UserError(f"diffusion_steps is {num_steps}; linear betas need more than 20 to stay below 1")
    scale = 1000 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps)


def cosine_betas(num_steps: int) -> np.ndarray:
    """Returns the betas of Nichol & Dhariwal 2021, eq. 17, capped at 0.999; (num_steps,) float64."""
    s = np.arange(num_steps + 1) / num_steps
    alphas_cumprod = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)


NOISE_SCHEDULES = {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas}


def space_timesteps(num_steps: int, respacing: str | int | Sequence[int] | None) -> list[int]:
    """Returns the timesteps of a shorter process, ascending, out of 0 ... num_steps - 1.

    Args:
        respacing: "50" (or 50): 50 timesteps, evenly spread from 0 to num_steps - 1.
            "ddim50": the integer stride that gives exactly 50 timesteps, as in the DDIM paper.
            "10,20,30": 10 timesteps in the first third, 20 in the second and 30 in the last.
            "" or None: all timesteps.
            A list of timesteps: these, ascending.

    Raises:
        UserError: `respacing` has another form, or there are no such timesteps.
    """
    if isinstance(respacing, Sequence) and not isinstance(respacing, str):
        timesteps = sorted(set(respacing))
        if len(timesteps) != len(respacing) or not timesteps or not 0 <= timesteps[0] <= timesteps[-1] < num_steps:
            raise UserError(f"timesteps {list(respacing)}: want different ones in 0 ... {num_steps - 1}")
        return timesteps
    text = str(num_steps if respacing in ("", None) else respacing)
    counts = text.removeprefix("ddim").split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise UserError(f'timestep_respacing is "{text}"; valid forms: "50", "ddim50", "10,20,30" (sections), "" (all)')
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
        # A running sum, as in the original, not multiples: its rounding errors decide ties.
        timesteps += [start + round(offset) for offset in accumulate(repeat(stride, count - 1), initial=0.0)]
        start += size
    return timesteps


class Coefficients(NamedTuple):
    """Coefficients at timestep t, of shape (B, 1, ..., 1) each; a_t is the cumulative product of 1 - beta.

    They are those of a process of unit variance. In one whose alpha^2 + sigma^2 is scale^2 (a flow), alpha, sigma and
    the states x_t are scale times as large.
    """

    alpha: Tensor  # sqrt(a_t): x_t = alpha x_0 + sigma eps
    sigma: Tensor  # sqrt(1 - a_t)
    alpha_prev: Tensor  # alpha and sigma at t - 1; 1 and 0 where t = 0
    sigma_prev: Tensor
    fresh: Tensor  # beta_t / (1 - a_t): with eta = 1, the share of the noise in x_{t-1} that DDIM draws anew
    posterior_x0: Tensor  # mean of q(x_{t-1} | x_t, x_0) = posterior_x0 x_0 + posterior_xt x_t
    posterior_xt: Tensor
    posterior_variance: Tensor  # 0 where t = 0
    posterior_log_variance: Tensor  # where t = 0, that of t = 1, so that it is finite
    beta_log_variance: Tensor  # log beta_t, the upper bound of a learned variance
    large_log_variance: Tensor  # of a variance that is not learned: log beta_t, or posterior_log_variance where t = 0


class Schedule:
    """A noise process over `timestep_map`, an ascending subset of the timesteps in training.

    Wherever a Schedule is used, `t` counts the steps of this process, 0 ... num_timesteps - 1. The model gets
    `timestep_map[t]`, the original timestep.

    Args:
        alphas_cumprod: a_t of these timesteps, (N,): alpha^2 / (alpha^2 + sigma^2).
        scale: sqrt(alpha^2 + sigma^2) of these timesteps, (N,).
    """

    def __init__(self, alphas_cumprod: np.ndarray, timestep_map: list, scale: np.ndarray | float = 1.0):
        self.timestep_map = timestep_map
        self.num_timesteps = len(timestep_map)
        self.alphas_cumprod = alphas_cumprod  # float64, like all tables
        scale = np.broadcast_to(scale, alphas_cumprod.shape)
        scale_prev = np.append(1.0, scale[:-1])
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.betas = 1 - self.alphas_cumprod / self.alphas_cumprod_prev
        kept = 1 - self.alphas_cumprod_prev
        self.posterior_variance = self.betas * kept / (1 - self.alphas_cumprod) * scale_prev**2
        floor = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(floor, self.posterior_variance[1:]))
        self._tables = np.stack(
            Coefficients(
                alpha=np.sqrt(self.alphas_cumprod) * scale,
                sigma=np.sqrt(1 - self.alphas_cumprod) * scale,
                alpha_prev=np.sqrt(self.alphas_cumprod_prev) * scale_prev,
                sigma_prev=np.sqrt(1 - self.alphas_cumprod_prev) * scale_prev,
                fresh=self.betas / (1 - self.alphas_cumprod),
                posterior_x0=self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod) * scale_prev,
                posterior_xt=kept * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod) * (scale_prev / scale),
                posterior_variance=self.posterior_variance,
                posterior_log_variance=self.posterior_log_variance_clipped,
                beta_log_variance=np.log(self.betas * scale_prev**2),
                large_log_variance=np.log(np.append(floor, (self.betas * scale_prev**2)[1:])),
            )
        )
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}  # a copy per device

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the coefficients (K, N) fp32 and the original timesteps (N,); a device gets one copy."""
        if device not in self._on_device:
            coefficients = torch.from_numpy(self._tables).float().to(device)
            self._on_device[device] = coefficients, torch.tensor(self.timestep_map, device=device)
        return self._on_device[device]

    def at(self, t: Tensor, x: Tensor) -> Coefficients:
        """Returns the coefficients at timesteps t (B,), shaped to broadcast over x (B, ...)."""
        return Coefficients(*self.tables(x.device)[0][:, t].unflatten(1, (-1, *[1] * (x.ndim - 1))))

    def original_timesteps(self, t: Tensor) -> Tensor:
        """Returns the original timesteps (B,) of t (B,)."""
        return self.tables(t.device)[1][t]

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns a draw x_t from q(x_t | x_0), Ho et al. 2020, eq. 4; x_start, noise (B, ...), t (B,)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        c = self.at(t, x_start)
        return c.alpha * x_start + c.sigma * noise

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0), Ho et al. 2020, eqs. 6 and 7."""
        c = self.at(t, x_t)
        mean = c.posterior_x0 * x_start + c.posterior_xt * x_t
        return mean, c.posterior_variance.expand_as(x_t), c.posterior_log_variance.expand_as(x_t)
