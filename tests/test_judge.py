"""tools/demo/judge.py: labels come from what the samplers write, measures respond to their faults, runs repeat."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from configs import UserError, load_config
from sample.folder import DDP_RECORD
from sample.media import save_video
from tools.demo import judge
from tools.demo.classifier import augment, blur, create_classifier, train_classifier

NAMES, SIZE, FRAMES = ["Hill", "Lake", "Wood"], 32, 4


def clip(label: int, number: int, frames: int = FRAMES + 2) -> Tensor:
    """(F, 3, S, S): the class's scene, which moves by a pixel a frame; each clip starts elsewhere in another light."""
    scene = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(label)) * 2 - 1
    scene = torch.nn.functional.interpolate(scene, scale_factor=8, mode="bilinear")[0]  # (3, 48, 48)
    light = torch.linspace(0.7, 1, 8)[number % 8]
    return light * torch.stack([scene[:, 4 : 4 + SIZE, number % 4 + t :][..., :SIZE] for t in range(frames)])


def memory(videos: Tensor, label: int = 0) -> judge.Clips:
    """Clips of one class that were read from no file."""
    return judge.Clips(list(videos), torch.full([len(videos)], label), [f"{i}.mp4" for i in range(len(videos))])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """train/ and test/ with class folders, and samples*/ as sample_ddp.py writes them, seeds from 100 on."""
    root = tmp_path_factory.mktemp("judge")
    for split, numbers in (("train", range(8)), ("test", range(2))):
        for label, name in enumerate(NAMES):
            for number in numbers:
                save_video(root / split / name / f"v_{name}_{number}.mp4", clip(label, number), fps=8)
    record = {"config": {"seed": 100}, "labels": [2, 0, 1, 1, 0, 2]}
    for i, label in enumerate(record["labels"]):
        video = clip(label, i, FRAMES)
        save_video(root / "samples" / f"{100 + i:06d}.mp4", video, fps=8)
        save_video(root / "samples_blurred" / f"{100 + i:06d}.mp4", blur(video[None], 8)[0], fps=8)
    for folder in ("samples", "samples_blurred"):
        (root / folder / DDP_RECORD).write_text(json.dumps(record))
    return root


@pytest.fixture
def options(data, tiny, tmp_path) -> list[str]:
    paths = {"train_path": data / "train", "test_path": data / "test", "vae_path": tiny.parent / "vae"}
    values = {
        "output": tmp_path / "judge.json",
        "num_frames": FRAMES,
        "image_size": SIZE,
        "epochs": 30,
        "batch_size": 4,
    }
    return [f"{key}={value}" for key, value in (paths | values).items()]


def run(monkeypatch, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["judge.py", *arguments])
    judge.main()
    output = next(a for a in arguments if a.startswith("output="))
    return json.loads(Path(output.removeprefix("output=")).read_text())


def test_the_program_judges_real_clips_and_samples(data, options, monkeypatch, capsys):
    """The classifier learns from a handful of clips, knows samples from blurs, and a second run says the same."""
    sets = run(monkeypatch, *options, f"samples_path={data}/sam*")["sets"]
    real, vae, folders = (
        ["real train", "real test"],
        ["real train through VAE", "real test through VAE"],
        ["", "_blurred"],
    )
    assert list(sets) == [*real, *vae, *(f"{data}/samples{suffix}" for suffix in folders)]
    samples, blurred = list(sets.values())[-2:]
    assert sets["real train"]["accuracy"] == sets["real test"]["accuracy"] == samples["accuracy"] == 1
    assert blurred["accuracy"] < 0.5 and blurred["by_class"]["Lake"]["judged_as"][3] > 0
    assert samples["clips"] == 6 and samples["by_class"]["Wood"]["judged_as"] == [0, 0, 2, 0]
    assert samples["each"][0]["label"] == 2 and "Wood" in samples["each"][0]["nearest_file"]
    assert samples["mean"]["ratio"]["motion"] == pytest.approx(1, abs=0.25)
    ratios = [row["ratio"]["motion"] for row in samples["by_class"].values()]
    found = samples["mean"]["motion_ratios"]
    assert (found["least"], found["most"]) == (min(ratios), max(ratios)) and found["mean"] == pytest.approx(
        sum(ratios) / 3
    )
    out = capsys.readouterr().out
    assert f"(train clips to others: {sets['real train']['nearer']:.1%})" in out and "x, mean 1.00x" in out
    assert "proxy judge" in out and "not usable" not in out
    assert run(monkeypatch, *options, f"samples_path={data}/sam*")["sets"] == sets


def test_a_judge_that_fails_on_real_clips_says_so(options, monkeypatch, capsys):
    run(monkeypatch, *options, "epochs=1", "learning_rate=1e-9")
    assert "not usable" in capsys.readouterr().out


