"""Proxy judge of class-conditional samples of a small data set: right classes, real motion, copies of train clips.

    python tools/demo/judge.py                                            # real clips only
    python tools/demo/judge.py samples_path=sample_videos/demo            # a folder of sample/sample_ddp.py
    python tools/demo/judge.py samples_path='results/guidance_*' output=results/guidance.json   # several, a row each

The program trains a small classifier (minutes, one core) on the real train clips, and on spoiled ones that belong to no
class: in disorder, blurred to 8 x 8 pixels, two in one, drowned in noise. Then every set of clips gets a row:
  accuracy  of the classifier, with a 95 % Wilson interval; a clip that it finds to be of no class counts as wrong
  motion    mean |difference of neighbouring frames|; detail: of neighbouring pixels
  pixels    diversity: mean distance (RMSE) of two clips of a class; features: in the classifier's features
  nearest   mean distance (RMSE) to the nearest train clip at any offset in time; of a train clip to another one
  nearer    share of clips that are nearer to a train clip than every real test clip of their class; to read beside
            that of the train clips themselves, each compared with the other train clips
Measures are means over classes in grey levels, 0 ... 255, each with its ratio ("x") to the real train clips, motion
also with the range and the mean of the classes' own ratios. The rows "through VAE" are real clips encoded and decoded,
an upper bound for samples; for train clips, their `nearest` is that of a copy. A second table lists the real test clips
by class: it shows how much the measures of a class vary within its own shot. The judge is a proxy: it compares runs on
one data set, and is no FVD.

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
    fps: float | None = option(None, "frames of a real clip per second, as in training", above=0)
    image_size: int = option(64, "pixels of a side", least=8)
    epochs: int = option(20, "of the classifier's training", least=1)
    batch_size: int = option(16, "clips of a step", least=1)
    learning_rate: float = option(2.0e-3, "the highest of the schedule", above=0)
    seed: int = option(0, "everything random follows from it", least=0)


parser = cli.Parser(__doc__, JudgeConfig)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.files import check_writable, write_json
from configs.tables import markdown_table
from datasets import get_dataset
from datasets.clips import check_frame_rate, class_folders
from datasets.readers import BadClip, read_video
from datasets.transforms import square
from models.autoencoder import LatentCodec, find_weights
from models.hardware import describe_machine
from sample.folder import labelled_clips
from tools.demo.classifier import train_classifier
from tools.metrics.statistics import wilson

LEVELS = 127.5  # grey levels in one unit of [-1, 1]
USABLE = 0.95  # accuracy on real test clips below which the scores of samples mean nothing
MEASURES = ("motion", "detail", "pixels", "features", "nearest")
ROOTS = {"real train": "train_path", "real test": "test_path"}  # set -> the option that gives its folder


class ClipFiles(NamedTuple):
    """The files of a set of clips, N each."""

    paths: list[Path]
    labels: list[int]


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
        """The middle window of every clip, (N, F, 3, S, S)."""
        return self.windows(num_frames, torch.full([len(self.videos)], 0.5))


def find_sets(cfg: JudgeConfig) -> tuple[list[str], dict[str, ClipFiles]]:
    """The names of the classes, and the files of the real sets and of each folder of samples, before any is read.

    Raises:
        UserError: a folder is missing, a set has other classes than the train clips, or one clip of a class.
    """
    folders = sample_folders(cfg)
    if cfg.samples_path and not folders:
        raise UserError(f"samples_path: no folder {cfg.samples_path}")
    check_frame_rate(cfg.fps, cfg.frame_interval, None, ("fps", "frame_interval"))
    if cfg.image_size % 8:  # of the VAE's stride, and four rows of tiles
        raise UserError(f"image_size: {cfg.image_size} is not a multiple of 8")
    roots = {name: require_path(cfg, key) for name, key in ROOTS.items()}
    names = class_folders(roots["real train"])
    if class_folders(roots["real test"]) != names:
        raise UserError(f"test_path: {cfg.test_path} has other class folders than train_path: {', '.join(names)}")
    files = {name: find_in_class_folders(root) for name, root in roots.items()}
    files |= {str(folder): find_samples(folder, names) for folder in folders}
    for name, (_, labels) in files.items():
        check_diversity(name, labels, names)
    return names, files


def sample_folders(cfg: JudgeConfig) -> list[Path]:
    """The folders that samples_path names, sorted."""
    if not cfg.samples_path:
        return []
    pattern = Path(cfg.samples_path)
    return sorted(path for path in pattern.parent.glob(pattern.name) if path.is_dir())


def find_in_class_folders(root: Path) -> ClipFiles:
    """The files in a folder of class folders."""
    options = TrainConfig(dataset="video_folder", data_path=str(root), num_classes=len(class_folders(root)))
    data = get_dataset(options)
    return ClipFiles(data.paths, data.labels)


def find_samples(folder: Path, names: list[str]) -> ClipFiles:
    """The files in a folder of samples; their labels are positions in `names`."""
    if class_folders(folder) == names:
        return find_in_class_folders(folder)
    return ClipFiles(*labelled_clips(folder, names))


def check_diversity(name: str, labels: Sequence[int], names: Sequence[str]) -> None:
    """Raises UserError unless the set `name` has two clips of every class."""
    if min(map(list(labels).count, range(len(names)))) < 2:
        raise UserError(f"{name}: diversity needs two clips of every class")


def load_clips(files: ClipFiles, cfg: JudgeConfig, interval: int, fps: float | None = None) -> Clips:
    """Reads every `interval`-th frame of the video files, or `fps` frames a second.

    Raises:
        UserError: a file is broken, or too short.
    """
    videos = []
    for path in files.paths:
        try:
            frames = read_video(path, lambda total: range(0, total, interval), fps=fps)  # (F or more, 3, H, W)
        except BadClip as error:
            raise UserError(f"{path}: {error}") from None
        if len(frames) < cfg.num_frames:
            raise UserError(f"{path}: {len(frames)} frames at interval {interval}, num_frames={cfg.num_frames} needed")
        videos.append(square(frames, cfg.image_size, flip=False) / 127.5 - 1)
    return Clips(videos, torch.tensor(files.labels), [str(path) for path in files.paths])


def nearest(x: Tensor, train: Clips, itself: bool) -> tuple[Tensor, Tensor]:
    """The RMSE (N,) of each clip in x (N, F, 3, S, S) to the nearest train clip at any offset, and its index (N,).

    Args:
        itself: x are the train clips, and each is compared with the others only.
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
    """The accuracy and the measures of a set: means over classes, by class, and by clip."""
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
    """Adds the ratios to the real train clips, and `nearer`, to the report of a set."""
    report["mean"]["ratio"] = {key: report["mean"][key] / train["mean"][key] for key in MEASURES}
    for name, row in report["by_class"].items():
        row["ratio"] = {key: row[key] / train["by_class"][name][key] for key in MEASURES}
    ratios = [row["ratio"]["motion"] for row in report["by_class"].values()]  # their mean hides classes that stand
    report["mean"]["motion_ratios"] = {"mean": sum(ratios) / len(ratios), "least": min(ratios), "most": max(ratios)}
    limits = [row["nearest_of_all"] for row in test["by_class"].values()]
    report["nearer"] = sum(clip["nearest"] < limits[clip["label"]] for clip in report["each"]) / report["clips"]


