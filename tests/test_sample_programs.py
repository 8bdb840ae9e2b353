"""sample/sample.py, sample/sample_ddp.py, their YAML files and scripts, on a tiny model with random weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
import yaml

from configs import ROOT, SampleConfig, UserError, load_config, to_yaml
from datasets.readers import read_video
from sample import folder, pipeline, sample, sample_ddp
from sample.plans import make_plan

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SCRIPTS = sorted(path for path in (ROOT / "sample/scripts").glob("*/*.sh") if path.name != "demo.sh")


def run(monkeypatch, program, *argv: str | Path) -> None:
    """The program's main with this command line, in this process."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, argv)])
    program.main()


def sample_error(monkeypatch, program, *argv: str | Path) -> str:
    """The one line that the program ends with."""
    with pytest.raises(UserError) as error:
        run(monkeypatch, program, *argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def frames(path: Path) -> list:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def files(folder: Path) -> set[str]:
    """The files in a folder, without its lock."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# ------------------------------------------------------------------------------------------------- sample.py


def test_sample_writes_a_clip_for_each_class_and_a_record(tiny, tmp_path, monkeypatch):
    run(monkeypatch, sample, "--config", tiny, "--save_video_path", tmp_path, "--classes", 2, 0, "seed=5")
    clips = {"000005_class2.mp4", "000006_class0.mp4"}
    together = {"grid.mp4", "grid.gif", "contact_sheet.png"}
    assert files(tmp_path) == {f"uncached/{name}" for name in clips | together} | {"sample.json"}
    video = frames(tmp_path / "uncached/000005_class2.mp4")
    assert len(video) == 4 and video[0].shape == (32, 32, 3)

    record = json.loads((tmp_path / "sample.json").read_text())
    assert record["clips"][0] == {"seed": 5, "label": 2, "name": "class2"}
    assert record["config"]["precision"] == "fp32" and len(record["checkpoint"]["sha256"]) == 64
    assert record["runs"][0]["plan"]["full_steps"] == 6 and record["runs"][0]["seconds"]["sampling"] > 0
    assert record["machine"] and set(record["versions"]) == {"python", "torch", "diffusers"}


def test_compare_runs_every_plan_on_the_same_seeds(tiny, tmp_path, monkeypatch, capsys):
    """One table of uncached, N2 and N3: seconds, speed-up, MACs, PSNR, SSIM; pictures that set them side by side."""
    command = ["--config", tiny, "--compare", "--cache", "N2", "N3-900-50-b2", f"save_video_path={tmp_path}"]
    run(monkeypatch, sample, *command)
    assert {path.name for path in tmp_path.iterdir()} == {
        "uncached", "N2", "N3-b2", "sample.json", "compare.mp4", "compare.png", ".lock",
    }  # fmt: skip
    height, width, _ = frames(tmp_path / "compare.mp4")[0].shape
    assert (height, width) == (3 * 128, 3 * 128)  # plans x classes, enlarged to 128 pixels each

    uncached, n2, n3 = json.loads((tmp_path / "sample.json").read_text())["runs"]
    assert uncached["plan"]["cached_steps"] == 0 and "psnr" not in uncached
    assert n2["plan"]["cached_steps"] == 3 and n2["plan"]["macs"] < uncached["plan"]["macs"]
    assert n3["plan"]["cache"] == {
            "interval": 3, "start": 900, "stop": 50, "depth": 2, "order": 0, "full_steps": None,
        }  # fmt: skip
    for figures in (n2, n3):
        assert figures["speedup"] > 0 and 10 < figures["psnr"] < 100 and 0.5 < figures["ssim"] <= 1
    table = capsys.readouterr().out.splitlines()[-7:-2]
    assert [line.split()[1] for line in table] == ["plan", ":-------", "uncached", "N2", "N3-b2"]
    assert "1.00x" in table[2] and " dB" in table[3]


def test_compared_videos_are_those_of_separate_runs(tiny, tmp_path, monkeypatch):
    command = ["--config", tiny, "--cache", "N2", "--classes", "1"]
    run(monkeypatch, sample, *command, "--compare", f"save_video_path={tmp_path}/both")
    run(monkeypatch, sample, *command, f"save_video_path={tmp_path}/one")
    both, one = (frames(tmp_path / name / "N2/000000_class1.mp4") for name in ("both", "one"))
    assert all((a == b).all() for a, b in zip(both, one, strict=True))


def test_classes_have_their_names_from_the_data(tiny, tmp_path, monkeypatch):
    for name in ("Ant", "Bee", "Cow"):
        (tmp_path / "data" / name).mkdir(parents=True)
    names = ["dataset=ucf101", f"data_path={tmp_path}/data", f"save_video_path={tmp_path}/out"]
    run(monkeypatch, sample, "--config", tiny, "--classes", "bee", *names)
    assert (tmp_path / "out/uncached/000000_Bee.mp4").exists()
    assert "Bee" in sample_error(monkeypatch, sample, "--config", tiny, *names, "--classes", "bea")


def test_dry_run_prints_yaml_that_can_be_run_and_names_missing_files(tiny, tmp_path, monkeypatch, capsys):
    """Its output is a YAML file: first, as comments, the model's size, the plan and the cost; then the options."""
    command = ["--config", tiny, "--ckpt", "/nowhere.pt", "pretrained_model_path=/nowhere", "--deepcache", "2"]
    error = sample_error(monkeypatch, sample, *command, "--dry-run", f"save_video_path={tmp_path}/out")
    assert "ckpt: nothing at /nowhere.pt" in error and "pretrained_model_path: nothing at /nowhere" in error
    text = capsys.readouterr().out
    (tmp_path / "resolved.yaml").write_text(text)
    resolved = load_config(SampleConfig, tmp_path / "resolved.yaml")
    assert resolved.ckpt == "/nowhere.pt" and resolved.cache.interval == 2 and resolved.attention_mode == "sdpa"
    assert text.startswith("# model: Latte-skip, ") and text.endswith(to_yaml(resolved))
    assert "45,904 parameters" in text and "3 full and 3 cached steps" in text and "expected speed-up 1.32x" in text
    assert not (tmp_path / "out").exists()


def test_flags_left_out_keep_the_values_of_the_yaml(tiny, monkeypatch, capsys):
    run(monkeypatch, sample_ddp, "--config", tiny, "--dry-run")
    text = capsys.readouterr().out
    for line in ("sample_method: ddim", "num_sampling_steps: 6", "seed: 0", "num_fvd_samples: 5", "interval: 1"):
        assert line in text
    flags = ["--sample_method", "unipc", "--num_sampling_steps", "4", "--seed", "9", "--cache", "N3-800-100-b2"]
    run(monkeypatch, sample_ddp, "--config", tiny, "--dry-run", *flags, "cfg_scale=3")
    text = capsys.readouterr().out
    for line in (
        "sample_method: unipc",
        "num_sampling_steps: 4",
        "seed: 9",
        "interval: 3",
        "start: 800",
        "cfg_scale: 3",
    ):
        assert line in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--deepcache", "2", "cache.depth=3"], "cache.depth: 3 is outside 1 ... 2, half of the model's layers"),
        (["--cache", "N2-b3"], "cache.depth: 3 is outside 1 ... 2, half of the model's layers"),
        (["--deepcache", "2", "--cache", "N2"], "--cache and deepcache=2 both set cache: leave one out"),
        (["num_clips=3"], "num_clips is for sample_ddp.py; here give samples_per_class=2, or --classes"),
        (["--cache", "2"], "--cache 2: expected N<interval>"),
        (["--cache", "0,9"], "cache.full_steps: 9 is no step of 6, 0 ... 5"),
        (["cache.full_steps=[0,1,1]"], "cache.full_steps: [0, 1, 1] must begin with 0"),
        (["--cache", "N2", "N3"], "--cache takes several plans only with --compare"),
        (["--compare"], "--compare needs plans that save steps"),
        (["--compare", "--cache", "N2-0-0"], "--compare needs plans that save steps"),
        (["--classes", "3"], "indices go from 0 to 2"),
        (["--classes", "Bunny"], "these classes have no names"),
        (["--classes", "0", "num_classes=null", "cfg_scale=1"], "this model has no classes"),
        (["samples_per_class=0"], "samples_per_class: 0 is less than 1"),
        (["--sample_method", "plms"], "sample_method: 'plms' is unknown; valid: ddpm, ddim"),
        (["--num_sampling_steps", "many"], "num_sampling_steps"),
        (["--num_sampling_steps", "2000"], "2000"),
        (["cfg_scal=2"], "did you mean cfg_scale?"),
        (["--ckpt", "nowhere.pt"], "ckpt: nothing at"),
        (["vae=other"], "no VAE in"),
    ],
)
def test_every_mistake_is_one_line(tiny, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in sample_error(monkeypatch, sample, "--config", tiny, *argv)
    assert not files(tmp_path)


def test_sample_says_that_it_is_one_process(tiny, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "use sample/sample_ddp.py" in sample_error(monkeypatch, sample, "--config", tiny)


def test_runs_from_any_directory(tiny, tmp_path):
    """As a command, with a path relative to the current directory; a mistake is one line on stderr and exit code 2."""
    command = [sys.executable, ROOT / "sample/sample.py", "--config", tiny.name, "vae=nowhere"]
    shutil.copy(tiny, tmp_path)
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: no VAE in") and result.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------- sample_ddp.py


def test_ddp_makes_only_what_is_missing(tiny, tmp_path, monkeypatch, capsys):
    command = ["--config", tiny, "--save_video_path", tmp_path]
    run(monkeypatch, sample_ddp, *command)
    assert files(tmp_path) == {f"{seed:06d}.mp4" for seed in range(5)} | {"sample_ddp.json"}
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")}
    (tmp_path / "000003.mp4").unlink()

    run(monkeypatch, sample_ddp, *command, "num_fvd_samples=6", "per_proc_batch_size=3")
    assert files(tmp_path) == {f"{seed:06d}.mp4" for seed in range(6)} | {"sample_ddp.json"}
    made = {path.name for path in tmp_path.glob("*.mp4") if path.stat().st_mtime_ns != times.get(path.name)}
    assert made == {"000003.mp4", "000005.mp4"}

    monkeypatch.setattr(sample_ddp, "load", None)  # nothing is missing: the weights are not even loaded
    run(monkeypatch, sample_ddp, *command, "num_fvd_samples=2")
    record = json.loads((tmp_path / "sample_ddp.json").read_text())
    assert record["labels"] == [0, 1, 2, 0, 1, 2] and record["config"]["num_fvd_samples"] == 6
    assert [each["clips"] for each in record["runs"]] == [5, 2]
    assert record["plan"]["full_steps"] == 6 and len(record["checkpoint"]["sha256"]) == 64


def test_ddp_refuses_to_mix_settings_in_a_folder(tiny, tmp_path, monkeypatch):
    """The error names what differs, the weights too; what changes no clip may differ."""
    folder, moved = tmp_path / "videos", tmp_path / "moved.safetensors"
    command = ["--config", tiny, f"save_video_path={folder}", "num_fvd_samples=1"]
    run(monkeypatch, sample_ddp, *command)
    shutil.copy(tiny.parent / "skip.safetensors", moved)
    run(monkeypatch, sample_ddp, *command, "--ckpt", moved, "attention_mode=math", "per_proc_batch_size=1")

    error = sample_error(monkeypatch, sample_ddp, *command, "cfg_scale=3", "--cache", "N2")
    assert "made with cfg_scale=2.0, not 3.0; cache.interval=1, not 2; choose another folder" in error
    for option in ("seed=1", "labels=random", "precision=bf16"):
        assert option.split("=")[0] in sample_error(monkeypatch, sample_ddp, *command, option)
    with moved.open("ab") as file:  # other weights under the same path: their hash differs
        file.write(b"\n")
    assert "checkpoint=" in sample_error(monkeypatch, sample_ddp, *command, "--ckpt", moved)
    shutil.copytree(tiny.parent / "vae", tmp_path / "copy")
    run(monkeypatch, sample_ddp, *command, f"pretrained_model_path={tmp_path}", "vae=copy")
    with (tmp_path / "copy/diffusion_pytorch_model.safetensors").open("ab") as file:
        file.write(b"\n")
    error = sample_error(monkeypatch, sample_ddp, *command, f"pretrained_model_path={tmp_path}", "vae=copy")
    assert re.search("made with vae=[0-9a-f]{12}, not [0-9a-f]{12};", error)
    (folder / "sample_ddp.json").unlink()
    assert "unknown settings" in sample_error(monkeypatch, sample_ddp, *command)


def test_ddp_interrupted_leaves_whole_files_and_goes_on(tiny, tmp_path, monkeypatch):
    command = ["--config", tiny, "--save_video_path", tmp_path, "--cache", "N2"]
    generate, calls = sample_ddp.generate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(sample_ddp, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, sample_ddp, *command)
    assert files(tmp_path) == {"000000.mp4", "000001.mp4", "sample_ddp.json"}
    run(monkeypatch, sample_ddp, *command)
    assert [list(args[1]) for args in calls[2:]] == [[2, 3], [4]]


def test_labels_come_from_the_seed_alone():
    cfg = SampleConfig(num_classes=7, labels="balanced")
    assert folder.labels_of(range(5, 16), cfg) == [5, 6, 0, 1, 2, 3, 4, 5, 6, 0, 1]
    cfg.labels = "random"
    labels = folder.labels_of(range(1000), cfg)
    assert folder.labels_of([900, 3], cfg) == [labels[900], labels[3]]
    assert all(90 < labels.count(label) < 200 for label in range(7))
    assert folder.labels_of([1], SampleConfig(num_classes=None)) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["labels=alphabetic"], "labels: 'alphabetic' is unknown; valid: balanced, random"),
        (["--cache", "N2", "N4"], "sample_ddp.py runs one plan"),
        (["num_fvd_samples=0"], "num_fvd_samples: 0 is less than 1"),
        (["--deepcache", "2", "cache.depth=3"], "cache.depth: 3 is outside 1 ... 2"),
        (["--ckpt", "nowhere.pt"], "ckpt: nothing at"),
        (["ckpt=null"], "ckpt is not set"),
    ],
)
def test_every_mistake_of_ddp_is_one_line(tiny, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in sample_error(monkeypatch, sample_ddp, "--config", tiny, "--save_video_path", "out", *argv)
    assert not files(tmp_path)


def start_two(tmp_path: Path, patch: str, *argv: str | Path) -> subprocess.CompletedProcess:
    """sample_ddp.py on two processes, after the lines of `patch`."""
    program = tmp_path / "patched.py"
    head = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\nfrom sample import pipeline, sample_ddp\n"
    program.write_text(head + patch + "\nsample_ddp.cli.run(sample_ddp.main)\n")
    return subprocess.run([*TORCHRUN, program, *argv], capture_output=True, text=True, timeout=300)


def test_two_processes_make_the_clips_of_one(tiny, tmp_path, monkeypatch):
    """Latents agree to 1e-4, at another batch size, cached and guided, with DDPM's noise at every step."""
    command = ["--config", tiny, "--cache", "N2", "sample_method=ddpm", "labels=random"]
    alone, original = {}, pipeline.sample_latents

    def spy(pipe, seeds, *args):
        latents = original(pipe, seeds, *args)
        alone.update(zip(seeds, latents, strict=True))
        return latents

    monkeypatch.setattr(pipeline, "sample_latents", spy)
    run(monkeypatch, sample_ddp, *command, "--save_video_path", tmp_path / "one")
    saving = f"""
def spy(pipe, seeds, *args, original=pipeline.sample_latents):
    latents = original(pipe, seeds, *args)
    for seed, z in zip(seeds, latents):
        torch.save(z.clone(), f"{tmp_path}/{{seed}}.{{os.environ['RANK']}}.pt")
    return latents

pipeline.sample_latents = spy
"""
    result = start_two(tmp_path, saving, *command, "--save_video_path", tmp_path / "two", "per_proc_batch_size=3")
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.glob("*.pt")} == {"0.0.pt", "2.0.pt", "4.0.pt", "1.1.pt", "3.1.pt"}
    for path in tmp_path.glob("*.pt"):
        latents, seed = torch.load(path), int(path.name.split(".")[0])
        assert (latents - alone[seed]).norm() / alone[seed].norm() < 1e-4
    assert files(tmp_path / "two") == files(tmp_path / "one")
    (record,) = json.loads((tmp_path / "two/sample_ddp.json").read_text())["runs"]
    assert record["clips"] == 5 and record["processes"] == 2


