"""Protocols by name, against an implementation of each from its tool's description, with numpy and Pillow alone."""

import json
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs import UserError, load_config
from datasets.transforms import square
from tools import evaluate
from tools.metrics.clips import VideoFiles, choose_window, shuffle_key
from tools.metrics.options import EvaluateConfig
from tools.metrics.protocols import PROTOCOLS, describe_protocol, fill_in, protocol_record, why_not

SIZE, NUM_REAL, NUM_FAKE = 24, 7, 6
LENGTHS = (49, 55, 17, 62, 48, 20, 58, 50, 53, 51)  # frames of the real videos: two are too short for stride 3


def frames_of(number: int, total: int, size: tuple[int, int]) -> np.ndarray:
    """A scene of its own that moves: (F, H, W, 3) uint8."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    wide = np.asarray(small.resize((size[1] + total, size[0]), Image.Resampling.BICUBIC))
    return np.stack([wide[:, i : i + size[1]] for i in range(total)])


def save(folder: Path, frames: np.ndarray, suffix: str = ".png") -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:04d}{suffix}")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """real/ with videos of 30 x 43 pixels, some in folders of their own, and fake/ with samples of 24 x 24."""
    root = tmp_path_factory.mktemp("protocols")
    for number, total in enumerate(LENGTHS):
        save(root / "real" / f"class_{number % 2}" / f"video_{number}", frames_of(number, total, (30, 43)))
    for number in range(NUM_FAKE):
        save(root / "fake" / f"{number:06d}", frames_of(100 + number, 20, (SIZE, SIZE)))
    return root


def read(folder: Path) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in sorted(folder.iterdir())]


def convert(image: Image.Image, protocol: str) -> np.ndarray:
    """A frame as the tools' converters write it: (S, S, 3)."""
    if protocol == "ours":
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)
        return square(pixels, SIZE, flip=False).movedim(0, -1).numpy()
    w, h = image.size
    if protocol == "stylegan-v":  # the short edge to S, then the centre
        w, h = (SIZE, int(SIZE * h / w)) if w < h else (int(SIZE * w / h), SIZE)
        image = image.resize((w, h), Image.Resampling.LANCZOS)
        left, top = round((w - SIZE) / 2), round((h - SIZE) / 2)
        return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
    side = min(w, h)
    left, top = round((w - side) / 2), round((h - side) / 2)
    image = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    file = BytesIO()
    image.save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def frechet(a: np.ndarray, b: np.ndarray, ddof: int) -> float:
    """The trace of (A B)^(1/2) from the eigenvalues of Y A Y' / N, where B = Y' Y / N; all in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    A, Y = np.cov(a, rowvar=False, ddof=ddof), b - b.mean(0)
    values = np.linalg.eigvalsh(Y @ A @ Y.T / (len(b) - ddof))
    cross = np.sqrt(np.where(values > values[-1] * 1e-13, values, 0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + b.var(0, ddof=ddof).sum() - 2 * cross


STRIDE = {"ours": 3, "latte": 3, "stylegan-v": 1, "skip-dit": 1}


def real_clips(data: Path, protocol: str) -> list[tuple[Path, list[int]]]:
    """The videos that FVD uses, and the frames of each. The tools draw without a seed; our draw is taken over."""
    stride, kept = STRIDE[protocol], 17 if protocol == "skip-dit" else 10**6
    folders = sorted((data / "real").glob("*/*"), key=lambda folder: folder.name)
    if protocol != "stylegan-v":
        folders.sort(key=lambda folder: shuffle_key(folder.name, 0))
    totals = {folder: min(kept, len(list(folder.iterdir()))) for folder in folders}
    usable = [folder for folder in folders if totals[folder] >= 16 * stride][:NUM_REAL]
    windows = {folder: choose_window(totals[folder], 16, stride, folder.name, 0) for folder in usable}
    for folder, window in windows.items():
        assert len(window) == 16 and window.step == stride and window[-1] < totals[folder]
    return [(folder, list(window)) for folder, window in windows.items()]


def run(monkeypatch, tmp_path: Path, data: Path, networks: dict[str, Path], *more: str) -> dict:
    options = [f"real_path={data}/real", f"fake_path={data}/fake", f"image_size={SIZE}", f"num_real={NUM_REAL}"]
    options += [f"num_fake={NUM_FAKE}", "jackknife=0", "num_workers=0", "feature_path=null"]
    options += [f"{name}={networks[name]}" for name in ("i3d", "inception")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options, f"output={tmp_path}/out.json", *more])
    evaluate.main()
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit is deprecated; the published files are not
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scores_are_those_of_the_tool(protocol, data, networks, monkeypatch, tmp_path):
    """FVD and FID to 1e-6, the pixels of all real clips to the grey level."""
    i3d, inception = (torch.jit.load(networks[name]) for name in ("i3d", "inception"))

    def clip_features(clips: list[np.ndarray]) -> np.ndarray:
        x = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)  # (N, 3, F, S, S)
        return i3d(x.contiguous(), rescale=True, resize=True, return_features=True).detach().numpy()

    def frame_features(frames: list[np.ndarray]) -> np.ndarray:
        x = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        return inception(x.contiguous(), return_features=True).detach().numpy()

    chosen = real_clips(data, protocol)
    real = [np.stack([convert(read(folder)[i], protocol) for i in window]) for folder, window in chosen]
    fakes = [read(folder)[:16] for folder in sorted((data / "fake").iterdir())]
    fake = [np.stack([convert(frame, protocol) for frame in clip]) for clip in fakes]
    if protocol == "ours":
        real_frames = [frame for clip in real for frame in clip]
    else:
        last = 17 if protocol == "skip-dit" else None
        real_frames = [convert(f, protocol) for v in sorted((data / "real").glob("*/*")) for f in read(v)[:last]]

    cfg = fill_in(
        load_config(EvaluateConfig, None, [f"protocol={protocol}", f"image_size={SIZE}", f"real_path={data}/real"])
    )
    ours = VideoFiles(cfg, "real_path", NUM_REAL, cfg.real_stride)
    usable = [clip for clip in (ours[i] for i in range(len(ours))) if isinstance(clip, torch.Tensor)][:NUM_REAL]
    for clip, expected in zip(usable, real, strict=True):
        assert np.array_equal(clip.movedim(1, -1).numpy(), expected)

    record = run(monkeypatch, tmp_path, data, networks, f"protocol={protocol}", "metrics=fvd,fid")
    ddof = 1 if protocol == "ours" else 0
    fvd = frechet(clip_features(real), clip_features(fake), ddof)
    fid = frechet(frame_features(real_frames), frame_features([frame for clip in fake for frame in clip]), ddof)
    assert record["metrics"]["fvd"]["value"] == pytest.approx(fvd, rel=1e-6)
    assert record["metrics"]["fid"]["value"] == pytest.approx(fid, rel=1e-6)
    assert record["protocol"]["departures"].keys() == {"num_real", "num_fake", "image_size"}
    if protocol != "ours":
        assert record["real"]["all_frames"]["frames"] == len(real_frames)


def test_protocols_differ(data, networks, monkeypatch, tmp_path):
    """On the same two folders no two protocols give one FVD."""
    scores = {run(monkeypatch, tmp_path, data, networks, f"protocol={p}")["metrics"]["fvd"]["value"] for p in PROTOCOLS}
    assert len(scores) == len(PROTOCOLS)


def test_frames_of_all_videos_are_kept(data, networks, monkeypatch, tmp_path):
    """The second run reads no video, and gives the same score; so does another seed, which chooses other clips."""
    options = ["protocol=latte", "metrics=fid", f"feature_path={tmp_path}/features"]
    first, *others = (run(monkeypatch, tmp_path, data, networks, *options, f"seed={seed}") for seed in (0, 0, 1))
    for record in others:
        assert record["metrics"]["fid"] == pytest.approx(first["metrics"]["fid"])
        assert record["real"]["all_frames"]["from_cache"]
        assert first["real"]["sha256"] == record["real"]["sha256"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit is deprecated; the published files are not
def test_videos_that_all_frames_lack_are_named(data, networks, monkeypatch, tmp_path):
    """A broken video is passed over and named, also where only FID over all frames reads it."""
    shutil.copytree(data / "real", tmp_path / "real")
    broken = next(path for path in sorted((tmp_path / "real").glob("*/*")) if path.is_dir())
    next(broken.iterdir()).write_bytes(b"")
    options = ["protocol=latte", "metrics=fid", f"real_path={tmp_path}/real", "max_bad_fraction=0.5"]
    record = run(monkeypatch, tmp_path, data, networks, *options)
    (warning,) = (line for line in record["warnings"] if "broken" in line)
    assert warning.startswith("real, all frames: 1 broken videos were passed over") and broken.name in warning


def test_jpeg_files_are_not_compressed_again(tmp_path):
    """A folder that Latte's converter wrote gives its pixels as they are; PNG files of the same pixels do not."""
    frames = frames_of(1, 16, (SIZE, SIZE))
    save(tmp_path / "jpg/a", frames, ".jpg")
    pixels = np.stack([np.asarray(image) for image in read(tmp_path / "jpg/a")])
    save(tmp_path / "png/a", pixels)
    clips = []
    for kind in ("jpg", "png"):
        options = ["protocol=latte", "real_stride=1", f"image_size={SIZE}", f"real_path={tmp_path}/{kind}"]
        clips.append(VideoFiles(fill_in(load_config(EvaluateConfig, None, options)), "real_path", 1, 1)[0])
    assert np.array_equal(clips[0].movedim(1, -1).numpy(), pixels)
    assert not torch.equal(clips[0], clips[1])


