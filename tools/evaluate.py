"""FVD, FID, KID, IS, video IS and others, of videos or of a checkpoint, by a published protocol: a row and a run card.

    python tools/evaluate.py protocol=latte metrics=fvd,fid data=/data/UCF101 fake_path=sample_videos/ucf101_cache
    torchrun --standalone --nproc_per_node=8 tools/evaluate.py protocol=latte metrics=fvd,fid,kid,is,video_is \\
        data=/data/UCF101 generate=configs/ucf101/ucf101_sample_cache.yaml ckpt=ucf101-skip.pt
    python tools/evaluate.py metrics=proxy real_path=datasets/demo/train real_stride=1 image_size=64 \\
        num_fake=70 generate=configs/demo/demo_sample.yaml                   # the demo: no download, no GPU
    python tools/evaluate.py results/a.json results/b.json                   # one table of several runs

  fvd            Fréchet distance of I3D features of the clips
  fid, kid       Fréchet distance and MMD of Inception features of the frames
  is, video_is   Inception score of the frames; of the clips, by the classes of a C3D (UCF101)
  videomae_fvd   content-debiased FVD: of VideoMAE features; jedi: MMD of V-JEPA features (their files: tools/README.md)
  prdc           precision, recall, density and coverage of I3D features: diversity apart from quality
  proxy          Fréchet distance over 80 EfficientNet features that see texture and motion; proxy_prdc: prdc of them.
                 Their weights come with a package. It is no FVD, and does not compare with one
  flickering     VBench's temporal flickering, 1 for still clips; dynamic: the share of clips in which something moves

A protocol gives every setting that is not given (tools/metrics/protocols.py has their sources):
  ours           2048 real clips at random, stride 3, pixels as in training, covariances over N - 1
  stylegan-v     the first 2048 videos by name, stride 1, covariances over N, FID over all frames of all real videos
  latte          2048 at random, stride 3 (Taichi 6), cropped, then resized by Lanczos, all frames through JPEG;
                 covariances and FID as StyleGAN-V's
  skip-dit       as Skip-DiT's tool computes it: Latte's, with stride 1, of the first 17 frames of a video
The record names every departure. Scores of two records compare if nothing but the samples differs; the table of several
runs says so.

Real and fake folders hold video files or folders of frames, flat or nested. A real video gives one clip at a random
place; clips of fakes begin at their first frame. `generate` samples in memory: pixels are rounded to 8 bits as for a
file, so only the compression of an mp4 makes a difference. The seed and the names of the clips settle which clips are
used (if there are more than asked for) and where their windows begin. Folders, the order of a listing and the number of
processes change nothing.

Fewer clips give a higher Fréchet distance. Its 95 % interval is that of the mean distance of so many fakes, the real
set being fixed. It comes from a jackknife that leaves out groups of clips: frames of one clip are not independent.
"Infinitely many" is the distance extrapolated along 1/N as in FD-infinity (arXiv:1911.07023). It needs three fakes a
feature; with fewer, the distance is marked instead.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, cli, load_config
from sample.options import file_checks
from tools.metrics.options import DETECTOR_OF, DETECTORS, KINDS, ONE_SIDED, OUTPUT_OF, EvaluateConfig
from tools.metrics.protocols import fill_in, protocol_record

parser = cli.Parser(__doc__, EvaluateConfig)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import torch
from torch import Tensor

from configs.files import check_writable, write_json, write_text
from models.hardware import describe_machine
from sample.distributed import Environment, distributed
from sample.media import save_contact_sheet
from sample.plans import describe_run
from tools.metrics.card import append_line, card, code_version, comparison, csv_line, find_caveats
from tools.metrics.clips import SampledClips, VideoFiles
from tools.metrics.detectors import file_name, find_detector, load_output
from tools.metrics.features import Features, extract, real_features
from tools.metrics.scores import moments_of_sums, score


def prepare(cfg: EvaluateConfig) -> EvaluateConfig:
    """The options with those of the protocol; UserError if they contradict each other or cannot be written."""
    cfg.metric_names()
    check_writable(cfg, "output")
    if cfg.feature_path:
        check_writable(cfg, "feature_path", folder=True)
    if cfg.data and cfg.real_path:
        raise UserError("data and real_path are the same option: give one of them")
    cfg = replace(cfg, real_path=cfg.real_path or cfg.data)
    if cfg.ckpt:
        cfg = replace(cfg, sample={**cfg.sample, "ckpt": cfg.ckpt})
    if bool(cfg.fake_path) == bool(cfg.generate or cfg.ckpt):
        raise UserError("give either fake_path=FOLDER or generate=YAML: the videos to evaluate")
    if cfg.sample and not (cfg.generate or cfg.ckpt):
        raise UserError("sample: these options are for generate=YAML, which is not given")
    return fill_in(cfg)


def detectors_of(cfg: EvaluateConfig) -> list[str]:
    """The detectors that the metrics need, each once."""
    return list(dict.fromkeys(DETECTOR_OF[OUTPUT_OF[metric]] for metric in cfg.metric_names()))


def two_sided(cfg: EvaluateConfig) -> list[str]:
    """The metrics that compare with real clips."""
    return [metric for metric in cfg.metric_names() if KINDS[metric] not in ONE_SIDED]


def evaluate(
    cfg: EvaluateConfig, real: VideoFiles | None, fake: VideoFiles | SampledClips, env: Environment
) -> tuple[dict[str, Any], Sequence[Tensor]] | None:
    """The record of all scores and the first fakes, on the first process; None on the others."""
    metrics, folder = cfg.metric_names(), Path(cfg.detector_path)
    found = env.from_first(
        lambda: {name: find_detector(name, getattr(cfg, name, None), folder) for name in detectors_of(cfg)}
    )
    outputs = dict.fromkeys(OUTPUT_OF[metric] for metric in metrics)
    networks = {name: load_output(name, found[DETECTOR_OF[name]], env.device) for name in outputs}
    whole = ["fid"] if cfg.fid_frames == "all" and "fid" in metrics else []
    of_clips = {OUTPUT_OF[metric]: networks[OUTPUT_OF[metric]] for metric in two_sided(cfg) if metric not in whole}
    sha256 = env.from_first(real.fingerprint) if real else ""
    of_real = real_features(real, sha256, of_clips, found, cfg, env) if of_clips else Features({}, {})
    if whole:
        videos = VideoFiles(cfg, "real_path", sys.maxsize, stride=None)
        of_frames = real_features(videos, sha256, {"inception": networks["inception"]}, found, cfg, env)
    of_fake = extract(fake, networks, cfg, env)
    seconds = env.gather(getattr(fake, "seconds", []))
    if not env.is_main:
        return None

    record: dict[str, Any] = {"metrics": {}, "protocol": protocol_record(cfg)}
    record["real"] = real and real.describe() | of_real.report | {"sha256": sha256}
    if whole:
        record["real"] |= {"all_frames": of_frames.report}
    record |= {"fake": fake.describe() | of_fake.report, "detectors": {name: f._asdict() for name, f in found.items()}}
    correction = 1 if cfg.covariance == "N-1" else 0
    for metric in metrics:
        rows = of_real.rows.get(OUTPUT_OF[metric])
        theirs = None if rows is None else rows.to(env.device)
        if metric in whole:
            theirs = moments_of_sums(of_frames.rows["inception"][0].to(env.device), correction)
        ours = of_fake.rows[OUTPUT_OF[metric]].to(env.device)
        record["metrics"][metric] = score(metric, theirs, ours, cfg.jackknife, cfg.seed, correction)
    record["warnings"] = find_caveats(record)
    record |= {"seconds": median(seconds) if seconds else None, "machine": describe_machine(env.device)}
    record |= {"code": code_version(), "date": time.strftime("%Y-%m-%d %H:%M:%S"), "config": asdict(cfg)}
    return record, of_fake.shown


def write_card(cfg: EvaluateConfig, record: dict[str, Any], shown: Sequence[Tensor]) -> None:
    """Writes the record, the card and its contact sheet, and the line in evaluations.csv; prints the card."""
    output = Path(cfg.output)
    picture, page = output.with_suffix(".png"), output.with_suffix(".md")
    if shown:
        save_contact_sheet(picture, torch.stack(list(shown)) / 127.5 - 1, [str(i + 1) for i in range(len(shown))])
    write_text(page, f"# {output.stem}\n\n{card(record, picture.name if shown else None)}")
    write_json(output, record)
    append_line(output.with_name("evaluations.csv"), csv_line(output.stem, record))
    print(f"{card(record)}\nrecord: {output}, card: {page}, row: {output.with_name('evaluations.csv')}")


def compare(files: Sequence[str]) -> str:
    """The table of records of earlier runs."""
    records = {}
    for file in files:
        try:
            record = json.loads(Path(file).read_text())
            records[Path(file).stem if Path(file).stem not in records else file] = record
            record["protocol"]["settings"], record["metrics"]
        except (OSError, ValueError, LookupError, TypeError):
            raise UserError(f"{file}: neither key=value nor a record of tools/evaluate.py") from None
    return comparison(records)


def describe(
    cfg: EvaluateConfig, real: VideoFiles | None, fake: VideoFiles | SampledClips, env: Environment
) -> list[str]:
    """Lines that say what will run."""
    lines = [f"real: {len(real)} videos in {real.root}"] if real else []
    if isinstance(fake, VideoFiles):
        lines.append(f"fake: {len(fake)} videos in {fake.root}")
    else:
        lines += [*describe_run(fake.sampling, [fake.plan], env.device), f"fake: {len(fake)} clips of it"]
    lines.append(f"protocol: {cfg.protocol}, {protocol_record(cfg)['source']}")
    for name in detectors_of(cfg):
        if DETECTORS[name].is_file:
            given, url = getattr(cfg, name), DETECTORS[name].url
            path = Path(given or Path(cfg.detector_path, file_name(url or name)))
            absent = "is missing" if given or not url else f"to be fetched from {url}"
            lines.append(f"{name}: {path} {'is there' if path.exists() else absent}")
    return lines


def input_checks(cfg: EvaluateConfig, fake: VideoFiles | SampledClips) -> list[Callable[[], object]]:
    """Functions that raise UserError if a file that the evaluation reads is missing; VideoFiles checks its own folder.

    A run calls them before it reads a clip: features of a real set take hours.
    """
    checks = [] if isinstance(fake, VideoFiles) else file_checks(fake.sampling)
    given = {name: getattr(cfg, name, None) for name in detectors_of(cfg)}
    wanted = [name for name, path in given.items() if path or not (DETECTORS[name].url or name == "motion")]
    return checks + [partial(find_detector, name, given[name], Path()) for name in wanted]


def main() -> None:
    args = parser.parse_args()
    if files := [text for text in args.overrides if "=" not in text]:
        print(compare(files))
        return
    cfg = prepare(load_config(EvaluateConfig, args.config, args.overrides))
    with distributed() as env:
        real = VideoFiles(cfg, "real_path", cfg.num_real, cfg.real_stride) if two_sided(cfg) else None
        if cfg.generate or cfg.ckpt:
            fake = SampledClips(cfg, env.device)
        else:
            fake = VideoFiles(cfg, "fake_path", cfg.num_fake, cfg.fake_stride)
        checks = input_checks(cfg, fake)
        if args.dry_run:
            cli.dry_run(cfg, describe(cfg, real, fake, env), checks)
            return
        for check_file in checks:
            env.from_first(check_file)
        found = evaluate(cfg, real, fake, env)
        if found:
            write_card(cfg, *found)


if __name__ == "__main__":
    cli.run(main)
