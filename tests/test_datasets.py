"""The training data: which frames a clip holds, what becomes of broken files, the eight layouts, and determinism."""

import errno
import json
import logging
import os
import re
import subprocess
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import closed_to_us
from PIL import Image
from safetensors.torch import save_file

from configs import ROOT, TrainConfig, UserError
from datasets import SOURCES, ClipSampler, class_changes, class_index, class_names, get_dataset, load_batches
from datasets.clips import ClipDataset, class_folders, find_frame_folders, temporal_crop
from datasets.readers import BadClip, natural_order, read_frame_folder, read_image, read_video
from datasets.transforms import square

DEMO = ROOT / "datasets" / "demo"
SIZE, NUM_FRAMES, STILLS = 24, 8, 2


def decode(path: Path) -> np.ndarray:
    """Every frame of a video file in order, (T, H, W, 3) uint8, by plain decoding."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_video(path: Path, frames: np.ndarray, codec: str, options: dict[str, str] | None = None, b_frames: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, b_frames
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_frames(folder: Path, frames: np.ndarray, pattern: str):
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / pattern.format(i))


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """Real clips, (24, 72, 96, 3) each."""
    return [decode(DEMO / "train" / name / f"v_{name}_g01_c01.mp4") for name in ("Box", "City", "Globe", "Tree")]


@pytest.fixture(scope="module")
def video_tree(tmp_path_factory, clips) -> Path:
    """Two classes of .avi and .mp4, broken files among them: truncated, empty, text, and a clip of five frames."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "Archery" / "v_Archery_g01_c01.avi", clips[0], "mpeg4")
    write_video(root / "Archery" / "v_Archery_g01_c02.mp4", clips[1], "libx264")
    write_video(root / "HandstandPushups" / "v_HandStandPushups_g01_c01.AVI", clips[2], "mjpeg")
    write_video(root / "HandstandPushups" / "deeper" / "v_HandStandPushups_g01_c02.mp4", clips[3], "libx264")
    whole = (DEMO / "train" / "Box" / "v_Box_g01_c01.mp4").read_bytes()
    (root / "Archery" / "bad_truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "Archery" / "bad_empty.mp4").write_bytes(b"")
    (root / "HandstandPushups" / "bad_text.avi").write_text("not a video")
    (root / "HandstandPushups" / "bad_text.mp4").write_text("not a video")
    write_video(root / "HandstandPushups" / "bad_short.mp4", clips[0][:5], "libx264")
    (root / "Archery" / "readme.txt").write_text("ignored")
    return root


@pytest.fixture(scope="module")
def frame_tree(tmp_path_factory, clips) -> Path:
    """Frame folders at several depths, .jpg and .png, broken ones among them: truncated, empty, text, five frames."""
    root = tmp_path_factory.mktemp("frames")
    write_frames(root / "Archery" / "one" / "one_1", clips[0], "one_frame_{}.jpg")
    write_frames(root / "Archery" / "one" / "one_2", clips[1], "{:06d}.png")
    write_frames(root / "HandstandPushups" / "two", clips[2], "{}.jpg")
    write_frames(root / "HandstandPushups" / "bad_short", clips[3][:5], "{}.png")
    write_frames(root / "Archery" / "bad_truncated", clips[2], "{}.png")
    write_frames(root / "HandstandPushups" / "bad_truncated", clips[2], "{}.jpg")
    for path in root.rglob("bad_truncated/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name, content in (("bad_empty", b""), ("bad_text", b"not an image")):
        write_frames(root / "HandstandPushups" / name, clips[3], "{}.jpg")
        for path in (root / "HandstandPushups" / name).iterdir():
            path.write_bytes(content)
    return root


@pytest.fixture(scope="module")
def frame_list(tmp_path_factory, clips) -> Path:
    """A list file in UCF101's naming, an unreadable image among its lines; the images lie beside it."""
    root = tmp_path_factory.mktemp("stills")
    lines = []
    for name, frames in (("v_Archery_g01_c01", clips[0]), ("v_HandStandPushups_g01_c01", clips[2])):
        write_frames(root / name, frames[:3], "{:06d}.jpg")
        lines += [f"{name}/{i:06d}.jpg" for i in (1, 2, 3)]
    (root / "v_Archery_g01_c01" / "bad.jpg").write_bytes(b"")
    path = root / "list.txt"
    path.write_text("\n".join([*lines, "v_Archery_g01_c01/bad.jpg", ""]))
    return path


def options(dataset: str, root: Path, **changes) -> TrainConfig:
    values = dict(dataset=dataset, data_path=str(root), num_frames=NUM_FRAMES, frame_interval=2, image_size=SIZE)
    values |= dict(global_seed=7, max_bad_fraction=0.9, video_index_path=None)
    return TrainConfig(**(values | changes))


# Which frames


def test_long_videos_give_a_window_at_the_exact_stride_and_every_window_comes_up():
    starts = set()
    for seed in range(60):
        indices = temporal_crop(20, 8, 2, np.random.default_rng(seed))
        assert np.diff(indices).tolist() == [2] * 7 and indices[-1] < 20
        starts.add(indices[0])
    assert starts == {0, 1, 2, 3, 4}


def test_short_videos_are_spread_evenly_and_shorter_ones_refused():
    rng = np.random.default_rng(0)
    assert temporal_crop(15, 8, 2, rng) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert temporal_crop(11, 8, 2, rng) == np.linspace(0, 10, 8, dtype=int).tolist()
    assert temporal_crop(8, 8, 2, rng) == list(range(8))
    assert temporal_crop(1, 1, 3, rng) == [0]
    with pytest.raises(BadClip, match="7 frames, 8 needed"):
        temporal_crop(7, 8, 2, rng)


NUM_NUMBERED = 50
OPEN_GOP = "libx264 -bf 2 -b_strategy 0 -sc_threshold 0 -x264-params open-gop=1"
FILES = {  # name -> its encoder
    "xvid.avi": "mpeg4 -vtag xvid",
    "xvid_b.avi": "mpeg4 -vtag xvid -bf 2",
    "xvid_packed.avi": "mpeg4 -vtag xvid -bf 2",
    "mpeg2_b.avi": "mpeg2video -bf 2",
    "mjpeg.avi": "mjpeg",
    "h264.avi": "libx264 -bf 0",
    "h264_b.avi": "libx264 -bf 3",
    "h264.mp4": "libx264 -bf 0",
    "h264_b.mp4": "libx264 -bf 3",
    "h264_b.mkv": "libx264 -bf 3",
    "open_gop.mp4": OPEN_GOP,
    "open_gop.mkv": OPEN_GOP,
    "open_gop.avi": OPEN_GOP,
    "mpeg1.mpg": "mpeg1video -bf 2",
    "h264.ts": "libx264 -bf 3",
}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    """`FILES` of frames that show their own numbers as six bars, a bit each; keyframes are 12 frames apart."""
    root = tmp_path_factory.mktemp("numbered")
    bits = (np.arange(NUM_NUMBERED)[:, None] >> np.arange(6)) & 1  # (T, 6)
    frames = np.kron(bits[:, None, :, None], np.full((1, 48, 16, 3), 200, np.uint8)).astype(np.uint8) + 25
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "96x48", "-r", "25", "-i", "-"]
    for name, encoder in FILES.items():
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *raw, "-c:v", *encoder.split(), "-g", "12"]
        command += ["-pix_fmt", "yuvj420p" if encoder == "mjpeg" else "yuv420p", str(root / name)]
        subprocess.run(command, input=frames.tobytes(), check=True, stderr=subprocess.DEVNULL)
    pack_b_frames(root / "xvid_packed.avi")
    return root


