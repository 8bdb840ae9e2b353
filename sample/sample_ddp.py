"""Sample many videos, one per seed, on any number of processes: what an evaluation is made from.

    torchrun --standalone --nproc_per_node=8 sample/sample_ddp.py --config configs/ucf101/ucf101_sample_cache.yaml
    python sample/sample_ddp.py num_fvd_samples=14 --cache N2       # the demo, in one process
    python sample/sample_ddp.py --config ... --dry-run

Writes {seed:06d}.mp4 to save_video_path for seeds seed ... seed + num_fvd_samples - 1, and sample_ddp.json. A seed is
the same clip at any number of processes and batch size. The same command again makes only what is missing, a larger
num_fvd_samples what it adds; other settings need another folder.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tqdm import tqdm

from configs import SampleConfig, UserError, choice
from sample.options import Plan, describe, dry_run, make_parser, make_plan, make_record, parse, read_options
from sample.pipeline import generate, load
from tools.common import cli
from tools.common.distributed import Environment, distributed
from tools.common.media import save_video
from tools.common.records import write_json

RECORD = "sample_ddp.json"
INCIDENTAL = {  # options that change no clip
    "ckpt", "pretrained_model_path", "vae",  # their hashes are compared
    "save_video_path", "num_fvd_samples", "per_proc_batch_size", "vae_chunk_frames", "attention_mode", "use_compile",
    "use_fp16",  # resolved into precision
    "dataset", "data_path", "sample_names", "samples_per_class",
}  # fmt: skip


def main() -> None:
    args = parse(make_parser(__doc__))
    with distributed(timeout=timedelta(days=1)) as env:  # the last process may finish long after the first
        cfg, caches = read_options(args, env.device)
        if len(caches) > 1:
            raise UserError("sample_ddp.py runs one plan: give --cache one")
        choice("labels", cfg.labels, ["balanced", "random"])
        plan, folder = make_plan(cfg, caches[0]), Path(cfg.save_video_path)
        seeds = range(cfg.seed, cfg.seed + cfg.num_fvd_samples)
        task = f"task: {len(seeds)} clips, seeds {seeds[0]} ... {seeds[-1]}, to {folder}"
        lines = [*describe(cfg, [plan], env.device), task]
        if args.dry_run:
            if env.is_main:
                dry_run(cfg, lines)
            return

        missing = env.from_first(lambda: open_folder(folder, cfg, plan, env))
        if env.is_main:
            there = f"of which {len(seeds) - len(missing)} are there; processes: {env.world_size}"
            print("\n".join([*lines, there]), flush=True)
        start = time.perf_counter()  # loading included
        sample_share(cfg, missing[env.rank :: env.world_size], folder, env)
        env.barrier()
        if env.is_main and missing:
            seconds = time.perf_counter() - start
            record = json.loads((folder / RECORD).read_text())
            record["runs"].append({"clips": len(missing), "processes": env.world_size, "seconds": seconds})
            write_json(folder / RECORD, record)
            print(f"{len(missing)} clips in {seconds:.0f} s")


def sample_share(cfg: SampleConfig, seeds: list[int], folder: Path, env: Environment) -> None:
    """This process's clips, a file each."""
    if not seeds:
        return
    pipe = load(cfg, env.device)
    with tqdm(total=len(seeds), unit="clip", mininterval=1, disable=not env.is_main) as bar:
        for i in range(0, len(seeds), cfg.per_proc_batch_size):
            batch = seeds[i : i + cfg.per_proc_batch_size]
            videos = generate(pipe, batch, labels_of(batch, cfg))  # (B, F, 3, H, W)
            for seed, video in zip(batch, videos, strict=True):
                save_video(video_path(folder, seed), video, cfg.fps)
            bar.update(len(batch))


def labels_of(seeds: Sequence[int], cfg: SampleConfig) -> list[int] | None:
    """The clips' classes; each comes from its seed alone."""
    if cfg.num_classes is None:
        return None
    if cfg.labels == "balanced":
        return [seed % cfg.num_classes for seed in seeds]
    return [random.Random(f"label of {seed}").randrange(cfg.num_classes) for seed in seeds]


def video_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.mp4"


def open_folder(folder: Path, cfg: SampleConfig, plan: Plan, env: Environment) -> list[int]:
    """Write the record of a new folder, or check the one that is there; returns the seeds whose clips are missing.

    Raises:
        UserError: the folder holds clips made otherwise.
    """
    seeds = range(cfg.seed, cfg.seed + cfg.num_fvd_samples)
    record = {
        **make_record(cfg, env.device),
        "device": env.device.type,  # CUDA draws other noise than a CPU
        "plan": asdict(plan),
        "labels": labels_of(seeds, cfg),
        "runs": [],
    }
    if (folder / RECORD).exists():
        earlier = json.loads((folder / RECORD).read_text())
        before, now = settings(earlier), settings(record)
        differ = [key for key in now if before.get(key) != now[key]]
        if differ:
            old, new = (", ".join(f"{key}={values.get(key)}" for key in differ) for values in (before, now))
            raise UserError(f"{folder} holds clips of {old}, not {new}: choose another save_video_path or remove it")
        record["runs"] = earlier["runs"]
        if cfg.num_fvd_samples < earlier["config"]["num_fvd_samples"]:
            record = earlier  # it describes more clips than are asked for now
    elif any(folder.glob("[0-9]*.mp4")):
        raise UserError(f"{folder} holds videos of unknown settings (no {RECORD}): choose another save_video_path")
    for leftover in folder.glob("*.tmp*"):  # of a killed process
        leftover.unlink()
    write_json(folder / RECORD, record)
    return [seed for seed in seeds if not video_path(folder, seed).exists()]


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """What two runs must have in common for their clips to lie in one folder, under the names of the options."""
    config = {key: value for key, value in record["config"].items() if key not in INCIDENTAL}
    cache = {f"cache.{key}": value for key, value in config.pop("cache").items()}
    hashes = {key: record[key]["sha256"][:12] for key in ("checkpoint", "vae") if key in record}  # records had no vae
    return {**config, **cache, **hashes, "device": record["device"]}


if __name__ == "__main__":
    cli.run(main)
