"""The Gaussian process of DDPM, with the names of OpenAI's guided-diffusion."""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion import losses, sampling
from diffusion.schedule import Schedule


def draw_time(sampling: str, generator: torch.Generator, device: torch.device) -> Tensor:
    """Returns a time in 0 ... 1, (), that is "uniform" or "logit-normal" (logit(s) is standard normal)."""
    draw = torch.empty((), device=device)
    return draw.uniform_(generator=generator) if sampling == "uniform" else draw.normal_(generator=generator).sigmoid()


class Diffusion(Schedule):
    """A noise process, and the meaning of the model's output: its target, and whether it contains the variance.

    A model is called as model(x, t, **model_kwargs) with x (B, ..., C, H, W) and t (B,), original timesteps. It
    returns (B, ..., C, H, W), or 2C channels if the variance is learned. An object holds only constants, so any number
    of runs can share it.
    """

    process = "gaussian"

    def __init__(
        self,
        alphas_cumprod: np.ndarray,
        timestep_map: list,
        prediction: str,
        learn_sigma: bool,
        scale: np.ndarray | float = 1.0,
    ):
        super().__init__(alphas_cumprod, timestep_map, scale)
        self.prediction = prediction
        self.learn_sigma = learn_sigma

    def noise_level(self, log_snr: float) -> tuple[float, float, float]:
        """Returns alpha, sigma and the original timestep, a real number, at log_snr = log(alpha^2 / sigma^2).

        The timestep is interpolated; it is the first or the last one where the process does not reach that far.
        """
        known = np.log(self.alphas_cumprod / (1 - self.alphas_cumprod))[::-1]  # ascending
        alpha, sigma = (float(np.sqrt(1 / (1 + np.exp(-x)))) for x in (log_snr, -log_snr))
        return alpha, sigma, float(np.interp(log_snr, known, self.timestep_map[::-1]))

    def draw_timestep(self, sampling: str, generator: torch.Generator, device: torch.device) -> Tensor:
        """Returns a timestep to train at, (); `sampling` as in `draw_time`."""
        if sampling == "uniform":
            return torch.empty((), dtype=torch.int64, device=device).random_(self.num_timesteps, generator=generator)
        time = draw_time(sampling, generator, device)
        return (time * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns a model's output as prediction and variance (None if it is not learned), each shaped like x."""
        channels = x.shape[-3]
        assert output.shape[-3] == channels * (1 + self.learn_sigma), f"output {output.shape} for input {x.shape}"
        return output.split(channels, dim=-3) if self.learn_sigma else (output, None)

    def velocity(self, x: Tensor, x_start: Tensor, t: Tensor) -> Tensor:
        """Returns v = alpha eps - sigma x_0 of states x (B, ...) and their x_0 at timesteps t (B,), shaped like x."""
        c = self.at(t, x)
        return (c.alpha * x - x_start) / c.sigma

    def clock(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Returns the process's own time, the derivative of the path with respect to which is the velocity.

        Here it is the angle atan(sigma / alpha). It is the same for alpha and sigma times any number.
        """
        return torch.atan2(sigma, alpha)

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the target of the model's prediction; v as in Salimans & Ho 2022, appendix D."""
        c = self.at(t, x_start)
        return {"eps": noise, "x0": x_start, "v": c.alpha * noise - c.sigma * x_start}[self.prediction]

    def x_start(self, prediction: Tensor, x: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """Returns the estimate of x_0 that a prediction at states x (B, ...) of these noise levels stands for."""
        match self.prediction:
            case "eps":
                return (x - sigma * prediction) / alpha
            case "x0":
                return prediction
            case "v":
                return alpha * x - sigma * prediction

    def interpret(self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool) -> dict[str, Tensor]:
        """Returns p(x_{t-1} | x_t), given a model's output; see `posterior`."""
        prediction, variance = self.split(output, x)
        c = self.at(t, x)
        x_start = self.x_start(prediction, x, c.alpha, c.sigma)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        return self.posterior(x_start, x, t, variance)

    def posterior(self, x_start: Tensor, x: Tensor, t: Tensor, variance: Tensor | None) -> dict[str, Tensor]:
        """Returns p(x_{t-1} | x_t), given an estimate of x_0 and, if it is learned, the variance as `split` returns it.

        The keys are "mean", "variance", "log_variance" and "pred_xstart" (the estimate), each shaped like x.
        """
        c = self.at(t, x)
        if self.learn_sigma:  # the output interpolates between two bounds: Nichol & Dhariwal 2021, eq. 15
            log_variance = torch.lerp(c.posterior_log_variance, c.beta_log_variance, (variance + 1) / 2)
        else:
            log_variance = c.large_log_variance.expand_as(x)
        mean, _, _ = self.q_posterior_mean_variance(x_start, x, t)
        return {"mean": mean, "variance": log_variance.exp(), "log_variance": log_variance, "pred_xstart": x_start}

    def p_mean_variance(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Runs the model on x (B, ..., C, H, W), t (B,); returns p(x_{t-1} | x_t) as `interpret` does, in fp32."""
        output = model(x, self.original_timesteps(t), **(model_kwargs or {})).float()
        return self.interpret(output, x, t, clip_denoised)

    training_losses = losses.training_losses
    x_start_errors = losses.x_start_errors
    sample_loop = sampling.sample_loop
    sample_loop_progressive = sampling.sample_loop_progressive
    p_sample_loop = partialmethod(sampling.sample_loop, method="ddpm")
    p_sample_loop_progressive = partialmethod(sampling.sample_loop_progressive, method="ddpm")
    ddim_sample_loop = partialmethod(sampling.sample_loop, method="ddim")
    ddim_sample_loop_progressive = partialmethod(sampling.sample_loop_progressive, method="ddim")
