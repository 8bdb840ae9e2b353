"""tools/encode_latents.py: every frame of every video once, by any number of processes; one kind in a folder."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from configs import ROOT, TrainConfig, UserError, load_config
from configs.files import file_hash
from datasets import get_dataset
from datasets.clips import class_folders, survey
from datasets.latents import SUFFIX
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
    """The files that training would read, and when each was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in survey(folder, {SUFFIX}).files}


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


def replace_video(path: Path, keep_time: bool = False) -> None:
    """Other pixels under the same name, and of the same size in bytes."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    other = ROOT / "datasets/demo/train/Tree/v_Tree_g01_c01.mp4"
    size = max(path.stat().st_size, other.stat().st_size)
    path.write_bytes(other.read_bytes().ljust(size, b"\0") if not keep_time else path.read_bytes()[::-1])
    if keep_time:
        os.utime(path, ns=times)


def encoded_again(before: dict[str, int], folder: Path) -> list[str]:
    return sorted(name for name, time in written(folder).items() if before.get(name) != time)


def test_a_replaced_video_is_encoded_again(options, tiny, tmp_path, monkeypatch, capsys):
    """And the latents are those of the new one; the old ones are kept aside."""
    run(monkeypatch, options)
    first, video = written(tmp_path / "out"), tmp_path / "videos/Box/v_Box_g01_c02.mp4"
    replace_video(video)
    run(monkeypatch, options)
    assert encoded_again(first, tmp_path / "out") == ["Box/v_Box_g01_c02.mp4.safetensors"]
    assert (
        "1 videos have changed and were encoded again (by size and time; --compare-content" in capsys.readouterr().out
    )
    assert (tmp_path / "out/.dropped/Box/v_Box_g01_c02.mp4.safetensors").exists()
    frames = read_video(video, range)
    with torch.no_grad():
        mean = LatentCodec.from_pretrained(tiny.parent / "vae").moments(square(frames, 32, False)[:, None])[0]
    moments = load_file(tmp_path / "out/Box/v_Box_g01_c02.mp4.safetensors")["moments"]
    torch.testing.assert_close(moments[:, :1, :4].float(), mean, rtol=2e-3, atol=2e-3)


def test_content_is_compared_where_asked(options, tmp_path, monkeypatch, capsys):
    """A copy with another time is the same video. Other bytes of its size and time are another, here a broken one."""
    run(monkeypatch, options)
    first, (one, two) = written(tmp_path / "out"), sorted((tmp_path / "videos/Box").iterdir())
    os.utime(one, (1, 1))
    for flags, number in (([], 2), (["--compare-content"], 3)):
        run(monkeypatch, options, "--dry-run", *flags)
        assert f"videos: 4 in {tmp_path}/videos, {number} of them encoded before" in capsys.readouterr().out
    replace_video(two, keep_time=True)
    monkeypatch.setattr(program, "file_hash", file_hash.__wrapped__)  # the next run is another process
    run(monkeypatch, options, "--compare-content", "max_bad_fraction=0.5")
    assert encoded_again(first, tmp_path / "out") == []
    assert written(tmp_path / "out").keys() == first.keys() - {f"Box/{two.name}.safetensors"}
    out = capsys.readouterr().out
    assert f"1 videos have changed and were encoded again: {two}" in out and "4 videos, 2 skipped" in out


def test_a_video_touched_after_encoding_by_an_earlier_version_is_encoded_again(options, tmp_path, monkeypatch):
    """Such files hold no facts about their video: their own time decides."""
    run(monkeypatch, options)
    first = sorted((tmp_path / "out").rglob("*.safetensors"))
    for path in first:
        save_file(load_file(path), path)  # without the facts
    times = written(tmp_path / "out")
    os.utime(tmp_path / "videos/City/v_City_g01_c01.mp4", (time.time() + 9, time.time() + 9))
    run(monkeypatch, options)
    assert encoded_again(times, tmp_path / "out") == ["City/v_City_g01_c01.mp4.safetensors"]


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b""])
def test_damaged_latents_are_encoded_again(options, tmp_path, monkeypatch, damage):
    run(monkeypatch, options)
    path = tmp_path / "out/City/v_City_g01_c01.mp4.safetensors"
    whole = load_file(path)["moments"].clone()  # loaded, it lies in the file
    path.write_bytes(damage(path.read_bytes()))
    run(monkeypatch, options)
    assert torch.equal(load_file(path)["moments"], whole)


def test_latents_of_deleted_videos_and_renamed_classes_are_dropped(options, tmp_path, monkeypatch, capsys):
    """A folder without latents would count as a class."""
    run(monkeypatch, options)
    (tmp_path / "videos/Box/v_Box_g01_c02.mp4").unlink()
    (tmp_path / "videos/City").rename(tmp_path / "videos/Town")
    run(monkeypatch, options, "max_bad_fraction=0.5")
    names = {"Box/v_Box_g01_c01.mp4.safetensors", "Town/v_City_g01_c01.mp4.safetensors"}
    assert written(tmp_path / "out").keys() == names
    assert class_folders(tmp_path / "out") == ["Box", "Town"]
    out = capsys.readouterr().out
    assert "the classes have changed: City gone; Town new; label 1 was City, is Town" in out
    assert f"moved 2 latents whose videos are gone to {tmp_path}/out/.dropped: " in out
    assert len(list((tmp_path / "out/.dropped").rglob("*.safetensors"))) == 2


def test_latents_stay_where_videos_cannot_be_seen(options, tmp_path, monkeypatch, capsys):
    """A folder that cannot be read, a path to other videos: nothing is dropped."""
    run(monkeypatch, options)
    first, scandir = written(tmp_path / "out"), os.scandir

    def failing(path):
        if Path(path) == tmp_path / "videos/City":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr("os.scandir", failing)
        run(patch, options)
    assert written(tmp_path / "out") == first
    assert "kept 1 latents without video, as not all of" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    for name in ("Cup", "Tree"):
        (tmp_path / "other" / name).mkdir()
        shutil.copy(ROOT / f"datasets/demo/train/{name}/v_{name}_g01_c01.mp4", tmp_path / "other" / name)
    with pytest.raises(UserError, match=r"^latents_path: .*/out holds latents of other videos than .*/other$"):
        run(monkeypatch, options, f"data_path={tmp_path}/other")
    assert written(tmp_path / "out") == first


def test_folders_of_frames_are_encoded_again_when_an_image_changes(tiny, tmp_path, monkeypatch, capsys):
    for name in ("a", "b"):
        (tmp_path / "frames" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / "frames" / name / f"{i}.png")
    options = [f"data_path={tmp_path}/frames", f"latents_path={tmp_path}/out", f"pretrained_model_path={tiny.parent}"]
    options += ["dataset=frame_folder", "image_size=32"]
    run(monkeypatch, options)
    first = written(tmp_path / "out")
    (tmp_path / "frames/a/.DS_Store").write_text("of macOS")
    Image.new("RGB", (32, 32), (0, 99, 0)).save(tmp_path / "frames/b/2.png")
    run(monkeypatch, options)
    assert encoded_again(first, tmp_path / "out") == ["b.safetensors"]


def test_dry_run_says_what_would_run_and_writes_nothing(options, tmp_path, monkeypatch, capsys):
    run(monkeypatch, options, "--dry-run")
    videos, latents, vae, *yaml = capsys.readouterr().out.splitlines()
    assert videos == f"# videos: 4 in {tmp_path}/videos, 0 of them encoded before, processes: 1"
    assert latents == f"# latents: of frames at 32 x 32, in {tmp_path}/out" and "image_size: 32" in yaml
    assert vae == "# vae: AutoencoderKL, 16 frames of 32 x 32 -> latents 16 x 4 x 4 x 4"
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


@pytest.mark.parametrize(
    "change", ["image_size=64", "horizontal_flip=false", "vae_tiling=true", "pretrained_model_path=pretrained/demo"]
)
def test_a_folder_holds_latents_of_one_kind(options, tmp_path, monkeypatch, change):
    monkeypatch.chdir(ROOT)
    run(monkeypatch, options)
    record = (tmp_path / "out/latents.json").read_text()
    with pytest.raises(UserError, match=r"out was made with \w+=\S+, not .*; choose another folder, or remove it$"):
        run(monkeypatch, options, change)
    assert (tmp_path / "out/latents.json").read_text() == record


def test_a_record_of_before_vae_tiling_was_recorded_fits_either(options, tmp_path, monkeypatch):
    run(monkeypatch, options)
    record = json.loads((tmp_path / "out/latents.json").read_text())
    assert record.pop("vae_tiling") is False
    for change in ("vae_tiling=true", "vae_tiling=false"):
        (tmp_path / "out/latents.json").write_text(json.dumps(record))
        first = written(tmp_path / "out")
        run(monkeypatch, options, change)
        get_dataset(load_config(TrainConfig, None, [*options, change]))
        assert written(tmp_path / "out") == first


def test_videos_that_are_shorter_than_a_clip_are_named(options, tmp_path, monkeypatch, capsys):
    """They are encoded all the same; the option says what training does with them."""
    for short_clips, use in (("spread", "uses them whole"), ("skip", "leaves them out")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        run(monkeypatch, options, "num_frames=5", "frame_interval=5", f"short_clips={short_clips}")
        assert f"training {use} (short_clips): 3 videos below 25 frames: {tmp_path}" in capsys.readouterr().out
        assert len(written(tmp_path / "out")) == 3


def test_two_processes_share_the_videos_and_name_the_broken_one_when_the_rest_is_done(options, tmp_path):
    """An error, as it is more than the tenth that is allowed; each file is written once."""
    command = [*TORCHRUN, program.__file__, *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "4 videos, 1 skipped" in done.stdout  # torchrun's own code
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "1 of 4 videos failed, max_bad_fraction=0.1: " in lines[0] and "broken.mp4" in lines[0]
    assert len(written(tmp_path / "out")) == 3 and json.loads((tmp_path / "out/latents.json").read_text())["encoder"]
