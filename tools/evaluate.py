"""FVD, FID, KID, IS, video IS and an offline proxy of videos or of a checkpoint, with what makes a figure comparable.

    python tools/evaluate.py metrics=fvd real_path=/data/UCF101 fake_path=sample_videos/ucf101_cache
    torchrun --standalone --nproc_per_node=8 tools/evaluate.py metrics=fvd,fid,kid,is,video_is \\
        real_path=/data/UCF101 generate=configs/ucf101/ucf101_sample_cache.yaml sample.cache.interval=2
    python tools/evaluate.py metrics=proxy real_path=datasets/demo/train real_stride=1 image_size=64 \\
        num_fake=70 generate=configs/demo/demo_sample.yaml                   # the demo: no download, no GPU

  fvd       Fréchet distance of I3D features, StyleGAN-V's protocol: 2048 fake clips of 16 frames against up to 2048
            real ones, a random window at real_stride of each training video; videos too short for that are dropped.
            Published figures: real_stride=3 (Taichi 6). Covariances are over N - 1, as in FID; StyleGAN-V's over N.
  fid, kid  Fréchet distance and MMD of Inception features, over all frames of the same clips
  is        Inception score of the frames; video_is: of the clips, by the classes of a C3D (UCF101)
  proxy     Fréchet distance over 80 EfficientNet features that see texture and motion; no FVD, and not comparable
            with one, but its weights come with a package

real_path and fake_path hold video files or folders of frames, flat or nested. `generate` samples in memory instead of
reading fake_path: pixels are rounded to 8 bits as for a file, so only the compression of an mp4 makes a difference.
Which clips are used (when there are more than asked for) and where their windows begin depends on the seed and on
their names alone, not on folders, listing order or number of processes.

A Fréchet distance is the higher, the fewer the clips. Its 95 % interval is the spread of the distance when the fakes
are drawn anew, with replacement, put around the figure; its bias is how far the mean of such draws lies above the
figure, about as far as the figure lies above that of infinitely many fakes. Compare figures of equal numbers of clips.

Letters: N clips, n rows of features a clip (1, or F), D width, B batch, F frames, S pixels of a side.
"""

import hashlib
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from configs import SampleConfig, UserError, choice, load_config, path_option, require_path, to_yaml
from datasets.clips import BadClip, Choose, find_frame_folders, find_videos, read_frame_folder, read_video, summary
from datasets.transforms import square
from models.checkpoint import atomic_path, file_hash
from sample import sample, sample_ddp
from sample.options import describe, make_plan, make_record
from sample.pipeline import generate, load, resolve
from sample.sample_ddp import labels_of, video_path
from tools.common import cli
from tools.common.detectors import DETECTORS, OUTPUTS, Found, find_detector, load_output
from tools.common.distributed import Environment, distributed
from tools.common.frechet import distance_spread, frechet_distance
from tools.common.media import to_uint8
from tools.common.records import check_place, describe_machine, write_json

METRICS = {  # -> the output it is computed from
    "fvd": "i3d", "fid": "inception", "kid": "inception", "is": "inception_classes", "video_is": "c3d_classes",
    "proxy": "proxy",
}  # fmt: skip
ONE_SIDED = ("is", "video_is")  # of the fakes alone
PROTOCOL = {  # of published figures; stride 6 is Taichi's
    "num_real": [2048], "num_fake": [2048], "num_frames": [16], "real_stride": [3, 6], "fake_stride": [1],
    "image_size": [256],
}  # fmt: skip
LEAST = {
    "num_real": 2, "num_fake": 2, "num_frames": 2, "real_stride": 1, "fake_stride": 1, "image_size": 1, "bootstrap": 0,
    "batch_size": 1, "num_workers": 0,
}  # fmt: skip
KEPT_BY = ("num_real", "num_frames", "real_stride", "image_size", "resize_filter", "seed", "video_reader")  # features
VERSION = 1  # of kept features: to be raised when the code makes others of the same files
NOT_CLIPS = ("grid.mp4", "grid.gif", "compare.mp4")  # of sample/sample.py, beside its clips


