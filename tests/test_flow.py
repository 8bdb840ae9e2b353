"""Flow matching: the path, its losses and times, and every solver on data whose answer is known in closed form."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from configs import CacheOptions, SampleConfig, TrainConfig, UserError, load_config
from diffusion import create_diffusion, make_diffusion
from diffusion.flow import FULL, flow_timesteps, shift_time
from diffusion.sampling import SAMPLERS, evaluations, linear_multistep
from models import get_models
from sample.distributed import Environment
from sample.pipeline import choose_plan, load, resolve, sample_latents, with_options
from sample.plans import describe_plan, make_plan
from sample.recipes import Recipe, Step, fingerprint, load_recipe, save_recipe
from tests.conftest import save_random_weights
from tools import calibrate, stability
from tools.common.training import check_training_options
from tools.recipes.candidates import fitted_candidate
from tools.recipes.fit import prior_move
from tools.recipes.search import angles_of, fit_moves
from tools.recipes.trajectories import record

CPU = torch.device("cpu")
DETERMINISTIC = ("ddim", "euler", "heun", "dpmsolver++", "unipc")
SHAPE = (2, 3, 4, 2, 2)  # (B, F, C, H, W)
MEAN, STD = 0.5, 0.3  # of Gaussian data
MIXTURE = [(0.3, -1.0, 0.2), (0.5, 0.4, 0.3), (0.2, 1.5, 0.1)]  # weight, mean, deviation


def flow(respacing: str | int | list = 10, prediction: str = "v", **options):
    return create_diffusion(respacing, process="flow", prediction=prediction, learn_sigma=False, **options)


class Oracle:
    """The optimal denoiser of a mixture of Gaussians, of a flow or of the Gaussian process; remembers its calls."""

    def __init__(self, process: str = "flow", prediction: str = "v", mixture=((1.0, MEAN, STD),)):
        self.process, self.prediction, self.mixture = process, prediction, mixture
        self.alphas_cumprod = torch.from_numpy(create_diffusion("").alphas_cumprod)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls.append((x, t))
        if self.process == "flow":
            alpha, sigma = 1 - t.double() / 1000, t.double() / 1000
        else:
            alpha, sigma = self.alphas_cumprod[t].sqrt(), (1 - self.alphas_cumprod[t]).sqrt()
        alpha, sigma = (each.view(-1, *[1] * (x.ndim - 1)) for each in (alpha, sigma))
        x = x.double()
        logs, means = [], []
        for weight, mean, std in self.mixture:
            variance = alpha**2 * std**2 + sigma**2
            logs.append(math.log(weight) - 0.5 * variance.log() - 0.5 * (x - alpha * mean) ** 2 / variance)
            means.append(mean + alpha * std**2 / variance * (x - alpha * mean))
        x0 = (torch.stack(logs).softmax(0) * torch.stack(means)).sum(0)
        eps = (x - alpha * x0) / sigma
        v = eps - x0 if self.process == "flow" else alpha * eps - sigma * x0
        return {"x0": x0, "v": v}[self.prediction].float()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The path


def test_path_and_targets():
    """x_s = (1 - s) x + s eps, v = eps - x; t is the number of a step, or 1000 s where it is a real number."""
    x, eps = noise(2, *SHAPE)
    for diffusion, t, s in (
        (flow(""), torch.tensor([0, 749]), [0.001, 0.75]),
        (flow(4), torch.tensor([1, 3]), [0.5, 1.0]),
        (flow(4), torch.tensor([250.5, 0.0]), [0.2505, 0.0]),
    ):
        s = torch.tensor(s).view(2, 1, 1, 1, 1)
        torch.testing.assert_close(diffusion.q_sample(x, t, eps), (1 - s) * x + s * eps)
        torch.testing.assert_close(diffusion.original_timesteps(t), 1000 * s.flatten())
        assert diffusion.target(x, eps, t).equal(eps - x)
        assert flow(4, "x0").target(x, eps, t).equal(x)
        v = diffusion.velocity(diffusion.q_sample(x, t, eps), x, t)[s.flatten() > 0]
        torch.testing.assert_close(v, (eps - x)[s.flatten() > 0], rtol=1e-3, atol=1e-3)


def test_timesteps_are_even_in_s_and_shifted():
    """From 1/N to 1, logit(s) moved by log k; t is named with three decimals; a list is taken as it is."""
    assert flow_timesteps(4) == flow_timesteps("4") == [250.0, 500.0, 750.0, 1000.0]
    assert flow_timesteps(3) == [333.333, 666.667, 1000.0]
    assert flow_timesteps("") == flow_timesteps(None) == list(range(1, 1001))
    s = torch.tensor(flow_timesteps(8, shift=3.0)[:-1]).double() / FULL
    torch.testing.assert_close(s.logit(), (torch.arange(1, 8) / 8).double().logit() + math.log(3), atol=1e-4, rtol=0)
    assert flow_timesteps(8, 3.0)[-1] == 1000 and flow_timesteps((900.5, 3, 20)) == [3, 20, 900.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prediction="eps"), "prediction: eps does not go with process: flow; valid: v, x0"),
        (dict(learn_sigma=True), "learn_sigma: a flow has no variance"),
        (dict(noise_schedule="squaredcos_cap_v2"), "noise_schedule, diffusion_steps: a flow has neither"),
        (dict(diffusion_steps=500), "noise_schedule, diffusion_steps: a flow has neither"),
        (dict(process="rectified"), "process: 'rectified' is unknown; valid: gaussian, flow"),
        (dict(process="gaussian", time_shift=3.0), "time_shift: 3 shifts the time of a flow"),
        (dict(timestep_respacing="ddim50"), '"ddim50"; valid forms with process: flow: "50"'),
        (dict(timestep_respacing="10,20"), "valid forms with process: flow"),
        (dict(timestep_respacing="0"), "valid forms with process: flow"),
        (dict(timestep_respacing=-3), "valid forms with process: flow"),
        (dict(timestep_respacing=[0, 5]), "want different ones above 0, up to 1000"),
        (dict(timestep_respacing=[5, 5]), "want different ones above 0"),
        (dict(timestep_respacing=[5, 1001]), "want different ones above 0"),
        (dict(timestep_respacing=[]), "want different ones above 0"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        create_diffusion(**{"process": "flow", "prediction": "v", "learn_sigma": False} | options)
    assert "\n" not in str(error.value)


# The yardstick


def predictions(process: str) -> list:
    kinds = [("v", False), ("x0", False)] if process == "flow" else [("eps", False), ("x0", False), ("v", True)]
    return [create_diffusion("", process=process, prediction=kind, learn_sigma=sigma) for kind, sigma in kinds]


@pytest.mark.parametrize("log_snr", [-6.0, -2.5, 0.0, 3.0, 6.0])
def test_x0_errors_are_one_for_all_objectives(log_snr):
    """An estimate that is off by 0.1 has an error of 0.01, in whatever form a model of any process says it.

    The states have this log-SNR to the bit of fp32, and t is where training would have put them.
    """
    x, eps = noise(2, *SHAPE)
    for diffusion in [*predictions("flow"), *predictions("gaussian")]:

        def model(state: Tensor, t: Tensor, y: int, diffusion=diffusion) -> Tensor:
            assert y == 3 and t.shape == (2,) and t.is_floating_point()
            alpha, sigma, at = diffusion.noise_level(log_snr)
            assert 2 * math.log(alpha / sigma) == pytest.approx(log_snr, abs=1e-9)
            torch.testing.assert_close(state, alpha * x + sigma * eps)
            if diffusion.process == "flow":
                assert at == pytest.approx(1000 * sigma) and alpha + sigma == pytest.approx(1)
            else:
                a = diffusion.alphas_cumprod[[math.floor(at), math.ceil(at)]]
                assert a[1] <= alpha**2 <= a[0] and alpha**2 + sigma**2 == pytest.approx(1)
            x0 = x + 0.1
            e = (state - alpha * x0) / sigma
            v = e - x0 if diffusion.process == "flow" else alpha * e - sigma * x0
            out = {"eps": e, "x0": x0, "v": v}[diffusion.prediction]
            return torch.cat([out, 9 + out], dim=2) if diffusion.learn_sigma else out

        errors = diffusion.x_start_errors(model, x, [log_snr, log_snr], dict(y=3), eps)
        torch.testing.assert_close(errors, torch.full((2, 2), 0.01), rtol=2e-3, atol=0)


def test_optimal_denoisers_of_both_processes_have_the_bayes_error():
    """On Gaussian data the error is the posterior's variance, 1 / (1 / STD^2 + SNR), the same in both processes."""
    generator = torch.Generator().manual_seed(0)
    x, eps = MEAN + STD * torch.randn(400, 1, 4, 4, 4, generator=generator), noise(400, 1, 4, 4, 4)
    gaussian = create_diffusion("", prediction="v", learn_sigma=False)

    def rounded(state: Tensor, t: Tensor) -> Tensor:  # the oracle knows whole timesteps of the Gaussian process
        return Oracle("gaussian")(state, t.round().long())

    for diffusion, model, tolerance in ((flow(""), Oracle(), 0.03), (gaussian, rounded, 0.04)):
        errors = diffusion.x_start_errors(model, x, [-4.0, 0.0, 4.0], noise=eps).mean(0)
        bayes = [1 / (1 / STD**2 + math.exp(log_snr)) for log_snr in (-4, 0, 4)]
        assert errors.tolist() == pytest.approx(bayes, rel=tolerance)