def test_labels_come_from_the_record_the_names_or_the_folders(data, tmp_path):
    cfg = load_config(judge.JudgeConfig, overrides=[f"num_frames={FRAMES}", f"image_size={SIZE}"])

    def labels(folder: Path) -> list[int]:
        return judge.load_clips(judge.find_samples(folder, NAMES), cfg, interval=1).labels.tolist()

    assert labels(data / "samples") == [2, 0, 1, 1, 0, 2]
    for seed, label in enumerate([1, 2, 0]):
        save_video(tmp_path / f"{seed:06d}_{NAMES[label]}.mp4", clip(label, 0), fps=8)
    save_video(tmp_path / "grid.mp4", clip(0, 0), fps=8)  # sample.py's; no sample
    assert labels(tmp_path) == [1, 2, 0]
    assert labels(data / "test") == [0, 0, 1, 1, 2, 2]


def test_nearest_is_the_least_rmse_over_offsets():
    """As by brute force, in grey levels; a train clip does not find itself."""
    torch.manual_seed(0)
    train = memory(torch.rand(3, FRAMES + 3, 3, 8, 8) * 2 - 1)
    x = torch.rand(5, FRAMES, 3, 8, 8) * 2 - 1
    x[1] = train.videos[2][1 : 1 + FRAMES] + 0.01
    distance, index = judge.nearest(x, train, itself=False)
    windows = [[v[o : o + FRAMES] for o in range(4)] for v in train.videos]
    brute = [[min((127.5 * (clip - w)).square().mean().sqrt().item() for w in ws) for ws in windows] for clip in x]
    assert distance.tolist() == pytest.approx([min(row) for row in brute], rel=1e-3)
    assert index.tolist() == [row.index(min(row)) for row in brute]
    assert distance[1].item() == pytest.approx(1.275, rel=1e-3) and index[1] == 2
    alone, index = judge.nearest(train.middle(FRAMES), train, itself=True)
    assert (alone > 50).all() and (index != torch.arange(3)).all()


def test_nearest_is_exact_for_copies_and_near_copies():
    """0 for a copy, and to fp32's rounding for noise of 1e-4, whose square is below the rounding of |x|^2 in fp32."""
    torch.manual_seed(0)
    train = memory(torch.rand(3, FRAMES + 3, 3, 16, 16) * 2 - 1)
    copies = torch.stack([video[o : o + FRAMES] for video, o in zip(train.videos, (0, 1, 3), strict=True)])
    distance, index = judge.nearest(copies, train, itself=False)
    assert distance.tolist() == [0, 0, 0] and index.tolist() == [0, 1, 2]
    noisy = copies + 1e-4 * torch.randn_like(copies)
    distance, index = judge.nearest(noisy, train, itself=False)
    exact = 127.5 * (noisy.double() - copies.double()).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(distance.double(), exact, rtol=1e-6, atol=0)  # fp32 sums of like terms: some 1e-7
    assert index.tolist() == [0, 1, 2]


def test_measures_respond_to_what_they_measure():
    """Frozen, shuffled, blurred, identical and copied clips each move the measure that is theirs."""
    cfg = load_config(judge.JudgeConfig, overrides=[f"num_frames={FRAMES}"])
    torch.manual_seed(0)
    model = create_classifier(1)
    frames = torch.rand(8, 1, 3, SIZE, SIZE) * 2 - 1
    drift = torch.linspace(-0.2, 0.2, FRAMES)[:, None, None, None]
    train, test = (memory(half * 0.7 + drift) for half in frames.split(4))  # (4, F, 3, S, S) each

    def measured(videos: Tensor) -> dict:
        reports = [judge.measure(c, train, model, ["A"], cfg) for c in (memory(videos), train, test)]
        judge.compare(*reports)
        return reports[0] | reports[0]["mean"]

    x = test.middle(FRAMES)
    real = measured(x)
    assert real["motion"] == pytest.approx(0.4 / 3 * 127.5, rel=1e-4) and real["nearer"] == 0
    assert measured(x[:, :1].expand_as(x))["motion"] == 0
    assert measured(x[:, [0, 3, 1, 2]])["motion"] > 1.5 * real["motion"]
    blurred = torch.nn.functional.avg_pool3d(x, (1, 5, 5), stride=1, padding=(0, 2, 2))
    assert measured(blurred)["detail"] < 0.5 * real["detail"]
    same = measured(x[:1].expand_as(x))
    assert same["pixels"] < 0.1 and same["features"] < 1e-3 < 0.1 * real["features"]
    copies = measured(train.middle(FRAMES))
    assert copies["nearest"] < 0.1 and copies["nearer"] == 1 and copies["ratio"]["pixels"] == pytest.approx(1)


def test_augmentation_keeps_a_clip_still():
    """Each clip is changed in its own way, and the same way in all of its frames but for the noise."""
    torch.manual_seed(0)
    still = clip(1, 0, frames=1).expand(3, 8, 3, -1, -1)
    y = augment(still)
    assert y.shape == still.shape and not torch.allclose(y[0], y[1], atol=0.3)
    motion = y.diff(dim=1).flatten(1).std(1)  # of two draws of noise, each with a deviation of 0.15 at most
    assert (motion < 1.1 * 0.15 * math.sqrt(2)).all()


