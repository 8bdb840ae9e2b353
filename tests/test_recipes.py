"""Recipes: fitted solvers, the choice of their steps, recipe files, and tools/calibrate.py on a tiny model."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from configs import SampleConfig, UserError, load_config
from diffusion import create_diffusion
from diffusion.sampling import linear_multistep
from models.latte import Latte
from models.skip_cache import full_step
from sample import sample, sample_ddp
from sample.distributed import Environment
from sample.folder import labels_of
from sample.options import DEMO
from sample.pipeline import Pipeline, load, make_denoiser, resolve, sample_latents, with_options
from sample.plans import Plan, count_macs, make_plan, parse_plan, recipe_plan
from sample.recipes import FITTED, Recipe, Step, check_recipe, fingerprint, load_recipe, save_recipe
from tools import calibrate, fidelity, report
from tools.metrics.statistics import geometric_mean, ratio_interval
from tools.recipes import calibration
from tools.recipes.cached import FeatureChanges, estimate_changes, gap_errors, measure_features
from tools.recipes.candidates import build_plan, cached_share, fitted_candidate, with_moves
from tools.recipes.cost import disk_bytes, work
from tools.recipes.fit import fit_move, place_steps, prior_move, ridge, step_errors
from tools.recipes.search import (
    angles_of,
    fit_moves,
    growth_positions,
    interpolate_growth,
    measure_growth,
    relative_l2,
    x0_effect,
    x0_of_velocity,
)
from tools.recipes.trajectories import load_trajectories, record

CPU = torch.device("cpu")
ALONE = Environment(0, 1, CPU)


class GaussianVelocity:
    """The exact velocity for data of a normal distribution with mean 0.5 and deviation 0.3, prediction v."""

    def __init__(self, diffusion):
        self.alphas = torch.from_numpy(create_diffusion("", learn_sigma=False).alphas_cumprod)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        a = self.alphas[t].view(-1, *[1] * (x.ndim - 1))
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        variance = a * 0.3**2 + 1 - a
        x0 = 0.5 + alpha * 0.3**2 / variance * (x.double() - alpha * 0.5)
        return ((alpha * x - x0) / sigma).float()


@pytest.fixture(scope="module")
def pipe(tiny) -> Pipeline:
    cfg = load_config(SampleConfig, tiny, ["num_sampling_steps=10", "eta=0"])
    return load(resolve(cfg, CPU), CPU)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# The solver


def test_moves_of_the_angle_are_ddim():
    """x cos - v sin is DDIM's step, Song et al. 2021, eq. 12, written in the angle."""
    diffusion = create_diffusion("20", prediction="v", learn_sigma=False)
    angles, model = angles_of(diffusion), GaussianVelocity(diffusion)
    moves = [prior_move(angles, None, i, i + 1) for i in range(20)]
    z = torch.randn(2, 1, 4, 3, 3)
    ours = diffusion.sample_loop(model, z.shape, z, clip_denoised=False, method=partial(linear_multistep, moves))
    theirs = diffusion.ddim_sample_loop(model, z.shape, z, clip_denoised=False)
    assert relative(ours, theirs) < 1e-5


def test_second_order_moves_converge_faster_than_ddim():
    """On data with a known answer, 20 steps of the prior's moves come nearer to 1000 DDIM steps than 20 of DDIM."""
    z = torch.randn(2, 1, 4, 3, 3)
    exact = create_diffusion("", prediction="v", learn_sigma=False)
    exact = exact.ddim_sample_loop(GaussianVelocity(exact), z.shape, z, clip_denoised=False)
    diffusion = create_diffusion("20", prediction="v", learn_sigma=False)
    angles, model = angles_of(diffusion), GaussianVelocity(diffusion)
    moves = [prior_move(angles, i - 1 if i else None, i, i + 1) for i in range(20)]
    ours = diffusion.sample_loop(model, z.shape, z, clip_denoised=False, method=partial(linear_multistep, moves))
    ddim = diffusion.ddim_sample_loop(model, z.shape, z, clip_denoised=False)
    assert relative(ours, exact) < 0.5 * relative(ddim, exact)


def test_a_ridge_fit_finds_exact_weights_and_stays_at_the_prior_without_data():
    torch.manual_seed(0)
    columns = torch.randn(3, 500, dtype=torch.float64)
    weights = torch.tensor([0.7, -0.2, 1.5], dtype=torch.float64)
    stacked = torch.cat([columns, (weights @ columns)[None]])
    assert fit_move(stacked @ stacked.T, [0.0, 0.0, 0.0]) == pytest.approx(weights.tolist(), abs=1e-5)
    twice = torch.stack([columns[0], columns[0]])  # two equal columns share what the prior lacks
    found = ridge(twice @ twice.T, twice @ columns[0], torch.tensor([0.5, 0.1], dtype=torch.float64))
    assert found.tolist() == pytest.approx([0.7, 0.3], abs=1e-5)


# The choice of steps


