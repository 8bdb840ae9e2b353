"""Limits and choices of the programs that measure: `load_config` checks them, before a program reads a clip."""

import pytest

from configs import UserError, load_config
from tools.demo.judge import JudgeConfig
from tools.fidelity import FidelityConfig
from tools.metrics.options import EvaluateConfig, MeasureConfig
from tools.proxy_response import ResponseConfig
from tools.stability import StabilityConfig
from tools.sweep import SweepConfig

REFUSED = [
    (EvaluateConfig, "num_real=1", "num_real: 1 is less than 2"),
    (EvaluateConfig, "num_fake=1", "num_fake: 1 is less than 2"),
    (EvaluateConfig, "num_frames=1", "num_frames: 1 is less than 2"),
    (EvaluateConfig, "real_stride=0", "real_stride: 0 is less than 1"),
    (EvaluateConfig, "fake_stride=0", "fake_stride: 0 is less than 1"),
    (EvaluateConfig, "image_size=0", "image_size: 0 is less than 1"),
    (EvaluateConfig, "jackknife=-1", "jackknife: -1 is less than 0"),
    (EvaluateConfig, "batch_size=0", "batch_size: 0 is less than 1"),
    (EvaluateConfig, "num_workers=-1", "num_workers: -1 is less than 0"),
    (EvaluateConfig, "max_bad_fraction=1.5", "max_bad_fraction: 1.5 is outside 0 ... 1"),
    (EvaluateConfig, "max_bad_fraction=nan", "max_bad_fraction: nan is not a finite number"),
    (
        EvaluateConfig,
        "resize_filter=x",
        "resize_filter: 'x' is unknown; valid: bilinear, bicubic, lanczos, lanczos-first",
    ),
    (EvaluateConfig, "video_reader=x", "video_reader: 'x' is unknown; valid: pyav, decord"),
    (ResponseConfig, "real_stride=0", "real_stride: 0 is less than 1"),
    (ResponseConfig, "image_size=0", "image_size: 0 is less than 1"),
    (MeasureConfig, "num_clips=3", "num_clips: 3 is less than 4"),
    (MeasureConfig, "real_stride=0", "real_stride: 0 is less than 1"),
    (MeasureConfig, "labels=even", "labels: 'even' is unknown; valid: balanced, random"),
    (
        MeasureConfig,
        "sample_method=plms",
        "sample_method: 'plms' is unknown; valid: ddpm, ddim, euler, heun, dpmsolver++, unipc",
    ),
    (FidelityConfig, "num_clips=3", "num_clips: 3 is less than 4"),
    (SweepConfig, "num_clips=3", "num_clips: 3 is less than 4"),
    (SweepConfig, "steps=[20,0]", "steps: 0 is less than 1"),
    (StabilityConfig, "num_clips=0", "num_clips: 0 is less than 1"),
    (StabilityConfig, "points=0", "points: 0 is less than 1"),
    (StabilityConfig, "radius=0", "radius: 0.0 is not above 0"),
    (StabilityConfig, "radius=nan", "radius: nan is not a finite number"),
    (StabilityConfig, "radius=inf", "radius: inf is not a finite number"),
    (JudgeConfig, "num_frames=1", "num_frames: 1 is less than 2"),
    (JudgeConfig, "frame_interval=0", "frame_interval: 0 is less than 1"),
    (JudgeConfig, "image_size=7", "image_size: 7 is less than 8"),
    (JudgeConfig, "epochs=0", "epochs: 0 is less than 1"),
    (JudgeConfig, "batch_size=0", "batch_size: 0 is less than 1"),
    (JudgeConfig, "learning_rate=0", "learning_rate: 0.0 is not above 0"),
]


@pytest.mark.parametrize(("schema", "change", "message"), REFUSED)
def test_a_value_outside_its_limits_or_choices_is_one_line(schema, change, message):
    with pytest.raises(UserError) as error:
        load_config(schema, None, [change])
    assert str(error.value) == f"command line: {message}"


ALLOWED = [
    (EvaluateConfig, {"num_real": 2, "num_fake": 2, "num_frames": 2, "jackknife": 0, "num_workers": 0}),
    (EvaluateConfig, {"real_stride": 1, "fake_stride": 1, "image_size": 1, "batch_size": 1, "max_bad_fraction": 0}),
    (EvaluateConfig, {"max_bad_fraction": 1, "resize_filter": "lanczos", "video_reader": "decord"}),
    (MeasureConfig, {"num_clips": 4, "real_stride": 1, "labels": "random"}),
    (SweepConfig, {"steps": [1]}),
    (StabilityConfig, {"num_clips": 1, "points": 1, "radius": 0.001}),
    (JudgeConfig, {"num_frames": 2, "frame_interval": 1, "image_size": 8, "epochs": 1, "batch_size": 1}),
]


@pytest.mark.parametrize(("schema", "values"), ALLOWED)
def test_the_limits_themselves_are_allowed(schema, values):
    cfg = load_config(schema, None, [f"{key}={value}" for key, value in values.items()])
    assert {key: getattr(cfg, key) for key in values} == values


def test_an_empty_number_of_workers_is_allowed():
    """It means one for each core."""
    assert load_config(EvaluateConfig, None, ["num_workers=null"]).num_workers is None


@pytest.mark.parametrize(("num_clips", "num_classes"), [(4, 5), (9, 101)])
def test_there_is_a_clip_of_each_class(num_clips, num_classes):
    cfg = load_config(MeasureConfig, None, [f"num_clips={num_clips}", f"num_classes={num_classes}"])
    with pytest.raises(UserError, match=f"num_clips: {num_clips} is less than {num_classes}, one of each class"):
        cfg.check_clips()
    load_config(MeasureConfig, None, ["num_clips=5", "num_classes=5"]).check_clips()
    load_config(MeasureConfig, None, ["num_clips=4"]).check_clips()
