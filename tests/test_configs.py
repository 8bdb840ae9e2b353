"""Options: schema, YAML, command line, the original's files, and one clear line for each mistake."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from configs import (
    INERT,
    ROOT,
    CacheOptions,
    SampleConfig,
    TrainConfig,
    UserError,
    load_config,
    parse_cache,
    require_path,
    to_yaml,
)

YAMLS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.name != "vae.yaml")


def schema_of(path: Path) -> type:
    return SampleConfig if "_sample" in path.name else TrainConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "options.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_yaml_loads_without_a_warning(path, recwarn):
    load_config(schema_of(path), path)
    assert not recwarn.list


def test_yaml_wins_over_the_schema_and_the_command_line_over_both(tmp_path):
    path = write(tmp_path, "cfg_scale: 7.0\nseed: 3\ncache: {interval: 2}")
    cfg = load_config(SampleConfig, path, ["seed=5", "cache.depth=2"])
    assert (cfg.cfg_scale, cfg.seed, cfg.num_frames) == (7.0, 5, 16)
    assert (cfg.cache.interval, cfg.cache.depth, cfg.cache.start) == (2, 2, 900)


def test_resolved_options_load_again(tmp_path):
    cfg = load_config(SampleConfig, None, ["ckpt=weights.pt", "cache.interval=3", "num_classes=7"])
    assert load_config(SampleConfig, write(tmp_path, to_yaml(cfg))) == cfg


def test_relative_paths_start_from_the_root_in_a_yaml_and_from_here_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(SampleConfig, write(tmp_path, "ckpt: ./weights.pt"), ["save_video_path=out"])
    assert cfg.ckpt == str(ROOT / "weights.pt")
    assert cfg.save_video_path == str(tmp_path / "out")
    assert cfg.pretrained_model_path == str(ROOT / "pretrained" / "Latte"), "a default is the project's"


@pytest.mark.parametrize("schema", [TrainConfig, SampleConfig])
def test_extras_1_clears_a_leftover_num_classes(tmp_path, schema):
    """Model, data set and labels look at num_classes alone."""
    assert load_config(schema, write(tmp_path, "extras: 1\nnum_classes: 101")).num_classes is None
    assert load_config(schema, write(tmp_path, "extras: 2\nnum_classes: 101")).num_classes == 101


@pytest.mark.parametrize(("text", "meant"), [("no", "no"), ("", "auto"), ("auto", "auto"), ("runs/000", "runs/000")])
def test_bare_no_of_yaml_means_no(tmp_path, text, meant):
    line = f"resume_from_checkpoint: {text}"
    assert load_config(TrainConfig, write(tmp_path, line)).resume_from_checkpoint == meant
    assert load_config(TrainConfig, None, [line.replace(": ", "=")]).resume_from_checkpoint == meant


def test_null_on_the_command_line_means_none(tmp_path):
    """An empty line of a file means the default; whoever types null means it."""
    assert load_config(SampleConfig, write(tmp_path, "pretrained_model_path:")).pretrained_model_path is not None
    assert load_config(SampleConfig, None, ["pretrained_model_path=null"]).pretrained_model_path is None
    with pytest.raises(UserError, match="command line: seed: "):
        load_config(SampleConfig, None, ["seed=null"])


ORIGINAL_TRAINING = """
dataset: "ucf101_img"
data_path: "/path/to/datasets/UCF101/videos/"
frame_data_txt: "/path/to/datasets/UCF101/train_256_list.txt"
pretrained_model_path: "/path/to/pretrained/Latte/"
results_dir: "./results_img"
pretrained:
model: LatteIMG-skip
num_frames: 16
image_size: 256
num_sampling_steps: 250
frame_interval: 3
fixed_spatial: False
attention_bias: True
learn_sigma: True
extras: 2
save_ceph: True
use_image_num: 8
learning_rate: 1e-4
ckpt_every: 10000
clip_max_norm: 0.1
start_clip_iter: 100000
local_batch_size: 4
max_train_steps: 1000000
global_seed: 3407
num_workers: 8
log_every: 50
lr_warmup_steps: 0
resume_from_checkpoint:
gradient_accumulation_steps: 1
num_classes: 101
use_compile: False
mixed_precision: False
enable_xformers_memory_efficient_attention: False
gradient_checkpointing: False
"""
ORIGINAL_SAMPLING = """
ckpt:
save_img_path: "./sample_videos/"
pretrained_model_path: "./pretrained/Latte/"
model: Latte-skip-cache
num_frames: 16
image_size: 256
frame_interval: 3
fixed_spatial: False
attention_bias: True
learn_sigma: True
extras: 2
num_classes: 101
use_compile: False
use_fp16: True
seed: 2
sample_method: 'ddim'
num_sampling_steps: 50
cfg_scale: 7.0
run_time: 12
num_sample: 2048
sample_names: [0, 1, 2]
negative_name: 101
per_proc_batch_size: 8
num_fvd_samples: 2048
"""


@pytest.mark.parametrize(("schema", "text"), [(TrainConfig, ORIGINAL_TRAINING), (SampleConfig, ORIGINAL_SAMPLING)])
def test_files_of_the_original_load_unchanged(tmp_path, schema, text):
    """Every key means what it meant, or is named in a warning as doing nothing."""
    with pytest.warns(UserWarning, match="does nothing here") as caught:
        cfg = load_config(schema, write(tmp_path, text))
    named = {str(warning.message).split(": ")[1].split()[0] for warning in caught}
    renamed = {"save_img_path", "fixed_spatial"}
    assert set(yaml.safe_load(text)) <= {f.name for f in fields(schema)} | named | renamed
    assert named <= set(INERT)
    if schema is TrainConfig:
        assert (cfg.learning_rate, cfg.mixed_precision, cfg.use_image_num) == (1e-4, "no", 8)
    else:
        assert cfg.save_video_path == str(ROOT / "sample_videos") and cfg.sample_names == [0, 1, 2]


def test_fixed_spatial_trains_the_temporal_blocks(tmp_path):
    assert load_config(TrainConfig, write(tmp_path, "fixed_spatial: True")).train_only == "temporal"


@pytest.mark.parametrize(
    ("yaml_text", "overrides", "message"),
    [
        ("cfg_scal: 7", [], "unknown key cfg_scal; did you mean cfg_scale"),
        ("", ["sede=1"], "unknown key sede; did you mean seed"),
        ("", ["cache.intervall=2"], "Did you mean: 'interval'"),
        ("num_frames: many", [], "num_frames: Value 'many'"),
        ("", ["num_frames"], "num_frames: expected key=value"),
        ("model: [", [], "is not valid YAML"),
        ("- a list", [], "holds no `key: value` lines"),
    ],
)
def test_mistakes_are_one_line_that_says_what_would_be_right(tmp_path, yaml_text, overrides, message):
    path = write(tmp_path, yaml_text or "seed: 1")
    with pytest.raises(UserError, match=message) as caught:
        load_config(SampleConfig, path, overrides)
    assert "\n" not in str(caught.value)


def test_missing_file_suggests_the_nearest(tmp_path):
    write(tmp_path, "seed: 1")
    with pytest.raises(UserError, match=r"no configuration file .*optons.yaml; did you mean .*options.yaml"):
        load_config(SampleConfig, tmp_path / "optons.yaml")


@pytest.mark.parametrize(
    ("value", "message"),
    [("/path/to/UCF101", "data_path still holds the placeholder"), ("/nowhere", "data_path: nothing at /nowhere")],
)
def test_path_that_was_not_filled_in_is_one_line_naming_the_key(value, message):
    with pytest.raises(UserError, match=message):
        require_path(load_config(TrainConfig, None, [f"data_path={value}"]), "data_path")
    with pytest.raises(UserError, match="data_path is not set"):
        require_path(load_config(TrainConfig), "data_path")


@pytest.mark.parametrize(
    ("text", "cache"),
    [
        ("N2", CacheOptions(interval=2)),
        ("N3-800-100", CacheOptions(interval=3, start=800, stop=100)),
        ("N4-900-50-b2", CacheOptions(interval=4, depth=2)),
        ("N4-b2", CacheOptions(interval=4, depth=2)),
        ("N4-o1", CacheOptions(interval=4, order=1)),
        ("N4-900-50-b2-o2", CacheOptions(interval=4, depth=2, order=2)),
    ],
)
def test_cache_on_the_command_line(text, cache):
    assert parse_cache(text) == cache


@pytest.mark.parametrize("text", ["2", "N", "N2-900", "N2-b", "N2-o", "N2-o1-b1", "n2"])
def test_cache_that_makes_no_sense_shows_the_form(text):
    with pytest.raises(UserError, match="expected N<interval>"):
        parse_cache(text)