@pytest.mark.parametrize(
    ("N", "num_steps", "max_gap"), [(6, 3, 4), (7, 4, 3), (8, 3, 8), (9, 2, 6), (5, 5, 2), (6, 1, 6)]
)
def test_dynamic_programming_equals_brute_force(N, num_steps, max_gap):
    random = np.random.default_rng(N)
    errors = np.full((N, max_gap + 1, max_gap + 1), np.inf)
    for i in range(N):
        for back in range(1, min(i, max_gap) + 1) if i else [0]:
            errors[i, back, 1 : min(max_gap, N - i) + 1] = random.random(min(max_gap, N - i))

    def cost(steps: tuple[int, ...]) -> float:
        path = (*steps, N)
        gaps = [b - a for a, b in pairwise(path)]
        if max(gaps) > max_gap:
            return math.inf
        return sum(errors[i, back, gap] ** 2 for i, back, gap in zip(steps, [0, *gaps[:-1]], gaps, strict=True))

    best = min(((0, *rest) for rest in combinations(range(1, N), num_steps - 1)), key=cost)
    assert place_steps(errors, num_steps) == list(best)


def test_too_few_steps_for_the_largest_gap_is_an_error():
    with pytest.raises(ValueError, match="no path of 2 steps with gaps of at most 3 leads from 0 to 10"):
        place_steps(np.ones((10, 4, 4)), 2)


def test_step_errors_are_those_of_the_fits(pipe, tmp_path):
    """A few entries against a least-squares fit of the vectors themselves."""
    record(pipe, tmp_path, [0, 1], every_step=True)
    runs = load_trajectories(tmp_path, [0, 1])
    x, v = (each.transpose(0, 1).flatten(1).double() for each in runs)  # (11, P), (10, P)
    vectors = torch.cat([x, v])
    errors = step_errors(vectors @ vectors.T, angles_of(pipe.diffusion), max_gap=4)
    for h, i, j in ((0, 3, 7), (2, 5, 8), (3, 6, 10)):
        columns = torch.stack([x[i], v[i], v[h], x[h]], dim=1)
        fit = columns @ torch.linalg.lstsq(columns, x[j][:, None]).solution
        assert errors[i, i - h, j - i] == pytest.approx(float((x[j][:, None] - fit).norm() / x[j].norm()), rel=0.05)
    assert np.isinf(errors[3, 0, 1]) and np.isinf(errors[9, 1, 2]) and np.isfinite(errors[0, 0, 4])


