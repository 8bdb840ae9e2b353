"""tools/learning.py: candidates are trained one after another, resumably, and compared by their error of x_0."""

import json
import shutil
import sys

import pytest
from accelerate.state import AcceleratorState

import train as program
from configs import ROOT, TrainConfig, UserError, load_config
from tools import learning
from tools.common.training import check_training_options

TINY = ["image_size=32", "num_frames=4", "num_classes=2", "hidden_size=16", "depth=8", "num_heads=2", "num_skips=2"]
TINY += ["local_batch_size=2", "latents_path=", "use_compile=False", "mixed_precision=no", "log_every=1"]
TINY += ["log_snrs=[-2,0,2]", "validation_every=2", "validation_clips=2", "seeds=[1]", "steps=2", "reference_steps=4"]


@pytest.fixture
def options(tiny, tmp_path) -> list[str]:
    data = tmp_path / "clips"
    for name, source in zip("ab", sorted((ROOT / "datasets" / "demo" / "test").glob("*/*_c01.mp4")), strict=False):
        (data / name).mkdir(parents=True)
        shutil.copy(source, data / name)
    paths = [f"data_path={data}", f"validation_path={data}", f"pretrained_model_path={tiny.parent}"]
    return [*TINY, *paths, f"output={tmp_path / 'out'}"]


def run(monkeypatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["learning.py", *args])
    learning.main()


def in_this_process(command: list[str]) -> int:
    """Runs train.py's own main, without the seconds that a process takes to start."""
    args = program.parser.parse_args(command[2:])
    program.train(load_config(TrainConfig, args.config, args.overrides))
    AcceleratorState._reset_state(reset_partial_state=True)
    return 0


def test_candidates_are_trained_and_compared(monkeypatch, options, tmp_path, capsys):
    """A row for each with the logged errors; the same command again trains nothing; the seed is the run's."""
    monkeypatch.setattr(learning, "launch", in_this_process)
    only = "only=[reference,muon]"
    run(monkeypatch, *options, only)
    text = (tmp_path / "out" / "learning.md").read_text()
    head, _, reference, muon = text.strip().splitlines()
    logs = {name: next((tmp_path / "out").glob(f"{name}-1/*/log.jsonl")) for name in ("reference", "muon")}
    errors = {
        name: [line["x0_mse"] for line in map(json.loads, log.read_text().splitlines()) if "x0_mse" in line]
        for name, log in logs.items()
    }
    assert len(errors["reference"]) == 2 and len(errors["muon"]) == 1
    assert f"| {errors['reference'][-1]:.4f} |" in reference and f"| {errors['muon'][-1]:.4f} |" in muon
    assert "as low as the reference at" in head and "seconds a step" in head
    cfg = load_config(TrainConfig, logs["muon"].parent / "config.yaml")
    assert (cfg.optimizer, cfg.global_seed, cfg.max_train_steps, cfg.hidden_size) == ("muon", 1, 2, 16)
    assert load_config(TrainConfig, logs["reference"].parent / "config.yaml").max_train_steps == 4
    before = logs["muon"].read_text()
    run(monkeypatch, *options, only)
    assert logs["muon"].read_text() == before and (tmp_path / "out" / "learning.md").read_text() == text


def test_a_training_that_fails_is_named(monkeypatch, options):
    monkeypatch.setattr(learning, "launch", lambda command: 2)
    with pytest.raises(UserError, match="reference, seed 1: its training ended with an error"):
        run(monkeypatch, *options)
    with pytest.raises(UserError, match="only: 'adam' is unknown; valid: reference, recipe"):
        run(monkeypatch, *options, "only=[adam]")


def test_dry_run_tells_commands_and_steps(monkeypatch, options, capsys):
    run(monkeypatch, *options, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"# {len(learning.CANDIDATES)} runs, {4 + 2 * (len(learning.CANDIDATES) - 1)} steps"
    assert "train.py --config" in lines[1] and "lr_schedule=constant" in lines[1]


@pytest.mark.parametrize("name", learning.CANDIDATES)
def test_candidates_are_trainings_of_the_demo(name):
    cfg = load_config(TrainConfig, ROOT / "configs/demo/demo_train.yaml", learning.CANDIDATES[name])
    check_training_options(cfg)
    assert (cfg.num_skips == 0) == name.startswith("latte")
