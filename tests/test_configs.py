"""Options: schema, YAML, command line, the original's files, and one clear line for each mistake."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from configs import (
    ROOT,
    CacheOptions,
    SampleConfig,
    TrainConfig,
    UserError,
    load_config,
    option,
    require_path,
    to_yaml,
)
from configs.files import check_record, differences
from configs.original import INERT
from configs.tables import markdown_table
from datasets import SOURCES
from datasets.readers import READERS
from diffusion import PREDICTIONS, PROCESSES
from diffusion.sampling import SAMPLERS
from diffusion.schedule import NOISE_SCHEDULES
from models.hardware import DTYPES
from sample.plans import parse_plan, plan_name, plan_text

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
        ("", ["cache.intervall=2"], "command line: unknown key cache.intervall; did you mean interval"),
        ("num_frames: many", [], "options.yaml: num_frames: 'many' is not a number"),
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
        ("0,1,4,9", CacheOptions(full_steps=[0, 1, 4, 9])),
        ("0-b2-o1", CacheOptions(full_steps=[0], depth=2, order=1)),
        ("0,3", CacheOptions(full_steps=[0, 3], interval=7, start=800, stop=100)),  # which the list replaces
    ],
)
def test_cache_on_the_command_line(text, cache):
    assert parse_plan(text) == cache == parse_plan(plan_name(cache)) and hash(parse_plan(text)) == hash(cache)


def test_a_long_list_of_full_steps_has_a_short_name_of_its_own():
    lists = [list(range(0, 50, 2)), [*range(0, 48, 2), 49]]
    names = [plan_name(CacheOptions(full_steps=steps)) for steps in lists]
    assert all(name.startswith("25full-") and len(name) == 15 for name in names) and names[0] != names[1]
    assert all(parse_plan(plan_text(CacheOptions(full_steps=steps))).full_steps == steps for steps in lists)


def test_the_interval_on_the_command_line_replaces_the_list_in_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("cache: {full_steps: [0, 1, 4], depth: 2}")
    assert load_config(SampleConfig, tmp_path / "a.yaml").cache == CacheOptions(full_steps=[0, 1, 4], depth=2)
    changed = load_config(SampleConfig, tmp_path / "a.yaml", ["cache.interval=3"]).cache
    assert changed == CacheOptions(interval=3, depth=2)
    changed = load_config(SampleConfig, tmp_path / "a.yaml", ["cache.full_steps=[0,2]"]).cache
    assert changed == CacheOptions(full_steps=[0, 2], depth=2)


@pytest.mark.parametrize("text", ["2", "N", "N2-900", "N2-b", "N2-o", "N2-o1-b1", "n2", "1,4", "0,", "0,-1", "0, 1"])
def test_cache_that_makes_no_sense_shows_the_form(text):
    with pytest.raises(UserError, match="expected N<interval>"):
        parse_plan(text)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("num_frames=0", "num_frames: 0 is less than 1"),
        ("per_proc_batch_size=0", "per_proc_batch_size: 0 is less than 1"),
        ("cache.interval=0", "cache.interval: 0 is less than 1"),
        ("cache.order=4", "cache.order: 4 is outside 0 ... 3"),
        ("eta=1.5", "eta: 1.5 is outside 0 ... 1"),
        ("eta=-0.1", "eta: -0.1 is outside 0 ... 1"),
        ("cfg_scale=nan", "cfg_scale: nan is not a finite number"),
        ("cfg_scale=inf", "cfg_scale: inf is not a finite number"),
        ("mlp_ratio=0", "mlp_ratio: 0.0 is not above 0"),
        ("sample_method=ddmi", "sample_method: 'ddmi' is unknown; valid: ddpm, ddim, euler, heun, dpmsolver++, unipc"),
        ("precision=fp8", "precision: 'fp8' is unknown; valid: auto, fp32, bf16, fp16"),
    ],
)
def test_a_value_outside_its_option_s_limits_is_one_line(item, message):
    with pytest.raises(UserError) as caught:
        load_config(SampleConfig, None, [item])
    assert str(caught.value) == f"command line: {message}"


def test_limits_hold_for_each_entry_of_a_list_and_not_for_none():
    @dataclass
    class Options:
        steps: list[int] | None = option(None, "steps", least=1)
        share: float = option(0.5, "share", most=1)

    assert load_config(Options).steps is None
    assert load_config(Options, None, ["steps=[3,1]"]).steps == [3, 1]
    with pytest.raises(UserError, match="steps: 0 is less than 1"):
        load_config(Options, None, ["steps=[3,0]"])
    with pytest.raises(UserError, match=r"share: 2\.0 is more than 1"):
        load_config(Options, None, ["share=2"])


def choices_of(schema: type, key: str) -> set[str]:
    return set(next(each for each in fields(schema) if each.name == key).metadata["choices"])


def test_choices_are_those_of_the_code_that_reads_them():
    """configs does not import torch, so it names the choices itself."""
    assert choices_of(SampleConfig, "sample_method") == set(SAMPLERS)
    assert choices_of(SampleConfig, "precision") == {"auto", *DTYPES}
    assert choices_of(SampleConfig, "noise_schedule") == set(NOISE_SCHEDULES)
    assert choices_of(SampleConfig, "prediction") == set(PREDICTIONS)
    assert choices_of(SampleConfig, "process") == set(PROCESSES)
    assert choices_of(TrainConfig, "video_reader") == set(READERS)
    help_of_dataset = next(each for each in fields(TrainConfig) if each.name == "dataset").metadata["help"]
    assert all(name.removesuffix("_img") in help_of_dataset for name in SOURCES)


@pytest.mark.parametrize("schema", [SampleConfig, TrainConfig])
def test_every_option_says_what_it_does(schema):
    assert [each.name for each in fields(schema) if each.name != "cache" and not each.metadata.get("help")] == []


def test_differences_name_nested_settings_and_both_values():
    before = {"seed": 0, "cache": {"interval": 2, "order": 0}, "fps": 8, "old": 1}
    now = {"seed": 0, "cache": {"interval": 3, "order": 0}, "fps": 12}
    assert differences(before, now) == "cache.interval=2, not 3; fps=8, not 12"
    assert differences(before, now, ignore={"fps"}) == "cache.interval=2, not 3"
    assert differences(before, before) == ""


def test_a_record_of_other_settings_names_the_option_and_the_difference(tmp_path):
    path = tmp_path / "made" / "record.json"
    assert not check_record(path, {"size": 64}, "output")
    path.parent.mkdir()
    path.write_text(json.dumps({"size": 64, "more": 1}))
    assert check_record(path, {"size": 64}, "output")
    with pytest.raises(UserError, match=rf"output: {path.parent} was made with size=64, not 32; choose another folder"):
        check_record(path, {"size": 32}, "output")


def test_a_markdown_table_aligns_its_cells_and_leaves_out_empty_columns():
    rows = [{"plan": "uncached", "PSNR": "", "SSIM": ""}, {"plan": "N2", "PSNR": "38.1 dB", "SSIM": ""}]
    assert markdown_table(rows).splitlines() == [
        "| plan     |    PSNR |",
        "| :------- | ------: |",
        "| uncached |       – |",
        "| N2       | 38.1 dB |",
    ]


def test_a_path_that_is_not_utf8_is_one_line():
    """No YAML file can hold it, the record of a run included."""
    path = b"/data/B\xe4r".decode("utf-8", "surrogateescape")  # as the shell hands it over
    with pytest.raises(UserError, match=r"^data_path=/data/B.*r is not UTF-8, which YAML files need: rename the file"):
        load_config(TrainConfig, None, [f"data_path={path}"])
