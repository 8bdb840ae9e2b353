"""What a calibration will take, told before it starts: work, memory, disk."""

import math

from configs import cli
from models import model_dimensions
from models.hardware import DTYPES
from models.macs import count_parameters
from tools.recipes.cached import AGES, WINDOW
from tools.recipes.calibration import GROWTH_POSITIONS, PROBED_CLIPS, SCREENED_CLIPS, target_options
from tools.recipes.candidates import EXPONENTS, ORDERS, SOLVERS, cached_share
from tools.recipes.options import CalibrateConfig
from tools.recipes.search import growth_positions
from tools.recipes.trajectories import bytes_per_clip

LIBRARIES, VAE_BYTES, VAE_WIDTH = 0.9e9, 0.34e9, 128  # of a process; of the published VAE
FORWARD_BUFFERS, DECODER_BUFFERS = 5, 7.5  # of the size of a layer's output, measured at XL/2 on a CPU


def work(cfg: CalibrateConfig) -> float:
    """Full steps of one clip, guided if the sampling is, that the calibration takes."""
    target, N, c = target_options(cfg).num_sampling_steps, cfg.num_sampling_steps, cached_share(cfg)
    chosen_on, held_out, deterministic = cfg.num_calibration, cfg.num_clips, cfg.sample_method in SOLVERS
    probed, screened = min(PROBED_CLIPS, chosen_on), min(SCREENED_CLIPS, chosen_on)
    once = (chosen_on + held_out) * target + probed * N * (1 + len(AGES) * c)
    once += 2 * probed * sum(target - p for p in growth_positions(target, GROWTH_POSITIONS))
    clips = len(ORDERS) * (held_out + len(EXPONENTS) * screened) + chosen_on - screened + held_out  # interval, placed
    clips += 2 * cfg.num_climbs * chosen_on
    if not deterministic:  # plain and held
        clips += (1 + len(EXPONENTS)) * chosen_on + 2 * held_out
    if deterministic:  # plain, placed around two more solvers, fitted
        kinds = 2 + (cfg.cfg_scale != 1)
        clips += len(SOLVERS) * (chosen_on + held_out) + (len(SOLVERS) - 1) * chosen_on
        clips += (len(EXPONENTS) - 1 + kinds) * chosen_on + kinds * held_out
    budgets = [0.5] * math.ceil(math.log2(N)) if cfg.min_psnr else cfg.budgets
    return once + clips * N * sum(budgets)


def peak_bytes(cfg: CalibrateConfig) -> float:
    """Memory of a process at its peak, in bytes: libraries, weights, and what the largest phase needs."""
    d, size = model_dimensions(cfg), DTYPES[cfg.precision].itemsize
    rows = cfg.per_proc_batch_size * (1 if cfg.cfg_scale == 1 else 2)
    tokens = d["num_frames"] * (d["input_size"] // d["patch_size"]) ** 2
    feature = rows * tokens * d["hidden_size"] * size  # also that of any layer's output
    forward = feature * (FORWARD_BUFFERS + d["num_skips"])
    if cfg.attention_mode == "math":
        forward += 3 * rows * tokens * d["num_heads"] * tokens // d["num_frames"] * size
    frames = min(cfg.vae_chunk_frames, cfg.per_proc_batch_size * cfg.num_frames)
    decoding = frames * cfg.image_size**2 * VAE_WIDTH * 4 * DECODER_BUFFERS
    run = bytes_per_clip(target_options(cfg)) / 2  # its states
    fitting = forward + math.ceil(cfg.num_calibration / cli.world_size()) * run
    weights = count_parameters(cfg) * size + VAE_BYTES
    return LIBRARIES + weights + max((WINDOW + 1) * feature + forward, decoding, fitting)


def disk_bytes(cfg: CalibrateConfig) -> int:
    """Size of the recorded runs."""
    return cfg.num_calibration * bytes_per_clip(target_options(cfg))
