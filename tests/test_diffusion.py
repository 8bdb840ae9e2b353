"""Schedules, losses, samplers and guidance on denoisers whose right answer is known in closed form."""

import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from configs import UserError
from diffusion import create_diffusion
from diffusion.guidance import Guided
from diffusion.sampling import SAMPLERS, evaluations, randn_per_sample
from diffusion.schedule import space_timesteps

OUTPUTS = load_file(Path(__file__).parent / "data" / "reference" / "outputs.safetensors")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPE = (2, 3, 4, 2, 2)  # (B, F, C, H, W)
MEAN, STD = 0.5, 0.3  # of the toy data set


class GaussianDenoiser:
    """The optimal denoiser of data N(MEAN, STD^2) under the 1000 original timesteps; remembers how it was called."""

    def __init__(self, prediction: str = "eps", dtype: torch.dtype = torch.float32, learn_sigma: bool = False):
        self.prediction, self.dtype, self.learn_sigma = prediction, dtype, learn_sigma
        self.alphas_cumprod = torch.from_numpy(create_diffusion("").alphas_cumprod)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls.append((x, t))
        a = self.alphas_cumprod.to(x.device)[t].view(-1, *[1] * (x.ndim - 1))
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        eps = sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        x0 = (x - sigma * eps) / alpha
        out = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.prediction].to(self.dtype)
        return torch.cat([out, torch.tanh(out)], dim=-3) if self.learn_sigma else out


def ode_solution(z: Tensor) -> Tensor:
    """Where the probability flow from timestep 999 carries z, for the toy data."""
    a = create_diffusion("").alphas_cumprod[-1]
    return MEAN + STD * (z - math.sqrt(a) * MEAN) / math.sqrt(a * STD**2 + 1 - a)


def seeded(*seeds: int, device: str = "cpu") -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def fixed(respacing: str | int = 10, **options):
    return create_diffusion(respacing, learn_sigma=False, **options)


# Schedules


@pytest.mark.parametrize("respacing", ["full", "50", "250", "ddim25", "10,20,30"])
def test_tables_equal_the_originals(respacing):
    """Timesteps are those recorded from the original, tables agree to float64 rounding."""
    diffusion = create_diffusion("" if respacing == "full" else respacing)
    assert diffusion.timestep_map == OUTPUTS[f"diff/{respacing}/timesteps"].tolist()
    assert diffusion.num_timesteps == len(diffusion.timestep_map)
    for name in ("betas", "posterior_log_variance_clipped"):
        np.testing.assert_allclose(getattr(diffusion, name), OUTPUTS[f"diff/{respacing}/{name}"].numpy(), rtol=1e-10)


def test_respacing():
    """Counts include both ends, ddimN strides from 0, "" and None keep all, sections are independent."""
    every = list(range(1000))
    assert space_timesteps(1000, "") == space_timesteps(1000, None) == space_timesteps(1000, 1000) == every
    assert space_timesteps(1000, "ddim50") == every[::20]
    assert space_timesteps(1000, 50) == space_timesteps(1000, "50")
    assert space_timesteps(1000, "1") == [0]
    assert space_timesteps(10, "2,3") == [0, 4, 5, 7, 9]
    # Ties fall as in a running sum of the stride: 10 x 49.95 is 499.5, the sum of ten is just below.
    assert space_timesteps(1000, "21")[9:12] == [450, 499, 549]


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("ddim300", '"ddim300"; the nearest is "ddim334"'),
        ("ddim10,20", "ddim"),
        ("1001", "only 1000"),
        ("400,20,30", "400 steps where there are only 334"),
        ("fifty", 'valid forms: "50"'),
        ("-5", 'valid forms: "50"'),
        (0, 'valid forms: "50"'),
        ("10,,20", 'valid forms: "50"'),
    ],
)
def test_impossible_respacing_is_one_line(respacing, message):
    with pytest.raises(UserError, match=message) as error:
        create_diffusion(respacing)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(noise_schedule="cosine"), "linear, squaredcos_cap_v2"),
        (dict(prediction="epsilon"), "eps, x0, v"),
        (dict(diffusion_steps=20), "more than 20"),
    ],
)
def test_unknown_options_list_the_valid_ones(options, message):
    with pytest.raises(UserError, match=message):
        create_diffusion(**options)


def test_cosine_betas_agree_with_diffusers():
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    betas = create_diffusion(noise_schedule="squaredcos_cap_v2").betas
    np.testing.assert_allclose(betas, scheduler.betas.numpy(), rtol=1e-5)