def pack_b_frames(path: Path):
    """Rewrite an MPEG-4 .avi as DivX and Xvid do: the first B-frame lies in the packet of the frame before it."""
    with av.open(str(path)) as source:
        video = source.streams.video[0]
        packets = [(bytes(packet), packet.is_keyframe) for packet in source.demux(video) if packet.size]
        packed = []
        for data, is_keyframe in packets:
            is_b = data[data.index(VOP) + 4] >> 6 == 2
            if is_b and packed and packed[-1][2] == "anchor":
                packed[-1] = (packed[-1][0] + data, packed[-1][1], "packed")
                packed.append((NOT_CODED, False, "filler"))
            elif is_b:
                packed.insert(-1, (data, False, "b"))
            else:
                packed.append((data, is_keyframe, "anchor"))
        with av.open(str(path.with_suffix(".new.avi")), "w") as target:
            stream = target.add_stream_from_template(video)
            for i, (data, is_keyframe, _) in enumerate(packed):
                if i == 0:
                    data = data.replace(VOP, USER_DATA + b"DivX503b1393p" + VOP, 1)
                packet = av.Packet(data)
                packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, i, i, is_keyframe
                target.mux(packet)
    path.with_suffix(".new.avi").rename(path)


VOP, USER_DATA = b"\0\0\1\xb6", b"\0\0\1\xb2"  # start codes of MPEG-4
NOT_CODED = VOP + bytes([0b01010000, 0b01011111])  # a frame that repeats the one before it


def shown_numbers(frames: torch.Tensor) -> list[int]:
    """The numbers that frames (F, 3, 48, 96) of `numbered` show."""
    bars = frames.float().mean(dim=(1, 2)).unflatten(1, (6, 16))[:, :, 4:12].mean(dim=2) > 125  # (F, 6)
    return (bars * 2 ** torch.arange(6)).sum(dim=1).tolist()


@pytest.mark.parametrize("reader", ["pyav", "decord"])
@pytest.mark.parametrize("name", FILES)
def test_the_frames_read_are_those_of_the_source_bit_for_bit_as_fully_decoded(numbered, name, reader):
    """Every frame alone, strided windows, strides beyond a group of pictures, the whole: of every kind of file."""
    alone = range(NUM_NUMBERED) if reader == "pyav" else [0, 11, 12, 13, 47, 48, 49]
    every = torch.from_numpy(decode(numbered / name)).permute(0, 3, 1, 2)
    assert shown_numbers(every) == list(range(NUM_NUMBERED))
    windows = [[i] for i in alone] + [list(range(i, i + 22, 3)) for i in range(0, 28, 5)]
    for indices in [*windows, [3, 20, 49], [0, 1, 25], list(range(NUM_NUMBERED))]:
        totals = []
        frames = read_video(
            numbered / name, lambda n, indices=indices, totals=totals: totals.append(n) or indices, reader
        )
        assert torch.equal(frames, every[indices]), indices
        assert totals == [NUM_NUMBERED]


