"""tools/convert_videos_to_frames.py: the frames and the list that it writes are what the data sets read."""

import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from configs import ROOT, TrainConfig, UserError
from datasets import get_dataset
from datasets.clips import find_frame_folders
from datasets.joint import read_frame_list
from datasets.readers import read_frame_folder, read_video
from tools import convert_videos_to_frames

DEMO = ROOT / "datasets" / "demo" / "train"
CLASSES = ("Box", "City")


def convert(*arguments: str) -> None:
    sys.argv = ["convert_videos_to_frames.py", "num_workers=0", *arguments]
    convert_videos_to_frames.main()


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])


@pytest.fixture
def videos(tmp_path) -> Path:
    """Two classes of two real clips, 24 frames of 96 x 72 at 12 fps each."""
    for name in CLASSES:
        (tmp_path / "videos" / name).mkdir(parents=True)
        for number in (1, 2):
            shutil.copy(DEMO / name / f"v_{name}_g01_c0{number}.mp4", tmp_path / "videos" / name)
    return tmp_path / "videos"


def numbers_of_frames(root: Path) -> list[int]:
    return [len(list(folder.iterdir())) for folder in find_frame_folders(root)]


def ffmpeg(source: Path, target: Path, *options: str, before: tuple[str, ...] = ()) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([get_ffmpeg_exe(), "-v", "error", *before, "-i", source, *options, target], check=True)
    return target


def dataset(kind: str, root: Path, **changes) -> torch.utils.data.Dataset:
    values = dict(dataset=kind, data_path=str(root), num_frames=8, frame_interval=2, image_size=32, num_classes=2)
    values |= dict(global_seed=7, video_reader="decord", video_index_path=None, max_bad_fraction=0.0)
    return get_dataset(TrainConfig(**(values | changes)))


# Videos to frames


@pytest.mark.parametrize("size", ["null", "32"])
def test_frames_train_exactly_as_their_videos(videos, tmp_path, size):
    """Clips, labels and pixels of frame_folder are those of video_folder, cut to size before or by the loader."""
    convert(f"data_path={videos}", f"frame_data_path={tmp_path}/frames", f"image_size={size}", "frame_format=png")
    one, other = dataset("video_folder", videos), dataset("frame_folder", tmp_path / "frames")
    assert len(one) == len(other) == 4
    for index in range(4):
        assert torch.equal(one[index]["video"], other[index]["video"]) and other[index]["skipped"] == []
        assert one[index]["label"] == other[index]["label"] == index // 2
        assert Path(other[index]["name"]).name == Path(one[index]["name"]).stem


def test_jpg_frames_differ_from_the_video_as_little_as_their_quality_says(videos, tmp_path):
    """The layout of taichi and sky: no classes."""
    errors = []
    for quality in (95, 20):
        frames = tmp_path / f"frames{quality}"
        convert(f"data_path={videos}", f"frame_data_path={frames}", "image_size=32", f"quality={quality}")
        one, other = dataset("video_folder", videos, num_classes=None), dataset("sky", frames, num_classes=None)
        errors.append(max((one[i]["video"].float() - other[i]["video"]).abs().mean().item() for i in range(4)))
    assert 0 < errors[0] < 4 and errors[1] > 2 * errors[0]