def test_fewer_diffusion_steps_end_in_the_same_noise():
    """Linear betas scale with the number of steps, so the last noise level stays about the same."""
    log_snr = [math.log(create_diffusion(diffusion_steps=n).alphas_cumprod[-1]) for n in (500, 1000)]
    assert log_snr[0] == pytest.approx(log_snr[1], rel=0.02)


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is the normalised product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    diffusion = create_diffusion("50")
    t = torch.tensor([1, 7, 49])
    x0, x_t = torch.randn(2, 3, 1, 1, 1, 1)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x0, x_t, t)
    beta, a_prev = (
        torch.from_numpy(table)[t].view(x0.shape) for table in (diffusion.betas, diffusion.alphas_cumprod_prev)
    )
    precision = (1 - beta) / beta + 1 / (1 - a_prev)
    expected = ((1 - beta).sqrt() / beta * x_t + a_prev.sqrt() / (1 - a_prev) * x0) / precision
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), 1 / precision, rtol=1e-5, atol=0)
    torch.testing.assert_close(log_variance, variance.log(), rtol=1e-5, atol=1e-5)


def test_q_sample_is_one_jump_of_the_forward_process():
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise with a_t of the original timestep; noise defaults to a fresh draw."""
    diffusion, t = create_diffusion("50"), torch.tensor([0, 30])
    x0, noise = torch.randn(2, *SHAPE)
    a = torch.from_numpy(create_diffusion("").alphas_cumprod)[torch.tensor(diffusion.timestep_map)[t]].view(
        2, 1, 1, 1, 1
    )
    expected = a.sqrt() * x0 + (1 - a).sqrt() * noise
    torch.testing.assert_close(diffusion.q_sample(x0, t, noise).double(), expected, rtol=1e-5, atol=1e-6)
    torch.manual_seed(3)
    drawn = diffusion.q_sample(x0, t)
    torch.manual_seed(3)
    assert drawn.equal(diffusion.q_sample(x0, t, torch.randn_like(x0)))


# Losses


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("device", DEVICES)
def test_perfect_prediction_has_no_loss(prediction, device):
    """A model that knows noise and data has mse 0, and with the posterior's variance a bound of 0 at t > 0."""
    diffusion = create_diffusion(prediction=prediction)
    t = torch.tensor([1, 500, 999], device=device)
    x0, noise = torch.randn(2, 3, *SHAPE[1:], device=device)
    a = torch.from_numpy(diffusion.alphas_cumprod).float().to(device)[t].view(3, 1, 1, 1, 1)
    truth = {"eps": noise, "x0": x0, "v": a.sqrt() * noise - (1 - a).sqrt() * x0}[prediction]
    output = torch.cat([truth, torch.full_like(truth, -1)], dim=2)
    losses = diffusion.training_losses(lambda x, t: output, x0, t, noise=noise)
    assert losses["mse"].shape == losses["vb"].shape == losses["loss"].shape == (3,)
    assert losses["mse"].max() < 1e-10
    assert losses["vb"].abs().max() < 1e-5