# Training


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_perfect_prediction_has_no_loss(prediction):
    diffusion, (x, eps) = flow("", prediction), noise(2, *SHAPE)
    truth, seen = (eps - x if prediction == "v" else x), []

    def model(x_t, t, y):
        seen.append(t)
        return truth + 0.1

    losses = diffusion.training_losses(model, x, torch.tensor([0.0, 999.5]), dict(y=None), eps)
    assert losses.keys() == {"mse", "loss"} and losses["loss"].tolist() == pytest.approx([0.01, 0.01], rel=1e-4)
    assert seen[0].tolist() == [0.0, 999.5]


@pytest.mark.parametrize(
    "diffusion", [*predictions("flow"), *predictions("gaussian")], ids=lambda d: f"{d.process}-{d.prediction}"
)
def test_min_snr_gives_the_error_of_x0_the_weight_min_snr(diffusion):
    """For every process and prediction: loss = min(SNR, 5) |x_0 - estimate|^2, plus the bound; mse stays as it is."""
    t, (x, eps), outputs = torch.tensor([20, 400, 900]), noise(2, 3, *SHAPE[1:]), []

    def model(state: Tensor, t: Tensor) -> Tensor:
        outputs.append(torch.cat([0.3 * state, state], dim=2) if diffusion.learn_sigma else 0.3 * state)
        return outputs[-1]

    losses, plain = (diffusion.training_losses(model, x, t, {}, eps, min_snr=gamma) for gamma in (5.0, 0.0))
    c, x_t = diffusion.at(t, x), diffusion.q_sample(x, t, eps)
    estimate = diffusion.x_start(diffusion.split(outputs[0], x)[0], x_t, c.alpha, c.sigma)
    snr = (c.alpha / c.sigma).square().flatten()
    assert snr[0] > 5 > snr[2]
    expected = snr.clamp(max=5) * (estimate - x).square().flatten(1).mean(1) + losses.get("vb", 0)
    torch.testing.assert_close(losses["loss"], expected, rtol=2e-3, atol=1e-6)
    assert losses["mse"].equal(plain["mse"]) and plain["loss"].equal(plain["mse"] + plain.get("vb", 0))


