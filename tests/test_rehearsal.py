"""Published sizes on a CPU: XL/2 and the published VAE train from pixels, resume and sample, each below 20 GB.

    python -m pytest -m rehearsal -s        # 20 GB of memory, 50 GB of disk; prints what it measures

Weights are random, and the clips are the demo's. Memory is that of the process tree, by /proc/*/smaps_rollup: its
proportional share (PSS) of anonymous and shared memory. Pages of mapped files are printed, but not counted: the kernel
drops them when memory is short.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKL

from datasets.readers import read_video
from tools.benchmarks.scaling import PUBLISHED_VAE

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 20.0  # GB
OPTIONS = ["local_batch_size=1", "frame_interval=1", "num_workers=2", "mixed_precision=bf16"]
OPTIONS += ["gradient_checkpointing=True", "keep_resume_states=1", "log_every=1", "report_to=none"]
pytestmark = [pytest.mark.slow, pytest.mark.rehearsal]


class Memory:
    """The highest memory, in GB, of a process and its descendants so far; kills them above LIMIT."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.peak, self.peak_mapped, self.most = psutil.Process(process.pid), 0.0, 0.0, 0
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            tree = [self.process, *self.process.children(recursive=True)]
            shares = [share for each in tree if (share := self.share(each.pid))]
            held = sum(share["Pss_Anon"] + share["Pss_Shmem"] for share in shares) / 1e6
            self.peak, self.most = max(self.peak, held), max(self.most, len(shares))
            self.peak_mapped = max(self.peak_mapped, sum(share["Pss_File"] for share in shares) / 1e6)
            if held > LIMIT:
                for each in reversed(tree):
                    each.kill()
            time.sleep(0.5)

    @staticmethod
    def share(pid: int) -> dict[str, int]:
        """Kilobytes by kind; empty if the process has ended."""
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except (FileNotFoundError, ProcessLookupError):
            return {}
        return {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """101 classes of a clip each and a VAE; removed at the end, with the files of the runs."""
    if "rehearsal" not in request.config.option.markexpr:
        pytest.skip("runs only with -m rehearsal")  # also where -m slow takes the place of the project's own -m
    folder = tmp_path_factory.mktemp("rehearsal")
    if shutil.disk_usage(folder).free < 50e9 or psutil.virtual_memory().available < 17e9:
        pytest.skip("needs 50 GB of disk and 17 GB of free memory")
    clips = sorted((ROOT / "datasets" / "demo" / "train").glob("*/*.mp4"))
    for i, clip in enumerate(clips[:202:2]):
        (folder / "clips" / f"class{i:03d}").mkdir(parents=True)
        (folder / "clips" / f"class{i:03d}" / clip.name).symlink_to(clip)
    torch.manual_seed(0)
    vae = AutoencoderKL(**PUBLISHED_VAE)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    vae.save_pretrained(folder / "vae")
    yield folder
    shutil.rmtree(folder)


def run(name: str, script: str, *options: str) -> str:
    """The output of a script that must pass within LIMIT."""
    command, started = ["bash", str(ROOT / script), *options], time.monotonic()
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    process = subprocess.Popen(command, env=env, **pipes)
    memory = Memory(process)
    try:
        output = process.communicate(timeout=3600)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - started
    print(
        f"{name}: {memory.peak:.1f} GB, mapped files {memory.peak_mapped:.1f} GB, "
        f"{memory.most} processes, {seconds:.0f} s",
        flush=True,
    )
    assert process.returncode == 0, output[-3000:]
    assert memory.peak < LIMIT
    return output


def test_xl_trains_from_pixels_resumes_and_samples_within_20_gb(folder):
    """Two steps with two workers, a third by the same command, and two steps of sampling from its checkpoint."""
    shared = [f"pretrained_model_path={folder}", "image_size=256", "num_frames=16"]
    training = [*OPTIONS, *shared, f"data_path={folder}/clips", f"results_dir={folder}/runs", "use_image_num=1"]
    script = "train_scripts/ucf101_train.sh"
    output = run("two steps of training", script, *training, "max_train_steps=2")
    assert "692,418,848 weights to train" in output and "steps 1 to 2" in output
    output = run("one more, resumed", script, *training, "max_train_steps=3")
    assert "steps 3 to 3" in output

    (checkpoint,) = folder.glob("runs/*/checkpoints/0000003.pt")
    sampling = [*shared, f"ckpt={checkpoint}", f"save_video_path={folder}/videos", "per_proc_batch_size=1"]
    run(
        "two steps of sampling",
        "sample/scripts/ucf101/ucf101_skip.sh",
        *sampling,
        "num_sampling_steps=2",
        "num_fvd_samples=1",
    )
    (video,) = folder.glob("videos/**/*.mp4")
    frames = read_video(video, range)
    assert frames.shape == (16, 3, 256, 256) and np.std(frames.float().numpy()) > 0
