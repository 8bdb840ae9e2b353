"""Which VAE is used, and its geometry, read from its config.json or its class without importing diffusers.

`vae` names a diffusers folder, or a class of one's own as `package.module:Class` with four members:

    latent_channels: int
    stride: tuple[int, int]  # (time, space), pixels per latent. time = 1: frames are encoded and decoded one by one
    def encode(self, videos): ...  # (B, F, 3, H, W) in [-1, 1] -> mean and standard deviation, (B, f, C, h, w) each
    def decode(self, latents): ...  # (B, f, C, h, w) -> (B, F, 3, H, W)

The class is made without arguments. With a time stride, F = 1 + time k frames have f = 1 + k latents, as in causal
VAEs; `causal = False` means F = time k and f = k.
"""

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import UserError

CHANNELS = ("vq_embed_dim", "latent_channels", "z_dim", "z_channels")  # keys of a config; the first one counts
LEVELS = ("down_block_out_channels", "encoder_block_out_channels", "block_out_channels", "ch_mult")  # so do these


class Kind(NamedTuple):
    """How a class of diffusers is called, which lengths it takes, and how it bounds memory along time."""

    takes: str = "images"  # images, frames (clips of one frame) or clips
    memory: str = "frame by frame"
    causal: bool = True  # clips have 1 + time * multiple * k frames; else time * multiple * k
    multiple: int = 1


STREAM = Kind("clips", "its own stream")
WHOLE = Kind("clips", "a clip at once")
KINDS = {
    "AsymmetricAutoencoderKL": Kind(),
    "AutoencoderDC": Kind(),
    "AutoencoderKL": Kind(),
    "AutoencoderKLAllegro": WHOLE._replace(causal=False),
    "AutoencoderKLCogVideoX": STREAM._replace(multiple=2),
    "AutoencoderKLCosmos": WHOLE,
    "AutoencoderKLFlux2": Kind(),
    "AutoencoderKLHunyuanImage": Kind(),
    "AutoencoderKLHunyuanImageRefiner": Kind("frames"),
    "AutoencoderKLHunyuanVideo": Kind("clips", "its own tiles"),
    "AutoencoderKLHunyuanVideo15": WHOLE,
    "AutoencoderKLKVAE": Kind(),
    "AutoencoderKLKVAEVideo": STREAM,
    "AutoencoderKLLTX2Video": WHOLE,
    "AutoencoderKLLTXVideo": WHOLE,
    "AutoencoderKLMagvit": STREAM,
    "AutoencoderKLMochi": WHOLE,
    "AutoencoderKLQwenImage": STREAM,
    "AutoencoderKLQwenImage21": Kind("frames"),
    "AutoencoderKLTemporalDecoder": Kind("images", "decodes a clip at once"),
    "AutoencoderKLWan": STREAM,
    "AutoencoderTiny": Kind(),
    "AutoencoderVidTok": WHOLE,
    "Kandinsky6SRVAE": STREAM,
    "VQModel": Kind(),
}


def _space(config: Mapping[str, Any]) -> int:
    """Returns the pixels per latent along a side."""
    if ratio := config.get("spatial_compression_ratio"):
        return ratio
    if "spatio_temporal_scaling" in config:
        return config["patch_size"] * 2 ** _halvings(config, except_for="temporal")
    if "temperal_downsample" in config:
        return 2 ** len(config["temperal_downsample"]) * (config.get("patch_size") or 1)
    if "spatial_expansions" in config:
        return math.prod(config["spatial_expansions"])
    if config.get("spatial_ds") is not None:
        return 2 ** len(config["spatial_ds"])
    return 2 ** (len(next(config[key] for key in LEVELS if key in config)) - 1)


def _time(config: Mapping[str, Any]) -> int:
    """Returns the frames per latent frame of a class that takes clips."""
    if ratio := config.get("temporal_compression_ratio") or config.get("temporal_compress_times"):
        return ratio
    if "spatio_temporal_scaling" in config:
        return config["patch_size_t"] * 2 ** _halvings(config, except_for="spatial")
    if "temperal_downsample" in config:
        return 2 ** sum(config["temperal_downsample"])
    if "temporal_expansions" in config:
        return math.prod(config["temporal_expansions"])
    if "tempo_ds" in config:
        return 2 ** (2 if config["tempo_ds"] is None else len(config["tempo_ds"]))
    return 2 ** sum(
        "Temporal" in block for block in config["down_block_types"][:-1]
    )  # Magvit: its last block halves none


def _halvings(config: Mapping[str, Any], except_for: str) -> int:
    """Returns how many stages of LTX halve time and space, or one of them, but for those of one downsample_type."""
    scaling = config["spatio_temporal_scaling"]
    kinds = config.get("downsample_type") or ("conv",) * len(scaling)
    return sum(on and kind != except_for for on, kind in zip(scaling, kinds, strict=False))


