"""sample/pipeline.py: seeds name clips, runs share nothing, and nothing in a run waits for the device."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configs import CacheOptions, SampleConfig, UserError, load_config
from diffusion import make_diffusion
from diffusion.guidance import Guided
from models import get_models, hardware
from models.latte import Latte
from models.macs import count_parameters, step_macs
from models.skip_cache import SkipCache, cached_step, full_step, interval_plan
from sample import pipeline
from sample.pipeline import Pipeline, generate, load, resolve, sample_latents, with_options
from sample.plans import Plan, make_plan
from tests.conftest import save_random_weights

CPU = torch.device("cpu")
N2 = CacheOptions(interval=2, start=900, stop=50, depth=1)


def make_pipeline(cfg: SampleConfig, model: Latte, device: torch.device = CPU) -> Pipeline:
    """A pipeline that cannot decode."""
    return Pipeline(cfg, model, None, make_diffusion(cfg, cfg.num_sampling_steps), device, make_plan(cfg), model)


def options(tiny, *overrides: str) -> SampleConfig:
    return resolve(load_config(SampleConfig, tiny, overrides), CPU)


@pytest.fixture(scope="module")
def pipe(tiny) -> Pipeline:
    return load(options(tiny), CPU)


@pytest.fixture(scope="module")
def n2(pipe) -> Plan:
    return make_plan(pipe.cfg, N2)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_videos_are_in_range_and_shape(pipe):
    videos = generate(pipe, [0, 1], [2, 0])
    assert videos.shape == (2, 4, 3, 32, 32) and videos.dtype == torch.float32
    assert videos.abs().max() <= 1


def test_interval_1_equals_uncached_bit_for_bit(pipe):
    """SkipCache with a plan of full steps gives every bit of the model itself, guidance included."""
    plan = interval_plan(pipe.diffusion.timestep_map[::-1], interval=1)
    cached = replace(pipe, uncached=SkipCache(pipe.model, plan))
    assert torch.equal(sample_latents(cached, [5], [1]), sample_latents(pipe, [5], [1]))


@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("cache", [CacheOptions(interval=1), N2], ids=["uncached", "N2"])
def test_a_seed_names_a_clip_at_any_batch_size(tiny, pipe, method, cache):
    pipe = with_options(pipe, sample_method=method, cache=cache)
    together = sample_latents(pipe, [7, 8, 9], [0, 1, 2])
    for i, seed in enumerate([7, 8, 9]):
        assert relative(sample_latents(pipe, [seed], [i])[0], together[i]) < 1e-4
    assert relative(together[0], together[1]) > 0.1  # and seeds differ


def test_a_cached_run_differs_from_its_uncached_twin_but_stays_near(pipe, n2):
    uncached, cached = (sample_latents(pipe, [3], [0], plan) for plan in (None, n2))
    assert 0 < relative(cached, uncached) < 1


def test_two_caches_on_one_model_share_nothing(pipe, n2):
    """Two runs that take turns, step by step, give what each gives alone, though their batches differ."""
    alone = [sample_latents(pipe, [0], [1], n2), sample_latents(pipe, [1, 2], [0, 2], n2)]

    def progressive(seeds, labels):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        denoiser = pipeline.Guided(SkipCache(pipe.model, n2.full), pipe.cfg.cfg_scale, pipe.model.num_classes)
        shape, kwargs = (len(seeds), 4, 4, 4, 4), {"y": torch.tensor(labels)}
        return pipe.diffusion.ddim_sample_loop_progressive(denoiser, shape, None, False, kwargs, generators=generators)

    for a, b in zip(progressive([0], [1]), progressive([1, 2], [0, 2]), strict=True):
        last = a["sample"], b["sample"]
    assert torch.equal(last[0], alone[0]) and torch.equal(last[1], alone[1])


def test_an_aborted_run_leaves_nothing_behind(pipe, n2):
    """A run of another batch size dies after its cache was filled; the next run is as if it never was."""
    before = sample_latents(pipe, [4], [1], n2)
    state = set(vars(pipe.model)), set(vars(pipe.model.blocks[0]))

    def dies(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_latents(replace(pipe, steps=(pipe.steps[0], dies)), [1, 2, 3], [0, 0, 0], n2)
    assert torch.equal(sample_latents(pipe, [4], [1], n2), before)
    assert state == (set(vars(pipe.model)), set(vars(pipe.model.blocks[0])))


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_the_loop_never_waits_for_the_device(tiny, monkeypatch, method):
    """The whole cached and guided loop runs on meta tensors, where reading a value raises; but for its end."""
    cfg = options(tiny, f"sample_method={method}", "cache.interval=2", "attention_mode=math")
    with torch.device("meta"):
        model = get_models(cfg)
    pipe = make_pipeline(cfg, model, torch.device("meta"))
    host = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: host())  # meta has no generators
    monkeypatch.setattr(pipeline, "check_finite", lambda *_: None)
    assert sample_latents(pipe, [0, 1], [2, 0]).shape == (2, 4, 4, 4, 4)


@pytest.mark.slow
def test_compiled_loop_equals_eager(tiny, tmp_path):
    """use_compile compiles what is called, as one graph each: the full and the cached step, or the model."""
    cfg = options(tiny, "depth=4", f"ckpt={tmp_path}/two_layers.safetensors", "use_compile=true")
    save_random_weights(get_models(cfg), cfg.ckpt)
    compiled, eager = load(cfg, CPU), load(replace(cfg, use_compile=False), CPU)
    for cache in (CacheOptions(interval=1), N2):
        plan = make_plan(eager.cfg, cache)
        assert relative(sample_latents(compiled, [0], [1], plan), sample_latents(eager, [0], [1], plan)) < 1e-4


def test_bf16_stays_near_fp32_and_its_latents_are_fp32(tiny, pipe):
    half = load(options(tiny, "precision=bf16"), CPU)
    assert half.model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    latents = sample_latents(half, [0], [1])
    assert latents.dtype == torch.float32
    assert relative(latents, sample_latents(pipe, [0], [1])) < 0.1


def test_latents_that_are_not_finite_are_an_error(pipe):
    """A file would show NaN as black, and an evaluation score it."""

    def overflows(x, t, y):
        return torch.cat([x / 0, x], dim=2)

    cfg = replace(pipe.cfg, precision="bf16")
    with pytest.raises(UserError, match=r"seeds \[7\] are not finite in bf16; try precision=fp32"):
        sample_latents(replace(pipe, cfg=cfg, uncached=overflows), [7], [1])


def test_unconditional_model(tiny, tmp_path):
    cfg = options(tiny, "num_classes=null", "cfg_scale=1", "extras=1")
    model = get_models(cfg)
    pipe = make_pipeline(cfg, model)
    assert sample_latents(pipe, [0, 1], None, make_plan(cfg, N2)).shape == (2, 4, 4, 4, 4)


def test_step_macs():
    """At XL/2 a cached step with one outer layer is 14.3 % of a full one."""
    macs = step_macs(SampleConfig(model="Latte-skip", num_classes=101), depth=1)
    assert macs.cached / macs.full == pytest.approx(0.143, abs=5e-4)
    with torch.device("meta"):
        model = get_models(SampleConfig(model="Latte-skip", num_classes=101))
    assert sum(p.numel() for p in model.parameters()) == 692_732_192


@pytest.mark.parametrize("num_classes", [5, None])
def test_macs_with_stills(num_classes):
    """Stills pass by the temporal blocks, and with classes each has a row of conditioning of its own."""
    cfg = SampleConfig(model="Latte-S/4-skip", image_size=64, num_frames=4, num_classes=num_classes)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = get_models(cfg)
        model.set_attention("math")
        labels = {} if num_classes is None else dict(y=torch.empty(2).long(), y_image=torch.empty(2, 3).long())
        model(torch.empty(2, 4 + 3, 4, 8, 8), torch.empty(2), **labels)
    assert 2 * step_macs(cfg, stills=3).full == counter.get_total_flops() // 2


def count(model: Latte, depth: int) -> tuple[int, int]:
    """MACs of a full and of a cached step by torch's flop counter, on the meta device with plain-maths attention."""
    model.set_attention("math")  # the counter cannot see into the fused kernel
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(1, model.num_frames, model.in_channels, model.input_size, model.input_size)
        t = torch.empty(1, dtype=torch.long)
        y = None if model.num_classes is None else torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as full:
            _, kept = full_step(model, depth, x, t, y)
        with FlopCounterMode(display=False) as cached:
            cached_step(model, depth, x, t, y, kept)
    return full.get_total_flops() // 2, cached.get_total_flops() // 2