@dataclass(kw_only=True)
class EvaluateConfig:
    """Options of the evaluation."""

    metrics: str = "fvd"  # of fvd, fid, kid, is, video_is, proxy, separated by commas
    real_path: str | None = path_option()  # training videos: files or frame folders, flat or nested
    fake_path: str | None = path_option()  # videos to be judged
    generate: str | None = path_option()  # or: YAML of sampling options, whose seeds seed ... seed + num_fake - 1 are
    sample: dict[str, Any] = field(default_factory=dict)  # changes to them, as sample.cache.interval=2
    output: str = path_option("results/evaluate.json")
    # the protocol
    num_real: int = 2048  # at most
    num_fake: int = 2048
    num_frames: int = 16
    real_stride: int = 3  # frames from one to the next of a real clip
    fake_stride: int = 1
    image_size: int = 256  # short edge resized to this, a square cut from the centre
    resize_filter: str = "bilinear"  # bilinear, as in training | bicubic | lanczos, as Latte converts; antialiased
    seed: int = 0
    bootstrap: int = 200  # draws behind an interval; 0: none
    # the detectors' files; None: the published ones, in detector_path, where they are fetched to
    i3d: str | None = path_option()
    inception: str | None = path_option()
    c3d: str | None = path_option()
    detector_path: str = path_option("pretrained/metrics")
    feature_path: str | None = path_option("results/features")  # where those of real sets are kept; null: nowhere
    # reading
    video_reader: str = "pyav"  # pyav | decord
    max_bad_fraction: float = 0.1  # an error when more of the videos read than this are broken
    batch_size: int = 8  # clips that pass a detector at once
    num_workers: int = field(default_factory=torch.get_num_threads)  # processes that read: by default, one a core


class ShortClip(BadClip):
    """A video of too few frames for a clip at the stride of the protocol."""


Cut = Tensor | BadClip
Networks = dict[str, Callable[[Tensor], Tensor]]  # output -> function from (B, F, 3, S, S) uint8 to (B, n, D)
T = TypeVar("T")


class Features(NamedTuple):
    """A set of clips as a detector sees it, and how it came about."""

    rows: dict[str, Tensor]  # output -> (N, n, D)
    report: dict[str, Any]


def window(total: int, num_frames: int, stride: int, name: str, seed: int) -> range:
    """The frames of a clip: which, depends on (seed, name) alone. As StyleGAN-V's datasets choose them."""
    if total < num_frames * stride:
        raise ShortClip(f"{total} frames, {num_frames * stride} needed")
    length = (num_frames - 1) * stride + 1
    first = random.Random(f"offset of {name} by {seed}").randrange(total - length + 1)
    return range(first, first + length, stride)


def one_plan(videos: list[Path], root: Path, key: str) -> list[Path]:
    """Of what sampling wrote to `root`, the clips of one plan: those of sample_ddp.py, not what sample.py put below."""
    if (root / sample_ddp.RECORD).exists():
        return [path for path in videos if path.parent == root]
    if (root / sample.RECORD).exists():
        plans = ", ".join(sorted({str(path.parent) for path in videos}))
        raise UserError(f"{key}: {root} holds clips of sample.py, a folder for each plan; give one of {plans}")
    return videos


def place(name: str, seed: int) -> float:
    """Where a clip stands in its set: shuffled, but by (seed, name) alone."""
    return random.Random(f"place of {name} by {seed}").random()


def fit_square(frames: Tensor, size: int, resize_filter: str) -> Tensor:
    """Resize the short edge, crop the centre: (F, 3, H, W) uint8 -> (F, 3, S, S) uint8."""
    if resize_filter == "lanczos":  # Pillow's alone
        images = [F.resize(F.to_pil_image(frame), [size], F.InterpolationMode.LANCZOS) for frame in frames]
        frames, resize_filter = torch.stack([F.pil_to_tensor(image) for image in images]), "bilinear"  # nothing left
    frames = square(frames, size, flip=False, resize_filter=resize_filter)
    return frames.contiguous()  # readers differ in layout, which changes last digits


def cut(read: Callable[[Choose], Tensor], stride: int, name: str, where: object, cfg: EvaluateConfig) -> Cut:
    """The clip of a video, (F, 3, S, S) uint8, or why there is none: as data, for reading processes to hand over."""
    try:
        frames = read(lambda total: window(total, cfg.num_frames, stride, name, cfg.seed))
    except BadClip as error:
        return type(error)(f"{where}: {error}")
    return fit_square(frames, cfg.image_size, cfg.resize_filter)