def test_frames_cut_off_by_an_edit_list_do_not_count(tmp_path, clips):
    """`ffmpeg -ss ... -c copy` keeps the frames back to the keyframe and hides them; they are no part of the video."""
    write_video(tmp_path / "whole.mp4", np.concatenate([clips[1], clips[1][::-1]]), "libx264")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-ss", "1.5", "-i", "whole.mp4", "-c", "copy", "cut.mp4"]
    subprocess.run(command, cwd=tmp_path, check=True)
    every = decode(tmp_path / "cut.mp4")
    assert len(every) < 48 - 12
    frames = read_video(tmp_path / "cut.mp4", lambda total: [0, 7, total - 1])
    assert torch.equal(frames, torch.from_numpy(every[[0, 7, len(every) - 1]]).permute(0, 3, 1, 2))


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_a_video_filmed_with_the_camera_turned_stands_upright(tmp_path, clips, reader):
    write_video(tmp_path / "lying.mp4", clips[1], "libx264")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90", "-i", "lying.mp4"]
    subprocess.run([*command, "-c", "copy", "turned.mp4"], cwd=tmp_path, check=True)
    upright = np.rot90(decode(tmp_path / "turned.mp4"), axes=(1, 2))
    frames = read_video(tmp_path / "turned.mp4", lambda total: range(total), reader)
    assert torch.equal(frames, torch.from_numpy(upright.copy()).permute(0, 3, 1, 2))


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_only_the_neighbourhood_of_the_frames_is_decoded(tmp_path, clips, reader):
    """With all but the first keyframe and the middle group of pictures overwritten, only the middle reads."""
    path = tmp_path / "clip.mp4"
    write_video(path, np.concatenate([clips[1], clips[1][::-1]]), "libx264", {"sc_threshold": "0"})
    every = decode(path)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for position, size in places[1:24] + places[36:]:
        data[position : position + size] = bytes([255]) * size
    path.write_bytes(data)
    frames = read_video(path, lambda total: [25, 30, 33], reader)
    assert torch.equal(frames, torch.from_numpy(every[[25, 30, 33]]).permute(0, 3, 1, 2))
    with pytest.raises(BadClip, match="does not decode"):
        read_video(path, lambda total: [2, 5], reader)


def test_frame_folders_are_read_in_the_order_of_their_numbers(tmp_path):
    """frame_9 comes before frame_10, and a name without a number is no accident."""
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(tmp_path / f"frame_{i}.png")
    frames = read_frame_folder(tmp_path, lambda total: range(total))
    assert frames[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]
    assert sorted(["b_2", "cover", "b_10", "b_1"], key=natural_order) == ["b_1", "b_2", "b_10", "cover"]


# Transforms


@pytest.mark.parametrize("height, width", [(237, 320), (239, 100), (374, 500), (72, 96), (24, 24), (9, 300)])
def test_any_size_becomes_a_square_without_distortion(height, width):
    """A horizontal ramp keeps its slope relative to the short edge: resized, then cropped at the centre."""
    ramp = torch.linspace(0, 255, width).round().to(torch.uint8).expand(2, 3, height, width)
    out = square(ramp, 24, flip=False)
    assert out.shape == (2, 3, 24, 24) and out.dtype == torch.uint8
    out = out / 127.5 - 1
    slope = (out[0, 0, 12, 18] - out[0, 0, 12, 6]).item() / 12  # per pixel of the output
    assert slope == pytest.approx(2 / width * min(height, width) / 24, abs=0.01)
    assert out.mean().item() == pytest.approx(0, abs=0.05)


def test_a_flip_mirrors_all_frames_of_a_clip_or_none(clips):
    """The source's flag decides whether there are flips at all; half of the clips get one, whole."""
    video = torch.from_numpy(clips[1]).permute(0, 3, 1, 2)
    make = partial(ClipDataset, [Path("a")], [0], lambda path, choose: video[list(choose(24))], 24, 1, SIZE, seed=0)
    plain, mirrored = square(video, SIZE, False), square(video, SIZE, True)
    items = [make(flip=True)[epoch, 0]["video"] for epoch in range(40)]
    flips = [torch.equal(item, mirrored) for item in items]
    assert all(flip or torch.equal(item, plain) for flip, item in zip(flips, items, strict=True))
    assert 10 <= sum(flips) <= 30
    assert all(torch.equal(make(flip=False)[epoch, 0]["video"], plain) for epoch in range(10))


# The eight data sets, and a user's own


