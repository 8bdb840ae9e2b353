"""What the sampling programs are told, and what they say about a run: before it, and in its JSON record."""

import argparse
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from configs import (
    CACHE_FORM,
    ROOT,
    CacheOptions,
    SampleConfig,
    UserError,
    load_config,
    parse_cache,
    require_path,
    to_yaml,
)
from models import get_models
from models.autoencoder import vae_weights
from models.checkpoint import file_hash
from sample.pipeline import make_diffusion, plan_steps, resolve
from tools.common.cli import Parser
from tools.common.macs import readable, step_macs
from tools.common.records import describe_machine

FLAGS = ("ckpt", "save_video_path", "sample_method", "num_sampling_steps", "seed")  # --key VALUE is key=VALUE


def make_parser(doc: str) -> Parser:
    """The flags of both programs."""
    parser = Parser(doc, SampleConfig, config=str(ROOT / "configs/demo/demo_sample.yaml"))
    for key in FLAGS:
        parser.add_argument(f"--{key}", help=f"the same as {key}=")
    parser.add_argument("--cache", nargs="+", default=[], metavar="PLAN", help=f"{CACHE_FORM}, as N2-900-50")
    parser.add_argument("--deepcache", metavar="N", help="the same as cache.interval=")
    return parser


def parse(parser: Parser) -> argparse.Namespace:
    """The command line. argparse takes key=value pairs behind a flag of several values for more of those: undone."""
    args = parser.parse_args()
    for key in ("cache", "classes"):
        values = getattr(args, key, [])
        args.overrides += [value for value in values if "=" in value]
        setattr(args, key, [value for value in values if "=" not in value])
    return args


def read_options(args: argparse.Namespace, device: torch.device) -> tuple[SampleConfig, list[CacheOptions]]:
    """The resolved options, and the plans: those of --cache, or else the options' own."""
    flags = [f"{key}={getattr(args, key)}" for key in FLAGS if getattr(args, key) is not None]
    if args.deepcache is not None:
        if args.cache:
            raise UserError("--cache and --deepcache both give a plan: leave one out")
        flags.append(f"cache.interval={args.deepcache}")
    cfg = load_config(SampleConfig, args.config, flags + args.overrides)
    caches = [parse_cache(text) for text in args.cache] or [cfg.cache]
    resolved = [resolve(replace(cfg, cache=cache), device) for cache in caches]
    return resolved[0], [each.cache for each in resolved]


@dataclass(frozen=True)
class Plan:
    """What a plan runs and costs. MACs are those of sampling one clip, guidance included, the VAE not."""

    name: str  # uncached, or what --cache takes
    cache: CacheOptions
    steps: str  # a letter a step, from noise to clean: F in full, c from the cache
    full_steps: int
    cached_steps: int
    macs: int
    macs_uncached: int

    @property
    def share(self) -> float:
        """MACs against uncached; its inverse is the speed-up they let expect."""
        return self.macs / self.macs_uncached


def make_plan(cfg: SampleConfig, cache: CacheOptions) -> Plan:
    """The plan `cache` for resolved options."""
    steps = plan_steps(make_diffusion(cfg), cache)
    full, cached = sum(steps), len(steps) - sum(steps)
    macs = step_macs(cfg, cache.depth if cached else 1)
    rows = 1 if cfg.cfg_scale == 1 else 2  # guidance runs each clip with its label and without
    return Plan(
        name=plan_name(cache),
        cache=cache,
        steps="".join("F" if full else "c" for full in steps),
        full_steps=full,
        cached_steps=cached,
        macs=rows * (full * macs.full + cached * macs.cached),
        macs_uncached=rows * len(steps) * macs.full,
    )


def plan_name(cache: CacheOptions) -> str:
    """N2, N2-800-100-b3, N4-o1: what --cache takes, without what is the default; or uncached."""
    if cache.interval == 1:
        return "uncached"
    default = CacheOptions()
    window = "" if (cache.start, cache.stop) == (default.start, default.stop) else f"-{cache.start}-{cache.stop}"
    depth = "" if cache.depth == default.depth else f"-b{cache.depth}"
    return f"N{cache.interval}{window}{depth}" + ("" if cache.order == default.order else f"-o{cache.order}")


def describe(cfg: SampleConfig, plans: Sequence[Plan], device: torch.device) -> list[str]:
    """What will run, a line each: the model, then the plans."""
    with torch.device("meta"):
        size = sum(p.numel() for p in get_models(cfg).parameters())
    return [
        f"model: {cfg.model}, {size:,} parameters, {cfg.precision} on {device.type}, attention {cfg.attention_mode}",
        *(plan_line(cfg, plan) for plan in plans),
    ]


def plan_line(cfg: SampleConfig, plan: Plan) -> str:
    """A plan in one line: its steps, its MACs, and the speed-up they let expect."""
    guidance = "" if cfg.cfg_scale == 1 else f" with guidance {cfg.cfg_scale:g}"
    line = f"plan: {plan.name}, {cfg.sample_method} {cfg.num_sampling_steps}{guidance}: {plan.full_steps} full and "
    line += f"{plan.cached_steps} cached steps; {readable(plan.macs)} a clip"
    if plan.cached_steps:
        line += (
            f", {plan.share:.1%} of uncached ({readable(plan.macs_uncached)}); expected speed-up {1 / plan.share:.2f}x"
        )
    return line


def dry_run(cfg: SampleConfig, lines: Sequence[str]) -> None:
    """Print the resolved options as YAML, with `lines` as comments."""
    print(to_yaml(cfg) + "\n".join(f"# {line}" for line in lines))


def make_record(cfg: SampleConfig, device: torch.device) -> dict[str, Any]:
    """What the JSON of every run starts with: enough to repeat the run and to judge its figures."""
    vae = require_path(cfg, "pretrained_model_path") / cfg.vae
    return {
        "config": asdict(cfg),
        "vae": {"path": str(vae), "sha256": file_hash(vae_weights(vae))},
        "checkpoint": {"path": cfg.ckpt, "sha256": file_hash(cfg.ckpt or require_path(cfg, "ckpt"))},
        "machine": describe_machine(device),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "diffusers", "timm")}},
    }