@pytest.mark.parametrize(
    "changes",
    [
        dict(model="Latte-skip", num_classes=101),
        dict(model="Latte-XL/2"),
        dict(model="Latte-B/4-skip", num_frames=8, learn_sigma=False, class_dropout_prob=0.0, num_classes=3),
        dict(model="Latte-S/8", image_size=64, mlp_ratio=2.5, in_channels=16),
        dict(model="LatteIMG-skip-partial", hidden_size=64, num_heads=4, image_size=32),
    ],
    ids=lambda changes: changes["model"],
)
def test_size_and_cost_are_those_that_torch_counts(changes):
    cfg = SampleConfig(**changes)
    with torch.device("meta"):
        model = get_models(cfg)
    assert count_parameters(cfg) == sum(p.numel() for p in model.parameters())
    for depth in (1, 2, 3):
        macs = step_macs(cfg, depth)
        assert (macs.full, macs.cached) == count(model, depth)


def test_step_macs_by_hand():
    """One block's products, written out: 2 x (adaLN + qkv + attention + projection + MLP) and the embedders."""
    cfg = SampleConfig(model="Latte-S/2", image_size=32, num_frames=4, hidden_size=16, depth=4, num_heads=2)
    D, F, T, C, p = 16, 4, 4, 4, 2
    tokens = F * T
    spatial, temporal = (2 * tokens * length * D for length in (T, F))  # q k' and a v
    block = 6 * D * D + tokens * (3 + 1 + 8) * D * D
    ends = tokens * C * p * p * D + 256 * D + D * D + 2 * D * D + tokens * D * p * p * 2 * C
    assert step_macs(cfg).full == 2 * (2 * block + spatial + temporal) + ends


