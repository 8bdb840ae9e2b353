"""Options of the benchmarks. Importing this does not import torch."""

from dataclasses import dataclass

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


OPTIONS = {"sampling": SamplingBenchmark, "training": TrainingBenchmark, "reading": ReadingBenchmark}
DEFAULTS = {  # of a run without --config; those of reading also with it, as workers would hide what a reader costs
    "sampling": ["model=Latte-skip", "num_classes=101", "use_compile=True"],
    "training": [
        "model=Latte-skip", "hidden_size=128", "num_heads=4", "image_size=64", "num_classes=101", "local_batch_size=16",
    ],
    "reading": ["num_workers=0"],
}  # fmt: skip
