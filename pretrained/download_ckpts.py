"""Fetch the published weights from the Hugging Face hub: exactly the files that are used, 11 GB by default.

    python pretrained/download_ckpts.py                      # the four Skip-DiT checkpoints and the VAE
    python pretrained/download_ckpts.py --only ucf101 vae    # one data set
    python pretrained/download_ckpts.py --only latte         # Latte's own four checkpoints, without skip branches
    python pretrained/download_ckpts.py --dry-run            # the URLs and where each file goes

The same command again continues where it stopped and skips what is there and whole. Behind a firewall, a mirror may
help: HF_ENDPOINT=https://hf-mirror.com python pretrained/download_ckpts.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import ROOT, UserError, cli


@dataclass(frozen=True)
class File:
    """A file of a hub repository, and the folder under pretrained/ that it goes to."""

    repo: str
    name: str
    folder: str
    size: int | None = None  # bytes, where known; else the hub's word


SKIP_DIT, LATTE = "GuanjieChen/Skip-DiT", "maxin-cn/Latte"
FILES = {
    "ucf101": [File(SKIP_DIT, "ucf101-skip.pt", "ucf101-skip", size=2_771_053_040)],
    "taichi": [File(SKIP_DIT, "taichi-skip.pt", "taichi-skip")],
    "skytimelapse": [File(SKIP_DIT, "skytimelapse-skip.pt", "skytimelapse-skip")],
    "ffs": [File(SKIP_DIT, "ffs-skip.pt", "ffs-skip")],
    "vae": [File(LATTE, f"vae/{name}", "Latte") for name in ("config.json", "diffusion_pytorch_model.bin")],
    "latte": [File(LATTE, f"{task}.pt", "Latte") for task in ("ucf101", "taichi-hd", "skytimelapse", "ffs")],
}
DEFAULT = ["ucf101", "taichi", "skytimelapse", "ffs", "vae"]

parser = cli.Parser(__doc__)
parser.add_argument("--only", nargs="+", choices=FILES, default=DEFAULT, metavar="NAME", help=f"{', '.join(FILES)}")
parser.add_argument("--dir", type=Path, default=ROOT / "pretrained", help="the folder to fill (default: %(default)s)")
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers

from models.download import download


def fetch(file: File, target: Path) -> None:
    """Downloads a file unless it is there with its full size; what is left of a stopped download has the hub's hash."""
    url = hf_hub_url(file.repo, file.name)
    on_hub = get_hf_file_metadata(url)
    size = file.size or on_hub.size
    if on_hub.size != size:
        raise UserError(f"{url} has {on_hub.size:,} bytes instead of {size:,}: not the published file")
    if target.exists() and target.stat().st_size == size:
        print(f"there: {target}")
        return
    print(f"fetching {url} ({size / 1e9:.2f} GB) -> {target}", flush=True)
    sha256 = on_hub.etag if len(on_hub.etag) == 64 else None  # the hub's etag of a large file
    download(url, target, on_hub.etag[:8], size, sha256, build_hf_headers())


def main() -> None:
    args = parser.parse_args()
    files = [(file, args.dir / file.folder / file.name) for name in args.only for file in FILES[name]]
    lines = [f"{hf_hub_url(file.repo, file.name)} -> {target}" for file, target in files]
    for number, (file, target) in enumerate(files):
        if args.dry_run:
            print(f"{'there' if target.exists() else 'to fetch'}: {lines[number]}")
            continue
        try:
            fetch(file, target)
        except UserError:
            raise
        except Exception as error:  # the hub's, httpx's and the system's errors share no base class
            print(*lines[number:], sep="\n", file=sys.stderr)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            advice = "set HF_ENDPOINT to a mirror, or fetch the files above elsewhere and copy them there"
            raise UserError(f"the hub is out of reach ({reason}): run this again to continue, {advice}") from None


if __name__ == "__main__":
    cli.run(main)
