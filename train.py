"""Train Latte or Skip-DiT on video clips, or on clips with still images.

    torchrun --standalone --nproc_per_node=8 train.py --config configs/ucf101/ucf101_train.yaml
    bash train_scripts/demo_train.sh                                       # the demo's model, on a CPU
    python train.py --config ... max_train_steps=1000 learning_rate=5e-5   # any option as key=value
    python train.py --config ... --dry-run                                 # what would run; checks its files

The same command continues where it was interrupted. All that is random (timesteps, noise, label drop, crops) comes from
generators named by the seed and the number of the clip: a run depends neither on how many processes share it nor on how
often it was interrupted, and has no generator's state to save. Weights appear as `{run}/checkpoints/{step:07d}.pt` =
{ema, model, options}.
Letters: B clips of a process, f frames and C channels of a clip's latents, K stills.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from configs import TrainConfig, UserError, cli, load_config

parser = cli.Parser(__doc__, TrainConfig)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import math
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from datasets import ClipSampler, get_dataset, load_batches
from datasets.latents import check_latents
from diffusion import Diffusion, make_diffusion
from models import made_of
from models.autoencoder import LatentCodec, load_codec
from models.checkpoint import save_checkpoint
from models.hardware import local_device
from models.latte import Latte
from models.skip_cache import StaleFeatures
from models.vaes import describe_vae
from tools.common import runs, training


@dataclass
class TrainState:
    """Everything that a step changes. It is saved and restored as a whole."""

    latte: Latte
    ema: AveragedModel
    ema_update: training.EmaUpdate
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None  # with fp16
    meter: training.Meter
    step: int = 0  # the last one done
    consumed: int = 0  # clips of all processes so far


def restore(state: TrainState, saved: dict[str, Any], cfg: TrainConfig, run: Path) -> None:
    """Copies a resume state of `run`, from `runs.load_state`, into `state`."""
    try:
        state.latte.load_state_dict(saved["model"])
        state.ema.load_state_dict(saved["ema"])
        state.optimizer.load_state_dict(saved["optimizer"])
    except (KeyError, RuntimeError, ValueError):  # names, shapes, another number of trained weights, another optimizer
        if not (differ := runs.compare_options(run, cfg)):
            raise
        message = f"resume_from_checkpoint: {run} has other weights, as it has other options: {differ}"
        raise UserError(message) from None
    for part in getattr(state.optimizer, "parts", [state.optimizer]):
        for values in part.state.values():
            for name, value in values.items():
                values[name] = value.clone()  # on a CPU, the optimizer has taken the tensors that lie in the file
    if state.scaler and saved.get("scaler"):
        state.scaler.load_state_dict(saved["scaler"])
    state.ema_update.warms_up = saved.get("ema_warms_up", False)  # older runs go on as they began
    state.step, state.consumed, state.meter.losses = saved["step"], saved["consumed"], saved["losses"]


def save(state: TrainState, cfg: TrainConfig, log: runs.RunLog, options: dict[str, Any], checkpoint: bool) -> None:
    """Writes the resume state and, with `checkpoint`, the weights for sampling, with the `options` that made them."""
    weights = state.latte.state_dict()
    if checkpoint:
        path = log.run / "checkpoints" / f"{state.step:07d}.pt"
        save_checkpoint(path, ema=state.ema.module.state_dict(), model=weights, options=options | {"step": state.step})
    runs.save_state(
        log.run,
        state.step,
        cfg.keep_resume_states,
        model=weights,
        ema=state.ema.state_dict(),
        optimizer=state.optimizer.state_dict(),
        consumed=state.consumed,
        losses=state.meter.losses,
        scaler=state.scaler.state_dict() if state.scaler else None,
        ema_warms_up=state.ema_update.warms_up,
        classes=options["class_names"],
    )
    log.print(f"step {state.step}: saved")


def join_processes(cfg: TrainConfig) -> Accelerator:
    """This process among those of torchrun, with its device and number type; the CPU on a machine without GPUs."""
    on_gpu = local_device().type == "cuda"
    if cfg.mixed_precision == "fp16" and not on_gpu:
        raise UserError("mixed_precision: fp16 runs in software on a CPU, slower than fp32 by far; use bf16 or no")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))  # the ranks wait while rank 0 saves and previews
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=cfg.mixed_precision, kwargs_handlers=[patience])
    assert accelerator.num_processes == cli.world_size(), "accelerate found fewer processes than torchrun started"
    return accelerator


def clip_losses(
    model: torch.nn.Module,
    diffusion: Diffusion,
    encoder: LatentCodec | None,
    batch: dict,
    first: int,
    cfg: TrainConfig,
    device: torch.device,
) -> Tensor:
    """The loss of each clip of a batch, (B,), all in `device`'s fp32.

    Clip number `first` + i of the run draws from a generator of its own: posterior noise, t, noise, two label coins,
    and with `stale_features` a coin and a distance of timesteps.
    """
    mean, std = training.latent_moments(batch["video"].to(device, non_blocking=True), encoder, cfg)  # (B, f+K, C, h, w)
    B, t = len(mean), []
    # Contiguous, whatever the latents' strides: what a generator draws depends on the layout it fills.
    posterior_noise, noise, coins = (torch.empty(shape, device=device) for shape in (mean.shape, mean.shape, (B, 2)))
    stale = torch.empty((B, 2), device=device)
    for i in range(B):
        generator = torch.Generator(device).manual_seed(clip_seed(cfg.global_seed, first + i))
        posterior_noise[i].normal_(generator=generator)
        t.append(diffusion.draw_timestep(cfg.time_sampling, generator, device))
        noise[i].normal_(generator=generator)
        coins[i].uniform_(generator=generator)
        stale[i].uniform_(generator=generator)  # the last draw, so that it changes none of the others

    x, t = mean + std * posterior_noise, torch.stack(t)
    inputs = {}
    if cfg.stale_features:
        gap = torch.where(stale[:, 0] < cfg.stale_features, (stale[:, 1] * cfg.stale_gap).ceil().long(), 0)
        t_deep = (t + gap).clamp(max=diffusion.num_timesteps - 1).maximum(t)  # (B,)
        inputs = dict(x_deep=diffusion.q_sample(x, t_deep, noise), t_deep=diffusion.original_timesteps(t_deep))
    if cfg.num_classes is not None:
        drop = coins < cfg.class_dropout_prob  # (B, 2): the clip's label, and those of its stills together
        inputs["y"] = torch.where(drop[:, 0], cfg.num_classes, batch["label"].to(device, non_blocking=True))
        if cfg.use_image_num:
            image_labels = batch["image_labels"].to(device, non_blocking=True)  # (B, K)
            inputs["y_image"] = torch.where(drop[:, 1:], cfg.num_classes, image_labels)
    return diffusion.training_losses(model, x, t, inputs, noise, cfg.min_snr)["loss"]


def clip_seed(seed: int, number: int) -> int:
    """The seed of what is random about the run's clip `number`."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)


