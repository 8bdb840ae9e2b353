"""tools/metrics/pairs.py on clips whose metrics are known, and tools/fidelity.py on a tiny model."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from PIL import Image
from torch import Tensor

from configs import ROOT, UserError, load_config
from datasets.readers import read_video
from sample.distributed import Environment
from sample.media import save_video
from sample.pipeline import generate, load, resolve
from sample.plans import make_plan, parse_plan
from sample.similarity import ssim
from tools import evaluate, fidelity
from tools.metrics import cells as engine
from tools.metrics.cells import Cell, Task
from tools.metrics.options import MeasureConfig
from tools.metrics.pairs import aggregate, compare, distance_to_others, load_lpips, lpips_weights
from tools.metrics.scores import frechet_distance
from tools.metrics.statistics import interval_text, mean_and_margin, ratio_interval

CPU = torch.device("cpu")


def clips(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Latents (2, F, C, h, w) and videos (2, F, 3, H, W) in [-0.5, 0.5]."""
    torch.manual_seed(seed)
    return torch.randn(2, 4, 4, 4, 4), torch.rand(2, 4, 3, 32, 32) - 0.5


def strict_json(path: Path) -> dict:
    """The file as JSON proper: neither NaN nor Infinity."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def read_markdown(text: str) -> list[dict[str, str]]:
    """The first table, a dict for each line."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].splitlines()]
    assert all(set(rule) <= set(":-") for rule in lines[1])
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


# ------------------------------------------------------------------------------------------------ metrics


def test_a_clip_is_its_own_best_twin():
    latents, videos = clips()
    metrics = compare(latents, videos, latents, videos, lpips=None)
    ssim = metrics.pop("ssim")
    assert metrics == {"relative_l1": [0, 0], "psnr": [100, 100], "motion_error": [0, 0]}
    # Each moment is a convolution in fp32: not to the bit the same of two equal images in one batch, so that a quotient
    # of sums of a few of them is 1 to some 1e-7.
    assert ssim == pytest.approx([1, 1], abs=1e-5)
    json.dumps(aggregate(metrics["psnr"], ["a", "b"]), allow_nan=False)


def test_known_differences_have_known_metrics():
    latents, videos = clips()
    metrics = compare(1.1 * latents, videos + 0.2, latents, videos)
    assert metrics["relative_l1"] == pytest.approx([0.1, 0.1], rel=1e-5)
    assert metrics["psnr"] == pytest.approx([20, 20], rel=1e-4)  # 0.1 of a range of 1
    assert metrics["motion_error"] == pytest.approx([0, 0], abs=1e-5)  # the same motion, only brighter
    assert all(0.5 < value < 1 for value in metrics["ssim"])

    still, faster = videos[:, :1].expand_as(videos), videos[:, :1] + 1.5 * (videos - videos[:, :1])
    assert compare(latents, still, latents, videos)["motion_error"] == pytest.approx([1, 1])
    assert compare(latents, faster, latents, videos)["motion_error"] == pytest.approx([0.5, 0.5], rel=1e-5)


def test_each_clip_has_its_own_metrics():
    latents, videos = clips()
    a = latents.clone()
    a[1] *= 2
    assert compare(a, videos, latents, videos)["relative_l1"] == pytest.approx([0, 1])


def test_teacache_measures_mp4_files_frame_by_frame():
    """Beside our own metrics: of both files as they are read again, means over frames."""
    torch.manual_seed(0)
    videos = torch.nn.functional.interpolate(torch.rand(4, 3, 5, 5) * 2 - 1, (31, 33), mode="bilinear")[None]
    twins = (videos + 0.1 * torch.randn_like(videos)).clamp(-1, 1)
    latents = torch.ones(1, 1)
    metrics = compare(latents, videos, latents, twins, None, "teacache")
    assert metrics.keys() - compare(latents, videos, latents, twins).keys() == {"mp4_psnr", "mp4_ssim"}

    def read_back(video: Tensor, path: Path) -> Tensor:
        save_video(path, video, fps=8)
        return read_video(path, range)[:, :, :31, :33].double() / 255

    with TemporaryDirectory() as folder:
        a, b = (read_back(video[0], Path(folder, "x.mp4")) for video in (videos, twins))
    errors = (a - b).square().flatten(1).mean(1)
    assert metrics["mp4_psnr"][0] == pytest.approx(-10 * errors.log10().mean().item(), rel=1e-5)
    assert metrics["mp4_psnr"][0] != pytest.approx(metrics["psnr"][0], rel=1e-3)
    assert metrics["mp4_ssim"][0] == pytest.approx(ssim(2 * a - 1, 2 * b - 1), abs=1e-6)


