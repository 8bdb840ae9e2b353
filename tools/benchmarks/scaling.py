"""Memory and time of training and sampling by number of GPUs, on paper.

Counted: multiply-adds (models/macs.py; the VAE's by torch's counter), and bytes, by a step on tensors without storage.
Given as options: the rates of the machine, and which share of them a program reaches.

A step takes the longer of reading and (products + VAE + update + the part of the gradients' traffic that shows).
"""

import weakref
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from configs import UserError, to_yaml
from diffusion import make_diffusion
from diffusion.guidance import Guided
from models import get_models
from models.autoencoder import LatentCodec, vae_file
from models.macs import count_parameters, readable, step_macs
from models.skip_cache import SkipCache
from models.vaes import own_class, vae_spec
from sample.plans import UNCACHED, Plan, make_plan
from tools.benchmarks.options import ScalingPlan
from tools.benchmarks.training import random_batch, run_with, training_step

PUBLISHED_VAE = dict(  # Stable Diffusion's, 83.7 million weights
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=4,
)
CPU = torch.device("cpu")
GPU_RESERVE = 2.0  # GB of CUDA's context, its libraries' workspaces and fragmentation (assumed)
# Muon is taken to need as many: its matrix products are not counted.
UPDATE_BYTES = 44  # per weight: AdamW reads 4 arrays and writes 3, the EMA reads 2 and writes 1, the norm reads 1; fp32
FVD_CLIPS = 2048


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside it; `peak` is the most that were held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self.alive:  # no view, and not changed in place
                    self.alive.add(storage._cdata)
                    self._change(storage.nbytes())
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return result

    def _free(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self._change(-size)

    def _change(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)


def training_bytes(cfg: ScalingPlan, batch: int, checkpointing: bool) -> tuple[int, int]:
    """Returns the optimizer's state, and what an eager step adds at its peak: activations and gradients."""
    from tools.common.training import create_optimizer, is_trained

    with FakeTensorMode(allow_non_fake_inputs=True):
        model, diffusion = get_models(cfg), make_diffusion(cfg)
        trained = [p.requires_grad_(is_trained(cfg, name, p)) for name, p in model.named_parameters()]
        trained = [p for p in trained if p.requires_grad]
        optimizer = create_optimizer(cfg, model)
        dtype = torch.float32 if cfg.mixed_precision == "no" else torch.bfloat16  # fp16 is as wide
        step = partial(
            training_step, diffusion, random_batch(replace(cfg, local_batch_size=batch), model, diffusion, CPU), CPU,
            dtype, optimizer, partial(run_with, model, "sdpa", checkpointing),
        )  # fmt: skip
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        with PeakBytes() as state:
            optimizer.step()
        optimizer.zero_grad()
        with PeakBytes() as count:
            step()
        return state.held, count.peak


@torch.no_grad()
def sampling_bytes(cfg: ScalingPlan) -> tuple[int, int]:
    """Returns the peaks over the weights, for a batch of clips: of two steps in bf16, and of decoding in fp32."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = get_models(cfg)
        finally:
            torch.set_default_dtype(torch.float32)
        for key in ("pos_embed", "temp_embed"):  # made in fp32 by name; `.to` cannot convert tensors without storage
            setattr(model, key, torch.nn.Parameter(getattr(model, key).bfloat16(), requires_grad=False))
        codec = make_codec(cfg)
        size, B = model.input_size, cfg.sampling_batch
        denoiser = SkipCache(model, [True, False], cfg.cache.depth)
        y = None
        if model.num_classes is not None:
            denoiser, y = Guided(denoiser, cfg.cfg_scale, model.num_classes), torch.zeros(B, dtype=torch.long)
        x, t = torch.randn(B, model.num_frames, model.in_channels, size, size), torch.full((B,), 500)
        with PeakBytes() as steps:
            for _ in range(2):
                denoiser(x, t, y)
        with PeakBytes() as decoding:
            codec.decode(x)
    return steps.peak, decoding.peak


def make_codec(cfg: ScalingPlan) -> LatentCodec:
    """Returns the VAE of the options, or where its folder is absent the published one, without weights.

    Raises:
        UserError: it is a class of one's own.
    """
    import diffusers

    if own_class(cfg.vae):
        raise UserError(f"vae: a plan counts the VAEs of diffusers, not {cfg.vae}; choose one of the same size")
    name, config = "AutoencoderKL", PUBLISHED_VAE
    try:
        folder, name = vae_file(cfg).parent, vae_spec(cfg).name
        config = getattr(diffusers, name).load_config(folder)
    except UserError:
        pass
    return LatentCodec(getattr(diffusers, name).from_config(config), cfg.vae_chunk_frames)


def vae_macs(codec: LatentCodec, cfg: ScalingPlan) -> tuple[int, int]:
    """Returns the MACs of encoding and of decoding a clip, divided by its frames."""
    videos = torch.empty(1, cfg.num_frames, 3, cfg.image_size, cfg.image_size, device="meta")
    with FlopCounterMode(display=False) as encoding:
        latents = codec.encode(videos)
    with FlopCounterMode(display=False) as decoding:
        codec.decode(latents)
    return tuple(count.get_total_flops() // 2 // cfg.num_frames for count in (encoding, decoding))


def traffic_seconds(cfg: ScalingPlan, gpus: int, nodes: int) -> float:
    """Returns the seconds of one all-reduce of the fp32 gradients: a ring within each node, then one over the nodes."""
    size = 4e-9 * count_parameters(cfg)  # GB
    ring = lambda members, rate: 2 * (members - 1) / members * size / rate  # noqa: E731
    return ring(min(gpus, cfg.gpus_per_node), cfg.gpu_link_gbs) + ring(nodes, cfg.node_link_gbs)


def training_step_seconds(cfg: ScalingPlan, encode_macs: int, gpus: int, nodes: int) -> dict[str, float]:
    """Returns the parts of a step and its total, in seconds, for `gpus` processes on `nodes`."""
    clips, frames = cfg.local_batch_size * cfg.gradient_accumulation_steps, cfg.num_frames + cfg.use_image_num
    rate = (cfg.fp32_tflops if cfg.mixed_precision == "no" else cfg.bf16_tflops) * 1e12 * cfg.training_share / 2
    forward = clips * step_macs(cfg, stills=cfg.use_image_num).full / rate
    parts = {
        "products": forward * (4 if cfg.gradient_checkpointing else 3),  # backward: twice the forward pass
        "vae": 0 if cfg.latents_path else clips * frames * encode_macs / (cfg.fp32_tflops * 1e12 * cfg.vae_share / 2),
        "update": UPDATE_BYTES * count_parameters(cfg) / (cfg.memory_gbs * 1e9),
    }
    backward = 2 * forward / cfg.gradient_accumulation_steps  # the last one, in which gradients travel
    traffic = traffic_seconds(cfg, gpus, nodes)
    parts["network"] = traffic - min(traffic, backward) * cfg.overlap
    reading = 0 if cfg.latents_path else clips / (max(1, cfg.num_workers) * cfg.read_clips)
    return parts | {"reading": reading, "traffic": traffic, "seconds": max(sum(parts.values()), reading)}


def describe(cfg: ScalingPlan) -> str:
    """The work that is planned.

    Raises:
        UserError: options that no training can have.
    """
    from tools.common.training import check_training_options  # here and above: it imports what reads videos

    check_training_options(replace(cfg, use_compile=False))  # a plan compiles nothing
    macs = step_macs(cfg, stills=cfg.use_image_num).full
    frames = f"{cfg.num_frames} frames and {cfg.use_image_num} stills at {cfg.image_size}"
    return f"{cfg.model}, {count_parameters(cfg):,} parameters; a clip of {frames}: {readable(macs)} forward"


def benchmark(cfg: ScalingPlan) -> dict[str, Any]:
    """The metrics for each number of GPUs, of training and of sampling, and what follows from them."""
    with torch.device("meta"):
        codec = make_codec(cfg)
    encode, decode = vae_macs(codec, cfg)
    vae_bytes = 4 * sum(p.numel() for p in codec.vae.parameters())
    places = [(1, 1)] * (1 not in [n * cfg.gpus_per_node for n in cfg.nodes])
    places += [(n * cfg.gpus_per_node, n) for n in cfg.nodes]
    name = lambda gpus, nodes: f"{gpus} GPU{'s' * (gpus > 1)}" + (f", {nodes} nodes" if nodes > 1 else "")  # noqa: E731

    # Training
    size = count_parameters(cfg)
    steps = {c: [training_bytes(cfg, k * cfg.local_batch_size, c) for k in (1, 2)] for c in (False, True)}
    peaks = {c: [peak for _, peak in pair] for c, pair in steps.items()}
    held = {"weights and EMA": 8 * size, "optimizer": steps[False][0][0], "DDP's buckets": 4 * size}  # in fp32
    held["VAE"] = 0 if cfg.latents_path else vae_bytes
    training = {}
    for gpus, nodes in places:
        parts = training_step_seconds(cfg, encode, gpus, nodes)
        clips = gpus * cfg.local_batch_size * cfg.gradient_accumulation_steps
        training[name(gpus, nodes)] = parts | {
            "clips_per_second": clips / parts["seconds"],
            "efficiency": (sum(parts[key] for key in ("products", "vae", "update"))) / parts["seconds"],
            "days": cfg.max_train_steps * parts["seconds"] / 86400,
            "peak_bytes": sum(held.values())
            + peaks[cfg.gradient_checkpointing][0]
            - (held["DDP's buckets"] if gpus == 1 else 0),
        }

    # Sampling
    sampling, (steps_peak, decode_peak) = {}, sampling_bytes(cfg)
    plans: list[Plan] = list({plan.name: plan for plan in (make_plan(cfg, UNCACHED), make_plan(cfg))}.values())
    for plan in plans:
        denoising = plan.macs / (cfg.bf16_tflops * 1e12 * cfg.sampling_share / 2)
        decoding = cfg.num_frames * decode / (cfg.fp32_tflops * 1e12 * cfg.vae_share / 2)
        for gpus, nodes in places:
            rate = gpus / (denoising + decoding)
            sampling[f"{plan.name}, {name(gpus, nodes)}"] = {
                "denoising": denoising,
                "vae": decoding,
                "clips_per_hour": 3600 * rate,
                "minutes": FVD_CLIPS / rate / 60,
                "peak_bytes": 2 * size + vae_bytes + max(steps_peak, decode_peak),
            }

    notes = training_notes(cfg, training, held, peaks)
    return {"machine": "paper: computed, not measured", "options": to_yaml(cfg), "ways": training} | {
        "sampling": sampling, "notes": notes, "macs": {"encoding a frame": encode, "decoding a frame": decode},
    }  # fmt: skip


def training_notes(
    cfg: ScalingPlan, rows: dict[str, dict], held: dict[str, int], peaks: dict[bool, list[int]]
) -> list[str]:
    """Returns what fills the memory, what saturates first, and the settings that follow, a line each."""
    (name, last), B = list(rows.items())[-1], cfg.local_batch_size
    budget = (cfg.gpu_memory - GPU_RESERVE) * 1e9 - sum(held.values())
    fits = {key: max(0, int(B + B * (budget - one) / (two - one))) for key, (one, two) in peaks.items()}  # affine
    batches = f"{fits[False]} clips fit in {cfg.gpu_memory:g} GB, with gradient_checkpointing {fits[True]}"
    gpu = sum(last[key] for key in ("products", "vae", "update"))
    busy = {"the GPU (products, VAE, update)": gpu, "reading": last["reading"], "the network": last["traffic"]}
    first, *rest = sorted(busy, key=busy.get, reverse=True)
    others = ", ".join(f"{key} {busy[key] / last['seconds']:.0%}" for key in rest)
    notes = [
        "memory, GB: " + ", ".join(f"{name} {1e-9 * size:.1f}" for name, size in held.items()) + ", activations and "
        f"gradients {1e-9 * peaks[cfg.gradient_checkpointing][0]:.1f}; {batches}",
        f"on {name}, {first} saturates first, busy {busy[first] / last['seconds']:.0%} of the time; {others}",
    ]
    if fits[cfg.gradient_checkpointing] < B:
        better = "gradient_checkpointing=True" if fits[True] >= B else f"local_batch_size={max(1, fits[True])}"
        notes.append(f"set {better}: {B} clips do not fit")
    if last["reading"]:
        needed = ceil(max(1, cfg.num_workers) * last["reading"] / (gpu + last["network"]))
        notes.append(f"num_workers: {needed} for each GPU keep up; {cfg.num_workers} are set")
    if last["vae"] > 0.1 * last["seconds"]:
        notes.append(
            f"the VAE takes {last['vae'] / last['seconds']:.0%} of a step: encode once (tools/encode_latents.py)"
        )
    if last["network"] > 0.1 * last["seconds"]:
        notes.append(f"{last['network']:.2f} s of a step wait for gradients: raise gradient_accumulation_steps")
    return notes
