"""Protocols by name: the settings that published scores were computed with, and whether two records compare.

Importing this module is quick: it does not import torch.
"""

from dataclasses import dataclass, replace
from typing import Any

from configs.files import differences


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The settings that a score depends on, and where they were read. Every field but the first three is an option."""

    source: str
    warning: str = ""
    taichi_stride: int | None = None  # the published stride of Taichi-HD, where it is another one
    num_real: int = 2048
    num_fake: int = 2048
    order: str = "random"
    num_frames: int = 16
    first_frames: int = 0
    real_stride: int = 1
    real_fps: float | None = None
    short_clips: str = "skip"
    fake_stride: int = 1
    image_size: int = 256
    resize_filter: str = "bilinear"
    jpeg: bool = False
    covariance: str = "N"
    fid_frames: str = "all"


LATTE = Protocol(
    source="github.com/Vchitect/Latte at 03d2bda, tools/: metrics/*.py draw real videos at random and divide by N, "
    "convert_videos_to_frames.py crops, resizes and passes q=95 to Pillow, which ignores it: JPEG of quality 75. 2048 "
    "clips and Taichi's stride are the paper's (arXiv:2401.03048); metric_main.py at c227056 asks for 20480",
    taichi_stride=6, real_stride=3, resize_filter="lanczos", jpeg=True,
)  # fmt: skip
PROTOCOLS = {
    "ours": Protocol(
        source="this repository: pixels as in training, covariances over N - 1 and frames of the same clips as in FID",
        taichi_stride=6, real_stride=3, covariance="N-1", fid_frames="clips",
    ),
    "stylegan-v": Protocol(
        source="github.com/universome/stylegan-v at 1f630af, src/metrics/*.py: the first videos by name, stride 1, "
        "division by N; src/scripts/convert_videos_to_frames.py resizes, then crops",
        warning="its converter stores real frames as JPEG of quality 75, fakes it takes from the generator: frames "
        "that were converted so must be given as real_path",
        order="sorted", resize_filter="lanczos-first",
    ),
    "latte": LATTE,
    "skip-dit": replace(
        LATTE, taichi_stride=None, real_stride=1, first_frames=17,
        source="github.com/OpenSparseLLMs/Skip-DiT at 00e0283, class-to-video/tools/: Latte's, but utils/dataset.py "
        "sets the stride to 1 and convert_videos_to_frames.py keeps 17 frames of a video",
        warning="the setting behind the paper's numbers (arXiv:2411.17616) is unknown: its tool's FID does not run",
    ),
}  # fmt: skip
SETTINGS = [name for name in Protocol.__dataclass_fields__ if name not in ("source", "warning", "taichi_stride")]


def fill_in(cfg: Any) -> Any:
    """The options of `cfg`, in which those left empty have the value of the protocol."""
    protocol = PROTOCOLS[cfg.protocol]
    if cfg.real_fps and cfg.real_stride is None:
        cfg = replace(cfg, real_stride=1)
    empty = [name for name in SETTINGS if getattr(cfg, name, "absent") is None]
    return replace(cfg, **{name: getattr(protocol, name) for name in empty})


def protocol_record(cfg: Any) -> dict[str, Any]:
    """Name, source, warning and settings, and the departures: setting -> its value and the protocol's."""
    protocol, settings = PROTOCOLS[cfg.protocol], {name: getattr(cfg, name) for name in SETTINGS}
    theirs = {name: getattr(protocol, name) for name in SETTINGS}
    if cfg.real_stride == protocol.taichi_stride:
        theirs["real_stride"] = cfg.real_stride
    departures = {name: [value, theirs[name]] for name, value in settings.items() if value != theirs[name]}
    told = {"name": cfg.protocol, "source": protocol.source, "warning": protocol.warning}
    return {**told, "settings": settings, "departures": departures}


def describe_protocol(record: dict[str, Any]) -> str:
    """The name of a record's protocol and each departure from it, as `latte, but num_fake=70 (2048)`."""
    found = record["protocol"]["departures"].items()
    departures = ", ".join(f"{name}={ours} ({theirs})" for name, (ours, theirs) in found)
    return record["protocol"]["name"] + f", but {departures}" * bool(departures)


def why_not(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Why the scores of two records of tools/evaluate.py do not compare, as `real_stride=1, not 3`; empty if they do.

    Only the detectors of both count.
    """
    shared = a["detectors"].keys() & b["detectors"].keys()
    if not a["metrics"].keys() & b["metrics"].keys():
        return "no metric in common"

    def facts(record: dict[str, Any]) -> dict[str, Any]:
        real, fake = record["real"] or {}, record["fake"]
        hashes = {name: str(record["detectors"][name]["sha256"])[:12] for name in sorted(shared)}
        sets = {"real clips": real.get("clips"), "real files": str(real.get("sha256"))[:12]}
        sets |= {"fake clips": fake["clips"], "fakes from": fake["kind"]}
        return {"short_clips": "skip"} | record["protocol"]["settings"] | sets | hashes  # older records do without

    return differences(facts(a), facts(b))
