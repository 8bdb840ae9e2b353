"""Files that readers get wrong: each is read as the ffmpeg command line shows it, or refused in one line.

Both readers, the data set, the converter to frames and the encoder of latents are held to the same table.
"""

import struct
import subprocess
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from safetensors import safe_open

from configs import TrainConfig, UserError
from datasets import ClipSampler, get_dataset, load_batches, video_index
from datasets.readers import READERS, BadClip, read_frame_folder, read_image, read_video
from datasets.transforms import square
from tools import benchmark, convert_videos_to_frames, encode_latents
from tools.benchmarks import reading
from tools.metrics.clips import VideoFiles
from tools.metrics.options import ClipOptions
from tools.metrics.protocols import fill_in

NUM, HEIGHT, WIDTH = 48, 64, 96
PATCHES = ((200, 40, 40), (40, 180, 40), (40, 40, 200), (225, 172, 106), (220, 220, 220), (20, 20, 20))
X264 = "-c:v libx264 -g 12 -crf 15 -pix_fmt yuv420p"
COPY, B_FRAMES = "-c copy", f"{X264} -bf 2 -b_strategy 0"
PALETTE = "-filter_complex split[a][b];[a]palettegen[p];[b][p]paletteuse"
OPEN_HEVC = "-c:v libx265 -pix_fmt yuv420p -x265-params log-level=none:open-gop=1:keyint=12:min-keyint=12:scenecut=0"
RGBA = f"-f rawvideo -pix_fmt rgba -s {WIDTH}x{HEIGHT} -r 12 -i rgba.raw"
ALL = (NUM, HEIGHT, WIDTH), (0, NUM - 1)  # all frames, whole

MPEG2 = (2 * NUM, HEIGHT, WIDTH), (0, NUM - 1)  # at twice the rate

