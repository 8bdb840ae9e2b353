"""Latents encoded before the training by tools/encode_latents.py: a file for each video, laid out as the videos are.

A file holds `moments` (N, V, 2C, h, w) fp16: mean and standard deviation of all N frames' latents, in V = 1 or 2
variants (as they are, mirrored). Mean and deviation, so that training still draws from the posterior.

A VAE that compresses time encodes clips, not frames. Its files hold W clips from evenly spaced starts: `moments`
(W, f, V, 2C, h, w), `stills` (W, V, 2C, h, w) of their first frames alone, and `starts` (W + 1), the last entry of
which is the number of frames of the video.
"""

from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from configs import UserError, require_path
from configs.files import check_same_settings, read_record
from datasets.readers import BadClip, Choose

SUFFIX = ".safetensors"
RECORD = "latents.json"  # beside them: what they were made from


def read_latents(path: Path, choose: Choose, num_variants: int = 1) -> torch.Tensor:
    """The moments of the chosen frames, (F, V, 2C, h, w); the rest of the file stays on disk.

    Of a file of clips: those of the last clip that starts no later than the first chosen frame (f, V, 2C, h, w), or
    of its still (1, V, 2C, h, w), if one frame is chosen.

    Raises:
        BadClip: the file is damaged, has fewer than `num_variants` variants or a value that is no finite number, or
            `choose` refuses it.
    """
    try:
        with safe_open(path, framework="np") as file:
            if "starts" in file.keys():  # noqa: SIM118 (a file of safetensors is no dict)
                *starts, total = file.get_tensor("starts").tolist()
                indices = choose(total)
                clip = bisect_right(starts, indices[0]) - 1
                moments = file.get_slice("moments" if len(indices) > 1 else "stills")[clip : clip + 1]
                frames = [moments[0] if len(indices) > 1 else moments]
                shape = list(frames[0].shape)
            else:
                moments = file.get_slice("moments")
                shape = moments.get_shape()
                frames = [moments[i : i + 1] for i in choose(shape[0])]
            if len(shape) != 5 or shape[1] < num_variants:
                raise BadClip(f"has moments of shape {shape}, not (frames, {num_variants}, 2C, h, w)")
    except (SafetensorError, OSError) as error:
        raise BadClip(f"is no file of latents: {error}") from error
    moments = torch.from_numpy(np.concatenate(frames))
    if not moments.isfinite().all():
        raise BadClip("holds values that are not finite")
    return moments


def pick_variant(moments: torch.Tensor, size: int, flip: bool) -> torch.Tensor:
    """(F, V, 2C, h, w) -> (F, 2C, h, w): the mirrored variant or the other; `transforms.square` for latents."""
    return moments[:, int(flip)]


def latent_settings(args: Any, of_clips: bool) -> dict[str, Any]:
    """The options on which encoded latents depend; with the VAE's fingerprint as `encoder` they are in the record.

    Args:
        of_clips: whether the VAE compresses time.
    """
    clip = {"num_frames": args.num_frames, "frame_interval": args.frame_interval} if of_clips else {}
    return {
        "dataset": args.dataset.removesuffix("_img"),
        "image_size": args.image_size,
        "horizontal_flip": args.horizontal_flip,
        "fps": args.fps,
        "vae_tiling": bool(args.vae_tiling),
        **clip,
    }


def check_latents_record(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the record of a folder of latents; raises UserError if it was made with other settings.

    An older record does not say `vae_tiling`, and fits either.
    """
    made = read_record(path, "latents_path")
    check_same_settings({"vae_tiling": settings["vae_tiling"]} | made, settings, "latents_path", path.parent)
    return made


def have_statistics(args: Any) -> bool:
    """Whether the VAE that encoded the latents at `args.latents_path` states their statistics."""
    return read_record(Path(args.latents_path, RECORD), "latents_path").get("has_statistics", True)


def check_latents(args: Any, encoder: str | None = None) -> None:
    """Raises UserError unless the latents at `args.latents_path` were made with the settings of `args`.

    Args:
        encoder: `LatentCodec.fingerprint()` of the VAE that decodes them, if the caller has one.
    """
    record = require_path(args, "latents_path", folder=True) / RECORD
    if not record.is_file():
        raise UserError(f"latents_path: no {RECORD} in {record.parent}; make them with tools/encode_latents.py")
    of_clips = "num_frames" in read_record(record, "latents_path")
    made = check_latents_record(record, latent_settings(args, of_clips))
    if encoder and made.get("encoder") != encoder:
        raise UserError(f"vae: the latents in {record.parent} are of another VAE, {made['vae']}; use that one")
    if args.use_image_num and args.frame_data_txt:
        raise UserError("frame_data_txt: with latents_path the stills are frames of the encoded clips; leave it empty")
