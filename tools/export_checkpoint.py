"""Write the weights of a checkpoint, its EMA where it has one, as a .safetensors file to publish.

    python tools/export_checkpoint.py results/000-Latte-skip-ucf101/checkpoints/1000000.pt ucf101.safetensors
    python tools/export_checkpoint.py results/demo/000-.../checkpoints/0004000.pt skip.safetensors --dtype fp16

Every program reads the result as its `ckpt`, and computes in the type of its own `precision`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, cli

parser = cli.Parser(__doc__)
parser.add_argument("checkpoint", type=Path, help="a .pt or .safetensors file")
parser.add_argument("output", type=Path, help="the .safetensors file to write")
parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the file (default: fp32)")
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

from safetensors.torch import save_file

from configs.files import atomic_path
from models.checkpoint import load_state_dict
from models.hardware import DTYPES


def main() -> None:
    args = parser.parse_args()
    if args.output.suffix != ".safetensors":
        raise UserError(f"{args.output} should end in .safetensors")
    state = load_state_dict(args.checkpoint)
    weights = {name: value.to(DTYPES[args.dtype]).contiguous() for name, value in state.items()}
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        counted = f"{len(broken)} weights are not finite in {args.dtype}"
        raise UserError(f"{args.checkpoint}: {counted}, {broken[0]} the first of them")
    if args.dry_run:
        print(f"would write {len(weights)} tensors in {args.dtype} to {args.output}")
        return
    with atomic_path(args.output) as temporary:
        save_file(weights, temporary)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