# name -> the fault; the input and the options that make it; frames, height and width; numbers of the first and the last
FILES = {
    "plain.mp4": ("none", "-i in.mp4 -c copy", *ALL),
    "hflip.mp4": ("mirrored", f"-display_hflip -i in.mp4 {COPY}", (48, 64, 96), None),
    "vflip.mkv": ("mirrored", f"-display_vflip -i in.mp4 {COPY}", (48, 64, 96), None),
    "rot90.mp4": ("turned", f"-display_rotation 90 -i in.mp4 {COPY}", (48, 96, 64), None),
    "rot180.mkv": ("turned", f"-display_rotation 180 -i in.mp4 {COPY}", (48, 64, 96), None),
    "rot270.mov": ("turned", f"-display_rotation 270 -i in.mp4 {COPY}", (48, 96, 64), None),
    "transposed.mp4": ("turned, mirrored", f"-display_rotation 90 -display_hflip -i in.mp4 {COPY}", (48, 96, 64), None),
    "anti.mp4": ("turned, mirrored", f"-display_rotation 270 -display_hflip -i in.mp4 {COPY}", (48, 96, 64), None),
    "rot45.mp4": ("turned by 45", f"-display_rotation 45 -i in.mp4 {COPY}", "no multiple of 90", None),
    "pal8.avi": ("the palette comes once", f"-i in.mp4 {PALETTE} -c:v rawvideo -pix_fmt pal8", *ALL),
    "joined.ts": ("the clock restarts", None, (96, 64, 96), (0, 0)),
    "joined.mpg": ("the clock restarts", None, (96, 64, 96), (0, 46)),
    "same_time.mkv": (
        "two frames at one time", f"-i in.mp4 {X264} -bf 0 -vf setpts=N*N*40/TB/1000 -fps_mode passthrough", *ALL,
    ),
    "variable.mp4": ("no frame rate", f"-i in.mp4 {B_FRAMES} -vf setpts=N*(N+9)*4/TB/1000 -fps_mode passthrough", *ALL),
    "refresh.mp4": (
        "keyframes that are none", f"-i in.mp4 {X264} -x264-params intra-refresh=1:keyint=12:bframes=0", *ALL,
    ),
    "all_sync.mp4": ("all frames are called keyframes", None, *ALL),
    "negative.mkv": ("times below 0", f"-ss 0.5 -i in.mp4 {COPY} -avoid_negative_ts disabled", *ALL),
    "edit.mp4": ("an edit list", f"-ss 1.5 -i b.mp4 {COPY}", (30, 64, 96), (18, 47)),
    "late.mp4": ("times from 5 s on", f"-i in.mp4 {COPY} -output_ts_offset 5", *ALL),
    "order.mp4": ("times in the order of decoding", f"-i b.avi {COPY}", *ALL),
    "fragments.mp4": ("fragmented", f"-i b.mp4 {COPY} -movflags frag_keyframe+empty_moov", *ALL),
    "wrap.ts": ("the clock overflows", f"-i b.mp4 {COPY} -output_ts_offset 95442", *ALL),
    "two.mp4": ("two videos", f"-i small.mp4 -i in.mp4 -map 0 -map 1 {COPY}", *ALL),
    "default.mkv": (
        "two videos", f"-i in.mp4 -i small.mp4 -map 0 -map 1 {COPY} -disposition:v:0 0 -disposition:v:1 default",
        (48, 32, 48), (0, 47),
    ),
    "cover.mp4": ("cover art", f"-i in.mp4 -i cover.png -map 1 -map 0 {COPY} -disposition:v:0 attached_pic", *ALL),
    "starts_late.ts": ("starts without a keyframe", None, (24, 64, 96), (24, 47)),
    "unseen.webm": (
        "frames that nobody sees", "-i in.mp4 -c:v libvpx -auto-alt-ref 1 -lag-in-frames 16 -g 24 -crf 10 -b:v 200k",
        *ALL,
    ),
    "interlaced.mp4": ("interlaced", f"-i in.mp4 {X264} -x264-params interlaced=1", *ALL),
    "bt709.mp4": ("BT.709", f"-i in.mp4 {X264} -colorspace bt709 -vf scale=out_color_matrix=bt709", (48, 64, 96), None),
    "bt2020.mkv": (
        "BT.2020 in 10 bits", "-i in.mp4 -c:v ffv1 -pix_fmt yuv420p10 -vf scale=out_color_matrix=bt2020",
        (48, 64, 96), None,
    ),
    "full.webm": (
        "BT.709, full range", "-i in.mp4 -c:v libvpx-vp9 -crf 10 -vf scale=out_color_matrix=bt709:out_range=full",
        (48, 64, 96), None,
    ),
    "10bit.mp4": ("10 bits", "-i in.mp4 -c:v libx264 -crf 12 -pix_fmt yuv420p10le", *ALL),
    "422.mp4": ("10 bits, 4:2:2", "-i in.mp4 -c:v libx264 -crf 12 -pix_fmt yuv422p10le", *ALL),
    "444.mp4": ("4:4:4", "-i in.mp4 -c:v libx264 -crf 12 -pix_fmt yuv444p", *ALL),
    "wide.mp4": ("pixels twice as wide", f"-i in.mp4 {X264} -vf setsar=2", (48, 64, 192), None),
    "high.mkv": ("pixels of 8:9", f"-i in.mp4 {X264} -vf setsar=8/9", (48, 64, 85), None),
    "almost.avi": ("pixels of 427:426", "-i in.mp4 -c:v mpeg4 -q:v 2 -vf setsar=427/426", (48, 64, 96), None),
    "garbage.avi": ("pixels of 100:1", "-i in.mp4 -c:v mpeg4 -vf setsar=100", "its pixels are 100 times as wide", None),
    "paff.mp4": ("interlaced, B-frames", f"-i in.mp4 {B_FRAMES} -flags +ilme+ildct -x264-params tff=1", *ALL),
    "mpeg2.mpg": ("interlaced MPEG-2", "-i in.mp4 -c:v mpeg2video -flags +ilme+ildct -q:v 2 -bf 2 -r 24", *MPEG2),
    "empty.mp4": ("an edit list that starts with nothing", None, *ALL),
    "skips.mp4": ("an edit list that skips the start", None, (24, 64, 96), (18, 41)),
    "twice.mp4": ("an edit list with a repeated part", None, (24, 64, 96), (15, 26)),
    "back.mp4": ("an edit list that goes back", None, (24, 64, 96), (24, 11)),
    "behind.mp4": ("an edit list without frames", None, "has no frames", None),
    "negative.mp4": (
        "times below 0", f"-i b.mp4 {COPY} -output_ts_offset -1 -avoid_negative_ts disabled -use_editlist 0", *ALL,
    ),
    "open.mp4": (
        "open groups of pictures", f"-i in.mp4 {B_FRAMES} -x264-params open-gop=1:keyint=12:min-keyint=12:scenecut=0",
        *ALL,
    ),
    "open.mkv": ("open groups of pictures", f"-i in.mp4 {OPEN_HEVC}", *ALL),
    "slow.mkv": ("frames of up to 7 s", f"-i in.mp4 {B_FRAMES} -vf setpts=N*N*N/960/TB -fps_mode passthrough", *ALL),
    "lies.mp4": ("its header says 1 ms", None, *ALL),
    "alpha.mov": ("ProRes 4444 with alpha", f"{RGBA} -c:v prores_ks -profile:v 4444 -pix_fmt yuva444p10le", *ALL),
    "alpha.webm": ("VP9 with alpha", f"{RGBA} -c:v libvpx-vp9 -pix_fmt yuva420p -crf 10 -b:v 0", *ALL),
    "alpha.gif": ("GIF with holes", f"{RGBA} {PALETTE}", (48, 64, 96), None),
    "gbr.mp4": ("RGB", "-i in.mp4 -c:v libx264rgb -crf 10", *ALL),
    "gray.mkv": ("grey of limited range", "-i in.mp4 -c:v libx264 -vf scale=out_range=tv,format=gray -crf 10", *ALL),
    "crop.mp4": (
        "cropped on the left", f"-i in.mp4 {COPY} -bsf:v h264_metadata=crop_left=8:crop_top=4", (48, 60, 88), None,
    ),
    "shape.ts": ("from square to wide pixels", None, "the shape of its pixels changes", None),
    "sound.mp4": ("no video", "-f lavfi -i sine=d=1", "no video stream", None),
    "cut_off.mp4": ("truncated", None, "does not decode", None),
}  # fmt: skip


