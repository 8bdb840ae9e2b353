"""Encoding of videos to latents and decoding of latents, with any autoencoder (models/vaes.py).

Letters: B clips, F frames, H = W pixels of a side; f frames of latents, C channels, h = w = H / spec.space.
"""

import hashlib
import inspect
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from configs import UserError, require_path
from models.vaes import KINDS, VaeSpec, config_spec, own_class, vae_spec


def find_weights(folder: str | Path) -> Path:
    """Returns the file of weights in a diffusers folder; raises UserError if there is no VAE in it."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no VAE in {folder}: run `python pretrained/download_ckpts.py`, or set the path of your own")
    safe = folder / "diffusion_pytorch_model.safetensors"
    return safe if safe.is_file() else safe.with_suffix(".bin")


def vae_file(cfg: Any) -> Path:
    """Returns the file of weights of `cfg`'s VAE (configs.AutoencoderOptions), or the source of a class of one's own.

    Raises:
        UserError: there is no VAE.
    """
    if cls := own_class(cfg.vae):
        return Path(inspect.getfile(cls))
    if Path(cfg.vae).is_absolute():
        return find_weights(cfg.vae)
    return find_weights(require_path(cfg, "pretrained_model_path", folder=True) / cfg.vae)


class LatentCodec:
    """A frozen VAE with a normalization of its latents, whose standard deviation it brings to about 1.

    The normalization is (x - shift) * scale, by the statistics in the VAE's config, or else none. `normalize` adds
    measured statistics. At most `chunk_frames` frames are processed at once where frames do not depend on one another;
    else clips are, one by one.
    """

    def __init__(self, vae: Any, chunk_frames: int = 16, spec: VaeSpec | None = None):
        self.vae, self.chunk_frames = vae, chunk_frames
        if isinstance(vae, nn.Module):
            vae.eval().requires_grad_(False)
        self.spec = spec or config_spec({**vae.config, "_class_name": type(vae).__name__})
        self.kind = KINDS.get(self.spec.name)  # None: a class of one's own
        tensors = [*vae.parameters()] if isinstance(vae, nn.Module) else []
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.dtype = tensors[0].dtype if tensors else torch.float32
        self.shift, self.scale = self._statistics() if self.kind else (0.0, None)
        self.has_statistics = self.scale is not None
        self.scale = 1.0 if self.scale is None else self.scale
        self.own = self.shift, self.scale  # without `normalize`

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
        import diffusers  # slow to import

        weights = find_weights(folder)
        name = vae_spec(SimpleNamespace(vae=str(Path(folder).absolute()))).name
        if not hasattr(diffusers, name):
            raise UserError(f"vae: diffusers {diffusers.__version__} has no {name}, the class of {folder}: upgrade it")
        try:
            vae, info = getattr(diffusers, name).from_pretrained(
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

    def _statistics(self) -> tuple[float | Tensor, float | Tensor | None]:
        """Returns shift and scale as the config of a diffusers VAE states them; scale None: it states none."""
        stated = {**dict(self.vae.named_buffers()), **self.vae.config}  # LTX's weights hold them
        shift, scale = stated.get("shift_factor") or 0.0, stated.get("scaling_factor")
        mean, std = stated.get("latents_mean"), stated.get("latents_std")
        if mean is None:
            return shift, scale
        # (C, 1, 1), or (n, C, 1, 1) for Cosmos, which states them for each of n frames of latents
        mean, std = (torch.as_tensor(each, device=self.device).float() for each in (mean, std))
        mean, std = (each.view(self.spec.channels, -1).T.squeeze(0)[..., None, None] for each in (mean, std))
        return mean, (1.0 if scale is None else scale) / std

    def normalize(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Brings the latents of each channel, whose mean and deviation these are, to mean 0 and deviation 1."""
        mean, std = (torch.tensor(each, device=self.device)[:, None, None] for each in (mean, std))  # (C, 1, 1)
        self.shift, self.scale = self.shift + mean / self.scale, self.scale / std
        self.has_statistics = True

    def use_own_tiles(self) -> None:
        """Switches on the tiles of a diffusers VAE, in space and for LTX in time; UserError if it has none."""
        if not self.kind or not hasattr(self.vae, "use_tiling"):  # which diffusers sets where a class has tiles
            raise UserError(f"vae_tiling: {self.spec.name} has no tiles; leave it out")
        self.vae.enable_tiling()
        if "LTX" in self.spec.name:
            self.vae.use_framewise_decoding = True  # encoding, too

    def fingerprint(self) -> str:
        """Returns a short hash of the encoder's weights and its own statistics, on which encoded latents depend."""
        shift, scale = (each.tolist() if isinstance(each, Tensor) else each for each in self.own)
        digest = hashlib.sha256(f"{shift} {scale}".encode() if shift else str(scale).encode())
        if not self.kind:
            digest.update(Path(inspect.getfile(type(self.vae))).read_bytes())
        if isinstance(self.vae, nn.Module):
            for name, value in self.vae.state_dict().items():
                if not name.startswith(("decoder.", "post_quant_conv.")):
                    digest.update(value.float().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def moments(self, videos: Tensor, num_stills: int = 0) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the latents of videos.

        (B, F, 3, H, W), uint8 or in [-1, 1] -> twice (B, f, C, h, w)

        Args:
            num_stills: the last frames of each video are so many images, which are encoded by themselves.
        """
        if num_stills and self.spec.time > 1:
            clips, stills = videos[:, :-num_stills], videos[:, -num_stills:]
            stills = self._by_chunks(self._encode, stills, frame_by_frame=True)
            moments = torch.cat([self._by_chunks(self._encode, clips, frame_by_frame=False), stills], dim=1)
        else:
            moments = self._by_chunks(self._encode, videos, frame_by_frame=self.spec.time == 1)
        mean, std = moments.chunk(2, dim=2)
        return mean, std

    def encode(self, videos: Tensor) -> Tensor:
        """Returns the mean latents of videos: (B, F, 3, H, W), uint8 or in [-1, 1] -> (B, F, C, h, w)."""
        return self.moments(videos)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the videos of latents: (B, f, C, h, w) -> (B, F, 3, H, W) in [-1, 1]."""
        separate = self.spec.time == 1 and self.spec.name != "AutoencoderKLTemporalDecoder"
        return self._by_chunks(self._decode, latents, frame_by_frame=separate)

    def _encode(self, videos: Tensor) -> Tensor:
        """(n, F, 3, H, W) -> (n, f, 2C, h, w)"""
        x = videos / 127.5 - 1 if videos.dtype == torch.uint8 else videos
        x = x.to(self.dtype)
        if not self.kind:
            mean, std = self.vae.encode(x)
            self._check_shapes("encode", x, mean, std)
        else:
            config = self.vae.config
            if config.get("in_channels") == 4:  # RGBA
                x = torch.cat([x, torch.ones_like(x[:, :, :1])], dim=2)
            if self.spec.name == "AutoencoderVidTok" and self.spec.causal:  # the first frame ends its first group
                x = torch.cat([x[:, :1]] * (self.spec.time - 1) + [x], dim=1)
            if self.spec.name == "AutoencoderKLAllegro":
                self._set_tile(x.shape[1], *x.shape[3:])
            out = self.vae.encode(x.flatten(0, 1) if self.kind.takes == "images" else x.transpose(1, 2))
            posterior = getattr(out, "latent_dist", None)
            if hasattr(posterior, "std") and self.spec.name != "AutoencoderKLKVAEVideo":  # which states no deviation
                mean, std = posterior.mean, posterior.std
            else:
                mean = posterior.mode() if posterior else out[0]
                std = torch.zeros_like(mean)
            mean, std = (self._videos(each, len(x)) for each in (mean, std))
        shift, scale = (self._of_frames(each, mean.shape[1]) for each in (self.shift, self.scale))
        return torch.cat([(mean - shift) * scale, std * scale], dim=2)

    def _decode(self, latents: Tensor) -> Tensor:
        """(n, f, C, h, w) -> (n, F, 3, H, W)"""
        shift, scale = (self._of_frames(each, latents.shape[1]) for each in (self.shift, self.scale))
        z = (latents.to(self.dtype) / scale + shift).to(self.dtype)
        if not self.kind:
            videos = self.vae.decode(z)
            self._check_shapes("decode", videos, z)
            return videos.clamp(-1, 1)
        options = {}
        if self.spec.name == "AutoencoderKLTemporalDecoder":
            options["num_frames"] = z.shape[1]
        if self.vae.config.get("timestep_conditioning"):  # of LTX: the decoder denoises; t = 0: nothing
            options["temb"] = z.new_zeros(len(z))
        if self.spec.name == "AutoencoderKLAllegro":
            self._set_tile(z.shape[1] * self.spec.time, *(side * self.spec.space for side in z.shape[3:]))
        out = self.vae.decode(z.flatten(0, 1) if self.kind.takes == "images" else z.transpose(1, 2), **options)
        out = out if isinstance(out, Tensor) else out.sample
        videos = out if self.spec.name == "AutoencoderKLAllegro" else self._videos(out, len(z))
        return videos[:, :, :3].clamp(-1, 1)

    def _check_shapes(self, method: str, videos: Tensor, *latents: Tensor) -> None:
        """Raises UserError unless `method` of a class of one's own made videos and latents that fit together."""
        n, F, channels, *sides = videos.shape
        expected = [n, self.spec.latent_frames(F), self.spec.channels, *(side // self.spec.space for side in sides)]
        if channels != 3 or any(list(each.shape) != expected for each in latents):
            shapes = " and ".join(str(list(each.shape)) for each in latents)
            raise UserError(f"vae: {self.spec.name}.{method}: latents {shapes} do not fit videos {list(videos.shape)}")

    def _set_tile(self, *shape: int) -> None:
        """Makes Allegro, which works in tiles alone, take a clip of this shape as one tile."""
        self.vae.use_tiling = True
        self.vae.kernel = self.vae.stride = shape

    @staticmethod
    def _videos(x: Tensor, num_clips: int) -> Tensor:
        """(n F, C, H, W) or (n, C, F, H, W) -> (n, F, C, H, W)"""
        return x.unflatten(0, (num_clips, -1)) if x.ndim == 4 else x.transpose(1, 2)

    @staticmethod
    def _of_frames(statistic: float | Tensor, num_frames: int) -> float | Tensor:
        """Statistics of frames of latents, (n, C, 1, 1) -> (num_frames, C, 1, 1), the last one repeated; else as is."""
        if isinstance(statistic, Tensor) and statistic.ndim == 4:
            return statistic[torch.arange(num_frames).clamp(max=len(statistic) - 1)]
        return statistic

    @torch.no_grad()  # not inference_mode: training uses the results
    def _by_chunks(self, function: Callable[[Tensor], Tensor], videos: Tensor, frame_by_frame: bool) -> Tensor:
        """Applies `function` to videos (B, F, ...), or to each frame as a video of one, in chunks; returns fp32."""
        clips = videos.flatten(0, 1)[:, None] if frame_by_frame else videos
        one_by_one = self.kind and self.kind.takes == "clips"  # several at a time are an error of HunyuanVideo15
        size = 1 if one_by_one else max(1, self.chunk_frames // clips.shape[1])
        result = torch.cat([function(chunk).float() for chunk in clips.split(size)])
        return result[:, 0].unflatten(0, videos.shape[:2]) if frame_by_frame else result


def load_codec(cfg: Any, device: torch.device, need_statistics: bool = True) -> LatentCodec:
    """Returns the codec of `cfg` (configs.AutoencoderOptions and ModelOptions), in fp32.

    Args:
        need_statistics: whether the latents must be normalized; training measures what is not stated.

    Raises:
        UserError: there is no VAE, its latents do not fit the model, or nothing states their statistics.
    """
    spec = vae_spec(cfg)
    if cls := own_class(cfg.vae):
        try:
            vae = cls()
        except TypeError as error:
            raise UserError(f"vae: {cfg.vae} is made without arguments ({error})") from None
        codec = LatentCodec(vae.to(device) if isinstance(vae, nn.Module) else vae, cfg.vae_chunk_frames, spec)
    else:
        codec = LatentCodec.from_pretrained(vae_file(cfg).parent, device, chunk_frames=cfg.vae_chunk_frames)
    if cfg.in_channels not in (None, spec.channels):
        raise UserError(f"in_channels: {cfg.in_channels}, but the latents of {spec.name} have {spec.channels} channels")
    if cfg.vae_tiling:
        codec.use_own_tiles()
    if cfg.latent_mean:
        codec.normalize(cfg.latent_mean, cfg.latent_std)
    if need_statistics and not codec.has_statistics:
        raise UserError(f"latent_mean: {cfg.vae} states no statistics; give latent_mean and latent_std of the training")
    return codec
