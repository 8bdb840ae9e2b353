"""What machines do to a run: full shared memory and disks, dead and stuck workers, signals, leaks, odd folders."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from configs import ROOT, UserError, cli
from configs.files import append_text, atomic_path, check_writable, write_json
from datasets import ClipSampler, load_batches, loader
from datasets.clips import ClipDataset
from datasets.loader import Interrupted, LoaderError
from models.checkpoint import load_state_dict, save_checkpoint
from tests.test_train import assert_equal, config, latents, log_lines, newest, run  # noqa: F401
from train import train

pytestmark = pytest.mark.usefixtures("fresh_process_state")


def clips(read=lambda path: None, size: int = 8, number: int = 6) -> ClipDataset:
    """Clips that are made where they are read, after `read(path)`."""

    def make(path, choose):
        read(path)
        return torch.full((len(choose(4)), 3, size, size), int(path.stem), dtype=torch.uint8)

    return ClipDataset([Path(f"{i}.mp4") for i in range(number)], [0] * number, make, 4, 1, size, False, seed=0)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


# Workers


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "a data worker was killed, as the kernel does when memory is short",
        ),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "a data worker met a bus error: /dev/shm is full"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "a data worker crashed in a decoder"),
        (lambda: os._exit(3), "a data worker ended with code 3"),
    ],
)
def test_a_dead_worker_ends_the_batches_in_one_line(end, message):
    """Within seconds, with the files of the batch that was awaited; nothing of the loader is left."""
    dataset = clips(lambda path: end() if path.stem == "5" else None)
    start = time.monotonic()
    with pytest.raises(LoaderError, match=rf"^{message}.*; the batch awaited is of \d\.mp4; ") as caught:
        list(islice(load_batches(dataset, ClipSampler(6, 2), num_workers=2), 20))
    assert "\n" not in str(caught.value) and time.monotonic() - start < 30
    assert not children()


@pytest.mark.parametrize("stuck", [lambda: time.sleep(1000), lambda: os.kill(os.getpid(), signal.SIGSTOP)])
def test_a_stuck_worker_ends_the_batches_after_the_timeout(stuck):
    """One that waits for a disk, one that was stopped; the error names the files that it reads."""
    dataset = clips(lambda path: stuck() if path.stem == "5" else None)
    with pytest.raises(LoaderError, match=r"^no batch for 1 s \(loader_timeout\): .*5\.mp4") as caught:
        list(islice(load_batches(dataset, ClipSampler(6, 2), num_workers=2, timeout=1), 20))
    assert "\n" not in str(caught.value) and not children()


def test_a_run_that_is_to_stop_does_not_wait_for_a_stuck_worker(monkeypatch):
    monkeypatch.setattr(loader, "GRACE", 1.0)
    dataset = clips(lambda path: time.sleep(1000))
    with pytest.raises(Interrupted):
        next(load_batches(dataset, ClipSampler(6, 2), num_workers=1, stopping=lambda: True))
    assert not children()


def test_a_late_batch_still_comes_though_the_run_is_to_stop():
    """A step that waits for slow data ends as any other step does."""
    dataset = clips(lambda path: time.sleep(0.7))
    batches = load_batches(dataset, ClipSampler(6, 2), num_workers=1, stopping=lambda: True)
    assert next(batches)["label"].tolist() == [0, 0]
    batches.close()


@pytest.mark.parametrize("ending", ["close", "forget", "before the first batch"])
def test_batches_leave_no_process_behind(ending):
    batches = load_batches(clips(), ClipSampler(6, 2), num_workers=2)
    assert len(children()) == 2
    if ending != "before the first batch":
        next(batches)
    if ending == "forget":
        del batches
    else:
        batches.close()
    assert not children()


def test_memory_files_and_processes_stay_as_they_are_over_3000_clips():
    """Of this process and its workers, after a start in which caches fill."""
    batches = load_batches(clips(size=32), ClipSampler(6, 12), num_workers=2)
    facts = []
    for _ in range(2):
        for _ in islice(batches, 125):  # 1,500 clips
            pass
        family = [psutil.Process(), *children()]
        memory = [process.memory_info().rss / 2**20 for process in family]
        shared = sorted(Path("/dev/shm").iterdir())
        facts.append((memory, [process.num_fds() for process in family], shared, threading.active_count()))
    (memory, *others), (memory_after, *others_after) = facts
    assert all(after - before < 8 for before, after in zip(memory, memory_after, strict=True)), (memory, memory_after)
    assert others[1:] == others_after[1:]
    assert all(abs(after - before) <= 12 for before, after in zip(others[0], others_after[0], strict=True))  # in flight
    batches.close()
    assert not children()


# Shared memory


SHARED = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
from datasets import ClipSampler, load_batches
from datasets.clips import ClipDataset

def read(path, choose):
    return torch.zeros(len(choose(4)), 3, 256, 256, dtype=torch.uint8)

dataset = ClipDataset([Path("1.mp4")] * 6, [0] * 6, read, 4, 1, 256, False, seed=0)
for size in ("500k", "2m", "8m"):
    subprocess.run(["mount", "-o", "remount,size=" + size, "/dev/shm"], check=True)
    try:
        next(load_batches(dataset, ClipSampler(6, 1), num_workers=1, say=print))
    except Exception as error:
        print(type(error).__name__, error)
"""
SAID = [
    "LoaderError a batch does not fit into /dev/shm, where 0.. of 0.5 MiB are free: lower num_workers, or enlarge it",
    "LoaderError /dev/shm: ... MiB free for this process, num_workers=1 needs 3.0: set num_workers=0, or enlarge it",
    "/dev/shm: ... MiB free for this process, num_workers=1 needs about 3.0",
]


