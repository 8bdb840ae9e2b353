"""Proxy judge of class-conditional samples of a small data set: the right class? real motion? copies of train clips?

    python tools/judge.py                                            # real clips only: what samples are held against
    python tools/judge.py samples_path=sample_videos/demo            # a folder of sample/sample_ddp.py
    python tools/judge.py samples_path='results/guidance_*' output=results/guidance.json       # several, a row each

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

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from configs import TrainConfig, UserError, load_config, path_option, require_path, to_yaml
from datasets import get_dataset
from datasets.clips import BadClip, class_folders, read_video
from datasets.transforms import square
from models.autoencoder import LatentCodec
from sample.sample_ddp import RECORD
from tools.common import cli
from tools.common.records import describe_machine, write_json

LEVELS = 127.5  # grey levels in one unit of [-1, 1]
USABLE = 0.95  # accuracy on real test clips below which the word on samples counts for nothing
FIGURES = ("motion", "detail", "pixels", "features", "nearest")


@dataclass(kw_only=True)
class JudgeConfig:
    """Options of the proxy judge."""

    samples_path: str | None = path_option()  # a folder, or a quoted pattern of several; None: real clips only
    train_path: str | None = path_option("datasets/demo/train")  # class folders of video files
    test_path: str | None = path_option("datasets/demo/test")
    vae_path: str | None = path_option("pretrained/demo/vae")
    output: str = path_option("results/judge.json")
    num_frames: int = 16  # of a clip
    frame_interval: int = 1  # of real clips, as the model was trained; samples are taken as they are
    image_size: int = 64
    # the classifier
    epochs: int = 20
    batch_size: int = 16
    lr: float = 2.0e-3
    seed: int = 0


class Clips(NamedTuple):
    """A set of clips in memory."""

    videos: list[Tensor]  # N of (F or more, 3, S, S) in [-1, 1]
    labels: Tensor  # (N,)
    files: list[str]

    def cut(self, num_frames: int, places: Tensor) -> Tensor:
        """A window of every clip, (N, F, 3, S, S); places (N,) in [0, 1) go from the first offset to the last."""
        starts = [int(p * (len(v) - num_frames + 1)) for v, p in zip(self.videos, places.tolist(), strict=True)]
        return torch.stack([v[o : o + num_frames] for v, o in zip(self.videos, starts, strict=True)])

    def middle(self, num_frames: int) -> Tensor:
        return self.cut(num_frames, torch.full([len(self.videos)], 0.5))


def load_class_folders(root: Path, cfg: JudgeConfig, interval: int) -> Clips:
    """The clips in a folder of class folders."""
    options = TrainConfig(dataset="video_folder", data_path=str(root), num_classes=len(class_folders(root)))
    data = get_dataset(options)
    return load_clips(data.paths, data.labels, cfg, interval)


def load_samples(folder: Path, names: list[str], cfg: JudgeConfig) -> Clips:
    """The clips in a folder of samples; their labels are places in `names`."""
    if class_folders(folder) == names:
        return load_class_folders(folder, cfg, interval=1)
    files = sorted(folder.glob("[0-9]*.mp4"))
    if (folder / RECORD).exists():
        record = json.loads((folder / RECORD).read_text())
        labels = [record["labels"][int(file.stem) - record["config"]["seed"]] for file in files]
    else:
        labels = [names.index(name) for file in files if (name := file.stem.partition("_")[2]) in names]
    if not files or len(labels) < len(files) or max(labels) >= len(names):
        raise UserError(f"samples_path: {folder} holds no samples of {', '.join(names)}, or of other classes too")
    return load_clips(files, labels, cfg, interval=1)


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


def create_classifier(num_classes: int, widths: Sequence[int] = (16, 32, 64, 128)) -> nn.Sequential:
    """A (2+1)D convolutional network, (B, 3, F, S, S) -> features (B, D) -> logits (B, K + 1), the last of no class."""
    body = nn.Sequential()
    for before, width in zip([3, *widths], widths, strict=False):
        space = nn.Conv3d(before, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        time = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0))
        body.extend([space, nn.GroupNorm(8, width), nn.ReLU(), time, nn.GroupNorm(8, width), nn.ReLU()])
    body.extend([nn.AdaptiveAvgPool3d(1), nn.Flatten()])
    return nn.Sequential(body, nn.Linear(widths[-1], num_classes + 1))


def blur(x: Tensor, size: int) -> Tensor:
    """Squares of `size` pixels averaged, then interpolated: (B, F, 3, S, S)."""
    return F.interpolate(F.avg_pool3d(x, (1, size, size)), size=x.shape[2:], mode="trilinear")


def augment(x: Tensor) -> Tensor:
    """Changes what must not decide on the class: place, blur, colour, noise, any one part of (B, F, 3, S, S)."""
    B, num_frames, _, S, _ = x.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(B, *shape)

    zoom, shift = uniform(0.7, 1, 1), uniform(-1, 1, 2)  # of a crop inside the frame
    theta = torch.cat([torch.diag_embed(zoom.expand(-1, 2)), ((1 - zoom) * shift)[..., None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(theta, [B, 3, S, S], align_corners=False).repeat_interleave(num_frames, 0)  # (B F, S, S, 2)
    x = F.grid_sample(x.flatten(0, 1), grid, padding_mode="border", align_corners=False).unflatten(0, (B, num_frames))
    x = x.lerp(blur(x, 2), uniform(0, 1, 1, 1, 1, 1))
    x = x * uniform(0.6, 1.4, 1, 3, 1, 1) + uniform(-0.3, 0.3, 1, 3, 1, 1)
    x = x + uniform(0, 0.15, 1, 1, 1, 1) * torch.randn_like(x)
    rows, columns = ((torch.arange(S) - uniform(0, S, 1)).abs() < S / 6 for _ in range(2))  # (B, S)
    return x.masked_fill((rows[:, :, None] & columns[:, None])[:, None, None], 0)  # a grey square, S / 3 wide


def spoil(x: Tensor) -> Tensor:
    """Clips of no class from (B, F, 3, S, S): a quarter each in disorder, blurred, two in one, drowned in noise."""
    rows, columns = (torch.arange(x.shape[-1]).view(4, -1)[torch.randperm(4)].flatten() for _ in range(2))
    disorder = x[:, :, :, rows][..., columns]  # four rows and four columns of tiles, dealt anew
    noise = 0.3 * x + 0.5 * torch.randn_like(x)
    kinds = [disorder, blur(x, 8), (x + x.roll(1, 0)) / 2, noise]
    return torch.cat([kind[i :: len(kinds)] for i, kind in enumerate(kinds)])


def train_classifier(clips: Clips, num_classes: int, cfg: JudgeConfig) -> nn.Sequential:
    """The classifier, trained on random windows of `clips`; `cfg.seed` settles everything random."""
    torch.manual_seed(cfg.seed)
    model = create_classifier(num_classes)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = cfg.epochs * math.ceil(len(clips.files) / cfg.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, total_steps=steps)
    for _ in trange(cfg.epochs, desc="training the judge", unit="epoch"):
        x = clips.cut(cfg.num_frames, torch.rand(len(clips.files)))  # (N, F, 3, S, S)
        for batch in torch.randperm(len(x)).split(cfg.batch_size):
            y = augment(x[batch])
            none = spoil(y[::2])
            logits = model(torch.cat([y, none]).transpose(1, 2))  # (1.5 B, K + 1)
            labels = torch.cat([clips.labels[batch], torch.full([len(none)], num_classes)])
            F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model


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
    """The figures of a set: the mean over classes, by class, and by clip."""
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
        "mean": {key: sum(row[key] for row in by_class.values()) / len(names) for key in FIGURES},
        "by_class": by_class,
        "each": [dict(zip(keys, row, strict=True)) for row in zip(clips.files, *columns, strict=True)],
    }


def compare(report: dict[str, Any], train: dict[str, Any], test: dict[str, Any]) -> None:
    """Adds to the figures of a set how they stand to those of the real clips."""
    report["mean"]["ratio"] = {key: report["mean"][key] / train["mean"][key] for key in FIGURES}
    for name, row in report["by_class"].items():
        row["ratio"] = {key: row[key] / train["by_class"][name][key] for key in FIGURES}
    limits = [row["nearest_of_all"] for row in test["by_class"].values()]
    report["nearer"] = sum(clip["nearest"] < limits[clip["label"]] for clip in report["each"]) / report["clips"]


def table(reports: dict[str, dict[str, Any]]) -> str:
    """A line for each set, and one for each class with the number of clips judged to be of each class, last of none."""
    width = max(22, *map(len, reports))
    lines = [f"{'proxy judge':{width}} clips  accuracy           " + "".join(f"{k:>15}" for k in FIGURES) + "  nearer"]

    def figures(row: dict[str, Any]) -> str:
        return "".join(f"{row[key]:9.2f} {row['ratio'][key]:4.2f}x" for key in FIGURES)

    for name, report in reports.items():
        low, high = report["accuracy_interval"]
        line = f"{name:{width}} {report['clips']:5}  {report['accuracy']:6.1%} {f'({low:.1%}-{high:.1%})':14}"
        lines.append(f"{line}{figures(report['mean'])}{report['nearer']:8.1%}")
        if name == "real test" or not name.startswith("real "):
            for label, row in report["by_class"].items():
                lines.append(f"  {label:{width + 20}}{figures(row)}   judged as {row['judged_as']}")
    return "\n".join(lines)


def judge(cfg: JudgeConfig) -> dict[str, Any]:
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
    if cfg.samples_path:
        pattern = Path(cfg.samples_path)
        folders = sorted(path for path in pattern.parent.glob(pattern.name) if path.is_dir())
        if not folders:
            raise UserError(f"samples_path: no folder {pattern}")
        sets |= {str(folder): load_samples(folder, names, cfg) for folder in folders}
    for name, clips in sets.items():
        if (clips.labels.bincount(minlength=len(names)) < 2).any():
            raise UserError(f"{name}: diversity needs two clips of every class")

    model = train_classifier(sets["real train"], len(names), cfg)
    reports = {name: measure(clips, sets["real train"], model, names, cfg) for name, clips in sets.items()}
    for report in reports.values():
        compare(report, reports["real train"], reports["real test"])
    return {
        "what": "proxy judge, see tools/judge.py; differences and RMSE in grey levels, 0 ... 255",
        "config": asdict(cfg),
        "machine": describe_machine(torch.device("cpu")),
        "classes": [*names, "none"],
        "sets": reports,
    }


def main() -> None:
    args = cli.Parser(__doc__, JudgeConfig).parse_args()
    cfg = load_config(JudgeConfig, args.config, args.overrides)
    if args.dry_run:
        print(to_yaml(cfg), end="")
        return
    record = judge(cfg)
    write_json(cfg.output, record)
    print(table(record["sets"]))
    if record["sets"]["real test"]["accuracy"] < USABLE:
        print(f"not usable: the judge knows less than {USABLE:.0%} of the real test clips; more epochs may help")
    print(f"record: {cfg.output}")


if __name__ == "__main__":
    cli.run(main)