FORMATS = {  # name -> how ffmpeg makes it: options before and behind the input
    "a.mkv": ((), ("-c", "copy")),
    "mpeg4_b.avi": ((), ("-c:v", "mpeg4", "-bf", "2")),
    "mjpeg.AVI": ((), ("-c:v", "mjpeg", "-q:v", "2")),
    "a.mpg": ((), ("-c:v", "mpeg2video", "-r", "24")),
    "vp9.webm": ((), ("-c:v", "libvpx-vp9", "-cpu-used", "8")),
    "a.gif": ((), ()),
    "turned.mp4": (("-display_rotation", "90"), ("-c", "copy")),
    "cut.mp4": (("-ss", "0.5"), ("-c", "copy")),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_the_frames_that_the_video_reader_finds(tmp_path, name):
    """All of them, also of a file that lies deep, stands on its side or hides frames behind an edit list."""
    before, options = FORMATS[name]
    video = ffmpeg(DEMO / "Globe" / "v_Globe_g01_c01.mp4", tmp_path / "in" / "x" / "y" / name, *options, before=before)
    convert(f"data_path={tmp_path}/in", f"frame_data_path={tmp_path}/out", "frame_format=png")
    folder = tmp_path / "out" / "x" / "y" / Path(name).stem
    expected = read_video(video, range)
    assert torch.equal(read_frame_folder(folder, range), expected) and len(expected) >= 12
    assert sorted(path.name for path in folder.iterdir()) == [f"{i:06d}.png" for i in range(len(expected))]


@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".mp4", ()), (".mkv", ("-c", "copy")), (".gif", ()), (".avi", ("-c:v", "libx264", "-bf", "3"))],
)
def test_fps_and_stride_choose_frames_by_their_time(tmp_path, suffix, options):
    """At 12 fps; the times in .mkv are rounded to 0.001 s, those in .gif to 0.01 s, those in .avi are out of order."""
    video = ffmpeg(DEMO / "Globe" / "v_Globe_g01_c01.mp4", tmp_path / "in" / f"clip{suffix}", *options)
    every = read_video(video, range)
    chosen = {
        "stride=5": [0, 5, 10, 15, 20],
        "fps=12": list(range(24)),
        "fps=4": list(range(0, 24, 3)),
        "fps=5": [0, 3, 5, 8, 10, 12, 15, 17, 20, 22],  # the first frame at or after each fifth of a second
        "fps=24": [0, *np.repeat(range(1, 24), 2)],
    }
    for option, indices in chosen.items():
        out = tmp_path / option
        convert(f"data_path={tmp_path}/in", f"frame_data_path={out}", option, "frame_format=png")
        assert torch.equal(read_frame_folder(out / "clip", range), every[indices]), option
    both = tmp_path / "both"
    convert(f"data_path={tmp_path}/in", f"frame_data_path={both}", "fps=4", "stride=3", "frame_format=png")
    assert torch.equal(read_frame_folder(both / "clip", range), every[[0, 9, 18]])


def test_the_same_command_again_does_what_is_missing_and_no_more(videos, tmp_path, capsys):
    arguments = f"data_path={videos}", f"frame_data_path={tmp_path}/frames"
    convert(*arguments)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "frames").rglob("*.jpg")}
    shutil.copy(videos / "Box" / "v_Box_g01_c01.mp4", videos / "City" / "new.mp4")
    convert(*arguments)
    assert capsys.readouterr().out.splitlines()[-1] == "1 videos converted, 4 before, 0 skipped"
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "frames").rglob("*.jpg")}
    assert len(written) == 96 and len(now) == 120 and written.items() < now.items()
    with pytest.raises(UserError, match=r"frame_data_path: .* was made with stride=1, not 2; choose another"):
        convert(*arguments, "stride=2")


