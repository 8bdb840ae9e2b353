"""sample/distributed.py under a real torchrun: processes find each other, and one that dies takes all along."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from configs import UserError
from models.hardware import local_device
from sample.distributed import distributed

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
from configs import UserError
from configs import cli
from sample.distributed import distributed

def main():
    with distributed() as env:
        BODY

cli.run(main)
"""


def launch(tmp_path: Path, body: str) -> subprocess.CompletedProcess:
    """Runs `body` in two processes on the CPU."""
    (tmp_path / "program.py").write_text(PROGRAM.replace("BODY", body))
    torchrun = [sys.executable, ROOT / "sample/scripts/torchrun.py", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*torchrun, str(tmp_path / "program.py")], env=env, capture_output=True, text=True, timeout=120
    )


def test_two_processes_meet(tmp_path):
    """Each has its rank, sums reach both, the barrier passes, and both leave without a complaint."""
    body = "x = torch.tensor([env.rank + 1]); dist.all_reduce(x); env.barrier()"
    report = "print(f'<{env.rank} of {env.world_size}, {env.is_main}, {x.item()}>')"
    result = launch(tmp_path, f"{body}; {report}")
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr
    reports = sorted(re.findall("<(.*?)>", result.stdout))  # gloo prints too, in the same lines
    assert reports == ["0 of 2, True, 3", "1 of 2, False, 3"]


def test_alone_there_is_no_process_group():
    with distributed() as env:
        env.barrier()
        assert (env.rank, env.world_size, env.is_main, dist.is_initialized()) == (0, 1, True, False)


def test_a_process_that_dies_does_not_hang_the_others(tmp_path):
    """Rank 1 fails while rank 0 waits for it: the program ends, long before the group's time-out, and says why."""
    result = launch(tmp_path, "env.rank and cli.sys.exit('rank 1 died'); env.barrier()")
    assert result.returncode == 1 and "rank 1 died" in result.stderr and "ChildFailedError" in result.stderr


@pytest.mark.parametrize(
    ("mistake", "code", "line"),
    [("raise UserError('no such file')", 2, "error: no such file"), ("raise KeyboardInterrupt", 130, "interrupted")],
)
def test_what_every_process_says_of_its_end_is_said_once_and_last(tmp_path, mistake, code, line):
    """No traceback of torchrun hides it."""
    result = launch(tmp_path, f"cli.PATIENCE = 60; {mistake}")
    lines = result.stderr.splitlines()
    assert result.returncode == code and lines[-1] == line and lines.count(line) == 1, result.stderr
    assert "Traceback" not in result.stderr


def test_a_process_without_a_gpu_of_its_own_is_one_line(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 has no GPU: start at most 2 on this node"):
        local_device()
