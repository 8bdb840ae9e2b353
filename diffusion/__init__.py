"""Noise processes: Gaussian diffusion, with the names of OpenAI's guided-diffusion, and flow matching.

diffusion = create_diffusion("50")
z = diffusion.ddim_sample_loop(denoiser, shape, clip_denoised=False, model_kwargs=dict(y=labels), device="cuda")
"""

from collections.abc import Sequence

import numpy as np

from configs import DiffusionOptions, UserError, choice
from diffusion.flow import Flow, flow_timesteps
from diffusion.gaussian import Diffusion
from diffusion.schedule import NOISE_SCHEDULES, space_timesteps

PREDICTIONS = ("eps", "x0", "v")
PROCESSES = {"gaussian": PREDICTIONS, "flow": ("v", "x0")}  # and the predictions of each


def create_diffusion(
    timestep_respacing: str | int | Sequence[float] | None = "",
    noise_schedule: str = "linear",
    prediction: str = "eps",
    learn_sigma: bool = True,
    diffusion_steps: int = 1000,
    process: str = "gaussian",
    time_shift: float = 1.0,
) -> Diffusion:
    """Returns the noise process that a model was trained with, over all of its timesteps or some of them.

    Args:
        timestep_respacing: the timesteps, see `schedule.space_timesteps` and `flow.flow_timesteps`; "" for all.
        learn_sigma: False: the variance is fixed to beta.
        process: "gaussian", or "flow", which knows neither betas nor a learned variance.
        time_shift: of a flow, see `flow.shift_time`.

    Raises:
        UserError: a name is unknown, options contradict each other, or the timesteps are impossible.
    """
    predictions = PROCESSES[choice("process", process, PROCESSES)]
    if process == "flow":
        if prediction not in predictions:
            raise UserError(f"prediction: {prediction} does not go with process: flow; valid: {', '.join(predictions)}")
        if learn_sigma:
            raise UserError("learn_sigma: a flow has no variance to learn; set learn_sigma=False with process: flow")
        if (noise_schedule, diffusion_steps) != ("linear", 1000):
            raise UserError("noise_schedule, diffusion_steps: a flow has neither; leave them out with process: flow")
        return Flow(flow_timesteps(timestep_respacing, time_shift), prediction, time_shift)
    if time_shift != 1:
        raise UserError(f"time_shift: {time_shift:g} shifts the time of a flow; leave it at 1 with process: gaussian")
    betas = NOISE_SCHEDULES[choice("noise_schedule", noise_schedule, NOISE_SCHEDULES)](diffusion_steps)
    timestep_map = space_timesteps(diffusion_steps, timestep_respacing)
    alphas_cumprod = np.cumprod(1 - betas)[timestep_map]
    return Diffusion(alphas_cumprod, timestep_map, choice("prediction", prediction, predictions), learn_sigma)


def make_diffusion(options: DiffusionOptions, timestep_respacing: str | int | Sequence[float] = "") -> Diffusion:
    """Returns `create_diffusion` with the values of `options` (DiffusionOptions and learn_sigma)."""
    o = options
    return create_diffusion(
        timestep_respacing, o.noise_schedule, o.prediction, o.learn_sigma, o.diffusion_steps, o.process, o.time_shift
    )
