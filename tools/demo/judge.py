"""Proxy judge of class-conditional samples of a small data set: the right class? real motion? copies of train clips?

    python tools/demo/judge.py                                            # real clips only
    python tools/demo/judge.py samples_path=sample_videos/demo            # a folder of sample/sample_ddp.py
    python tools/demo/judge.py samples_path='results/guidance_*' output=results/guidance.json   # several, a row each

A small classifier is trained (minutes, one core) on the real train clips, and on spoiled ones that belong to no class:
in disorder, blurred to 8 x 8 pixels, two in one, drowned in noise. Then every set of clips gets a row:
  accuracy  of the classifier, with a 95 % Wilson interval; a clip that it says is of no class counts as wrong
  motion    mean |difference of neighbouring frames|; detail: of neighbouring pixels
  pixels    diversity: mean distance (RMSE) of two clips of a class; features: in the classifier's features
  nearest   mean distance (RMSE) to the nearest train clip at any offset in time; of a train clip to another one
  nearer    share of clips that are nearer to a train clip than every real test clip of their class
in grey levels, 0 ... 255, as the mean over classes, each also as a ratio ("x") to the real train clips. The rows
"through VAE" are real clips encoded and decoded: what samples can be at best; with train clips, `nearest` is that of a
copy. Real test clips are listed by class too: how far a class's figures differ within its own shot. All this is a
proxy: it compares runs on one data set, and is no FVD.

Samples are {seed}.mp4 with the labels in sample_ddp.json, {seed}_{class}.mp4 of sample/sample.py, or class folders.
Letters: N clips of a set, B of a batch, F frames, S pixels of a side, O offsets in time, K classes, D features.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configs import TrainConfig, UserError, cli, load_config, option, require_path


@dataclass(kw_only=True)
class JudgeConfig:
    """The proxy judge."""

    samples_path: str | None = option(None, "a folder, or a pattern of several; empty: real clips only", path=True)
    train_path: str | None = option("datasets/demo/train", "class folders of video files", path=True)
    test_path: str | None = option("datasets/demo/test", "class folders of video files", path=True)
    vae_path: str | None = option("pretrained/demo/vae", "the VAE's folder", path=True)
    output: str = option("results/judge.json", "the record to write", path=True)
    num_frames: int = option(16, "frames of a clip", least=2)
    frame_interval: int = option(1, "of real clips, as in training; samples are taken as they are", least=1)
    image_size: int = option(64, "pixels of a side", least=8)
    epochs: int = option(20, "of the classifier's training", least=1)
    batch_size: int = option(16, "clips of a step", least=1)
    learning_rate: float = option(2.0e-3, "the highest of the schedule", above=0)
    seed: int = option(0, "settles all that is random")


parser = cli.Parser(__doc__, JudgeConfig)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.files import check_writable, write_json
from configs.tables import markdown_table
from datasets import get_dataset
from datasets.clips import class_folders
from datasets.readers import BadClip, read_video
from datasets.transforms import square
from models.autoencoder import LatentCodec
from models.hardware import describe_machine
from sample.folder import labelled_clips
from tools.demo.classifier import train_classifier

LEVELS = 127.5  # grey levels in one unit of [-1, 1]
USABLE = 0.95  # accuracy on real test clips below which the word on samples counts for nothing
MEASURES = ("motion", "detail", "pixels", "features", "nearest")


class Clips(NamedTuple):
    """A set of clips in memory."""

    videos: list[Tensor]  # N of (F or more, 3, S, S) in [-1, 1]
    labels: Tensor  # (N,)
    files: list[str]

    def windows(self, num_frames: int, places: Tensor) -> Tensor:
        """A window of every clip, (N, F, 3, S, S); places (N,) in [0, 1) go from the first offset to the last."""
        starts = [int(p * (len(v) - num_frames + 1)) for v, p in zip(self.videos, places.tolist(), strict=True)]
        return torch.stack([v[o : o + num_frames] for v, o in zip(self.videos, starts, strict=True)])

    def middle(self, num_frames: int) -> Tensor:
        return self.windows(num_frames, torch.full([len(self.videos)], 0.5))


def load_class_folders(root: Path, cfg: JudgeConfig, interval: int) -> Clips:
    """The clips in a folder of class folders."""
    options = TrainConfig(dataset="video_folder", data_path=str(root), num_classes=len(class_folders(root)))
    data = get_dataset(options)
    return load_clips(data.paths, data.labels, cfg, interval)


def load_samples(folder: Path, names: list[str], cfg: JudgeConfig) -> Clips:
    """The clips in a folder of samples; their labels are positions in `names`."""
    if class_folders(folder) == names:
        return load_class_folders(folder, cfg, interval=1)
    return load_clips(*labelled_clips(folder, names), cfg, interval=1)


def load_clips(paths: Sequence[Path], labels: Sequence[int], cfg: JudgeConfig, interval: int) -> Clips:
    """Every `interval`-th frame of the video files."""
    videos = []
    for path in paths:
        try:
            frames = read_video(path, lambda total: range(0, total, interval))  # (F or more, 3, H, W)
        except BadClip as error:
            raise UserError(f"{path}: {error}") from None
        if len(frames) < cfg.num_frames:
            raise UserError(f"{path}: {len(frames)} frames at interval {interval}, num_frames={cfg.num_frames} needed")
        videos.append(square(frames, cfg.image_size, flip=False) / 127.5 - 1)
    return Clips(videos, torch.tensor(labels), [str(path) for path in paths])


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share; z = 1.96: 95 %."""
    centre = (hits + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(hits * (total - hits) / total + z * z / 4)
    return centre - half, centre + half


def nearest(x: Tensor, train: Clips, itself: bool) -> tuple[Tensor, Tensor]:
    """RMSE of each clip in x (N, F, 3, S, S) to the nearest train clip over offsets, (N,), and which it is, (N,).

    With `itself`, x are the train clips, and each looks for another one.
    """
    num_frames, rows = x.shape[1], x.flatten(1).double()  # (N, P)
    columns = []
    for video in train.videos:
        y = video.double().unfold(0, num_frames, 1).movedim(-1, 1).flatten(1)  # (O, P)
        columns.append((y.square().sum(1) - 2 * (rows @ y.T)).min(1))  # |x - y|^2 but for |x|^2, the same for all y
    squared, offsets = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))  # (N, train clips) each
    index = (squared.fill_diagonal_(math.inf) if itself else squared).argmin(1)
    starts = offsets.gather(1, index[:, None]).flatten().tolist()
    windows = [train.videos[i][o : o + num_frames] for i, o in zip(index.tolist(), starts, strict=True)]
    # By the difference itself: the products find the nearest, but cancel where it is a copy, even in float64.
    best = torch.stack([(a - b).square().mean() for a, b in zip(x, windows, strict=True)])
    return LEVELS * best.sqrt(), index


