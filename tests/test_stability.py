"""tools/stability.py: watching changes nothing, equal features have similarity 1, and only a copy's weights move."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs import CacheOptions, SampleConfig, UserError, load_config
from models import get_models
from models.latte import Latte
from sample.pipeline import Pipeline, load, resolve, sample_latents, with_options
from sample.plans import UNCACHED, Plan, make_plan
from tests.conftest import save_random_weights
from tools import stability
from tools.stability import AGES, STILL, Watch, compare_steps, compare_weights, random_direction, run_layers, similarity

CPU = torch.device("cpu")
N4 = CacheOptions(interval=4)


@pytest.fixture(scope="module")
def pipe(tiny) -> Pipeline:
    return load(resolve(load_config(SampleConfig, tiny), CPU), CPU)


@pytest.fixture(scope="module")
def twin(tiny, tmp_path_factory) -> Path:
    """A checkpoint of the tiny model's Latte."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("twin") / "latte.safetensors"
    save_random_weights(get_models(load_config(SampleConfig, tiny, ["num_skips=0"])), path)
    return path


def make_plans(pipe: Pipeline) -> tuple[Plan, Plan]:
    """Uncached, and cached at N = 4."""
    return make_plan(pipe.cfg, UNCACHED), make_plan(pipe.cfg, N4)


def step(N: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 4, 4, 4, 4, generator=generator), torch.tensor([700] * N), torch.tensor([0, 2, 3, 3][:N])


