"""Recorded sampling runs: the states and velocities of every step, a file for each seed.

Letters: B batch, N steps, F frames, C channels of the latents, h = w = H / 8.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs import SampleConfig
from configs.files import atomic_path
from diffusion.guidance import Guided
from diffusion.sampling import randn_per_sample
from models import model_dimensions
from sample.folder import labels_of
from sample.pipeline import Pipeline

BYTES_PER_VALUE = 4  # fp32


class Trajectories(NamedTuple):
    """Runs of a batch of seeds."""

    states: Tensor  # x_0 ... x_N, from noise to clean: (B, N + 1, F, C, h, w)
    velocities: Tensor  # v_0 ... v_(N-1), guided: (B, N, F, C, h, w)


def trajectory_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.safetensors"


def bytes_per_clip(cfg: SampleConfig) -> int:
    """Size of a recorded run of resolved options, with every step."""
    model, N = model_dimensions(cfg), cfg.num_sampling_steps
    return (2 * N + 1) * model["num_frames"] * model["in_channels"] * model["input_size"] ** 2 * BYTES_PER_VALUE


@torch.no_grad()
def record(
    pipe: Pipeline, folder: Path, seeds: Sequence[int], every_step: bool, on_step: Callable[[], object] | None = None
) -> None:
    """Samples `seeds` as one batch with the solver of the pipeline's options, uncached, and writes a file for each.

    every_step: keep all states and velocities; otherwise the last state alone.
    """
    cfg, model, diffusion = pipe.cfg, pipe.model, pipe.diffusion
    generators = [torch.Generator(pipe.device).manual_seed(seed) for seed in seeds]
    shape = (len(seeds), model.num_frames, model.in_channels, model.input_size, model.input_size)
    noise = randn_per_sample(shape, generators, pipe.device)
    states, velocities = [noise], []
    loop = diffusion.sample_loop_progressive(
        Guided(pipe.uncached, cfg.cfg_scale, model.num_classes),
        shape,
        noise,
        clip_denoised=False,
        model_kwargs={"y": labels_tensor(pipe, seeds)},
        device=pipe.device,
        eta=cfg.eta,
        generators=generators,
        method=cfg.sample_method,
    )
    for number, out in enumerate(loop):
        t = torch.full((len(seeds),), diffusion.num_timesteps - 1 - number, device=pipe.device)
        velocities.append(diffusion.velocity(states[-1], out["pred_xstart"], t))
        states.append(out["sample"])
        if on_step:
            on_step()
    for i, seed in enumerate(seeds):
        kept = (states, velocities) if every_step else (states[-1:], velocities[:0])
        shapes = [torch.stack([each[i] for each in some]) if some else torch.empty(0) for some in kept]
        run = {key: value.cpu() for key, value in zip(("states", "velocities"), shapes, strict=True)}
        with atomic_path(trajectory_path(folder, seed)) as temporary:
            save_file(run, temporary)


def load_trajectories(folder: Path, seeds: Sequence[int]) -> Trajectories:
    """The recorded runs of `seeds`."""
    runs = [load_file(trajectory_path(folder, seed)) for seed in seeds]
    return Trajectories(*(torch.stack([run[key] for run in runs]) for key in ("states", "velocities")))


def labels_tensor(pipe: Pipeline, seeds: Sequence[int]) -> Tensor | None:
    """The classes of the seeds' clips, (B,); None without classes."""
    labels = labels_of(seeds, pipe.cfg)
    return None if labels is None else torch.tensor(labels, device=pipe.device)
