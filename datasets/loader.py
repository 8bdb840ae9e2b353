"""Batches of clips for a training loop, read by worker processes; how those fail, and a limit on unusable files."""

import atexit
import logging
import math
import multiprocessing
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from configs import UserError
from datasets.clips import summary
from datasets.joint import WithStills
from datasets.sampler import ClipSampler

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SHARED_MEMORY = Path("/dev/shm")  # where batches lie on their way from the workers
ENLARGE = "enlarge it (docker run --shm-size=8g)"
PREFETCH = 2  # batches that each worker reads ahead
LOOK_EVERY = 0.5  # seconds between looks at a batch that is late
GRACE = 5.0  # seconds that a batch may still take once the run is to stop
DEATHS = {  # what ends a worker -> the usual reason
    -signal.SIGKILL: "was killed, as the kernel does when memory is short: lower num_workers",
    -signal.SIGBUS: f"met a bus error: {SHARED_MEMORY} is full ({ENLARGE}), or a file was cut while it was read",
    -signal.SIGSEGV: "crashed in a decoder: remove the file",
}
MIN_JUDGED = 1000  # files drawn before max_bad_fraction applies (or one epoch of a smaller data set)

logger = logging.getLogger(__name__)


class LoaderError(UserError):
    """No more batches: too many files, or the machine's means of reading them, cannot be used."""


class Interrupted(Exception):
    """The run was to stop while it waited for a batch."""


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the batch of items: video (B, F+K, 3, S, S), label (B,), name, skipped, notes, [image_labels (B, K)].

    Raises:
        UserError: clips differ in shape, as latents of several sizes do.
    """
    first = items[0]
    for item in items:
        if item["video"].shape != first["video"].shape:
            shapes = [f"{each['name']} {list(each['video'].shape)}" for each in (first, item)]
            raise UserError(f"clips differ in shape: {', '.join(shapes)}; remove or encode again the wrong one")
    batch = {
        "video": torch.stack([item["video"] for item in items]),
        "label": torch.tensor([item["label"] for item in items]),
        "name": [item["name"] for item in items],
        "skipped": [file for item in items for file in item["skipped"]],
        "notes": [note for item in items for note in item["notes"]],
    }
    if "image_labels" in items[0]:
        batch["image_labels"] = torch.stack([item["image_labels"] for item in items])
    return batch


class _Batches(Dataset):
    """Maps lists of keys to batches, or to the UserError raised: a worker would add its traceback to an exception."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, keys: list[tuple[int, int]]) -> dict[str, Any] | UserError:
        try:
            batch = collate([self.dataset[key] for key in keys])
            if get_worker_info():
                _share(batch)
        except UserError as error:
            return error
        return batch


def _share(batch: dict[str, Any]) -> None:
    """Moves the tensors of a batch to shared memory; UserError if they do not fit.

    The worker's thread that sends batches would do it otherwise, and lose a batch that does not fit without a word.
    """
    try:
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    except RuntimeError as error:
        room = shutil.disk_usage(SHARED_MEMORY)
        sizes = f"{room.free / 2**20:.1f} of {room.total / 2**20:.1f} MiB are free"
        message = f"a batch does not fit into {SHARED_MEMORY}, where {sizes}: lower num_workers, or {ENLARGE}"
        raise UserError(f"{message} [{error}]") from None


