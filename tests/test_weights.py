"""Weights that say which options made them, and the Python quick start: load and generate."""

import base64
import json
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from configs import ROOT, CacheOptions, SampleConfig, TrainConfig, UserError, load_config, to_yaml
from models import HINTS, MADE_OF, get_models, made_of
from models.checkpoint import load_options, load_state_dict, save_checkpoint, save_weights, weights_hash
from models.latte import Latte
from sample import sample
from sample.media import Inline
from sample.options import DEMO, load_sampling
from sample.pipeline import Pipeline, generate, load
from sample.plans import make_plan, parse_plan
from sample.recipes import Recipe, Step, fingerprint, save_recipe
from tools import export_checkpoint
from tools.heldout_loss import HeldoutConfig, load_model

CPU = torch.device("cpu")
NAMES = ["cup", "Globe", "tree"]


@pytest.fixture(scope="module")
def mine(tiny, tmp_path_factory) -> Path:
    """A .pt as train.py writes it, of a model with prediction v: its EMA, its other weights and its options."""
    folder = tmp_path_factory.mktemp("mine")
    cfg = replace(load_config(SampleConfig, tiny), prediction="v", noise_schedule="squaredcos_cap_v2", dataset="sky")
    weights = load_state_dict(tiny.parent / "skip.safetensors")
    other = {name: value * 1.01 for name, value in weights.items()}
    options = made_of(cfg, NAMES, step=30, ema_decay=0.5)
    save_checkpoint(folder / "0000030.pt", ema=weights, model=other, options=options)
    return folder / "0000030.pt"


@pytest.fixture(scope="module")
def pipe(mine) -> Pipeline:
    return load(mine, CPU, sample_method="ddim", num_sampling_steps=6, precision="fp32")


def export(monkeypatch, *argv: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["export_checkpoint.py", *map(str, argv)])
    export_checkpoint.main()


# ---------------------------------------------------------------------------------------------------------------------
# The options in a file
# ---------------------------------------------------------------------------------------------------------------------


def test_weights_carry_every_option_of_model_and_process(mine):
    """Dimensions that the name of the model stands for are spelled out; `weights_only` loading reads the file."""
    options = torch.load(mine, weights_only=True)["options"]
    assert options.keys() == {*MADE_OF, *HINTS, "latte", "step", "ema_decay"}
    assert {"num_heads", "prediction", "noise_schedule", "diffusion_steps", "learn_sigma", "image_size"} <= {*MADE_OF}
    assert (options["num_heads"], options["num_skips"], options["patch_size"]) == (2, 2, 2)
    assert (options["prediction"], options["class_names"], options["step"]) == ("v", NAMES, 30)


def test_an_export_keeps_options_and_weights(mine, tmp_path, monkeypatch):
    export(monkeypatch, mine, tmp_path / "a.safetensors")
    assert load_options(tmp_path / "a.safetensors") == load_options(mine)
    assert weights_hash(tmp_path / "a.safetensors") == weights_hash(mine) != weights_hash(mine, "model")


def test_an_exported_folder_is_what_from_pretrained_reads(mine, tmp_path, monkeypatch):
    """save_pretrained keeps the options, too."""
    export(monkeypatch, mine, tmp_path / "hub")
    latte = Latte.from_pretrained(tmp_path / "hub")
    torch.testing.assert_close(dict(latte.state_dict()), load_state_dict(mine), rtol=0, atol=0)
    latte.save_pretrained(tmp_path / "again")
    vae = {"pretrained_model_path": str(tmp_path / "again")}  # a copy, which comes with the weights
    assert load_options(tmp_path / "again/model.safetensors") == load_options(mine) | vae
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "hub/config.json").read_text()
    )


