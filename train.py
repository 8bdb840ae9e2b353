"""Train Latte or Skip-DiT on video clips, or on clips with still images.

    torchrun --standalone --nproc_per_node=8 train.py --config configs/ucf101/ucf101_train.yaml
    bash train_scripts/demo_train.sh                                       # the demo's model, on a CPU
    python train.py --config ... max_train_steps=1000 learning_rate=5e-5   # any option as key=value
    python train.py --config ... --dry-run                                 # the resolved options and the model's size

The same command continues where it was interrupted. All that is random (timesteps, noise, label drop, crops) comes from
generators named by the seed and the number of the clip: a run depends neither on how many processes share it nor on how
often it was interrupted, and has no generator's state to save. Weights appear as `{run}/checkpoints/{step:07d}.pt` =
{ema, model}.
Letters: B clips of a process, F frames, K stills, C channels of the latents.
"""

import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent))
from configs import SampleConfig, TrainConfig, UserError, choice, load_config, require_path, to_yaml
from datasets import ClipSampler, collate, get_dataset, load_batches
from datasets.latents import check_latents
from diffusion import Diffusion, create_diffusion
from models import get_models
from models.autoencoder import LatentCodec, load_codec
from models.checkpoint import load_checkpoint, save_checkpoint
from models.latte import Latte, fastest_attention, init_skips_as_identity
from sample.pipeline import Pipeline, generate, make_diffusion, resolve
from tools.common import cli, runs
from tools.common.distributed import local_device
from tools.common.media import save_grid

LEAST = {  # options and the least that they can be
    1: (
        "local_batch_size", "gradient_accumulation_steps", "max_train_steps", "max_bad_steps", "log_every",
        "ckpt_every", "keep_resume_states", "num_frames", "frame_interval", "preview_clips", "validation_clips",
        "vae_chunk_frames",
    ),
    0: ("num_workers", "global_seed", "use_image_num", "preview_every", "validation_every", "lr_warmup_steps"),
}  # fmt: skip
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRAINABLE: dict[str, Callable[[str], bool]] = {  # train_only -> whether a parameter moves
    "all": lambda name: True,
    "skip": lambda name: name.startswith("skip_"),
    "temporal": lambda name: name.startswith("blocks.") and int(name.split(".")[1]) % 2 == 1,
}
LR_SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps after warm-up -> share of the learning rate
    "constant": lambda share: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 + 0.5 * math.cos(math.pi * share),
    "wsd": lambda share: min(1.0, 5 * (1.0 - share)),  # warm-up, stable, decay over the last fifth: arXiv:2405.18392
}


def main() -> None:
    args = cli.Parser(__doc__, TrainConfig).parse_args()
    cfg = load_config(TrainConfig, args.config, args.overrides)
    check_options(cfg)
    if not args.dry_run:
        train(cfg)
    elif runs.rank() == 0:
        with torch.device("meta"):
            model = get_models(cfg)
        print(f"{to_yaml(cfg)}# {cfg.model}: {sum(p.numel() for p in model.parameters()):,} parameters")


def check_options(cfg: TrainConfig) -> None:
    """Raise UserError for a value that no training can have."""
    choice("mixed_precision", cfg.mixed_precision, list(DTYPES))
    choice("attention_mode", cfg.attention_mode, ["auto", "sdpa", "math"])
    choice("train_only", cfg.train_only, list(TRAINABLE))
    choice("lr_schedule", cfg.lr_schedule, list(LR_SCHEDULES))
    choice("skip_init", cfg.skip_init, ["identity", "xavier"])
    for least, keys in LEAST.items():
        for key in keys:
            if getattr(cfg, key) < least:
                raise UserError(f"{key}: {getattr(cfg, key)} is less than {least}")
    with torch.device("meta"):
        model = get_models(cfg)
    if cfg.train_only == "skip" and not model.num_skips:
        raise UserError(
            f"train_only: {cfg.model} has no skip branches to train; choose a model with `skip` in its name"
        )
    if cfg.preview_every:
        preview_options(cfg, model.num_skips, torch.device("cpu"))


