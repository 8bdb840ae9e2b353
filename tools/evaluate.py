"""FVD, FID, KID, IS, video IS and an offline proxy, of videos or of a checkpoint, with the facts that scores depend on.

    python tools/evaluate.py metrics=fvd real_path=/data/UCF101 fake_path=sample_videos/ucf101_cache
    torchrun --standalone --nproc_per_node=8 tools/evaluate.py metrics=fvd,fid,kid,is,video_is \\
        real_path=/data/UCF101 generate=configs/ucf101/ucf101_sample_cache.yaml sample.cache.interval=2
    python tools/evaluate.py metrics=proxy real_path=datasets/demo/train real_stride=1 image_size=64 \\
        num_fake=70 generate=configs/demo/demo_sample.yaml                   # the demo: no download, no GPU

  fvd       Fréchet distance of I3D features, StyleGAN-V's protocol: 2048 fake clips of 16 frames against up to 2048
            real ones, a random window at real_stride of each training video; videos too short for that are dropped.
            Published scores use real_stride=3 (Taichi 6). Covariances are over N - 1, as in FID; StyleGAN-V's over N.
  fid, kid  Fréchet distance and MMD of Inception features, over all frames of the same clips
  is        Inception score of the frames; video_is: of the clips, by the classes of a C3D (UCF101)
  proxy     Fréchet distance over 80 EfficientNet features that see texture and motion. Its weights come with a package.
            It is no FVD, and does not compare with one

real_path and fake_path hold video files or folders of frames, flat or nested. `generate` samples in memory instead of
reading fake_path: pixels are rounded to 8 bits as for a file, so only the compression of an mp4 makes a difference.
The seed and the names of the clips settle which clips are used (if there are more than asked for) and where their
windows begin. Folders, the order of a listing and the number of processes change nothing.

Fewer clips give a higher Fréchet distance. Its 95 % interval is that of the mean distance of so many fakes, the real
set being fixed. It comes from a jackknife that leaves out groups of clips: frames of one clip are not independent.
"Infinite" is the distance extrapolated to infinitely many fakes, along 1/N as in FD-infinity (arXiv:1911.07023). It
needs three fakes a feature; with fewer, the distance is marked instead.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, cli, load_config
from tools.metrics.options import METRICS, EvaluateConfig

parser = cli.Parser(__doc__, EvaluateConfig)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

from configs.files import check_writable, write_json
from datasets.clips import summary
from models.hardware import describe_machine
from sample.distributed import Environment, distributed
from sample.options import file_checks
from sample.plans import describe_run
from tools.metrics.clips import SampledClips, VideoFiles
from tools.metrics.detectors import DETECTORS, OUTPUTS, find_detector, load_output
from tools.metrics.features import Features, extract, real_features
from tools.metrics.scores import NEAR, ONE_SIDED, score

DISTANCES = ("fvd", "fid", "proxy")
PROTOCOL = {  # of published numbers; stride 6 is Taichi's
    "num_real": [2048], "num_fake": [2048], "num_frames": [16], "real_stride": [3, 6], "fake_stride": [1],
    "image_size": [256],
}  # fmt: skip


def check(cfg: EvaluateConfig) -> None:
    """Raises UserError for options that make no sense together, and for paths that cannot be written."""
    cfg.metric_names()
    check_writable(cfg, "output")
    if cfg.feature_path:
        check_writable(cfg, "feature_path", folder=True)
    if bool(cfg.fake_path) == bool(cfg.generate):
        raise UserError("give either fake_path=FOLDER or generate=YAML: the videos to evaluate")
    if cfg.sample and not cfg.generate:
        raise UserError("sample: these options are for generate=YAML, which is not given")


def detectors_of(cfg: EvaluateConfig) -> list[str]:
    """The detectors that the metrics need, each once."""
    return list(dict.fromkeys(OUTPUTS[METRICS[metric]].detector for metric in cfg.metric_names()))


def evaluate(
    cfg: EvaluateConfig, real: VideoFiles | None, fake: VideoFiles | SampledClips, env: Environment
) -> dict[str, Any] | None:
    """The record of all scores, on the first process; None on the others."""
    metrics = cfg.metric_names()
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
        of_fakes = of_fake.rows[METRICS[metric]].to(env.device)
        record["metrics"][metric] = score(metric, of_both, of_fakes, cfg.jackknife, cfg.seed)
    record["warnings"] = find_caveats(record, cfg)
    return record | {"config": asdict(cfg), "machine": describe_machine(env.device)}


def find_caveats(record: dict[str, Any], cfg: EvaluateConfig) -> list[str]:
    """The caveats that a reader of the scores must know, a line each."""
    lines = []
    for metric, row in record["metrics"].items():
        few, width = min(row["fake_rows"], row.get("real_rows", row["fake_rows"])), row["width"]
        if metric in ONE_SIDED and few < row["splits"] * width:
            lines.append(f"{metric}: {few} rows in {row['splits']} splits for {width} classes; the score is too low")
        elif metric in DISTANCES and few <= width:
            lines.append(f"{metric}: {few} rows for {width} features: a covariance is singular, the score too high")
        elif metric in DISTANCES and "infinite" not in row and "interval" in row:
            clips = record["fake"]["clips"]
            lines.append(f"{metric}: {clips} clips for {width} features, fewer than {NEAR} each: the score is too high")
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


def report(record: dict[str, Any], cfg: EvaluateConfig) -> str:
    """The scores as text, and below them the facts that a run must share with this one for its scores to compare."""
    lines = []
    for metric, row in record["metrics"].items():
        line = f"{metric:9} {row['value']:10.4f}"
        if "interval" in row:
            line += "   95 % {:.4f} ... {:.4f}".format(*row["interval"])
        if "infinite" in row:
            line += "; infinite {:.4f}, {:.4f} ... {:.4f}".format(row["infinite"], *row["infinite_interval"])
        if "std" in row:
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


def describe(
    cfg: EvaluateConfig, real: VideoFiles | None, fake: VideoFiles | SampledClips, env: Environment
) -> list[str]:
    """Lines that say what will run."""
    lines = [f"real: {len(real)} videos in {real.root}"] if real else []
    if isinstance(fake, VideoFiles):
        lines.append(f"fake: {len(fake)} videos in {fake.root}")
    else:
        lines += [*describe_run(fake.sampling, [fake.plan], env.device), f"fake: {len(fake)} clips of it"]
    for name in detectors_of(cfg):
        if name in DETECTORS:
            given = getattr(cfg, name)
            path = Path(given or Path(cfg.detector_path, DETECTORS[name].name))
            absent = "is missing" if given else f"to be fetched from {DETECTORS[name].url}"
            lines.append(f"{name}: {path} {'is there' if path.exists() else absent}")
    return lines


def input_checks(cfg: EvaluateConfig, fake: VideoFiles | SampledClips) -> list[Callable[[], object]]:
    """Functions that raise UserError if a file that the evaluation reads is missing; VideoFiles checks its own folder.

    A run calls them before it reads a clip: features of a real set take hours.
    """
    checks = [] if isinstance(fake, VideoFiles) else file_checks(fake.sampling)
    given = {name: getattr(cfg, name, None) for name in detectors_of(cfg)}
    return checks + [partial(find_detector, name, path, Path()) for name, path in given.items() if path]


def main() -> None:
    args = parser.parse_args()
    cfg = load_config(EvaluateConfig, args.config, args.overrides)
    check(cfg)
    with distributed() as env:
        two_sided = set(cfg.metric_names()) - set(ONE_SIDED)
        real = VideoFiles(cfg, "real_path", cfg.num_real, cfg.real_stride) if two_sided else None
        if cfg.generate:
            fake = SampledClips(cfg, env.device)
        else:
            fake = VideoFiles(cfg, "fake_path", cfg.num_fake, cfg.fake_stride)
        checks = input_checks(cfg, fake)
        if args.dry_run:
            cli.dry_run(cfg, describe(cfg, real, fake, env), checks)
            return
        for check_file in checks:
            env.from_first(check_file)
        record = evaluate(cfg, real, fake, env)
        if record:
            print(report(record, cfg))
            write_json(cfg.output, record)
            print(f"record: {cfg.output}")


if __name__ == "__main__":
    cli.run(main)