def test_variational_bound_agrees_with_torch_distributions():
    """KL at t > 0 and discretized likelihood at t = 0, in bits per dimension; loss = mse + vb."""
    diffusion = create_diffusion("")
    t = torch.tensor([0, 0, 1, 800])
    x0, noise = torch.randn(2, 4, *SHAPE[1:]).clamp(-1, 1)
    x0[1] = x0[1].sign()  # the outermost bins, which reach to infinity
    output = torch.cat([noise + 0.3 * torch.randn_like(noise), torch.rand_like(noise)], dim=2)
    losses = diffusion.training_losses(lambda x, t: output, x0, t, noise=noise)

    x_t = diffusion.q_sample(x0, t, noise)
    p = {k: v.double() for k, v in diffusion.p_mean_variance(lambda x, t: output, x_t, t, clip_denoised=False).items()}
    model = Normal(p["mean"], p["log_variance"].mul(0.5).exp())
    mean, _, log_variance = diffusion.q_posterior_mean_variance(x0, x_t, t)
    kl = kl_divergence(Normal(mean.double(), log_variance.double().mul(0.5).exp()), model)
    upper, lower = model.cdf(x0.double() + 1 / 255), model.cdf(x0.double() - 1 / 255)
    upper[x0 > 0.999], lower[x0 < -0.999] = 1, 0
    nll = -(upper - lower).clamp(min=1e-12).log()
    bits = torch.cat([nll[:2], kl[2:]]).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(losses["vb"][2:].double(), bits[2:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["vb"][:2].double(), bits[:2], rtol=2e-2, atol=0)  # its cdf is an approximation
    torch.testing.assert_close(losses["mse"], ((noise - output[:, :, :4]) ** 2).flatten(1).mean(1))
    assert losses["loss"].equal(losses["mse"] + losses["vb"])


def test_bound_trains_only_the_variance():
    """The bound's gradient is zero on the mean's channels and not on the variance's; also after a preview sampled
    under inference_mode with the same object."""
    diffusion = create_diffusion("5")
    with torch.inference_mode():
        diffusion.ddim_sample_loop(GaussianDenoiser(learn_sigma=True), SHAPE)
    output = torch.randn(2, 3, 8, 2, 2, requires_grad=True)
    losses = diffusion.training_losses(lambda x, t: output, torch.randn(SHAPE), torch.tensor([0, 3]))
    (mean, variance) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)[0].chunk(2, dim=2)
    assert not mean.any() and variance.flatten(1).any(1).all()
    (mean, variance) = torch.autograd.grad(losses["mse"].sum(), output)[0].chunk(2, dim=2)
    assert mean.any() and not variance.any()


def test_fixed_variance_has_mse_only():
    """Without a learned variance the loss is the mse; the model gets original timesteps and its keyword arguments."""
    seen = {}

    def model(x, t, y):
        seen.update(t=t, y=y)
        return torch.zeros_like(x, dtype=torch.bfloat16)

    labels = torch.tensor([1, 0])
    losses = fixed("50").training_losses(model, torch.randn(SHAPE), torch.tensor([0, 49]), dict(y=labels))
    assert losses.keys() == {"mse", "loss"} and losses["loss"].equal(losses["mse"])
    assert losses["loss"].dtype == torch.float32
    assert seen["t"].tolist() == [0, 999] and seen["y"] is labels


