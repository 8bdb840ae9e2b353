"""The loss of finished checkpoints on the same clips with the same noise, side by side: held-out clips, say.

    python tools/heldout_loss.py --model Skip-DiT=skip.pt --model Latte=latte.pt data_path=datasets/demo/test
    python tools/heldout_loss.py --config configs/sky/sky_train.yaml --model A=a.pt --model B=b.pt data_path=/data/test

The models are those of the configuration, each with as many skips as its checkpoint has; weights are the EMA, in fp32.
Each clip is noised at the middle of each of `--timesteps` equal parts of the schedule. Clips are spread evenly over the
files; figures are means over clips, ± half of the 95 % interval (Student's t), and so are the
differences to the first model, clip by clip.
Letters: N clips, B batch, F frames, K timesteps, C channels of the latents.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs import ROOT, TrainConfig, UserError, load_config, to_yaml
from datasets import collate, get_dataset
from diffusion import create_diffusion
from models import get_models
from models.autoencoder import load_codec
from models.checkpoint import load_checkpoint
from models.latte import Latte, fastest_attention
from tools.common import cli
from tools.common.fidelity import mean_and_margin
from tools.fidelity import markdown, plus_minus
from tools.stability import count_skips, named_checkpoints


def main() -> None:
    parser = cli.Parser(__doc__, TrainConfig, config=str(ROOT / "configs/demo/demo_train.yaml"))
    parser.add_argument("--model", action="append", required=True, metavar="NAME=CKPT", help="repeat it to compare")
    parser.add_argument("--clips", type=int, default=84, help="at most so many clips (default: 84)")
    parser.add_argument("--timesteps", type=int, default=8, help="of each clip (default: 8)")
    args = parser.parse_args()
    for key in ("clips", "timesteps"):
        if getattr(args, key) < 2:
            raise UserError(f"--{key}: {getattr(args, key)} is less than 2")
    cfg = load_config(TrainConfig, args.config, args.overrides)
    cfg = replace(cfg, latents_path=None, use_image_num=0, dataset=cfg.dataset.removesuffix("_img"))
    if args.dry_run:
        print(to_yaml(cfg))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: load_model(cfg, ckpt, device) for name, ckpt in named_checkpoints(args.model).items()}
    print(table(losses(cfg, models, args.clips, args.timesteps, device)))


def load_model(cfg: TrainConfig, ckpt: str, device: torch.device) -> Latte:
    with torch.device(device):
        model = get_models(replace(cfg, num_skips=count_skips(ckpt)))
    load_checkpoint(model, ckpt)
    model.set_attention(fastest_attention(device, torch.float32))
    return model.eval()


@torch.no_grad()
def losses(
    cfg: TrainConfig, models: dict[str, Latte], clips: int, timesteps: int, device: torch.device
) -> dict[str, Tensor]:
    """The loss of each model at each clip and timestep, (N, K)."""
    dataset, codec = get_dataset(cfg), load_codec(cfg, device)
    diffusion = create_diffusion("", cfg.noise_schedule, cfg.prediction, cfg.learn_sigma, False, cfg.diffusion_steps)
    chosen = np.linspace(0, len(dataset) - 1, min(clips, len(dataset))).round().astype(int)  # (N,)
    generator = torch.Generator().manual_seed(cfg.global_seed)
    rows: dict[str, list[Tensor]] = {name: [] for name in models}
    for index in tqdm(chosen, unit="clip"):
        batch = collate([dataset[0, int(index)]])
        x = codec.encode(batch["video"].to(device)).expand(timesteps, -1, -1, -1, -1)  # (K, F, C, h, w)
        t = ((torch.arange(timesteps, device=device) + 0.5) * diffusion.num_timesteps / timesteps).long()  # (K,)
        noise = torch.randn(x.shape, generator=generator).to(device)
        labels = {} if cfg.num_classes is None else {"y": batch["label"].to(device).expand(timesteps)}
        for name, model in models.items():
            rows[name].append(diffusion.training_losses(model, x, t, labels, noise)["loss"].cpu())
    return {name: torch.stack(each) for name, each in rows.items()}


def table(figures: dict[str, Tensor]) -> str:
    """Markdown, a line for each model."""
    first, base = next(iter(figures.items()))

    def shown(values: Tensor) -> str:
        return plus_minus(mean_and_margin(values.mean(1).tolist()), 4)

    return markdown(
        [
            {
                "": name,
                f"loss of {len(base)} clips": shown(values),
                f"above {first}'s": shown(values - base) if name != first else "",
            }
            for name, values in figures.items()
        ]
    )


if __name__ == "__main__":
    cli.run(main)
