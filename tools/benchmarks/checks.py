"""The checks of tools/cuda.py: what can only be seen on a GPU, and the same at tiny sizes on a CPU.

A check yields cases, each a name and a function that returns the case's rows. A check runs in a process of its own, so
that neither an exception nor a crash of the driver nor a hang ends the others.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from configs import SampleConfig, TrainConfig
from diffusion import Diffusion, make_diffusion
from diffusion.guidance import Guided
from diffusion.sampling import linear_multistep
from models import get_models
from models.autoencoder import LatentCodec
from models.hardware import DTYPES, describe_machine, timed
from models.latte import Latte
from models.macs import step_macs
from models.skip_cache import SkipCache, compile_steps
from sample.distributed import distributed
from sample.pipeline import Pipeline, resolve, sample_latents
from sample.plans import Plan, make_plan, parse_plan, recipe_plan
from sample.recipes import FITTED, Recipe, Step
from tools.benchmarks.conformance import LIMITS, conformance_errors, is_loop, relative_error
from tools.benchmarks.sampling import matmul_rate
from tools.benchmarks.scaling import PUBLISHED_VAE
from tools.benchmarks.training import random_batch, run_with, training_step
from tools.benchmarks.turns import time_steps
from tools.recipes.fit import prior_move
from tools.recipes.search import angles_of

Row = dict[str, Any]  # "result": passed, failed, measured or skipped; and metrics
Cases = Iterator[tuple[str, Callable[[], list[Row]]]]
OPTIONAL = {"diffusers"}  # packages whose absence skips a case
SMALL = dict(image_size=32, num_frames=4, hidden_size=32, depth=8, num_heads=2)
PAPER = {"uncached": 10.02, "N2": 6.40, "N3": 5.24, "N4": 4.57, "N5": 4.35, "N6": 4.12}  # seconds, arXiv:2411.17616
PAPER_CLIPS = 3
SMALL_VAE = PUBLISHED_VAE | dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)


@dataclass(frozen=True)
class Setting:
    """Where the checks run, and whether at tiny sizes."""

    device: torch.device
    small: bool
    num_gpus: int

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        """torch.compile's; on a CPU without code generation, which takes longer than all checks."""
        return "inductor" if self.is_gpu else "eager"


def verdict(error: float, limit: float, **facts: Any) -> Row:
    """Returns the row of an error that has a limit; NaN fails."""
    return {"result": "passed" if error <= limit else "failed", "error": error, "limit": limit} | facts


def random_model(cfg: SampleConfig | TrainConfig, device: torch.device) -> Latte:
    """Returns a model in which no weight is zero: on a GPU, products with zeros are faster."""
    torch.manual_seed(0)
    with device:
        model = get_models(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=model.pos_embed.shape[-1] ** -0.5)
    return model


def random_pipeline(at: Setting, **options: Any) -> Pipeline:
    """Returns the pipeline of Skip-DiT XL/2 for UCF101 with random weights and without a VAE."""
    options = dict(cfg_scale=7.0, sample_method="ddim", num_sampling_steps=50) | options | (SMALL if at.small else {})
    cfg = resolve(SampleConfig(model="Latte-skip", num_classes=101, **options), at.device)
    model = random_model(cfg, at.device).to(DTYPES[cfg.precision]).eval().requires_grad_(False)
    model.set_attention(cfg.attention_mode)
    diffusion = make_diffusion(cfg, cfg.num_sampling_steps)
    return Pipeline(cfg, model, None, diffusion, at.device, make_plan(cfg), uncached=model)


def ddim_moves(diffusion: Diffusion) -> list[list[float]]:
    """Returns DDIM's steps in the form of a fitted solver's, from noise to clean."""
    angles = angles_of(diffusion)
    return [prior_move(angles, None, i, i + 1) for i in range(len(angles) - 1)]