@torch.no_grad()
def measure(clips: Clips, train: Clips, model: nn.Sequential, names: list[str], cfg: JudgeConfig) -> dict[str, Any]:
    """The measures of a set: the mean over classes, by class, and by clip."""
    x = clips.middle(cfg.num_frames)  # (N, F, 3, S, S)
    features = torch.cat([model[0](batch.transpose(1, 2)) for batch in x.split(cfg.batch_size)])  # (N, D)
    judged = model[1](features).argmax(1)  # (N,)
    distance, twin = nearest(x, train, itself=clips is train)
    by_class = {}
    for label, name in enumerate(names):
        own = clips.labels == label
        v = x[own] * LEVELS
        by_class[name] = {
            "judged_as": judged[own].bincount(minlength=len(names) + 1).tolist(),  # a row of the confusion matrix
            "motion": v.diff(dim=1).abs().mean().item(),
            "detail": (v.diff(dim=3).abs().mean().item() + v.diff(dim=4).abs().mean().item()) / 2,
            "pixels": F.pdist(v.flatten(1)).mean().item() / math.sqrt(v[0].numel()),
            "features": F.pdist(features[own]).mean().item(),
            "nearest": distance[own].mean().item(),
            "nearest_of_all": distance[own].min().item(),
        }
    hits = int((judged == clips.labels).sum())
    columns = (clips.labels.tolist(), judged.tolist(), distance.tolist(), [train.files[i] for i in twin])
    keys = ("file", "label", "judged", "nearest", "nearest_file")
    return {
        "clips": len(x),
        "accuracy": hits / len(x),
        "accuracy_interval": wilson(hits, len(x)),
        "mean": {key: sum(row[key] for row in by_class.values()) / len(names) for key in MEASURES},
        "by_class": by_class,
        "each": [dict(zip(keys, row, strict=True)) for row in zip(clips.files, *columns, strict=True)],
    }


def compare(report: dict[str, Any], train: dict[str, Any], test: dict[str, Any]) -> None:
    """Adds to the measures of a set their ratios to those of the real clips."""
    report["mean"]["ratio"] = {key: report["mean"][key] / train["mean"][key] for key in MEASURES}
    for name, row in report["by_class"].items():
        row["ratio"] = {key: row[key] / train["by_class"][name][key] for key in MEASURES}
    limits = [row["nearest_of_all"] for row in test["by_class"].values()]
    report["nearer"] = sum(clip["nearest"] < limits[clip["label"]] for clip in report["each"]) / report["clips"]