def record_of(*options: str) -> dict:
    """As much of a record as comparisons look at."""
    cfg = fill_in(load_config(EvaluateConfig, None, options))
    real, fake = {"clips": 9, "sha256": "a"}, {"clips": 8, "kind": "frames"}
    found = {"metrics": {"fvd": {}}, "detectors": {"i3d": {"sha256": "b"}}, "real": real, "fake": fake}
    return found | {"protocol": protocol_record(cfg)}


def test_departures_are_named():
    record = record_of("protocol=latte", "real_stride=1", "num_fake=70")
    assert record["protocol"]["departures"] == {"num_fake": [70, 2048], "real_stride": [1, 3]}
    assert describe_protocol(record) == "latte, but num_fake=70 (2048), real_stride=1 (3)"
    for options in (["protocol=latte"], ["protocol=latte", "real_stride=3"], ["protocol=latte", "real_stride=6"]):
        assert record_of(*options)["protocol"]["departures"] == {}, options  # 6 is Taichi's
    by_time = record_of("protocol=latte", "real_fps=8", "short_clips=spread")["protocol"]["departures"]
    assert by_time == {"real_stride": [1, 3], "real_fps": [8, None], "short_clips": ["spread", "skip"]}
    assert record_of("protocol=skip-dit", "real_stride=6")["protocol"]["departures"]
    for name in PROTOCOLS:
        assert record_of(f"protocol={name}")["protocol"]["departures"] == {}, name


