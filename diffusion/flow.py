"""Flow matching: the straight path from data to noise, as a process beside the Gaussian one.

x_s = (1 - s) x_0 + s eps with time s from 0 (data) to 1 (noise); Liu et al. 2022, Lipman et al. 2022. The velocity is
v = dx_s / ds = eps - x_0: it points from data to noise, and sampling goes against it. The model sees t = 1000 s, a real
number. Tables, samplers and losses are those of the Gaussian process, with alpha = 1 - s and sigma = s.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from configs import UserError
from diffusion.gaussian import Diffusion, draw_time

FULL = 1000  # t of pure noise, and the number of timesteps that "" stands for


def shift_time(s: Any, shift: float) -> Any:
    """Returns k s / (1 + (k - 1) s) for shift k: k > 1 moves time towards noise, as large images and videos need it.

    With s, logit(s) moves by log k; Esser et al. 2024, eq. 23.
    """
    return shift * s / (1 + (shift - 1) * s)


def flow_timesteps(respacing: str | int | Sequence[float] | None, shift: float = 1.0) -> list[float]:
    """Returns the timesteps 1000 s of a run, ascending.

    Args:
        respacing: "20" (or 20): s = 1/20, 2/20, ..., 1, shifted, and rounded to three decimals of t, which names it.
            "" or None: 1000 timesteps.
            A list of timesteps: these, ascending.
        shift: see `shift_time`.

    Raises:
        UserError: `respacing` has another form, or there are no such timesteps.
    """
    if isinstance(respacing, Sequence) and not isinstance(respacing, str):
        timesteps = sorted(map(float, respacing))
        if len(set(timesteps)) != len(respacing) or not timesteps or not 0 < timesteps[0] <= timesteps[-1] <= FULL:
            raise UserError(f"timesteps {list(respacing)}: want different ones above 0, up to {FULL}")
        return timesteps
    text = str(FULL if respacing in ("", None) else respacing)
    if not text.strip().isdecimal() or not 0 < int(text) <= FULL**2:
        raise UserError(f'timestep_respacing is "{text}"; valid forms with process: flow: "50", "" (1000)')
    count = int(text)
    return [round(float(FULL * shift_time(i / count, shift)), 3) for i in range(1, count + 1)]


class Levels(NamedTuple):
    """Noise levels, of shape (B, 1, ..., 1) each."""

    alpha: Tensor  # 1 - s
    sigma: Tensor  # s


class Flow(Diffusion):
    """The process of flow matching. In training, t may be real numbers: 1000 s itself, not the number of a step.

    Args:
        timesteps: 1000 s, ascending, above 0.
        prediction: "v" (eps - x_0) or "x0".
        time_shift: of the times that are drawn in training, see `shift_time`.
    """

    process = "flow"

    def __init__(self, timesteps: list[float], prediction: str, time_shift: float = 1.0):
        s = np.array(timesteps) / FULL
        squares = (1 - s) ** 2 + s**2
        super().__init__((1 - s) ** 2 / squares, timesteps, prediction, learn_sigma=False, scale=np.sqrt(squares))
        self.time_shift = time_shift

    def noise_level(self, log_snr: float) -> tuple[float, float, float]:
        """Returns alpha, sigma and t = 1000 s at log_snr = log(alpha^2 / sigma^2)."""
        s = float(1 / (1 + np.exp(log_snr / 2)))
        return 1 - s, s, FULL * s

    def draw_timestep(self, sampling: str, generator: torch.Generator, device: torch.device) -> Tensor:
        """Returns t = 1000 s to train at, (), a real number; `sampling` as in `draw_time`, then shifted."""
        return FULL * shift_time(draw_time(sampling, generator, device), self.time_shift)

    def at(self, t: Tensor, x: Tensor) -> Any:
        """Returns the coefficients of steps t (B,), or the `Levels` of real t, shaped to broadcast over x (B, ...)."""
        if not t.is_floating_point():
            return super().at(t, x)
        s = (t / FULL).view(-1, *[1] * (x.ndim - 1))
        return Levels(alpha=1 - s, sigma=s)

    def original_timesteps(self, t: Tensor) -> Tensor:
        """Returns 1000 s (B,) of t (B,)."""
        return t if t.is_floating_point() else super().original_timesteps(t)

    def velocity(self, x: Tensor, x_start: Tensor, t: Tensor) -> Tensor:
        """Returns v = eps - x_0 of states x (B, ...) and their x_0 at timesteps t (B,), shaped like x."""
        return (x - x_start) / self.at(t, x).sigma

    def clock(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns s, the derivative of the path with respect to which is the velocity."""
        return sigma / (alpha + sigma)

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the target of the model's prediction, shaped like x_start."""
        return noise - x_start if self.prediction == "v" else x_start

    def x_start(self, prediction: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Returns the estimate of x_0 that a prediction at states x (B, ...) of these noise levels stands for."""
        return x - sigma * prediction if self.prediction == "v" else prediction