def train(cfg: TrainConfig) -> None:
    """One run, from its first or its last saved step to `max_train_steps`."""
    on_gpu = local_device().type == "cuda"
    if cfg.mixed_precision == "fp16" and not on_gpu:
        raise UserError("mixed_precision: fp16 runs in software on a CPU, slower than fp32 by far; use bf16 or no")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # the ranks wait while rank 0 saves and previews
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=cfg.mixed_precision, kwargs_handlers=[patience])
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    assert world == runs.world_size(), "accelerate found fewer processes than torchrun started"
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    torch.manual_seed(cfg.global_seed)  # the same first weights on every rank

    dataset = get_dataset(cfg)
    codec = None
    if not cfg.latents_path or cfg.preview_every or cfg.validation_every:
        codec = load_codec(cfg, device)
        if cfg.latents_path:
            check_latents(cfg, codec.fingerprint())
    diffusion = create_diffusion("", cfg.noise_schedule, cfg.prediction, cfg.learn_sigma, False, cfg.diffusion_steps)
    latte = create_model(cfg, device)
    trained = [p for p in latte.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    ema = AveragedModel(latte, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema_decay))

    run, reason = shared_run(cfg, rank)
    log = runs.RunLog(run, rank)
    if reason:
        log.say(reason)
    state = runs.newest_state(run, log) or {"step": 0, "consumed": 0}
    if broadcast_object_list([state["step"]])[0] != state["step"]:
        raise UserError(f"results_dir: process {rank} does not see the resume states in {run} that process 0 sees")
    log.rewind(state["step"])
    if state["step"]:
        try:
            latte.load_state_dict(state["model"])
            ema.load_state_dict(state["ema"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError):  # names, shapes, another number of trained weights
            differ = "; ".join(runs.differences(run, cfg))
            if not differ:
                raise
            message = f"resume_from_checkpoint: {run} has other weights, as it has other options: {differ}"
            raise UserError(message) from None
    else:
        if cfg.pretrained:
            start_from_pretrained(latte, cfg, diffusion, None if cfg.latents_path else codec, dataset, log)
        ema.update_parameters(latte)  # the first update copies
    if cfg.use_compile:
        for block in latte.blocks:  # one by one: all spatial blocks share a graph, and so do all temporal ones
            block.compile(fullgraph=True)  # in place: the names of the weights stay
    model, optimizer = accelerator.prepare(latte, optimizer)
    scaler = accelerator.scaler  # with fp16, else None
    if scaler and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])

    encoder = None if cfg.latents_path else codec  # None: the batches hold moments
    fixed = validation_batch(cfg, codec, diffusion, device) if cfg.validation_every and rank == 0 else None

    first_step, consumed = state["step"] + 1, state["consumed"]  # clips of all processes so far
    micro_batch = cfg.local_batch_size * world  # clips of all processes in one forward
    sampler = ClipSampler(len(dataset), micro_batch, rank, world, cfg.global_seed, start=consumed)
    loading = dict(pin_memory=on_gpu, worker_init_fn=ignore_signals)
    if rank == 0:
        loading["say"] = log.say  # of unusable files; the other ranks' go to stderr
    batches = load_batches(dataset, sampler, cfg.num_workers, cfg.max_bad_fraction, **loading)
    log.say(
        f"{run}: {sum(p.numel() for p in trained):,} weights to train, {len(dataset):,} clips, "
        f"{micro_batch * cfg.gradient_accumulation_steps} a step, steps {first_step} to {cfg.max_train_steps}"
    )
    if first_step > cfg.max_train_steps:
        log.say("this run is finished: raise max_train_steps to go on, or start another with resume_from_checkpoint=no")
    stop, meter, bad_steps = StopSignal(), Meter(state.get("losses", [])), 0
    del state  # four times the size of the model
    for step in range(first_step, cfg.max_train_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)

        loss = torch.zeros((), device=device)
        for micro in range(cfg.gradient_accumulation_steps):
            first = consumed + rank * cfg.local_batch_size
            last = micro == cfg.gradient_accumulation_steps - 1
            with nullcontext() if last else accelerator.no_sync(model):  # the ranks' gradients meet in the last one
                losses = clip_losses(model, diffusion, encoder, next(batches), first, cfg, device)
                share = losses.mean() / cfg.gradient_accumulation_steps
                accelerator.backward(share)
            loss += share.detach()
            consumed += micro_batch
        norm = accelerator.clip_grad_norm_(trained, cfg.clip_max_norm if step >= cfg.start_clip_iter else math.inf)
        figures = torch.stack([loss, norm, torch.tensor(float(stop.noted), device=device)])
        loss, norm, stops = accelerator.reduce(figures, "mean").tolist()  # alike on all ranks; waits for the device

        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            optimizer.step()
            ema.update_parameters(latte)
        else:
            log.say(f"step {step}: skipped, loss {loss}, gradient norm {norm}")
            if scaler:
                scaler.update()  # halves its scale: overflows are how it finds the largest that fits
        optimizer.zero_grad(set_to_none=True)
        bad = not finite and not (scaler and math.isfinite(loss) and scaler.get_scale() > 1)
        bad_steps = bad_steps + 1 if bad else 0
        if bad_steps == cfg.max_bad_steps:
            raise UserError(
                f"{bad_steps} steps in a row had no finite loss and gradient (max_bad_steps): lower learning_rate or "
                f"clip from the start (start_clip_iter=0), and resume_from_checkpoint={run} to go on from there"
            )

        meter.add(loss if finite else None)
        finished, interrupted = step == cfg.max_train_steps, stops > 0
        if step % cfg.log_every == 0 or finished:
            epoch, remaining = consumed / len(dataset), cfg.max_train_steps - step
            figures = meter.read(micro_batch * cfg.gradient_accumulation_steps, remaining)
            log.report(step=step, epoch=epoch, gradient_norm=norm, lr=learning_rate(cfg, step), **figures)
        if rank == 0 and fixed and step % cfg.validation_every == 0:
            with torch.no_grad(), accelerator.autocast():
                losses = diffusion.training_losses(ema.module, **fixed)["loss"]
            log.report(step=step, validation_loss=losses.mean().item())
        if rank == 0 and cfg.preview_every and step % cfg.preview_every == 0:
            with accelerator.autocast():
                preview(run / "previews", step, ema.module, cfg, codec, device)
        save_weights = finished or (step % cfg.ckpt_every == 0 and not bad)  # a diverged run keeps its last good ones
        if rank == 0 and (save_weights or interrupted):
            weights = latte.state_dict()
            if save_weights:
                path = run / "checkpoints" / f"{step:07d}.pt"
                save_checkpoint(path, ema=ema.module.state_dict(), model=weights)
            progress = dict(consumed=consumed, losses=meter.losses, scaler=scaler.state_dict() if scaler else None)
            weights = dict(model=weights, ema=ema.state_dict(), optimizer=optimizer.state_dict())
            runs.save_state(run, step, cfg.keep_resume_states, **weights, **progress)
            log.say(f"step {step}: saved")
        if interrupted:
            log.say("stopped by a signal; the same command continues")
            break
    accelerator.end_training()


