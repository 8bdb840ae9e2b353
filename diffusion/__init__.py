"""Gaussian diffusion, with the names of OpenAI's guided-diffusion.

diffusion = create_diffusion("50")
z = diffusion.ddim_sample_loop(denoiser, shape, clip_denoised=False, model_kwargs=dict(y=labels), device="cuda")
"""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import DiffusionOptions, choice
from diffusion import losses, sampling
from diffusion.schedule import NOISE_SCHEDULES, Schedule, space_timesteps

PREDICTIONS = ("eps", "x0", "v")


class Diffusion(Schedule):
    """A noise process, and the meaning of the model's output: its target, and whether it contains the variance.

    A model is called as model(x, t, **model_kwargs) with x (B, ..., C, H, W) and t (B,), original timesteps. It
    returns (B, ..., C, H, W), or 2C channels if the variance is learned. An object holds only constants, so any number
    of runs can share it.
    """

    def __init__(self, original_betas: np.ndarray, timestep_map: list[int], prediction: str, learn_sigma: bool):
        super().__init__(original_betas, timestep_map)
        self.prediction = prediction
        self.learn_sigma = learn_sigma

    def split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns a model's output as prediction and variance (None if it is not learned), each shaped like x."""
        channels = x.shape[-3]
        assert output.shape[-3] == channels * (1 + self.learn_sigma), f"output {output.shape} for input {x.shape}"
        return output.split(channels, dim=-3) if self.learn_sigma else (output, None)

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns the target of the model's prediction; v as in Salimans & Ho 2022, appendix D."""
        c = self.at(t, x_start)
        return {"eps": noise, "x0": x_start, "v": c.alpha * noise - c.sigma * x_start}[self.prediction]

    def interpret(self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool) -> dict[str, Tensor]:
        """Returns p(x_{t-1} | x_t), given a model's output.

        The keys are "mean", "variance", "log_variance" and "pred_xstart" (the estimate of x_0), each shaped like x.
        """
        prediction, variance = self.split(output, x)
        c = self.at(t, x)
        match self.prediction:
            case "eps":
                x_start = (x - c.sigma * prediction) / c.alpha
            case "x0":
                x_start = prediction
            case "v":
                x_start = c.alpha * x - c.sigma * prediction
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
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
    sample_loop = sampling.sample_loop
    sample_loop_progressive = sampling.sample_loop_progressive
    p_sample_loop = partialmethod(sampling.sample_loop, method="ddpm")
    p_sample_loop_progressive = partialmethod(sampling.sample_loop_progressive, method="ddpm")
    ddim_sample_loop = partialmethod(sampling.sample_loop, method="ddim")
    ddim_sample_loop_progressive = partialmethod(sampling.sample_loop_progressive, method="ddim")


def create_diffusion(
    timestep_respacing: str | int | None = "",
    noise_schedule: str = "linear",
    prediction: str = "eps",
    learn_sigma: bool = True,
    diffusion_steps: int = 1000,
) -> Diffusion:
    """Returns the noise process that a model was trained with, over all of its timesteps or some of them.

    Args:
        timestep_respacing: the timesteps, see `schedule.space_timesteps`; "" for all.
        learn_sigma: False: the variance is fixed to beta.

    Raises:
        UserError: a name is unknown, or the timesteps are impossible.
    """
    return Diffusion(
        NOISE_SCHEDULES[choice("noise_schedule", noise_schedule, NOISE_SCHEDULES)](diffusion_steps),
        space_timesteps(diffusion_steps, timestep_respacing),
        choice("prediction", prediction, PREDICTIONS),
        learn_sigma,
    )


def make_diffusion(options: DiffusionOptions, timestep_respacing: str | int = "") -> Diffusion:
    """Returns `create_diffusion` with the values of `options` (DiffusionOptions and learn_sigma)."""
    return create_diffusion(
        timestep_respacing, options.noise_schedule, options.prediction, options.learn_sigma, options.diffusion_steps
    )
