"""The transformer: names and sizes, initialisation, skips, the cache's mechanism and plan."""

import pytest
import torch

from configs import SampleConfig, UserError, load_config
from models import SIZES, get_models, parse_name
from models.hardware import fastest_attention
from models.latte import Latte
from models.layers import Attention, Mlp, PatchEmbed, gelu
from models.skip_cache import SkipCache, StaleFeatures, cached_step, forecast_weights, full_step, interval_plan

TINY = dict(input_size=4, hidden_size=16, depth=8, num_heads=2, num_frames=3, num_classes=5)


def tiny(**options) -> Latte:
    """A model in which every layer counts."""
    torch.manual_seed(0)
    model = Latte(**{**TINY, "num_skips": 2, **options}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(frames: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, frames, 4, 4, 4, generator=generator), torch.tensor([10, 990]), torch.tensor([1, 5])


def options(**values) -> SampleConfig:
    return load_config(SampleConfig, None, [f"{key}={value}" for key, value in values.items()])


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "depth", "hidden_size", "num_heads", "patch_size", "num_skips", "interval"),
    [
        ("Latte-XL/2", 28, 1152, 16, 2, 0, 1),
        ("Latte", 28, 1152, 16, 2, 0, 1),
        ("Latte-L/4", 24, 1024, 16, 4, 0, 1),
        ("Latte-skip", 28, 1152, 16, 2, 7, 1),
        ("Latte-skip-cache", 28, 1152, 16, 2, 7, 2),
        ("Latte-skip-cache-5", 28, 1152, 16, 2, 7, 5),
        ("LatteIMG-XL/2", 28, 1152, 16, 2, 0, 1),
        ("LatteIMG-skip-partial", 28, 1152, 16, 2, 2, 1),
        ("Latte-B/2-skip", 12, 768, 12, 2, 3, 1),
        ("Latte-S/8-skip-cache-3", 12, 384, 6, 8, 3, 3),
    ],
)
def test_name_says_the_dimensions(name, depth, hidden_size, num_heads, patch_size, num_skips, interval):
    variant = parse_name(name)
    assert (variant.depth, variant.hidden_size, variant.num_heads) == (depth, hidden_size, num_heads)
    assert (variant.patch_size, variant.num_skips, variant.cache_interval) == (patch_size, num_skips, interval)


@pytest.mark.parametrize("name", ["Latte-", "Latte-XXL/2", "latte-skip", "Latte-XL/3", "Latte-skip-cache-", "DiT-XL/2"])
def test_unknown_name_lists_the_valid_ones(name):
    with pytest.raises(UserError, match=r"unknown; valid: .*XL.*skip.*LatteIMG"):
        parse_name(name)


def test_xl_skip_has_the_published_number_of_parameters_and_tensors():
    with torch.device("meta"):
        by_class = get_models(options(model="Latte-skip", num_classes=101))
        unconditional = get_models(options(model="Latte-skip"))
    assert sum(p.numel() for p in by_class.parameters()) == 692_732_192
    assert (len(by_class.state_dict()), len(unconditional.state_dict())) == (321, 320)
    assert by_class.state_dict()["y_embedder.embedding_table.weight"].shape == (102, 1152)


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_every_size_has_skips_in_half_of_its_layers(size, patch):
    with torch.device("meta"):
        model = get_models(options(model=f"Latte-{size}/{patch}-skip"))
    assert model.num_skips == model.num_layers // 2 == len(model.skip_linears)


def test_options_win_over_the_name():
    model = get_models(
        options(model="Latte-skip", hidden_size=32, depth=8, num_heads=4, patch_size=4, in_channels=8, image_size=64)
    )
    assert (model.num_layers, model.num_skips, model.patch_size, model.in_channels) == (4, 2, 4, 8)
    assert get_models(options(model="Latte-XL/2", hidden_size=32, num_heads=4, depth=8, num_skips=1)).num_skips == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(depth=10), "depth: 10 is not a multiple of 4"),
        (dict(depth=8, num_skips=3), "num_skips: 3 is outside 0 ... 2"),
        (dict(image_size=250), "image_size: 250 is not a multiple of 16"),
        (dict(extras=2), "num_classes is not set"),
        (dict(extras=78), "extras: 78 is unknown"),
        (dict(hidden_size=30), "hidden_size: 30"),
    ],
)
def test_dimensions_that_do_not_fit_are_one_line(values, message):
    with pytest.raises(UserError, match=message) as caught, torch.device("meta"):
        get_models(options(model="Latte-skip", **values))
    assert "\n" not in str(caught.value)


