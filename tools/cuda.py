"""Check what only a GPU can show, and time XL/2 there: conformance, waits, seeds, graphs, sampling, training, nccl.

    make cuda                                     # this program by the machine's own python3
    python tools/cuda.py                          # on one NVIDIA GPU, or two; about 8 minutes at most
    python tools/cuda.py --device cpu --small     # the same program at tiny sizes on a CPU
    python tools/cuda.py --only conformance seeds

It needs torch 2.9 or newer, numpy, einops, safetensors, huggingface_hub, PyYAML and tqdm, but no network or weights.
Without diffusers, the checks that use it are skipped. A failed check is a row of the table, and the exit code is 1.
Weights are random: what is timed does not depend on them. "expected" speed-ups are the ratios of MACs. The paper's
seconds are those of its code on an A100; whether with guidance, and in which type, it does not say.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, choice, cli
from configs.files import write_json, write_text
from configs.tables import markdown_table
from tools.benchmarks.options import cells

TIME = 460  # seconds for all checks

parser = cli.Parser(__doc__)
parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
parser.add_argument("--small", action="store_true", help="tiny sizes: whether the program runs, not what it measures")
parser.add_argument("--only", nargs="+", metavar="CHECK", help="names of checks (default: all)")
parser.add_argument(
    "--output", type=Path, default=Path("results/cuda"), help="PATH.json, PATH.md (default: %(default)s)"
)


def table(rows: list[dict]) -> str:
    """Returns the rows as a Markdown table."""
    return markdown_table(
        [{key: row[key] for key in ("check", "result")} | cells(row) | {"note": row.get("note", "")} for row in rows]
    )


def main() -> None:
    args = parser.parse_args()
    if choice("--device", args.device, ("cuda", "cpu")) == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if not args.small:
            raise UserError("--device cpu: XL/2 would take hours there; add --small")
    try:
        import torch

        from tools.benchmarks.checks import CHECKS, Setting, count_gpus, run_check
    except ModuleNotFoundError as error:
        raise UserError(f"{sys.executable} has no module {error.name}: see --help for what is needed") from None

    names = [choice("--only", name, CHECKS) for name in args.only or CHECKS]
    if args.dry_run:
        print(f"would run {', '.join(names)} on {args.device} and write {args.output}.json and {args.output}.md")
        return
    at = Setting(torch.device(args.device), args.small, count_gpus())
    if at.is_gpu and not at.num_gpus:
        raise UserError("torch finds no GPU; --device cpu --small tries the program without one")

    deadline, rows = time.monotonic() + TIME, []
    for name in names:
        start = time.monotonic()
        for row in run_check(name, at, deadline - start):
            rows.append(row)
            print(f"{row['result']}  {row['check']}  {row.get('note', '')}", flush=True)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output.with_suffix(".json"), {"device": args.device, "small": args.small, "rows": rows})
    write_text(args.output.with_suffix(".md"), table(rows) + "\n")
    print(table(rows))
    failed = [row["check"] for row in rows if row["result"] == "failed"]
    print(f"{len(rows) - len(failed)} rows are as they should be, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    cli.run(main)
