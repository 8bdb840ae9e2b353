"""tools/sweep.py: its grid, its front, and what it writes, on a tiny model."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs import CacheOptions, UserError
from sample.media import save_video
from tools import sweep
from tools.metrics import cells as engine
from tools.metrics.cells import Cell, Task
from tools.metrics.statistics import ratio_interval
from tools.sweep import SweepConfig, make_grid, pareto

N2 = CacheOptions(interval=2)


def run(monkeypatch, tiny: Path, output: Path, *argv: str, stop_after: int | None = None) -> int:
    """The program with this command line; how many cells and batches it sampled, and Ctrl-C after so many."""
    sampled = 0

    def count(pipe, seeds, labels, plan=None, on_step=None):
        nonlocal sampled
        if on_step:  # not warming up
            if sampled == stop_after:
                raise KeyboardInterrupt
            sampled += 1
        return sample_latents(pipe, seeds, labels, plan, on_step)

    sample_latents = engine.sample_latents
    with monkeypatch.context() as patch:
        patch.setattr(engine, "sample_latents", count)
        patch.setattr(sys, "argv", ["sweep.py", "--config", str(tiny), *argv, f"output={output}"])
        sweep.main()
    return sampled


GRID = ["plans=[N2]", "methods=[ddim,ddpm]", "steps=[4,6]", "guidance=[2.5]", "reference=unipc-8", "num_clips=4"]
CELLS = 2 * 2 * 2 + 1  # with the reference


@pytest.fixture(scope="module")
def swept(tiny, tmp_path_factory) -> Path:
    """A finished run of GRID with real clips, killed once in its middle."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "real").mkdir()
    torch.manual_seed(0)
    for i in range(2):
        save_video(folder / f"real/{i}.mp4", torch.rand(4, 3, 32, 32) * 2 - 1, fps=8)
    command = [*GRID, f"real_path={folder}/real"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        with pytest.raises(KeyboardInterrupt):
            run(monkeypatch, tiny, folder, *command, stop_after=12)
        assert not (folder / "sweep.json").exists()
        assert run(monkeypatch, tiny, folder, *command) == CELLS * 2 - 12  # two batches of two clips
    return folder


def scores(folder: Path) -> dict[str, dict]:
    """By cell, what does not depend on the clock."""
    rows = json.loads((folder / "sweep.json").read_text())["rows"]
    keys = ("macs", "twin", "reference", "proxy_others", "proxy_real")
    return {row["name"]: {key: row[key] for key in keys} for row in rows}


def test_grid_has_each_cell_once_and_what_others_need_first():
    cfg = SweepConfig(
        plans=["N2", "uncached", "N2-900-50"],
        methods=["ddim", "ddpm"],
        steps=[4, 8],
        guidance=[2.0],
        reference="ddim-8",
    )
    tasks = make_grid(cfg)
    cells = [task.cell for task in tasks]
    assert len(cells) == len(set(cells)) == 2 * 2 * 2
    assert tasks[0].cell == Cell("ddim", 8, 2.0)
    for place, (cell, twin, reference, _) in enumerate(tasks):
        assert twin == Cell(cell.method, cell.steps, cell.guidance) and reference == Cell("ddim", 8, 2.0)
        assert {twin, reference} <= set(cells[: place + 1])


def test_grid_defaults_to_the_options_of_sampling():
    cfg = SweepConfig(plans=["N2"], sample_method="unipc", num_sampling_steps=9, cfg_scale=3.0)
    twin = Cell("unipc", 9, 3.0)
    assert make_grid(cfg) == [Task(twin, twin), Task(Cell("unipc", 9, 3.0, N2), twin)]


def test_there_is_one_uncached_cell():
    """Options of a cache that is not used make no cell of their own."""
    cfg = SweepConfig(plans=["N1-800-100", "N2"], sample_method="ddim", num_sampling_steps=9, cfg_scale=3.0)
    assert [task.cell.plan for task in make_grid(cfg)] == ["uncached", "N2"]


def test_which_cells_pair():
    """The same steps always do; others where no solver draws noise on its way."""
    ddim, ddpm, unipc = (Cell(method, 8, 1.0) for method in ("ddim", "ddpm", "unipc"))
    cached = Cell("ddpm", 8, 1.0, N2)
    assert Task(cached, ddpm, ddim).pairs(eta=0) == {"twin": ddpm}
    assert Task(unipc, unipc, ddim).pairs(eta=0) == {"reference": ddim}
    assert Task(unipc, unipc, ddim).pairs(eta=0.5) == {}
    assert Task(Cell("ddim", 4, 1.0), ddim, unipc).pairs(eta=0) == {"twin": ddim, "reference": unipc}


def test_pareto_front_of_known_points():
    points = [(4, 1), (1, 5), (2, 3), (3, 3), (2, 4), (5, 1), (4, 2)]
    assert [points[i] for i in pareto(points)] == [(1, 5), (2, 3), (4, 1)]
    assert pareto([(1, 1)]) == [0]


def test_record_table_and_csv_agree(swept):
    rows = {row["name"]: row for row in json.loads((swept / "sweep.json").read_text())["rows"]}
    assert len(rows) == CELLS and next(iter(rows)) == "unipc-8-g2.5-uncached"
    with (swept / "sweep.csv").open(newline="") as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert list(lines) == list(rows)
    table = [line.split("|")[1:-1] for line in (swept / "sweep.md").read_text().split("\n\n")[0].splitlines()]
    assert len(table) == CELLS + 2 and len({len(line) for line in table}) == 1
    for row, cells in zip(rows.values(), table[2:], strict=True):
        line = lines[row["name"]]
        assert "-".join(cell.strip() for cell in cells[:2]) == f"{row['method']}-{row['steps']}"
        assert int(line["macs"]) == row["macs"] and float(line["proxy_real"]) == row["proxy_real"]
        for role in ("twin", "reference"):
            mean = line[f"{role}_psnr"]
            assert (float(mean) == row[role]["psnr"]["mean"]) if row[role] else mean == ""


def test_cells_are_held_against_twin_and_reference(swept):
    """What is cached has metrics against its twin, and DDPM none against unipc-8, to which more steps come nearer."""
    rows = scores(swept)
    for name, row in rows.items():
        assert bool(row["twin"]) == name.endswith("N2")
        assert bool(row["reference"]) == name.startswith("ddim")
    error = {n: rows[f"ddim-{n}-g2.5-uncached"]["reference"]["relative_l1"]["mean"] for n in (4, 6)}
    assert error[6] < error[4]


def test_cached_cells_have_the_best_uncached_one_that_they_can_afford_as_control(swept):
    """Both are held against the reference, clip by clip. DDPM pairs with nothing."""
    rows = {row["name"]: row for row in json.loads((swept / "sweep.json").read_text())["rows"]}
    row, control = rows["ddim-6-g2.5-N2"], rows["ddim-4-g2.5-uncached"]
    assert row["control"] == control["name"] and rows["unipc-8-g2.5-uncached"]["control"] is None
    expected = ratio_interval(*(each["reference"]["relative_l1"]["each"] for each in (row, control)))
    assert row["reference_control"]["relative_l1"] == expected and not rows["ddpm-6-g2.5-N2"]["reference_control"]
    with (swept / "sweep.csv").open(newline="") as file:
        line = next(line for line in csv.DictReader(file) if line["name"] == row["name"])
    assert float(line["reference_relative_l1_control_high"]) == expected["high"]
    assert "relative L1 / control's, reference" in (swept / "sweep.md").read_text()


def test_plots_are_drawn(swept):
    for name in ("pareto_fidelity.png", "pareto_proxy.png", "paired.png"):
        with Image.open(swept / name) as image:
            assert image.width > 900 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_neither_order_nor_size_of_the_grid_changes_scores(tiny, swept, tmp_path, monkeypatch):
    """Half of the cells in another order; a cell's scores are the same to the bit."""
    reordered = ["plans=[uncached,N2]", "methods=[ddpm,ddim]", "steps=[6]", *GRID[3:], f"real_path={swept}/real"]
    run(monkeypatch, tiny, tmp_path, *reordered)
    before, after = scores(swept), scores(tmp_path)
    assert len(after) == 2 * 2 + 1 and after == {name: before[name] for name in after}


def test_a_larger_grid_does_only_what_it_adds(tiny, swept, monkeypatch):
    """A plan more, and a guidance more with its own reference; without guidance a clip costs half."""
    assert run(monkeypatch, tiny, swept, *GRID, "plans=[N2,N3]", "methods=[ddpm]", "steps=[6]") == 2
    assert run(monkeypatch, tiny, swept, *GRID, "methods=[ddim]", "steps=[4]", "guidance=[2.5,1]") == 3 * 2
    rows = scores(swept)
    assert rows["ddim-4-g2.5-N2"]["macs"] == 2 * rows["ddim-4-g1-N2"]["macs"]
    assert rows["ddim-4-g1-N2"]["reference"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plans=[2]"], "expected N<interval>"),
        (["plans=['0,9']"], "cache.full_steps: 9 is no step of 6"),
        (["plans=[N2-0-0]"], "plan N2-0-0 runs all 6 steps"),
        (["methods=[ddim,plms]"], "'plms' is unknown; valid: ddpm, ddim"),
        (["steps=[0]"], "steps: 0 is less than 1"),
        (["steps=[many]"], "steps"),
        (["reference=ddim"], "reference: ddim is no METHOD-STEPS, as ddim-250"),
        (["reference=plms-9"], "'plms' is unknown"),
        (["plan=[N2]"], "did you mean plans?"),
        (["plans=[N2-b3]"], "cache.depth: 3 is outside 1 ... 2"),
        (["real_stride=-1"], "real_stride: -1 is less than 1"),
        (["num_clips=2"], "num_clips: 2 is less than 4"),
    ],
)
def test_every_mistake_is_one_line(tiny, tmp_path, monkeypatch, argv, message):
    with pytest.raises(UserError) as error:
        run(monkeypatch, tiny, tmp_path / "out", *argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_dry_run_prints_the_grid_and_names_all_that_is_missing(tiny, tmp_path, monkeypatch, capsys):
    """Nothing is sampled or written; a missing checkpoint, VAE and folder of real clips are one line at the end."""
    assert run(monkeypatch, tiny, tmp_path / "out", *GRID, "--dry-run") == 0
    text = capsys.readouterr().out
    assert text.count("# plan: ") == CELLS and "# plan: N2, ddpm 4 with guidance 2.5: 2 full and 2 cached" in text
    missing = ["ckpt=/nowhere/x.pt", "vae=other", "real_path=/nowhere/real"]
    with pytest.raises(UserError) as error:
        run(monkeypatch, tiny, tmp_path / "out", *GRID, *missing, "--dry-run")
    for message in (
        "ckpt: nothing at /nowhere/x.pt",
        f"no VAE in {tiny.parent}/other",
        "real_path: nothing at /nowhere",
    ):
        assert message in str(error.value)
    assert "\n" not in str(error.value) and capsys.readouterr().out.count("# plan: ") == CELLS
    assert not (tmp_path / "out").exists()
