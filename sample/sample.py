"""Sample clips of chosen classes, in one process: a video each, a grid, a contact sheet and a record.

    python sample/sample.py                                        # the demo: one clip of every class
    python sample/sample.py --compare --cache N2 N4                # uncached and with two plans: speed, fidelity
    python sample/sample.py --classes Bunny 3 --seed 7 cfg_scale=4
    python sample/sample.py --config configs/ucf101/ucf101_sample_cache.yaml --dry-run

Writes to save_video_path a folder for each plan (uncached, N2, ...) with {seed}_{class}.mp4, grid.mp4, grid.gif and
contact_sheet.png; beside them sample.json, and with --compare compare.mp4 (a row for each plan) and compare.png.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch import Tensor
from tqdm import tqdm

from configs import CacheOptions, SampleConfig, UserError
from datasets import class_index, class_names
from sample.options import Plan, describe, dry_run, make_parser, make_plan, make_record, parse, read_options
from sample.pipeline import Pipeline, load, make_diffusion, sample_latents
from tools.common import cli
from tools.common.fidelity import psnr, ssim
from tools.common.macs import readable
from tools.common.media import save_contact_sheet, save_grid, save_video
from tools.common.records import write_json
from tools.common.runs import world_size

RECORD = "sample.json"
MOST_COMPARED = 8  # clips in compare.mp4 and compare.png


@dataclass(frozen=True)
class Clip:
    """A clip to sample."""

    seed: int
    label: int | None
    name: str  # of its class; empty for a model without classes


@dataclass
class Run:
    """What a plan made of the clips."""

    plan: Plan
    videos: list[Tensor] = field(default_factory=list)  # (B, F, 3, H, W) a batch
    sampling: list[float] = field(default_factory=list)  # seconds a batch
    decoding: list[float] = field(default_factory=list)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--classes", nargs="+", default=[], help="by index or name; default: sample_names, or all")
    parser.add_argument(
        "--compare", action="store_true", help="run uncached too, with the same seeds; takes several plans"
    )
    args = parse(parser)
    if world_size() > 1:
        raise UserError(f"sample.py is one process, but torchrun started {world_size()}: use sample/sample_ddp.py")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg, caches = read_options(args, device)
    clips = choose_clips(cfg, args.classes or cfg.sample_names)
    plans = [make_plan(cfg, cache) for cache in caches]
    if args.compare:
        if not all(plan.cached_steps for plan in plans):
            raise UserError("--compare needs plans with cached steps: give them as in --cache N2 N4")
        uncached = make_plan(cfg, replace(cfg.cache, interval=1))
        plans = [uncached, *plans]
    elif len(plans) > 1:
        raise UserError("--cache takes several plans only with --compare")

    lines = [
        *describe(cfg, plans, device),
        f"task: {len(clips)} clips, seeds {cfg.seed} ... {clips[-1].seed}, to {cfg.save_video_path}",
    ]
    if args.dry_run:
        return dry_run(cfg, lines)
    print("\n".join(lines), flush=True)
    runs = sample_all(load(cfg, device), clips, plans)
    report = [summarize(run, runs[0]) for run in runs]
    write_all(Path(cfg.save_video_path), cfg, clips, runs)
    record = {**make_record(cfg, device), "clips": [asdict(clip) for clip in clips], "runs": report}
    write_json(Path(cfg.save_video_path, RECORD), record)
    if args.compare:
        print_table(report)
        print(f"seconds of all {len(clips)} clips, speed-up per batch (median), on {record['machine']}")
    print(f"videos: {cfg.save_video_path}")


def choose_clips(cfg: SampleConfig, wanted: list[str | int] | None) -> list[Clip]:
    """`samples_per_class` clips of each class wanted, with seeds cfg.seed, cfg.seed + 1, ..."""
    if cfg.num_classes is None:
        if wanted:
            raise UserError(
                "this model has no classes: leave --classes and sample_names out, and set samples_per_class"
            )
        return [Clip(cfg.seed + i, None, "") for i in range(cfg.samples_per_class)]
    names = class_names(cfg)
    labels = [class_index(item, names, cfg.num_classes) for item in wanted or range(cfg.num_classes)]
    labels = [label for label in labels for _ in range(cfg.samples_per_class)]
    return [Clip(cfg.seed + i, label, names[label] if names else f"class{label}") for i, label in enumerate(labels)]


def sample_all(pipe: Pipeline, clips: list[Clip], plans: list[Plan]) -> list[Run]:
    """Every clip with every plan. The plans take turns, so that a machine that slows down slows all of them."""
    runs = [Run(plan) for plan in plans]
    size = pipe.cfg.per_proc_batch_size
    batches = [clips[i : i + size] for i in range(0, len(clips), size)]
    if len(plans) > 1:
        warm_up(pipe, batches[0], plans)
    with tqdm(total=len(batches) * len(runs) * pipe.cfg.num_sampling_steps, unit="step", mininterval=1) as bar:
        for batch in batches:
            for run in runs:
                latents, seconds = timed(pipe.device, sample_batch, pipe, batch, run.plan.cache, bar.update)
                run.sampling.append(seconds)
                videos, seconds = timed(pipe.device, pipe.codec.decode, latents)
                run.decoding.append(seconds)
                run.videos.append(videos.cpu())
    return runs


def sample_batch(pipe: Pipeline, batch: list[Clip], cache: CacheOptions, on_step: Callable | None = None) -> Tensor:
    """Latents (B, F, C, h, w)."""
    labels = None if pipe.cfg.num_classes is None else [clip.label for clip in batch]
    return sample_latents(pipe, [clip.seed for clip in batch], labels, cache, on_step)


def warm_up(pipe: Pipeline, batch: list[Clip], plans: list[Plan]) -> None:
    """Four steps of each plan, so that the first one timed does not pay for what happens once."""
    pipe = replace(pipe, diffusion=make_diffusion(replace(pipe.cfg, num_sampling_steps=4)))
    for plan in plans:
        sample_batch(pipe, batch, plan.cache)


def timed(device: torch.device, function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, float]:
    """The function's result, and the seconds until the device had it."""
    start = time.perf_counter()
    result = function(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def summarize(run: Run, first: Run) -> dict[str, Any]:
    """The figures of a run; with --compare `first` is the uncached one."""
    figures = {
        "plan": asdict(run.plan),
        "seconds": {"sampling": sum(run.sampling), "decoding": sum(run.decoding), "sampling_batches": run.sampling},
    }
    if run is not first:
        # Each batch with its own twin, next to which it ran; the median leaves out what disturbed one of them.
        figures["speedup"] = statistics.median(a / b for a, b in zip(first.sampling, run.sampling, strict=True))
        pairs = list(zip(torch.cat(run.videos), torch.cat(first.videos), strict=True))  # (F, 3, H, W) each
        clips = {"psnr": [psnr(a, b) for a, b in pairs], "ssim": [ssim(a, b) for a, b in pairs]}
        figures |= {name: statistics.mean(values) for name, values in clips.items()}
        figures |= {f"{name}_clips": values for name, values in clips.items()}
    return figures


def write_all(folder: Path, cfg: SampleConfig, clips: list[Clip], runs: list[Run]) -> None:
    """The videos and pictures of every run, and those that set the runs side by side."""
    scale = max(1, 128 // cfg.image_size)  # small videos are enlarged where they are shown together
    files = [f"{clip.seed:06d}" + (f"_{clip.name}" if clip.name else "") + ".mp4" for clip in clips]
    titles = [clip.name or f"seed {clip.seed}" for clip in clips]
    for run in runs:
        place = folder / run.plan.name
        videos = torch.cat(run.videos)  # (B, F, 3, H, W)
        for file, video in zip(files, videos, strict=True):
            save_video(place / file, video, cfg.fps)
        save_grid(place / "grid.mp4", videos, cfg.fps, scale=scale)
        save_grid(place / "grid.gif", videos, cfg.fps, scale=scale)
        save_contact_sheet(place / "contact_sheet.png", videos, titles, scale=scale)
    if len(runs) > 1:
        rows = torch.stack([torch.cat(run.videos)[:MOST_COMPARED] for run in runs])  # (R, B, F, 3, H, W)
        save_grid(folder / "compare.mp4", rows.flatten(0, 1), cfg.fps, columns=rows.shape[1], scale=scale)
        labels = [f"{title} {run.plan.name}" for title in titles[:MOST_COMPARED] for run in runs]
        save_contact_sheet(folder / "compare.png", rows.transpose(0, 1).flatten(0, 1), labels, scale=scale)


def print_table(report: list[dict[str, Any]]) -> None:
    """A line for each run: seconds of all clips, MACs of one, PSNR and SSIM against uncached."""
    width = max(len(run["plan"]["name"]) for run in report)
    print(f"\n{'':{width}}{'sampling':>10}{'speed-up':>10}{'MACs a clip':>15}{'PSNR':>10}{'SSIM':>8}{'decoding':>10}")
    for run in report:
        row = f"{run['plan']['name']:{width}}{run['seconds']['sampling']:>8.1f} s{run.get('speedup', 1):>9.2f}x"
        row += f"{readable(run['plan']['macs']):>15}"
        row += f"{run['psnr']:>7.1f} dB{run['ssim']:>8.3f}" if "psnr" in run else f"{'':18}"
        print(row + f"{run['seconds']['decoding']:>8.1f} s")


if __name__ == "__main__":
    cli.run(main)