def test_intervals_are_students():
    """Of 1, 2, 3: standard deviation 1, and t = 4.3027 for two degrees of freedom."""
    assert mean_and_margin([1, 2, 3]) == {"mean": 2, "margin": pytest.approx(4.302653 / 3**0.5), "clips": 3}
    assert mean_and_margin([5]) == {"mean": 5, "margin": None, "clips": 1}
    summary = aggregate([1, 2, 3, 8], ["b", "a", "b", "a"])
    assert {name: own["mean"] for name, own in summary["by_class"].items()} == {"a": 5, "b": 2}
    assert summary["each"] == [1, 2, 3, 8] and summary["mean"] == 3.5


def test_distance_to_others_gives_no_credit_for_shared_noise():
    """A copy of the twins is as far from the others as a fresh set of the same kind; a shifted set is farther."""
    torch.manual_seed(0)
    twins, fresh = torch.randn(400, 4), torch.randn(400, 4)
    assert frechet_distance(twins, twins) < 1e-6
    copy, new, shifted = (distance_to_others(x, twins) for x in (twins.clone(), fresh, twins + 1))
    assert 0.05 < copy < 0.3 and 0.05 < new < 0.3 and 3.5 < shifted < 4.7


def test_lpips_is_measured_only_with_weights_on_the_disk(tmp_path, monkeypatch):
    """Nothing is ever downloaded. The weights here are random: what counts is that they are found and used."""
    from torchvision.models import alexnet

    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert load_lpips(CPU) is None
    path, url = lpips_weights()
    assert path.is_relative_to(tmp_path) and url.endswith(path.name)

    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in alexnet().state_dict().items()}
    torch.manual_seed(0)
    weights = {
        n: torch.randn(s) * 0.05 if n.startswith("features") else torch.zeros(1).expand(s) for n, s in shapes.items()
    }
    path.parent.mkdir(parents=True)
    torch.save(weights, path)
    latents, videos = clips()
    other = clips(1)[1]
    metrics = compare(latents, torch.stack([videos[0], other[1]]), latents, videos, load_lpips(CPU))
    assert metrics["lpips"][0] == pytest.approx(0, abs=1e-6) and metrics["lpips"][1] > 0.001


# ------------------------------------------------------------------------------------------------ program


def run(monkeypatch, tiny: Path, output: Path, *argv: str) -> Counter:
    """The program with this command line; which plans it sampled, in clips (without the runs that warm up)."""
    sampled = Counter()

    def count(pipe, seeds, labels, plan=None, on_step=None):
        if on_step:
            cache = (plan or pipe.plan).cache
            sampled[f"{pipe.cfg.sample_method}-{pipe.diffusion.num_timesteps}-N{cache.interval}"] += len(seeds)
        return sample_latents(pipe, seeds, labels, plan, on_step)

    sample_latents = engine.sample_latents
    with monkeypatch.context() as patch:
        patch.setattr(engine, "sample_latents", count)
        patch.setattr(sys, "argv", ["fidelity.py", "--config", str(tiny), *argv, f"output={output}"])
        fidelity.main()
    return sampled


PLANS = ["--cache", "N2", "N4-900-50", "num_clips=6", "seed=100"]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Three real clips, of which every second frame is used."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    for i in range(3):
        save_video(folder / f"{i}.mp4", torch.rand(9, 3, 32, 32) * 2 - 1, fps=8)
    return folder


