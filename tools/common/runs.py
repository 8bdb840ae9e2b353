"""Run folders of a training, `{results_dir}/{index:03d}-{model}-{dataset}/`: logs, and the state to resume from."""

import fcntl
import json
import math
import os
import pickle
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs import UserError, load_config, to_yaml
from models.checkpoint import atomic_path, save_checkpoint

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Options that may change between a run and its continuation: they do not change what is learned. But for one:
# max_train_steps, where lr_schedule falls; the learning rate goes on as if it had been the new one from the start.
INCIDENTAL = {
    "resume_from_checkpoint", "results_dir", "max_train_steps",
    "num_workers", "log_every", "ckpt_every", "keep_resume_states", "vae_chunk_frames", "gradient_checkpointing",
    "use_compile", "attention_mode", "max_bad_steps", "max_bad_fraction",
    "preview_every", "preview_clips", "validation_every", "validation_path", "validation_clips",
    "sample_method", "num_sampling_steps", "eta", "cfg_scale", "cache",
}  # fmt: skip


class RunLog:
    """Lines to the terminal and to `log.txt`, figures to `log.jsonl` and TensorBoard; silent on every rank but 0.

    Raises:
        UserError: another process, still alive, writes this run.
    """

    def __init__(self, run: Path, rank: int):
        self.run, self.silent = run, rank != 0
        self.board: SummaryWriter | None = None
        self.first_step: int | None = None
        if not self.silent:
            self.lock = (run / ".lock").open("a")  # held until the process ends, however it ends
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise UserError(f"another process trains in {run}: end it first, or take another results_dir") from None
            except OSError:  # a file system without locks
                pass

    def rewind(self, step: int) -> None:
        """Take back the figures of later steps: the run goes on from `step`."""
        self.first_step = step + 1
        path = self.run / "log.jsonl"
        if not self.silent and path.exists():
            kept = [line for line in path.read_text().splitlines(keepends=True) if _step(line) <= step]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(kept))

    def say(self, line: str) -> None:
        if not self.silent:
            line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}"
            print(line, flush=True)
            with (self.run / "log.txt").open("a") as file:
                file.write(line + "\n")

    def report(self, step: int, **figures: float) -> None:
        """One line of figures, and the same as a line of `log.jsonl` and in TensorBoard's folder."""
        if self.silent:
            return
        self.say("  ".join([f"step {step}", *(f"{name} {value:.5g}" for name, value in figures.items())]))
        with (self.run / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter  # a second's import, for the rank that writes

            self.board = SummaryWriter(self.run / "tensorboard", purge_step=self.first_step)  # hides later steps
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)


def find_run(cfg: Any) -> Path | None:
    """The run to continue: for `resume_from_checkpoint: auto` the newest with the same options, or the folder given."""
    wanted = cfg.resume_from_checkpoint
    if wanted == "no":
        return None
    if wanted != "auto":
        folder = Path(wanted).expanduser()
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"resume_from_checkpoint: {folder} is no run folder (it has no config.yaml); or give auto, no"
            )
        return folder
    runs = sorted(Path(cfg.results_dir).glob("[0-9][0-9][0-9]*-*/config.yaml"), reverse=True)
    return next((path.parent for path in runs if not differences(path.parent, cfg)), None)


def create_run(cfg: Any) -> Path:
    """A new run folder, with the resolved options in it."""
    root = Path(cfg.results_dir)
    root.mkdir(parents=True, exist_ok=True)
    index = max((int(path.name.split("-")[0]) for path in root.glob("[0-9][0-9][0-9]*-*")), default=-1) + 1
    run = root / f"{index:03d}-{_kind(cfg)}"
    run.mkdir()
    with atomic_path(run / "config.yaml") as temporary:
        temporary.write_text(to_yaml(cfg))
    return run


def why_new(cfg: Any) -> str:
    """For `auto`: how the newest run but one, of the same model and data set, differs; empty where there is none."""
    earlier = sorted(Path(cfg.results_dir).glob(f"[0-9][0-9][0-9]*-{_kind(cfg)}/config.yaml"))[:-1]
    if cfg.resume_from_checkpoint != "auto" or not earlier:
        return ""
    run = earlier[-1].parent
    return (
        f"a new run, as {run.name} has {'; '.join(differences(run, cfg))} (resume_from_checkpoint={run} continues it)"
    )


def save_state(run: Path, step: int, keep: int, **state: Any) -> None:
    """Write `resume/{step:07d}.pt` and remove all but the newest `keep`; those of later steps were broken ones."""
    save_checkpoint(run / "resume" / f"{step:07d}.pt", step=step, **state)
    states = sorted((run / "resume").glob("*.pt"))
    kept = [path for path in states if int(path.stem) <= step][-keep:]
    for path in set(states) - set(kept):
        path.unlink()


def newest_state(run: Path, log: RunLog) -> dict[str, Any] | None:
    """The newest resume state that can be read; one that cannot is passed over, and said so."""
    for path in sorted((run / "resume").glob("*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            log.say(f"passed over {path}, which cannot be read ({str(error).splitlines()[0]})")
    return None


def differences(run: Path, cfg: Any) -> list[str]:
    """The options that make `run` another training than that of `cfg`, as `key=theirs, not ours`."""
    try:
        theirs, ours = asdict(load_config(type(cfg), run / "config.yaml")), asdict(cfg)
    except UserError as error:
        return [f"options of another version of this code ({error})"]
    keys = [key for key in ours if key not in INCIDENTAL and theirs[key] != ours[key]]
    return [f"{key}={theirs[key]}, not {ours[key]}" for key in keys]


def rank() -> int:
    """Number of this process among those that torchrun started."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _step(line: str) -> float:
    """The step of a line of `log.jsonl`; infinite for one that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _kind(cfg: Any) -> str:
    return f"{cfg.model.replace('/', '-')}-{cfg.dataset}"