def test_a_small_shared_memory_is_told_and_never_waited_for():
    """A real one, in a mount namespace of its own; batches of 0.75 MiB."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a mount namespace")
    mount = f'mount -t tmpfs tmpfs /dev/shm && exec {sys.executable} -c "$SCRIPT"'
    env = os.environ | {"SCRIPT": SHARED.format(root=str(ROOT)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], env=env, capture_output=True, text=True, timeout=200)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(map(re.match, SAID, lines)), done.stdout + done.stderr


def test_shared_memory_that_is_full_ends_the_batches_in_one_line(monkeypatch):
    """As the system tells it to a worker, also where no mount may be made."""

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(LoaderError, match=r"^a batch does not fit into /dev/shm, .*No space left on device") as caught:
        next(load_batches(clips(), ClipSampler(6, 2), num_workers=1))
    assert "\n" not in str(caught.value) and not children()


def test_ranks_of_a_machine_share_its_shared_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 0, 2**20))
    batches = load_batches(clips(size=64), ClipSampler(6, 2), num_workers=2, ranks_here=8)  # 0.1 MiB a batch
    with pytest.raises(LoaderError, match=r"0.1 MiB free for this process, num_workers=2 needs 0.6: set num_workers=0"):
        next(batches)


# Signals


def during_step(step: int, results: Path, action) -> threading.Thread:
    """Calls `action` from another thread once `step` is logged."""

    def wait() -> None:
        while not any(f'"step": {step},' in log.read_text() for log in results.glob("*/log.jsonl")):
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_whose_data_does_not_come_and_loses_nothing(latents, tmp_path, monkeypatch, number):  # noqa: F811
    """In seconds; the last step is saved, and the run continues bit for bit."""
    monkeypatch.setattr(loader, "GRACE", 1.0)
    options = dict(max_train_steps=400, ckpt_every=400, log_every=1, num_workers=1)

    def stop() -> None:
        for child in children():
            child.suspend()
        time.sleep(0.5)
        os.kill(os.getpid(), number)

    thread, start = during_step(2, tmp_path / "broken", stop), time.monotonic()
    train(config(latents, tmp_path / "broken", **options))
    thread.join()
    assert time.monotonic() - start < 60 and not children()
    saved = max(int(path.stem) for path in tmp_path.glob("broken/*/resume/*.pt"))
    assert saved == log_lines(tmp_path / "broken")[-1]["step"] and 2 <= saved < 400
    assert "stopped by a signal" in next(tmp_path.glob("broken/*/log.txt")).read_text()
    options["max_train_steps"] = saved + 5
    assert_equal(run(latents, tmp_path / "broken", **options), run(latents, tmp_path / "unbroken", **options))


TWICE = """
import sys
sys.path.insert(0, {root!r})
from hashlib import pbkdf2_hmac
from tools.common.training import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in a library, where no handler of Python's runs
"""


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_the_process_at_once(numbers):
    script = [sys.executable, "-c", TWICE.format(root=str(ROOT))]
    with subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(numbers[0])
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(numbers[1])
        assert process.wait(timeout=20) == 128 + numbers[1]
        assert process.stderr.read() == "ended at once by a second signal\n"


# Disks


@contextmanager
def full_disk(room: int):
    """No file may grow beyond `room` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_tensors(path: Path, number: float) -> None:
    with atomic_path(path) as temporary:
        save_file({"w": torch.full((50_000,), number)}, temporary)


