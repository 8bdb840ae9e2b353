"""The response of tools/evaluate.py's proxy distance to faults: one half of real clips against the other, spoiled.

    python tools/proxy_response.py                                       # the demo's train clips: the README's table
    python tools/proxy_response.py real_path=/data/UCF101 real_stride=3 image_size=256 num_real=400

The rows are that half as it is (and the range over 20 other ways to halve the set), blurred, with Gaussian noise, with
frames shuffled within windows, and with frames that repeat. The columns are the proxy and its two halves: means over
time, and means of |difference in time|. The same command prints the same table.
Letters: N clips, F frames, S pixels of a side, D proxy features.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configs import UserError, cli, load_config, option
from tools.metrics.options import ClipOptions


@dataclass(kw_only=True)
class ResponseConfig(ClipOptions):
    """Real clips; one half of them is spoiled."""

    real_path: str | None = option("datasets/demo/train", "video files or folders of frames", path=True)
    real_stride: int = option(1, "frames from one to the next of a clip", least=1)
    image_size: int = option(64, "pixels of a side", least=1)


parser = cli.Parser(__doc__, ResponseConfig)
if __name__ == "__main__":
    parser.answer_help()  # before torch is imported, which takes seconds

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from configs.tables import markdown_table
from models.hardware import default_device
from tools.metrics.clips import VideoFiles
from tools.metrics.efficientnet import load_proxy
from tools.metrics.protocols import fill_in
from tools.metrics.scores import frechet_distance

SPLITS = 20
FEWEST = 4  # two in each half


def blur(x: Tensor, sigma: float) -> Tensor:
    """Blurs each frame with a Gaussian of `sigma` pixels."""
    return gaussian_blur(x, [2 * int(3 * sigma + 0.5) + 1] * 2, [sigma] * 2)


def noise(x: Tensor, sigma: float) -> Tensor:
    """Adds Gaussian noise of `sigma` grey levels."""
    return x + sigma / 127.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))


def shuffle(x: Tensor, size: int) -> Tensor:
    """Shuffles the frames within windows of `size` frames, each clip in its own way."""
    F, generator = x.shape[1], torch.Generator().manual_seed(3)
    orders = [
        torch.cat([i + torch.randperm(min(size, F - i), generator=generator) for i in range(0, F, size)]) for _ in x
    ]
    return torch.stack([clip[order] for clip, order in zip(x, orders, strict=True)])


def repeat(x: Tensor, times: int) -> Tensor:
    """Shows the first of every `times` frames `times` times."""
    return x[:, torch.arange(x.shape[1]) // times * times]


FAULTS: dict[str, tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]] = {  # of (N, F, 3, S, S) in [-1, 1]
    "blurred, sigma {} pixels": (blur, (0.5, 1, 2)),
    "noise of {} grey levels": (noise, (2, 5, 10)),
    "frames shuffled within {}": (shuffle, (2, 4, 16)),
    "each frame shown {} times": (repeat, (2, 4, 16)),
}


def response_table(source: VideoFiles, device: torch.device) -> str:
    """A Markdown table of proxy distances, a row for each fault and a column for each part of the features.

    Raises:
        UserError: fewer than four clips are usable.
    """
    (read,) = source.batches([range(min(len(source), source.wanted))])
    clips = [clip for clip in read if isinstance(clip, Tensor)]  # without the broken and the short
    if len(clips) < FEWEST:
        reason = next((f": {clip}" for clip in read if not isinstance(clip, Tensor)), "")
        raise UserError(f"{source.key}: {len(clips)} of {len(read)} videos can be used, {FEWEST} are needed{reason}")
    videos, proxy, size = torch.stack(clips) / 127.5 - 1, load_proxy(device), source.cfg.batch_size
    bar = tqdm(total=(1 + sum(len(degrees) for _, degrees in FAULTS.values()) / 2) * len(videos), unit="clip")

    def features(x: Tensor) -> Tensor:
        """Proxy features (N, D) of clips (N, F, 3, S, S), whose pixels are rounded to 8 bits as in a file."""
        rows = []
        for batch in ((x.clamp(-1, 1) + 1) * 127.5).round().div(127.5).sub(1).split(size):
            rows.append(proxy(batch.to(device)))
            bar.update(len(batch))
        return torch.cat(rows)

    def distances(a: Tensor, b: Tensor) -> list[float]:
        """The distances of all features, of the means over time, and of the differences in time."""
        return [frechet_distance(a[:, part], b[:, part]) for part in (slice(None), slice(40), slice(40, None))]

    def row(title: str, columns: list[list[float]]) -> dict[str, str]:
        shown = [" / ".join(f"{x:.1f}" if x < 100 else f"{x:.0f}" for x in column) for column in columns]
        return dict(zip(("", "proxy", "its spatial half", "its motion half"), (title, *shown), strict=True))

    whole, half = features(videos), len(videos) // 2
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(videos), generator=generator) for _ in range(SPLITS)]
    others = [frechet_distance(whole[order[:half]], whole[order[half:]]) for order in orders]
    order = torch.randperm(len(videos), generator=torch.Generator().manual_seed(1))
    real, fake = whole[order[:half]], order[half:]
    spread = f"as they are ({SPLITS} splits: {min(others):.1f}–{max(others):.1f})"
    rows = [row(spread, [[x] for x in distances(real, whole[fake])])]
    for title, (spoil, degrees) in FAULTS.items():
        each = [distances(real, features(spoil(videos[fake], degree))) for degree in degrees]
        rows.append(
            row(title.format(" / ".join(map(str, degrees))), [list(column) for column in zip(*each, strict=True)])
        )
    bar.close()
    return markdown_table(rows)


def main() -> None:
    args = parser.parse_args()
    cfg = fill_in(load_config(ResponseConfig, args.config, args.overrides))
    source = VideoFiles(cfg, "real_path", cfg.num_real, cfg.real_stride)
    if args.dry_run:
        return cli.dry_run(cfg, [f"{len(source)} videos in {source.root}"])
    print(response_table(source, default_device()))


if __name__ == "__main__":
    cli.run(main)