def gaussian_flow(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """The exact velocity of a flow for the data of GaussianVelocity."""
    s = (t / 1000).view(-1, *[1] * (x.ndim - 1))
    x0 = 0.5 + (1 - s) * 0.3**2 / ((1 - s) ** 2 * 0.3**2 + s**2) * (x - (1 - s) * 0.5)
    return ((x - x0) / s).float()


@pytest.mark.parametrize(("process", "method"), [("gaussian", "ddim"), ("gaussian", "ddpm"), ("flow", "ddim")])
def test_growth_of_errors_is_that_of_a_linear_model(pipe, tmp_path, process, method):
    """Where the model is linear, an error grows by the product of its steps' factors, whatever the noise on the way."""
    free = {"cfg_scale": 1.0, "prediction": "v", "learn_sigma": False}
    own = with_options(pipe, process=process, sample_method=method, **free)
    own = replace(own, uncached=gaussian_flow if process == "flow" else GaussianVelocity(own.diffusion))
    record(own, tmp_path, [0, 1], every_step=True)
    runs = load_trajectories(tmp_path, [0, 1])
    growth = measure_growth(own, runs, [0, 1], [2, 5], lambda: None)
    assert growth.shape == (2, 2)

    N, factors = own.diffusion.num_timesteps, []  # of an error, in each step
    for n in range(N):
        t, x = torch.tensor([N - 1 - n]), torch.zeros(1, 1)
        c = own.diffusion.at(t, x)
        alpha, sigma = float(c.alpha), float(c.sigma)
        by_x0 = float(x0_effect(own.diffusion, method, t, x))
        rest = float(c.posterior_xt if method == "ddpm" else c.sigma_prev / c.sigma)
        factors.append(rest + by_x0 * alpha * 0.3**2 / (alpha**2 * 0.3**2 + sigma**2))
    sizes = runs.states.flatten(2).norm(dim=2)  # (2, N + 1)
    for row, p in zip(growth, (2, 5), strict=True):
        assert row.tolist() == pytest.approx(
            (math.prod(factors[p:]) * sizes[:, p] / sizes[:, -1]).tolist(), rel=0.05
        )  # of small errors, in fp32

    filled = interpolate_growth(growth, [2, 5], 11)
    assert filled.shape == (11,) and filled[10] == 1
    assert filled[5] == pytest.approx(float(growth[1].log().mean().exp()))
    assert min(filled[2], filled[5]) <= filled[3] <= max(filled[2], filled[5])


@pytest.mark.parametrize("process", ["gaussian", "flow"])
def test_a_velocity_tells_its_x0(process):
    diffusion = create_diffusion("10", prediction="v", learn_sigma=False, process=process)
    x, x0, t = torch.randn(10, 1, 4, 3, 3), torch.randn(10, 1, 4, 3, 3), torch.arange(10)
    torch.testing.assert_close(x0_of_velocity(diffusion, x, diffusion.velocity(x, x0, t), t), x0, rtol=1e-4, atol=1e-4)


def test_growth_is_measured_at_states_that_a_stale_prediction_reaches():
    for num_steps in (3, 6, 50, 250):
        positions = growth_positions(num_steps, 6)
        assert positions == sorted(set(positions)) and positions[0] == 2 and positions[-1] < num_steps


def test_a_fit_through_every_step_repeats_the_reference(pipe, tmp_path):
    """With all steps evaluated, DDIM's own moves are among those that are fitted."""
    record(pipe, tmp_path, [0, 1, 2], every_step=True)
    candidate = fitted_candidate(pipe.cfg, "fitted", pipe.plan.timesteps, "")
    fit = fit_moves(pipe, tmp_path, [[0, 1], [2]], candidate.plan, ALONE, lambda: None)
    assert max(fit.errors) < 1e-3
    assert fit.moves[0][2:] == [0, 0, 0] and all(len(move) == 5 for move in fit.moves)


@pytest.mark.parametrize("kind", ["fitted", "fitted+cached", "fitted+unguided"])
def test_a_fitted_sampler_ends_where_its_fit_ended(pipe, tmp_path, kind):
    """The pipeline executes the plan of a fit on the same states: full, cached or unguided steps alike."""
    record(pipe, tmp_path, [0, 1], every_step=True)
    candidate = fitted_candidate(pipe.cfg, kind, pipe.plan.timesteps[::2], "")
    fit = fit_moves(pipe, tmp_path, [[0, 1]], candidate.plan, ALONE, lambda: None)
    latents = sample_latents(pipe, [0, 1], [0, 1], with_moves(candidate, fit.moves).plan)
    reference = load_trajectories(tmp_path, [0, 1]).states[:, -1]
    assert relative_l2(latents, reference).tolist() == pytest.approx(fit.errors, rel=1e-3)


# Placed full steps


@pytest.fixture(scope="module")
def changes(pipe) -> FeatureChanges:
    return measure_features(pipe, [[0, 1], [2]], 1, lambda: None)


def test_products_of_deep_features_are_those_of_a_run(pipe, changes):
    """Against the features of a model that is called step by step."""
    kept: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out, deep = full_step(pipe.model, 1, x, t, y)
        kept.append(deep.flatten().double())
        return out

    gram = torch.zeros(10, 10, dtype=torch.float64)
    for seeds in ([0, 1], [2]):
        kept.clear()
        sample_latents(replace(pipe, uncached=denoiser), seeds, [seed % 3 for seed in seeds])
        features = torch.stack(kept)  # (10, 2B F T D)
        gram += features @ features.T
    assert np.array(changes.gram) == pytest.approx(gram.numpy(), rel=1e-5)


def states_of(pipe: Pipeline, plan: Plan, seeds: list[int]) -> list[Tensor]:
    """The states of a DDIM run after each step."""
    loop = pipe.diffusion.sample_loop_progressive(
        make_denoiser(pipe, plan),
        (len(seeds), 4, 4, 4, 4),
        clip_denoised=False,
        model_kwargs={"y": torch.tensor(seeds) % 3},
        generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        method="ddim",
    )
    return [out["sample"] for out in loop]


def test_sensitivity_foretells_the_error_of_a_cached_step(pipe, changes):
    """The error that one cached step makes in the next state, to a factor of two."""
    gram, exact = np.array(changes.gram), states_of(pipe, pipe.plan, [0, 1, 2])
    for n in (2, 5, 8):
        plan = build_plan(pipe.cfg, "", "ddim", pipe.plan.timesteps, [i != n for i in range(10)])
        states = states_of(pipe, plan, [0, 1, 2])
        foretold = changes.sensitivity[n] * math.sqrt(gram[n, n] - 2 * gram[n, n - 1] + gram[n - 1, n - 1])
        assert 0.5 < relative(states[n], exact[n]) / foretold < 2


def test_errors_of_a_gap_add_up_those_of_its_forecasts(changes):
    """A few entries against forecasts written out."""
    gram, growth = np.array(changes.gram), np.linspace(3, 1, 11)
    vectors = np.linalg.cholesky(gram + 1e-9 * np.eye(10) * gram.max())  # rows with these products

    def step(n: int, forecast: np.ndarray) -> float:
        return growth[n + 1] * changes.sensitivity[n] * np.linalg.norm(forecast - vectors[n])

    d = vectors
    reuse, linear = gap_errors(changes, growth, 0), gap_errors(changes, growth, 1)
    assert reuse[3, 2, 1] == 0 and np.isinf(reuse[3, 0, 1]) and np.isinf(reuse[8, 1, 3])
    assert reuse[3, 2, 3] == pytest.approx(step(4, d[3]) + step(5, d[3]), rel=1e-3)
    expected = step(4, 1.5 * d[3] - 0.5 * d[1]) + step(5, 2 * d[3] - d[1])
    assert linear[3, 2, 3] == pytest.approx(expected, rel=1e-3)
    assert linear[0, 0, 2] == pytest.approx(step(1, d[0]), rel=1e-3)


def test_recorded_runs_are_the_samples(pipe, tmp_path):
    record(pipe, tmp_path, [3, 4], every_step=True)
    record(pipe, tmp_path / "last", [3, 4], every_step=False)
    runs, last = load_trajectories(tmp_path, [3, 4]), load_trajectories(tmp_path / "last", [3, 4])
    latents = sample_latents(pipe, [3, 4], [0, 1])
    assert runs.states.shape == (2, 11, 4, 4, 4, 4) and runs.velocities.shape == (2, 10, 4, 4, 4, 4)
    assert torch.equal(runs.states[:, -1], latents) and torch.equal(last.states[:, -1], latents)


# Recipes


def make_recipe(cfg: SampleConfig, solver: str = "ddim", **changes) -> Recipe:
    plan = make_plan(cfg)
    steps = tuple(Step(t, w) for t, w in zip(plan.timesteps, plan.weights, strict=True))
    reference = {"sample_method": "ddim", "num_sampling_steps": len(steps)}
    fields = dict(name="mine", depth=1, steps=steps, reference=reference, made_for=fingerprint(cfg))
    return Recipe(solver=solver, **fields | changes)


@pytest.mark.parametrize("cache", ["uncached", "N2-o1"])
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmsolver++", "unipc"])
def test_a_recipe_made_from_options_is_the_run_of_these_options_bit_for_bit(pipe, tmp_path, solver, cache):
    own = with_options(pipe, sample_method=solver, cache=parse_plan(cache))
    save_recipe(tmp_path / "mine.json", make_recipe(own.cfg, solver))
    by_recipe = with_options(pipe, recipe=str(tmp_path / "mine.json"))
    assert by_recipe.plan.solver == solver and by_recipe.plan.full == own.plan.full
    assert torch.equal(sample_latents(by_recipe, [5, 6], [1, 2]), sample_latents(own, [5, 6], [1, 2]))


def test_a_recipe_comes_back_from_its_file(pipe, tmp_path):
    moves = (1.0, -0.5, 0.0, 0.0, 0.0), (0.9, -0.4, 0.1, 0.0, 0.02)
    cached = Step(999, (), moves[0]), Step(400, (1.5,), moves[1])
    unguided = Step(999, (), moves[0]), Step(400, (), moves[1], guided=False)
    for steps in (cached, unguided):
        recipe = make_recipe(pipe.cfg, FITTED, steps=steps, table=({"sampler": "ddim", "l2": 0.1},))
        save_recipe(tmp_path / "r.json", recipe)
        assert load_recipe(tmp_path / "r.json") == recipe


def test_unguided_steps_run_the_labels_alone_and_cost_half(pipe, tmp_path):
    """A recipe whose steps are all unguided is the run without guidance, for half of the MACs."""
    plain, steps = make_recipe(pipe.cfg), pipe.plan.timesteps
    save_recipe(tmp_path / "r.json", replace(plain, steps=tuple(Step(t, guided=False) for t in steps)))
    unguided = with_options(pipe, recipe=str(tmp_path / "r.json"))
    free = with_options(pipe, cfg_scale=1.0)
    assert torch.equal(sample_latents(unguided, [5], [1]), sample_latents(free, [5], [1]))
    assert unguided.plan.macs == free.plan.macs == count_macs(pipe.cfg, 10) // 2

    mixed = tuple(Step(t, guided=n < 4) for n, t in enumerate(steps))
    save_recipe(tmp_path / "r.json", replace(plain, steps=mixed))
    rows_: list[int] = []

    def counting(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows_.append(len(x))
        return pipe.model(x, t, y)

    half = replace(with_options(pipe, recipe=str(tmp_path / "r.json")), uncached=counting)
    sample_latents(half, [5], [1])
    assert rows_ == [2] * 4 + [1] * 6 and half.plan.macs * 20 == count_macs(pipe.cfg, 10) * 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": []}, "its timesteps must fall"),
        ({"steps": [{"t": 10}, {"t": 20}]}, "its timesteps must fall"),
        ({"steps": [{"t": 10}, {"t": 10}]}, "its timesteps must fall"),
        ({"steps": [{"t": -1}]}, "its timesteps must fall"),
        ({"steps": [{"t": 10, "feature": [1.0]}]}, "step t=10 reuses the deep features of 1 full steps, but 0 are"),
        ({"steps": [{"t": 9}, {"t": 5, "feature": [2, -1]}]}, "t=5 reuses the deep features of 2 full steps, but 1"),
        ({"solver": "plms"}, "solver: 'plms' is unknown; valid: fitted, ddpm, ddim"),
        ({"solver": "fitted"}, "step t=999 has 0 coefficients"),
        ({"steps": [{"t": 10, "move": [1, 2]}]}, "step t=10 has 2 coefficients"),
        ({"steps": [{"t": 10}, {"t": 5, "feature": [float("nan")]}]}, "a number that is not finite"),
        ({"steps": [{"t": 9}, {"t": 5, "feature": [1]}, {"t": 1, "guided": False}]}, "step t=1 is not guided"),
        ({"format": 2}, "of another format than 1"),
        ({"steps": None}, "is no recipe"),
        ({"unknown": 1}, "is no recipe"),
    ],
)
def test_a_recipe_that_cannot_run_is_one_line(pipe, tmp_path, change, message):
    path = tmp_path / "r.json"
    save_recipe(path, make_recipe(pipe.cfg))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff\xfe", "name: yaml"])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, text):
    (tmp_path / "r.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"r\.json is no recipe") as caught:
        load_recipe(tmp_path / "r.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"nothing at /nowhere; make one with tools/calibrate\.py"):
        load_recipe("/nowhere")


def test_a_recipe_of_another_checkpoint_or_guidance_is_refused(pipe, tmp_path):
    path = tmp_path / "r.json"
    made_for = fingerprint(pipe.cfg)
    cfg = replace(pipe.cfg, recipe=str(path))

    save_recipe(path, make_recipe(pipe.cfg, made_for=made_for | {"checkpoint": "0" * 64}))
    with pytest.raises(UserError, match=f"was made for checkpoint={'0' * 64}, not {made_for['checkpoint']}$"):
        check_recipe(cfg)  # without a hint at recipe_anyway, which does not help here
    with pytest.raises(UserError, match=f"was made for checkpoint={'0' * 64}, not {made_for['checkpoint']}$"):
        check_recipe(replace(cfg, recipe_anyway=True))

    save_recipe(path, make_recipe(pipe.cfg, made_for=made_for | {"cfg_scale": 7.0}))
    with pytest.raises(UserError, match=r"made for cfg_scale=7\.0, not 2\.0; recipe_anyway=True"):
        check_recipe(cfg)
    check_recipe(replace(cfg, recipe_anyway=True))


def run(monkeypatch, program, *argv: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, argv)])
    program.main()