def analyse(monkeypatch, tiny: Path, output: Path, *options: str) -> dict:
    """The record of the program, run with small settings."""
    small = ["--config", str(tiny), "num_clips=3", "points=1", f"output={output}"]
    monkeypatch.setattr(sys, "argv", ["stability.py", *small, *options])
    stability.main()
    return json.loads(
        (output / "stability.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )


@pytest.mark.parametrize("num_skips", [0, 1, 2])
@torch.no_grad()
def test_layer_by_layer_equals_forward_bit_for_bit(tiny, num_skips):
    """And outputs are what `run` returns; updates lead to them from the layers' inputs, where no skip is merged."""
    model = get_models(load_config(SampleConfig, tiny, [f"num_skips={num_skips}"])).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, y = step()
    out, outputs, updates = run_layers(model, x, t, y)
    assert torch.equal(out, model(x, t, y))
    h, c = model.embed(x, t, y)
    skips = []
    for i in range(model.num_layers):
        before, h = h, model.run([i], h, c, skips)
        assert torch.equal(outputs[i], h)
        assert torch.equal(updates[i], h - before) == (i < model.num_layers - num_skips)


def test_similarity_is_the_cosine_over_the_width_of_each_token():
    a = torch.tensor([[[[1.0, 0.0], [3.0, 4.0]]]])  # one frame of two tokens
    b = torch.tensor([[[[0.0, 2.0], [6.0, 8.0]]]])
    assert similarity(a, b).tolist() == [0.5]  # right angle, same direction
    a = torch.randn(2, 3, 5, 7)
    assert similarity(a, a).tolist() == [1, 1]
    torch.testing.assert_close(similarity(a, -a), torch.tensor([-1.0, -1.0]).double())


@torch.no_grad()
def test_identical_steps_have_similarity_1_and_rows_without_label_do_not_count(pipe):
    plan = replace(make_plan(pipe.cfg, N4), weights=((), (1.0,), (1.0,)))
    watch = Watch(pipe.model, 2, plan, kept=[1])
    x, t, y = step(4)
    watch(x, t, y)
    watch(torch.cat([x[:2], torch.zeros_like(x[2:])]), t, y)
    assert torch.equal(watch.neighbours[0], torch.ones(2 * pipe.model.num_layers, 2))
    assert watch.ages[1][0].tolist() == watch.reused[1].tolist() == [1, 1]
    assert watch.ages[1][1:].isnan().all() and watch.reused[0].isnan().all()
    watch(x, t // 2, y)
    assert (watch.neighbours[1] < 1).all() and torch.equal(watch.ages[2][0], watch.ages[2][1])
    assert [len(each) for each in watch.inputs[0]] == [2, 2, 2]


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_watching_a_run_does_not_change_it(pipe, method):
    pipe = with_options(pipe, sample_method=method)
    uncached, plan = make_plans(pipe)
    watch = Watch(pipe.model, 2, plan, [])
    assert torch.equal(
        sample_latents(replace(pipe, uncached=watch), [3, 4], [0, 1], uncached),
        sample_latents(pipe, [3, 4], [0, 1], uncached),
    )
    similarities = []
    watched = stability.watch_cached_run(pipe, [3, 4], [0, 1], plan, lambda: similarities.append(0))
    assert len(watched) == len(similarities) == len(plan.full)
    assert tuple(bool(each.isnan().all()) for each in watched) == plan.full


def test_similarities_of_a_run_agree_with_each_other(pipe):
    """Two batches or one, age and plan, deep feature and layer: ways to the same number."""
    _, plan = make_plans(pipe)
    found, inputs = compare_steps(pipe, "", [0, 1, 2], plan, [1, 3])
    assert plan.full == (True, False, False, False, True, False)
    assert len(found["outputs"]) == len(found["updates"]) == pipe.model.num_layers
    ages = found["ages"]
    assert ages[0][1:] == pytest.approx(found["outputs"][-2])  # depth 1: the last layer but one
    assert found["reused"] == pytest.approx([None, ages[0][1], ages[1][2], ages[2][3], None, ages[0][5]])
    assert len(ages) == AGES and [row.count(None) for row in ages] == [1, 2, 3, 4, 5]
    cached = found["reused_cached"]
    assert cached[1] == pytest.approx(found["reused"][1], abs=1e-6)  # the runs part after the first cached step
    assert cached[3] != pytest.approx(found["reused"][3], abs=1e-6)
    one_batch = replace(pipe, cfg=replace(pipe.cfg, per_proc_batch_size=3))
    again, _ = compare_steps(one_batch, "", [0, 1, 2], plan, [1, 3])
    assert torch.tensor(again["updates"]).allclose(torch.tensor(found["updates"]), atol=1e-5)
    assert [len(x) for x, _, _ in inputs] == [2, 2, 1, 1] and [int(t[0]) for _, t, _ in inputs] == [799, 400] * 2


def test_directions_have_filters_as_long_as_the_models(pipe):
    """Biases, norms and the fixed tables are left out; all other weights are in, the skips' too."""
    direction = random_direction(pipe.model, STILL["landscape"], torch.Generator().manual_seed(0))
    assert {name for name, weight in pipe.model.named_parameters() if name not in direction} == {
        name
        for name, weight in pipe.model.named_parameters()
        if name.endswith(".bias") or name.startswith("skip_norms") or name in ("pos_embed", "temp_embed")
    }
    for name, move in direction.items():
        weight = pipe.model.get_parameter(name)
        torch.testing.assert_close(move.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1))
        assert abs(torch.cosine_similarity(move.flatten(), weight.flatten(), dim=0)) < 0.5


def test_the_trunks_direction_is_that_of_a_latte(pipe, twin):
    """Only the skips' weights stay, and of one seed all others get the noise that they get in a model without skips."""
    latte = load(replace(pipe.cfg, num_skips=0, ckpt=str(twin)), CPU).model
    for parameter in latte.parameters():
        parameter.fill_(1)
    ours = random_direction(pipe.model, STILL["landscape_trunk"], torch.Generator().manual_seed(0))
    theirs = random_direction(latte, STILL["landscape"], torch.Generator().manual_seed(0))
    assert ours.keys() == theirs.keys()
    for name, move in ours.items():
        similarity = torch.cosine_similarity(move.flatten(1), theirs[name].flatten(1), dim=1)
        torch.testing.assert_close(similarity, torch.ones(len(move)))


def state(model: Latte) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | {"attributes": sorted(vars(model))}


def unchanged(before: dict, model: Latte) -> bool:
    after = state(model)
    return after.pop("attributes") == before["attributes"] and all(
        torch.equal(tensor, before[name]) for name, tensor in after.items()
    )


def test_the_landscape_is_1_in_its_middle_and_falls_off(pipe):
    before = state(pipe.model)
    axis, still = 0.2 * torch.arange(-2, 3) / 2, STILL["landscape"]
    grid = compare_weights(pipe.model, "", [step(2), step(1)], 1, axis, still, seed=0)
    assert grid.shape == (3, 5, 5) and (grid[:, 2, 2] == 1).all()
    assert grid.flatten(1).argmax(1).tolist() == [12, 12, 12]
    for ray in (grid[:, 2, 2:], grid[:, 2:, 2], grid.diagonal(dim1=1, dim2=2)[:, 2:]):
        assert (ray.diff(dim=1) < 0).all()
    assert unchanged(before, pipe.model)
    assert torch.equal(grid, compare_weights(pipe.model, "", [step(2), step(1)], 1, axis, still, seed=0))
    assert not torch.equal(grid, compare_weights(pipe.model, "", [step(2), step(1)], 1, axis, still, seed=1))


@pytest.mark.parametrize("calls", [5, 200])
def test_an_aborted_run_leaves_the_model_as_it_was(monkeypatch, tiny, tmp_path, calls):
    """Stopped while it samples or among moved weights: weights and attributes are those loaded, no file is written."""
    loaded, count = [], []

    def load_and_note(cfg, device):
        loaded.append(load(cfg, device))
        loaded.append(state(loaded[0].model))
        return loaded[0]

    def dies(a, b):
        count.append(0)
        if len(count) == calls:
            raise KeyboardInterrupt
        return similarity(a, b)

    monkeypatch.setattr(stability, "load", load_and_note)
    monkeypatch.setattr(stability, "similarity", dies)
    with pytest.raises(KeyboardInterrupt):
        analyse(monkeypatch, tiny, tmp_path / "output")
    assert unchanged(loaded[1], loaded[0].model) and not (tmp_path / "output").exists()


def test_twins_side_by_side(monkeypatch, tiny, twin, tmp_path, capsys):
    """One JSON with all numbers, three pictures, a line for each number; a second run gives the same numbers."""
    models = ["--model", f"Skip={tiny.parent / 'skip.safetensors'}", "--model", f"Latte={twin}"]
    record = analyse(monkeypatch, tiny, tmp_path / "a", *models)
    printed = capsys.readouterr().out
    for draw in ("draw_neighbours", "draw_cached", "draw_landscape"):  # once will do
        monkeypatch.setattr(stability, draw, lambda *_: None)
    again = analyse(monkeypatch, tiny, tmp_path / "b", *models)
    for name, model in again["models"].items():
        assert model["config"].pop("output") == f"{tmp_path}/b"
        assert record["models"][name]["config"].pop("output") == f"{tmp_path}/a"
    assert record == again
    assert record["timesteps"] == [999, 799, 599, 400, 200, 0] and record["plan"] == "N4"
    assert record["full_steps"] == [True, False, False, False, True, False]
    assert record["window"] == [False, True, True, True, True, True]  # but 0 is the last below cache.stop
    assert record["labels"] == [0, 1, 2] and record["landscape_timesteps"] == [799, 400, 200]
    assert record["landscape_axis"] == [-0.5, 0, 0.5]
    for name, skips in (("Skip", 2), ("Latte", 0)):
        model = record["models"][name]
        assert model["config"]["num_skips"] == skips and ("reused_cached" in model) == bool(skips)
        assert (len(model["updates"]), len(model["updates"][0]), len(model["ages"][0])) == (4, 5, 6)
        assert ("landscape_trunk" in model) == bool(skips)
        for grid in (*model["landscape"].values(), *model.get("landscape_trunk", {}).values()):
            assert len(grid) == len(grid[0]) == 3 and grid[1][1] == 1
        for label, value in model["summary"].items():
            assert label in printed and f"{value:.5f}" in printed
    assert record["models"]["Skip"]["checkpoint"]["sha256"] != record["models"]["Latte"]["checkpoint"]["sha256"]
    for picture in ("neighbours", "cached", "landscape"):
        assert (tmp_path / "a" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_one_model_without_classes_or_skips_and_a_dry_run(monkeypatch, tiny, tmp_path, capsys):
    torch.manual_seed(2)
    options = ["model=Latte-XL/2", "num_classes=null", "cfg_scale=1", f"ckpt={tmp_path}/plain.safetensors"]
    save_random_weights(get_models(load_config(SampleConfig, tiny, options)), tmp_path / "plain.safetensors")
    record = analyse(monkeypatch, tiny, tmp_path / "output", "cache.start=1000", "cache.stop=700", *options)
    assert list(record["models"]) == ["Latte-XL/2"] and record["labels"] is None
    assert record["window"] == [False, True, True, False, False, False]  # so the oldest feature is 2 steps old
    labels = record["models"]["Latte-XL/2"]["summary"].keys()
    assert [label for label in labels if "age" in label] == [f"deep feature, age {age}: mean" for age in (1, 2)]
    monkeypatch.setattr(stability, "load", lambda *_: pytest.fail("a dry run loads nothing"))
    monkeypatch.setattr(sys, "argv", ["stability.py", "--config", str(tiny), "--dry-run"])
    stability.main()
    assert "# Latte-skip: 2 skips" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ckpt=/nowhere/x.pt"], "ckpt: nothing at /nowhere/x.pt"),
        (["--model", "a=/nowhere/x.pt"], "no checkpoint /nowhere/x.pt"),
        (["vae=other"], "no VAE in"),
        (["pretrained_model_path=/nowhere"], "pretrained_model_path: nothing at /nowhere"),
        (["output={tiny}"], "sample.yaml is a file, where a folder is to be written"),
    ],
)
def test_dry_run_names_what_is_missing(monkeypatch, tiny, tmp_path, options, message):
    """So does a run, before it samples."""
    monkeypatch.setattr(stability, "compare_steps", lambda *_: pytest.fail("sampling begins"))
    for flags in (["--dry-run"], []):
        with pytest.raises(UserError) as error:
            analyse(monkeypatch, tiny, tmp_path / "out", *(each.format(tiny=tiny) for each in options), *flags)
        assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_lists_hold_none_for_nan():
    """As JSON needs it; `from_lists` is the way back."""
    x = torch.tensor([[1.5, torch.nan], [torch.nan, -2.0]], dtype=torch.float64)
    assert stability.to_lists(x) == [[1.5, None], [None, -2.0]]
    assert torch.equal(torch.from_numpy(stability.from_lists(stability.to_lists(x))).nan_to_num(7), x.nan_to_num(7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "skip.pt"], "--model skip.pt: expected NAME=CKPT, each name once"),
        (["--model", "a=x.pt", "--model", "a=y.pt"], "expected NAME=CKPT, each name once"),
        (["--model", "a=/nowhere/x.pt"], "no checkpoint /nowhere/x.pt"),
        (["--model", "a={twin}", "depth=12"], "the file has depth=8, the model depth=12"),
        (["--model", "a={twin}", "cache.depth=3"], "cache.depth: 3 is outside 1 ... 2, half of the model's layers"),
        (["ckpt=null"], "ckpt is not set"),
        (["num_sampling_steps=5"], "num_sampling_steps: 5 is too few to look 5 steps back"),
        (["cache.start=0"], "runs all 6 steps in full"),
        (["cache.depth=3"], "cache.depth: 3 is outside 1 ... 2"),
        (["cache.depth=0"], "cache.depth: 0 keeps no deep feature"),
        (["num_clips=0"], "num_clips: 0 is less than 1"),
        (["points=0"], "points: 0 is less than 1"),
        (["radius=0"], "radius: 0.0 is not above 0"),
        (["radius=nan"], "radius: nan is not a finite number"),
        (["radius=inf"], "radius: inf is not a finite number"),
    ],
)
def test_every_mistake_is_one_line(monkeypatch, tiny, twin, tmp_path, options, message):
    with pytest.raises(UserError) as error:
        analyse(monkeypatch, tiny, tmp_path, *(option.format(twin=twin) for option in options))
    assert message in str(error.value) and "\n" not in str(error.value)
