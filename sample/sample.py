"""Sample clips of chosen classes in one process, and optionally compare Skip-Cache plans.

    python sample/sample.py                                        # the demo: one clip of every class
    python sample/sample.py --compare --cache N2 N4                # uncached and two plans: speed and fidelity
    python sample/sample.py --classes Bunny 3 --seed 7 cfg_scale=4
    python sample/sample.py --config configs/ucf101/ucf101_sample_cache.yaml --dry-run

Writes to save_video_path sample.json and a folder per plan (uncached, N2, ...) with {seed}_{class}.mp4, grid.mp4,
grid.gif and contact_sheet.png. --compare also writes compare.mp4, which has a row per plan, and compare.png. A clip is
there as soon as it is decoded. Other seeds, classes and plans may share a folder; other settings need another folder.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import SampleConfig, UserError, cli
from sample.options import file_checks, make_parser, read_options

parser = make_parser(__doc__)
parser.add_argument("--classes", nargs="+", default=[], help="indices or names; default: sample_names, or all")
parser.add_argument(
    "--compare", action="store_true", help="also run uncached, with the same seeds; --cache may give several plans"
)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import torch
from torch import Tensor
from tqdm import tqdm

from configs.files import claim_folder, write_json
from configs.tables import markdown_table
from datasets import class_index, class_names
from models.hardware import default_device, timed
from models.macs import readable
from sample import SAMPLE_RECORD
from sample.folder import earlier_record, make_record, video_path
from sample.media import save_contact_sheet, save_grid, save_video
from sample.pipeline import Pipeline, load, sample_latents, shortened
from sample.plans import UNCACHED, Plan, describe_run, make_plan
from sample.similarity import doubts, is_flat, psnr, ssim

MAX_COMPARED = 8  # clips in compare.mp4 and compare.png


@dataclass(frozen=True)
class Clip:
    """A clip to sample."""

    seed: int
    label: int | None
    name: str  # of the class; empty for an unconditional model

    def path(self, folder: Path, plan: Plan) -> Path:
        return video_path(folder / plan.name, self.seed, self.name)


@dataclass
class Run:
    """The clips of one plan and the time they took, a list entry per batch."""

    plan: Plan
    videos: list[Tensor] = field(default_factory=list)  # (B, F, 3, H, W)
    sampling: list[float] = field(default_factory=list)  # seconds
    decoding: list[float] = field(default_factory=list)  # seconds


def choose_clips(cfg: SampleConfig, wanted: list[str | int] | None) -> list[Clip]:
    """Returns `samples_per_class` clips of each class in `wanted`, or of all, with seeds cfg.seed, cfg.seed + 1, ..."""
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


def choose_plans(cfg: SampleConfig, plans: list[Plan], compare: bool) -> list[Plan]:
    """Returns the plans to run; with `compare`, the uncached plan is the first."""
    if not compare:
        if len(plans) > 1:
            raise UserError("--cache takes several plans only with --compare")
        return plans
    uncached = make_plan(cfg, UNCACHED)
    if not all(plan.cached_steps or plan.timesteps != uncached.timesteps for plan in plans):
        raise UserError("--compare needs plans that save steps: give them as in --cache N2 N4, or a --recipe")
    return [uncached, *plans]


def sample_all(pipe: Pipeline, clips: list[Clip], plans: list[Plan], folder: Path) -> list[Run]:
    """Samples every clip with every plan, and writes it to the plan's folder in `folder`.

    The plans take turns, so that a machine that slows down slows all of them.
    """
    runs = [Run(plan) for plan in plans]
    size = pipe.cfg.per_proc_batch_size
    batches = [clips[i : i + size] for i in range(0, len(clips), size)]
    if len(plans) > 1:  # one-time costs, such as compilation, must not count for the first plan
        for plan in plans:
            short = shortened(pipe, plan)
            sample_batch(short, batches[0], short.plan)
    with tqdm(total=len(batches) * sum(len(plan.full) for plan in plans), unit="step", mininterval=1) as bar:
        for batch in batches:
            for run in runs:
                latents, seconds = timed(pipe.device, sample_batch, pipe, batch, run.plan, bar.update)
                run.sampling.append(seconds)
                videos, seconds = timed(pipe.device, pipe.codec.decode, latents)
                run.decoding.append(seconds)
                run.videos.append(videos.cpu())
                for clip, video in zip(batch, videos, strict=True):
                    save_video(clip.path(folder, run.plan), video, pipe.cfg.fps)
    return runs


def sample_batch(pipe: Pipeline, batch: list[Clip], plan: Plan, on_step: Callable | None = None) -> Tensor:
    """Returns the latents (B, F, C, h, w) of a batch of clips."""
    labels = None if pipe.cfg.num_classes is None else [clip.label for clip in batch]
    return sample_latents(pipe, [clip.seed for clip in batch], labels, plan, on_step)


def summarize(run: Run, first: Run) -> dict[str, Any]:
    """Returns the metrics of a run. Speed and fidelity are relative to `first`, the uncached run of --compare."""
    metrics = {
        "plan": run.plan.record(),
        "seconds": {"sampling": sum(run.sampling), "decoding": sum(run.decoding), "sampling_batches": run.sampling},
    }
    if run is not first:
        # Each batch is compared with the uncached batch that ran beside it; the median ignores single disturbances.
        metrics["speedup"] = statistics.median(a / b for a, b in zip(first.sampling, run.sampling, strict=True))
        pairs = list(zip(torch.cat(run.videos), torch.cat(first.videos), strict=True))  # (F, 3, H, W) each
        by_clip = {"psnr": [psnr(a, b) for a, b in pairs], "ssim": [ssim(a, b) for a, b in pairs]}
        metrics |= {name: statistics.mean(values) for name, values in by_clip.items()}
        metrics |= {f"{name}_clips": values for name, values in by_clip.items()}
    return metrics


def write_grids(folder: Path, cfg: SampleConfig, clips: list[Clip], runs: list[Run]) -> None:
    """Writes the grids and pictures of every run, and those that show the runs side by side."""
    scale = max(1, 128 // cfg.image_size)  # enlarge small videos in grids and sheets
    titles = [clip.name or f"seed {clip.seed}" for clip in clips]
    for run in runs:
        target = folder / run.plan.name
        videos = torch.cat(run.videos)  # (B, F, 3, H, W)
        save_grid(target / "grid.mp4", videos, cfg.fps, scale=scale)
        save_grid(target / "grid.gif", videos, cfg.fps, scale=scale)
        save_contact_sheet(target / "contact_sheet.png", videos, titles, scale=scale)
    if len(runs) > 1:
        rows = torch.stack([torch.cat(run.videos)[:MAX_COMPARED] for run in runs])  # (R, B, F, 3, H, W)
        save_grid(folder / "compare.mp4", rows.flatten(0, 1), cfg.fps, columns=rows.shape[1], scale=scale)
        labels = [f"{title} {run.plan.name}" for title in titles[:MAX_COMPARED] for run in runs]
        save_contact_sheet(folder / "compare.png", rows.transpose(0, 1).flatten(0, 1), labels, scale=scale)


def comparison(report: list[dict[str, Any]]) -> str:
    """Returns a table with a row per run: seconds of all clips, MACs of a clip, PSNR and SSIM to uncached."""
    rows = []
    for run in report:
        cells = {
            "plan": run["plan"]["name"],
            "sampling": f"{run['seconds']['sampling']:.1f} s",
            "speed-up": f"{run.get('speedup', 1):.2f}x",
            "MACs a clip": readable(run["plan"]["macs"]),
        }
        cells["PSNR"] = f"{run['psnr']:.1f} dB" if "psnr" in run else ""
        cells["SSIM"] = f"{run['ssim']:.3f}" if "ssim" in run else ""
        rows.append(cells | {"decoding": f"{run['seconds']['decoding']:.1f} s"})
    return markdown_table(rows)


def main() -> None:
    args = parser.parse_args()
    if cli.world_size() > 1:
        raise UserError(f"sample.py is one process, but torchrun started {cli.world_size()}: use sample/sample_ddp.py")
    if any(item.startswith(("num_clips=", "num_fvd_samples=")) for item in args.overrides):
        raise UserError("num_clips is for sample_ddp.py; here give samples_per_class=2, or --classes")
    device = default_device()
    cfg, plans = read_options(args, device)
    clips = choose_clips(cfg, args.classes or cfg.sample_names)
    plans = choose_plans(cfg, plans, args.compare)
    lines = describe_run(cfg, plans, device)
    lines.append(f"task: {len(clips)} clips, seeds {cfg.seed} ... {clips[-1].seed}, to {cfg.save_video_path}")
    folder, checks = Path(cfg.save_video_path), file_checks(cfg, "save_video_path")

    def open_folder() -> tuple[dict[str, Any], dict[str, Any] | None]:
        record = make_record(cfg, device) | {"clips": [asdict(clip) for clip in clips], "runs": []}
        record["recipes"] = {plans[-1].name: record["recipe"]["sha256"][:12]} if cfg.recipe else {}
        there = [path for plan in plans for path in (folder / plan.name).glob("[0-9]*.mp4")]
        paths = [clip.path(folder, plan) for clip in clips for plan in plans]
        earlier = earlier_record(folder / SAMPLE_RECORD, record, there + paths)
        record["recipes"] = (earlier or {}).get("recipes", {}) | record["recipes"]  # of the folder, by name
        return record, earlier

    if args.dry_run:
        return cli.dry_run(cfg, lines, [*checks, open_folder])
    cli.check_all(checks)
    record, earlier = open_folder()
    claim_folder(folder, "save_video_path")
    # Whatever happens, the clips' settings are known
    write_json(folder / SAMPLE_RECORD, (earlier or record) | {"recipes": record["recipes"]})
    print("\n".join(lines), flush=True)
    runs = sample_all(load(cfg, device), clips, plans, folder)
    report = [summarize(run, runs[0]) for run in runs]
    write_grids(folder, cfg, clips, runs)
    cached = [value for run in report if run["plan"]["cached_steps"] for value in run.get("psnr_clips", [])]
    notes = doubts(map(is_flat, torch.cat(runs[0].videos)), cached) if args.compare else []
    write_json(folder / SAMPLE_RECORD, record | {"runs": report, "notes": notes})
    if args.compare:
        print(f"\n{comparison(report)}")
        print(f"seconds of all {len(clips)} clips, speed-up per batch (median), on {record['machine']}")
        print("".join(f"note: {note}\n" for note in notes), end="")
    print(f"videos: {cfg.save_video_path}")


if __name__ == "__main__":
    cli.run(main)
