"""Run folders of a training, `{results_dir}/{index:03d}-{model}-{dataset}/`: logs, and the states to resume from."""

import hashlib
import json
import math
import re
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from configs import TrainConfig, UserError, absolute_path, load_config, to_yaml
from configs.files import append_text, check_writable, differences, lock, write_text
from configs.tables import duration
from datasets import class_changes
from models.checkpoint import save_checkpoint

# Options that may change between a run and its continuation: they do not change what is learned (`vae` decides
# in_channels). The exception is max_train_steps, where lr_schedule ends: the learning rate continues as if it had been
# the new one from the start.
INCIDENTAL = {
    "resume_from_checkpoint", "results_dir", "max_train_steps",
    "num_workers", "loader_timeout", "log_every", "ckpt_every", "keep_resume_states", "vae_chunk_frames",
    "gradient_checkpointing", "use_compile", "attention_mode", "in_channels", "max_bad_steps",
    "max_bad_fraction", "video_index_path", "report_to",
    "preview_every", "preview_clips", "validation_every", "validation_path", "validation_clips", "log_snrs",
    "sample_method", "num_sampling_steps", "eta", "cfg_scale", "cache", "recipe", "recipe_anyway",
}  # fmt: skip


STATE = {"step", "model", "ema", "optimizer", "consumed", "losses"}  # what a resume state holds at least


class RunLog:
    """Lines to the terminal and to `log.txt`, metrics to `log.jsonl` and a tracker; silent on every rank but 0.

    Args:
        report_to: the tracker, see TrainConfig.

    Raises:
        UserError: another living process writes this run.
    """

    def __init__(self, run: Path, rank: int, report_to: str = "tensorboard"):
        self.run, self.rank, self.report_to = run, rank, report_to
        self.tracker: GeneralTracker | None = None
        self.first_step: int | None = None
        self.lock = None if rank else lock(run / ".lock")
        if not rank and not self.lock:
            raise UserError(f"another process trains in {run}: end it first, or take another results_dir")

    def rewind(self, step: int) -> None:
        """Removes the metrics of steps after `step`, from which the run continues."""
        self.first_step = step + 1
        path = self.run / "log.jsonl"
        if not self.rank and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if _step_of(line) <= step))

    def print(self, message: str) -> None:
        """Writes a line with the time in front."""
        if not self.rank:
            line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {message}"
            tqdm.write(line)  # above a progress bar
            sys.stdout.flush()
            append_text(self.run / "log.txt", line + "\n")

    def report(self, step: int, **metrics: float) -> None:
        """Writes the metrics of a step: a line of text, a line of `log.jsonl`, and the tracker's scalars."""
        if self.rank:
            return
        words = {name: f"{name} {value:.5g}" for name, value in metrics.items()}
        if "hours_left" in metrics:
            words["hours_left"] = f"{duration(3600 * metrics['hours_left'])} left"
        self.print("  ".join([f"step {step}", *words.values()]))
        append_text(self.run / "log.jsonl", json.dumps({"step": step, **metrics}) + "\n")
        if self.report_to != "none":
            self.tracker = self.tracker or self._start_tracker()
            self.tracker.log(metrics, step=step)

    def finish(self) -> None:
        """Hands over what the tracker still holds."""
        if self.tracker:
            self.tracker.finish()

    def _start_tracker(self) -> GeneralTracker:
        if self.report_to == "wandb":
            name = hashlib.sha256(str(self.run.resolve()).encode()).hexdigest()[:16]  # the same when the run goes on
            tracker = WandBTracker("skip-dit", name=self.run.name, id=name, dir=str(self.run), resume="allow")
        else:
            tracker = TensorBoardTracker("tensorboard", str(self.run), purge_step=self.first_step)  # hides later steps
        tracker.start()
        return tracker


def open_run(cfg: TrainConfig, rank: int) -> RunLog:
    """The log of the run to continue, or of a new run; every rank gets the same folder."""
    found: list[Any] = [None, ""]
    if rank == 0:
        run = find_run(cfg)
        reason = "" if run else explain_new_run(cfg)
        found = [run or create_run(cfg), reason]
    run, reason = broadcast_object_list(found)
    log = RunLog(run, rank, cfg.report_to)
    if reason:
        log.print(reason)
    return log


def find_run(cfg: TrainConfig) -> Path | None:
    """The folder of the run to continue: the one given, or for `auto` the newest of the same options; None: no run."""
    wanted = cfg.resume_from_checkpoint
    if wanted == "no":
        return None
    if wanted != "auto":
        folder = absolute_path(wanted, Path.cwd())
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"resume_from_checkpoint: {folder} is no run folder (it has no config.yaml); or give auto, no"
            )
        return folder
    configs = sorted(Path(cfg.results_dir).glob("[0-9][0-9][0-9]*-*/config.yaml"), reverse=True)
    return next((path.parent for path in configs if not compare_options(path.parent, cfg)), None)