def report_tables(reports: dict[str, dict[str, Any]]) -> str:
    """A table of the sets, and one of their classes, with the number of clips judged as each class, and as none."""

    def measures(row: dict[str, Any]) -> dict[str, str]:
        return {key: f"{row[key]:.2f} ({row['ratio'][key]:.2f}x)" for key in MEASURES}

    sets, classes = [], []
    for name, report in reports.items():
        low, high = report["accuracy_interval"]
        accuracy = f"{report['accuracy']:.1%} ({low:.1%}-{high:.1%})"
        cells = {"proxy judge": name, "clips": str(report["clips"]), "accuracy": accuracy}
        cells |= measures(report["mean"]) | {"nearer": f"{report['nearer']:.1%}"}
        spread = report["mean"]["motion_ratios"]
        cells["motion"] += " classes {least:.2f} to {most:.2f}x, mean {mean:.2f}x".format(**spread)
        if not name.startswith("real "):
            cells["nearer"] += f" (train clips to others: {reports['real train']['nearer']:.1%})"
        sets.append(cells)
        if name == "real test" or not name.startswith("real "):
            for label, row in report["by_class"].items():
                judged = " ".join(map(str, row["judged_as"]))
                classes.append({"class": f"{name}: {label}"} | measures(row) | {"judged as": judged})
    return f"{markdown_table(sets)}\n\n{markdown_table(classes)}"


def judge(cfg: JudgeConfig) -> dict[str, Any]:
    """The record of all sets: reads the clips, trains the classifier, measures each set."""
    names, files = find_sets(cfg)
    codec = LatentCodec.from_pretrained(require_path(cfg, "vae_path"))
    sets = {name: load_clips(files.pop(name), cfg, cfg.frame_interval, cfg.fps) for name in ROOTS}
    for name in ROOTS:
        step = max(1, len(sets[name].files) // len(sets["real test"].files))  # as many train as test clips are enough
        some = Clips(*(column[::step] for column in sets[name]))
        check_diversity(f"{name} through VAE", some.labels.tolist(), names)
        videos = codec.decode(codec.encode(some.middle(cfg.num_frames)))  # (N, F, 3, S, S)
        sets[f"{name} through VAE"] = some._replace(videos=list(videos))
    sets |= {name: load_clips(samples, cfg, interval=1) for name, samples in files.items()}

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


def check_vae(cfg: JudgeConfig) -> None:
    """Raises UserError if there is no VAE at vae_path."""
    find_weights(require_path(cfg, "vae_path"))


def main() -> None:
    args = parser.parse_args()
    cfg = load_config(JudgeConfig, args.config, args.overrides)
    check_writable(cfg, "output")
    if args.dry_run:
        lines = [f"{name}: {getattr(cfg, key)}" for name, key in ROOTS.items()]
        lines += [f"samples: {folder}" for folder in sample_folders(cfg)] + [f"record: {cfg.output}"]
        checks = [partial(require_path, cfg, key) for key in ROOTS.values()]
        return cli.dry_run(cfg, lines, [*checks, partial(find_sets, cfg), partial(check_vae, cfg)])
    record = judge(cfg)
    write_json(cfg.output, record)
    print(report_tables(record["sets"]))
    if record["sets"]["real test"]["accuracy"] < USABLE:
        print(f"not usable: the judge knows less than {USABLE:.0%} of the real test clips; more epochs may help")
    print(f"record: {cfg.output}")


if __name__ == "__main__":
    cli.run(main)