def make_recipes(cfg: SampleConfig) -> list[Recipe]:
    """Returns two recipes of the cost and form that tools/calibrate.py finds; the coefficients are DDIM's."""
    N, recipes = cfg.num_sampling_steps, []
    for name, steps, cache in (("", round(0.42 * N), "uncached"), (", full as in N4", N, "N4-o1")):
        plan = make_plan(replace(cfg, num_sampling_steps=steps), parse_plan(cache))
        moves = ddim_moves(make_diffusion(cfg, steps))
        made = tuple(map(partial(Step, guided=True), plan.timesteps, plan.weights, moves))
        recipes.append(Recipe(f"recipe, {steps} steps{name}", FITTED, 1, made, {"num_sampling_steps": N}, {}))
    return recipes


# ---------------------------------------------------------------------------------------------------------------------
# The checks
# ---------------------------------------------------------------------------------------------------------------------


def machine(at: Setting) -> Cases:
    """What it is, and how fast it multiplies."""
    yield "machine", lambda: [{"result": "measured", "note": describe_machine(at.device)}]
    for name in ("fp32", "bf16") + ("fp16",) * at.is_gpu:
        rate = partial(matmul_rate, at.device, DTYPES[name], repeats=1 if at.small else 10)
        yield f"matmul rate, {name}", lambda rate=rate: [{"result": "measured", "matmul_gflops": 2 * rate() / 1e9}]


def conformance(at: Setting) -> Cases:
    """The original's recorded outputs, in each type; in fp32 also with TF32 convolutions, torch's default."""

    def rows(dtype: torch.dtype, tf32: bool) -> list[Row]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32) if at.is_gpu else nullcontext():
            errors = dict(conformance_errors(at.device, dtype, loops=not at.small))
        limits = LIMITS[torch.float16] if tf32 and dtype == torch.float32 else LIMITS[dtype]  # as long mantissas
        kinds = {"forward passes and losses": False, "sampling loops": True}
        return [
            verdict(max(found), limit, kind=kind, note=f"the largest of {len(found)}")
            for (kind, loop), limit in zip(kinds.items(), limits, strict=True)
            if (found := [error for key, error in errors.items() if is_loop(key) == loop])
        ]

    yield "conformance, fp32", partial(rows, torch.float32, False)
    yield "conformance, bf16", partial(rows, torch.bfloat16, False)
    if at.is_gpu:
        yield "conformance, fp32 with TF32 convolutions", partial(rows, torch.float32, True)
        yield "conformance, fp16", partial(rows, torch.float16, False)


def no_waits(at: Setting) -> Cases:
    """The sampling loop never waits for the device; a CPU stands in with meta tensors, of which none can be read."""
    device = at.device if at.is_gpu else torch.device("meta")
    cfg = SampleConfig(model="Latte-skip", num_classes=101, num_sampling_steps=10, **SMALL)
    model, diffusion, plan = (
        random_model(cfg, device).eval(),
        make_diffusion(cfg, 10),
        make_plan(cfg, parse_plan("N2-o1")),
    )
    solvers = {name: name for name in ("ddpm", "ddim", "dpmsolver++")}
    solvers["fitted"] = partial(linear_multistep, ddim_moves(diffusion))

    def loop(solver: str | Callable) -> list[Row]:
        generators = [torch.Generator(device).manual_seed(seed) for seed in range(2)] if at.is_gpu else None
        denoiser = Guided(SkipCache(model, plan.full, weights=plan.weights), 7.0, 101)
        y = torch.zeros(2, dtype=torch.long, device=device)
        steps = diffusion.sample_loop_progressive(
            denoiser, (2, 4, 4, 4, 4), None, False, {"y": y}, device, generators=generators, method=solver
        )
        next(steps)  # copies the tables
        if at.is_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            deque(steps, maxlen=0)
        finally:
            if at.is_gpu:
                torch.cuda.set_sync_debug_mode("default")
        return [{"result": "passed", "note": "guided, N2-o1" + ("" if at.is_gpu else ", on meta tensors")}]

    for name, solver in solvers.items():
        yield f"no wait in a loop, {name}", partial(loop, solver)


