"""Loss curves: read from a run's log, smoothed without lag, several in one picture."""

import json
import sys

import pytest
from PIL import Image

from configs import UserError
from tools import plot_loss


@pytest.fixture
def runs(tmp_path):
    """Two runs of 10 and 20 logged steps; the first has a validation loss, too."""
    for name, count in (("skip", 10), ("latte", 20)):
        lines = [{"step": 5 * i, "loss": 2.0 / i} for i in range(1, count + 1)]
        lines += [{"step": 10, "validation_loss": 0.5}] * (name == "skip")
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_reads_one_metric_up_to_a_step(runs):
    assert plot_loss.read_curve(runs / "skip", "loss", last_step=15) == ([5, 10, 15], [2.0, 1.0, 2 / 3])
    assert plot_loss.read_curve(runs / "skip" / "log.jsonl", "validation_loss") == ([10], [0.5])
    with pytest.raises(UserError, match="has no los; it has loss, step, validation_loss"):
        plot_loss.read_curve(runs / "skip", "los")
    with pytest.raises(UserError, match="no log"):
        plot_loss.read_curve(runs / "absent", "loss")


def test_smoothing_leaves_a_line_where_it_is_and_flattens_a_zigzag():
    assert plot_loss.smooth([1, 2, 3, 4, 5], 3) == [1, 2, 3, 4, 5]
    assert plot_loss.smooth([0, 3, 0, 3, 0], 3) == [0, 1, 2, 1, 0]


def test_draws_two_runs_in_one_picture(runs, monkeypatch):
    """Two colours and a legend more than one run's picture has."""
    sizes = []
    for names in (["skip"], ["skip", "latte"]):
        output = runs / f"{len(names)}.png"
        argv = ["plot_loss.py", *(str(runs / name) for name in names), "--names", *names, "--output", str(output)]
        monkeypatch.setattr(sys, "argv", argv)
        plot_loss.main()
        colours = Image.open(output).convert("RGB").getcolors(1 << 20)
        sizes.append(len([colour for _, colour in colours if max(colour) - min(colour) > 100]))
    assert 0 < sizes[0] < sizes[1]


def test_a_dry_run_draws_nothing(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot_loss.py", str(runs / "skip"), "--output", str(runs / "a.png"), "--dry-run"])
    plot_loss.main()
    assert capsys.readouterr().out == f"would draw loss of skip to {runs}/a.png\n" and not (runs / "a.png").exists()
