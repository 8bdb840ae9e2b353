"""What train.py is made of beside its loop: model, schedule, guard, meter, signals, validation and previews.

Letters: B clips of a process, F frames, C channels of the latents.
"""

import hashlib
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import Dataset

from configs import SampleConfig, TrainConfig, UserError, cli, load_config, require_path, to_yaml
from configs.files import check_writable, write_text
from datasets import class_changes, collate, get_dataset
from datasets.clips import class_folders
from datasets.joint import WithStills
from datasets.latents import have_statistics
from datasets.loader import STOP_SIGNALS, Interrupted, LoaderError
from diffusion import Diffusion, make_diffusion
from models import get_models, model_dimensions
from models.autoencoder import LatentCodec, vae_file
from models.checkpoint import load_checkpoint
from models.hardware import DTYPES, check_compiler, fastest_attention
from models.latte import Latte, init_skips_as_identity
from models.skip_cache import check_cache_depth
from models.vaes import describe_vae, vae_spec
from sample.media import save_grid
from sample.pipeline import Pipeline, generate, resolve
from sample.plans import UNCACHED, Plan, make_plan
from tools.common import runs

MEASURED_CLIPS = 128  # by `measure_statistics`
ECHO = 1.0  # seconds in which torchrun may hand on a signal that its processes have received, too
TRAINABLE: dict[str, Callable[[str], bool]] = {  # train_only -> whether a parameter is trained
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


# ---------------------------------------------------------------------------------------------------------------------
# Before the run: options, and what a dry run says
# ---------------------------------------------------------------------------------------------------------------------


def check_training_options(cfg: TrainConfig) -> None:
    """Raises UserError for options that contradict the model or each other."""
    if cfg.train_only == "skip" and not model_dimensions(cfg)["num_skips"]:
        raise UserError(
            f"train_only: {cfg.model} has no skip branches to train; choose a model with `skip` in its name"
        )
    if cfg.stale_features and cfg.use_image_num:
        raise UserError("stale_features: stills have no place in cached steps; use use_image_num=0 or stale_features=0")
    if cfg.stale_features:
        check_cache_depth(model_dimensions(cfg)["depth"] // 2, cfg.cache.depth)
    if cfg.report_to == "wandb":
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError(f"report_to: {error}: pip install wandb, or use report_to=tensorboard") from None
    make_diffusion(cfg)
    vae = vae_spec(cfg)
    if cfg.use_image_num and not vae.causal:
        raise UserError(f"use_image_num: {vae.name} encodes no single frames; leave stills out")
    if cfg.preview_every:
        preview_plans(cfg, torch.device("cpu"))
    if cfg.use_compile:
        check_compiler()
    check_writable(cfg, "results_dir", folder=True)


def describe_training(cfg: TrainConfig, run: Path | None) -> list[str]:
    """What would run, a line each: model, data, steps, and the run that continues (None: a new one)."""
    with torch.device("meta"):
        parameters = dict(get_models(cfg).named_parameters())
    size = sum(p.numel() for p in parameters.values())
    trained = sum(p.numel() for name, p in parameters.items() if is_trained(cfg, name, p))
    try:
        clips = f"{len(get_dataset(cfg, say=lambda note: None)):,} clips in"
    except UserError:  # the checks of the files say why
        clips = "no clips found in"
    factors = cfg.local_batch_size, cfg.gradient_accumulation_steps, cli.world_size()
    batch = "{} a forward x {} forwards x {} processes".format(*factors)
    first, last = runs.last_saved_step(run) + 1, cfg.max_train_steps
    place = f"continues {run}" if run else f"in {cfg.results_dir}, {runs.explain_new_run(cfg) or 'a new run'}"
    return [
        f"model: {cfg.model}, {size:,} parameters, {trained:,} to train, mixed_precision {cfg.mixed_precision}",
        describe_vae(cfg),
        f"data: {clips} {cfg.latents_path or cfg.data_path}",
        f"batch: {math.prod(factors)} clips a step, {batch}",
        f"steps: {first} to {last}" if first <= last else f"steps: none, the run is finished at step {last}",
        f"run: {place}",
    ]


def file_checks(cfg: TrainConfig, run: Path | None) -> list[Callable[[], object]]:
    """For `cli.dry_run`: each raises UserError if files that the training reads or writes are not as they must be."""
    checks: list[Callable[[], object]] = [lambda: get_dataset(cfg)]
    if needs_vae(cfg):
        checks.append(lambda: vae_file(cfg))
    if cfg.pretrained and not runs.last_saved_step(run):
        checks.append(lambda: require_path(cfg, "pretrained"))
    if cfg.validation_every:
        checks.append(lambda: validation_set(cfg))
    return checks


def check_shapes(cfg: TrainConfig, dataset: Dataset) -> None:
    """Raises UserError unless encoded latents have the shape that the VAE of the options gives to a clip."""
    dimensions = model_dimensions(cfg)
    theirs = list(dataset[0, 0]["video"].shape)  # (f + K, 2C, h, w)
    ours = [
        dimensions["num_frames"] + cfg.use_image_num,
        2 * dimensions["in_channels"],
        *[dimensions["input_size"]] * 2,
    ]
    if theirs != ours:
        raise UserError(f"latents_path: its clips are {theirs}, those of vae={cfg.vae} are {ours}; use the VAE of both")


def needs_vae(cfg: TrainConfig) -> bool:
    """Whether the training encodes or decodes videos."""
    return bool(not cfg.latents_path or cfg.preview_every or cfg.validation_every)


def check_same_clips(dataset: Dataset) -> None:
    """Raises UserError if this process found other clips, or other labels, than the first one."""
    clips = dataset.clips if isinstance(dataset, WithStills) else dataset
    names = "\0".join(f"{path.name}/{label}" for path, label in zip(clips.paths, clips.labels, strict=True))
    mine = len(clips), hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    if (first := tuple(broadcast_object_list([mine])[0])) != mine:
        raise UserError(f"data_path: the {mine[0]} clips here are not the {first[0]} clips that process 0 finds")


# ---------------------------------------------------------------------------------------------------------------------
# Model and schedule
# ---------------------------------------------------------------------------------------------------------------------


def create_model(cfg: TrainConfig, device: torch.device) -> Latte:
    """The model with its first weights; parameters that `train_only` does not name are frozen."""
    latte = get_models(cfg).to(device)
    dtype = DTYPES["fp32" if cfg.mixed_precision == "no" else cfg.mixed_precision]
    latte.set_attention(fastest_attention(device, dtype) if cfg.attention_mode == "auto" else cfg.attention_mode)
    latte.gradient_checkpointing = cfg.gradient_checkpointing
    for name, parameter in latte.named_parameters():
        parameter.requires_grad_(is_trained(cfg, name, parameter))
    return latte


class MuonAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for other parameters, as one optimizer.

    Muon's steps are scaled to the size of AdamW's (arXiv:2502.16982), so both take the same learning rate.
    """

    def __init__(self, matrices: list[Tensor], others: list[Tensor], learning_rate: float, weight_decay: float):
        muon = torch.optim.Muon(matrices, learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.parts = muon, torch.optim.AdamW(others, learning_rate, weight_decay=weight_decay, fused=True)
        super().__init__([*matrices, *others], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)
        self._share_groups()


def create_optimizer(cfg: TrainConfig, latte: Latte) -> torch.optim.Optimizer:
    """The optimizer of the parameters that are trained."""
    trained = {name: p for name, p in latte.named_parameters() if p.requires_grad}
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(trained.values(), cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)
    inner = ("blocks.", "skip_linears.")
    matrices = {name: p for name, p in trained.items() if p.ndim == 2 and name.startswith(inner)}
    others = [p for name, p in trained.items() if name not in matrices]
    return MuonAdamW(list(matrices.values()), others, cfg.learning_rate, cfg.weight_decay)


def is_trained(cfg: TrainConfig, name: str, parameter: Tensor) -> bool:
    """Whether `train_only` lets a parameter of the model be trained; the position embeddings never are."""
    return parameter.requires_grad and TRAINABLE[cfg.train_only](name)


def start_from_pretrained(
    latte: Latte,
    cfg: TrainConfig,
    diffusion: Diffusion,
    encoder: LatentCodec | None,
    dataset: Dataset,
    log: runs.RunLog,
) -> None:
    """Loads `cfg.pretrained`. If it is a Latte without skips, the skip branches start as `cfg.skip_init` says."""
    absent = load_checkpoint(latte, cfg.pretrained, optional="skip_")
    log.print(f"started from {cfg.pretrained}" + (f", skip branches from skip_init={cfg.skip_init}" if absent else ""))
    if absent and cfg.skip_init == "identity":
        batch = collate([dataset[0, i % len(dataset)] for i in range(8)])
        x, _ = latent_moments(batch["video"].to(latte.pos_embed.device), encoder, cfg)  # (B, f+K, C, h, w)
        x = x[:, : latte.num_frames]
        t = torch.linspace(0, diffusion.num_timesteps - 1, len(x), device=x.device).long()  # (B,)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(cfg.global_seed)).to(x)
        y = None if cfg.num_classes is None else batch["label"].to(x.device)
        init_skips_as_identity(latte, diffusion.q_sample(x, t, noise), t, y)


def latent_moments(video: Tensor, encoder: LatentCodec | None, cfg: TrainConfig) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a batch's latents, from pixels or, without encoder, from encoded moments."""
    if encoder:
        return encoder.moments(video, cfg.use_image_num)
    mean, std = video.float().chunk(2, dim=2)
    if cfg.latent_mean:
        measured = torch.tensor([cfg.latent_mean, cfg.latent_std], device=video.device)[..., None, None]  # (2, C, 1, 1)
        mean, std = (mean - measured[0]) / measured[1], std / measured[1]
    return mean, std


def settle_statistics(
    cfg: TrainConfig, log: runs.RunLog, dataset: Dataset, codec: LatentCodec | None, device: torch.device
) -> TrainConfig:
    """Returns the options with the latents' statistics, if any are to be measured: those of the run, or measured now.

    The codec normalizes by them from now on. They are kept in the run's config.yaml.
    """
    path = log.run / "config.yaml"
    run = load_config(TrainConfig, path)
    if cfg.latent_mean:
        return cfg  # the codec has them
    cfg = replace(cfg, latent_mean=run.latent_mean, latent_std=run.latent_std)
    stated = codec.has_statistics if codec else have_statistics(cfg)
    if not cfg.latent_mean and (cfg.latent_statistics == "measured" or not stated):
        found = measure_statistics(cfg, dataset, None if cfg.latents_path else codec, device) if not log.rank else None
        mean, std = broadcast_object_list([found])[0]
        cfg = replace(cfg, latent_mean=mean, latent_std=std)
        if not log.rank:
            write_text(path, to_yaml(replace(run, latent_mean=mean, latent_std=std)))
        log.print(f"latents: measured mean {mean}, standard deviation {std}")
    if codec and cfg.latent_mean:
        codec.normalize(cfg.latent_mean, cfg.latent_std)
    return cfg


def measure_statistics(
    cfg: TrainConfig, dataset: Dataset, encoder: LatentCodec | None, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the latents of up to MEASURED_CLIPS clips, posteriors included."""
    sums = []
    for i in np.linspace(0, len(dataset) - 1, min(len(dataset), MEASURED_CLIPS)).round().astype(int).tolist():
        mean, std = latent_moments(collate([dataset[0, i]])["video"].to(device), encoder, cfg)  # (1, f+K, C, h, w)
        sums.append(torch.stack([each.double().mean((0, 1, 3, 4)) for each in (mean, mean**2 + std**2)]))
    mean, square = torch.stack(sums).mean(0)  # (C,)
    return mean.tolist(), (square - mean**2).clamp(min=1e-12).sqrt().tolist()


class EmaUpdate:
    """The update of an AveragedModel, with decay min(beta, (1 + n) / (10 + n)) after n updates.

    Without this warm-up, the average of a short run is mostly its first weights.
    """

    def __init__(self, decay: float):
        self.decay = decay  # beta
        self.warms_up = True  # False in runs that began before there was a warm-up

    def __call__(self, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        n = int(num_averaged) - 1  # the first of `num_averaged` copies
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warms_up else self.decay
        get_ema_multi_avg_fn(decay)(averaged, current, num_averaged)


def learning_rate(cfg: TrainConfig, step: int) -> float:
    """The learning rate of step 1, 2, ...: linear warm-up, then `lr_schedule` down to max_train_steps."""
    if step <= cfg.lr_warmup_steps:
        return cfg.learning_rate * step / cfg.lr_warmup_steps
    share = (step - cfg.lr_warmup_steps) / max(1, cfg.max_train_steps - cfg.lr_warmup_steps)
    return cfg.learning_rate * LR_SCHEDULES[cfg.lr_schedule](share)


def set_learning_rate(optimizer: torch.optim.Optimizer, cfg: TrainConfig, step: int) -> float:
    """Sets and returns the learning rate of `step`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)
    return learning_rate(cfg, step)


# ---------------------------------------------------------------------------------------------------------------------
# Beside the steps: guard, meter, signals
# ---------------------------------------------------------------------------------------------------------------------


class StepGuard:
    """Skips steps without a finite loss and gradient, and ends a run that has `max_bad_steps` of them in a row.

    With fp16's gradient scaler, overflows are how it finds the largest scale that fits: a skipped step counts as bad
    only if the loss itself is not finite, or if the scale has come down to 1.
    """

    def __init__(self, max_bad_steps: int, scaler: torch.amp.GradScaler | None, log: runs.RunLog):
        self.max_bad_steps, self.scaler, self.log = max_bad_steps, scaler, log
        self.bad_steps = 0  # in a row

    def accepts(self, step: int, loss: float, norm: float) -> bool:
        """Whether the weights may take the gradient of this step; called once a step.

        Raises:
            UserError: too many bad steps in a row.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.bad_steps = 0
            return True
        self.log.print(f"step {step}: skipped, loss {loss}, gradient norm {norm}")
        if self.scaler:
            self.scaler.update()  # halves its scale
        searching = self.scaler and math.isfinite(loss) and self.scaler.get_scale() > 1
        self.bad_steps = 0 if searching else self.bad_steps + 1
        if self.bad_steps == self.max_bad_steps:
            raise UserError(
                f"{self.bad_steps} steps in a row had no finite loss and gradient (max_bad_steps): lower learning_rate "
                f"or clip from the start (start_clip_iter=0), and resume_from_checkpoint={self.log.run} to go on from "
                "there"
            )
        return False


class Meter:
    """Mean loss, speed and memory of the steps since the last report line."""

    def __init__(self, clips_per_step: int, last_step: int):
        self.clips_per_step, self.last_step = clips_per_step, last_step
        self.losses: list[float] = []  # finite ones since the last report line; a resumed run gets those saved

    def start(self, step: int) -> None:
        """Starts the clock, after `step`."""
        self.step, self.time = step, time.monotonic()

    def read(self, step: int) -> dict[str, float]:
        """Mean loss, steps/s, clips/s, GB of memory at the peak, hours to the last step; restarts the meter."""
        rate = (step - self.step) / (time.monotonic() - self.time)
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 1e9
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        mean = sum(self.losses) / len(self.losses) if self.losses else math.nan
        self.losses = []
        self.start(step)
        speed = dict(steps_per_s=rate, clips_per_s=rate * self.clips_per_step)
        return dict(loss=mean, **speed, memory_gb=peak, hours_left=(self.last_step - step) / rate / 3600)


class StopSignal:
    """Notes that this process was asked to end (SIGTERM, Ctrl-C): the ranks agree on a step, and save first.

    A second signal ends the process at once, whatever it does: a thread sees the signals that `signal` writes to a
    pipe, also while the main thread is in a library.
    """

    FAREWELL = "stopped by a signal; the same command continues"

    def __init__(self) -> None:
        self.noted = 0  # the signal's number

    def __enter__(self) -> "StopSignal":
        self.handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        self.wakeup = signal.set_wakeup_fd(self.pipe[1])
        threading.Thread(target=self._end_at_second, args=(self.pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.close(self.pipe[1])  # ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number

    def _end_at_second(self, pipe: int) -> None:
        first, echo = math.inf, ECHO if cli.world_size() > 1 else 0.0
        while byte := os.read(pipe, 1):
            if byte[0] in STOP_SIGNALS:
                now = time.monotonic()
                if now - first > echo:
                    for child in multiprocessing.active_children():
                        child.kill()
                    os.write(2, b"ended at once by a second signal\n")
                    os._exit(128 + byte[0])
                first = min(first, now)
        os.close(pipe)


@contextmanager
def ending_whole(stop: StopSignal, log: runs.RunLog, save_last_step: Callable[[], None]) -> Iterator[None]:
    """If batches do not come, or another process has left, saves the last step; that is no error after a signal."""
    try:
        yield
    except (Interrupted, LoaderError, RuntimeError) as error:
        patience = time.monotonic() + 5  # another process has ended: torchrun soon signals this one
        while "onnection" in str(error) and not stop.noted and time.monotonic() < patience:
            time.sleep(0.1)
        if isinstance(error, RuntimeError) and not (stop.noted and cli.world_size() > 1):
            raise  # no other process left
        save_last_step()
        if not stop.noted:
            raise
        log.print(stop.FAREWELL)


# ---------------------------------------------------------------------------------------------------------------------
# Validation and previews
# ---------------------------------------------------------------------------------------------------------------------


def validation_set(cfg: TrainConfig) -> Dataset:
    """The clips of `validation_path` as pixels, without stills; UserError if its classes are not those of training."""
    path = str(require_path(cfg, "validation_path"))
    name, root = cfg.dataset.removesuffix("_img"), Path(cfg.latents_path or cfg.data_path or "")
    dataset = get_dataset(replace(cfg, dataset=name, data_path=path, latents_path=None, use_image_num=0))
    if dataset.classes and root.is_dir() and (changes := class_changes(class_folders(root), dataset.classes)):
        raise UserError(f"validation_path: {path} has other classes than {root}: {changes}")
    return dataset


def validation_batch(
    cfg: TrainConfig, codec: LatentCodec, diffusion: Diffusion, device: torch.device
) -> dict[str, Any]:
    """The batch for `validate`: clips of `validation_path`, timesteps and noise that never change."""
    dataset = validation_set(cfg)
    chosen = np.linspace(0, len(dataset) - 1, cfg.validation_clips).round().astype(int).tolist()
    batch = collate([dataset[0, i] for i in chosen])
    x = codec.encode(batch["video"].to(device))  # (B, F, C, h, w)
    t = torch.linspace(0, diffusion.num_timesteps - 1, len(x), device=device).long()  # (B,)
    noise = torch.randn(x.shape, generator=torch.Generator(device).manual_seed(cfg.global_seed), device=device)
    labels = {} if cfg.num_classes is None else {"y": batch["label"].to(device)}
    return dict(x_start=x, t=t, model_kwargs=labels, noise=noise)


@torch.no_grad()
def validate(model: Latte, diffusion: Diffusion, batch: dict[str, Any], log_snrs: Sequence[float]) -> dict[str, float]:
    """The metrics of the batch made by `validation_batch`: its mean loss, and mean squared errors of x_0.

    Errors are those at each of `log_snrs` and their mean, which compare models whatever they predict.
    """
    metrics = {"validation_loss": diffusion.training_losses(model, **batch)["loss"].mean().item()}
    x, labels, noise = batch["x_start"], batch["model_kwargs"], batch["noise"]
    errors = diffusion.x_start_errors(model, x, log_snrs, labels, noise).mean(0)  # (K,)
    levels = {f"x0_mse_{log_snr:g}": error for log_snr, error in zip(log_snrs, errors.tolist(), strict=True)}
    return metrics | {"x0_mse": errors.mean().item()} | levels


def preview(folder: Path, step: int, model: Latte, cfg: TrainConfig, codec: LatentCodec, device: torch.device) -> None:
    """Writes a grid of seeds and labels 0, 1, ...: `{step}-uncached.mp4` and, with skips, `{step}-N2.mp4`."""
    options, plans = preview_plans(cfg, device)
    diffusion = make_diffusion(options, options.num_sampling_steps)
    pipe = Pipeline(options, model, codec, diffusion, device, plans[0], uncached=model)
    seeds = range(cfg.preview_clips)
    labels = None if model.num_classes is None else [seed % model.num_classes for seed in seeds]
    for plan in plans:
        save_grid(folder / f"{step:07d}-{plan.name}.mp4", generate(pipe, seeds, labels, plan), options.fps)


def preview_plans(cfg: TrainConfig, device: torch.device) -> tuple[SampleConfig, list[Plan]]:
    """The sampling options of the previews and a plan for each; UserError for options that contradict each other."""
    shared = {each.name: getattr(cfg, each.name) for each in fields(SampleConfig) if hasattr(cfg, each.name)}
    shared["fps"] = max(1, round(cfg.fps or SampleConfig.fps))  # of a data set, it may be empty or a fraction
    options = resolve(SampleConfig(**shared), device)
    cached = replace(options.cache, interval=2) if options.cache.is_off else options.cache
    caches = [UNCACHED, cached] if model_dimensions(cfg)["num_skips"] else [UNCACHED]
    return options, [make_plan(options, cache) for cache in caches]