def test_a_folder_of_weights_without_options_cannot_be_exported(tiny, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not say which options made it"):
        export(monkeypatch, tiny.parent / "skip.safetensors", tmp_path / "hub")


def test_the_demo_has_the_layout_of_from_pretrained_and_its_options():
    """Its weights are stored once, bit for bit those of before; its YAML agrees with what they say."""
    folder = ROOT / "pretrained/demo"
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    digest = "d010727591aa645cb7ba5d8703de4318c7212d5877434b0d37f39f51354ea7f7"
    assert weights_hash(folder / "model.safetensors") == digest
    options = load_options(folder / "model.safetensors")
    alone, by_file = load_sampling(SampleConfig, None, [f"ckpt={folder}"]), load_sampling(SampleConfig, DEMO)
    assert {key: getattr(alone, key) for key in MADE_OF} == {key: getattr(by_file, key) for key in MADE_OF}
    assert alone.pretrained_model_path == by_file.pretrained_model_path == str(folder) and options["step"] == 9400
    assert alone.class_names[3] == "Cup" and alone.ckpt == by_file.ckpt
    latte = Latte.from_pretrained(folder)
    assert latte.num_skips == 5 and latte.options == options


# ---------------------------------------------------------------------------------------------------------------------
# Options of a run beside those of the weights
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_alone_is_enough(mine, tiny):
    """No file of options is read: all that the weights do not say is the default of sampling."""
    cfg, default = load_sampling(SampleConfig, DEMO, [f"ckpt={mine}"]), SampleConfig()
    expected = {key: value for key, value in load_options(mine).items() if key in MADE_OF}
    assert {key: getattr(cfg, key) for key in expected} == expected
    assert cfg.pretrained_model_path == str(tiny.parent) and cfg.class_names == NAMES
    own = {*MADE_OF, *HINTS, "ckpt"}
    rest = [each.name for each in fields(cfg) if each.name not in own and not each.metadata.get("path")]
    assert all(getattr(cfg, key) == getattr(default, key) for key in rest)


def test_the_file_decides_what_the_weights_do_not_say(tiny, tmp_path):
    """Published and original files hold weights alone."""
    assert asdict(load_sampling(SampleConfig, tiny)) == asdict(load_config(SampleConfig, tiny))
    with pytest.raises(UserError, match=r"skip\.safetensors does not say which options made it: give its YAML"):
        load_sampling(SampleConfig, DEMO, [f"ckpt={tiny.parent}/skip.safetensors"])


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("prediction: x0", [], "prediction=x0 ({yaml}), not v"),
        ("", ["prediction=eps"], "prediction=eps (command line), not v"),
        ("prediction: v", ["prediction=eps"], "prediction=eps (command line), not v"),
        (
            "prediction: eps",
            ["noise_schedule=linear"],
            "noise_schedule=linear (command line), not squaredcos_cap_v2; ",
        ),
        ("num_heads: 4", [], "num_heads=4 ({yaml}), not 2"),
        ("model: Latte", [], "num_skips=0 ({yaml}), not 2"),
        ("", ["model=Latte-B/2-skip"], "hidden_size=768 (command line), not 16"),
        ("", ["model=Latte-XL/2"], "hidden_size=1152 (command line), not 16"),
        ("extras: 1", [], "num_classes=None ({yaml}), not 3"),
        ("", ["num_classes=null"], "num_classes=None (command line), not 3"),
        ("", ["image_size=64"], "image_size=64 (command line), not 32"),
        ("learn_sigma: False", [], "learn_sigma=False ({yaml}), not True"),
        ("data_path: {folder}", [], "has other classes than"),
        ("", ["data_path={folder}"], "label 1 was Globe, is ball"),
    ],
)
def test_options_that_contradict_the_weights_are_named_with_both_values(mine, tmp_path, text, overrides, message):
    for name in ("ball", "Globe", "tree"):
        (tmp_path / "clips" / name).mkdir(parents=True)
    path, facts = tmp_path / "my.yaml", {"folder": tmp_path / "clips", "yaml": tmp_path / "my.yaml"}
    path.write_text(f"seed: 1\n{text.format(**facts)}")
    with pytest.raises(UserError) as error:
        load_sampling(SampleConfig, path, [f"ckpt={mine}", *(item.format(**facts) for item in overrides)])
    assert message.format(**facts) in str(error.value) and str(mine) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("overrides", [["prediction=v"], ["model=Latte-XL/2-skip-cache-3"], ["num_heads=2"], ["vae=x"]])