@pytest.mark.parametrize(
    ("model", "block", "interval"),
    [
        ("Latte-skip", {}, 1),
        ("Latte-skip-cache", {}, 2),
        ("Latte-skip-cache-4", {}, 4),
        ("Latte-skip-cache-4", {"stop": 100}, 4),
        ("Latte-skip-cache-4", {"interval": 3}, 3),
        ("Latte-XL/2", {}, 1),
    ],
)
def test_interval_comes_from_the_cache_block_else_from_the_name(model, block, interval):
    cfg = SampleConfig(model=model, num_classes=101, cache=CacheOptions(**block))
    assert resolve(cfg, CPU).cache.interval == interval


@pytest.mark.parametrize(
    ("units", "chosen"),
    [({"amx_bf16"}, "bf16"), ({"avx512_bf16"}, "bf16"), ({"avx512f", "avx512_fp16"}, "fp32"), (set(), "fp32")],
)
@pytest.mark.parametrize("use_fp16", [True, False])
def test_a_cpu_computes_in_the_type_it_has_units_for(monkeypatch, tmp_path, units, chosen, use_fp16):
    """Also with use_fp16: fp16 would run in software."""
    (tmp_path / "cpuinfo").write_text(f"model name : A processor\nflags\t\t: fpu {' '.join(units)}\n\nflags : other\n")
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    assert resolve(SampleConfig(use_fp16=use_fp16), CPU).precision == chosen


def test_use_fp16_means_fp16_on_cuda_and_an_explicit_precision_wins(monkeypatch):
    cuda = torch.device("cuda")
    assert resolve(SampleConfig(use_fp16=True), cuda).precision == "fp16"
    assert resolve(SampleConfig(use_fp16=True, precision="fp32"), cuda).precision == "fp32"
    for bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, bf16=bf16: bf16)
        assert resolve(SampleConfig(), cuda).precision == ("bf16" if bf16 else "fp32")