def test_programs_sample_by_a_recipe(tiny, pipe, tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.json"
    save_recipe(path, make_recipe(with_options(pipe, num_sampling_steps=4).cfg))
    common = ["--config", tiny, "--recipe", path]
    run(monkeypatch, sample, *common, "--compare", "--cache", "N2", f"save_video_path={tmp_path}/one")
    record_ = json.loads((tmp_path / "one/sample.json").read_text())
    assert [each["plan"]["name"] for each in record_["runs"]] == ["uncached", "N2", "mine"]
    assert record_["runs"][2]["plan"]["steps"] == "FFFF" and (tmp_path / "one/mine/grid.mp4").exists()
    assert "--compare --cache N2 --classes" in report.samples(tmp_path / "one", 3)

    run(monkeypatch, sample_ddp, *common, f"save_video_path={tmp_path}/many", "num_fvd_samples=1")
    save_recipe(path, make_recipe(with_options(pipe, num_sampling_steps=5).cfg))
    with pytest.raises(UserError, match=r"made with recipe=[0-9a-f]{12}, not [0-9a-f]{12}"):
        run(monkeypatch, sample_ddp, *common, f"save_video_path={tmp_path}/many", "num_fvd_samples=1")
    with pytest.raises(UserError, match="nothing at /nowhere"):
        run(monkeypatch, sample, "--config", tiny, "--recipe", "/nowhere", "--dry-run")


def test_recipes_share_a_folder_by_their_names(tiny, pipe, tmp_path, monkeypatch):
    """As other plans do. Another recipe of a name that the folder has is refused, whatever ran between."""
    command = ["--config", tiny, "--classes", "0", f"save_video_path={tmp_path}/out"]
    for name, steps in (("a", 2), ("b", 3)):
        save_recipe(tmp_path / f"{name}.json", make_recipe(with_options(pipe, num_sampling_steps=steps).cfg, name=name))
        run(monkeypatch, sample, *command, "--recipe", tmp_path / f"{name}.json")
    run(monkeypatch, sample, *command)
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"a", "b", "uncached"}
    for name in "ab":
        run(monkeypatch, sample, *command, "--recipe", tmp_path / f"{name}.json", "--dry-run")
        save_recipe(tmp_path / f"{name}.json", make_recipe(with_options(pipe, num_sampling_steps=4).cfg, name=name))
        with pytest.raises(UserError, match=rf"made with recipes\.{name}=[0-9a-f]{{12}}, not [0-9a-f]{{12}}"):
            run(monkeypatch, sample, *command, "--recipe", tmp_path / f"{name}.json", "--dry-run")