@pytest.mark.parametrize("name", SOURCES)
def test_every_data_set_reads_its_layout_and_skips_broken_files(name, request):
    """Items have the promised shapes and labels; a broken file is replaced by a good one and named with its reason."""
    files = SOURCES[name].files
    root = request.getfixturevalue("video_tree" if files == "video" else "frame_tree")
    stills = STILLS if name.endswith("_img") else 0
    classes = 2 if SOURCES[name].has_classes else None
    dataset = get_dataset(options(name, root, use_image_num=stills, num_classes=classes))
    assert len(dataset) == (9 if files == "video" else 8)
    skipped = set()
    for index in range(len(dataset)):
        item = dataset[index]
        assert item["video"].shape == (NUM_FRAMES + stills, 3, SIZE, SIZE) and item["video"].dtype == torch.uint8
        assert item["video"].float().std() > 6
        assert "bad" not in item["name"] and Path(item["name"]).exists()
        assert item["label"] == (1 if classes and "HandstandPushups" in item["name"] else 0)
        if stills:
            assert item["image_labels"].shape == (stills,) and item["image_labels"].dtype == torch.int64
        skipped |= set(item["skipped"])
    reasons = {Path(text.split(": ")[0]).name: text.split(": ")[1] for text in skipped}
    short = "bad_short.mp4" if files == "video" else "bad_short"
    assert reasons.pop(short) == "5 frames, 8 needed"
    if files == "video":
        assert reasons.keys() == {"bad_truncated.mp4", "bad_empty.mp4", "bad_text.avi", "bad_text.mp4"}
    else:
        assert reasons.keys() == {"bad_truncated", "bad_empty", "bad_text"}
    assert all(("does not decode" if files == "video" else "is not an image") in reason for reason in reasons.values())


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_a_codec_that_ffmpeg_does_not_know_is_a_bad_clip(tmp_path, clips, reader):
    write_video(tmp_path / "a.avi", clips[0], "mjpeg")
    (tmp_path / "a.avi").write_bytes((tmp_path / "a.avi").read_bytes().replace(b"MJPG", b"ZZZZ"))
    with pytest.raises(BadClip, match="does not know its codec"):
        read_video(tmp_path / "a.avi", range, reader)


def test_a_frame_folder_that_is_gone_is_a_bad_clip(tmp_path):
    with pytest.raises(BadClip, match=r"cannot be read \(FileNotFoundError"):
        read_frame_folder(tmp_path / "gone", range)


def test_sky_alone_is_never_mirrored():
    """Of the published data sets; a user's own clips are not either, as nobody knows whether mirroring is right."""
    assert {name for name, source in SOURCES.items() if not source.flip} == {
        "sky",
        "sky_img",
        "video_folder",
        "frame_folder",
    }


def test_stills_of_a_list_carry_its_classes_and_follow_the_clip(video_tree, frame_list):
    """A class is found in any case of letters (v_HandStandPushups in HandstandPushups); clips are as without stills."""
    stills = dict(use_image_num=STILLS, frame_data_path=str(frame_list.parent), frame_data_txt=str(frame_list))
    dataset = get_dataset(options("ucf101_img", video_tree, num_classes=2, **stills))
    alone = get_dataset(options("ucf101", video_tree, num_classes=2))
    image_labels = {}  # every listed image as the model sees it, plain and mirrored -> its class
    for label, name in enumerate(["v_Archery_g01_c01", "v_HandStandPushups_g01_c01"]):
        for path in (frame_list.parent / name).glob("0*.jpg"):
            for flip in (False, True):
                image_labels[square(read_image(path), SIZE, flip).numpy().tobytes()] = label
    skipped, labels = [], []
    for epoch in range(20):
        item = dataset[epoch, 0]
        assert torch.equal(item["video"][:NUM_FRAMES], alone[epoch, 0]["video"])
        found = [image_labels[still.numpy().tobytes()] for still in item["video"][NUM_FRAMES:]]
        assert found == item["image_labels"].tolist()
        skipped, labels = skipped + item["skipped"], labels + found
    assert set(labels) == {0, 1}
    assert any("bad.jpg" in text for text in skipped)


def test_stills_without_a_list_are_frames_of_the_clips(video_tree):
    """Short clips serve as stills too, and labels are those of the clips the stills come from."""
    dataset = get_dataset(options("ucf101_img", video_tree, num_classes=2, use_image_num=6, image_size=72))
    frames = {}
    for path in video_tree.rglob("*.*"):
        if path.suffix in {".avi", ".AVI", ".mp4"} and (path.stem == "bad_short" or "bad" not in path.name):
            for frame in torch.from_numpy(decode(path)).permute(0, 3, 1, 2):
                for flip in (False, True):
                    frames[square(frame, 72, flip).numpy().tobytes()] = int("HandstandPushups" in str(path))
    for index in range(3):
        item = dataset[index]
        assert [frames[s.numpy().tobytes()] for s in item["video"][NUM_FRAMES:]] == item["image_labels"].tolist()


def test_stills_of_encoded_clips_are_frames_of_their_latents(tmp_path):
    """A joint set trains from the latents of its clips' set."""
    moments = torch.rand(24, 2, 8, 3, 3).half()  # (N, V, 2C, h, w)
    save_file({"moments": moments}, tmp_path / "a.avi.safetensors")
    (tmp_path / "latents.json").write_text(json.dumps(dict(dataset="ffs", image_size=SIZE, horizontal_flip=None)))
    args = options("ffs_img", tmp_path, use_image_num=STILLS, latents_path=str(tmp_path))
    item = get_dataset(args)[0]
    assert item["video"].shape == (NUM_FRAMES + STILLS, 8, 3, 3) and item["image_labels"].tolist() == [0] * STILLS
    frames = {frame.numpy().tobytes() for frame in moments.flatten(0, 1)}
    assert all(frame.numpy().tobytes() in frames for frame in item["video"])
    args.frame_data_txt = str(tmp_path / "latents.json")
    with pytest.raises(UserError, match="frame_data_txt: with latents_path the stills are frames of the encoded clips"):
        get_dataset(args)