def test_a_killed_run_leaves_whole_folders_only_and_the_next_completes_it(videos, tmp_path, monkeypatch):
    """Killed with two of four videos done and a third half written."""
    arguments = f"data_path={videos}", f"frame_data_path={tmp_path}/frames"
    fork = multiprocessing.get_context("fork")
    saved, save, half_way = [], Image.Image.save, fork.Event()

    def save_until_half_way(image, path, **options):
        save(image, path, **options)
        saved.append(path)
        if len(saved) == 2 * 24 + 12:
            half_way.set()
            time.sleep(600)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_until_half_way)
        running = fork.Process(target=convert, args=arguments)
        running.start()
        assert half_way.wait(60)
        running.kill()
        running.join()
    assert numbers_of_frames(tmp_path / "frames") == [24, 24]
    assert numbers_of_frames(tmp_path / "frames.partial") == [12]
    convert(*arguments)
    assert numbers_of_frames(tmp_path / "frames") == [24] * 4 and not (tmp_path / "frames.partial").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_videos_are_named_once_and_too_many_are_an_error_after_the_rest(videos, tmp_path, capsys, workers):
    whole = (videos / "Box" / "v_Box_g01_c01.mp4").read_bytes()
    (videos / "Box" / "cut_off.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "City" / "text.avi").write_text("not a video")
    (videos / "City" / "hole.mp4").write_bytes(whole[:3000] + bytes([255]) * 3000 + whole[6000:])
    unknown = ffmpeg(videos / "Box" / "v_Box_g01_c01.mp4", videos / "unknown.avi", "-c:v", "mjpeg")
    unknown.write_bytes(unknown.read_bytes().replace(b"MJPG", b"ZZZZ"))
    ffmpeg(videos / "Box" / "v_Box_g01_c01.mp4", videos / "sound.mp4", "-f", "lavfi", "-i", "sine=d=1", "-map", "1")
    arguments = f"data_path={videos}", f"frame_data_path={tmp_path}/frames", f"num_workers={workers}"
    convert(*arguments, "max_bad_fraction=0.6")
    out = capsys.readouterr().out
    for name in ("cut_off.mp4", "text.avi", "hole.mp4", "sound.mp4", "unknown.avi"):
        assert out.count(name) == 1
    assert out.splitlines()[-1] == "4 videos converted, 0 before, 5 skipped"
    assert numbers_of_frames(tmp_path / "frames") == [24] * 4
    with pytest.raises(
        UserError, match=r"5 of 9 failed, max_bad_fraction=0.1: .*cut_off.mp4: InvalidDataError \("
    ) as raised:
        convert(*arguments)
    assert "\n" not in str(raised.value)


def test_a_frame_that_cannot_be_written_is_a_failure_and_leaves_nothing(videos, tmp_path, monkeypatch):
    """A disk that fills up in the middle of the second video."""
    saved, save = [], Image.Image.save

    def save_until_full(image, path, **options):
        saved.append(path)
        if len(saved) > 30:
            raise OSError(28, "No space left on device")
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", save_until_full)
    with pytest.raises(UserError, match=r"3 of 4 failed, .*v_Box_g01_c02.mp4: OSError \(No space left on device\)"):
        convert(f"data_path={videos}", f"frame_data_path={tmp_path}/frames")
    assert find_frame_folders(tmp_path) == [tmp_path / "frames" / "Box" / "v_Box_g01_c01"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frame_data_path=out"], "data_path is not set"),
        (["data_path={videos}"], "frame_data_path is not set: give the folder of the frames"),
        (["data_path={videos}/../empty", "frame_data_path=out"], "data_path: there are no video files under"),
        (["data_path=" + __file__, "frame_data_path=out"], "data_path: .* is a file, where a folder is needed"),
        (["data_path={videos}", "frame_data_path=out", "frame_format=gif"], "frame_format: 'gif' .*valid: jpg, png"),
        (["data_path={videos}", "frame_data_path=out", "fps=-3"], "fps: -3.0 is not above 0"),
        (["data_path={videos}", "frame_data_path=out", "stride=0"], "stride: 0 is less than 1"),
        (["data_path={videos}", "frame_data_path=out", "size=3"], "unknown key size"),
    ],
)
def test_wrong_options_are_one_line_and_nothing_is_written(videos, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as raised:
        convert(*(argument.format(videos=videos) for argument in arguments))
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("second", ["Box/v_Box_g01_c01.avi", "Box/v_Box_g01_c01/nested.mp4"])
def test_two_videos_that_would_share_a_folder_are_refused(videos, tmp_path, second):
    (videos / second).parent.mkdir(exist_ok=True)
    shutil.copy(videos / "Box" / "v_Box_g01_c01.mp4", videos / second)
    with pytest.raises(UserError, match=r"frames of .*v_Box_g01_c01.* and .*v_Box_g01_c01.* would mix; rename one"):
        convert(f"data_path={videos}", f"frame_data_path={tmp_path}/frames")


def test_a_dry_run_says_what_would_be_converted_and_writes_nothing(videos, tmp_path, capsys):
    convert(f"data_path={videos}", f"frame_data_path={tmp_path}/frames", "--dry-run")
    assert capsys.readouterr().out.startswith("# 4 videos, 4 to convert\n") and not (tmp_path / "frames").exists()


# The list of stills


def test_converted_and_listed_stills_train_with_their_classes(videos, tmp_path):
    """ucf101_img reads the list: every still is one of the listed frames and carries the label of its class."""
    frames, text = tmp_path / "frames", tmp_path / "lists" / "stills.txt"
    convert(f"data_path={videos}", f"frame_data_path={frames}", "image_size=32", "stride=8", f"frame_data_txt={text}")
    lines = text.read_text().splitlines()
    assert lines[:4] == [f"Box/v_Box_g01_c0{n}.jpg" for n in ("1/000000", "1/000001", "1/000002", "2/000000")]
    assert len(lines) == 12 and [path.name for path in text.parent.iterdir()] == ["stills.txt"]
    stills = dict(use_image_num=6, frame_data_path=str(frames), frame_data_txt=str(text), horizontal_flip=False)
    joint, clips = dataset("ucf101_img", videos, **stills), dataset("ucf101", videos, horizontal_flip=False)
    images = {np.asarray(Image.open(frames / line)).tobytes(): CLASSES.index(line.split("/")[0]) for line in lines}
    for index in range(4):
        item = joint[index]
        pixels = item["video"][8:].permute(0, 2, 3, 1).numpy()  # (K, S, S, 3)
        assert [images[still.tobytes()] for still in pixels] == item["image_labels"].tolist()
        assert torch.equal(item["video"][:8], clips[index]["video"]) and item["skipped"] == []


def test_a_list_holds_every_image_at_any_depth_in_the_order_of_its_number(tmp_path):
    latin = b"B\xe4r.png".decode("utf-8", "surrogateescape")  # a name that is not UTF-8
    names = ["a/f_2.png", "a/f_10.png", "a/deep/er/1.JPG", "b_1.webp", "a/notes.txt", "a/._f_2.png", f"c/{latin}"]
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).touch()
    convert(f"frame_data_path={tmp_path}/tree", f"frame_data_txt={tmp_path}/list.txt")
    expected = b"b_1.webp\na/f_2.png\na/f_10.png\na/deep/er/1.JPG\nc/B\xe4r.png\n"
    assert (tmp_path / "list.txt").read_bytes() == expected
    paths, labels = read_frame_list(tmp_path / "list.txt", tmp_path / "tree", None)
    assert all(path.exists() for path in paths) and labels == [0] * 5


