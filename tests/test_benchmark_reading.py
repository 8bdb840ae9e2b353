"""The reading benchmark measures what training reads."""

import json
import shutil
import subprocess

import av
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from configs import ROOT, UserError
from datasets.readers import read_video
from tools import benchmark, encode_latents
from tools.benchmarks import reading

FAST = ["num_frames=4", "image_size=16", "local_batch_size=2"]


def run(monkeypatch, *args: object) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark.py", "reading", *map(str, args)])
    benchmark.main()


def test_every_way_is_timed_on_every_kind_of_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(reading, "NUM_FRAMES", 30)
    run(monkeypatch, *FAST, "files=2", "epochs=1", f"output={tmp_path}/reading.json")
    report = json.loads((tmp_path / "reading.json").read_text())
    kinds = [f".{suffix}, a keyframe every {n}: " for suffix in ("avi", "mp4") for n in (12, 250)]
    assert list(report["ways"]) == [kind + way for kind in kinds for way in ("whole files", "pyav", "decord")]
    assert all(way["clips_per_second"] > 0 for way in report["ways"].values())
    assert all(report["ways"][f"{kind}whole files"]["speedup"] == 1 for kind in kinds)
    assert "a keyframe every 250" in capsys.readouterr().out


def test_encoded_latents_are_timed_beside_their_pixels(monkeypatch, tiny, tmp_path):
    (tmp_path / "videos").mkdir()
    for clip in sorted((ROOT / "datasets/demo/train/Box").iterdir())[:2]:
        shutil.copy(clip, tmp_path / "videos")
    cfg = dict(dataset="video_folder", data_path=tmp_path / "videos", latents_path=tmp_path / "latents")
    cfg |= dict(pretrained_model_path=tiny.parent, frame_interval=1, num_frames=4, image_size=16, local_batch_size=2)
    (tmp_path / "train.yaml").write_text("".join(f"{key}: {value}\n" for key, value in cfg.items()))
    monkeypatch.setattr("sys.argv", ["encode_latents.py", "--config", str(tmp_path / "train.yaml")])
    encode_latents.main()
    run(monkeypatch, "--config", tmp_path / "train.yaml", "epochs=1", f"output={tmp_path}/reading.json")
    ways = json.loads((tmp_path / "reading.json").read_text())["ways"]
    assert list(ways) == ["whole files", "pyav", "decord", "pixels + VAE", "latents"]
    assert all(way["clips_per_second"] > 0 for way in ways.values())


@pytest.mark.parametrize("interval, keyframes", [(12, [0, 12, 24]), (250, [0])])
@pytest.mark.parametrize("suffix", ["avi", "mp4"])
def test_the_files_are_as_said_and_whole_files_read_alike(tmp_path, monkeypatch, suffix, interval, keyframes):
    monkeypatch.setattr(reading, "NUM_FRAMES", 30)
    reading.make_videos(tmp_path, suffix, interval, 1)
    path = tmp_path / f"0.{suffix}"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (320, 240)
        packets = sorted((p.pts, p.is_keyframe) for p in container.demux(stream) if p.size)
    assert len(packets) == 30
    assert set(keyframes) <= {i for i, (_, is_keyframe) in enumerate(packets) if is_keyframe}
    for fps in (None, 10):
        wanted = read_video(path, lambda n: [3, 9, n - 1], fps=fps)
        assert torch.equal(reading.read_whole(path, lambda n: [3, 9, n - 1], fps), wanted)


def test_videos_of_any_kind_and_rate_are_timed(monkeypatch, tmp_path):
    """One that is turned, one that is broken, and frames by time."""
    clip, videos = ROOT / "datasets/demo/train/Box/v_Box_g01_c01.mp4", tmp_path / "videos"
    videos.mkdir()
    command = [get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", clip, "-c", "copy", videos / "a.mp4"]
    subprocess.run(command, check=True)
    (videos / "b.mp4").write_text("not a video")
    run(
        monkeypatch, *FAST, "epochs=1", f"data_path={videos}", "dataset=ffs", "num_classes=", "fps=5",
        "frame_interval=1", "max_bad_fraction=0.9", f"output={tmp_path}/reading.json",
    )  # fmt: skip
    assert list(json.loads((tmp_path / "reading.json").read_text())["ways"]) == ["whole files", "pyav", "decord"]


def test_a_data_set_that_is_not_there_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="data_path: nothing at /nowhere"):
        run(monkeypatch, "--config", ROOT / "configs/ucf101/ucf101_train.yaml", "data_path=/nowhere")