def test_min_snr_is_finite_at_the_ends_of_a_flow():
    for prediction in ("v", "x0"):
        loss = flow("", prediction).training_losses(
            lambda x, t: x, noise(*SHAPE), torch.tensor([0.0, 1e3]), min_snr=5.0
        )
        assert loss["loss"].isfinite().all()


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_drawn_times_have_their_distribution(sampling, shift):
    """After the shift is taken back, s is uniform, or its logit standard normal; Kolmogorov-Smirnov at 4000 draws."""
    diffusion, generator = flow("", time_shift=shift), torch.Generator().manual_seed(0)
    t = torch.stack([diffusion.draw_timestep(sampling, generator, CPU) for _ in range(4000)])
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1000
    s = shift_time(t.double() / 1000, 1 / shift)
    expected = s if sampling == "uniform" else torch.special.ndtr(s.logit())
    gap = (expected.sort().values - (torch.arange(4000) + 0.5) / 4000).abs().max()
    assert gap < 1.63 / math.sqrt(4000)  # 1 % level


def test_gaussian_process_takes_logit_normal_times_too():
    """Whole timesteps whose share of 1000 has a standard normal logit; uniform ones are drawn as ever."""
    diffusion, generator = create_diffusion(""), torch.Generator().manual_seed(0)
    t = torch.stack([diffusion.draw_timestep("logit-normal", generator, CPU) for _ in range(4000)])
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    expected = torch.special.ndtr(((t + 0.5) / 1000).double().logit())
    assert (expected.sort().values - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.63 / math.sqrt(4000)
    ours = diffusion.draw_timestep("uniform", torch.Generator().manual_seed(5), CPU)
    assert ours == torch.empty(3, dtype=torch.int64)[0].random_(1000, generator=torch.Generator().manual_seed(5))


def test_training_checks_the_process_first():
    cfg = load_config(TrainConfig, None, ["process=flow", "prediction=v"])
    with pytest.raises(UserError, match="learn_sigma: a flow has no variance to learn"):
        check_training_options(cfg)


# Solvers


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20, 50, 250])
@pytest.mark.parametrize("method", DETERMINISTIC)
def test_data_of_one_point_is_exact(method, steps):
    """Where all data is one point the paths are straight lines: every number of steps ends at that point."""
    x = flow(steps).sample_loop(Oracle(mixture=[(1.0, MEAN, 0.0)]), SHAPE, clip_denoised=False, method=method)
    torch.testing.assert_close(x, torch.full(SHAPE, MEAN), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20, 50, 250])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_euler_and_heun_are_their_formulas(prediction, shift, steps):
    """On Gaussian data: x + ds v, and x + ds (v + v') / 2 with one evaluation in the last step, in float64."""

    def v(x: Tensor, s: float) -> Tensor:
        x0 = MEAN + (1 - s) * STD**2 / ((1 - s) ** 2 * STD**2 + s**2) * (x - (1 - s) * MEAN)
        return (x - x0) / s

    z = noise(*SHAPE)
    times = [k * shift / (steps + k * (shift - 1)) for k in range(steps, -1, -1)]  # (k/N) shifted
    euler = heun = z.double()
    for s, following in pairwise(times):
        euler = euler + (following - s) * v(euler, s)
        ahead = heun + (following - s) * v(heun, s)
        heun = heun + (following - s) * (v(heun, s) + v(ahead, following)) / 2 if following else ahead
    for method, expected in (("euler", euler), ("ddim", euler), ("heun", heun)):
        model = Oracle(prediction=prediction)
        diffusion = flow(steps, prediction, time_shift=shift)
        x = diffusion.sample_loop(model, SHAPE, z, clip_denoised=False, method=method)
        torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=2e-5)
        assert len(model.calls) == (2 * steps - 1 if method == "heun" else steps)


