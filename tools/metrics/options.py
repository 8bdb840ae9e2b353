"""Options of the programs that measure. Importing this module is quick: it does not import torch."""

from dataclasses import dataclass
from typing import Any

from configs import SampleConfig, option
from configs.errors import UserError, choice

METRICS = {  # -> the detector's output that the metric is computed from
    "fvd": "i3d", "fid": "inception", "kid": "inception", "is": "inception_classes", "video_is": "c3d_classes",
    "proxy": "proxy",
}  # fmt: skip


@dataclass(kw_only=True)
class ClipOptions:
    """How clips are cut from videos and read."""

    real_path: str | None = option(None, "training videos: files or folders of frames, flat or nested", path=True)
    num_real: int = option(2048, "the largest number of real clips", least=2)
    num_frames: int = option(16, "frames of a clip", least=2)
    real_stride: int = option(3, "frames from one to the next of a real clip", least=1)
    image_size: int = option(256, "short edge resized to this, a square cut from the centre", least=1)
    resize_filter: str = option(
        "bilinear", "bilinear as in training, lanczos as Latte converts; antialiased",
        choices=("bilinear", "bicubic", "lanczos"),
    )  # fmt: skip
    seed: int = option(0, "chooses the clips, and where their windows begin")
    video_reader: str = option("pyav", "see train.py", choices=("pyav", "decord"))
    max_bad_fraction: float = option(0.1, "stop if more of the videos read than this are broken", least=0, most=1)
    batch_size: int = option(8, "clips that pass a detector at once", least=1)
    num_workers: int | None = option(None, "processes that read; empty: one for each core", least=0)


@dataclass(kw_only=True)
class EvaluateConfig(ClipOptions):
    """The evaluation: metrics, samples and detectors."""

    metrics: str = option("fvd", f"separated by commas, of {', '.join(METRICS)}")
    fake_path: str | None = option(None, "the videos to evaluate", path=True)
    generate: str | None = option(None, "or: YAML of sampling options, sampled in memory from its seed on", path=True)
    sample: dict[str, Any] = option(dict, "changes to those options, as sample.cache.interval=2")
    num_fake: int = option(2048, "the largest number of sampled clips", least=2)
    fake_stride: int = option(1, "frames from one to the next of a sampled clip", least=1)
    jackknife: int = option(20, "groups of clips left out in turn for an interval; 0: no interval", least=0)
    output: str = option("results/evaluate.json", "the record to write", path=True)
    i3d: str | None = option(None, "the I3D's file; empty: the published one", path=True)
    inception: str | None = option(None, "the Inception's file; empty: the published one", path=True)
    c3d: str | None = option(None, "the C3D's file; empty: the published one", path=True)
    detector_path: str = option("pretrained/metrics", "the folder of the published detectors", path=True)
    feature_path: str | None = option(
        "results/features", "the folder that keeps features of real sets; null: keep none", path=True
    )

    def metric_names(self) -> list[str]:
        """The metrics asked for; raises UserError for an unknown one."""
        return [choice("metrics", name, METRICS) for name in self.metrics.split(",")]


@dataclass(kw_only=True)
class MeasureConfig(SampleConfig):
    """The measurement: seeds and real clips."""

    num_clips: int = option(64, "seeds seed, seed + 1, ...", least=4)
    real_path: str | None = option(None, "video files; empty: no distance to real clips", path=True)
    real_stride: int = option(1, "frames from one to the next of a real clip, as in training", least=1)
    fidelity: str = option(
        "ours", "metrics against twins; teacache: also PSNR by frame, SSIM and LPIPS of mp4 files (arXiv:2411.19108)",
        choices=("ours", "teacache"),
    )  # fmt: skip
    output: str = option("results/fidelity", "the folder to write", path=True)

    def check_clips(self) -> None:
        """Raises UserError if there are fewer clips than classes."""
        if self.num_clips < (self.num_classes or 0):
            raise UserError(f"num_clips: {self.num_clips} is less than {self.num_classes}, one of each class")