def test_options_that_agree_with_the_weights_may_be_given(mine, overrides):
    cfg = load_sampling(SampleConfig, DEMO, [f"ckpt={mine}", *overrides])
    assert cfg.prediction == "v" and cfg.hidden_size == 16
    assert make_plan(cfg).name == ("N3" if "cache" in overrides[0] else "uncached")


def test_a_flow_may_be_sampled_with_another_shift(tiny, tmp_path):
    """On the command line as in `with_options`; without one it is that of the training."""
    changes = {"process": "flow", "prediction": "v", "learn_sigma": False, "time_shift": 2.0}
    options = made_of(replace(load_config(SampleConfig, tiny), **changes), NAMES)
    save_checkpoint(tmp_path / "flow.pt", ema=load_state_dict(tiny.parent / "skip.safetensors"), options=options)
    shifts = [load_sampling(SampleConfig, DEMO, [f"ckpt={tmp_path}/flow.pt", *more]) for more in ([], ["time_shift=3"])]
    assert [cfg.time_shift for cfg in shifts] == [2, 3]


def test_a_folder_of_weights_may_be_sampled_by_another_name_of_its_model(tiny, tmp_path):
    cfg = replace(load_config(SampleConfig, tiny), depth=12, hidden_size=384, num_heads=6)
    save_weights(tmp_path / "model.safetensors", {"w": torch.ones(1)}, made_of(cfg, NAMES))
    cfg = load_sampling(SampleConfig, DEMO, [f"ckpt={tmp_path}", "model=Latte-S/2-skip"])
    assert (cfg.ckpt, cfg.model) == (str(tmp_path / "model.safetensors"), "Latte-S/2-skip")


def test_the_options_of_a_run_sample_its_checkpoints(mine, tiny, tmp_path, recwarn):
    """Keys of training alone are passed over in silence; unknown ones are errors."""
    shared = {each.name for each in fields(SampleConfig)} & {each.name for each in fields(TrainConfig)}
    cfg = load_sampling(SampleConfig, None, [f"ckpt={mine}"])
    run = TrainConfig(**{key: getattr(cfg, key) for key in shared}, frame_interval=2)
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    again = load_sampling(SampleConfig, tmp_path / "config.yaml", [f"ckpt={mine}"])
    assert replace(again, sample_names=cfg.sample_names) == cfg and not recwarn.list
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("frame_intervall: 3\n")
    with pytest.raises(UserError, match="unknown key frame_intervall"):
        load_sampling(SampleConfig, tmp_path / "config.yaml", [f"ckpt={mine}"])
    with pytest.raises(UserError, match="unknown key learning_rate"):
        load_sampling(SampleConfig, None, [f"ckpt={mine}", "learning_rate=1"])


def test_options_set_in_python_are_checked_against_the_weights(mine, tiny):
    """Also where several checkpoints share options, as in tools/heldout_loss.py."""
    message = "prediction=eps, not v"
    with pytest.raises(UserError, match=message):
        load(replace(load_sampling(SampleConfig, tiny), ckpt=str(mine), noise_schedule="squaredcos_cap_v2"), CPU)
    cfg = load_config(SampleConfig, tiny)
    shared = {each.name: getattr(cfg, each.name) for each in fields(SampleConfig) if hasattr(HeldoutConfig, each.name)}
    with pytest.raises(UserError, match=message):
        load_model(HeldoutConfig(**shared), str(mine), CPU)


def test_sample_by_a_checkpoint_alone(mine, tmp_path, monkeypatch):
    argv = ["--ckpt", str(mine), "--cache", "0,3", "num_sampling_steps=4", "weights=model", "precision=fp32"]
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv, "--classes", "globe", f"save_video_path={tmp_path}"])
    sample.main()
    assert (tmp_path / "0,3/000000_Globe.mp4").is_file()
    config = json.loads((tmp_path / "sample.json").read_text())["config"]
    assert (config["prediction"], config["weights"], config["sample_method"]) == ("v", "model", "ddpm")


