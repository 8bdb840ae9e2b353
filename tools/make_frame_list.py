"""Write the list of images that the stills of joint training are drawn from: `frame_data_txt` of the *_img data sets.

    python tools/make_frame_list.py frame_data_path=/data/UCF101/frames frame_data_txt=/data/UCF101/frames.txt
    bash train_scripts/ucf101_train.sh data_path=/data/UCF101/videos \\
        frame_data_path=/data/UCF101/frames frame_data_txt=/data/UCF101/frames.txt
    python tools/make_frame_list.py frame_data_path=... frame_data_txt=... shuffle_seed=0    # in random order

Every image under `frame_data_path`, at any depth, one a line and relative to it: `Archery/v_Archery_g01_c01/000000.jpg`
or `v_Archery_g01_c01/000000.jpg`. Folder by folder and in the order of the frames' numbers, or shuffled.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, load_config, path_option, require_path, to_yaml
from datasets.clips import IMAGE_SUFFIXES, find_frame_folders, natural_order
from models.checkpoint import atomic_path
from tools.common import cli


@dataclass(kw_only=True)
class ListOptions:
    """Options of the list; the names are those of the training."""

    frame_data_path: str | None = path_option()  # the images, at any depth
    frame_data_txt: str | None = path_option()  # the file to write
    shuffle_seed: int | None = None  # the same seed gives the same order everywhere; None: sorted


def main() -> None:
    args = cli.Parser(__doc__, ListOptions).parse_args()
    cfg = load_config(ListOptions, args.config, args.overrides)
    if not cfg.frame_data_txt:
        raise UserError("frame_data_txt is not set: give the file to write as frame_data_txt=PATH")
    lines = list_frames(require_path(cfg, "frame_data_path"), cfg.shuffle_seed)
    if args.dry_run:
        print(f"{to_yaml(cfg)}{len(lines)} images, the first: {lines[0]}")
        return
    with atomic_path(cfg.frame_data_txt) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print(f"{cfg.frame_data_txt}: {len(lines)} images")


def list_frames(root: Path, shuffle_seed: int | None = None) -> list[str]:
    """Every image under `root`, relative to it.

    Raises:
        UserError: there are none.
    """
    lines = []
    for folder in find_frame_folders(root):
        names = [path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        names = [name for name in sorted(names, key=natural_order) if not name.startswith(".")]
        lines += [(folder / name).relative_to(root).as_posix() for name in names]
    if not lines:
        raise UserError(f"frame_data_path: there are no images under {root}")
    if shuffle_seed is not None:
        lines = [lines[i] for i in np.random.default_rng(shuffle_seed).permutation(len(lines))]
    return lines


if __name__ == "__main__":
    cli.run(main)
