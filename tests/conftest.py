"""What several test files need: a tiny model with random weights, sampled in a second; stand-ins of detectors."""

import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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


@contextmanager
def own_process_state() -> Iterator[None]:
    """For a program that runs in the tests' process: afterwards accelerate and the signal handlers are as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def fresh_process_state():
    with own_process_state():
        yield


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


@pytest.fixture(scope="session")
def flat(tiny, tmp_path_factory) -> Path:
    """`tiny` with a VAE that decodes all latents to one color, as a model that has not learned yet may seem to do."""
    folder = tmp_path_factory.mktemp("flat")
    shutil.copytree(tiny.parent / "vae", folder / "vae")
    weights = load_file(file := folder / "vae/diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.weight"].zero_()
    weights["decoder.conv_out.bias"].copy_(torch.tensor([0.9, 0.1, -0.9]))
    save_file(weights, file)
    text = tiny.read_text().replace(f"pretrained_model_path: {tiny.parent}", f"pretrained_model_path: {folder}")
    (folder / "sample.yaml").write_text(text)
    return folder / "sample.yaml"


@pytest.fixture
def tree() -> Iterator[Path]:
    """A folder that any user may enter, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def closed_to_us(path: Path) -> Iterator[None]:
    """A file or folder that this process may not read, also where the tests run as root: it is another user then."""
    mode = path.stat().st_mode
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


class Pooled(nn.Module):
    """A detector in small: random features of pixels that were pooled over space and time."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(12, width)

    def features(self, x: Tensor) -> Tensor:
        x = x.flatten(2).float() / 255 * 2 - 1  # (N, 3, P)
        moments = torch.cat([x.mean(2), x.std(2), x.diff(dim=2).abs().mean(2), (x**3).mean(2)], dim=1)  # (N, 12)
        return self.linear(30 * moments)


class I3D(Pooled):
    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert rescale and resize and return_features and x.dtype == torch.uint8 and x.dim() == 5
        return self.features(x)


class Inception(Pooled):
    def forward(self, x: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert x.dtype == torch.uint8 and x.dim() == 4 and return_features != no_output_bias
        y = self.features(x)
        return y if return_features else y[:, :6].softmax(1)


class C3D(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).softmax(1)


class Scaled(Pooled):
    """Takes floating pixels of 224 x 224, as VideoMAE and V-JEPA do."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32 and x.shape[3:] == (224, 224)
        return self.features(255 * x)


def save_script(module: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> dict[str, Path]:
    """TorchScript files that are called as the published ones are."""
    folder = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(0)
    modules = {"i3d": I3D(400), "inception": Inception(2048), "c3d": C3D(5)}
    modules |= {"videomae": Scaled(1408), "vjepa": Scaled(1280)}
    return {name: save_script(module, folder / f"{name}.pt") for name, module in modules.items()}