class _Reader:
    """Reads batches in worker processes, which start with it and end with it.

    A thread watches over the waiting: it ends the workers, even stuck ones, and so the waiting, when a batch is late.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: ClipSampler,
        num_workers: int,
        timeout: float,
        stopping: Callable[[], bool],
        pin_memory: bool,
    ):
        self.paths = (dataset.clips if isinstance(dataset, WithStills) else dataset).paths
        self.timeout, self.stopping = timeout, stopping
        self.awaited: deque[list[tuple[int, int]]] = deque()  # the keys of the batches to come
        self.waiting_since: float | None = None
        self.ended: Exception | None = None  # why the thread ended the workers
        self.done = threading.Event()
        others = set(multiprocessing.active_children())
        loader = DataLoader(
            _Batches(dataset),
            sampler=self._record(sampler),
            batch_size=None,  # the sampler's keys are whole batches
            num_workers=num_workers,
            prefetch_factor=PREFETCH if num_workers else None,
            timeout=LOOK_EVERY if num_workers else 0,
            generator=torch.Generator(),  # otherwise seeding the workers would advance the training's generator
            pin_memory=pin_memory,
        )
        # torchrun and terminals signal workers, too, but the training must still save: they never see these signals.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self.batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self.workers = [process for process in multiprocessing.active_children() if process not in others]
        atexit.register(self.close)  # before multiprocessing waits for them
        if self.workers:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises in the midst of whatever runs
            threading.Thread(target=self._watch, daemon=True).start()

    def _record(self, sampler: ClipSampler) -> Iterator[list[tuple[int, int]]]:
        for keys in sampler:
            self.awaited.append(keys)
            yield keys

    def read(self) -> dict[str, Any]:
        """Returns the next batch.

        Raises:
            LoaderError: an error in a worker, a dead worker, or no batch for `timeout` seconds.
            Interrupted: `stopping` has been true for `GRACE` seconds without a batch.
        """
        self.waiting_since, batch = time.monotonic(), None
        while batch is None:
            try:
                batch = next(self.batches)
            except Exception as error:
                if self.workers and isinstance(error, OSError | EOFError):  # a worker that is dying, not yet dead
                    wait([worker.sentinel for worker in self.workers], timeout=1)
                codes = {worker.exitcode for worker in self.workers} - {None, 0}
                if self.ended or codes:
                    raise self.ended or LoaderError(self._describe(codes)) from None
                if "Too many open files" in str(error):
                    advice = "lower num_workers, or raise the limit (ulimit -n)"
                    raise LoaderError(f"too many open files: {advice}") from None
                if "DataLoader timed out" not in str(error):  # after LOOK_EVERY, to look here
                    raise
        self.waiting_since = None
        self.awaited.popleft()
        if isinstance(batch, UserError):
            raise LoaderError(str(batch))
        return batch

    def _describe(self, codes: set[int]) -> str:
        reason = next((DEATHS[code] for code in codes if code in DEATHS), f"ended with code {min(codes)}")
        return f"a data worker {reason}; the batch awaited is of {self._files()}"

    def _files(self) -> str:
        return summary([str(self.paths[index]) for _, index in self.awaited[0]])

    def _watch(self) -> None:
        stopping_since = None
        while not self.done.wait(LOOK_EVERY):
            now, since = time.monotonic(), self.waiting_since
            if self.stopping():
                stopping_since = stopping_since or now
            if since and stopping_since and now - max(since, stopping_since) > GRACE:
                self.ended = Interrupted()
            elif since and self.timeout and now - since > self.timeout:
                late = f"no batch for {self.timeout:g} s (loader_timeout)"
                self.ended = LoaderError(f"{late}: a disk or a file keeps the workers busy; it is of {self._files()}")
            if self.ended:
                return self.close()

    def close(self) -> None:
        """Ends the workers at once."""
        self.done.set()
        atexit.unregister(self.close)
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.join()


def load_batches(
    dataset: Dataset,
    sampler: ClipSampler,
    num_workers: int = 0,
    max_bad_fraction: float = 0.1,
    say: Callable[[str], object] = logger.warning,
    timeout: float = 0,
    stopping: Callable[[], bool] = lambda: False,
    ranks_here: int = 1,
    pin_memory: bool = False,
) -> Iterator[dict[str, Any]]:
    """Starts the workers, and yields batches (see `collate`) of `dataset` in the order of `sampler`, without end.

    Workers begin as copies of this process: call this before the process grows.

    Args:
        dataset: one of `get_dataset`.
        num_workers: processes that read; 0: this process reads, and nothing limits how long.
        max_bad_fraction: the largest share of unusable files among those drawn.
        say: called with a message for each unusable file, once, with the shared memory that the batches need, and with
            one for each kind of note on the files of the first epoch (or on the first `MIN_JUDGED` files).
        timeout: seconds to wait for a batch; 0: for ever.
        stopping: whether the run is to stop.
        ranks_here: processes of this machine that load such batches.
        pin_memory: whether to return batches in pinned memory.

    Raises:
        LoaderError: the share of unusable files is larger, a worker is dead or stuck, or shared memory is too small.
        Interrupted: `stopping` has been true for `GRACE` seconds without a batch.
    """
    free = shutil.disk_usage(SHARED_MEMORY).free if num_workers and SHARED_MEMORY.exists() else math.inf
    reader = _Reader(dataset, sampler, num_workers, timeout, stopping, pin_memory)
    batches = _judged(reader, dataset, num_workers, max_bad_fraction, say, free / ranks_here)
    next(batches)  # from here on, its end closes the reader
    return batches


def _judged(reader, dataset, num_workers, max_bad_fraction, say, free) -> Iterator[Any]:
    """Yields None, then the batches of `reader`, within `max_bad_fraction` and `free` bytes of shared memory."""
    drawn = bad = dataset.num_unreadable  # each such folder counts as an unusable file
    named, notes = {}, {}  # notes: a note -> the names of the videos
    judged = False  # whether the notes have been said
    try:
        yield
        while True:
            batch = reader.read()
            if free < math.inf:
                _check_shared_memory(batch, num_workers, free, say)
                free = math.inf  # once
            skipped = batch["skipped"]
            for file in skipped:
                if file not in named:
                    named[file] = None
                    say(f"skipped {file}; unusable files so far: {len(named)}")
            for note, name in batch["notes"] if not judged else []:
                notes.setdefault(note, {})[name] = None
            bad += len(skipped)
            drawn += len(skipped) + batch["label"].numel() + batch.get("image_labels", torch.empty(0)).numel()
            if drawn >= min(len(dataset), MIN_JUDGED) and bad > max_bad_fraction * drawn:
                raise LoaderError(
                    f"{bad} of {drawn} files drawn cannot be used, more than max_bad_fraction={max_bad_fraction}: "
                    f"{summary(list(named)) or 'folders that cannot be read'}"
                )
            if not judged and drawn >= min(len(dataset), MIN_JUDGED):
                judged = True
                for note, names in sorted(notes.items()):
                    say(f"{len(names)} videos of the first {drawn:,} files drawn are {note}: {summary(list(names))}")
            yield batch
    finally:
        reader.close()


def _check_shared_memory(batch: dict[str, Any], num_workers: int, free: float, say: Callable[[str], object]) -> None:
    """Says what this process's batches need in shared memory; raises LoaderError if that is more than `free` bytes."""
    size = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
    need = size * (PREFETCH * num_workers + 2)  # those read ahead, the one in use and the one before
    sizes = f"{SHARED_MEMORY}: {free / 2**20:,.1f} MiB free for this process, num_workers={num_workers} needs"
    if need > free:
        fitting = max(0, int(free / size - 2) // PREFETCH)
        raise LoaderError(f"{sizes} {need / 2**20:,.1f}: set num_workers={fitting}, or {ENLARGE}")
    say(f"{sizes} about {need / 2**20:,.1f}")
