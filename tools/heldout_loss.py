"""Compare the losses of finished checkpoints, or their errors of x_0, on the same clips with the same noise.

    python tools/heldout_loss.py --model Skip-DiT=skip.pt --model Latte=latte.pt data_path=datasets/demo/test
    python tools/heldout_loss.py --config configs/sky/sky_train.yaml --model A=a.pt --model B=b.pt data_path=/data/test
    python tools/heldout_loss.py --model A=a.pt data_path=datasets/demo/test measure=x0  # as a training's x0_mse

The models are those of the configuration, each with as many skips as its checkpoint has; weights are the EMA, in fp32.
Clips are spread evenly over the files. Each one is noised at the middle of each of num_timesteps equal parts of the
schedule. With measure=x0, it is noised at log_snrs instead, each model has the process and prediction that its weights
carry, and errors compare between them. The table holds means over clips, ± half of the 95 % interval (Student's t), and
the same of the differences to the first model, clip by clip.
Letters: N clips, B batch, F frames, K timesteps, C channels of the latents.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import ROOT, DiffusionOptions, TrainConfig, cli, load_config, option, require_path


@dataclass(kw_only=True)
class HeldoutConfig(TrainConfig):
    """The comparison."""

    measure: str = option(
        "loss",
        "loss: that of training, at num_timesteps | x0: squared error of x_0 at log_snrs",
        choices=("loss", "x0"),
    )
    num_clips: int = option(84, "at most so many clips", least=2)
    num_timesteps: int = option(8, "timesteps of each clip", least=2)


parser = cli.Parser(__doc__, HeldoutConfig, config=str(ROOT / "configs/demo/demo_train.yaml"))
parser.add_argument(
    "--model", action="append", required=True, dest="models", metavar="NAME=CKPT", help="repeat it to compare"
)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs.tables import markdown_table
from datasets import collate, get_dataset
from diffusion import Diffusion, make_diffusion
from models import check_made_of, get_models
from models.autoencoder import load_codec, vae_file
from models.checkpoint import count_skips, load_checkpoint, load_options
from models.hardware import default_device, fastest_attention
from models.latte import Latte
from tools.common.models import named_checkpoints
from tools.metrics.statistics import mean_and_margin, plus_minus


def options_of(cfg: HeldoutConfig, ckpt: str) -> HeldoutConfig:
    """The options of `cfg`; those of the noise process from the weights at `ckpt`, if errors of x_0 are measured."""
    if cfg.measure == "loss":
        return cfg
    carried, own = load_options(ckpt), ["learn_sigma", *(each.name for each in fields(DiffusionOptions))]
    return replace(cfg, **{key: carried[key] for key in own if carried.get(key) is not None})


def load_model(cfg: HeldoutConfig, ckpt: str, device: torch.device) -> Latte:
    """The model of `cfg` with the weights and the number of skips of `ckpt`, in eval mode."""
    with torch.device(device):
        model = get_models(replace(cfg, num_skips=count_skips(ckpt)))
    check_made_of(replace(cfg, num_skips=model.num_skips), load_options(ckpt), ckpt)
    load_checkpoint(model, ckpt)
    model.set_attention(fastest_attention(device, torch.float32))
    return model.eval()


@torch.no_grad()
def measure_losses(
    cfg: HeldoutConfig, models: dict[str, Latte], device: torch.device, processes: dict[str, Diffusion] | None = None
) -> dict[str, Tensor]:
    """The loss of each model at each clip and timestep, or its error of x_0 at each noise level, (N, K).

    processes: those of the models, by their names; None: all have that of `cfg`.
    """
    dataset, codec, diffusion = get_dataset(cfg), load_codec(cfg, device), make_diffusion(cfg)
    processes = processes or dict.fromkeys(models, diffusion)
    K = cfg.num_timesteps if cfg.measure == "loss" else 1
    chosen = np.linspace(0, len(dataset) - 1, min(cfg.num_clips, len(dataset))).round().astype(int)  # (N,)
    generator = torch.Generator().manual_seed(cfg.global_seed)
    losses: dict[str, list[Tensor]] = {name: [] for name in models}
    for index in tqdm(chosen, unit="clip"):
        batch = collate([dataset[0, int(index)]])
        x = codec.encode(batch["video"].to(device)).expand(K, -1, -1, -1, -1)  # (K, F, C, h, w)
        t = ((torch.arange(K, device=device) + 0.5) * diffusion.num_timesteps / K).long()  # (K,)
        noise = torch.randn(x.shape, generator=generator).to(device)
        labels = {} if cfg.num_classes is None else {"y": batch["label"].to(device).expand(K)}
        for name, model in models.items():
            if cfg.measure == "loss":
                found = processes[name].training_losses(model, x, t, labels, noise)["loss"]
            else:
                (found,) = processes[name].x_start_errors(model, x, cfg.log_snrs, labels, noise)
            losses[name].append(found.cpu())
    return {name: torch.stack(each) for name, each in losses.items()}


def table(losses: dict[str, Tensor], log_snrs: Sequence[float] | None = None) -> str:
    """A row for each model, in Markdown; `losses` are (N, K) by the model's name, at `log_snrs` if these are given."""
    first, base = next(iter(losses.items()))

    def mean_over_clips(values: Tensor) -> str:
        return plus_minus(mean_and_margin(values.mean(1).tolist()), 4)

    rows = []
    for name, values in losses.items():
        above = mean_over_clips(values - base) if name != first else ""
        what = f"{'x_0 error' if log_snrs else 'loss'} of {len(base)} clips"
        levels = {f"{each:+g}": f"{mean:.4f}" for each, mean in zip(log_snrs or (), values.mean(0), strict=False)}
        rows.append({"": name, what: mean_over_clips(values), f"above {first}'s": above} | levels)
    return markdown_table(rows)


def main() -> None:
    args = parser.parse_args()
    cfg = load_config(HeldoutConfig, args.config, args.overrides)
    cfg = replace(cfg, latents_path=None, use_image_num=0, dataset=cfg.dataset.removesuffix("_img"))
    checkpoints = named_checkpoints(args.models)
    device = default_device()
    if args.dry_run:
        levels = f"{cfg.num_timesteps} timesteps" if cfg.measure == "loss" else f"log SNRs {cfg.log_snrs}"
        lines = [f"the {cfg.measure} of {', '.join(checkpoints)} on {cfg.num_clips} clips x {levels}"]
        checks = [lambda: require_path(cfg, "data_path"), lambda: vae_file(cfg)]
        checks += [lambda ckpt=ckpt: count_skips(ckpt) for ckpt in checkpoints.values()]
        return cli.dry_run(cfg, lines, checks)

    options = {name: options_of(cfg, ckpt) for name, ckpt in checkpoints.items()}
    models = {name: load_model(options[name], ckpt, device) for name, ckpt in checkpoints.items()}
    processes = {name: make_diffusion(own) for name, own in options.items()}
    print(table(measure_losses(cfg, models, device, processes), cfg.log_snrs if cfg.measure == "x0" else None))


if __name__ == "__main__":
    cli.run(main)