@pytest.mark.parametrize(("hits", "total"), [(0, 7), (84, 84), (60, 70)])
def test_wilson_is_scipys(hits, total):
    interval = binomtest(hits, total).proportion_ci(method="wilson")
    assert judge.wilson(hits, total) == pytest.approx((interval.low, interval.high), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("samples_path=nowhere", "samples_path: no folder"),
        ("samples_path={data}/train/Hill", "holds no samples of Hill, Lake, Wood"),
        ("test_path={data}/test/Hill", "has other class folders than train_path"),
        ("train_path=nowhere", "train_path: nothing at"),
        ("vae_path={data}", "no VAE in"),
        ("num_frames=7", "6 frames at interval 1, num_frames=7 needed"),
        ("frame_interval=2", "3 frames at interval 2, num_frames=4 needed"),
        ("fps=4", "3 frames at interval 1, num_frames=4 needed"),
        ("fps=4 frame_interval=2", "fps: 4 chooses frames by time, frame_interval: 2 by number"),
        ("smaples_path=x", "did you mean samples_path?"),
    ],
)
def test_mistakes_are_one_line(data, options, monkeypatch, change, message):
    with pytest.raises(UserError) as error:
        run(monkeypatch, *options, *change.format(data=data).split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_class_needs_two_samples(data, options, monkeypatch, tmp_path):
    for seed, label in enumerate([0, 0, 1, 1, 2]):
        save_video(tmp_path / "one" / f"{seed}_{NAMES[label]}.mp4", clip(label, 0), fps=8)
    with pytest.raises(UserError, match="two clips of every class"):
        run(monkeypatch, *options, f"samples_path={tmp_path}/one")


MISSING = [
    ("train_path=/nowhere", "train_path: nothing at /nowhere"),
    ("test_path=/nowhere", "test_path: nothing at /nowhere"),
    ("test_path={data}/test/Hill", "has other class folders than train_path"),
    ("vae_path=/nowhere", "vae_path: nothing at /nowhere"),
    ("vae_path={data}", "no VAE in"),
    ("samples_path=/nowhere", "samples_path: no folder /nowhere"),
    ("samples_path={tmp_path}/*", "samples_path: no folder"),
    ("samples_path={data}/train/Hill", "holds no samples of Hill, Lake, Wood"),
    ("samples_path={data}/other", "holds no samples of Hill, Lake, Wood, or of other classes too"),
    ("samples_path={data}/one", "/one: diversity needs two clips of every class"),
    ("output={data}", "is a folder, where a file is to be written"),
]


@pytest.fixture(scope="module")
def wrong_samples(data) -> Path:
    """Folders of samples beside the others: other/ with a class that is not theirs, one/ with one clip of a class."""
    for seed, name in enumerate([*NAMES, "Sea", *NAMES]):
        save_video(data / "other" / f"{seed}_{name}.mp4", clip(0, seed), fps=8)
    for seed, label in enumerate([0, 0, 1, 1, 2]):
        save_video(data / "one" / f"{seed}_{NAMES[label]}.mp4", clip(label, 0), fps=8)
    return data


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize(("change", "message"), MISSING)
def test_folders_are_checked_before_anything_is_read(
    wrong_samples, options, tmp_path, monkeypatch, flags, change, message
):
    """By a run before it reads a clip or trains, and by a dry run."""
    for name in ("train_classifier", "load_clips"):
        monkeypatch.setattr(judge, name, lambda *_, name=name: pytest.fail(f"{name} is called"))
    with pytest.raises(UserError) as error:
        run(monkeypatch, *options, change.format(data=wrong_samples, tmp_path=tmp_path), *flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_dry_run_says_what_would_run(data, options, monkeypatch, tmp_path, capsys):
    """Sets, options, and all that is missing in one line; nothing is written."""
    monkeypatch.setattr(sys, "argv", ["judge.py", *options, f"samples_path={data}/samples*", "--dry-run"])
    judge.main()
    out = capsys.readouterr().out
    for line in (f"# real train: {data}/train", f"# samples: {data}/samples_blurred", f"num_frames: {FRAMES}"):
        assert f"{line}\n" in out, line
    with pytest.raises(UserError, match=r"train_path: nothing at /a; test_path: .* /b; vae_path: nothing at /c"):
        run(monkeypatch, *options, "train_path=/a", "test_path=/b", "vae_path=/c", "--dry-run")
    assert not list(tmp_path.iterdir())


def test_training_repeats_and_draws_a_window_for_each_clip():
    """The same seed gives the same weights, bit for bit; another seed gives others."""
    clips, labels = torch.stack([clip(label % 3, label) for label in range(6)]), torch.tensor([0, 1, 2] * 2)

    def train(seed: int) -> tuple[Tensor, list[Tensor]]:
        drawn: list[Tensor] = []

        def draw(places: Tensor) -> Tensor:
            drawn.append(places)
            return clips[:, :FRAMES]

        model = train_classifier(draw, labels, 3, epochs=2, batch_size=4, learning_rate=1e-3, seed=seed)
        return model[1].weight, drawn

    (weight, drawn), (again, _), (other, _) = train(0), train(0), train(1)
    assert torch.equal(weight, again) and not torch.equal(weight, other)
    assert [len(places) for places in drawn] == [6, 6] and all(0 <= p < 1 for places in drawn for p in places.tolist())