def seeds(at: Setting) -> Cases:
    """A seed is one clip at any batch size."""
    for name, plan, options in (("DDPM", "uncached", {"sample_method": "ddpm"}), ("DDIM with N2", "N2", {})):
        steps = 4 if at.small else 20
        depth = {} if at.small else {"depth": 8}
        pipe = random_pipeline(at, precision="fp32", num_sampling_steps=steps, **depth, **options)

        def compare(pipe: Pipeline, plan: Plan) -> list[Row]:
            clips = {}
            for size in (6, 1, 2):
                batches = torch.arange(6).split(size)
                clips[size] = torch.cat([sample_latents(pipe, b.tolist(), b.tolist(), plan) for b in batches])
            errors = [
                relative_error(ours, clip) for size in (1, 2) for ours, clip in zip(clips[size], clips[6], strict=True)
            ]
            return [verdict(max(errors), 1e-4, note="batches of 1 and 2 against 6, fp32")]

        yield f"seeds, {name}", partial(compare, pipe, make_plan(pipe.cfg, parse_plan(plan)))


def compiled(at: Setting) -> Cases:
    """The full and the cached step are a graph each, and no run compiles again."""
    eager = random_pipeline(at, precision="bf16", num_sampling_steps=10 if at.small else 50)
    full, cached = compile_steps(at.backend)
    pipe = replace(eager, uncached=lambda x, t, y: full(eager.model, 1, x, t, y)[0], steps=(full, cached))
    plans = {name: make_plan(pipe.cfg, parse_plan(name)) for name in ("uncached", "N2", "N3-o1")}
    run = {
        name: partial(sample_latents, pipe, range(PAPER_CLIPS), [0] * PAPER_CLIPS, plan) for name, plan in plans.items()
    }

    def graphs() -> list[Row]:
        counters.clear()
        latents, seconds = timed(at.device, run["N2"])
        first = counters["stats"]["unique_graphs"]
        again = [timed(at.device, each)[1] for each in run.values()]
        later, breaks = counters["stats"]["unique_graphs"] - first, len(counters["graph_break"])
        note = f"{first} graphs, then {later} more, {breaks} breaks; the first run took {seconds:.0f} s"
        rows = [{"result": "passed" if (first, later, breaks) == (2, 0, 0) else "failed", "note": note}]
        uncompiled = sample_latents(eager, range(PAPER_CLIPS), [0] * PAPER_CLIPS, plans["N2"])
        rows.append(verdict(relative_error(latents, uncompiled), 0.05, kind="against eager", note="N2, bf16"))
        for name, value in zip(run, again, strict=True):
            rows.append({"result": "measured", "kind": name, "seconds": value, "note": f"{PAPER_CLIPS} clips"})
        return rows

    yield "compiled, guidance 7", graphs


