"""What several test files need: a tiny model with random weights, sampled in a second."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from configs import SampleConfig, load_config
from models import get_models

TINY_YAML = """
ckpt: {folder}/skip.safetensors
pretrained_model_path: {folder}
save_video_path: {folder}/videos
model: Latte-skip
image_size: 32
num_frames: 4
num_classes: 3
hidden_size: 16
depth: 8
num_heads: 2
sample_method: ddim
num_sampling_steps: 6
cfg_scale: 2.0
precision: fp32
per_proc_batch_size: 2
num_fvd_samples: 5
"""


def save_random_weights(model: torch.nn.Module, path: str | Path) -> None:
    """A checkpoint in which no weight is zero, so that every layer counts."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A YAML file of sampling options, with a checkpoint and a VAE beside it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "sample.yaml").write_text(TINY_YAML.format(folder=folder))
    torch.manual_seed(0)
    save_random_weights(get_models(load_config(SampleConfig, folder / "sample.yaml")), folder / "skip.safetensors")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        latent_channels=4,
        mid_block_add_attention=False,
    ).save_pretrained(folder / "vae")
    return folder / "sample.yaml"