def create_model(cfg: TrainConfig, device: torch.device) -> Latte:
    """The model with its first weights; what `train_only` does not name is frozen."""
    latte = get_models(cfg).to(device)
    automatic = fastest_attention(device, DTYPES[cfg.mixed_precision])
    latte.set_attention(automatic if cfg.attention_mode == "auto" else cfg.attention_mode)
    latte.gradient_checkpointing = cfg.gradient_checkpointing
    for name, parameter in latte.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and TRAINABLE[cfg.train_only](name))
    return latte


def clip_losses(
    model: torch.nn.Module,
    diffusion: Diffusion,
    codec: LatentCodec | None,
    batch: dict,
    first: int,
    cfg: TrainConfig,
    device: torch.device,
) -> Tensor:
    """The loss of each clip of a batch, (B,), all in `device`'s fp32.

    Clip number `first` + i of the run draws from a generator of its own: posterior noise, t, noise, two label coins.
    """
    mean, std = latent_moments(batch["video"].to(device, non_blocking=True), codec)  # (B, F+K, C, h, w)
    B = len(mean)
    t = torch.empty(B, dtype=torch.int64, device=device)
    # Contiguous, whatever the latents' strides: what a generator draws depends on the layout it fills.
    posterior_noise, noise, coins = (torch.empty(shape, device=device) for shape in (mean.shape, mean.shape, (B, 2)))
    for i in range(B):
        generator = torch.Generator(device).manual_seed(clip_seed(cfg.global_seed, first + i))
        posterior_noise[i].normal_(generator=generator)
        t[i].random_(diffusion.num_timesteps, generator=generator)
        noise[i].normal_(generator=generator)
        coins[i].uniform_(generator=generator)

    x = mean + std * posterior_noise
    labels = {}
    if cfg.num_classes is not None:
        drop = coins < cfg.class_dropout_prob  # (B, 2): the clip's label, and those of its stills together
        labels["y"] = torch.where(drop[:, 0], cfg.num_classes, batch["label"].to(device, non_blocking=True))
        if cfg.use_image_num:
            image_labels = batch["image_labels"].to(device, non_blocking=True)  # (B, K)
            labels["y_image"] = torch.where(drop[:, 1:], cfg.num_classes, image_labels)
    return diffusion.training_losses(model, x, t, labels, noise)["loss"]


