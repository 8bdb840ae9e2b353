"""tools/encode_latents.py: every frame of every video once, by any number of processes; one kind in a folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs import ROOT, UserError
from datasets.readers import read_video
from datasets.transforms import square
from models.autoencoder import LatentCodec
from tools import encode_latents as program

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def options(tiny, tmp_path) -> list[str]:
    """Three real clips of 24 frames and a broken one, in two classes; mirrored variants, too."""
    for name, numbers in {"Box": (1, 2), "City": (1,)}.items():
        (tmp_path / "videos" / name).mkdir(parents=True)
        for number in numbers:
            clip = ROOT / "datasets/demo/train" / name / f"v_{name}_g01_c0{number}.mp4"
            shutil.copy(clip, tmp_path / "videos" / name)
    (tmp_path / "videos" / "City" / "broken.mp4").write_text("not a video")
    paths = [f"data_path={tmp_path}/videos", f"latents_path={tmp_path}/out", f"pretrained_model_path={tiny.parent}"]
    return [*paths, "dataset=video_folder", "image_size=32", "num_classes=2", "horizontal_flip=true"]


def run(monkeypatch, options: list[str], *changes: str) -> None:
    monkeypatch.setattr(sys, "argv", ["encode_latents.py", *options, "max_bad_fraction=0.25", *changes])
    program.main()


def written(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_latents_are_those_of_all_frames_plain_and_mirrored(options, tiny, tmp_path, monkeypatch):
    """Also of a video that is read in pieces."""
    monkeypatch.setattr(program, "PIECE", 10)
    run(monkeypatch, options)
    frames = read_video(tmp_path / "videos/City/v_City_g01_c01.mp4", range)  # (24, 3, H, W)
    variants = torch.stack([square(frames, 32, flip) for flip in (False, True)], dim=1)
    with torch.no_grad():
        expected = torch.cat(LatentCodec.from_pretrained(tiny.parent / "vae").moments(variants), dim=2)
    moments = load_file(tmp_path / "out/City/v_City_g01_c01.mp4.safetensors")["moments"]
    assert moments.shape == (24, 2, 8, 4, 4)
    torch.testing.assert_close(moments.float(), expected, rtol=2e-3, atol=2e-3)  # half precision


def test_the_same_command_again_encodes_what_is_missing_and_no_more(options, tmp_path, monkeypatch):
    run(monkeypatch, options)
    first = written(tmp_path / "out")
    (tmp_path / "out/Box/v_Box_g01_c02.mp4.safetensors").unlink()
    run(monkeypatch, options)
    second = written(tmp_path / "out")
    assert second.keys() == first.keys() and len(first) == 3
    assert [name for name in first if first[name] != second[name]] == ["Box/v_Box_g01_c02.mp4.safetensors"]


def test_dry_run_says_what_would_run_and_writes_nothing(options, tmp_path, monkeypatch, capsys):
    run(monkeypatch, options, "--dry-run")
    videos, latents, *yaml = capsys.readouterr().out.splitlines()
    assert videos == f"# videos: 4 in {tmp_path}/videos, 0 of them encoded before, processes: 1"
    assert latents == f"# latents: of frames at 32 x 32, in {tmp_path}/out" and "image_size: 32" in yaml
    assert not (tmp_path / "out").exists()
    run(monkeypatch, options)
    capsys.readouterr()
    run(monkeypatch, options, "--dry-run")
    assert capsys.readouterr().out.startswith(f"# videos: 4 in {tmp_path}/videos, 3 of them encoded before, ")


def test_dry_run_names_everything_that_is_wrong(options, tmp_path, monkeypatch):
    run(monkeypatch, options)
    with pytest.raises(UserError) as caught:
        run(monkeypatch, options, "--dry-run", "data_path=/nowhere", "vae=other", "image_size=64")
    wrong = (
        "data_path: nothing at /nowhere",
        f"no VAE in {options[2].partition('=')[2]}/other: ",
        "image_size=32, not 64",
    )
    assert all(text in str(caught.value) for text in wrong)


@pytest.mark.parametrize("change", ["image_size=64", "horizontal_flip=false", "pretrained_model_path=pretrained/demo"])
def test_a_folder_holds_latents_of_one_kind(options, tmp_path, monkeypatch, change):
    monkeypatch.chdir(ROOT)
    run(monkeypatch, options)
    record = (tmp_path / "out/latents.json").read_text()
    with pytest.raises(UserError, match=r"out was made with \w+=\S+, not .*; choose another folder, or remove it$"):
        run(monkeypatch, options, change)
    assert (tmp_path / "out/latents.json").read_text() == record


def test_two_processes_share_the_videos_and_name_the_broken_one_when_the_rest_is_done(options, tmp_path):
    """An error, as it is more than the tenth that is allowed; each file is written once."""
    command = [*TORCHRUN, program.__file__, *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "4 videos, 1 skipped" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "1 of 4 videos failed, max_bad_fraction=0.1: " in lines[0] and "broken.mp4" in lines[0]
    assert len(written(tmp_path / "out")) == 3 and json.loads((tmp_path / "out/latents.json").read_text())["encoder"]