def test_extras_1_ignores_the_classes():
    with torch.device("meta"):
        assert get_models(options(model="Latte-S/2", num_classes=101, extras=1)).y_embedder is None


# --- the transformer -------------------------------------------------------------------------------------------------


def test_fresh_model_is_zero_and_its_layers_pass_their_input_on():
    """adaLN-zero: blocks start as the identity, the output as zero."""
    model = Latte(**TINY, num_skips=0)
    x, t, y = inputs()
    assert model(x, t, y).abs().max() == 0
    tokens, c = model.embed(x, t, y)
    torch.testing.assert_close(model.layer(1, tokens, c), tokens)
    for linear in (block.attn.qkv for block in model.blocks):
        bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert linear.weight.abs().max() <= bound and linear.bias.abs().max() == 0


@pytest.mark.parametrize("num_skips", [0, 1, 2])
@pytest.mark.parametrize("depth", [4, 8, 12, 24])
def test_every_depth_uses_every_layer_and_skip(depth, num_skips):
    """Each weight gets a gradient."""
    num_skips = min(num_skips, depth // 4)
    model = tiny(depth=depth, num_skips=num_skips)
    model(*inputs()).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert unused == []


def test_skip_carries_the_early_layer_past_the_inner_ones():
    """With the inner layers' features fixed, the output still follows the input, through the outer skip alone."""
    model = tiny()
    (x, t, y), other = inputs(), torch.randn(2, 3, 4, 4, 4)
    _, deep = full_step(model, 1, x, t, y)
    assert not torch.allclose(cached_step(model, 1, x, t, y, deep), cached_step(model, 1, other, t, y, deep))


def test_stills_do_not_touch_the_clip_nor_each_other():
    """The temporal block passes stills by: changing one changes no other frame."""
    model = tiny()
    x, t, y = inputs(frames=5)
    y_image = torch.tensor([[0, 2], [3, 4]])
    out = model(x, t, y, y_image)
    changed = x.clone()
    changed[:, 4] += 1
    again = model(changed, t, y, y_image)
    torch.testing.assert_close(again[:, :4], out[:, :4])
    assert not torch.allclose(again[:, 4], out[:, 4])
    torch.testing.assert_close(model(x[:, :3], t, y), out[:, :3])


def test_still_follows_its_own_label():
    model = tiny()
    x, t, y = inputs(frames=5)
    out = model(x, t, y, torch.tensor([[0, 2], [3, 4]]))
    other = model(x, t, y, torch.tensor([[0, 1], [3, 4]]))
    same = torch.tensor([[True] * 4 + [False], [True] * 5])
    assert torch.equal((out - other).flatten(2).abs().amax(-1) < 1e-6, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_modes_agree(dtype):
    model, (x, t, y) = tiny().to(dtype), inputs()
    model.set_attention("math")
    plain = model(x, t, y)
    model.set_attention("sdpa")
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (model(x, t, y) - plain).float().norm() <= tolerance * plain.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_blocks_parts_are_those_of_timm_bit_for_bit(dtype, fused):
    """Names, first weights and outputs of attention, MLP and patch embedding; published checkpoints rely on them."""
    from timm import layers as theirs

    pairs = [
        (Attention(32, 4), theirs.Attention(32, 4, qkv_bias=True), (6, 16, 32)),
        (Mlp(32, 128), theirs.Mlp(32, 128, act_layer=lambda: torch.nn.GELU(approximate="tanh")), (6, 16, 32)),
        (PatchEmbed(2, 4, 32), theirs.PatchEmbed(8, 2, 4, 32), (3, 4, 8, 8)),
    ]
    for ours, timms, shape in pairs:
        timms.load_state_dict(ours.state_dict(), strict=True)
        ours.fused = timms.fused_attn = fused
        x = torch.randn(shape, dtype=dtype)
        assert torch.equal(ours.to(dtype)(x), timms.to(dtype)(x))


def test_fastest_attention_is_plain_only_for_bf16_on_a_cpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert fastest_attention(cpu, torch.bfloat16) == "math"
    assert fastest_attention(cpu, torch.float32) == fastest_attention(cuda, torch.bfloat16) == "sdpa"


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = tiny()
        model.gradient_checkpointing = checkpointing
        model(*inputs()).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*grads)


# --- the cache -------------------------------------------------------------------------------------------------------


def spaced(steps: int) -> list[int]:
    """`steps` original timesteps from noise to clean, both ends included."""
    return [round(i * 999 / (steps - 1)) for i in reversed(range(steps))]


@pytest.mark.parametrize(("steps", "full"), [(50, [28, 21, 17, 16, 14]), (250, [143, 108, 90, 80, 72])])
def test_number_of_full_steps_is_the_papers(steps, full):
    assert [sum(interval_plan(spaced(steps), interval)) for interval in range(2, 7)] == full


def test_plan_is_full_in_its_window_and_after_the_cache_is_emptied():
    plan = interval_plan([990, 950, 800, 700, 600, 500, 40, 30, 10], interval=3)
    assert plan == [True, True, False, True, False, False, True, True, True]
    plan = interval_plan([990, 950, 800, 700, 600, 500, 400, 30, 10], interval=3)
    assert plan == [True, True, False, True, False, False, True, False, True], "the first below stop may be cached"
    assert all(interval_plan(spaced(50), 1))
    with pytest.raises(UserError, match=r"cache.interval: 0"):
        interval_plan(spaced(50), 0)


def test_window_is_a_choice():
    assert sum(interval_plan(spaced(50), 2, start=1000, stop=0)) == 25
    assert sum(interval_plan(spaced(50), 1000, start=500, stop=0)) == sum(t >= 500 for t in spaced(50))


@torch.no_grad()
def test_all_full_plan_equals_the_model_bit_for_bit():
    model, (x, t, y) = tiny(), inputs()
    cache = SkipCache(model, [True, True], depth=2)
    assert torch.equal(cache(x, t, y), model(x, t, y)) and torch.equal(cache(x, t, y), model(x, t, y))


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_skips", [0, 1, 2])
def test_cached_step_on_the_same_input_equals_a_full_one(num_skips, depth):
    """What is kept of a step makes the step itself, with skips around all cached layers, around some, and without."""
    model, (x, t, y) = tiny(num_skips=num_skips), inputs()
    cache = SkipCache(model, [True, False], depth)
    torch.testing.assert_close(cache(x, t, y), cache(x, t, y))


@torch.no_grad()
@pytest.mark.parametrize(("num_skips", "depth"), [(0, 1), (1, 2)])
def test_without_skips_the_change_over_the_inner_layers_is_kept(num_skips, depth):
    """A cached step is the fresh head plus the last full step's change, then the tail (Delta-DiT, arXiv:2406.01125)."""
    model, (x, t, y) = tiny(num_skips=num_skips, depth=12), inputs()
    L = model.num_layers

    def parts(x):
        tokens, c = model.embed(x, t, y)
        skips = []
        head = model.run(range(depth), tokens, c, skips)
        return head, model.run(range(depth, L - depth), head, c, list(skips)), c, skips

    old_head, old_deep, _, _ = parts(x)
    head, _, c, skips = parts(x + 0.1)
    out = model.run(range(L - depth, L), head + (old_deep - old_head), c, skips)
    cache = SkipCache(model, [True, False], depth)
    cache(x, t, y)
    cached = cache(x + 0.1, t, y)
    torch.testing.assert_close(cached, model.unembed(out, c))
    assert not torch.allclose(cached, model(x + 0.1, t, y), atol=1e-4), "and no full step"


@pytest.mark.parametrize("num_skips", [0, 2])
def test_a_deep_feature_of_the_same_timestep_trains_like_the_model(num_skips):
    """The output and every gradient are the model's, although the first layer runs twice."""
    model, (x, t, y) = tiny(num_skips=num_skips), inputs()
    grads = []
    for output in (model(x, t, y), StaleFeatures(model)(x, t, x, t, y)):
        grads.append(torch.autograd.grad(output.square().mean(), [p for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(StaleFeatures(model)(x, t, x, t, y), model(x, t, y))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_a_stale_deep_feature_is_that_of_a_cached_step():
    model, (x, t, y) = tiny(), inputs()
    cache = SkipCache(model, [True, False])
    cache(x + 0.1, t + 5, y)
    torch.testing.assert_close(StaleFeatures(model)(x, t, x + 0.1, t + 5, y), cache(x, t, y))


@torch.no_grad()
def test_two_caches_on_one_model_share_nothing_and_leave_nothing():
    model, (x, t, y) = tiny(), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}, set(vars(model))
    alone = SkipCache(model, [True, False])
    wanted = [alone(x, t, y), alone(x + 1, t, y)]
    one, other = SkipCache(model, [True, False]), SkipCache(model, [True, False])
    first, _ = one(x, t, y), other(x * 2, t, y)
    torch.testing.assert_close([first, one(x + 1, t, y)], wanted)
    assert set(vars(model)) == before[1] and all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_forecast_is_exact_where_the_feature_is_a_polynomial_of_the_step(order):
    """From the last order + 1 full steps, however they lie; from fewer, its degree is lower."""
    plan = [True, True, True, True, False, True, False, False, True, False]
    coefficients = torch.tensor([2.0, -1.0, 0.5, 0.1])[: order + 1].double()  # of 1, step, step^2 ...

    def feature(step: int) -> torch.Tensor:
        return (coefficients * step ** torch.arange(order + 1)).sum().float()[None]

    numbers, seen = iter(range(len(plan))), {}

    def full(model, depth, x, t, y):
        return x, feature(next(numbers))

    def cached(model, depth, x, t, y, deep):
        seen[next(numbers)] = deep
        return x

    denoiser = SkipCache(tiny(), plan, order=order, steps=(full, cached))
    for _ in plan:
        denoiser(torch.zeros(1), torch.zeros(1))
    assert list(seen) == [4, 6, 7, 9]
    torch.testing.assert_close(seen, {step: feature(step) for step in seen}, rtol=1e-4, atol=1e-4)
    assert forecast_weights([True, False, False], order) == [[], [1.0], [1.0]]


def test_weights_of_any_number_and_size_are_applied_to_the_newest_features():
    """Also a single weight other than 1, and two weights where three features are kept."""
    features = iter(torch.tensor([1.0, 10.0, 100.0]))
    used = []
    steps = (lambda *_: (None, next(features)), lambda *call: used.append(call[-1].item()))
    weights = [[], [2.0], [], [3.0, -1.0], [], [1.0, 1.0, 1.0], [2.0, 1.0], [1.0]]
    denoiser = SkipCache(tiny(), [not each for each in weights], steps=steps, weights=weights)
    for _ in weights:
        denoiser(None, None)
    assert used == [2, 29, 111, 210, 100]


def test_order_that_no_forecast_has_is_refused():
    with pytest.raises(UserError, match=r"cache.order: 4 is outside 0 \.\.\. 3"):
        SkipCache(tiny(), [True], order=4)


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("num_skips", [0, 2])
def test_a_cache_of_more_layers_than_there_are_is_refused(num_skips, depth):
    with pytest.raises(UserError, match=rf"cache.depth: {depth} is outside 1 ... 2, half of the model's layers"):
        SkipCache(tiny(num_skips=num_skips), [True], depth)


def test_gelu_of_compiled_cpu_kernels_is_gelu_and_has_its_gradient(monkeypatch):
    x = torch.linspace(-20, 20, 100_001, requires_grad=True)
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    (slope,) = torch.autograd.grad(exact.sum(), x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours = gelu(x)
    (our_slope,) = torch.autograd.grad(ours.sum(), x)
    assert not torch.equal(ours, exact.float())  # it is the approximation that is tested
    torch.testing.assert_close(ours, exact.float(), rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(our_slope, slope, rtol=0, atol=1e-5)
    assert gelu(x.bfloat16()).dtype == torch.bfloat16
    assert torch.isfinite(gelu(torch.tensor([-1e4, 1e4], dtype=torch.bfloat16))).all()