def sampling(at: Setting) -> Cases:
    """DDIM-50 of three clips, as the paper times it: every plan against the ratio of the MACs."""
    pipe = random_pipeline(at, precision="bf16", num_sampling_steps=5 if at.small else 50)
    rate = matmul_rate(at.device, torch.bfloat16)

    def times(scale: float, names: list[str], recipes: list[Recipe]) -> list[Row]:
        cfg = replace(pipe.cfg, cfg_scale=scale)
        scaled = replace(pipe, cfg=cfg)
        plans = {name: make_plan(cfg, parse_plan(name)) for name in names}
        plans |= {recipe.name: recipe_plan(recipe, cfg) for recipe in recipes}
        runs = {
            name: partial(sample_latents, scaled, range(PAPER_CLIPS), [0] * PAPER_CLIPS, plan)
            for name, plan in plans.items()
        }
        found = time_steps(at.device, runs, 1 if at.small else 2, lambda name: "uncached")
        held = torch.cuda.memory_allocated() if at.is_gpu else 0
        return [
            found[name]
            | {"result": "measured", "kind": name, "expected_speedup": 1 / plan.share}
            | {"paper_seconds": None if at.small else PAPER.get(name)}
            | {"share_of_matmul_rate": PAPER_CLIPS * plan.macs / found[name]["seconds"] / rate}
            | {"peak_bytes": held + found[name]["peak_bytes"]}
            for name, plan in plans.items()
        ]

    title = f"DDIM-{pipe.cfg.num_sampling_steps}, bf16"
    yield f"{title}, without guidance", lambda: times(1.0, ["uncached", "N2"], [])
    yield (
        f"{title}, guidance 7",
        lambda: times(7.0, ["uncached", "N2", "N3", "N4", "N5", "N6"], make_recipes(pipe.cfg)),
    )


def decoding(at: Setting) -> Cases:
    """The VAE of the published size, in fp32 as everywhere: three clips."""

    def times() -> list[Row]:
        from diffusers import AutoencoderKL

        torch.manual_seed(0)
        codec = LatentCodec(AutoencoderKL(**SMALL_VAE if at.small else PUBLISHED_VAE).to(at.device))
        size, frames = (32, 4) if at.small else (256, 16)
        latents = torch.randn(PAPER_CLIPS, frames, 4, size // 8, size // 8, device=at.device)
        videos = torch.randn(PAPER_CLIPS, frames, 3, size, size, device=at.device)
        runs = {"decoding": partial(codec.decode, latents), "encoding": partial(codec.moments, videos)}
        found = time_steps(at.device, runs, 1 if at.small else 3, lambda name: name)
        return [
            {"result": "measured", "kind": name, "seconds": each["seconds"], "peak_bytes": each["peak_bytes"]}
            | {"clips_per_second": PAPER_CLIPS / each["seconds"]}
            for name, each in found.items()
        ]

    yield "VAE, fp32, three clips", times


def published_training(at: Setting) -> TrainConfig:
    """Returns the options of the published joint training (configs/ucf101/ucf101_img_train.yaml), but in bf16."""
    stills = dict(dataset="ucf101_img", use_image_num=8, local_batch_size=4)
    options = dict(learning_rate=5e-5, mixed_precision="bf16") | stills | (SMALL if at.small else {})
    return TrainConfig(model="LatteIMG-skip", num_classes=101, **options)


def training(at: Setting) -> Cases:
    """A training step at the published batch in bf16 autocast, with and without compile and checkpointing."""
    cfg = published_training(at)
    torch.set_float32_matmul_precision("high")  # as in training
    model, diffusion = random_model(cfg, at.device), make_diffusion(cfg)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=at.backend)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, fused=True)
    batch = random_batch(cfg, model, diffusion, at.device)
    macs = 3 * cfg.local_batch_size * step_macs(cfg, stills=cfg.use_image_num).full  # forward; twice that backward
    rate = matmul_rate(at.device, torch.bfloat16)

    def step(stance: str, checkpointing: bool) -> None:
        with torch.compiler.set_stance(stance):
            denoiser = partial(run_with, model, "sdpa", checkpointing)
            training_step(diffusion, batch, at.device, torch.bfloat16, optimizer, denoiser)

    def times(name: str, stance: str, checkpointing: bool) -> list[Row]:
        way = partial(step, stance, checkpointing)
        try:
            way()
        except torch.OutOfMemoryError:
            return [{"result": "skipped", "note": "it needs more memory than the GPU has"}]
        found = time_steps(at.device, {name: way}, 1 if at.small else 5, lambda name: name)[name]
        held = torch.cuda.memory_allocated() if at.is_gpu else 0
        return [
            {"result": "measured", "seconds": found["seconds"], "peak_bytes": held + found["peak_bytes"]}
            | {"clips_per_second": cfg.local_batch_size / found["seconds"]}
            | {"share_of_matmul_rate": macs / found["seconds"] / rate, "note": "4 clips with 8 stills each"}
        ]

    for word, stance in (("eager", "force_eager"), ("compiled", "default")):
        for checkpointing in (True, False):
            name = f"training step, bf16, {word}" + ", checkpointing" * checkpointing
            yield name, partial(times, name, stance, checkpointing)


