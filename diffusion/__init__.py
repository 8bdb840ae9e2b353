"""Gaussian diffusion under the names users of OpenAI's guided-diffusion know.

diffusion = create_diffusion("50")
z = diffusion.ddim_sample_loop(denoiser, shape, clip_denoised=False, model_kwargs=dict(y=labels), device="cuda")
"""

from collections.abc import Callable
from functools import partialmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs import DiffusionOptions, UserError
from diffusion import losses, sampling
from diffusion.schedule import NOISE_SCHEDULES, Schedule, space_timesteps

PREDICTIONS = ("eps", "x0", "v")


class Diffusion(Schedule):
    """A noise process together with how a model's output is read: what it predicts, and which variance it has.

    A model is called as model(x, t, **model_kwargs) with x (B, ..., C, H, W), t (B,) original timesteps, and returns
    (B, ..., C, H, W), or 2C channels when the variance is learned. Holds constants only, so runs share nothing.
    """

    def __init__(self, original_betas: np.ndarray, timestep_map: list[int], prediction: str, learn_sigma: bool):
        super().__init__(original_betas, timestep_map)
        self.prediction = prediction
        self.learn_sigma = learn_sigma

    def split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """A model's output as prediction and, when it is learned, variance, each shaped like x."""
        channels = x.shape[-3]
        assert output.shape[-3] == channels * (1 + self.learn_sigma), f"output {output.shape} for input {x.shape}"
        return output.split(channels, dim=-3) if self.learn_sigma else (output, None)

    def target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model is trained to predict; v as in Salimans & Ho 2022, appendix D."""
        c = self.at(t, x_start)
        return {"eps": noise, "x0": x_start, "v": c.alpha * noise - c.sigma * x_start}[self.prediction]

    def interpret(self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t) from a model's output: "mean", "variance", "log_variance", "pred_xstart", each like x."""
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
        if self.learn_sigma:  # between the two bounds, Nichol & Dhariwal 2021, eq. 15
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
        """Run the model at x (B, ..., C, H, W), t (B,); returns what `interpret` returns, in fp32."""
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
    """Make the diffusion a model was trained with, over all of its timesteps or some (`schedule.space_timesteps`).

    A variance that is not learned is beta. Raises UserError on an unknown name.
    """
    if noise_schedule not in NOISE_SCHEDULES:
        raise UserError(f'unknown noise_schedule "{noise_schedule}"; valid are {", ".join(NOISE_SCHEDULES)}')
    if prediction not in PREDICTIONS:
        raise UserError(f'unknown prediction "{prediction}"; valid are {", ".join(PREDICTIONS)}')
    return Diffusion(
        NOISE_SCHEDULES[noise_schedule](diffusion_steps),
        space_timesteps(diffusion_steps, timestep_respacing),
        prediction,
        learn_sigma,
    )


def make_diffusion(options: DiffusionOptions, timestep_respacing: str | int = "") -> Diffusion:
    """The noise process of `options` (which also say learn_sigma): all of its timesteps, for training, or some."""
    return create_diffusion(
        timestep_respacing, options.noise_schedule, options.prediction, options.learn_sigma, options.diffusion_steps
    )