class Files:
    """Clips from the videos under the folder in option `key`, in the order of `place`."""

    def __init__(self, cfg: EvaluateConfig, key: str, wanted: int, stride: int):
        self.cfg, self.key, self.wanted, self.stride = cfg, key, wanted, stride
        self.root = require_path(cfg, key)
        videos = one_plan([path for path in find_videos(self.root) if path.name not in NOT_CLIPS], self.root, key)
        paths = videos or find_frame_folders(self.root)
        if not paths:
            raise UserError(f"{key}: there are no video files and no folders of images under {self.root}")
        self.read = partial(read_video, reader=cfg.video_reader) if videos else read_frame_folder
        clips = [(path, path.stem if videos else path.name) for path in paths]  # one name for a file and its frames
        self.clips = sorted(clips, key=lambda clip: (place(clip[1], cfg.seed), clip[0].relative_to(self.root)))

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Cut:
        path, name = self.clips[index]
        return cut(partial(self.read, path), self.stride, name, path, self.cfg)

    def batches(self, indices: Sequence[Sequence[int]]) -> Iterable[list[Cut]]:
        workers = min(self.cfg.num_workers, len(indices))
        return DataLoader(self, batch_sampler=indices, collate_fn=list, num_workers=workers)

    def describe(self) -> dict[str, Any]:
        return {"path": str(self.root), "videos": len(self), "stride": self.stride}

    def fingerprint(self) -> str:
        """Hash of the names and bytes of all files."""
        digest = hashlib.sha256()
        for path, _ in self.clips:
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                content = file_hash(file) if file.is_file() else ""  # a broken link, a folder of other frames
                digest.update(f"{file.relative_to(self.root)}\0{content}\n".encode())
        return digest.hexdigest()


class Samples:
    """Clips sampled in memory; pixels, names and order are those of the files that sample_ddp.py would write."""

    key = "generate"

    def __init__(self, cfg: EvaluateConfig, device: torch.device):
        self.cfg, self.wanted, self.device = cfg, cfg.num_fake, device
        changes = [f"{key}={json.dumps(value)}" for key, value in flat(cfg.sample)]
        self.sampling = resolve(load_config(SampleConfig, require_path(cfg, "generate"), changes), device)
        choice("labels", self.sampling.labels, ["balanced", "random"])
        self.plan = make_plan(self.sampling, self.sampling.cache)
        seeds = range(self.sampling.seed, self.sampling.seed + cfg.num_fake)
        clips = [(seed, video_path(Path(), seed).stem) for seed in seeds]
        self.clips = sorted(clips, key=lambda clip: place(clip[1], cfg.seed))

    def __len__(self) -> int:
        return len(self.clips)

    def batches(self, indices: Sequence[Sequence[int]]) -> Iterable[list[Cut]]:
        pipe, step = load(self.sampling, self.device), self.sampling.per_proc_batch_size
        for batch in indices:
            clips: list[Cut] = []
            for i in range(0, len(batch), step):
                seeds, names = zip(*(self.clips[index] for index in batch[i : i + step]), strict=True)
                videos = to_uint8(generate(pipe, seeds, labels_of(seeds, self.sampling)))  # (B, F, H, W, 3)
                for name, video in zip(names, torch.from_numpy(videos).movedim(-1, -3), strict=True):
                    read = partial(lambda video, choose: video[list(choose(len(video)))], video)
                    clips.append(cut(read, self.cfg.fake_stride, name, f"seed {name}", self.cfg))
            yield clips

    def describe(self) -> dict[str, Any]:
        record = make_record(self.sampling, self.device)
        facts = {"checkpoint": record["checkpoint"], "vae": record["vae"], "plan": asdict(self.plan)}
        return {"generate": record["config"], **facts}


