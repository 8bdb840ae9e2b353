"""Options of the benchmarks, and the columns of their tables. Importing this does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs import SampleConfig, TrainConfig, option


@dataclass(kw_only=True)
class Output:
    """What becomes of the metrics"""

    output: str | None = option(None, "JSON file to write them to; empty: they are only printed", path=True)


@dataclass(kw_only=True)
class SamplingBenchmark(SampleConfig, Output):
    """The timing of a sampling step. Without --config: model=Latte-skip num_classes=101 use_compile=True"""

    runs: int = option(3, "timed steps of each way", least=1)
    batch: int = option(1, "clips of a step", least=1)


@dataclass(kw_only=True)
class TrainingBenchmark(TrainConfig, Output):
    """The timing of a training step. Without --config: 28 blocks of width 128, 16 clips of 16 x 64 x 64"""

    runs: int = option(5, "timed steps of each way", least=1)


@dataclass(kw_only=True)
class ReadingBenchmark(TrainConfig, Output):
    """The timing of reading. num_workers is 0 unless the command line sets it"""

    epochs: int = option(5, "timed passes of each way", least=1)
    files: int = option(24, "without data_path: files of each kind that are made", least=1)
    reader_only: bool = option(False, "leave out the resizing, which all ways share")
    minutes: int = option(
        0, "without data_path: length of one more video, whose index is made or kept; 0: none", least=0
    )
    verify: bool = option(False, "compare the readers with plain decoding, frame by frame, and time nothing")


@dataclass(kw_only=True)
class ScalingPlan(TrainConfig, Output):
    """Memory and time on paper, for nodes of GPUs. Without --config: XL/2's published training, but in bf16"""

    nodes: list[int] = option(lambda: [1, 2, 4, 8], "numbers of nodes; one GPU comes first", least=1)
    gpus_per_node: int = option(8, "GPUs of a node, a process each", least=1)
    sampling_batch: int = option(8, "clips of a sampling batch", least=1)
    gpu_memory: float = option(80.0, "memory of a GPU, GB", above=0)
    bf16_tflops: float = option(312.0, "a GPU's bf16 products, TFLOP/s (an A100's data sheet)", above=0)
    fp32_tflops: float = option(156.0, "a GPU's fp32 products, TFLOP/s (an A100's data sheet, TF32)", above=0)
    memory_gbs: float = option(2039.0, "a GPU's memory bandwidth, GB/s (an A100's data sheet)", above=0)
    training_share: float = option(0.35, "of the products' rate in a training step (assumed)", above=0, most=1)
    sampling_share: float = option(
        0.186, "of the products' rate in sampling (the paper's 10.02 s on an A100, if in 16 bits)", above=0, most=1
    )
    vae_share: float = option(0.3, "of the fp32 products' rate in the VAE (assumed)", above=0, most=1)
    gpu_link_gbs: float = option(250.0, "between the GPUs of a node, GB/s (assumed: NVLink)", above=0)
    node_link_gbs: float = option(25.0, "between nodes, GB/s a node (assumed: one port of 200 Gbit/s)", above=0)
    overlap: float = option(0.7, "share of the gradients' traffic behind the backward pass (assumed)", least=0, most=1)
    read_clips: float = option(56.0, "clips/s that a worker reads (measured: a core, .avi like UCF101's)", above=0)


OPTIONS = {
    "sampling": SamplingBenchmark,
    "training": TrainingBenchmark,
    "reading": ReadingBenchmark,
    "plan": ScalingPlan,
}
DEFAULTS = {  # of a run without --config; those of reading also with it, as workers would hide what a reader costs
    "sampling": ["model=Latte-skip", "num_classes=101", "use_compile=True"],
    "training": [
        "model=Latte-skip", "hidden_size=128", "num_heads=4", "image_size=64", "num_classes=101", "local_batch_size=16",
    ],
    "reading": ["num_workers=0"],
    "plan": [
        "model=LatteIMG-skip", "num_classes=101", "dataset=ucf101_img", "use_image_num=8", "local_batch_size=4",
        "mixed_precision=bf16", "sample_method=ddim", "num_sampling_steps=50", "cfg_scale=7", "cache.interval=2",
    ],
}  # fmt: skip
COLUMNS = {  # metric -> title of its column, and how a value is written
    "products": ("products", "{:.3f} s".format),
    "vae": ("VAE", "{:.3f} s".format),
    "update": ("update", "{:.3f} s".format),
    "network": ("waits for gradients", "{:.3f} s".format),
    "denoising": ("denoising", "{:.2f} s".format),
    "seconds": ("seconds", "{:.3f}".format),
    "clips_per_second": ("clips/s", "{:.1f}".format),
    "speedup": ("speed-up", "{:.2f}x".format),
    "share_of_matmul_rate": ("of matmul rate", "{:.0%}".format),
    "matmul_gflops": ("matmul GFLOP/s", "{:,.0f}".format),
    "files": ("files", "{:,}".format),
    "frames": ("frames", "{:,}".format),
    "wrong": ("wrong frames", "{:,}".format),
    "by_pyav": ("files left to PyAV", "{:,}".format),
    "efficiency": ("efficiency", "{:.0%}".format),
    "days": ("all steps", "{:.1f} days".format),
    "clips_per_hour": ("clips/h", "{:,.0f}".format),
    "minutes": ("2048 clips", "{:.0f} min".format),
    "error": ("error", "{:.1e}".format),
    "limit": ("limit", "{:.0e}".format),
    "paper_seconds": ("paper, A100", "{:.2f} s".format),
    "expected_speedup": ("expected", "{:.2f}x".format),
    "peak_bytes": ("memory", lambda size: f"{size / 1e9:.2f} GB"),
}


def cells(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metrics that have a column, as text by its title."""
    return {title: write(metrics[key]) for key, (title, write) in COLUMNS.items() if metrics.get(key) is not None}