def two_processes(at: Setting) -> Cases:
    """The gradient of two processes is that of one with both clips."""

    def run() -> list[Row]:
        if at.num_gpus == 1:
            return [{"result": "skipped", "note": "one GPU"}]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        ranks = [context.Process(target=_gradient_error, args=(rank, port, theirs), daemon=True) for rank in range(2)]
        for each in ranks:
            each.start()
        theirs.close()
        error = ours.recv()
        for each in ranks:
            each.join()
        return [verdict(error, 1e-5, note="DDP, " + ("nccl" if at.is_gpu else "gloo"))]

    yield "two processes", run


def _gradient_error(rank: int, port: int, results: Connection) -> None:
    """Sends the error of the first process's gradients, over DDP, to those of both processes' clips in one batch."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in place.items()})
    with distributed() as env:
        model = random_model(SampleConfig(model="Latte-skip", num_classes=101, **SMALL), env.device)
        x, t, y = torch.randn(2, 4, 4, 4, 4), torch.tensor([100, 700]), torch.tensor([3, 101])
        x, t, y = x.to(env.device), t.to(env.device), y.to(env.device)
        model(x, t, y).square().mean().backward()
        both = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        shared = DistributedDataParallel(model)
        shared(x[rank : rank + 1], t[rank : rank + 1], y[rank : rank + 1]).square().mean().backward()
        ours = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        if env.is_main:
            results.send(relative_error(ours, both))


CHECKS: dict[str, Callable[[Setting], Cases]] = {
    check.__name__: check
    for check in (machine, conformance, no_waits, seeds, two_processes, sampling, decoding, compiled, training)
}


# ---------------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------------


def failure(error: Exception) -> Row:
    """Returns the row of an exception."""
    missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in OPTIONAL
    note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {"result": "skipped" if missing else "failed", "note": note}


def run_cases(name: str, at: Setting) -> Iterator[Row]:
    """Yields the rows of a check. An exception is a row, too: of its case, or of the check if its cases share it."""
    try:
        for title, case in CHECKS[name](at):
            try:
                rows = case()
            except Exception as error:  # whatever a driver, a compiler or a kernel raises
                rows = [failure(error)]
            for row in rows:
                yield {"check": f"{title}: {row['kind']}" if "kind" in row else title} | row
    except Exception as error:
        yield {"check": name} | failure(error)


def _send_cases(name: str, at: Setting, results: Connection) -> None:
    for row in run_cases(name, at):
        results.send(row)


def count_gpus() -> int:
    """Returns the number of GPUs. A fork asks, as asking may start CUDA, after which there could be no forks."""
    process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(torch.cuda.device_count()))
    process.start()
    process.join()
    return process.exitcode


def run_check(name: str, at: Setting, seconds: float) -> Iterator[Row]:
    """Yields the rows of a check, which runs in a process of its own for at most so many seconds.

    The process is a fork, which imports nothing again. So this process must not have used CUDA.
    """
    start = time.monotonic()
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send_cases, args=(name, at, theirs))
    process.start()
    theirs.close()
    note = ""
    while not note:
        if not ours.poll(max(0.0, start + seconds - time.monotonic())):
            process.kill()
            note = "no time was left"
        else:
            try:
                yield ours.recv()
            except EOFError:
                break
    process.join()
    if note or process.exitcode:
        yield {"check": name, "result": "failed", "note": note or f"the process ended with {process.exitcode}"}