# Holding x_0


def test_ddim_that_holds_x0_is_ddim_in_fewer_steps(pipe):
    """x_0 and eps stay the same where none is estimated anew; the run costs the steps that are evaluated."""
    plan = make_plan(pipe.cfg, parse_plan("0,2,3-b0"))
    assert plan.share == 3 / pipe.cfg.num_sampling_steps
    fewer = [plan.timesteps[n] for n in (0, 2, 3)]
    cost = build_plan(pipe.cfg, "fewer", "ddim", fewer, [True] * 3)
    expected = sample_latents(pipe, [3, 4], [0, 1], cost)
    torch.testing.assert_close(sample_latents(pipe, [3, 4], [0, 1], plan), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_ddpm_that_holds_x0_draws_the_noise_of_all_steps(learn_sigma):
    """With a model that always predicts one x_0 and variance, it is the full run; with a forecast, too."""
    diffusion = create_diffusion("10", learn_sigma=learn_sigma, prediction="x0")
    output = torch.randn(2, 3, 4 * (1 + learn_sigma), 2, 2)

    def sample(held):
        calls, generators = [], [torch.Generator().manual_seed(seed) for seed in (1, 2)]

        def model(x, t):
            calls.append(t[0].item())
            return output

        loop = diffusion.sample_loop(
            model, (2, 3, 4, 2, 2), clip_denoised=False, generators=generators, method="ddpm", held=held
        )
        return loop, len(calls)

    full, calls = sample(())
    assert calls == 10
    for weights in ([1.0], [2.0, -1.0]):
        held, calls = sample([[], [], *[weights] * 5, [], weights, weights])
        assert calls == 3
        torch.testing.assert_close(held, full)


def test_changes_of_x0_foretell_the_error_of_a_held_step(pipe, tmp_path):
    """For one step of one clip it is the sensitivity times the distance of the estimates, from their products.

    The first and the last step that can hold. In between, a learned variance is held, too, which moves the noise.
    """
    pipe = with_options(pipe, sample_method="ddpm")
    record(pipe, tmp_path, [7], every_step=True)
    changes, N = estimate_changes(pipe.diffusion, "ddpm", tmp_path, [7]), pipe.diffusion.num_timesteps
    states = load_trajectories(tmp_path, [7]).states
    gram = np.array(changes.gram)
    for n in (1, N - 1):
        held = [[1.0] if step == n else [] for step in range(N)]
        generators = [torch.Generator().manual_seed(7)]
        loop = pipe.diffusion.sample_loop_progressive(
            make_denoiser(pipe, pipe.plan),
            states[:, 0].shape,
            clip_denoised=False,
            model_kwargs={"y": torch.tensor(labels_of([7], pipe.cfg))},
            generators=generators,
            method="ddpm",
            held=held,
        )
        reached = [out["sample"] for out in loop][n]
        distance = math.sqrt(gram[n, n] - 2 * gram[n, n - 1] + gram[n - 1, n - 1])
        measured = float(relative_l2(reached, states[:, n + 1]))
        assert changes.sensitivity[n] * distance == pytest.approx(measured, rel=0.02)


def test_a_recipe_holds_x0_as_the_option_does(pipe, tmp_path):
    options = with_options(pipe, sample_method="ddpm", cache=parse_plan("0,2,4-b0-o1"))
    recipe = make_recipe(options.cfg, "ddpm", name="held", depth=0)
    save_recipe(tmp_path / "held.json", recipe)
    assert recipe_plan(load_recipe(tmp_path / "held.json"), options.cfg).macs == options.plan.macs
    ours = sample_latents(options, [5], [1])
    assert torch.equal(sample_latents(options, [5], [1], tmp_path / "held.json"), ours)
    assert not torch.equal(sample_latents(options, [5], [1], "uncached"), ours)


# Calibration


def test_calibration_writes_recipes_that_run_and_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch, capsys):
    """The recipe samples what the table says; a second run measures nothing; a part of a line is measured again."""
    out = tmp_path / "out"
    command = ["--config", tiny, f"output={out}", "budgets=[0.5]", "num_calibration=3", "num_clips=4"]
    run(monkeypatch, calibrate, *command)
    text = (out / "calibrate.md").read_text()
    assert all(f" {kind} |" in text for kind in ("plain", "fitted", "fitted+cached", "fitted+unguided"))
    json.loads((out / "recipe-50.json").read_text(), parse_constant=pytest.fail)  # no NaN, which is no JSON
    recipe = load_recipe(out / "recipe-50.json")
    chosen = next(row for row in recipe.table if row["chosen"])
    assert chosen["share"] <= 0.5 and len(recipe.table) >= 7 and recipe.reference["num_sampling_steps"] == 6

    cfg = resolve(load_config(SampleConfig, tiny, [f"recipe={out}/recipe-50.json"]), CPU)
    by_recipe, seeds = load(cfg, CPU), [30000, 30001]
    reference = load_trajectories(out / "trajectories", seeds).states[:, -1]
    latents = sample_latents(by_recipe, seeds, [seed % 3 for seed in seeds])
    lines = [json.loads(line) for line in (out / "results/0.jsonl").read_text().splitlines()]
    measured = next(line for line in lines if line["candidate"] == chosen["sampler"] and line["seeds"] == seeds)
    for i in range(2):
        assert measured["l2"][i] == pytest.approx(relative(latents[i], reference[i]), rel=1e-4)

    tables, results = recipe.table, (out / "results/0.jsonl").read_text()
    with monkeypatch.context() as patch:
        for name in ("record", "measure", "fit_moves", "measure_growth", "measure_features"):
            patch.setattr(calibration, name, lambda *args: pytest.fail("all was there"))
        run(monkeypatch, calibrate, *command)
    assert load_recipe(out / "recipe-50.json").table == tables
    (out / "results/0.jsonl").write_text(results[:-40])
    run(monkeypatch, calibrate, *command)
    assert len((out / "results/0.jsonl").read_text().splitlines()) == len(lines)
    for change, difference in (("cfg_scale=3", r"cfg_scale=2\.0, not 3\.0"), ("num_calibration=4", "=3, not 4")):
        with pytest.raises(UserError, match=f"output: .*made with .*{difference}"):
            run(monkeypatch, calibrate, *command, change)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("eta=0.5", "eta: 0.5 draws other noise in every sampler"),
        ("cache.depth=0", "cache.depth: 0 leaves no layers to cached steps"),
        ("budgets=[0.1]", "budgets: 0.1 of 6 steps is less than two steps"),
        ("budgets=[1.5]", "budgets: 1.5 is more than 1"),
        ("budgets=[0.5,1]", "budgets: 1 pays for the options' own sampler; give shares below 1"),
        ("held_out_seed=20001", "these seeds are also held out"),
        ("num_clips=1", "num_clips: 1 is less than 2"),
    ],
)
def test_calibrations_that_make_no_sense_are_one_line(tiny, tmp_path, monkeypatch, option, message):
    with pytest.raises(UserError, match=message):
        run(monkeypatch, calibrate, "--config", tiny, f"output={tmp_path}", option)