def report_tables(reports: dict[str, dict[str, Any]]) -> str:
    """A table of the sets, and one of the classes with the number of clips judged to be of each, last of none."""

    def measures(row: dict[str, Any]) -> dict[str, str]:
        return {key: f"{row[key]:.2f} ({row['ratio'][key]:.2f}x)" for key in MEASURES}

    sets, classes = [], []
    for name, report in reports.items():
        low, high = report["accuracy_interval"]
        accuracy = f"{report['accuracy']:.1%} ({low:.1%}-{high:.1%})"
        cells = {"proxy judge": name, "clips": str(report["clips"]), "accuracy": accuracy}
        sets.append(cells | measures(report["mean"]) | {"nearer": f"{report['nearer']:.1%}"})
        if name == "real test" or not name.startswith("real "):
            for label, row in report["by_class"].items():
                judged = " ".join(map(str, row["judged_as"]))
                classes.append({"class": f"{name}: {label}"} | measures(row) | {"judged as": judged})
    return f"{markdown_table(sets)}\n\n{markdown_table(classes)}"


def sample_folders(cfg: JudgeConfig) -> list[Path]:
    """The folders that samples_path names; UserError if there are none."""
    if not cfg.samples_path:
        return []
    pattern = Path(cfg.samples_path)
    folders = sorted(path for path in pattern.parent.glob(pattern.name) if path.is_dir())
    if not folders:
        raise UserError(f"samples_path: no folder {pattern}")
    return folders


def judge(cfg: JudgeConfig, folders: list[Path]) -> dict[str, Any]:
    """Reads all clips, trains the classifier, measures each set; returns the record."""
    roots = {"real train": require_path(cfg, "train_path"), "real test": require_path(cfg, "test_path")}
    names = class_folders(roots["real train"])
    if class_folders(roots["real test"]) != names:
        raise UserError(f"test_path: {cfg.test_path} has other class folders than train_path: {', '.join(names)}")
    sets = {name: load_class_folders(root, cfg, cfg.frame_interval) for name, root in roots.items()}
    codec = LatentCodec.from_pretrained(require_path(cfg, "vae_path"))
    for name in roots:
        step = max(1, len(sets[name].files) // len(sets["real test"].files))  # as many train as test clips will do
        some = Clips(*(column[::step] for column in sets[name]))
        videos = codec.decode(codec.encode(some.middle(cfg.num_frames)))  # (N, F, 3, S, S)
        sets[f"{name} through VAE"] = some._replace(videos=list(videos))
    sets |= {str(folder): load_samples(folder, names, cfg) for folder in folders}
    for name, clips in sets.items():
        if (clips.labels.bincount(minlength=len(names)) < 2).any():
            raise UserError(f"{name}: diversity needs two clips of every class")

    train = sets["real train"]
    draw = partial(train.windows, cfg.num_frames)
    model = train_classifier(draw, train.labels, len(names), cfg.epochs, cfg.batch_size, cfg.learning_rate, cfg.seed)
    reports = {name: measure(clips, train, model, names, cfg) for name, clips in sets.items()}
    for report in reports.values():
        compare(report, reports["real train"], reports["real test"])
    return {
        "what": "proxy judge, see tools/demo/judge.py; differences and RMSE in grey levels, 0 ... 255",
        "config": asdict(cfg),
        "machine": describe_machine(torch.device("cpu")),
        "classes": [*names, "none"],
        "sets": reports,
    }


def main() -> None:
    args = parser.parse_args()
    cfg = load_config(JudgeConfig, args.config, args.overrides)
    check_writable(cfg, "output")
    folders = sample_folders(cfg)
    if args.dry_run:
        checks = [partial(require_path, cfg, key) for key in ("train_path", "test_path", "vae_path")]
        lines = [f"samples: {folder}" for folder in folders] + [f"record: {cfg.output}"]
        return cli.dry_run(cfg, lines, checks)
    record = judge(cfg, folders)
    write_json(cfg.output, record)
    print(report_tables(record["sets"]))
    if record["sets"]["real test"]["accuracy"] < USABLE:
        print(f"not usable: the judge knows less than {USABLE:.0%} of the real test clips; more epochs may help")
    print(f"record: {cfg.output}")


if __name__ == "__main__":
    cli.run(main)