def latent_moments(video: Tensor, codec: LatentCodec | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a batch's latents, from pixels or from moments encoded before the training."""
    return codec.moments(video) if codec else video.float().chunk(2, dim=2)


def validation_batch(
    cfg: TrainConfig, codec: LatentCodec, diffusion: Diffusion, device: torch.device
) -> dict[str, Any]:
    """Clips of `validation_path`, noise and timesteps that never change: the arguments of `training_losses`."""
    path = str(require_path(cfg, "validation_path"))
    dataset = get_dataset(
        replace(cfg, dataset=cfg.dataset.removesuffix("_img"), data_path=path, latents_path=None, use_image_num=0)
    )
    chosen = np.linspace(0, len(dataset) - 1, cfg.validation_clips).round().astype(int).tolist()
    batch = collate([dataset[0, i] for i in chosen])
    x = codec.encode(batch["video"].to(device))  # (B, F, C, h, w)
    t = torch.linspace(0, diffusion.num_timesteps - 1, len(x), device=device).long()  # (B,)
    noise = torch.randn(x.shape, generator=torch.Generator(device).manual_seed(cfg.global_seed), device=device)
    labels = {} if cfg.num_classes is None else {"y": batch["label"].to(device)}
    return dict(x_start=x, t=t, model_kwargs=labels, noise=noise)


def preview(folder: Path, step: int, model: Latte, cfg: TrainConfig, codec: LatentCodec, device: torch.device) -> None:
    """Videos of seeds and labels 0, 1, ...: `{step}-uncached.mp4` and, for a model with skips, `{step}-N2.mp4`."""
    seeds = range(cfg.preview_clips)
    labels = None if model.num_classes is None else [seed % model.num_classes for seed in seeds]
    for name, options in preview_options(cfg, model.num_skips, device).items():
        pipe = Pipeline(options, model, codec, make_diffusion(options), device, uncached=model)
        save_grid(folder / f"{step:07d}-{name}.mp4", generate(pipe, seeds, labels), options.fps)


def preview_options(cfg: TrainConfig, num_skips: int, device: torch.device) -> dict[str, SampleConfig]:
    """The sampling options of each preview by its name; UserError for those that make no sense."""
    shared = {f.name: getattr(cfg, f.name) for f in fields(SampleConfig) if hasattr(cfg, f.name)}
    options = resolve(SampleConfig(**shared), device)
    cached = max(2, options.cache.interval)
    intervals = {"uncached": 1} | ({f"N{cached}": cached} if num_skips else {})
    caches = {name: replace(options.cache, interval=interval) for name, interval in intervals.items()}
    return {name: resolve(replace(options, cache=cache), device) for name, cache in caches.items()}


def clip_seed(seed: int, number: int) -> int:
    """The seed of what is random about the run's clip `number`."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """The learning rate of step 1, 2, ...: linear warm-up, then `lr_schedule` down to max_train_steps."""
    if step <= cfg.lr_warmup_steps:
        return cfg.learning_rate * step / cfg.lr_warmup_steps
    share = (step - cfg.lr_warmup_steps) / max(1, cfg.max_train_steps - cfg.lr_warmup_steps)
    return cfg.learning_rate * LR_SCHEDULES[cfg.lr_schedule](share)


def start_from_pretrained(
    latte: Latte, cfg: TrainConfig, diffusion: Diffusion, codec: LatentCodec | None, dataset: Dataset, log: runs.RunLog
) -> None:
    """Load `cfg.pretrained`; where it is a Latte without skips, start the skip branches as `cfg.skip_init` says."""
    absent = load_checkpoint(latte, cfg.pretrained, optional="skip_")
    log.say(f"started from {cfg.pretrained}" + (f", skip branches from skip_init={cfg.skip_init}" if absent else ""))
    if absent and cfg.skip_init == "identity":
        batch = collate([dataset[0, i % len(dataset)] for i in range(8)])
        x, _ = latent_moments(batch["video"].to(latte.pos_embed.device), codec)
        x = x[:, : cfg.num_frames]
        t = torch.linspace(0, diffusion.num_timesteps - 1, len(x), device=x.device).long()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(cfg.global_seed)).to(x)
        y = None if cfg.num_classes is None else batch["label"].to(x.device)
        init_skips_as_identity(latte, diffusion.q_sample(x, t, noise), t, y)


def shared_run(cfg: TrainConfig, rank: int) -> tuple[Path, str]:
    """The run folder to continue or a new one, the same on every rank, and what there is to say about that."""
    found = [None, ""]
    if rank == 0:
        run = runs.find_run(cfg)
        found = [run, ""] if run else [runs.create_run(cfg), runs.why_new(cfg)]
    run, reason = broadcast_object_list(found)
    return run, reason


class Meter:
    """What a report line says of the steps since the last one, those before an interruption (`losses`) included."""

    def __init__(self, losses: list[float]) -> None:
        self.losses, self.steps, self.since = losses, 0, time.monotonic()

    def add(self, loss: float | None) -> None:
        """A step, and its loss if it was finite."""
        self.losses += [] if loss is None else [loss]
        self.steps += 1

    def read(self, clips: int, remaining: int) -> dict[str, float]:
        """Mean loss, steps/s, clips/s (`clips` a step), GB of memory at the peak, hours for the `remaining` steps."""
        now = time.monotonic()
        rate = self.steps / (now - self.since)
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 1e9
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        mean = sum(self.losses) / len(self.losses) if self.losses else math.nan
        figures = dict(loss=mean, steps_per_s=rate, clips_per_s=rate * clips)
        self.losses, self.steps, self.since = [], 0, now
        return figures | dict(memory_gb=peak, hours_left=remaining / rate / 3600)


class StopSignal:
    """Notes that this process was asked to end (SIGTERM, Ctrl-C): the ranks agree on a step, and save first."""

    def __init__(self) -> None:
        self.noted = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True


def ignore_signals(worker: int) -> None:
    """What a process that reads data does first: torchrun and terminals signal it, too, but the training must save."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    cli.run(main)