@pytest.fixture(scope="module")
def measured(tiny, real, tmp_path_factory) -> Path:
    """A finished run of PLANS with real clips."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as monkeypatch:
        sampled = run(monkeypatch, tiny, folder, *PLANS, f"real_path={real}", "real_stride=2")
    controls = {f"{solver}-4-N1": 6 for solver in ("ddim", "dpmsolver++", "unipc")}  # both plans pay for four steps
    assert sampled == {"ddim-6-N1": 6, "ddim-6-N2": 6, "ddim-6-N4": 6} | controls
    return folder


def test_record_and_table(measured):
    """A row for uncached, each plan and its control; labels balanced; metrics of each clip; the table reads back."""
    record = strict_json(measured / "fidelity.json")
    assert record["seeds"] == [*range(100, 106)] and sorted(record["labels"]) == [0, 0, 1, 1, 2, 2]
    rows = {row["run"]: row for row in record["rows"]}
    controls = [f"{solver}, 4 steps" for solver in ("ddim", "dpmsolver++", "unipc")]
    assert list(rows) == ["uncached", "N2", *controls, "N4"]
    uncached, n2, control = (rows[name] for name in ("uncached", "N2", "unipc, 4 steps"))
    assert not uncached["twin"] and uncached["speedup"] == 1 and uncached["share"] == 1
    assert (n2["full_steps"], n2["cached_steps"], control["full_steps"]) == (3, 3, 4)
    assert control["macs"] == uncached["macs"] * 4 / 6 <= n2["macs"]
    for row in (n2, control):
        for metric in ("relative_l1", "psnr", "ssim", "motion_error"):
            summary = row["twin"][metric]
            assert len(summary["each"]) == 6 and summary["mean"] == pytest.approx(sum(summary["each"]) / 6)
            assert summary["margin"] > 0 and {own["clips"] for own in summary["by_class"].values()} == {2}
    for row in rows.values():
        assert row["seconds"] > 0 and row["proxy_real"] > 0 and row["proxy_others"] > 0
        assert row["proxy_real_interval"][0] < row["proxy_real"] < row["proxy_real_interval"][1]
    real = record["real"]
    assert (real["clips"], real["videos"], real["stride"], real["too_short"], real["broken"]) == (3, 3, 2, 0, [])

    table = read_markdown((measured / "fidelity.md").read_text())
    assert [line["run"] for line in table] == list(rows)
    assert table[0]["PSNR, dB"] == "–" and table[1]["full + cached steps"] == "3 + 3"
    assert Image.open(measured / "paired.png").size[0] > 500
    assert float(table[0]["proxy, real"].split(" (")[0]) == pytest.approx(uncached["proxy_real"], rel=1e-3)
    assert f"to 3 clips of 3 videos in {real['path']}, stride 2" in (measured / "fidelity.md").read_text()
    mean, _, margin = table[1]["relative L1"].split()
    assert float(mean) == pytest.approx(n2["twin"]["relative_l1"]["mean"], abs=1e-4) and float(margin) > 0


def test_plans_are_compared_with_their_controls_clip_by_clip(measured):
    """The paired interval of each metric; and of the distance to real clips to that of the uncached ones."""
    rows = {row["run"]: row for row in strict_json(measured / "fidelity.json")["rows"]}
    uncached, n2 = rows["uncached"], rows["N2"]
    rivals = [rows[f"{solver}, 4 steps"] for solver in ("ddim", "dpmsolver++", "unipc")]
    control = min(rivals, key=lambda row: row["twin"]["relative_l1"]["mean"])
    ours, theirs = (row["twin"] for row in (n2, control))
    assert n2["control"] == control["name"] and control["control"] is None and not control["twin_control"]
    expected = ratio_interval(ours["relative_l1"]["each"], theirs["relative_l1"]["each"])
    assert n2["twin_control"]["relative_l1"] == pytest.approx(expected)
    differences = [a - b for a, b in zip(ours["psnr"]["each"], theirs["psnr"]["each"], strict=True)]
    assert n2["twin_control"]["psnr"]["value"] == pytest.approx(sum(differences) / 6)
    change = n2["proxy_real_change"]
    assert change["value"] == pytest.approx(n2["proxy_real"] - uncached["proxy_real"], rel=1e-6)
    assert change["low"] < change["value"] < change["high"] and 0 < change["p"] <= 1
    assert uncached["proxy_real_change"] is None
    assert n2["diversity"].keys() == {"value", "precision", "recall", "density", "coverage", "neighbours"}
    line = read_markdown((measured / "fidelity.md").read_text())[1]
    assert line["coverage"] == f"{n2['diversity']['coverage']:.3f}"
    assert line["PSNR − control's"].startswith(f"{sum(differences) / 6:.2f} (")
    assert line["relative L1 / control's"] == interval_text(expected, 2, 1)


def test_metrics_are_those_of_the_pipeline(tiny, measured):
    """The metrics of one clip, from videos generated here."""
    cfg = resolve(load_config(fidelity.FidelityConfig, tiny), CPU)
    pipe = load(cfg, CPU)
    twin, clip = (generate(pipe, [101], [101 % 3], make_plan(cfg, parse_plan(name))) for name in ("uncached", "N2"))
    metrics = strict_json(measured / "fidelity.json")["rows"][1]["twin"]
    expected = compare(torch.ones(1, 1), clip, torch.ones(1, 1), twin)
    for metric in ("psnr", "ssim", "motion_error"):
        assert metrics[metric]["each"][1] == pytest.approx(expected[metric][0], rel=1e-3)


def test_the_same_command_does_only_what_is_missing(tiny, measured, tmp_path, monkeypatch):
    """Lines of a plan lost, one torn by a kill: just these are sampled again, and all metrics are as before."""
    before = strict_json(measured / "fidelity.json")["rows"]
    log = measured / "clips/0.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    kept = [line for line in lines if "N4" not in line or json.loads(line)["cell"] != "ddim-6-g2-N4"]
    lost = next(line for line in lines if '"ddim-6-g2-N4", "seeds"' in line)
    log.write_text("".join(kept) + lost[: len(lost) // 2])
    assert run(monkeypatch, tiny, measured, *PLANS, "controls=False") == {"ddim-6-N4": 6}
    after = strict_json(measured / "fidelity.json")["rows"]
    assert [row["twin"] for row in after] == [row["twin"] for row in before if "steps" not in row["run"]]
    assert run(monkeypatch, tiny, measured, *PLANS) == {}


def test_seconds_compare_on_one_machine_with_one_setting(tiny, measured, tmp_path, monkeypatch):
    """N2 was sampled again with other attention than its twin: no speed-up. Another machine's N4 changes nothing."""
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    before = {row["run"]: row for row in strict_json(tmp_path / "fidelity.json")["rows"]}
    log = tmp_path / "clips/0.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if line["cell"] != "ddim-6-g2-N2"]
    slow = [line | {"machine": "elsewhere", "seconds": 1e6} for line in lines if line["cell"] == "ddim-6-g2-N4"]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines + slow))
    assert run(monkeypatch, tiny, tmp_path, *PLANS, "attention_mode=math") == {"ddim-6-N2": 6}
    rows = {row["run"]: row for row in strict_json(tmp_path / "fidelity.json")["rows"]}
    assert rows["N2"]["speedup"] is None and rows["N2"]["machine"].endswith("attention: math")
    assert all(rows["N4"][key] == before["N4"][key] for key in ("seconds", "speedup", "machine"))
    text = (tmp_path / "fidelity.md").read_text()
    assert read_markdown(text)[1]["speed-up"] == "–" and "attention: math: N2." in text