@pytest.mark.parametrize("option", [["target=converged"], ["sample_method=ddpm"], ["sample_method=euler"]])
def test_other_targets(tiny, tmp_path, monkeypatch, capsys, option):
    """A converged sample takes fewer of the target's own steps; a sampler that draws noise takes all of its own."""
    sizes = ["num_sampling_steps=12", "budgets=[0.7]", "num_calibration=2", "num_clips=2", "num_climbs=1"]
    run(monkeypatch, calibrate, "--config", tiny, f"output={tmp_path}", *sizes, *option)
    recipe = load_recipe(tmp_path / "recipe-70.json")
    kinds = {row["kind"] for row in recipe.table}
    states = load_trajectories(tmp_path / "trajectories", [20000]).states
    if option != ["sample_method=ddpm"]:  # euler is ddim
        assert kinds == {"plain", "interval", "placed", "fitted", "fitted+cached", "fitted+unguided"}
        assert states.shape[1] == (101 if option == ["target=converged"] else 13)
        assert recipe.reference["sample_method"] == "ddim"
    else:
        assert kinds == {"plain", "interval", "placed", "held"} and recipe.solver == "ddpm" and len(recipe.steps) == 12
        held = next(row for row in recipe.table if row["kind"] == "held")
        assert held["share"] == 8 / 12 and "8 of 12 full, order 0, x_0 held" in held["sampler"]
        assert states.shape[1] == 13
    cfg = resolve(load_config(SampleConfig, tiny, [f"recipe={tmp_path}/recipe-70.json", *option[:0]]), CPU)
    assert sample_latents(load(cfg, CPU), [1], [1]).isfinite().all()


