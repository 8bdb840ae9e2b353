"""Encoding of videos to latents and decoding of latents, with the AutoencoderKL of diffusers.

Letters: B batch, F frames, H = W pixels of a side, C = 4 latent channels, h = w = H / downsample.
"""

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from configs import UserError, require_path
from models import LATENT_DOWNSAMPLE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def find_weights(folder: str | Path) -> Path:
    """Returns the file of weights in a diffusers folder; raises UserError if there is no VAE in it."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no VAE in {folder}: run `python pretrained/download_ckpts.py`, or set the path of your own")
    safe = folder / "diffusion_pytorch_model.safetensors"
    return safe if safe.is_file() else safe.with_suffix(".bin")


def vae_file(cfg: Any) -> Path:
    """Returns the file of weights of `cfg`'s VAE (configs.AutoencoderOptions); raises UserError if there is none."""
    return find_weights(require_path(cfg, "pretrained_model_path") / cfg.vae)


class LatentCodec:
    """A frozen image VAE applied to every frame of a video.

    Latents are multiplied by the VAE's own scaling_factor, so that their standard deviation is about 1. The VAE
    processes at most `chunk_frames` frames at once, so that memory does not grow with the batch.
    """

    def __init__(self, vae: "AutoencoderKL", chunk_frames: int = 16):
        self.vae = vae.eval().requires_grad_(False)
        self.scale: float = vae.config.scaling_factor
        self.chunk_frames = chunk_frames

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        chunk_frames: int = 16,
    ) -> "LatentCodec":
        """Returns the codec of the VAE in a diffusers folder (config.json and .safetensors or .bin weights).

        Code in the files is never executed.

        Args:
            dtype: of the weights and the computation.

        Raises:
            UserError: the folder is missing, the weights are damaged, or they are those of another model.
        """
        from diffusers import AutoencoderKL  # slow to import

        weights = find_weights(folder)
        try:
            vae, info = AutoencoderKL.from_pretrained(
                folder,
                torch_dtype=dtype,
                use_safetensors=weights.suffix == ".safetensors",  # diffusers reads .bin with weights_only=True
                output_loading_info=True,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise UserError(f"cannot load the VAE in {folder}: {' '.join(str(error).split())[:200]}") from None
        # diffusers only warns of missing weights, and fills them with random numbers
        if misfits := info["missing_keys"] + info["unexpected_keys"] + info["mismatched_keys"]:
            raise UserError(
                f"the weights in {folder} do not fit its config.json: {len(misfits)} names, as {misfits[0]}"
            )
        return cls(vae.to(device), chunk_frames)

    @property
    def downsample(self) -> int:
        """The VAE's stride: pixels per latent along a side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def fingerprint(self) -> str:
        """Returns a short hash of the encoder's weights and the scale, on which latents depend."""
        digest = hashlib.sha256(str(self.scale).encode())
        for name, value in self.vae.state_dict().items():
            if name.startswith(("encoder.", "quant_conv.")):
                digest.update(value.float().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def moments(self, videos: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the latents of videos.

        (B, F, 3, H, W), uint8 or in [-1, 1] -> twice (B, F, C, h, w)
        """

        def encode(frames: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 2C, h, w)
            frames = frames / 127.5 - 1 if frames.dtype == torch.uint8 else frames
            posterior = self.vae.encode(frames.to(self.vae.dtype)).latent_dist
            return torch.cat([posterior.mean, posterior.std], dim=1) * self.scale

        mean, std = self._by_chunks(encode, videos).chunk(2, dim=2)
        return mean, std

    def encode(self, videos: Tensor) -> Tensor:
        """Returns the mean latents of videos: (B, F, 3, H, W), uint8 or in [-1, 1] -> (B, F, C, h, w)."""
        return self.moments(videos)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the videos of latents: (B, F, C, h, w) -> (B, F, 3, H, W) in [-1, 1]."""

        def decode(z: Tensor) -> Tensor:  # (N, C, h, w) -> (N, 3, H, W)
            return self.vae.decode(z.to(self.vae.dtype) / self.scale).sample.clamp(-1, 1)

        return self._by_chunks(decode, latents)

    @torch.no_grad()  # not inference_mode: training uses the results
    def _by_chunks(self, function: Callable[[Tensor], Tensor], videos: Tensor) -> Tensor:
        """Applies `function` to the frames of videos (B, F, ...), `chunk_frames` at a time; returns fp32."""
        frames = videos.flatten(0, 1)  # (B F, ...)
        chunks = [function(chunk).float() for chunk in frames.split(self.chunk_frames)]
        return torch.cat(chunks).unflatten(0, videos.shape[:2])


def load_codec(cfg: Any, device: torch.device) -> LatentCodec:
    """Returns the codec of `cfg` (configs.AutoencoderOptions and in_channels), in fp32.

    Raises:
        UserError: there is no VAE, or its latents do not fit the model.
    """
    folder = vae_file(cfg).parent
    codec = LatentCodec.from_pretrained(folder, device, chunk_frames=cfg.vae_chunk_frames)
    channels = codec.vae.config.latent_channels
    if (codec.downsample, channels) != (LATENT_DOWNSAMPLE, cfg.in_channels):
        theirs = f"{codec.downsample}x with {channels} channels"
        raise UserError(f"vae: {folder} is {theirs}, the model wants {LATENT_DOWNSAMPLE}x with {cfg.in_channels}")
    return codec