def test_solvers_converge_to_the_exact_flow():
    """z of noise goes to MEAN + STD z. Euler's error halves with the step, Heun's falls to a quarter."""
    z = noise(64, 1, 4, 4, 4)

    def error(method: str, steps: int) -> float:
        x = flow(steps).sample_loop(Oracle(), z.shape, z, clip_denoised=False, method=method)
        return (x - MEAN - STD * z).square().mean().sqrt().item() / STD

    euler = {steps: error("euler", steps) for steps in (10, 25, 50, 100)}
    assert euler[50] / euler[100] == pytest.approx(2, rel=0.1)
    assert error("heun", 50) / error("heun", 100) == pytest.approx(4, rel=0.15)
    for method in ("heun", "dpmsolver++", "unipc"):
        assert error(method, 10) < euler[10] / 2 and error(method, 25) < euler[25] / 5
        assert error(method, 100) < euler[100] / 5


@pytest.mark.parametrize("method", ["ddpm", "unipc"])
def test_samples_have_the_datas_mean_and_variance(method):
    torch.manual_seed(0)
    z = noise(4096, 2, 2, 2, seed=0)
    x = flow(200).sample_loop(Oracle(), z.shape, z, clip_denoised=False, method=method)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.007) and x.std().item() == pytest.approx(STD, rel=0.03)