def train(cfg: TrainConfig) -> int:
    """Trains one run, from its first or its last saved step to `max_train_steps`; returns the exit code."""
    accelerator = join_processes(cfg)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    is_main = rank == 0
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    torch.manual_seed(cfg.global_seed)  # the same first weights on every rank

    # Data and VAE
    notes: list[str] = []  # for the log, which opens below
    dataset = get_dataset(cfg, say=notes.append)
    training.check_same_clips(dataset)
    codec = load_codec(cfg, device, need_statistics=False) if training.needs_vae(cfg) else None
    if codec and cfg.latents_path:
        check_latents(cfg, codec.fingerprint())
    if cfg.latents_path:
        training.check_shapes(cfg, dataset)
    encoder = None if cfg.latents_path else codec  # None: the batches hold moments
    diffusion = make_diffusion(cfg)
    num_forwards = cfg.gradient_accumulation_steps
    forward_clips = cfg.local_batch_size * world  # those of all processes
    step_clips = forward_clips * num_forwards

    # The run, continued or new, and its batches: workers start while there is no model that they would hold copies of
    log = runs.open_run(cfg, rank)
    for note in [*notes, describe_vae(cfg)]:
        log.print(note)
    saved = runs.load_state(log, dataset.classes)
    stop = training.StopSignal()
    sampler = ClipSampler(len(dataset), forward_clips, rank, world, cfg.global_seed, start=saved.get("consumed", 0))
    loading = dict(timeout=cfg.loader_timeout, stopping=lambda: stop.noted, ranks_here=cli.local_world_size())
    loading["pin_memory"] = device.type == "cuda"
    if is_main:
        loading["say"] = log.print  # of unusable files; the other ranks' go to stderr
    batches = load_batches(dataset, sampler, cfg.num_workers, cfg.max_bad_fraction, **loading)

    # Model
    latte = training.create_model(cfg, device)
    ema_update = training.EmaUpdate(cfg.ema_decay)
    trained = [p for p in latte.parameters() if p.requires_grad]
    state = TrainState(
        latte=latte,
        ema=AveragedModel(latte, multi_avg_fn=ema_update),
        ema_update=ema_update,
        optimizer=training.create_optimizer(cfg, latte),
        scaler=accelerator.scaler,
        meter=training.Meter(step_clips, cfg.max_train_steps),
    )
    cfg = training.settle_statistics(cfg, log, dataset, codec, device)
    options = made_of(cfg, dataset.classes, ema_decay=cfg.ema_decay)
    if saved:
        restore(state, saved, cfg, log.run)
        del saved
    else:
        if cfg.pretrained:
            training.start_from_pretrained(latte, cfg, diffusion, encoder, dataset, log)
        state.ema.update_parameters(latte)  # the first update copies
    log.rewind(state.step)
    if cfg.use_compile:
        for block in latte.blocks:  # one by one: all spatial blocks share a graph, and so do all temporal ones
            block.compile(fullgraph=True)  # in place: the names of the weights stay
    trainee = StaleFeatures(latte, cfg.cache.depth) if cfg.stale_features else latte
    model, state.optimizer = accelerator.prepare(trainee, state.optimizer)
    validation = training.validation_batch(cfg, codec, diffusion, device) if is_main and cfg.validation_every else None

    log.print(
        f"{log.run}: {sum(p.numel() for p in trained):,} weights to train, {len(dataset):,} clips, "
        f"{step_clips} a step, steps {state.step + 1} to {cfg.max_train_steps}"
    )
    if state.step >= cfg.max_train_steps:
        log.print("this run is finished: raise max_train_steps to go on, or start anew with resume_from_checkpoint=no")
    guard = training.StepGuard(cfg.max_bad_steps, state.scaler, log)

    def save_last_step() -> None:
        if is_main and state.step > runs.last_saved_step(log.run) and not guard.bad_steps:
            save(state, cfg, log, options, checkpoint=False)

    state.meter.start(state.step)
    bar = tqdm(total=cfg.max_train_steps, initial=state.step, unit="step", disable=None if is_main else True)
    with stop, bar, closing(batches), training.ending_whole(stop, log, save_last_step):
        for step in range(state.step + 1, cfg.max_train_steps + 1):
            # Forward and backward
            loss = torch.zeros((), device=device)
            for forward in range(num_forwards):
                first, last = state.consumed + forward * forward_clips, forward == num_forwards - 1
                first += rank * cfg.local_batch_size
                batch = next(batches)
                with nullcontext() if last else accelerator.no_sync(model):  # the ranks' gradients meet in the last one
                    share = clip_losses(model, diffusion, encoder, batch, first, cfg, device).mean() / num_forwards
                    accelerator.backward(share)
                loss += share.detach()
            norm = accelerator.clip_grad_norm_(trained, cfg.clip_max_norm if step >= cfg.start_clip_iter else math.inf)
            metrics = torch.stack([loss, norm, torch.tensor(float(stop.noted), device=device)])
            loss, norm, stopping = accelerator.reduce(metrics, "mean").tolist()  # alike on all ranks; waits for them

            # Update
            lr = training.set_learning_rate(state.optimizer, cfg, step)
            if guard.accepts(step, loss, norm):
                state.optimizer.step()
                state.ema.update_parameters(latte)
                state.meter.losses.append(loss)
            state.optimizer.zero_grad(set_to_none=True)
            state.step, state.consumed = step, state.consumed + step_clips
            bar.update()

            # Report
            finished = step == cfg.max_train_steps
            if step % cfg.log_every == 0 or finished:
                epoch, speed = state.consumed / len(dataset), state.meter.read(step)
                log.report(step, epoch=epoch, gradient_norm=norm, lr=lr, **speed)
            with accelerator.autocast():
                if validation and step % cfg.validation_every == 0:
                    log.report(step, **training.validate(state.ema.module, diffusion, validation, cfg.log_snrs))
                if is_main and cfg.preview_every and step % cfg.preview_every == 0:
                    training.preview(log.run / "previews", step, state.ema.module, cfg, codec, device)

            # Save
            checkpoint = finished or (step % cfg.ckpt_every == 0 and not guard.bad_steps)  # no diverged weights
            if is_main and (checkpoint or stopping):
                save(state, cfg, log, options, checkpoint)
            if stopping:
                log.print(stop.FAREWELL)
                break
    log.finish()
    accelerator.end_training()
    return 128 + stop.noted if stop.noted else 0  # so that `train && sample` stops, too


def main() -> int | None:
    args = parser.parse_args()
    cfg = load_config(TrainConfig, args.config, args.overrides)
    training.check_training_options(cfg)
    if not args.dry_run:
        return train(cfg)
    elif cli.rank() == 0:
        run = runs.find_run(cfg)
        cli.dry_run(cfg, training.describe_training(cfg, run), training.file_checks(cfg, run))


if __name__ == "__main__":
    cli.run(main)