def test_more_clips_and_plans_add_to_a_folder(tiny, measured, monkeypatch):
    """The twins' latents are kept: a new plan samples no twin again."""
    assert run(monkeypatch, tiny, measured, "--cache", "N3", *PLANS[3:], "controls=False") == {"ddim-6-N3": 6}
    more = run(monkeypatch, tiny, measured, "--cache", "N3", "num_clips=8", "seed=100", "controls=False")
    assert more == {"ddim-6-N1": 2, "ddim-6-N3": 2}


def test_other_settings_need_another_folder(tiny, real, measured, monkeypatch):
    """Which is said before real clips are read."""
    monkeypatch.setattr(engine, "extract", None)
    with pytest.raises(UserError, match=r"output: .*/clips was made with labels=balanced, not random; choose another"):
        run(monkeypatch, tiny, measured, *PLANS, "labels=random", f"real_path={real}")


def test_neither_batches_nor_processes_change_metrics(tiny, measured, tmp_path):
    """Batches of 4 shared by two processes, one after the other, against batches of 2 in one."""
    options = ["num_clips=6", "seed=100", "per_proc_batch_size=4", f"output={tmp_path}"]
    cfg = resolve(load_config(MeasureConfig, tiny, options), CPU)
    twin = Cell("ddim", 6, 2.0)
    tasks = [Task(twin.with_cache(parse_plan(plan)), twin) for plan in ("uncached", "N2")]
    work = engine.open_folder(cfg, tasks, Environment(0, 1, CPU))
    assert [seeds for seeds, _ in work] == [[100, 101, 102, 103], [104, 105]]
    for rank in (1, 0):
        engine.measure(cfg, tasks, work[rank::2], Environment(rank, 2, CPU))
    assert engine.open_folder(cfg, tasks, Environment(0, 1, CPU)) == []
    ours, theirs = (engine.read_lines(folder / "clips")["ddim-6-g2-N2"] for folder in (tmp_path, measured))
    for seed in range(100, 106):
        assert ours.pairs[twin.name][seed] == pytest.approx(theirs.pairs[twin.name][seed], rel=1e-3)
        assert ours.features[seed] == pytest.approx(theirs.features[seed], rel=1e-3, abs=1e-4)