WRITERS = {
    "state.pt": lambda path, number: save_checkpoint(path, model={"w": torch.full((50_000,), number)}),
    "weights.safetensors": write_tensors,
    "record.json": lambda path, number: write_json(path, [number] * 50_000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_one_line_and_the_old_file_stays_whole(tmp_path, name):
    path, write = tmp_path / name, WRITERS[name]
    write(path, 1.0)
    before = path.read_bytes()
    with full_disk(60_000), pytest.raises(UserError, match=rf"^{path} cannot be written: File too large \(.* GiB free"):
        write(path, 2.0)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write(path, 2.0)
    assert path.read_bytes() != before


def test_a_log_on_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"log.txt cannot be written: No space left on device"):
        append_text(tmp_path / "log.txt", "step 1\n")


def test_a_run_on_a_full_disk_continues_from_its_last_checkpoint(latents, tmp_path):  # noqa: F811
    options = dict(max_train_steps=6, ckpt_every=2)
    unbroken = run(latents, tmp_path / "unbroken", **options)
    run(latents, tmp_path / "runs", **options | dict(max_train_steps=2))
    with full_disk(100_000), pytest.raises(UserError, match=r"^/.*/0000004.pt cannot be written: File too large"):
        run(latents, tmp_path / "runs", **options)
    assert [path.name for path in sorted(tmp_path.glob("runs/*/*/*.pt*"))] == ["0000002.pt"] * 2
    assert load_state_dict(next(tmp_path.glob("runs/*/checkpoints/0000002.pt")))
    assert_equal(run(latents, tmp_path / "runs", **options), unbroken)


# Folders of runs


@pytest.mark.parametrize("other", ["000_old-run", "0001", "123abc-run", "005-notes.txt", "-run"])
def test_other_folders_in_results_dir_do_not_matter(latents, tmp_path, other):  # noqa: F811
    (tmp_path / other).mkdir()
    run(latents, tmp_path, max_train_steps=1)
    number = "006" if other.startswith("005-") else "000"
    assert (tmp_path / f"{number}-Latte-skip-video_folder").is_dir()


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
def test_a_results_dir_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, kind):
    """The system is asked, which knows of read-only disks; here it answers that nothing can be written."""
    (tmp_path / "file").touch()
    if kind == "read-only":
        monkeypatch.setattr("os.access", lambda path, mode: False)
    path = {"file": "file", "below a file": "file/runs", "read-only": "runs"}[kind]
    message = r"results_dir: .*(file is a file|nothing can be written in .*: choose another path)"
    with pytest.raises(UserError, match=message):
        check_writable(config(tmp_path, tmp_path / path), "results_dir", folder=True)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: torch.save({k: v for k, v in torch.load(path).items() if k != "ema"}, path), "no ema in it"),
        (lambda path: torch.save([1], path), "'list' object has no attribute"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2000]), "not a zip file"),
        (lambda path: path.write_text("text"), "not a zip file"),
        (lambda path: flip_byte(path), "is damaged"),
    ],
)
def test_a_resume_state_that_is_not_one_is_passed_over(latents, tmp_path, capsys, damage, reason):  # noqa: F811
    """For the state before it; where there is none, nothing is started anew, and nothing of the log is lost."""
    unbroken = run(latents, tmp_path / "unbroken", max_train_steps=3, ckpt_every=1)
    run(latents, tmp_path / "runs", max_train_steps=2, ckpt_every=1)
    (tmp_path / "runs/000-Latte-skip-video_folder/resume/latest.pt").touch()
    _, second = sorted(tmp_path.glob("runs/*/resume/0*.pt"))
    damage(second)
    assert_equal(run(latents, tmp_path / "runs", max_train_steps=3, ckpt_every=1), unbroken)
    passed = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    assert len(passed) == 1 and str(second) in passed[0] and reason in passed[0]


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def test_a_run_without_a_readable_state_is_not_started_anew(latents, tmp_path):  # noqa: F811
    run(latents, tmp_path, max_train_steps=2)
    log = next(tmp_path.glob("*/log.jsonl")).read_text()
    for path in tmp_path.glob("*/resume/*.pt"):
        path.write_text("text")
    with pytest.raises(UserError, match=r"^none of the resume states in .*/resume can be read: resume_from"):
        run(latents, tmp_path, max_train_steps=3)
    assert next(tmp_path.glob("*/log.jsonl")).read_text() == log


# Names and errors


def test_names_that_are_not_utf8_are_logged_and_printed(latents, tmp_path, capsys):  # noqa: F811
    """Of a file that is skipped: in the log, and on a terminal, which is strict as pytest's stand-in is."""
    shutil.copytree(latents, tmp_path / "latents")
    name = b"B\xe4r.mp4.safetensors".decode("utf-8", "surrogateescape")
    (tmp_path / "latents" / "a" / name).write_text("no latents")
    options = dict(max_train_steps=3, max_bad_fraction=0.5)
    cli.run(lambda: run(tmp_path / "latents", tmp_path / "runs", **options) and None)
    for text in (capsys.readouterr().out, next(tmp_path.glob("runs/*/log.txt")).read_text()):
        assert text.count(r"a/B\udce4r.mp4.safetensors: is no file of latents") == 1


def test_errors_of_files_are_one_line(capsys):
    for path, main in (("/nowhere/file", Path("/nowhere/file").read_text), ("/proc/new", Path("/proc/new").mkdir)):
        with pytest.raises(SystemExit):
            cli.run(main)
        assert capsys.readouterr().err == f"error: {path}: No such file or directory\n"
    with pytest.raises(OSError, match="no file"):  # a fault of the code
        cli.run(lambda: (_ for _ in ()).throw(OSError("no file")))
