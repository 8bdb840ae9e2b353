"""Write the weights of a checkpoint, its EMA where it has one, as a .safetensors file or a folder to publish.

    python tools/export_checkpoint.py results/000-Latte-skip-ucf101/checkpoints/1000000.pt ucf101.safetensors
    python tools/export_checkpoint.py results/demo/000-.../checkpoints/0009400.pt pretrained/demo --dtype fp16

Every program reads the result as its `ckpt`, and computes in the type of its own `precision`. The options that made the
weights come along. A folder gets model.safetensors and config.json, which `Latte.from_pretrained` reads, and the VAE.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, cli

parser = cli.Parser(__doc__)
parser.add_argument("checkpoint", type=Path, help="a .pt or .safetensors file")
parser.add_argument("output", type=Path, help="the .safetensors file, or the folder, to write")
parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the file (default: fp32)")
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

from configs.files import write_json
from models.checkpoint import copy_vae, load_options, load_state_dict, save_weights
from models.hardware import DTYPES


def main() -> None:
    args = parser.parse_args()
    is_folder = args.output.is_dir() or not args.output.suffix
    file = args.output / "model.safetensors" if is_folder else args.output
    if file.suffix != ".safetensors":
        raise UserError(f"{args.output} should end in .safetensors, or be a folder")
    state, options = load_state_dict(args.checkpoint), load_options(args.checkpoint)
    if is_folder and not options:
        raise UserError(f"{args.checkpoint} does not say which options made it, as a folder must: give a file instead")
    weights = {name: value.to(DTYPES[args.dtype]) for name, value in state.items()}
    broken = [name for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        counted = f"{len(broken)} weights are not finite in {args.dtype}"
        raise UserError(f"{args.checkpoint}: {counted}, {broken[0]} the first of them")
    if args.dry_run:
        print(f"would write {len(weights)} tensors in {args.dtype} to {file}")
        return
    save_weights(file, weights, options)
    if is_folder:
        write_json(args.output / "config.json", options["latte"])
        copy_vae(options, args.output)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