def test_which_weights_of_a_file_are_sampled(mine, tiny, tmp_path):
    """The hash that a recipe checks is that of the weights sampled."""
    averaged, trained = (load(mine, CPU, weights=weights, precision="fp32") for weights in ("ema", "model"))
    assert torch.equal(trained.model.pos_embed, averaged.model.pos_embed * 1.01)
    assert fingerprint(trained.cfg)["checkpoint"] == weights_hash(mine, "model")
    for name, content in (("ema", {"ema": load_state_dict(mine)}), ("bare", load_state_dict(mine))):
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=r"weights: .* has no `model`, only .*: use ema"):
            load_state_dict(tmp_path / f"{name}.pt", "model")


# ---------------------------------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------------------------------


def test_classes_and_plans_may_be_given_in_every_form(pipe, tmp_path):
    """Names in any case, indices and numpy's; plans as text, as numbers of full steps, as a bool a step, as a file."""
    expected = generate(pipe, [3], [1], make_plan(pipe.cfg, parse_plan("0,2,4")))
    recipe = Recipe("r", "ddim", 1, (Step(999),), {"num_sampling_steps": 6}, fingerprint(pipe.cfg))
    steps = zip(make_plan(pipe.cfg).timesteps, [(), (1.0,)] * 3, strict=True)
    save_recipe(tmp_path / "r.json", replace(recipe, steps=tuple(Step(t, weights) for t, weights in steps)))
    plans = ["0,2,4", "N2-900-0", [0, 2, 4], (True, False) * 3, tmp_path / "r.json", str(tmp_path / "r.json")]
    for label, plan in zip(["GLOBE", "Globe", 1, "1", torch.tensor(1).numpy(), 1], plans, strict=True):
        assert torch.equal(generate(pipe, [3], [label], plan), expected)


