"""tools/cuda.py, which is for GPUs, runs at tiny sizes on a CPU; whatever goes wrong is a row of its table."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from configs import ROOT, SampleConfig, TrainConfig, UserError, load_config
from diffusion import create_diffusion
from models.skip_cache import interval_plan
from tools import cuda
from tools.benchmarks import checks
from tools.benchmarks.checks import Setting, failure, run_cases, run_check

SMALL = Setting(torch.device("cpu"), small=True, num_gpus=0)
ABSENT = (  # where there is no package registry
    "omegaconf", "diffusers", "av", "decord", "torchmetrics", "accelerate", "tensorboard", "torchvision", "scipy",
)  # fmt: skip


def run(tmp_path, *argv: str, absent: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Runs the program with modules that cannot be imported."""
    for name in absent:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')")
    command = [sys.executable, str(ROOT / "tools/cuda.py"), "--output", str(tmp_path / "out"), *argv]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_program_runs_small_on_a_cpu_where_little_is_installed(tmp_path):
    result = run(tmp_path, "--device", "cpu", "--small", absent=ABSENT)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["check"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    skipped = {name for name, row in rows.items() if row["result"] == "skipped"}
    assert skipped == {"no wait in a loop, dpmsolver++", "VAE, fp32, three clips"}
    assert all("diffusers" in rows[name]["note"] for name in skipped)
    assert {name for name, row in rows.items() if row["result"] == "passed"} == {
        "conformance, fp32: forward passes and losses",
        "conformance, bf16: forward passes and losses",
        *(f"no wait in a loop, {solver}" for solver in ("ddpm", "ddim", "fitted")),
        "seeds, DDPM",
        "seeds, DDIM with N2",
        "two processes",
        "compiled, guidance 7",
        "compiled, guidance 7: against eager",
    }
    plans = {name.split(": ")[1]: row for name, row in rows.items() if "guidance 7: " in name and "DDIM-5" in name}
    assert list(plans)[:6] == ["uncached", "N2", "N3", "N4", "N5", "N6"] and len(plans) == 8
    assert plans["uncached"]["speedup"] == plans["uncached"]["expected_speedup"] == 1 < plans["N2"]["expected_speedup"]
    steps = [row for name, row in rows.items() if name.startswith("training step")]
    assert len(steps) == 4 and all(row["clips_per_second"] > 0 and row["peak_bytes"] > 0 for row in steps)
    assert "| two processes " in (tmp_path / "out.md").read_text()


def test_a_missing_module_that_all_checks_need_is_one_line(tmp_path):
    result = run(tmp_path, "--device", "cpu", "--small", absent=("einops",))
    assert result.returncode and result.stderr.count("\n") == 1 and "has no module einops" in result.stderr


def test_the_vae_is_timed():
    decoding, encoding = run_cases("decoding", SMALL)
    assert decoding["result"] == encoding["result"] == "measured" and decoding["seconds"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "cpu"], "add --small"),
        (["--device", "tpu"], "--device: 'tpu' is unknown"),
        (["--only", "seed", "--small"], "--only: 'seed' is unknown; valid: machine, conformance"),
        (["--small"], "finds no GPU"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, argv, message):
    monkeypatch.setattr(sys, "argv", ["cuda.py", *argv])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(checks, "count_gpus", lambda: 0)
    with pytest.raises(UserError, match=message):
        cuda.main()


def crash() -> list:
    os.kill(os.getpid(), signal.SIGKILL)


def test_exceptions_crashes_and_hangs_are_rows(monkeypatch):
    """Rows that came before stay, and the other cases of an exception's check go on."""
    good = "good", lambda: [{"result": "passed"}]

    def failing_setup(at: Setting):
        yield good
        raise RuntimeError("no memory\nleft")

    table = {
        "raises": lambda at: iter([("bad", lambda: 1 / 0), good]),
        "setup": failing_setup,
        "crashes": lambda at: iter([good, ("bad", crash), good]),
        "hangs": lambda at: iter([good, ("bad", lambda: time.sleep(60))]),
    }
    monkeypatch.setattr(checks, "CHECKS", table)
    found = {name: list(run_check(name, SMALL, 20 if name != "hangs" else 2)) for name in table}
    results = {name: [(row["check"], row["result"]) for row in rows] for name, rows in found.items()}
    assert results["raises"] == [("bad", "failed"), ("good", "passed")]
    assert results["setup"] == [("good", "passed"), ("setup", "failed")]
    assert results["crashes"] == [("good", "passed"), ("crashes", "failed")]
    assert results["hangs"] == [("good", "passed"), ("hangs", "failed")]
    notes = [found[name][-1 if name != "raises" else 0]["note"] for name in table]
    assert notes == [
        "ZeroDivisionError: division by zero", "RuntimeError: no memory left", "the process ended with -9",
        "no time was left",
    ]  # fmt: skip


def test_only_optional_packages_are_skipped():
    missing = {name: failure(ModuleNotFoundError(f"No module {name}", name=name)) for name in ("diffusers.x", "numpy")}
    assert [row["result"] for row in missing.values()] == ["skipped", "failed"]
    assert checks.verdict(float("nan"), 1.0)["result"] == "failed"


def test_a_loop_that_waits_fails(monkeypatch):
    """Meta tensors, and a GPU's debug mode, raise where a value is read."""
    original = checks.linear_multistep

    def waits(*args):
        step = original(*args)
        return lambda x, t, p: step(x, t, p) * float(x.mean() > -1e9)

    monkeypatch.setattr(checks, "linear_multistep", waits)
    results = {row["check"]: row["result"] for row in run_cases("no_waits", SMALL)}
    assert results.pop("no wait in a loop, fitted") == "failed" and set(results.values()) == {"passed"}


def test_the_training_step_is_the_published_one():
    ours = checks.published_training(Setting(torch.device("cpu"), small=False, num_gpus=0))
    theirs = load_config(TrainConfig, ROOT / "configs/ucf101/ucf101_img_train.yaml")
    keys = "model", "image_size", "num_frames", "num_classes", "use_image_num", "local_batch_size", "learning_rate"
    assert {key: getattr(ours, key) for key in keys} == {key: getattr(theirs, key) for key in keys}


def test_the_recipes_are_ddim_at_the_stated_cost():
    """The moves of an uncached recipe are DDIM's, and each recipe runs in full as often as its name says."""
    full, cached = checks.make_recipes(SampleConfig(model="Latte-skip", num_sampling_steps=50))
    diffusion = create_diffusion("21")
    x, prediction = torch.randn(1, 1, 4, 2, 2, dtype=torch.float64), torch.randn(1, 1, 4, 2, 2, dtype=torch.float64)

    def model(x, t):
        return torch.cat([prediction, prediction], dim=-3).float()

    outs = [
        list(diffusion.sample_loop_progressive(model, x.shape, x, False, method=method))[-1]["sample"]
        for method in ("ddim", partial(checks.linear_multistep, [step.move for step in full.steps]))
    ]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    assert [not step.feature for step in cached.steps] == interval_plan(create_diffusion("50").timestep_map[::-1], 4)