@pytest.mark.parametrize(
    ("moments", "reason"),
    [
        (torch.full((9, 2, 8, 3, 3), torch.nan), "holds values that are not finite"),
        (torch.full((9, 2, 8, 3, 3), torch.inf), "holds values that are not finite"),
        (torch.zeros(9, 1, 8, 3, 3), r"has moments of shape \[9, 1, 8, 3, 3\], not \(frames, 2, 2C, h, w\)"),
        (torch.zeros(9, 8, 3), "has moments of shape"),
        (None, "is no file of latents: .*moments"),
    ],
)
def test_unusable_latents_are_skipped_and_named(tmp_path, moments, reason):
    good = torch.rand(24, 2, 8, 3, 3).half()  # (N, V, 2C, h, w)
    save_file({"moments": good}, tmp_path / "good.mp4.safetensors")
    bad = {"other": good} if moments is None else {"moments": moments.half()}
    save_file(bad, tmp_path / "bad.mp4.safetensors")
    (tmp_path / "latents.json").write_text(json.dumps(dict(dataset="ffs", image_size=SIZE, horizontal_flip=None)))
    item = get_dataset(options("ffs", tmp_path, latents_path=str(tmp_path)))[0]
    assert Path(item["name"]).name == "good.mp4.safetensors"
    assert len(item["skipped"]) == 1 and re.match(rf"{tmp_path}/bad.mp4.safetensors: {reason}", item["skipped"][0])


def test_a_damaged_record_of_latents_is_one_line(tmp_path):
    (tmp_path / "latents.json").write_text("{")
    with pytest.raises(UserError, match=r"^latents_path: .*/latents.json is damaged"):
        get_dataset(options("ffs", tmp_path, latents_path=str(tmp_path)))


def test_latents_of_several_sizes_are_named(tmp_path):
    for i, size in enumerate((3, 4)):
        save_file({"moments": torch.zeros(9, 2, 8, size, size).half()}, tmp_path / f"{i}.mp4.safetensors")
    (tmp_path / "latents.json").write_text(json.dumps(dict(dataset="ffs", image_size=SIZE, horizontal_flip=None)))
    dataset = get_dataset(options("ffs", tmp_path, latents_path=str(tmp_path)))
    with pytest.raises(UserError, match=r"^clips differ in shape: .*\.mp4\.safetensors \[8, 8, \d, \d\], .*; remove"):
        next(load_batches(dataset, ClipSampler(2, 2)))


def test_the_demo_is_seven_classes_of_forty_clips():
    args = options("ucf101", DEMO / "train", num_classes=7, num_frames=16, frame_interval=1, image_size=64)
    dataset = get_dataset(args)
    assert class_names(args) == ["Box", "Bunny", "City", "Cup", "Globe", "Pedestrians", "Tree"]
    assert [dataset.labels.count(label) for label in range(7)] == [40] * 7
    item = dataset[279]
    assert item["label"] == 6 and Path(item["name"]).parent.name == "Tree" and item["skipped"] == []


# Determinism


def test_items_are_keyed_by_seed_epoch_and_index(video_tree):
    """The same key gives the same item in any order and any instance; an epoch or a seed more, another one."""
    args = options("ucf101_img", video_tree, num_classes=2, use_image_num=STILLS)
    first, second = get_dataset(args), get_dataset(args)
    items = [first[0, i] for i in range(len(first))]
    for i in reversed(range(len(first))):
        again = second[i]  # epoch 0
        assert torch.equal(again["video"], items[i]["video"]) and again["name"] == items[i]["name"]
        assert torch.equal(again["image_labels"], items[i]["image_labels"]) and again["skipped"] == items[i]["skipped"]
    assert any(not torch.equal(first[1, i]["video"], items[i]["video"]) for i in range(3))
    args.global_seed += 1
    assert any(not torch.equal(get_dataset(args)[i]["video"], items[i]["video"]) for i in range(3))


@pytest.mark.parametrize("name", SOURCES)
def test_batches_are_the_same_at_any_number_of_workers_and_whatever_the_global_generator(name, request):
    """Broken files end no worker: an epoch and more of batches, the same from this process and from two others."""
    root = request.getfixturevalue("video_tree" if SOURCES[name].files == "video" else "frame_tree")
    stills = STILLS if name.endswith("_img") else 0
    dataset = get_dataset(options(name, root, use_image_num=stills))
    runs = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        state = torch.get_rng_state()
        batches = load_batches(dataset, ClipSampler(len(dataset), 4, seed=1), workers, max_bad_fraction=0.9)
        runs.append(list(islice(batches, 3)))
        assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(*runs, strict=True):
        assert one["video"].shape == (4, NUM_FRAMES + stills, 3, SIZE, SIZE)
        assert one.keys() == other.keys() and one["name"] == other["name"] and one["skipped"] == other["skipped"]
        assert one["notes"] == other["notes"]
        for key in one.keys() - {"name", "skipped", "notes"}:
            assert torch.equal(one[key], other[key])


# Too many bad files