def test_two_processes_give_the_metrics_of_one(tiny, real, tmp_path, monkeypatch):
    """Under torchrun, which shares out the batches of samples and the real clips; one speaks and writes."""
    options = ["--cache", "N2", "num_clips=6", "seed=100", "controls=False", f"real_path={real}", "real_stride=2"]
    run(monkeypatch, tiny, tmp_path / "one", *options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "tools/fidelity.py", "--config", tiny, *options, f"output={tmp_path}/two"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("record: ") == 1
    assert sorted(path.name for path in (tmp_path / "two/clips").glob("*.jsonl")) == ["0.jsonl", "1.jsonl"]
    one, two = (strict_json(tmp_path / name / "fidelity.json") for name in ("one", "two"))
    assert two["real"] == one["real"]
    for ours, theirs in zip(two["rows"], one["rows"], strict=True):
        assert "processes: 2" in ours["machine"] and ours["speedup"] > 0
        for key in ("proxy_others", "proxy_real", "proxy_real_interval"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
        for metric, values in ours["twin"].items():
            assert values["each"] == pytest.approx(theirs["twin"][metric]["each"], rel=1e-3), metric


def test_controls_cost_what_a_plan_of_heun_costs(tiny, tmp_path, monkeypatch, capsys):
    """Heun's method runs the model 11 times in 6 steps; DDIM, DPM-Solver++ and UniPC once in a step."""
    run(monkeypatch, tiny, tmp_path, "--cache", "N2", "sample_method=heun", "num_clips=6", "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    macs = {line[8:].split(" with")[0]: line.split("; ")[1] for line in lines if line.startswith("# plan: ")}
    plan, full = (float(macs[f"{name}, heun 6"].split()[0]) for name in ("N2", "uncached"))
    steps = int(plan / (full / 11))
    assert 6 < steps < 11 and {f"uncached, {s} {steps}" for s in ("ddim", "dpmsolver++", "unipc")} < macs.keys()


def test_the_control_of_a_sampler_that_draws_noise_takes_all_of_its_steps(tiny, tmp_path, monkeypatch):
    """DDPM draws other noise in fewer steps: its control holds x_0 at some of them, for no MACs, and pairs."""
    run(monkeypatch, tiny, tmp_path, "--cache", "N2", "sample_method=ddpm", "num_clips=6")
    uncached, n2, control = strict_json(tmp_path / "fidelity.json")["rows"]
    assert control["run"] == "x_0 held, 4 evaluated" and (control["full_steps"], control["cached_steps"]) == (4, 2)
    assert control["macs"] == uncached["macs"] * 4 // 6 <= n2["macs"]
    assert n2["twin"]["psnr"]["mean"] > 5 and 0 < control["twin"]["relative_l1"]["mean"] < 2
    assert n2["control"] == control["name"] and n2["twin_control"]["relative_l1"]["value"] > 0


def test_dry_run_names_each_cost(tiny, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tiny, tmp_path / "out", *PLANS, "--dry-run") == {}
    text = capsys.readouterr().out
    assert "plan: N2, ddim 6 with guidance 2: 3 full and 3 cached" in text
    assert "plan: uncached, unipc 4 with guidance 2: 4 full and 0 cached" in text and not (tmp_path / "out").exists()
    assert f"# task: 6 clips of each, seeds 100 ... 105, to {tmp_path}/out" in text and "num_clips: 6" in text


def test_dry_run_names_all_that_is_missing(tiny, tmp_path, monkeypatch, capsys):
    """After the plans and the options: checkpoint, VAE and real clips, in one line."""
    missing = ["ckpt=/nowhere/x.pt", "vae=other", "real_path=/nowhere/real"]
    with pytest.raises(UserError) as error:
        run(monkeypatch, tiny, tmp_path / "out", *PLANS, *missing, "--dry-run")
    for message in (
        "ckpt: nothing at /nowhere/x.pt",
        f"no VAE in {tiny.parent}/other",
        "real_path: nothing at /nowhere",
    ):
        assert message in str(error.value)
    text = capsys.readouterr().out
    assert "\n" not in str(error.value) and "# plan: N2, ddim 6" in text and "ckpt: /nowhere/x.pt" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give plans with cached steps"),
        (["--cache", "N2", "N1"], "give plans with cached steps"),
        (["--cache", "N2", "N1-800-100"], "give plans with cached steps"),
        (["cache.interval=1", "cache.start=800"], "give plans with cached steps"),
        (["--cache", "N2-0-0"], "plan N2-0-0 runs all 6 steps of ddim in full"),
        (["--cache", "2"], "expected N<interval>"),
        (["--cache", "0,9"], "cache.full_steps: 9 is no step of 6"),
        (["--cache", "N2-b3"], "cache.depth: 3 is outside 1 ... 2"),
        (["--cache", "N2", "sample_method=plms"], "valid: ddpm, ddim"),
        (["--cache", "N2", "num_clips=2"], "num_clips: 2 is less than 4"),
        (["--cache", "N2", "num_clips=4", "num_classes=5"], "num_clips: 4 is less than 5"),
        (["--cache", "N2", "labels=even"], "valid: balanced, random"),
        (["--cache", "N2", "num_clip=9"], "did you mean num_clips?"),
        (["--cache", "N2", "real_stride=0"], "real_stride: 0 is less than 1"),
        (["--cache", "N2", "real_path=nowhere"], "real_path: nothing at"),
        (["--cache", "N2", "real_path=."], "real_path: there are no video files and no folders of images under"),
    ],
)
def test_every_mistake_is_one_line(tiny, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        run(monkeypatch, tiny, tmp_path / "out", *argv)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_one_line(tiny, tmp_path, monkeypatch):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match=r"output: .*out is a file, where a folder is to be written"):
        run(monkeypatch, tiny, tmp_path / "out", *PLANS)


def test_real_clips_that_are_too_short_are_counted(tiny, real, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"3 videos are too short \(\S+\.mp4: 9 frames, 12 needed: num_frames x stride"):
        run(monkeypatch, tiny, tmp_path, *PLANS, f"real_path={real}", "real_stride=3")


def test_distance_to_real_clips_is_that_of_the_evaluation(tiny, real, measured, tmp_path, monkeypatch):
    """There is one proxy: both round the samples to bytes. A distance of six clips magnifies the last digits."""
    argv = ["metrics=proxy", f"real_path={real}", "real_stride=2", f"generate={tiny}", "num_fake=6", "image_size=32"]
    argv += ["num_frames=4", "sample.seed=100", "jackknife=0", "feature_path=null", f"output={tmp_path}/evaluate.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv])
    evaluate.main()
    expected = strict_json(tmp_path / "evaluate.json")["metrics"]["proxy"]["value"]
    run(monkeypatch, tiny, measured, *PLANS, f"real_path={real}", "real_stride=2")  # all is sampled already
    row = strict_json(measured / "fidelity.json")["rows"][0]
    assert row["run"] == "uncached" and row["proxy_real"] == pytest.approx(expected, rel=1e-4)