# ---------------------------------------------------------------------------------------------------------------------
# The VAE of some options
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VaeSpec:
    """The geometry of a VAE's latents."""

    name: str  # its class
    channels: int
    time: int  # frames per latent frame, after the first one if `causal`
    space: int  # pixels per latent along a side
    causal: bool = True  # the first frame has a latent frame of its own
    multiple: int = 1  # the other latent frames come in multiples of this

    @property
    def lengths(self) -> str:
        """The possible numbers of frames, in words."""
        step = self.time * self.multiple
        return "any" if step == 1 else f"1 + {step}k" if self.causal else f"{step}k"

    def latent_frames(self, num_frames: int) -> int:
        """Returns the number of latent frames of a clip; UserError, with the nearest lengths, if there is none."""
        step, first = self.time * self.multiple, int(self.causal and self.time > 1)
        count, rest = divmod(num_frames - first, step)
        if rest or (num_frames == 0):
            near = [length for length in (first + step * count, first + step * (count + 1)) if length > 0]
            raise UserError(
                f"num_frames: {self.name} takes {self.lengths} frames, not {num_frames}; the nearest: "
                f"{' and '.join(map(str, near))}"
            )
        return first + count * self.multiple


PUBLISHED = VaeSpec("AutoencoderKL", channels=4, time=1, space=8)  # of the published checkpoints


def config_spec(config: Mapping[str, Any], source: str | Path = "its config") -> VaeSpec:
    """Returns the geometry of the VAE with this config.json of diffusers.

    Raises:
        UserError: its class cannot be used (the error lists those that can), or the config lacks a key.
    """
    name = config.get("_class_name", "AutoencoderKL")
    if name not in KINDS:
        raise UserError(f"vae: {name} in {source} cannot be used; these can: {', '.join(KINDS)}, and a class of yours")
    kind = KINDS[name]
    if not config.get("is_causal", True):  # VidTok: it decodes 16 frames at a time
        kind = kind._replace(causal=False, multiple=4)
    try:
        channels = next(config[key] for key in CHANNELS if config.get(key))
        time = _time(config) if kind.takes == "clips" else 1
        return VaeSpec(name, channels, time, _space(config), kind.causal, kind.multiple)
    except (KeyError, StopIteration) as error:
        raise UserError(f"vae: {source} lacks {error or 'a key of'}, which {name} needs") from None


def own_class(vae: str) -> type | None:
    """Returns the class that `package.module:Class` names, or None for a folder.

    Raises:
        UserError: there is no such class, or it lacks a member of the protocol.
    """
    module, colon, name = vae.partition(":")
    if not colon or not all(part.isidentifier() for part in [*module.split("."), name]):
        return None
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"vae: cannot import {vae} ({error}); is its folder on PYTHONPATH?") from None
    if missing := [key for key in ("latent_channels", "stride", "encode", "decode") if not hasattr(cls, key)]:
        raise UserError(f"vae: {vae} lacks {', '.join(missing)}; see models/vaes.py for the four members of a VAE")
    numbers = [cls.latent_channels, *(cls.stride if isinstance(cls.stride, tuple) else ())]
    if len(numbers) != 3 or not all(isinstance(number, int) and number > 0 for number in numbers):
        raise UserError(f"vae: {vae}: latent_channels must be a number and stride (time, space), not {cls.stride}")
    return cls


def describe_vae(args: Any) -> str:
    """Returns the VAE of `args` and the shape that it gives to a clip, in one line."""
    spec = vae_spec(args)
    side = args.image_size // spec.space
    clip = f"{args.num_frames} frames of {args.image_size} x {args.image_size}"
    return (
        f"vae: {spec.name}, {clip} -> latents {spec.latent_frames(args.num_frames)} x {spec.channels} x {side} x {side}"
    )


def vae_spec(args: Any) -> VaeSpec:
    """Returns the geometry of the VAE of `args` (configs.AutoencoderOptions); of the published one if it is not there.

    Raises:
        UserError: its class cannot be used.
    """
    vae = getattr(args, "vae", None) or "vae"
    if cls := own_class(vae):
        time, space = cls.stride
        return VaeSpec(vae, cls.latent_channels, time, space, causal=time == 1 or getattr(cls, "causal", True))
    file = Path(getattr(args, "pretrained_model_path", None) or "", vae, "config.json")
    if not file.is_file():
        return PUBLISHED
    try:
        return config_spec(dict(json.loads(file.read_text(encoding="utf-8"))), file)
    except (ValueError, TypeError) as error:
        raise UserError(f"cannot load the VAE in {file.parent}: config.json is damaged ({error})") from None
