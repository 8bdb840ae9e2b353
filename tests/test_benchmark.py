"""The benchmarks compare ways of computing one function."""

import json
import os
import subprocess
import sys

import pytest
import torch

from configs import ROOT, SampleConfig, UserError, load_config
from models import get_models
from tools import benchmark
from tools.benchmarks.turns import peak_bytes, run_as_original, take_turns

TINY = ["model=Latte-skip", "num_classes=5", "image_size=32", "hidden_size=32", "num_heads=2", "depth=8"]


def run(monkeypatch, *argv: object) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, argv)])
    benchmark.main()


@torch.no_grad()
def test_the_original_way_computes_the_same_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = get_models(load_config(SampleConfig, None, TINY)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.set_attention("math")
    x, t, y = torch.randn(2, 16, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([0, 5])
    ours = model(x, t, y)
    torch.testing.assert_close(run_as_original(model, x, t, y), ours, rtol=1e-5, atol=1e-5)
    joint = torch.randn(2, 18, 4, 4, 4), t, y, torch.tensor([[1, 2], [5, 0]])  # two stills a clip
    torch.testing.assert_close(run_as_original(model, *joint), model(*joint), rtol=1e-5, atol=1e-5)
    model.set_attention("math")
    assert torch.equal(model(x, t, y), ours)


def test_ways_take_turns_and_the_first_turn_does_not_count():
    calls = []

    def measure(way: str, turn: int) -> float:
        calls.append((turn, way))
        return 10.0 * turn + len(calls)

    seconds = take_turns({"one": "a", "other": "b"}, 2, measure)
    assert calls == [(turn, way) for turn in (0, 1, 2) for way in "ab"]
    assert seconds == {"one": [13.0, 25.0], "other": [14.0, 26.0]}


def test_sampling_report_has_every_way_and_its_share_of_the_matmul_rate(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "sampling", *TINY, "use_compile=False", "runs=2", f"output={tmp_path}/report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert {"original, fp32", "fp32", "fp32, cached"} <= set(report["ways"]) and "hidden_size: 32" in report["options"]
    assert report["ways"]["original, fp32"]["speedup"] == 1
    for way in report["ways"].values():
        assert way["share_of_matmul_rate"] > 0 and way["seconds"] > 0 and len(way["all_seconds"]) == 2
    assert report["ways"]["fp32, cached"]["peak_bytes"] < report["ways"]["original, fp32"]["peak_bytes"]
    out = capsys.readouterr().out
    assert "1 clips of 16 frames at 32" in out and "of matmul rate" in out and "| fp32, cached " in out


def test_training_report_has_every_way_and_checkpointing_needs_less_memory(monkeypatch, tmp_path, capsys):
    stills = ["dataset=ucf101_img", "use_image_num=2"]
    run(monkeypatch, "training", *TINY, *stills, "local_batch_size=2", "runs=1", f"output={tmp_path}/report.json")
    ways = json.loads((tmp_path / "report.json").read_text())["ways"]
    assert {"original, fp32", "fp32", "fp32, checkpointing"} <= set(ways)
    assert ways["fp32, checkpointing"]["peak_bytes"] < 0.7 * ways["fp32"]["peak_bytes"]
    assert ways["original, fp32"]["speedup"] == 1 and all(way["seconds"] > 0 for way in ways.values())
    assert "2 x (18, 4, 4, 4) latents" in capsys.readouterr().out


def test_options_that_no_training_has_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="train_only: Latte-S/8 has no skip branches"):
        run(monkeypatch, "training", "model=Latte-S/8", "num_skips=0", "train_only=skip", "--dry-run")


def test_peak_counts_what_a_step_holds_at_once():
    def step() -> None:
        a = torch.zeros(1000)  # 4 kB
        b = a + 1
        del a
        b + 1

    assert 8000 <= peak_bytes(torch.device("cpu"), step) < 8100


def test_a_dry_run_says_what_would_run_with_which_options(monkeypatch, capsys):
    """Without a YAML file: XL/2, compiled. A YAML file replaces these defaults, but keeps num_workers=0 of reading."""
    run(monkeypatch, "sampling", "--dry-run", "batch=2")
    out = capsys.readouterr().out
    assert "# a step of Latte-skip, 2 clips of 16 frames at 256, 3.88 TMACs in full" in out
    assert "use_compile: true" in out and "num_classes: 101" in out
    run(monkeypatch, "sampling", "--dry-run", "--config", ROOT / "configs/demo/demo_sample.yaml")
    assert "num_classes: 7" in capsys.readouterr().out
    run(monkeypatch, "reading", "--dry-run", "--config", ROOT / "configs/ffs/ffs_train.yaml", f"data_path={ROOT}")
    out = capsys.readouterr().out
    assert "num_workers: 0" in out and f"0 workers, from {ROOT}" in out


def test_an_unknown_benchmark_lists_the_valid_ones(monkeypatch):
    for argv in ([], ["drawing"], ["runs=3"]):
        with pytest.raises(UserError, match=r"benchmark: .*valid: sampling, training, reading, plan"):
            run(monkeypatch, *argv)


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "benchmark.py {sampling,training,reading,plan}"),
        (["reading"], "reader_only=False"),
        (["sampling"], "batch=1"),
    ],
)
def test_help_lists_the_options_without_torch(tmp_path, argv, word):
    """A torch that cannot be imported does no harm."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch')")
    command, env = [sys.executable, "tools/benchmark.py", *argv, "--help"], os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and word in result.stdout