@pytest.mark.parametrize("cache", ["N2-o1", CacheOptions(interval=2, order=1), {"interval": 2, "order": 1}])
def test_a_plan_may_be_given_in_every_form_where_a_pipeline_is_loaded(pipe, mine, cache):
    assert load(mine, CPU, cache=cache).plan.name == "N2-o1"
    if not isinstance(cache, dict):
        assert load(pipe.cfg, CPU, cache=cache).plan.name == "N2-o1"
    with pytest.raises(UserError, match="eta: ddpm ignores eta"):
        load(pipe.cfg, CPU, sample_method="ddpm", eta=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["Glob"]}, "class 'Glob' is unknown; did you mean Globe?"),
        ({"labels": [99]}, "class 99: indices go from 0 to 2"),
        ({"labels": [3]}, "class 3: indices go from 0 to 2"),
        ({"labels": [-1]}, "class '-1'"),
        ({"labels": [1.0]}, "class '1.0'"),
        ({"labels": [0, 1]}, "labels: 2 for 1 seeds"),
        ({"labels": None}, "labels: give one a seed"),
        ({"seeds": []}, "give a list of integers"),
        ({"seeds": [2**64]}, "integers of 64 bits"),
        ({"seeds": [-(2**63) - 1]}, "integers of 64 bits"),
        ({"plan": "4"}, "expected N<interval>"),
        ({"plan": "N2-b9"}, "cache.depth: 9 is outside 1 ... 2"),
        ({"plan": [1, 2]}, "must begin with 0"),
        ({"plan": [0, 6]}, "6 is no step of 6"),
        ({"plan": [True] * 5}, "plan: 5 steps, but the run has 6"),
        ({"plan": [True] * 7}, "plan: 7 steps, but the run has 6"),
        ({"plan": [False] * 6}, "must begin with 0"),
        ({"plan": []}, "must begin with 0"),
        ({"plan": "nowhere.json"}, "recipe: nothing at nowhere.json"),
        ({"plan": ROOT / "pretrained/demo/recipe-43.json"}, "was made for checkpoint="),
    ],
)
def test_mistakes_in_python_are_those_of_the_command_line(pipe, arguments, message):
    with pytest.raises(UserError) as error:
        generate(pipe, **{"seeds": [0], "labels": [0]} | arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere.pt", {}, "ckpt: nothing at"),
        ("", {}, "ckpt is not set"),
        ("{tiny}/skip.safetensors", {}, "does not say which options made it"),
        ("nowhere.yaml", {}, "no configuration file nowhere.yaml"),
        ("{mine}", {"sede": 1}, "unknown key sede; did you mean seed?"),
        ("{mine}", {"cache": "N"}, "expected N<interval>"),
        ("{mine}", {"cfg_scale": "four"}, "cfg_scale"),
        ("{mine}", {"prediction": "eps"}, "prediction=eps (command line), not v"),
        ("{mine}", {"vae": "other"}, "no VAE in"),
    ],
)
def test_mistakes_in_loading_are_those_of_the_command_line(mine, tiny, tmp_path, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load(source.format(mine=mine, tiny=tiny.parent), CPU, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_unconditional_model_takes_no_labels(tiny, tmp_path):
    cfg = replace(load_config(SampleConfig, tiny), num_classes=None, cfg_scale=1.0, num_sampling_steps=2)
    latte = get_models(SimpleNamespace(**asdict(cfg)))
    save_weights(tmp_path / "a.safetensors", latte.state_dict(), made_of(cfg, None))
    pipe = load(tmp_path / "a.safetensors", CPU, num_sampling_steps=2)
    assert generate(pipe, [0]).shape == (1, 4, 3, 32, 32)
    with pytest.raises(UserError, match="this model has no classes"):
        generate(pipe, [0], [0])


def test_a_notebook_shows_videos():
    shown = Inline(torch.zeros(2, 4, 3, 16, 16), fps=4)
    html = shown._repr_html_()
    assert html.startswith("<video ") and base64.b64decode(html.split("base64,")[1].split('"')[0]) == shown.mp4
    assert shown.mp4[4:8] == b"ftyp" and Inline(torch.zeros(4, 3, 16, 16)).mp4[4:8] == b"ftyp"


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ema": {}, "model": {"w": torch.ones(2)}}, "its `ema` is empty, its `model` is not; use weights=model"),
        ({"ema": {}, "model": {}}, "holds no weights"),
        ({}, "holds no weights: expected `ema`, `model` or tensors at the top, found nothing"),
        ({"w": torch.ones(2, dtype=torch.int8)}, "w is int8, strided; weights are dense"),
        ({"w": torch.ones(2, dtype=torch.bool)}, "w is bool, strided"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "w is complex64, strided"),
        ({"w": torch.eye(2).to_sparse()}, "w is float32, sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, "w is without data (meta)"),
        ({0: torch.ones(2)}, "the key 0 is no name of a weight"),
        ({"model": {1: torch.ones(2)}}, "the key 1 is no name of a weight"),
        ({"model": {"w": [1.0]}}, "found the keys w"),
        ([torch.ones(2)], "found a <class 'list'>"),
        (torch.ones(2), "found a <class 'torch.Tensor'>"),
    ],
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_without_usable_weights_is_one_line(tmp_path, content, message, name):
    torch.save(content, tmp_path / name)  # the suffix does not tell the format
    with pytest.raises(UserError) as error:
        load_state_dict(tmp_path / name)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_safetensors_of_other_types_are_refused_under_any_name(tmp_path, dtype, name):
    save_file({"w": torch.ones(2, dtype=dtype)}, tmp_path / name)
    with pytest.raises(UserError, match=f"w is {str(dtype)[6:]}, strided"):
        load_state_dict(tmp_path / name)


def test_damaged_options_are_one_line(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", metadata={"options": "{"})
    with pytest.raises(UserError, match="truncated or damaged"):
        load_options(tmp_path / "a.safetensors")