def test_a_dying_process_does_not_hang_the_others(tiny, tmp_path, monkeypatch):
    """Torchrun ends the run, wherever process 0 is: its clips are whole, and the next run makes the others."""
    dies = "if os.environ['RANK'] == '1':\n    sample_ddp.generate = lambda *args: os._exit(9)"
    result = start_two(tmp_path, dies, "--config", tiny, "--save_video_path", tmp_path / "out")
    assert result.returncode != 0
    clips = set((tmp_path / "out").glob("*.mp4"))  # it may have died while it wrote another: a .tmp file is left
    assert {clip.name for clip in clips} <= {"000000.mp4", "000002.mp4", "000004.mp4"}
    assert all(len(read_video(clip, range)) == 4 for clip in clips)
    run(monkeypatch, sample_ddp, "--config", tiny, "--save_video_path", tmp_path / "out")
    assert files(tmp_path / "out") == {"sample_ddp.json", *(f"{seed:06d}.mp4" for seed in range(5))}


# ----------------------------------------------------------------------------------------- YAML and scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_run_sample_ddp(script, tmp_path, monkeypatch, capsys):
    """Each starts torchrun, from any directory, with its YAML file and what follows the script's name.

    A stand-in for Python writes down the program's command line, which is then run here: twelve starts of Python
    and torch would take minutes. The next test goes through the real one.
    """
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > command\n')
    python.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC": "3"}
    subprocess.run([script, "num_fvd_samples=16"], cwd=tmp_path, env=env, check=True)
    torchrun, standalone, nproc, program, *argv = (tmp_path / "command").read_text().splitlines()
    assert Path(torchrun).samefile(ROOT / "sample/scripts/torchrun.py")
    assert (standalone, nproc) == ("--standalone", "--nproc_per_node=3")
    assert Path(program).samefile(sample_ddp.__file__)

    monkeypatch.chdir(tmp_path)
    task, kind = script.stem.split("_")
    if task == "demo":
        run(monkeypatch, sample_ddp, *argv, "--save_video_path", tmp_path / "out", "--dry-run")
    else:  # the published weights are not here
        assert "ckpt: nothing at " in sample_error(monkeypatch, sample_ddp, *argv, "--dry-run")
    text = capsys.readouterr().out
    assert "num_fvd_samples: 16" in text and ("# plan: N2" if kind == "cache" else "# plan: uncached") in text
    if task != "demo":
        parameters = 673_994_912 if kind == "origin" else 692_614_688
        parameters += 102 * 1152 if task == "ucf101" else 0
        assert f"{parameters:,} parameters" in text
        assert ("ddim 50 with guidance 7: " if task == "ucf101" else "ddpm 250: ") in text