def flat(options: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested options as pairs: {"cache": {"interval": 2}} -> ("cache.interval", 2)."""
    for key, value in options.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in flat(value))
        else:
            yield key, value


def extract(source: Files | Samples, networks: Networks, cfg: EvaluateConfig, env: Environment) -> Features:
    """Features of the first `wanted` clips of `source` that can be used, the same on every process.

    Batches are formed before they are dealt to the processes: at any number of those, a clip has the same neighbours.

    Raises:
        UserError: too many broken videos, or fewer than two clips.
    """
    rows: list[dict[str, Tensor]] = []  # by batch: output -> (B, n, D)
    failed: list[BadClip] = []
    clips, seen = 0, 0
    while clips < source.wanted and seen < len(source):  # again for those that failed
        indices = range(seen, min(seen + source.wanted - clips, len(source)))
        share = [indices[i : i + cfg.batch_size] for i in range(0, len(indices), cfg.batch_size)]
        share = share[env.rank :: env.world_size]
        reading = tqdm(source.batches(share), source.key, len(share), unit="batch", disable=not env.is_main)
        found = []
        for batch, read in zip(share, reading, strict=True):
            usable = [clip for clip in read if isinstance(clip, Tensor)]
            outputs = {name: network(torch.stack(usable)).cpu() for name, network in networks.items() if usable}
            found.append((batch.start, outputs, [clip for clip in read if isinstance(clip, BadClip)]))
        for _, outputs, bad in sorted(env.gather(found), key=lambda batch: batch[0]):
            rows += [outputs] if outputs else []
            failed += bad
        seen = indices.stop
        clips = seen - len(failed)
    short = [clip for clip in failed if isinstance(clip, ShortClip)]
    broken = [str(clip) for clip in failed if not isinstance(clip, ShortClip)]
    check_broken(source.key, broken, seen, cfg)
    if clips < 2:
        hint = f" ({short[0]}: num_frames x stride)" if short else ""
        raise UserError(f"{source.key}: {clips} clips where two are needed: {len(short)} videos are too short{hint}")
    report = {"read": seen, "clips": clips, "too_short": len(short), "broken": broken}
    return Features({name: torch.cat([batch[name] for batch in rows]) for name in networks}, report)


def check_broken(key: str, broken: list[str], seen: int, cfg: EvaluateConfig) -> None:
    """Raises UserError for too many of the videos read."""
    if len(broken) > cfg.max_bad_fraction * seen:
        rule = f"max_bad_fraction={cfg.max_bad_fraction}"
        raise UserError(f"{key}: {len(broken)} of {seen} videos are broken, {rule}: {summary(broken)}")


def real_features(
    source: Files, networks: Networks, found: dict[str, Found], cfg: EvaluateConfig, env: Environment
) -> Features:
    """Features of the real set, on the first process at least; kept in `feature_path` for the next run."""
    files: dict[str, Path] = {}
    if cfg.feature_path:
        facts = [VERSION, env.from_first(source.fingerprint), *(getattr(cfg, key) for key in KEPT_BY)]
        for name in networks:
            key = json.dumps([*facts, OUTPUTS[name], found[OUTPUTS[name].detector].sha256])
            files[name] = Path(cfg.feature_path) / name / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if files and env.from_first(lambda: all(file.exists() for file in files.values())):
        if not env.is_main:
            return Features({}, {})
        with safe_open(next(iter(files.values())), "pt") as file:
            report = json.loads(file.metadata()["report"]) | {"from_cache": True}
        check_broken(source.key, report["broken"], report["read"], cfg)
        return Features({name: load_file(file)["rows"] for name, file in files.items()}, report)
    features = extract(source, networks, cfg, env)
    if env.is_main:
        for name, file in files.items():
            with atomic_path(file) as temporary:
                save_file({"rows": features.rows[name]}, temporary, {"report": json.dumps(features.report)})
    return features


def figure(metric: str, real: Tensor | None, fake: Tensor, cfg: EvaluateConfig) -> dict[str, Any]:
    """A metric of rows real (M, n, D) and fake (N, n, D): its value, its spread, and what both rest on."""
    facts = {"fake_rows": fake.shape[0] * fake.shape[1], "width": fake.shape[2]}
    if metric in ONE_SIDED:
        return inception_score(fake.flatten(0, 1), cfg.seed) | facts
    facts["real_rows"] = real.shape[0] * real.shape[1]
    if metric == "kid":
        return kernel_distance(real.flatten(0, 1), fake.flatten(0, 1), cfg.seed) | facts
    value = frechet_distance(real.flatten(0, 1), fake.flatten(0, 1))
    spread = distance_spread(real, fake, value, cfg.bootstrap, cfg.seed) if cfg.bootstrap else {}
    return {"value": value, **spread, **facts}


def inception_score(probabilities: Tensor, seed: int, splits: int = 10) -> dict[str, Any]:
    """Mean and standard deviation over `splits` of shuffled class probabilities (N, D)."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # of the memory it takes
        torch.manual_seed(seed)
        score = InceptionScore(nn.Identity(), splits, sync_on_compute=False)
        score.update(probabilities.double().clamp(min=1e-30).log())  # it takes logits; of 0 they would be NaN
        mean, std = score.compute()
    return {"value": mean.item(), "std": std.item(), "splits": splits}


def kernel_distance(real: Tensor, fake: Tensor, seed: int, largest: int = 1000) -> dict[str, Any]:
    """KID of features real (M, D) and fake (N, D): mean and standard deviation over 100 subsets of `largest` rows.

    There is no deviation where every subset is the whole of both sets.
    """
    size = min(largest, len(real), len(fake))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # of the memory it takes
        torch.manual_seed(seed)
        distance = KernelInceptionDistance(nn.Identity(), subset_size=size, sync_on_compute=False)
        distance.update(real.double(), real=True)
        distance.update(fake.double(), real=False)
        mean, std = distance.compute()
    spread = {} if size == len(real) == len(fake) else {"std": std.item()}
    return {"value": mean.item(), **spread, "subset_size": size}


def doubts(record: dict[str, Any], cfg: EvaluateConfig) -> list[str]:
    """What a reader of the figures must know, a line each."""
    lines = []
    for metric, row in record["metrics"].items():
        few, width = min(row["fake_rows"], row.get("real_rows", row["fake_rows"])), row["width"]
        if metric in ONE_SIDED and few < row["splits"] * width:
            lines.append(f"{metric}: {few} rows in {row['splits']} splits for {width} classes; the figure is too low")
        elif metric in ("fvd", "fid", "proxy") and few <= width:
            lines.append(f"{metric}: {few} rows for {width} features: a covariance is singular, the figure too high")
    if record["metrics"].keys() - {"proxy"}:
        changed = {key: valid for key, valid in PROTOCOL.items() if getattr(cfg, key) not in valid}
        if changed:
            words = (f"{key}={getattr(cfg, key)} ({' or '.join(map(str, valid))})" for key, valid in changed.items())
            lines.append(f"not the published protocol: {', '.join(words)}")
    if record["fake"]["clips"] < cfg.num_fake:
        lines.append(f"{record['fake']['clips']} fake clips, num_fake={cfg.num_fake}: compare with as many only")
    for key in ("real", "fake"):
        row = record[key] or {"too_short": 0, "broken": []}
        if row["too_short"]:
            lines.append(f"{key}: {row['too_short']} videos with too few frames for this stride were dropped")
        if row["broken"]:
            lines.append(f"{key}: {len(row['broken'])} broken videos were passed over: {summary(row['broken'])}")
    for name, found in record["detectors"].items():
        if name in DETECTORS and not found["published"]:
            word = "no public SHA-256 is known" if found["published"] is None else "not the published file"
            lines.append(f"{name}: {word}; the SHA-256 of {found['path']} is {found['sha256']}")
    return lines


def table(record: dict[str, Any], cfg: EvaluateConfig) -> str:
    """The figures, and below them what another run must share for its figures to be compared with these."""
    lines = []
    for metric, row in record["metrics"].items():
        line = f"{metric:9} {row['value']:10.4f}"
        if "interval" in row:
            low, high = row["interval"]
            line += f"   95 % {low:.4f} ... {high:.4f}, bias about {row['bias']:.4f}"
        elif "std" in row:
            line += f" ± {row['std']:.4f}"
        lines.append(line)
    if real := record["real"]:
        lines.append(f"real: {real['clips']} of {real['videos']} videos in {real['path']}, stride {real['stride']}")
    fake = record["fake"]
    if cfg.generate:
        origin = f"{cfg.num_fake} samples from seed {fake['generate']['seed']} on, of {fake['checkpoint']['path']}"
    else:
        origin = f"{fake['videos']} videos in {fake['path']}"
    lines.append(f"fake: {fake['clips']} of {origin}, stride {cfg.fake_stride}")
    lines.append(f"{cfg.num_frames} frames, {cfg.image_size} x {cfg.image_size}, {cfg.resize_filter}, seed {cfg.seed}")
    lines += [f"{name}: SHA-256 {found['sha256']}" for name, found in record["detectors"].items()]
    return "\n".join(lines + [f"warning: {line}" for line in record["warnings"]])


def evaluate(cfg: EvaluateConfig, real: Files | None, fake: Files | Samples, env: Environment) -> dict[str, Any] | None:
    """The record of all figures, on the first process; None on the others."""
    metrics = cfg.metrics.split(",")
    outputs = dict.fromkeys(METRICS[metric] for metric in metrics)
    folder = Path(cfg.detector_path)
    found = env.from_first(
        lambda: {name: find_detector(name, getattr(cfg, name, None), folder) for name in detectors_of(cfg)}
    )
    networks = {name: load_output(name, found[OUTPUTS[name].detector], env.device) for name in outputs}
    two_sided = {METRICS[metric]: networks[METRICS[metric]] for metric in metrics if metric not in ONE_SIDED}
    of_real = real_features(real, two_sided, found, cfg, env) if real else Features({}, {})
    of_fake = extract(fake, networks, cfg, env)
    if not env.is_main:
        return None

    record: dict[str, Any] = {"metrics": {}, "real": None if real is None else real.describe() | of_real.report}
    record |= {"fake": fake.describe() | of_fake.report, "detectors": {name: f._asdict() for name, f in found.items()}}
    for metric in metrics:
        of_both = None if metric in ONE_SIDED else of_real.rows[METRICS[metric]].to(env.device)
        record["metrics"][metric] = figure(metric, of_both, of_fake.rows[METRICS[metric]].to(env.device), cfg)
    record["warnings"] = doubts(record, cfg)
    return record | {"config": asdict(cfg), "machine": describe_machine(env.device)}


def detectors_of(cfg: EvaluateConfig) -> list[str]:
    """The detectors that the metrics need, each once."""
    return list(dict.fromkeys(OUTPUTS[METRICS[metric]].detector for metric in cfg.metrics.split(",")))


def check(cfg: EvaluateConfig) -> None:
    """Raises UserError for options that make no sense together."""
    for metric in cfg.metrics.split(","):
        choice("metrics", metric, list(METRICS))
    choice("resize_filter", cfg.resize_filter, ["bilinear", "bicubic", "lanczos"])
    choice("video_reader", cfg.video_reader, ["pyav", "decord"])
    for key, least in LEAST.items():
        if getattr(cfg, key) < least:
            raise UserError(f"{key}: {getattr(cfg, key)} is less than {least}")
    check_place(cfg, "output")
    if cfg.feature_path:
        check_place(cfg, "feature_path", folder=True)
    if bool(cfg.fake_path) == bool(cfg.generate):
        raise UserError("give either fake_path=FOLDER or generate=YAML: what is to be judged")
    if cfg.sample and not cfg.generate:
        raise UserError("sample: these options are for generate=YAML, which is not given")


def plans(cfg: EvaluateConfig, real: Files | None, fake: Files | Samples, env: Environment) -> list[str]:
    """What would run, a line each."""
    lines = [f"real: {len(real)} videos in {real.root}"] if real else []
    if isinstance(fake, Files):
        lines.append(f"fake: {len(fake)} videos in {fake.root}")
    else:
        lines += [*describe(fake.sampling, [fake.plan], env.device), f"fake: {len(fake)} clips of it"]
    for name in detectors_of(cfg):
        if name in DETECTORS:
            path = getattr(cfg, name) or Path(cfg.detector_path) / DETECTORS[name].name
            state = "is there" if Path(path).exists() else f"to be fetched from {DETECTORS[name].url}"
            lines.append(f"{name}: {path} {state}")
    return lines


def main() -> None:
    args = cli.Parser(__doc__, EvaluateConfig).parse_args()
    cfg = load_config(EvaluateConfig, args.config, args.overrides)
    check(cfg)
    with distributed(timeout=timedelta(days=1)) as env:  # one process may read or compute for long
        two_sided = set(cfg.metrics.split(",")) - set(ONE_SIDED)
        real = Files(cfg, "real_path", cfg.num_real, cfg.real_stride) if two_sided else None
        fake = Samples(cfg, env.device) if cfg.generate else Files(cfg, "fake_path", cfg.num_fake, cfg.fake_stride)
        if args.dry_run:
            if env.is_main:
                print(to_yaml(cfg) + "\n".join(f"# {line}" for line in plans(cfg, real, fake, env)))
            return
        record = evaluate(cfg, real, fake, env)
        if record:
            print(table(record, cfg))
            write_json(cfg.output, record)
            print(f"record: {cfg.output}")


if __name__ == "__main__":
    cli.run(main)
