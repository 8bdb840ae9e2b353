"""Folders of clips: nothing is lost, nothing that is not ours is touched, and settings do not mix."""

import json
import subprocess
import sys
from pathlib import Path
from socket import gethostname

import pytest

from configs import UserError
from configs.files import claim_folder, remove_leftovers
from datasets.readers import read_video
from sample import sample, sample_ddp
from sample.folder import is_whole

DEAD = 2**22 + 1  # no process: above the largest number that Linux gives
HOST = gethostname()


def run(monkeypatch, program, *argv: str | Path) -> None:
    """The program's main with this command line, in this process."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, argv)])
    program.main()


def error_of(monkeypatch, program, *argv: str | Path) -> str:
    with pytest.raises(UserError) as error:
        run(monkeypatch, program, *argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_only_what_a_dead_process_of_this_machine_left_is_removed(tmp_path):
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = ["notes.tmp", "x.tmp123", "a.tmp-old", f"b.tmp-{HOST}-", f"c.tmp-elsewhere-{DEAD}", f"d.tmp-{HOST}-one"]
    mine += [f"000001.mp4.tmp-{HOST}-{living.pid}", "000001.mp4", "000009.mp4.tmp123"]
    for name in (*mine, f"000002.mp4.tmp-{HOST}-{DEAD}", f"sample.json.tmp-{HOST}-{DEAD}"):
        (tmp_path / name).write_text("mine")
    (tmp_path / f"folder.tmp-{HOST}-{DEAD}").mkdir()
    remove_leftovers(tmp_path)
    living.communicate(b"\n")
    assert {path.name for path in tmp_path.iterdir()} == {*mine, f"folder.tmp-{HOST}-{DEAD}"}


@pytest.mark.parametrize("program", [sample, sample_ddp])
def test_two_runs_in_one_folder(program, tiny, tmp_path, monkeypatch):
    """The second is refused; a killed process holds nothing."""
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path / ".lock"], **pipes)
    other.stdout.readline()
    command = ["--config", tiny, "--save_video_path", tmp_path]
    command += ["num_fvd_samples=1"] if program is sample_ddp else ["samples_per_class=1"]
    error = error_of(monkeypatch, program, *command)
    assert error.startswith(f"save_video_path: another process writes to {tmp_path}: wait until it ends, or choose")
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    other.kill()
    other.communicate()
    claim_folder(tmp_path, "save_video_path")


def test_sample_keeps_the_clips_that_were_decoded_before_an_interruption(tiny, tmp_path, monkeypatch):
    """Ctrl-C at the third clip keeps two, with a record of their settings; the same command makes all."""
    command = ["--config", tiny, "--save_video_path", tmp_path, "per_proc_batch_size=1"]
    sample_latents, calls = sample.sample_latents, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_latents(*args)

    monkeypatch.setattr(sample, "sample_latents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, sample, *command)
    clips = sorted(path.name for path in (tmp_path / "uncached").iterdir())
    assert clips == ["000000_class0.mp4", "000001_class1.mp4"]
    assert json.loads((tmp_path / "sample.json").read_text())["runs"] == []
    before = (tmp_path / "uncached" / clips[1]).read_bytes()

    assert "cfg_scale=2.0, not 3.0" in error_of(monkeypatch, sample, *command, "cfg_scale=3")
    run(monkeypatch, sample, *command)
    assert (tmp_path / "uncached" / clips[1]).read_bytes() == before
    assert (tmp_path / "uncached/000002_class2.mp4").exists() and (tmp_path / "uncached/grid.mp4").exists()


def test_sample_refuses_to_mix_settings_in_a_folder(tiny, tmp_path, monkeypatch):
    """Seeds, classes and plans have names of their own, so they may differ."""
    command = ["--config", tiny, "--save_video_path", tmp_path]
    run(monkeypatch, sample, *command, "--classes", "0")
    run(monkeypatch, sample, *command, "--classes", "1", "seed=3", "--cache", "N2")
    record = json.loads((tmp_path / "sample.json").read_text())
    del record["config"]["process"]  # as written before that option was
    (tmp_path / "sample.json").write_text(json.dumps(record))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for change in ("cfg_scale=3", "num_sampling_steps=4", "fps=3", "sample_method=ddpm", "precision=bf16"):
        for dry in ([], ["--dry-run"]):
            error = error_of(monkeypatch, sample, *command, "--classes", "0", change, *dry)
            assert f"save_video_path: {tmp_path} was made with {change.split('=')[0]}=" in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "sample.json").unlink()
    assert "videos of unknown settings (no sample.json)" in error_of(monkeypatch, sample, *command)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}', '{"config": {}, "runs": []}', "\x00\x01"])
@pytest.mark.parametrize(("program", "name"), [(sample, "sample.json"), (sample_ddp, "sample_ddp.json")])
def test_a_damaged_record_is_named(program, name, content, tiny, tmp_path, monkeypatch):
    (tmp_path / name).write_text(content)
    error = error_of(monkeypatch, program, "--config", tiny, f"save_video_path={tmp_path}", "--dry-run")
    assert error.startswith(f"save_video_path: {tmp_path / name} is damaged") and "remove it" in error
    assert (tmp_path / name).read_text() == content


def test_damaged_clips_are_made_again(tiny, tmp_path, monkeypatch):
    command = ["--config", tiny, f"save_video_path={tmp_path}"]
    run(monkeypatch, sample_ddp, *command)
    whole = {seed: tmp_path / f"{seed:06d}.mp4" for seed in range(5)}
    content = {seed: path.read_bytes() for seed, path in whole.items()}
    assert all(map(is_whole, whole.values())) and not is_whole(tmp_path)
    for seed, damaged in {0: b"", 1: content[1][:-1], 2: content[2][:40], 3: b"not a video"}.items():
        whole[seed].write_bytes(damaged)
        assert not is_whole(whole[seed])
    run(monkeypatch, sample_ddp, *command)
    assert {seed: path.read_bytes() for seed, path in whole.items()} == content
    assert len(read_video(whole[0], range)) == 4
    assert json.loads((tmp_path / "sample_ddp.json").read_text())["runs"][1]["clips"] == 4


@pytest.mark.parametrize(
    ("program", "place", "is_folder"),
    [(sample, "uncached/000001_class1.mp4", True), (sample, "uncached", False), (sample_ddp, "000003.mp4", True)],
)
def test_what_stands_in_the_place_of_a_clip_is_named(program, place, is_folder, tiny, tmp_path, monkeypatch):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).mkdir() if is_folder else (tmp_path / place).touch()
    for dry in ([], ["--dry-run"]):
        error = error_of(monkeypatch, program, "--config", tiny, f"save_video_path={tmp_path}", *dry)
        assert error.startswith(f"save_video_path: {tmp_path / place} stands where a clip or its folder is to be")