@pytest.mark.parametrize("workers", [0, 2])
def test_more_bad_files_than_allowed_end_the_run_with_their_names(video_tree, workers):
    """5 of 9 files are broken, a tenth is allowed: the error comes within a pass, in one line, from any process."""
    dataset = get_dataset(options("ffs", video_tree))
    batches = load_batches(dataset, ClipSampler(len(dataset), 1), workers, max_bad_fraction=0.1)
    with pytest.raises(UserError, match=r"more than max_bad_fraction=0.1: .*bad_") as raised:
        for _ in islice(batches, 20):
            pass
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_single_good_clip_is_an_error_and_no_endless_loop(tmp_path, workers):
    for i in range(3):
        (tmp_path / f"{i}.avi").write_bytes(b"")
    dataset = get_dataset(options("ffs", tmp_path))
    with pytest.raises(UserError, match=r"none of 100 files .* can be used: .*0\.avi: does not decode") as raised:
        next(load_batches(dataset, ClipSampler(3, 2), workers, max_bad_fraction=0.99))
    assert "\n" not in str(raised.value)


def test_each_skipped_file_is_logged_once(video_tree, caplog):
    dataset = get_dataset(options("ffs", video_tree))
    with caplog.at_level(logging.WARNING):
        for _ in islice(load_batches(dataset, ClipSampler(len(dataset), 9), max_bad_fraction=0.9), 4):
            pass
    named = [Path(record.getMessage().split(": ")[0]).name for record in caplog.records]
    assert sorted(named) == ["bad_empty.mp4", "bad_short.mp4", "bad_text.avi", "bad_text.mp4", "bad_truncated.mp4"]


# What the person at the keyboard can mend


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dataset="ucf11"), "dataset: 'ucf11' is unknown; valid: .*ucf101.*video_folder"),
        (dict(video_reader="opencv"), "video_reader: 'opencv' is unknown; valid: pyav, decord"),
        (dict(num_classes=101), "has 2 class folders, but num_classes is 101: Archery, HandstandPushups$"),
        (dict(dataset="ffs", num_classes=2), "ffs has no classes; leave num_classes empty"),
        (dict(dataset="ucf101_img"), "ucf101_img needs use_image_num > 0; for clips alone use ucf101"),
        (dict(dataset="sky"), "there are no folders of images under"),
        (dict(data_path="/path/to/ucf101"), "data_path still holds the placeholder"),
        (dict(data_path="/nowhere"), "data_path: nothing at /nowhere"),
        (dict(use_image_num=1, frame_data_txt="/nowhere.txt"), "frame_data_txt: nothing at /nowhere.txt"),
        (dict(data_path=__file__), "data_path: .* is a file, where a folder is needed"),
        (dict(data_path="/" + "long" * 100), r"data_path: .* cannot be read \(File name too long\)"),
        (dict(data_path=f"{__file__}/videos"), "data_path: nothing at"),
        (dict(latents_path=__file__), "latents_path: .* is a file, where a folder is needed"),
        (dict(use_image_num=1, frame_data_txt="/tmp"), "frame_data_txt: /tmp is a folder, where a file is needed"),
        (
            dict(use_image_num=1, frame_data_txt=__file__, frame_data_path=__file__),
            "frame_data_path: .* is a file, where a folder is needed",
        ),
    ],
)
def test_wrong_options_are_one_line_that_says_what_is_right(video_tree, changes, message):
    args = options(**(dict(dataset="ucf101", root=video_tree) | changes))
    with pytest.raises(UserError, match=message) as raised:
        get_dataset(args)
    assert "\n" not in str(raised.value)


def test_a_list_line_without_a_class_is_named(video_tree, tmp_path):
    (tmp_path / "list.txt").write_text("v_Archery_g01_c01/1.jpg\nv_Fencing_g01_c01/1.jpg\n")
    with pytest.raises(UserError, match=r"no class of data_path is in the line 'v_Fencing_g01_c01/1.jpg'"):
        get_dataset(
            options("ucf101", video_tree, num_classes=2, use_image_num=1, frame_data_txt=str(tmp_path / "list.txt"))
        )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"])
def test_a_list_names_its_files_in_any_encoding(video_tree, tmp_path, encoding):
    """With a byte order mark, with Windows' line ends; names that are not UTF-8 are found by their bytes."""
    folder = "Bär" if encoding != "latin-1" else "Bär".encode("latin-1").decode("utf-8", "surrogateescape")
    write_frames(tmp_path / folder, np.zeros((2, 8, 8, 3), np.uint8), "{}.png")
    (tmp_path / "list.txt").write_bytes("Bär/1.png\r\nBär/2.png\r\n".encode(encoding))
    stills = dict(use_image_num=1, frame_data_path=str(tmp_path), frame_data_txt=str(tmp_path / "list.txt"))
    dataset = get_dataset(options("ffs_img", video_tree, **stills))
    assert dataset.paths == [tmp_path / folder / "1.png", tmp_path / folder / "2.png"]
    assert not dataset[0]["video"][NUM_FRAMES:].any()