def test_a_seed_names_an_order(tmp_path):
    """The same seed gives the same list, another seed another one, of the same lines."""
    for number in range(30):
        (tmp_path / f"{number}.jpg").touch()
    lists = []
    for seed in (0, 0, 1, "null"):
        convert(f"frame_data_path={tmp_path}", f"frame_data_txt={tmp_path}/list.txt", f"shuffle_seed={seed}")
        lists.append((tmp_path / "list.txt").read_text().splitlines())
    assert lists[0] == lists[1] and lists[0] != lists[2] and lists[3] == [f"{number}.jpg" for number in range(30)]
    assert sorted(lists[0]) == sorted(lists[2]) == sorted(lists[3]) and lists[0] != lists[3] != lists[2]


def test_an_unusable_request_for_a_list_leaves_the_old_one(tmp_path):
    (tmp_path / "list.txt").write_text("old")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="frame_data_path: there are no images under"):
        convert(f"frame_data_path={tmp_path}/empty", f"frame_data_txt={tmp_path}/list.txt")
    with pytest.raises(UserError, match="data_path: there are no video files under"):
        convert(f"data_path={tmp_path}/empty", f"frame_data_path={tmp_path}", f"frame_data_txt={tmp_path}/list.txt")
    assert (tmp_path / "list.txt").read_text() == "old"