def test_two_records_compare_if_only_the_samples_differ():
    first = record_of("protocol=latte")
    assert why_not(first, record_of("protocol=latte", "seed=1", "num_real=2048")) == ""
    older = record_of("protocol=latte")
    for name in ("real_fps", "short_clips"):
        del older["protocol"]["settings"][name]
    assert why_not(older, first) == why_not(first, older) == ""
    assert "real_fps=None, not 8" in why_not(first, record_of("protocol=latte", "real_fps=8"))
    reasons = why_not(record_of("protocol=skip-dit"), first)
    assert "real_stride=1, not 3" in reasons or "real_stride=3, not 1" in reasons
    changes = [
        (lambda r: r["fake"].update(clips=7), "fake clips"),
        (lambda r: r["fake"].update(kind="video files"), "fakes from"),
        (lambda r: r["real"].update(sha256="c"), "real files"),
        (lambda r: r["detectors"]["i3d"].update(sha256="c"), "i3d"),
        (lambda r: r.update(metrics={"kid": {}}), "no metric in common"),
    ]
    for change, word in changes:
        other = record_of("protocol=latte")
        change(other)
        assert word in why_not(first, other), word
    other = record_of("protocol=latte")
    other["detectors"]["c3d"] = {"sha256": "d"}  # of another metric
    assert why_not(first, other) == ""


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("protocol=stylegan", "protocol: 'stylegan' is unknown; valid: ours, stylegan-v, latte, skip-dit"),
        ("order=first", "order: 'first' is unknown; valid: random, sorted"),
        ("covariance=N+1", "covariance: 'N+1' is unknown; valid: N-1, N"),
        ("fid_frames=some", "fid_frames: 'some' is unknown; valid: clips, all"),
        ("first_frames=-1", "first_frames: -1 is less than 0"),
    ],
)
def test_mistakes_are_one_line(option, message):
    with pytest.raises(UserError) as error:
        load_config(EvaluateConfig, None, [option])
    assert str(error.value) == f"command line: {message}"