def create_run(cfg: TrainConfig) -> Path:
    """Makes a run folder with the resolved options in it, and returns it."""
    check_writable(cfg, "results_dir", folder=True)
    root = Path(cfg.results_dir)
    root.mkdir(parents=True, exist_ok=True)
    numbers = [int(found[1]) for path in root.iterdir() if (found := re.match(r"(\d{3,})-", path.name))]
    run = root / f"{max(numbers, default=-1) + 1:03d}-{_model_and_dataset(cfg)}"
    run.mkdir()
    write_text(run / "config.yaml", to_yaml(cfg))
    return run


def explain_new_run(cfg: TrainConfig) -> str:
    """How the newest run of the same model and data set differs, where `auto` does not continue it; else empty."""
    earlier = sorted(Path(cfg.results_dir).glob(f"[0-9][0-9][0-9]*-{_model_and_dataset(cfg)}/config.yaml"))
    if cfg.resume_from_checkpoint != "auto" or not earlier:
        return ""
    run = earlier[-1].parent
    return f"a new run, as {run.name} has {compare_options(run, cfg)} (resume_from_checkpoint={run} continues it)"


def compare_options(run: Path, cfg: TrainConfig) -> str:
    """The options that make `run` another training than that of `cfg`, as `key=theirs, not ours; ...`."""
    try:
        theirs = load_config(type(cfg), run / "config.yaml")
    except UserError as error:
        return f"options of another version of this code ({error})"
    measured = set() if cfg.latent_mean else {"latent_mean", "latent_std"}  # by the run itself
    return differences(asdict(theirs), asdict(cfg), ignore=INCIDENTAL | measured)


def resume_states(run: Path) -> list[Path]:
    """The files of resume states in a run folder, oldest first; a file's stem is its step."""
    return sorted(path for path in (run / "resume").glob("*.pt") if path.stem.isdecimal())


def last_saved_step(run: Path | None) -> int:
    """The step of a run's newest resume state; 0 without a state, or without a run."""
    return max((int(path.stem) for path in resume_states(run)), default=0) if run else 0


def save_state(run: Path, step: int, keep: int, **state: Any) -> None:
    """Writes `resume/{step:07d}.pt` and removes all but the newest `keep`; states of later steps are unreadable."""
    save_checkpoint(run / "resume" / f"{step:07d}.pt", step=step, **state)
    states = resume_states(run)
    kept = [path for path in states if int(path.stem) <= step][-keep:]
    for path in set(states) - set(kept):
        path.unlink()


def load_state(log: RunLog, classes: Sequence[str] | None) -> dict[str, Any]:
    """The newest readable resume state of the run, the same on every rank; empty if there is none.

    Its tensors lie in the file, whose pages all processes of a machine share; they take memory as they are copied.

    Args:
        classes: the names of the classes now, which must be those of the run.

    Raises:
        UserError: the classes are others, or no state can be read.
    """
    path = broadcast_object_list([None if log.rank else _newest_readable(log)])[0]
    if path is None:
        return {}
    try:
        state = _map_state(path)
    except OSError:
        where = f"process {log.rank} does not see the resume states in {log.run} that process 0 sees"
        raise UserError(f"results_dir: {where}") from None
    if classes and state.get("classes") and (changes := class_changes(state["classes"], classes)):
        advice = "rename the folders back, or start anew with resume_from_checkpoint=no"
        raise UserError(f"data_path: the classes are no longer those of {log.run}: {changes}; {advice}")
    return state


def _newest_readable(log: RunLog) -> Path | None:
    """The newest resume state that is whole; None if the run has none at all."""
    states = resume_states(log.run)
    for path in reversed(states):
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # reads the whole file, as mapping it checks nothing
            missing = ", ".join(sorted(STATE - _map_state(path).keys()))
            reason = f"{damaged} is damaged" if damaged else f"no {missing} in it" if missing else ""
        except Exception as error:  # which a damaged file, or one of another kind, can raise depends on its bytes
            reason = str(error).splitlines()[0]
        if not reason:
            return path
        log.print(f"passed over {path}, which cannot be read ({reason})")
    if states:
        ways = "resume_from_checkpoint=no starts anew, and pretrained= from weights in checkpoints/"
        raise UserError(f"none of the resume states in {log.run}/resume can be read: {ways}")
    return None


def _map_state(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _step_of(line: str) -> float:
    """The step of a line of `log.jsonl`; infinity for a line that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _model_and_dataset(cfg: TrainConfig) -> str:
    return f"{cfg.model.replace('/', '-')}-{cfg.dataset}"
