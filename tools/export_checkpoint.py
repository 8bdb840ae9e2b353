"""Write the weights of a checkpoint, its EMA where it has one, as a .safetensors file to publish.

    python tools/export_checkpoint.py results/000-Latte-skip-ucf101/checkpoints/1000000.pt ucf101.safetensors
    python tools/export_checkpoint.py results/demo/000-.../checkpoints/0004000.pt skip.safetensors --dtype fp16

Every program reads the result as its `ckpt`, and computes in the type of its own `precision`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from safetensors.torch import save_file

from configs import UserError
from models.checkpoint import atomic_path, load_state_dict
from sample.pipeline import DTYPES
from tools.common import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="fp32", help="how the weights are stored (default: fp32)"
    )
    args = parser.parse_args()
    if args.output.suffix != ".safetensors":
        raise UserError(f"{args.output} should end in .safetensors")
    export(args.checkpoint, args.output, args.dtype)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


def export(checkpoint: Path, output: Path, dtype: str) -> None:
    """Copy the weights at `checkpoint` to `output`, in the type named `dtype`."""
    weights = {name: value.to(DTYPES[dtype]).contiguous() for name, value in load_state_dict(checkpoint).items()}
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise UserError(f"{checkpoint}: {len(broken)} weights are not finite in {dtype}, {broken[0]} the first of them")
    with atomic_path(output) as temporary:
        save_file(weights, temporary)


if __name__ == "__main__":
    cli.run(main)
