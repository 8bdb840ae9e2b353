"""Time a sampling step, a training step, or the reading of clips, all ways in one run; or plan for other machines.

    python tools/benchmark.py sampling                                      # Skip-DiT XL/2, one 16 x 256 x 256 clip
    python tools/benchmark.py sampling model=Latte-B/2-skip use_compile=False runs=5 output=sampling.json
    python tools/benchmark.py training                                      # a narrow Skip-DiT; time and memory
    python tools/benchmark.py training --config configs/ucf101/ucf101_train.yaml local_batch_size=4
    python tools/benchmark.py reading                                       # files like UCF101's, made for the run
    python tools/benchmark.py reading reader_only=True frame_interval=1     # without the resizing
    python tools/benchmark.py reading --config configs/demo/demo_train.yaml # encoded latents beside their pixels
    python tools/benchmark.py reading minutes=60                            # a video of an hour, too
    python tools/benchmark.py reading verify=True dataset=ffs data_path=DIR # the readers, frame by frame, on your files
    python tools/benchmark.py plan nodes=[1,4] gradient_checkpointing=True  # GPUs that you do not have: on paper
    python tools/benchmark.py sampling --help                               # the options of one of them

All ways take turns, and the median counts. Steps are compared with the original's way to compute them: plain-maths
attention, and the conditioning repeated to one row a sequence. Reading is compared with decoding whole files. Memory is
the peak within a step over what is held before it. The matmul rate is the machine's own, measured in the same run.
Files like UCF101's are 320 x 240, 200 frames, .avi (Xvid) and .mp4 (H.264), with a keyframe every 12 frames or 250.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import choice, cli, load_config, require_path
from tools.benchmarks.options import DEFAULTS, OPTIONS, cells


def make_parser(name: str = "") -> cli.Parser:
    """The command line of the benchmark `name`; without a name, of the program as a whole."""
    parser = cli.Parser(__doc__, OPTIONS.get(name))
    parser.prog += f" {name}" if name in OPTIONS else f" {{{','.join(OPTIONS)}}}"
    return parser


if __name__ == "__main__":
    make_parser(*sys.argv[1:2]).answer_help()  # before torch is imported, which takes seconds

from configs.files import check_writable, write_json
from configs.tables import markdown_table
from tools.benchmarks import reading, sampling, scaling, training

BENCHMARKS = {"sampling": sampling, "training": training, "reading": reading, "plan": scaling}


def table(ways: dict[str, dict[str, Any]]) -> str:
    """A row of metrics for each way, in Markdown."""
    return markdown_table([{"way": name} | cells(metrics) for name, metrics in ways.items()])


def main() -> None:
    name = choice("benchmark", next(iter(sys.argv[1:]), ""), OPTIONS)
    args = make_parser(name).parse_args(sys.argv[2:])
    defaults = [] if args.config and name != "reading" else DEFAULTS[name]
    cfg = load_config(OPTIONS[name], args.config, [*defaults, *args.overrides])
    work = BENCHMARKS[name].describe(cfg)
    if args.dry_run:
        reads_files = name == "reading" and cfg.data_path
        return cli.dry_run(cfg, [work], [lambda: require_path(cfg, "data_path")] if reads_files else [])

    if cfg.output:
        check_writable(cfg, "output")
    print(work, flush=True)
    report = BENCHMARKS[name].benchmark(cfg)
    print(f"{table(report['ways'])}\non {report['machine']}")
    if name == "plan":
        print(table(report["sampling"]), *(f"- {note}" for note in report["notes"]), sep="\n")
    if cfg.output:
        write_json(cfg.output, report)


if __name__ == "__main__":
    cli.run(main)