@pytest.mark.parametrize("allowed", [0.5, 0.4])
def test_missing_images_of_a_list_are_named_at_the_start(video_tree, frame_list, allowed):
    """More of them than max_bad_fraction are an error, fewer a line in the log."""
    lines = ["v_Archery_g01_c01/000001.jpg", "v_Archery_g01_c01/gone.jpg", "gone/1.jpg", "v_Archery_g01_c01/bad.jpg"]
    (frame_list.parent / "half.txt").write_text("\n".join(lines))
    stills = dict(use_image_num=1, frame_data_path=str(frame_list.parent))
    stills |= dict(frame_data_txt=str(frame_list.parent / "half.txt"), max_bad_fraction=allowed)
    said, root = [], frame_list.parent
    message = f"frame_data_txt: 2 of 4 images cannot be found: {root}/v_Archery_g01_c01/gone.jpg; {root}/gone/1.jpg"
    if allowed == 0.5:
        get_dataset(options("ffs_img", video_tree, **stills), say=said.append)
        assert said == [message]
    else:
        with pytest.raises(UserError, match=f"^{message}; max_bad_fraction=0.4"):
            get_dataset(options("ffs_img", video_tree, **stills))


def test_ucf101_names_its_classes_without_its_videos():
    """101 names in the order of the sorted folders: HammerThrow before Hammering, JumpRope before JumpingJack."""
    names = class_names(SimpleNamespace(dataset="ucf101", data_path=None, num_classes=101))
    assert len(set(names)) == len(names) == 101 and names == sorted(names)
    assert [names.index(n) for n in ("ApplyEyeMakeup", "HammerThrow", "HandstandPushups", "YoYo")] == [0, 34, 36, 100]
    assert class_names(SimpleNamespace(dataset="sky", data_path=None, num_classes=None)) is None


@pytest.mark.parametrize(
    ("now", "changes"),
    [
        (["Bär", "Cup", "Dog"], ""),
        (["Ba\u0308r", "Cup", "Dog"], ""),  # as macOS spells it
        (["Cup", "Dog"], "Bär gone; label 0 was Bär, is Cup; label 1 was Cup, is Dog; label 2 was Dog, is none"),
        (["Bär", "Cup", "Dog", "Elk"], "Elk new; label 3 was none, is Elk"),
        (["Cup", "Bär", "Dog"], "label 0 was Bär, is Cup; label 1 was Cup, is Bär"),
        (["Bär", "Cup", "Elk"], "Dog gone; Elk new; label 2 was Dog, is Elk"),
    ],
)
def test_changes_of_classes_are_told_label_by_label(now, changes):
    assert class_changes(["Bär", "Cup", "Dog"], now) == changes


def test_classes_are_chosen_by_index_or_by_name_in_any_case():
    names = ["Archery", "Bowling", "BoxingSpeedBag"]
    assert class_index("bowling", names, 3) == class_index("1", names, 3) == class_index(1, names, 3) == 1
    assert class_index(2, None, 3) == 2
    with pytest.raises(UserError, match="class 'archrey' is unknown; did you mean Archery"):
        class_index("archrey", names, 3)
    with pytest.raises(UserError, match="class 3: indices go from 0 to 2"):
        class_index(3, names, 3)
    with pytest.raises(UserError, match="these classes have no names; give an index from 0 to 2"):
        class_index("bowling", None, 3)


# Folders


def touch(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def found(root: Path, num_classes: int | None, say=lambda note: None, **changes) -> dict[str, int]:
    """The clips that a data set finds, relative to its folder, and their labels."""
    dataset = get_dataset(options("video_folder", root, num_classes=num_classes, **changes), say=say)
    names = [str(path.relative_to(root)) for path in dataset.paths]
    return dict(zip(names, dataset.labels, strict=True))


LEFT_BY_TOOLS = [
    "__MACOSX", "@eaDir", "lost+found", ".ipynb_checkpoints", "$RECYCLE.BIN", "System Volume Information",
    ".Trash-1000", "#recycle", "@Recycle", ".git",
]  # fmt: skip


@pytest.mark.parametrize("name", LEFT_BY_TOOLS)
@pytest.mark.parametrize("place", [".", "Box"])
def test_folders_that_tools_leave_are_no_classes_and_hold_no_clips(tmp_path, name, place):
    """Of file systems, archivers and file servers; at the top and inside a class. They are named."""
    said = []
    touch(tmp_path, "Box/a.mp4", "Box/._a.mp4", "Cup/b.mp4", f"{place}/{name}/Box/a.mp4", f"{place}/{name}/1.png")
    assert found(tmp_path, 2, said.append) == {"Box/a.mp4": 0, "Cup/b.mp4": 1}
    assert said == [f"{tmp_path}: 1 ignored: {tmp_path / place / name}"]
    assert class_folders(tmp_path) == ["Box", "Cup"]
    assert find_frame_folders(tmp_path) == []


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("Box/up", ".."),  # to the root
        ("Box/far_up", "../.."),  # above it, where other clips are
        ("Box/self", "."),
        ("Box/cup", "../Cup"),  # between classes
        ("Another", "Box"),  # a class twice
        ("Box/deep/er", "../../Cup/deep"),
        ("Box/loop", "loop"),
    ],
)
def test_each_real_folder_is_visited_once(tmp_path, link, target):
    """Links to a parent, to itself and between classes add no clip and no class, and are named."""
    root, said = tmp_path / "train", []
    touch(tmp_path, "test/Box/z.mp4", "train/Box/a.mp4", "train/Box/deep/b.mp4", "train/Cup/deep/c.mp4")
    (root / link).symlink_to(target)
    assert found(root, 2, said.append) == {"Box/a.mp4": 0, "Box/deep/b.mp4": 0, "Cup/deep/c.mp4": 1}
    assert len(said) == 1 and str(root / link) in said[0]