def test_fixed_variance_at_the_first_timestep():
    """beta, and at t = 0 the posterior's variance of t = 1."""
    diffusion = fixed("10")
    p = diffusion.p_mean_variance(GaussianDenoiser(), torch.randn(3, 1, 4, 2, 2), torch.tensor([0, 1, 5]))
    expected = [diffusion.posterior_variance[1], diffusion.betas[1], diffusion.betas[5]]
    np.testing.assert_allclose(p["variance"].amax((1, 2, 3, 4)).numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(p["variance"].log(), p["log_variance"])


# Samplers


@pytest.mark.parametrize("respacing", ["", "7"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_ddpm_agrees_with_diffusers(variance, clip, respacing):
    """Every step of DDPM is diffusers' DDPMScheduler's, on the same noise, with a fixed and a learned variance."""
    learn_sigma = variance == "learned_range"
    options = dict(learn_sigma=learn_sigma, diffusion_steps=40)
    diffusion = create_diffusion(respacing, **options)
    betas = create_diffusion(**options).betas
    scheduler = diffusers.DDPMScheduler(40, trained_betas=betas, variance_type=variance, clip_sample=clip)
    scheduler.set_timesteps(timesteps=diffusion.timestep_map[::-1])
    model = GaussianDenoiser(learn_sigma=learn_sigma)
    z = torch.randn(2, 4, 3, 3)

    theirs, generators = z, seeded(5, 6)
    ours = diffusion.p_sample_loop_progressive(model, z.shape, z, clip, generators=seeded(5, 6))
    for timestep, step in zip(scheduler.timesteps, ours, strict=True):
        output = model(theirs, timestep.expand(2)).float()
        result = scheduler.step(output, timestep, theirs, generator=generators)
        theirs = result.prev_sample
        torch.testing.assert_close(step["sample"], theirs, rtol=1e-4, atol=1e-4)
        # (x - sigma eps) / alpha, with an alpha of 0.002 at the first step: it magnifies fp32's 1e-7 to 1e-4.
        torch.testing.assert_close(step["pred_xstart"], result.pred_original_sample, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_ddim_is_equation_12(eta, clip):
    """DDIM steps follow the paper's equations 12 and 16 in float64 over the listed timesteps."""
    diffusion, model, generators = fixed("20"), GaussianDenoiser(), seeded(8, 9)
    out = diffusion.ddim_sample_loop(model, SHAPE, clip_denoised=clip, generators=seeded(8, 9), eta=eta)

    x = randn_per_sample(SHAPE, generators).double()
    a = [1.0, *create_diffusion("").alphas_cumprod[diffusion.timestep_map]]
    for i in range(20, 0, -1):
        eps = model(x, torch.full((2,), diffusion.timestep_map[i - 1])).double()
        x0 = (x - math.sqrt(1 - a[i]) * eps) / math.sqrt(a[i])
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - math.sqrt(a[i]) * x0) / math.sqrt(1 - a[i])
        sigma = eta * math.sqrt((1 - a[i - 1]) / (1 - a[i])) * math.sqrt(1 - a[i] / a[i - 1])
        x = math.sqrt(a[i - 1]) * x0 + math.sqrt(1 - a[i - 1] - sigma**2) * eps
        if eta:
            x += sigma * randn_per_sample(SHAPE, generators)
    torch.testing.assert_close(out.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("method", "scheduler_class"),
    [("dpmsolver++", diffusers.DPMSolverMultistepScheduler), ("unipc", diffusers.UniPCMultistepScheduler)],
)
def test_multistep_solvers_are_those_of_diffusers(method, scheduler_class, prediction):
    """Up to the step into timestep 0 a whole process equals diffusers' scheduler with our betas and its conversions."""
    name = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[prediction]
    diffusion, model, z = fixed("", prediction=name, diffusion_steps=40), GaussianDenoiser(name), torch.randn(SHAPE)
    scheduler = scheduler_class(
        40, trained_betas=diffusion.betas, prediction_type=prediction, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(40)
    assert scheduler.timesteps.tolist() == diffusion.timestep_map[::-1]
    assert_steps_equal(scheduler, diffusion, model, z, method)


def test_dpmsolver_takes_our_timesteps():
    """Over respaced timesteps DPM-Solver++ is diffusers' scheduler of the full process given our list."""
    diffusion = fixed("12")
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, trained_betas=create_diffusion("").betas)
    scheduler.set_timesteps(timesteps=diffusion.timestep_map[::-1])
    assert_steps_equal(scheduler, diffusion, GaussianDenoiser(), torch.randn(SHAPE), "dpmsolver++")


def assert_steps_equal(scheduler, diffusion, model, z: Tensor, method: str) -> None:
    """All but the last two steps, which are first order here and not there."""
    x = z
    steps = diffusion.sample_loop_progressive(model, SHAPE, z, clip_denoised=False, method=method)
    for timestep, step in list(zip(scheduler.timesteps, steps, strict=True))[:-2]:
        x = scheduler.step(model(x, timestep.expand(2)).float(), timestep, x).prev_sample
        torch.testing.assert_close(step["sample"], x, rtol=1e-3, atol=1e-3)


def test_dpmsolver_ends_with_two_steps_of_ddim():
    """DPM-Solver++ of first order is DDIM, so the step into timestep 0 and the one out of it are DDIM's."""
    diffusion, model = fixed("20"), GaussianDenoiser()
    steps = diffusion.sample_loop_progressive(model, SHAPE, clip_denoised=False, method="dpmsolver++")
    *_, before, into_zero, out_of_zero = (step["sample"] for step in steps)
    ddim = SAMPLERS["ddim"](diffusion, None, before.device, 0.0)
    for i, x, expected in ((1, before, into_zero), (0, into_zero, out_of_zero)):
        t = torch.tensor([i, i])
        p = diffusion.p_mean_variance(model, x, t, clip_denoised=False)
        torch.testing.assert_close(ddim(x, t, p), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("device", DEVICES)
def test_samples_have_the_datas_mean_and_variance(method, device):
    """With the optimal denoiser of a Gaussian, 4096 x 8 samples have its moments to a few standard errors."""
    diffusion = fixed("200")
    generator = torch.Generator(device).manual_seed(0)
    torch.manual_seed(0)
    z = torch.randn(4096, 2, 2, 2, device=device, generator=generator)
    x = diffusion.sample_loop(GaussianDenoiser(), z.shape, z, clip_denoised=False, method=method)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.007)
    assert x.std().item() == pytest.approx(STD, rel=0.03)


def test_deterministic_methods_converge_to_the_exact_flow():
    """Against the probability flow's closed form DDIM's error halves with the step, the multistep solvers' falls faster
    and is a fifth of DDIM's at 50 steps; nowhere do they fall behind it."""
    z = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def error(method: str, steps: int) -> float:
        x = fixed(steps).sample_loop(GaussianDenoiser(), z.shape, z, clip_denoised=False, method=method)
        return (x - ode_solution(z)).square().mean().sqrt().item() / STD

    ddim = {steps: error("ddim", steps) for steps in (10, 25, 50)}
    assert ddim[25] / ddim[50] == pytest.approx(2, rel=0.1)
    for method in ("dpmsolver++", "unipc", "heun"):
        errors = {steps: error(method, steps) for steps in ddim}
        assert errors[25] / errors[50] > 4
        assert errors[50] < ddim[50] / 5
        assert errors[10] < ddim[10]


@pytest.mark.parametrize("method", SAMPLERS)
def test_predictions_give_one_trajectory(method):
    """The same denoiser expressed as eps, x0 or v walks the same path."""
    paths = []
    for prediction in ("eps", "x0", "v"):
        loop = fixed(prediction=prediction).sample_loop_progressive
        steps = loop(GaussianDenoiser(prediction), SHAPE, clip_denoised=False, method=method, generators=seeded(1, 2))
        paths.append(torch.stack([step["sample"] for step in steps]))
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(paths[0], paths[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_few_steps_are_finite(method, steps):
    """Even one step, where the posterior has no variance and DDIM at eta 1 keeps no noise."""
    for schedule in ("linear", "squaredcos_cap_v2"):
        diffusion = fixed(steps, noise_schedule=schedule)
        assert diffusion.sample_loop(GaussianDenoiser(), SHAPE, method=method, eta=1.0).isfinite().all()


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("device", DEVICES)
def test_denoiser_sees_original_timesteps_once_each(method, device):
    """One call a step (Heun: two, but for the first), in the reversed order of timestep_map, on fp32 states even where
    the denoiser is in bf16."""
    diffusion, model = create_diffusion("ddim25"), GaussianDenoiser(dtype=torch.bfloat16, learn_sigma=True)
    x = diffusion.sample_loop(model, SHAPE, device=device, model_kwargs=dict(y=torch.tensor([1, 2])), method=method)
    assert [t.tolist() for _, t in model.calls] == [[t, t] for t in evaluations(method, diffusion.timestep_map[::-1])]
    assert {t.dtype for _, t in model.calls} == {torch.int64}
    assert {state.dtype for state, _ in model.calls} == {x.dtype} == {torch.float32}
    assert x.device.type == device and not x.requires_grad


@pytest.mark.parametrize("method", SAMPLERS)
def test_progressive_form_ends_in_the_loops_sample(method):
    """A result for each call of the model, the last the loop's; the x_0 estimates are clipped when asked for."""
    diffusion = fixed()
    arguments = dict(shape=SHAPE, clip_denoised=True, generators=None, method=method)
    torch.manual_seed(0)
    steps = list(diffusion.sample_loop_progressive(GaussianDenoiser(), **arguments))
    torch.manual_seed(0)
    assert steps[-1]["sample"].equal(diffusion.sample_loop(GaussianDenoiser(), **arguments))
    assert len(steps) == {"heun": 19}.get(method, 10)
    assert all(step["pred_xstart"].abs().max() <= 1 for step in steps)
    assert any(step["sample"].abs().max() > 1 for step in steps)


def test_known_names_are_methods_of_the_one_loop():
    """p_sample_loop and ddim_sample_loop, positional arguments as users of the original write them."""
    diffusion, z = fixed(), torch.randn(SHAPE)
    for method, loop, progressive in (
        ("ddpm", diffusion.p_sample_loop, diffusion.p_sample_loop_progressive),
        ("ddim", diffusion.ddim_sample_loop, diffusion.ddim_sample_loop_progressive),
    ):
        results = []
        for sample in (
            lambda *args, method=method: diffusion.sample_loop(*args, method=method),
            loop,
            lambda *args, progressive=progressive: list(progressive(*args))[-1]["sample"],
        ):
            torch.manual_seed(0)
            results.append(sample(GaussianDenoiser(), SHAPE, z, False, {}, "cpu", False))
        assert results[0].equal(results[1]) and results[0].equal(results[2])


@pytest.mark.parametrize("method", SAMPLERS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_names_a_sample(method, device):
    """A generator's sample is the same to the bit alone and in any batch, and another seed's is another."""
    loop = fixed().sample_loop

    def sample(*seeds: int) -> Tensor:
        shape = (len(seeds), *SHAPE[1:])
        generators = seeded(*seeds, device=device)
        return loop(GaussianDenoiser(), shape, device=device, generators=generators, method=method, eta=1.0)

    batch = sample(7, 8, 9)
    assert batch[1:2].equal(sample(8)) and batch[[2, 0]].equal(sample(9, 7))
    assert not batch[0].equal(batch[1])


def test_randn_per_sample():
    """One draw of the sample's shape per generator; None draws what torch.randn_like draws."""
    noise = randn_per_sample(SHAPE, seeded(1, 2))
    assert noise[1].equal(torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(2)))
    torch.manual_seed(4)
    noise = randn_per_sample(SHAPE, None)
    torch.manual_seed(4)
    assert noise.dtype == torch.float32 and noise.equal(torch.randn_like(torch.empty(SHAPE)))
    with pytest.raises(AssertionError, match="1 generators for 2 samples"):
        randn_per_sample(SHAPE, seeded(1))


@pytest.mark.parametrize(
    ("method", "eta", "draws"),
    [("ddpm", 0.0, 10), ("ddim", 0.0, 0), ("ddim", 0.5, 10), ("dpmsolver++", 0.0, 0), ("unipc", 0.0, 0)],
)
def test_number_of_draws(method, eta, draws):
    """From given noise DDPM and DDIM with eta draw once a step, the last included; the others never."""
    z = torch.randn(SHAPE)
    torch.manual_seed(0)
    fixed().sample_loop(GaussianDenoiser(), SHAPE, z, method=method, eta=eta)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    for _ in range(draws):
        torch.randn_like(z)
    assert torch.get_rng_state().equal(after)


@pytest.mark.parametrize("method", SAMPLERS)
def test_an_aborted_run_leaves_nothing_behind(method):
    """A run dropped after 3 steps and one whose denoiser fails change nothing in the next; gradients stay on."""
    diffusion, z = fixed(), torch.randn(SHAPE)

    def sample(model):
        return diffusion.sample_loop(model, SHAPE, z, generators=seeded(1, 2), method=method)

    before = sample(GaussianDenoiser())

    steps = diffusion.sample_loop_progressive(GaussianDenoiser(), SHAPE, z, method=method)
    for _ in range(3):
        next(steps)
        assert torch.is_grad_enabled()
    steps.close()
    failing = GaussianDenoiser()
    failing.alphas_cumprod = failing.alphas_cumprod[:500]
    with pytest.raises(IndexError):
        sample(failing)

    assert torch.is_grad_enabled()
    assert sample(GaussianDenoiser()).equal(before)


def test_interleaved_runs_share_nothing():
    """Two runs of a stateful solver, stepped in turn on one diffusion, end where each ends alone."""
    diffusion, z = fixed(), torch.randn(2, *SHAPE)
    runs = [diffusion.sample_loop_progressive(GaussianDenoiser(), SHAPE, noise, method="unipc") for noise in z]
    *_, last = zip(*runs, strict=True)
    for step, noise in zip(last, z, strict=True):
        assert step["sample"].equal(diffusion.sample_loop(GaussianDenoiser(), SHAPE, noise, method="unipc"))


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("method", SAMPLERS)
def test_loops_run_on_meta_tensors(method, learn_sigma):
    """No step reads a tensor's value: a whole guided loop runs where there are none."""
    diffusion = create_diffusion("50", learn_sigma=learn_sigma)
    model = Guided(GaussianDenoiser(learn_sigma=learn_sigma), scale=4.0, null_label=5)
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    for eta in (0.0, 1.0):
        x = diffusion.sample_loop(model, SHAPE, device="meta", model_kwargs=dict(y=labels), method=method, eta=eta)
        assert x.is_meta and x.shape == SHAPE
    assert len(model.denoiser.calls) == 2 * {"heun": 99}.get(method, 50)


@pytest.mark.parametrize("method", SAMPLERS)
def test_loop_copies_nothing_to_the_device(method, monkeypatch):
    """Tables and noise levels are on the device before the first step; from there on nothing is copied to it."""
    diffusion, model = create_diffusion("10"), GaussianDenoiser(learn_sigma=True)
    model.alphas_cumprod = model.alphas_cumprod.to("meta")
    read_output, copy = diffusion.p_mean_variance, Tensor.to

    def checked_copy(self, *args, **kwargs):
        result = copy(self, *args, **kwargs)
        assert result.device == self.device, "copied to another device inside the loop"
        return result

    def first_thing_in_a_step(*args):
        monkeypatch.setattr(Tensor, "to", checked_copy)
        return read_output(*args)

    monkeypatch.setattr(diffusion, "p_mean_variance", first_thing_in_a_step)
    assert diffusion.sample_loop(model, SHAPE, device="meta", method=method, eta=1.0).is_meta
    assert len(model.calls) == {"heun": 19}.get(method, 10) and Tensor.to is checked_copy


@pytest.mark.parametrize("method", SAMPLERS)
def test_loop_records_no_graph(method):
    """A denoiser with weights leaves no autograd graph in the samples."""
    weight, model = torch.nn.Parameter(torch.ones(())), GaussianDenoiser()
    steps = fixed(3).sample_loop_progressive(lambda x, t: weight * model(x, t), SHAPE, method=method)
    assert not any(step["sample"].requires_grad or step["pred_xstart"].requires_grad for step in steps)


def test_progress_bar_names_the_method(capsys):
    fixed(3).ddim_sample_loop(GaussianDenoiser(), SHAPE, progress=True)
    assert "ddim" in capsys.readouterr().err
    fixed(3).ddim_sample_loop(GaussianDenoiser(), SHAPE)
    assert not capsys.readouterr().err


def test_unknown_method_lists_the_samplers():
    with pytest.raises(UserError, match=r"'plms' is unknown; valid: ddpm, ddim, euler, heun, dpmsolver\+\+, unipc$"):
        fixed().sample_loop(GaussianDenoiser(), SHAPE, method="plms")


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_out_of_range(eta):
    with pytest.raises(UserError, match=f"eta is {eta}"):
        fixed().ddim_sample_loop(GaussianDenoiser(), SHAPE, eta=eta)


def test_wrong_number_of_channels_is_an_assertion():
    """A denoiser that predicts no variance, read as if it did, fails at once."""
    with pytest.raises(AssertionError, match="output"):
        create_diffusion("5").ddim_sample_loop(GaussianDenoiser(), SHAPE)


# Guidance


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_guidance_formula(learn_sigma):
    """One call on 2B rows, labels then null labels; eps = null + scale (cond - null); the variance is the labels'."""
    calls = []

    def denoiser(x, t, y):
        calls.append((x, t, y))
        eps = x * t.view(-1, 1, 1, 1, 1) + y.view(-1, 1, 1, 1, 1)
        return (torch.cat([eps, -eps], dim=2) if learn_sigma else eps).bfloat16()

    x, t, y = torch.randn(SHAPE), torch.tensor([3, 5]), torch.tensor([0, 4])
    out = Guided(denoiser, scale=7.0, null_label=9)(x, t, y)
    [(x2, t2, y2)] = calls
    assert x2.equal(torch.cat([x, x])) and t2.tolist() == [3, 5, 3, 5] and y2.tolist() == [0, 4, 9, 9]
    cond, null = denoiser(x, t, y).float(), denoiser(x, t, torch.full_like(y, 9)).float()
    torch.testing.assert_close(out[:, :, :4], null[:, :, :4] + 7 * (cond - null)[:, :, :4])
    assert out[:, :, 4:].equal(cond[:, :, 4:])
    assert out.dtype == torch.float32 and out.shape == cond.shape


def test_scale_one_is_the_denoiser_itself():
    """No doubled batch, and the very output."""
    result = torch.randn(SHAPE)
    rows = []

    def denoiser(x, t, y):
        rows.append(len(x))
        return result

    assert Guided(denoiser, scale=1.0, null_label=9)(torch.randn(SHAPE), torch.ones(2), torch.ones(2)) is result
    assert rows == [2]


def test_guidance_scale_zero_samples_the_null_label():
    """scale 0 ignores the label: a loop with it equals the loop of the null label alone."""

    def denoiser(x, t, y):
        return 0.1 * y.view(-1, 1, 1, 1, 1) * torch.tanh(x)

    loop, z = fixed().ddim_sample_loop, torch.randn(SHAPE)
    guided = loop(Guided(denoiser, 0.0, null_label=5), SHAPE, z, model_kwargs=dict(y=torch.tensor([1, 2])))
    plain = loop(denoiser, SHAPE, z, model_kwargs=dict(y=torch.tensor([5, 5])))
    torch.testing.assert_close(guided, plain)