def test_both_processes_lead_a_seed_to_the_same_sample():
    """The probability flows of a mixture are one, whatever the process: converged runs agree sample by sample.

    The Gaussian process starts at alpha = 0.006, not at pure noise: its tolerance.
    """
    z = noise(500, 1, 1, 1, 4)
    options = dict(clip_denoised=False, method="heun")
    straight = flow(300).sample_loop(Oracle(mixture=MIXTURE), z.shape, z, **options)
    gaussian = create_diffusion(500, prediction="v", learn_sigma=False)
    curved = gaussian.sample_loop(Oracle("gaussian", mixture=MIXTURE), z.shape, z, **options)
    gap = (straight - curved).abs().flatten()
    assert gap.median() < 0.01 and (gap < 0.05).float().mean() > 0.97  # the rest lies between two components
    # ... and they are the mixture: its distribution function at the samples is uniform.
    samples = straight.double().flatten()
    cdf = sum(w * torch.special.ndtr((samples - mean) / std) for w, mean, std in MIXTURE)
    assert (cdf.sort().values - (torch.arange(2000) + 0.5) / 2000).abs().max() < 1.63 / math.sqrt(2000)


def test_heun_of_the_gaussian_process_is_of_second_order():
    """Its error on Gaussian data falls to a quarter with half of the step, and data of one point is exact."""
    z = noise(64, 1, 4, 2, 2)
    reference = create_diffusion("", prediction="v", learn_sigma=False)
    a = reference.alphas_cumprod[-1]
    exact = MEAN + STD * (z - math.sqrt(a) * MEAN) / math.sqrt(a * STD**2 + 1 - a)

    def error(steps: int) -> float:
        diffusion = create_diffusion(steps, prediction="v", learn_sigma=False)
        x = diffusion.sample_loop(Oracle("gaussian"), z.shape, z, clip_denoised=False, method="heun")
        return (x - exact).square().mean().sqrt().item()

    assert 3 < error(25) / error(50) < 6
    diffusion = create_diffusion(5, prediction="v", learn_sigma=False)
    x = diffusion.sample_loop(Oracle("gaussian", mixture=[(1.0, MEAN, 0.0)]), z.shape, z, False, method="heun")
    torch.testing.assert_close(x, torch.full_like(x, MEAN), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", SAMPLERS)
def test_model_sees_real_timesteps_on_fp32_states(method):
    model, diffusion = Oracle(), flow(7, time_shift=2.0)
    x = diffusion.sample_loop(model, SHAPE, method=method)
    assert x.dtype == torch.float32 and x.isfinite().all()
    assert [t.tolist() for _, t in model.calls] == [
        [pytest.approx(t, abs=1e-4)] * 2 for t in evaluations(method, diffusion.timestep_map[::-1])
    ]


@pytest.mark.parametrize("method", SAMPLERS)
def test_loop_runs_on_meta_tensors(method):
    assert flow(20).sample_loop(lambda x, t: x * t[0], SHAPE, device="meta", method=method).is_meta


def test_evaluations():
    assert evaluations("euler", [3, 2, 1]) == [3, 2, 1] and evaluations(partial(linear_multistep, []), [3]) == [3]
    assert evaluations("heun", [3, 2, 1]) == [3, 2, 2, 1, 1] and evaluations("heun", [3]) == [3]


# Plans, caches, guidance and recipes


@pytest.fixture(scope="module")
def pipe(tiny):
    changes = ["process=flow", "prediction=v", "learn_sigma=False", "num_sampling_steps=8"]
    cfg = load_config(SampleConfig, tiny, changes)
    torch.manual_seed(0)
    save_random_weights(get_models(cfg), tiny.parent / "flow.safetensors")
    return load(resolve(replace(cfg, ckpt=str(tiny.parent / "flow.safetensors")), CPU), CPU)


def test_plans_name_real_timesteps(pipe):
    plan = make_plan(pipe.cfg, CacheOptions(interval=2))
    assert plan.timesteps == (1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0)
    assert plan.full == (True, False, True, False, True, False, True, False)
    shifted = make_plan(replace(pipe.cfg, time_shift=9.0), CacheOptions(interval=4))
    assert shifted.full == (True, True, True, True, True, False, False, False)  # four are at 900 and above


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_a_seed_names_a_clip_with_a_cache(pipe, method):
    """With guidance, alone and in a batch; a cached run is near its twin and not equal to it."""
    cached = with_options(pipe, sample_method=method, cache=CacheOptions(interval=2))
    uncached = with_options(pipe, sample_method=method, cache=CacheOptions(interval=1))
    together, twin = (sample_latents(each, [3, 4], [0, 2]) for each in (cached, uncached))
    alone = sample_latents(cached, [4], [2])
    assert (alone[0] - together[1]).norm() < 1e-4 * alone.norm()
    assert 0 < (together - twin).norm() < twin.norm()


def test_heun_counts_two_evaluations_a_step(pipe):
    """15 calls for 8 steps in plan, MACs, model and progress; the cache's interval counts calls."""
    heun = with_options(pipe, sample_method="heun", cache=CacheOptions(interval=2))
    plan, one_step = heun.plan, make_plan(replace(pipe.cfg, num_sampling_steps=1), CacheOptions(interval=1))
    assert plan.timesteps == make_plan(pipe.cfg).timesteps and len(plan.full) == 15
    assert "".join("F" if full else "c" for full in plan.full) == "FcFcFcFcFcFcFcF"
    assert plan.macs_uncached == 15 * one_step.macs
    line = describe_plan(heun.cfg, plan)
    assert "heun 8 with guidance 2: 8 full and 7 cached steps" in line
    calls, ticks = [], []
    hook = pipe.model.blocks[4].register_forward_hook(lambda *_: calls.append(1))
    sample_latents(heun, [0], [1], on_step=lambda: ticks.append(1))
    hook.remove()
    assert len(calls) == 8 and len(ticks) == 15
    assert choose_plan(heun, list(plan.full)).full == plan.full
    with pytest.raises(UserError, match="plan: 8 steps, but the run has 15"):
        choose_plan(heun, [True] * 8)


def test_recipes_hold_real_timesteps(pipe, tmp_path):
    """A recipe of the plan's own steps gives its samples, through a file; heun is no recipe's solver."""
    plan = make_plan(replace(pipe.cfg, sample_method="unipc", time_shift=3.0), CacheOptions(interval=2))
    steps = tuple(Step(t, w) for t, w in zip(plan.timesteps, plan.weights, strict=True))
    recipe = Recipe("r", "unipc", 1, steps, {"num_sampling_steps": 8}, fingerprint(pipe.cfg))
    save_recipe(tmp_path / "r.json", recipe)
    assert load_recipe(tmp_path / "r.json") == recipe and recipe.made_for["process"] == "flow"
    ours = sample_latents(with_options(pipe, recipe=str(tmp_path / "r.json")), [5], [1])
    theirs = with_options(pipe, sample_method="unipc", time_shift=3.0, cache=CacheOptions(interval=2))
    assert ours.equal(sample_latents(theirs, [5], [1]))
    with pytest.raises(UserError, match="solver: 'heun' is unknown; valid: fitted, ddpm, ddim, euler, dpm"):
        replace(recipe, solver="heun")


def test_recipes_of_older_files_are_of_the_gaussian_process(tmp_path):
    made_for = {"prediction": "v"}
    recipe = Recipe("r", "ddim", 1, (Step(5),), {"num_sampling_steps": 8}, made_for)
    save_recipe(tmp_path / "r.json", recipe)
    assert "process" not in json.loads((tmp_path / "r.json").read_text())["made_for"]
    assert load_recipe(tmp_path / "r.json").made_for == {"process": "gaussian", "prediction": "v"}


def test_moves_of_lines_are_euler_and_of_second_order():
    """First-order moves are Euler's steps; second-order ones come nearer to the exact flow with as many."""
    diffusion, z = flow(20), noise(4, 1, 4, 3, 3)
    times = angles_of(diffusion)
    np.testing.assert_allclose(times, np.arange(20, -1, -1) / 20, atol=1e-6)
    errors = {}
    for order in (1, 2):
        moves = [prior_move(times, i - 1 if i and order == 2 else None, i, i + 1, straight=True) for i in range(20)]
        method = partial(linear_multistep, moves)
        x = diffusion.sample_loop(Oracle(), z.shape, z, clip_denoised=False, method=method)
        errors[order] = (x - MEAN - STD * z).norm()
        if order == 1:
            euler = diffusion.sample_loop(Oracle(), z.shape, z, clip_denoised=False, method="euler")
            torch.testing.assert_close(x, euler, rtol=1e-4, atol=1e-5)
    assert errors[2] < errors[1] / 3


def test_a_fit_through_every_step_repeats_the_reference(pipe, tmp_path):
    pipe = with_options(pipe, sample_method="ddim")
    record(pipe, tmp_path, [0, 1, 2], every_step=True)
    plan = fitted_candidate(pipe.cfg, "fitted", pipe.plan.timesteps, "").plan
    fit = fit_moves(pipe, tmp_path, [[0, 1], [2]], plan, Environment(rank=0, world_size=1, device=CPU), lambda: None)
    assert max(fit.errors) < 1e-3 and fit.moves[0][2:] == [0, 0, 0]


def test_calibration_refuses_heun(pipe):
    cfg = calibrate.CalibrateConfig(**vars(pipe.cfg) | {"sample_method": "heun"})
    with pytest.raises(UserError, match="heun runs the model twice in a step"):
        calibrate.check(cfg)


def test_stability_refuses_heun(pipe):
    cfg = stability.StabilityConfig(**vars(pipe.cfg) | {"sample_method": "heun", "num_sampling_steps": 20})
    with pytest.raises(UserError, match="heun runs the model twice in a step"):
        stability.configure(cfg, None, CPU)


def test_process_is_an_option_of_the_run(pipe):
    gaussian = replace(pipe.cfg, process="gaussian")
    assert make_diffusion(gaussian, 8).timestep_map == [0, 143, 285, 428, 571, 714, 856, 999]
    assert make_diffusion(pipe.cfg, 8).process == "flow"