def test_links_out_of_the_folder_are_followed(tmp_path):
    """Classes on other disks, files by link, a hidden store; two links to one folder count once, the upper one."""
    root, store, said = tmp_path / "train", tmp_path / "disk", []
    touch(tmp_path, "disk/box/a.mp4", "disk/box/more/b.mp4", "disk/cup/c.mp4", "train/Cup/d.mp4", "train/.store/e.mp4")
    (root / "Box").symlink_to(store / "box")
    (root / "Dog").symlink_to(".store")
    (root / "Cup" / "c.mp4").symlink_to(store / "cup" / "c.mp4")
    (root / "Cup" / "Again").symlink_to(store / "box")
    wanted = {"Box/a.mp4": 0, "Box/more/b.mp4": 0, "Cup/c.mp4": 1, "Cup/d.mp4": 1, "Dog/e.mp4": 2}
    assert found(root, 3, said.append) == wanted
    assert said == [f"{root}: 2 ignored: {root}/.store; {root}/Cup/Again (a link to {store}/box)"]


def test_what_is_no_file_or_leads_nowhere_is_named(tmp_path):
    """A class on a disk that is not mounted, a pipe with a video's name (reading it would wait for ever)."""
    said = []
    touch(tmp_path, "Box/a.mp4", "Cup/b.mp4")
    os.mkfifo(tmp_path / "Box" / "pipe.mp4")
    (tmp_path / "Dog").symlink_to("/not/mounted")
    assert found(tmp_path, 2, said.append) == {"Box/a.mp4": 0, "Cup/b.mp4": 1}
    wanted = f"{tmp_path}: 2 cannot be read: {tmp_path}/Dog (a link to nothing); {tmp_path}/Box/pipe.mp4 (not a file)"
    assert said == [wanted]


@pytest.mark.parametrize("closed", ["Box", "Box/deep"])
def test_a_closed_folder_is_named_and_counts_as_bad(tree, closed):
    """Its class keeps its label; a tenth of unusable files is allowed here, and this is one of four."""
    touch(tree, "Box/deep/a.mp4", *(f"Cup/{i}.mp4" for i in range(3)))
    said = []
    with closed_to_us(tree / closed):
        dataset = get_dataset(options("video_folder", tree, num_classes=2), say=said.append)
    assert dataset.labels == [1, 1, 1] and dataset.num_unreadable == 1
    assert said == [
        f"{tree}: 1 cannot be read: {tree / closed} (Permission denied)",
        f"{tree}: 1 class folders without video files: Box",
    ]
    dataset.read = lambda path, choose: torch.zeros(len(choose(9)), 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"1 of 4 files drawn cannot be used, more than max_bad_fraction=0.1"):
        list(islice(load_batches(dataset, ClipSampler(3, 3), max_bad_fraction=0.1), 2))


@pytest.mark.parametrize(("root", "message"), [("data", "there are no video files"), ("data/Box", "cannot be read")])
def test_a_closed_root_is_one_line(tree, root, message):
    touch(tree, "data/Box/a.mp4")
    with closed_to_us(tree / "data"), pytest.raises(UserError, match=f"^data_path: .*{message}.*Permission denied"):
        found(tree / root, 1)


def test_an_input_output_error_in_the_walk_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "Box/a.mp4", "Cup/b.mp4")
    scandir, said = os.scandir, []

    def failing(path):
        if Path(path).name == "Cup":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", failing)
    assert found(tmp_path, 2, said.append) == {"Box/a.mp4": 0}
    assert said[0] == f"{tmp_path}: 1 cannot be read: {tmp_path}/Cup (Input/output error)"


def test_a_wrong_number_of_classes_lists_the_folders_found_and_the_empty_ones(tmp_path):
    touch(tmp_path, "Box/a.mp4", "Cup/b.mp4", "Dog/notes.txt", "@eaDir/c.mp4", "stray.mp4")
    with pytest.raises(UserError) as caught:
        found(tmp_path, 2)
    assert str(caught.value) == (
        f"data_path: {tmp_path} has 3 class folders, but num_classes is 2: Box, Cup, Dog; "
        f"{tmp_path}: 1 ignored: {tmp_path}/@eaDir; {tmp_path}: 1 class folders without video files: Dog; "
        f"{tmp_path}: 1 video files outside the class folders are not used"
    )


def test_names_that_are_not_utf8_are_found(tmp_path):
    name = b"B\xe4r".decode("utf-8", "surrogateescape")
    touch(tmp_path, f"{name}/{name}.mp4", "Cup/b.mp4")
    assert found(tmp_path, 2) == {f"{name}/{name}.mp4": 0, "Cup/b.mp4": 1}


def test_hidden_folders_are_not_searched(tmp_path):
    """Notebooks and file managers leave folders of images beside the data."""
    for folder in ("a/.ipynb_checkpoints", "a/b"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "000000.png").touch()
    assert find_frame_folders(tmp_path) == [tmp_path / "a" / "b"]