def test_a_psnr_is_reached_at_the_least_cost(tiny, tmp_path, monkeypatch, capsys):
    """One step less than what bisection found does not reach it; what no budget reaches is one line."""
    sizes = ["num_calibration=2", "num_clips=2", "num_climbs=0", f"output={tmp_path}"]
    run(monkeypatch, calibrate, "--config", tiny, *sizes, "min_psnr=60")
    recipe = load_recipe(tmp_path / "recipe-60dB.json")
    chosen = next(row for row in recipe.table if row["chosen"])
    lines = [json.loads(line) for line in (tmp_path / "results/0.jsonl").read_text().splitlines()]
    psnr = {line["candidate"]: np.mean(line["psnr"]) for line in lines if line["seeds"] == [20000, 20001]}
    assert psnr[chosen["sampler"]] >= 60
    cheaper = [p for name, p in psnr.items() if name.startswith(f"fitted, {len(recipe.steps) - 1} steps, g")]
    assert cheaper and max(cheaper) < 60
    drawn = [*sizes[:-1], f"output={tmp_path}/ddpm", "sample_method=ddpm", "num_sampling_steps=12", "min_psnr=20"]
    run(monkeypatch, calibrate, "--config", tiny, *drawn)
    assert next(row for row in load_recipe(tmp_path / "ddpm/recipe-20dB.json").table if row["chosen"])["psnr"] > 15
    with pytest.raises(UserError, match=r"min_psnr: 99 dB is out of reach; 5 of 6 steps' MACs give \d+\.\d dB"):
        run(monkeypatch, calibrate, "--config", tiny, *sizes, "min_psnr=99")


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_a_budget_too_small_for_placed_steps_leaves_them_out(tiny, tmp_path, monkeypatch, method):
    """Two evaluations in 30 steps are farther apart than the largest gap that is measured."""
    drawn = [f"sample_method={method}", "num_sampling_steps=30"]
    share = cached_share(load_config(SampleConfig, tiny, drawn)) if method == "ddim" else 0
    budget = share + (1 - share) * 2.1 / 30
    sizes = [f"budgets=[{budget}]", "num_calibration=2", "num_clips=2", "num_climbs=0", f"output={tmp_path}"]
    run(monkeypatch, calibrate, "--config", tiny, *drawn, *sizes)
    kinds = {row["kind"] for row in load_recipe(next(tmp_path.glob("recipe-*.json"))).table}
    assert "plain" in kinds and not kinds & {"placed", "held"}