def test_a_script_through_torchrun(tiny, tmp_path):
    """One script as a user starts it, on the processes it finds; only process 0 speaks."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NPROC": "2"}
    script = ROOT / "sample/scripts/demo/demo_cache.sh"
    options = [f"{key}={value}" for key, value in yaml.safe_load(tiny.read_text()).items()]
    command = [script, *options, "data_path=null", "depth=8", "num_skips=2", "learn_sigma=True", "prediction=eps"]
    result = subprocess.run(
        [*command, f"save_video_path={tmp_path}/out"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.count("plan: N2, ddim 6 with guidance 2: 3 full and 3 cached steps; ") == 1
    assert "processes: 2" in result.stdout and len(list((tmp_path / "out").glob("*.mp4"))) == 5


def test_a_dry_run_through_a_script_is_one_process_with_one_line_for_what_is_missing(tmp_path):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NPROC": "2"}
    script = ROOT / "sample/scripts/ucf101/ucf101_cache.sh"
    result = subprocess.run([script, "--dry-run"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (
        result.stdout.count("# plan: N2, ddim 50 with guidance 7: 28 full and 22 cached steps; 121 TMACs a clip") == 1
    )
    assert result.returncode == 2 and result.stderr.startswith("error: ckpt: nothing at ")
    assert result.stderr.count("\n") == 1


def test_demo_script(tmp_path, monkeypatch, capsys):
    """What `make demo` runs: uncached, N=2 and N=4 of the checkpoint that ships."""
    script = (ROOT / "sample/scripts/demo/demo.sh").read_text()
    assert '--config "$root/configs/demo/demo_sample.yaml" --compare --cache N2 N4 N4-o2 ' in script
    assert '--recipe "$root/pretrained/demo/recipe-43.json" "$@"' in script
    run(monkeypatch, sample, "--compare", "--cache", "N2", "N4", "--save_video_path", tmp_path, "--dry-run")
    text = capsys.readouterr().out
    for line in ("uncached, ddim 50", "N2, ddim 50", "N4, ddim 50", "7 clips"):
        assert line in text


def test_yaml_files_have_the_original_settings():
    """The twelve load; classes, guidance, steps and the places where the downloads land."""
    for task, name in {"ucf101": "ucf101", "taichi": "taichi", "sky": "skytimelapse", "ffs": "ffs"}.items():
        for kind in ("origin", "skip", "cache"):
            cfg = load_config(SampleConfig, ROOT / f"configs/{task}/{task}_sample_{kind}.yaml")
            assert (cfg.num_classes, cfg.extras) == ((101, 2) if task == "ucf101" else (None, 1))
            assert cfg.num_fvd_samples == 2048 and cfg.image_size == 256 and cfg.num_frames == 16
            latte = {"taichi": "taichi-hd"}.get(task, name)
            place = f"Latte/{latte}.pt" if kind == "origin" else f"{name}-skip/{name}-skip.pt"
            assert Path(cfg.ckpt) == ROOT / "pretrained" / place
            plan = make_plan(pipeline.resolve(cfg, torch.device("cpu")))
            assert plan.name == ("N2" if kind == "cache" else "uncached")