def ffmpeg(*arguments: object, cwd: Path | None = None, **options) -> bytes:
    command = [get_ffmpeg_exe(), "-v", "error", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, **options).stdout


def shown_by_ffmpeg(path: Path, height: int, width: int, square: bool = True) -> np.ndarray:
    """All frames as the ffmpeg command line shows them, (N, height, width, 3); unless `square`, scaled to that size."""
    scale = [] if square else ["-vf", f"scale={width}:{height}"]
    raw = ffmpeg("-i", path, *scale, "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-f", "rawvideo", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def number(frame: np.ndarray) -> int:
    """The number that a frame shows: six bars in its upper half, a bit each."""
    height, width = frame.shape[:2]
    bars = [
        frame[height // 10 : height // 3, int((i + 0.3) * width / 6) : int((i + 0.7) * width / 6)] for i in range(6)
    ]
    return sum(int(bar.mean() > 125) << i for i, bar in enumerate(bars))


def with_edits(data: bytes, *edits: tuple[int, int]) -> bytes:
    """An .mp4 of ffmpeg's with another edit list: parts of so many ms, which start at a frame (-1: show nothing)."""
    moov = data.rindex(b"moov") - 4
    trak, edts = (data.index(name, moov) - 4 for name in (b"trak", b"edts"))
    (size,) = struct.unpack_from(">I", data, edts)
    entries = [struct.pack(">IiI", length, 1024 * frame if frame >= 0 else -1, 1 << 16) for length, frame in edits]
    new = struct.pack(">I4sI4sII", 24 + 12 * len(edits), b"edts", 16 + 12 * len(edits), b"elst", 0, len(edits))
    new += b"".join(entries)
    edited = bytearray(data[:edts] + new + data[edts + size :])
    for at in (moov, trak):
        struct.pack_into(">I", edited, at, struct.unpack_from(">I", data, at)[0] + len(new) - size)
    return bytes(edited)


def after_third(data: bytes) -> bytes:
    return data[len(data) // 188 // 3 * 188 :]  # whole packets of MPEG-TS


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """`FILES` in the folder `all`, one class; the frames count from 0 in bars, above patches of `PATCHES`."""
    root = tmp_path_factory.mktemp("hard")
    frames = np.empty((NUM, HEIGHT, WIDTH, 3), np.uint8)
    bits = (np.arange(NUM)[:, None] >> np.arange(6)) & 1
    frames[:, :32] = np.kron(bits[:, None, :, None], np.full((1, 32, 16, 3), 199)) + 25
    frames[:, 32:] = np.repeat(np.array(PATCHES, np.uint8), 16, axis=0)

    def encode(name: str, options: str, frames: np.ndarray = frames) -> bytes:
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "12", "-i", "-"]
        ffmpeg(*raw, *options.split(), name, cwd=root, input=frames.tobytes())
        return (root / name).read_bytes()

    encode("in.mp4", f"{X264} -bf 0")
    b_frames = encode("b.mp4", B_FRAMES)
    encode("b.avi", "-c:v mpeg4 -bf 2 -g 12 -q:v 2")
    encode("small.mp4", f"{X264} -s 48x32")
    encode("cover.png", "-frames:v 1")
    half = np.where(np.arange(WIDTH) < 48, 255, 0).astype(np.uint8)
    alpha = np.broadcast_to(half[:, None], (*frames.shape[:3], 1))
    (root / "rgba.raw").write_bytes(np.concatenate([frames, alpha], 3).tobytes())
    forward, backward = encode("a.ts", B_FRAMES), encode("b.ts", B_FRAMES, frames[::-1])
    program = encode("a.mpg", "-vf setpts=N/24/TB -r 24 -frames:v 48 -c:v mpeg2video -bf 2 -q:v 2")
    (root / "all").mkdir()
    for name, (_, options, _, _) in FILES.items():
        if options:
            ffmpeg(*options.split(), root / "all" / name, cwd=root)
    (root / "all" / "joined.ts").write_bytes(forward + backward)
    for name, edits in {
        "empty": [(1000, -1), (4000, 2)], "skips": [(2000, 20)], "twice": [(1000, 17), (1000, 17)],
        "back": [(1000, 26), (1000, 2)], "behind": [(4000, 100)],
    }.items():  # fmt: skip
        (root / "all" / f"{name}.mp4").write_bytes(with_edits(b_frames, *edits))
    lies = bytearray(b_frames)
    for kind, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        struct.pack_into(">I", lies, lies.index(kind) + offset, 1)
    (root / "all" / "lies.mp4").write_bytes(lies)
    (root / "all" / "shape.ts").write_bytes(forward + encode("wide.ts", f"{B_FRAMES} -vf setsar=2"))
    (root / "all" / "joined.mpg").write_bytes(program * 2)
    (root / "all" / "all_sync.mp4").write_bytes((root / "in.mp4").read_bytes().replace(b"stss", b"free"))
    (root / "all" / "starts_late.ts").write_bytes(after_third(encode("hevc.ts", OPEN_HEVC)))
    (root / "all" / "cut_off.mp4").write_bytes(b_frames[: len(b_frames) // 2])
    return root / "all"


@pytest.fixture(scope="module")
def right(files) -> dict[str, np.ndarray]:
    """The right frames of each file that is not refused."""
    return {
        name: shown_by_ffmpeg(files / name, *size[1:], square=name not in ("wide.mp4", "high.mkv"))
        for name, (_, _, size, _) in FILES.items()
        if not isinstance(size, str)
    }


def assert_same(frames: torch.Tensor, expected: np.ndarray) -> None:
    """FFmpeg's releases may round in other ways; these are the same bit for bit where the releases are."""
    assert frames.shape == (len(expected), 3, *expected.shape[1:3])
    assert np.abs(frames.permute(0, 2, 3, 1).numpy().astype(int) - expected).max() <= 3


@pytest.mark.parametrize("reader", ["pyav", "decord"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_ffmpeg_shows_it_or_refused_in_one_line(files, right, name, reader):
    """The whole, frames alone, strided windows, and one frame twice."""
    _, _, size, ends = FILES[name]
    if isinstance(size, str):
        with pytest.raises(BadClip, match=size) as raised:
            read_video(files / name, range, reader)
        assert "\n" not in str(raised.value)
        return
    expected = right[name]
    assert expected.shape == (*size, 3)
    if ends:
        assert (number(expected[0]), number(expected[-1])) == ends
    total = len(expected)
    for choice in (range(total), [0], [total - 1], [13, 13], range(5, total, 7), range(total // 2, total // 2 + 8)):
        totals = []
        frames = read_video(files / name, lambda n, choice=choice, totals=totals: totals.append(n) or choice, reader)
        assert totals == [total]
        assert_same(frames, expected[list(choice)])


@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_the_data_set_holds_every_file_and_names_the_refused(files, reader):
    dataset = clips_of(files, frame_interval=2, video_reader=reader)
    assert len(dataset) == len(FILES)
    for path, item in zip(dataset.paths, map(dataset.__getitem__, range(len(dataset))), strict=True):
        refused = FILES[path.name][2]
        if isinstance(refused, str):
            assert item["skipped"][0].startswith(f"{path}: ") and refused in item["skipped"][0]
        else:
            assert item["name"] == str(path) and item["skipped"] == [] and item["video"].shape == (8, 3, 16, 16)


def test_the_converter_writes_what_the_readers_read(files, right, tmp_path, monkeypatch, capsys):
    """All frames, and those of another rate."""
    refused = sum(isinstance(size, str) for _, _, size, _ in FILES.values())
    options = [f"data_path={files}", "num_workers=0", "max_bad_fraction=0.9", "frame_format=png"]
    for folder, *changes in (("all",), ("slow", "fps=5")):
        copies = tmp_path / "videos"
        copies.mkdir(exist_ok=True)
        for name in FILES:  # a folder takes the name of a file without its suffix
            (copies / f"{name.replace('.', '_')}{Path(name).suffix}").unlink(missing_ok=True)
            (copies / f"{name.replace('.', '_')}{Path(name).suffix}").symlink_to(files / name)
        arguments = [*options, f"data_path={copies}", f"frame_data_path={tmp_path / folder}", *changes]
        monkeypatch.setattr("sys.argv", ["convert_videos_to_frames.py", *arguments])
        convert_videos_to_frames.main()
        assert capsys.readouterr().out.splitlines()[-1].endswith(f"0 before, {refused} skipped")
    for name, expected in right.items():
        assert_same(read_frame_folder(tmp_path / "all" / name.replace(".", "_"), range), expected)
    # At 12 frames a second, and whatever the clock says: the first frame at or after each fifth of a second.
    for name in ("plain.mp4", "late.mp4", "edit.mp4", "refresh.mp4", "negative.mkv"):
        slow = read_frame_folder(tmp_path / "slow" / name.replace(".", "_"), range)
        assert_same(slow, right[name][[-(-12 * k // 5) for k in range(len(slow))]])
        assert len(slow) == (len(right[name]) - 1) * 5 // 12 + 1


def test_the_encoder_of_latents_encodes_all_frames(files, right, tiny, tmp_path, monkeypatch):
    options = [f"data_path={files}", f"latents_path={tmp_path}", f"pretrained_model_path={tiny.parent}"]
    options += ["dataset=ffs", "image_size=16", "max_bad_fraction=0.9", "num_classes="]
    monkeypatch.setattr("sys.argv", ["encode_latents.py", *options])
    encode_latents.main()
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            found[path.name.removesuffix(".safetensors")] = file.get_slice("moments").get_shape()[0]
    assert found == {name: len(frames) for name, frames in right.items()}


def test_a_size_that_changes_is_refused_where_a_clip_shows_it(files, tmp_path, monkeypatch, capsys):
    """Clips before and after the change are whole. The converter refuses the video."""
    (tmp_path / "videos").mkdir()
    for name in ("in.mp4", "small.mp4"):
        ffmpeg("-i", files.parent / name, "-c", "copy", tmp_path / f"{name}.ts")
    sizes = tmp_path / "videos" / "sizes.ts"
    sizes.write_bytes((tmp_path / "in.mp4.ts").read_bytes() + (tmp_path / "small.mp4.ts").read_bytes())
    for reader in READERS:
        for first, shape in ((0, (8, 3, 64, 96)), (50, (8, 3, 32, 48))):
            clip = read_video(sizes, lambda total, first=first: range(first, first + 8), reader)
            assert clip.shape == shape and number(clip[0].permute(1, 2, 0).numpy()) == first % NUM
        with pytest.raises(BadClip, match=r"^its frames differ in size$"):
            read_video(sizes, lambda total: range(44, 52), reader)
    options = [f"data_path={tmp_path}/videos", f"frame_data_path={tmp_path}/frames", "max_bad_fraction=1"]
    monkeypatch.setattr("sys.argv", ["convert_videos_to_frames.py", *options, "num_workers=0"])
    convert_videos_to_frames.main()
    out = capsys.readouterr().out
    assert "its frames differ in size" in out and out.splitlines()[-1].endswith("1 skipped")


def test_a_sound_file_with_a_cover_is_one_frame_as_in_ffmpeg(files, tmp_path):
    """Too short for a clip."""
    cover = ["-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v:0", "attached_pic"]
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-i", files.parent / "cover.png", *cover, tmp_path / "sound.mp4")
    assert_same(read_video(tmp_path / "sound.mp4", range), shown_by_ffmpeg(tmp_path / "sound.mp4", HEIGHT, WIDTH))
    with pytest.raises(UserError, match="1 frames, 8 needed"):
        clips_of(tmp_path)[0]


@pytest.mark.parametrize("name", ["bt709.mp4", "full.webm", "bt2020.mkv", "plain.mp4"])
def test_colors_are_those_of_the_source(files, name):
    """Not what a library makes of them: the patches that were encoded."""
    frame = read_video(files / name, lambda total: [0])[0].permute(1, 2, 0).numpy().astype(int)  # (H, W, 3)
    for i, patch in enumerate(PATCHES):
        np.testing.assert_allclose(frame[52, 8 + 16 * i], patch, atol=6)  # encoded twice


# Images


def test_an_image_is_turned_by_its_exif_orientation(tmp_path):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :32] = 200, 40, 40
    pixels[16:, :16] = 40, 40, 200
    turn = {
        1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1), 6: lambda p: np.rot90(p, -1), 7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: np.rot90(p),
    }  # fmt: skip
    for orientation, turned in turn.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        for suffix, options in {"png": {}, "tif": {}, "webp": {"lossless": True}, "jpg": {"subsampling": 0}}.items():
            Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", exif=exif, **options)
            image = read_image(tmp_path / f"a.{suffix}").permute(1, 2, 0).numpy()
            np.testing.assert_allclose(image, turned(pixels), atol=9, err_msg=f"{orientation} {suffix}")


RAMP = np.tile(np.arange(256), (4, 1))
GRAY, ALPHA = Image.fromarray(RAMP.astype(np.uint8)), Image.fromarray((255 - RAMP).astype(np.uint8))
SMALL, TWO = Image.new("L", (8, 8), 99), {"save_all": True, "append_images": [Image.new("L", (8, 8))]}
with np.errstate(invalid="ignore", divide="ignore"):
    NAN = Image.fromarray((RAMP / 0).astype(np.float32))
IMAGES = {  # name -> the image, and how it is saved; its grey levels, or why it is refused
    "gray16.png": (Image.fromarray((RAMP * 257).astype(np.uint16)), {}, RAMP),
    "gray16.tif": (Image.fromarray((RAMP * 257).astype(np.uint16)), {}, RAMP),
    "float.tif": (Image.fromarray((RAMP / 255).astype(np.float32)), {}, RAMP),
    "float_255.tif": (Image.fromarray(RAMP.astype(np.float32)), {}, "between 0 and 255"),
    "nan.tif": (NAN, {}, "between nan and nan"),
    "int32.tif": (Image.fromarray(RAMP.astype(np.int32)), {}, "have 32 bits"),
    "palette.png": (GRAY.convert("P"), {}, RAMP),
    "hole.png": (GRAY.convert("P"), {"transparency": 7}, RAMP),
    "alpha.png": (Image.merge("RGBA", [GRAY] * 3 + [ALPHA]), {}, RAMP),
    "alpha.webp": (Image.merge("RGBA", [GRAY] * 3 + [ALPHA]), {"lossless": True, "exact": True}, RAMP),
    "two.webp": (SMALL, TWO, "2 frames or pages"),
    "two.png": (SMALL, TWO, "2 frames or pages"),
    "two.tif": (SMALL, TWO, "2 frames or pages"),
    "wide.png": (SMALL, {"dpi": (72, 144)}, r"not square \(dpi 72.009 x 143.993\)"),
    "wide.jpg": (SMALL, {"dpi": (72, 144)}, "not square"),
    "wide.tif": (SMALL, {"dpi": (72, 144)}, "not square"),
    "square.jpg": (SMALL, {"dpi": (72, 72)}, np.full((8, 8), 99)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_has_its_own_grey_levels_or_is_refused(tmp_path, name):
    """Transparency is dropped, as ffmpeg and Pillow do: the colors are those stored beneath it."""
    image, options, expected = IMAGES[name]
    image.save(tmp_path / name, **options)
    if isinstance(expected, str):
        with pytest.raises(BadClip, match=rf"^{name}: .*{expected}"):
            read_image(tmp_path / name)
    else:
        np.testing.assert_array_equal(read_image(tmp_path / name).numpy(), np.stack([expected] * 3))


def test_a_cmyk_jpeg_has_the_colors_that_ffmpeg_shows(tmp_path):
    image = Image.fromarray(np.kron(np.array([PATCHES], np.uint8), np.ones((8, 8, 1), np.uint8)))
    image.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    expected = shown_by_ffmpeg(tmp_path / "a.jpg", 8, 48)[0].astype(int)
    assert np.abs(read_image(tmp_path / "a.jpg").permute(1, 2, 0).numpy() - expected).max() <= 3


# The index


@pytest.fixture
def long_video(files, tmp_path, monkeypatch) -> Path:
    """A video that counts as long: 48 frames of which 20 make one."""
    monkeypatch.setattr(video_index, "LONG", 20)
    (tmp_path / "long.mp4").write_bytes((files / "plain.mp4").read_bytes())
    video_index.forget_indices()
    return tmp_path / "long.mp4"


def count_passes(monkeypatch) -> list[int]:
    """The list grows by an entry for each index that is made."""
    passes, make = [], video_index._make_index
    monkeypatch.setattr(video_index, "_make_index", lambda container: passes.append(1) or make(container))
    return passes


def test_a_long_video_is_indexed_once_for_all_processes_until_it_changes(files, long_video, tmp_path, monkeypatch):
    """The same frames come from an index made now, one in memory and one in a file; a damaged file is made again."""
    passes, cache = count_passes(monkeypatch), tmp_path / "cache"

    def read() -> torch.Tensor:
        return read_video(long_video, lambda total: [3, 30, total - 1], index_path=str(cache))

    first = read()
    assert torch.equal(read(), first) and len(passes) == 1
    (file,) = cache.iterdir()
    for damage in (None, b"", file.read_bytes()[:300]):
        video_index.forget_indices()  # another process
        before = len(passes)
        if damage is not None:
            file.write_bytes(damage)
        assert torch.equal(read(), first) and len(passes) == before + (damage is not None)
    long_video.write_bytes((files / "edit.mp4").read_bytes())
    read_video(long_video, lambda total: [total - 30], index_path=str(cache))
    assert len(list(cache.iterdir())) == 2


def test_a_short_video_leaves_no_file_and_a_closed_folder_stops_nothing(files, long_video, tmp_path):
    read_video(files / "starts_late.ts", range, index_path=str(tmp_path / "short"))
    assert video_index.LONG == 20 and len(list((tmp_path / "short").iterdir())) == 1  # 24 frames
    (tmp_path / "file").write_text("")
    assert len(read_video(long_video, range, index_path=str(tmp_path / "file"))) == 48
    video_index.LONG = 100
    video_index.forget_indices()
    read_video(files / "plain.mp4", range, index_path=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_the_folder_of_indices_and_those_in_memory_are_bounded(files, long_video, tmp_path, monkeypatch):
    monkeypatch.setattr(video_index, "MAX_FOLDER", 4000)  # bytes: two or three of these
    monkeypatch.setattr(video_index, "MAX_KEPT", 100)  # frames: two of these
    names = [name for name in FILES if name.startswith("rot") and name != "rot45.mp4"] + ["plain.mp4", "late.mp4"]
    for name in names:
        read_video(files / name, lambda total: [0], index_path=str(tmp_path / "cache"))
    assert len(video_index._kept) == 2
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 4000


# Frame rates, short clips, and what the log says


def clips_of(folder: Path, **changes) -> torch.utils.data.Dataset:
    args = dict(dataset="ffs", data_path=str(folder), num_frames=8, frame_interval=1, image_size=16)
    return get_dataset(TrainConfig(**(args | dict(video_index_path=None) | changes)))


@pytest.mark.parametrize("name", ["plain.mp4", "late.mp4", "edit.mp4", "unseen.webm", "same_time.mkv", "joined.mpg"])
@pytest.mark.parametrize("reader", ["pyav", "decord"])
def test_frames_by_time_are_the_first_at_or_after_each_tick(files, right, name, reader):
    """By the times that ffprobe would show, here of the whole decoded; a slower video repeats frames."""
    with av.open(str(files / name)) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
    if times != sorted(times):
        times = np.arange(len(times)) / 24  # the clock restarts: evenly
    times = np.array(times) - times[0]
    for fps in (1, 5, 8, 30):
        expected = [int(np.argmax(times + 0.006 >= k / fps)) for k in range(int((times[-1] + 0.006) * fps) + 1)]
        assert_same(read_video(files / name, range, reader, fps=fps), right[name][expected])


def test_clips_of_videos_of_mixed_rates_show_the_same_time(files, tmp_path):
    """The same film at 12 and at 24 frames a second."""
    for name, rate in (("a.mp4", 12), ("b.mp4", 24)):
        ffmpeg("-i", files / "plain.mp4", "-vf", f"fps={rate}", *X264.split(), tmp_path / name)
    shown = [
        [number(frame) for frame in read_video(path, range, fps=6).permute(0, 2, 3, 1).numpy()]
        for path in sorted(tmp_path.iterdir())
    ]
    assert shown[0] == list(range(0, 48, 2)) and np.abs(np.subtract(*shown)).max() <= 1
    slow = clips_of(tmp_path, fps=6)
    assert slow[0]["video"].shape == (8, 3, 16, 16)
    real = real_clips_of(tmp_path, real_fps=6, num_frames=24)  # all frames at this rate
    assert real.cfg.real_stride == 1
    for i, path in enumerate(slow.paths):
        assert torch.equal(real[i], square(read_video(path, range, fps=6), 16, flip=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(fps=8, frame_interval=3), "fps: 8 chooses frames by time, frame_interval: 3 by number; set frame_inter"),
        (dict(fps=8, dataset="taichi"), "fps: the frames of taichi are images without times; use frame_interval"),
    ],
)  # fmt: skip
def test_a_rate_that_contradicts_is_refused_in_one_line(files, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        clips_of(files, **changes)
    assert "\n" not in str(raised.value)


def test_a_rate_that_contradicts_is_refused_in_evaluation(files, tmp_path):
    with pytest.raises(UserError, match=r"real_fps: 8 chooses frames by time, real_stride: 3 by number"):
        real_clips_of(files, real_fps=8, real_stride=3)
    (tmp_path / "a").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0.png")
    with pytest.raises(UserError, match=r"real_fps: the frames of .* are images without times; use real_stride"):
        real_clips_of(tmp_path, real_fps=8)


def real_clips_of(folder: Path, **changes) -> VideoFiles:
    """The clips of evaluation, in the order of their names."""
    options = dict(real_path=str(folder), order="sorted", num_frames=8, image_size=16, video_reader="pyav")
    cfg = fill_in(ClipOptions(**(options | changes)))
    return VideoFiles(cfg, "real_path", 99, cfg.real_stride)


def test_short_videos_are_named_once_and_used_whole_or_left_out_in_training_and_in_evaluation(files, tmp_path):
    """24 and 30 frames, where 40 are needed. Left out, they do not count as unusable files."""
    names = ["plain.mp4", "starts_late.ts", "edit.mp4"]
    for name in names:
        (tmp_path / name).symlink_to(files / name)
    said = []
    dataset = clips_of(tmp_path, frame_interval=5, horizontal_flip=False)
    for _ in islice(load_batches(dataset, ClipSampler(3, 3), say=said.append), 4):
        pass
    (line,) = said
    assert line.startswith(
        "2 videos of the first 3 files drawn are shorter than num_frames x frame_interval = 40 frames"
    )
    assert "starts_late.ts" in line and "edit.mp4" in line and "plain.mp4" not in line
    spread = real_clips_of(tmp_path, real_stride=5, short_clips="spread")
    for i in (0, 2):  # edit.mp4 and starts_late.ts
        assert torch.equal(spread[i], dataset[i]["video"])
    skipped, said = clips_of(tmp_path, frame_interval=5, short_clips="skip"), []
    for _ in islice(load_batches(skipped, ClipSampler(3, 3), say=said.append, max_bad_fraction=0), 4):
        pass
    (line,) = said
    assert line.startswith("2 videos of the first 3 files drawn are shorter than num_frames x frame_interval = 40")
    for reason in (f"{tmp_path}/starts_late.ts: 24 frames, 40 needed", f"{tmp_path}/edit.mp4: 30 frames, 40 needed"):
        assert reason in line and reason in map(str, real_clips_of(tmp_path, real_stride=5))
    assert {skipped[i]["name"] for i in range(3)} == {f"{tmp_path}/plain.mp4"}


def test_the_log_counts_which_files_decord_reads_and_why_not_the_others(files):
    said = []
    dataset = clips_of(files, video_reader="decord")
    batches = load_batches(dataset, ClipSampler(len(dataset), len(dataset)), say=said.append, max_bad_fraction=0.9)
    for _ in islice(batches, 2):
        pass
    readers = {line.split(" are read by ")[1].split(": ")[0]: line for line in said if " are read by " in line}
    assert "plain.mp4" in readers["decord"] and "all_sync.mp4" not in readers["decord"]
    for name, reason in {
        "refresh.mp4": "keyframes that are none", "all_sync.mp4": "keyframes that are none", "edit.mp4": "B-frames",
        "two.mp4": "several video streams", "hflip.mp4": "turned",
        "late.mp4": "edit list or irregular times", "joined.ts": "h264 in mpegts",
    }.items():  # fmt: skip
        assert name in readers[f"PyAV, not decord ({reason})"], reason


def test_the_check_of_readers_counts_frames_and_names_files_that_differ(files, tmp_path, monkeypatch, capsys):
    for name in ("plain.mp4", "edit.mp4", "cut_off.mp4", "joined.ts"):
        (tmp_path / name).symlink_to(files / name)
    arguments = ["benchmark.py", "reading", "verify=True", "dataset=ffs", f"data_path={tmp_path}", "num_classes="]
    monkeypatch.setattr("sys.argv", arguments)
    benchmark.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["pyav", "3", "174", "0", "0"] in rows and ["decord", "3", "174", "0", "2"] in rows
    wrong = reading.read_video
    monkeypatch.setattr(reading, "read_video", lambda path, choose, reader: wrong(path, choose, reader).roll(1, 0))
    with pytest.raises(UserError, match=r"frames differ from plain decoding: .*edit.mp4: 30 of 30 frames by pyav"):
        benchmark.main()
