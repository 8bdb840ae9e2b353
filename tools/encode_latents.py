"""Encode a training set's frames once, so that training reads latents instead of pixels.

    python tools/encode_latents.py --config configs/demo/demo_train.yaml
    torchrun --standalone --nproc_per_node=8 tools/encode_latents.py --config configs/ucf101/ucf101_train.yaml \\
        latents_path=/data/ucf101_latents                     # then train with the same latents_path

Reads `data_path`, writes `latents_path` (see datasets/latents.py). The same command again encodes what is missing.
Letters: N frames of a video, S image_size, V variants (as it is, mirrored), C channels of the latents.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import TrainConfig, UserError, load_config, require_path, to_yaml
from datasets import get_dataset
from datasets.clips import BadClip
from datasets.latents import RECORD, SUFFIX
from datasets.transforms import square
from models.autoencoder import LatentCodec
from models.checkpoint import atomic_path
from tools.common import cli
from tools.common.distributed import distributed


def main() -> None:
    args = cli.Parser(__doc__, TrainConfig).parse_args()
    cfg = load_config(TrainConfig, args.config, args.overrides)
    if not cfg.latents_path:
        raise UserError("latents_path is not set: give the folder to write as latents_path=PATH")
    if args.dry_run:
        print(to_yaml(cfg))
        return
    with distributed() as env:
        encode(cfg, env.rank, env.world_size, env.device)


@torch.no_grad()
def encode(cfg: TrainConfig, rank: int, world_size: int, device: torch.device) -> None:
    """This rank's share of the videos."""
    target, source = Path(cfg.latents_path), require_path(cfg, "data_path")
    cfg.latents_path, cfg.use_image_num, cfg.dataset = None, 0, cfg.dataset.removesuffix("_img")
    clips, vae = get_dataset(cfg), require_path(cfg, "pretrained_model_path") / cfg.vae
    codec = LatentCodec.from_pretrained(vae, device, chunk_frames=cfg.vae_chunk_frames)

    target.mkdir(parents=True, exist_ok=True)
    record = {key: getattr(cfg, key) for key in ("dataset", "image_size", "horizontal_flip", "data_path", "vae")}
    with atomic_path(target / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2))
    skipped = 0
    for path in tqdm(clips.paths[rank::world_size], disable=rank != 0, unit="video"):
        file = target / f"{path.relative_to(source)}{SUFFIX}"
        if file.exists():
            continue
        try:
            frames = clips.read(path, range)  # (N, 3, H, W): all there are
        except BadClip as error:
            tqdm.write(f"skipped {path}: {error}")
            skipped += 1
            continue
        variants = [square(frames, cfg.image_size, flip) for flip in ([False, True] if clips.flip else [False])]
        mean, std = codec.moments(torch.stack(variants, dim=1).to(device))  # (N, V, 3, S, S) -> (N, V, C, h, w)
        with atomic_path(file) as temporary:
            save_file({"moments": torch.cat([mean, std], dim=2).half().cpu()}, temporary)
    print(f"rank {rank}: done, {skipped} videos skipped")


if __name__ == "__main__":
    cli.run(main)