def test_two_processes_find_the_recipe_that_one_finds(tiny, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    sizes = ["budgets=[0.6]", "num_calibration=5", "num_clips=4", "num_climbs=2", "per_proc_batch_size=8"]
    command = [calibrate.__file__, "--config", str(tiny), *sizes]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for launcher, name in (([sys.executable], "one"), (torchrun, "two")):
        argv = [*launcher, *command, f"output={tmp_path}/{name}"]
        result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / f"{name}/recipe-60.json").read_text()) for name in ("one", "two"))
    assert [step["t"] for step in one["steps"]] == [step["t"] for step in two["steps"]]
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert a.get("move", []) == pytest.approx(b.get("move", []), rel=1e-6)
    assert [row["sampler"] for row in one["table"]] == [row["sampler"] for row in two["table"]]
    shares = [(tmp_path / f"two/results/{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) > 0  # no process waits while another has a large batch


@pytest.mark.parametrize("options", [[], ["sample_method=ddpm"], ["target=converged"]])
def test_the_work_that_a_dry_run_tells_is_what_is_done(tiny, tmp_path, monkeypatch, capsys, options):
    """Rows times cost of all calls of the model, in full guided steps, to 20 %."""
    sizes = ["num_sampling_steps=20", "budgets=[0.75]", "num_calibration=3", "num_clips=3", "num_climbs=2"]
    done, latte = 0.0, Latte.run

    def counting(self: Latte, layers: range, x: Tensor, *rest, **more):
        nonlocal done
        done += len(x) * len(layers) / self.num_layers / 2  # guidance: two rows a clip
        return latte(self, layers, x, *rest, **more)

    monkeypatch.setattr(Latte, "run", counting)
    run(monkeypatch, calibrate, "--config", tiny, f"output={tmp_path}", *sizes, *options)
    cfg = resolve(load_config(calibrate.CalibrateConfig, tiny, [*sizes, *options]), CPU)
    assert work(cfg) == pytest.approx(done, rel=0.2)


def test_a_dry_run_says_what_the_calibration_takes(tiny, monkeypatch, capsys):
    run(monkeypatch, calibrate, "--config", tiny, "--dry-run", "num_calibration=3", "num_clips=4", "budgets=[0.5]")
    text = capsys.readouterr().out
    assert "# calibration: twin, 3 clips, 4 held out, budgets [0.5]" in text and "# work: " in text
    assert "GB a process; disk: " in text
    cfg = load_config(calibrate.CalibrateConfig, tiny, ["num_calibration=3"])
    values = cfg.num_frames * 4 * (cfg.image_size // 8) ** 2 * (2 * cfg.num_sampling_steps + 1)
    assert disk_bytes(cfg) == 3 * values * 4


def test_ratios_are_paired_and_their_interval_is_students():
    values, controls = [1.0, 2.0, 8.0], [2.0, 4.0, 4.0]
    found = ratio_interval(values, controls)
    logs = np.log([0.5, 0.5, 2.0])
    margin = 4.302652729911275 * logs.std(ddof=1) / math.sqrt(3)  # t of 2 degrees of freedom at 0.975
    assert found["value"] == pytest.approx(math.exp(logs.mean()))
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.exp(logs.mean() + np.array([-margin, margin]))))
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4) and geometric_mean([0.0, 8.0]) == 0


def test_fidelity_measures_a_recipe_beside_plans(tiny, pipe, tmp_path, monkeypatch):
    """A recipe of the options themselves is its own twin; one of fewer steps is that of the control."""
    for steps in (6, 4):
        save_recipe(tmp_path / f"r{steps}.json", make_recipe(with_options(pipe, num_sampling_steps=steps).cfg))
    plans = ["N2", tmp_path / "r6.json", tmp_path / "r4.json"]
    run(monkeypatch, fidelity, "--config", tiny, "--cache", *plans, "num_clips=4", f"output={tmp_path}/out")
    rows_ = {row["run"]: row for row in json.loads((tmp_path / "out/fidelity.json").read_text())["rows"]}
    assert rows_["r6"]["twin"]["relative_l1"]["mean"] == 0 and rows_["r6"]["share"] == 1
    assert rows_["r4"]["twin"]["relative_l1"]["mean"] > 0 and rows_["r4"]["full_steps"] == 4
    assert rows_["r4"]["twin"]["psnr"]["each"] == rows_["ddim, 4 steps"]["twin"]["psnr"]["each"]
    save_recipe(tmp_path / "r4.json", make_recipe(pipe.cfg, made_for=fingerprint(pipe.cfg) | {"prediction": "v"}))
    with pytest.raises(UserError, match="was made for prediction=v, not eps"):
        run(monkeypatch, fidelity, "--config", tiny, "--cache", *plans, "num_clips=4", f"output={tmp_path}/out")


@pytest.mark.parametrize("name", ["recipe-43", "recipe-65"])
def test_the_recipes_in_the_repository_are_of_its_checkpoint(name):
    cfg = load_config(SampleConfig, DEMO, [f"recipe=pretrained/demo/{name}.json"])
    check_recipe(resolve(cfg, CPU))