def test_attention_follows_the_precision():
    assert resolve(SampleConfig(precision="bf16"), CPU).attention_mode == "math"
    assert resolve(SampleConfig(precision="fp32"), CPU).attention_mode == "sdpa"
    assert resolve(SampleConfig(precision="bf16", attention_mode="sdpa"), CPU).attention_mode == "sdpa"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sample_method=plms"],
            "sample_method: 'plms' is unknown; valid: ddpm, ddim, euler, heun, dpmsolver++, unipc",
        ),
        (["precision=int8"], "precision: 'int8' is unknown"),
        (["precision=fp16"], "precision: fp16 runs in software on a CPU"),
        (["attention_mode=flash"], "attention_mode: 'flash' is unknown"),
        (["cache.interval=0"], "cache.interval: 0 is less than 1"),
        (["cache.interval=2", "cache.depth=3"], "cache.depth: 3 is outside 1 ... 2"),
        (["num_classes=null"], "this model has no classes; use cfg_scale=1"),
        (["class_dropout_prob=0"], "this model has no null label"),
        (["ckpt=null"], "ckpt is not set"),
        (["ckpt=/path/to/x.pt"], "ckpt still holds the placeholder /path/to/x.pt"),
        (["ckpt=/nowhere.pt"], "ckpt: nothing at /nowhere.pt; published weights: python pretrained/download_ckpts.py"),
        (["ckpt=/tmp"], "no checkpoint /tmp (a folder)"),
        (["pretrained_model_path=/nowhere"], "pretrained_model_path: nothing at /nowhere"),
        (["vae=mse"], "no VAE in"),
        (["image_size=64"], "image_size=32"),
        (["num_frames=8"], "the file has num_frames=4"),
    ],
)
def test_every_mistake_is_one_line(tiny, overrides, message):
    with pytest.raises(UserError) as error:
        load(options(tiny, *overrides), CPU)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_pipeline_with_other_options_has_their_steps_and_plan(pipe):
    short = with_options(pipe, num_sampling_steps=4, cache=N2)
    assert short.diffusion.num_timesteps == len(short.plan.full) == 4 and short.plan.name == "N2"
    assert short.model is pipe.model and pipe.plan.name == "uncached" and len(pipe.plan.full) == 6


def test_a_list_of_full_steps_is_a_plan(pipe):
    """N2 on 6 steps is 0,2,4: the same clips, bit for bit, and the same cost."""
    explicit, n2 = (make_plan(pipe.cfg, cache) for cache in (CacheOptions(full_steps=[0, 2, 4]), N2))
    assert (explicit.name, explicit.macs, explicit.full) == ("0,2,4", n2.macs, n2.full)
    assert explicit.record()["cache"]["full_steps"] == [0, 2, 4] and explicit.record()["text"] == "0,2,4"
    assert torch.equal(sample_latents(pipe, [3], [0], explicit), sample_latents(pipe, [3], [0], n2))
    assert make_plan(pipe.cfg, CacheOptions(full_steps=[0, 1, 4])).record()["steps"] == "FFccFc"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "must begin with 0"),
        ([1, 4], "must begin with 0"),
        ([0, 4, 1], "and rise"),
        ([0, 1, 1], "and rise"),
        ([0, 6], "6 is no step of 6, 0 ... 5"),
        ([0, -1], "must begin with 0"),
    ],
)
def test_a_list_of_full_steps_that_makes_no_sense_is_named(pipe, steps, message):
    with pytest.raises(UserError, match=r"cache\.full_steps: ") as error:
        make_plan(pipe.cfg, CacheOptions(full_steps=steps))
    assert message in str(error.value)


@pytest.mark.parametrize("num_steps", [4, 5, 7])
def test_a_skip_cache_serves_one_run_of_the_length_of_its_plan(pipe, num_steps):
    """The sampling loop says so before the first step; called by hand, the SkipCache says it after its last one."""
    shape, loop = (1, 4, 4, 4, 4), pipe.diffusion.ddim_sample_loop
    denoiser = Guided(SkipCache(pipe.model, [True] * num_steps), 2.0, null_label=3)
    with pytest.raises(UserError, match=f"the SkipCache has {num_steps} steps left, the run has 6"):
        loop(denoiser, shape, model_kwargs={"y": torch.tensor([0])})
    cache = SkipCache(pipe.model, [True, False] * 3)
    loop(cache, shape, model_kwargs={"y": torch.tensor([0])})
    with pytest.raises(UserError, match="has 0 steps left, the run has 6: make a new one"):
        loop(cache, shape, model_kwargs={"y": torch.tensor([0])})
    with pytest.raises(UserError, match="this SkipCache has run all steps of its plan"):
        cache(torch.zeros(shape), torch.tensor([999]), torch.tensor([0]))


def test_a_plan_knows_its_steps_name_and_cost(pipe):
    """Timesteps 999, 799, 600, 400, 200, 0: full at t >= 900 and at every second step; guidance doubles the rows."""
    plan, macs = make_plan(pipe.cfg, N2), step_macs(pipe.cfg)
    assert plan.full == (True, False, True, False, True, False)
    assert plan.macs == 2 * (3 * macs.full + 3 * macs.cached) and plan.macs_uncached == 2 * 6 * macs.full
    assert plan.record()["steps"] == "FcFcFc" and plan.share == plan.macs / plan.macs_uncached
