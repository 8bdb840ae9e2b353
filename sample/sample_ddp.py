"""Sample many videos, one per seed, on any number of processes, for an evaluation.

    torchrun --standalone --nproc_per_node=8 sample/sample_ddp.py --config configs/ucf101/ucf101_sample_cache.yaml
    python sample/sample_ddp.py num_fvd_samples=14 --cache N2       # the demo, in one process
    python sample/sample_ddp.py --config ... --dry-run

Writes {seed:06d}.mp4 to save_video_path for seeds seed ... seed + num_fvd_samples - 1, and sample_ddp.json. A seed
gives the same clip with any number of processes and any batch size. The same command again makes only the clips that
are missing, also after num_fvd_samples was raised. Other settings need another folder.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import SampleConfig, UserError, cli
from sample.options import file_checks, make_parser, read_options

parser = make_parser(__doc__)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

from tqdm import tqdm

from configs.files import write_json
from configs.tables import duration
from sample import DDP_RECORD
from sample.distributed import Environment, distributed
from sample.folder import labels_of, open_folder, video_path
from sample.media import save_video
from sample.pipeline import generate, load
from sample.plans import describe_run


def sample_share(cfg: SampleConfig, seeds: list[int], folder: Path, env: Environment) -> None:
    """Samples this process's share of the clips and writes each to a file."""
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


def main() -> None:
    args = parser.parse_args()
    with distributed() as env:
        cfg, plans = read_options(args, env.device)
        if len(plans) > 1:
            raise UserError("sample_ddp.py runs one plan: give --cache one")
        folder, seeds = Path(cfg.save_video_path), range(cfg.seed, cfg.seed + cfg.num_fvd_samples)
        lines = describe_run(cfg, plans, env.device)
        lines.append(f"task: {len(seeds)} clips, seeds {seeds[0]} ... {seeds[-1]}, to {folder}")
        checks = file_checks(cfg, "save_video_path")
        if args.dry_run:
            cli.dry_run(cfg, lines, [*checks, lambda: open_folder(folder, cfg, plans[0], env.device, dry=True)])
            return

        env.from_first(lambda: cli.check_all(checks))
        missing = env.from_first(lambda: open_folder(folder, cfg, plans[0], env.device))
        if env.is_main:
            there = f"of which {len(seeds) - len(missing)} are there; processes: {env.world_size}"
            print("\n".join([*lines, there]), flush=True)
        start = time.perf_counter()  # loading included
        sample_share(cfg, missing[env.rank :: env.world_size], folder, env)
        env.barrier()
        if env.is_main and missing:
            seconds = time.perf_counter() - start
            record = json.loads((folder / DDP_RECORD).read_text())
            record["runs"].append({"clips": len(missing), "processes": env.world_size, "seconds": seconds})
            write_json(folder / DDP_RECORD, record)
            print(f"{len(missing)} clips in {duration(seconds)}")


if __name__ == "__main__":
    cli.run(main)
