"""The command line of the programs that sample. Only its functions import torch, so that --help is quick."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from configs import PLAN_FORM, ROOT, SampleConfig, load_config, require_path
from configs.cli import Parser
from configs.files import check_writable

if TYPE_CHECKING:
    import torch

    from sample.plans import Plan

DEMO = str(ROOT / "configs/demo/demo_sample.yaml")


def make_parser(doc: str) -> Parser:
    """Returns a parser with the flags of sample.py and sample_ddp.py."""
    parser = Parser(doc, SampleConfig, config=DEMO)
    add_cache_flag(parser)
    return parser


def add_cache_flag(parser: Parser) -> None:
    """Adds the flag --cache, which takes plans."""
    parser.add_argument(
        "--cache", nargs="+", default=[], metavar="PLAN", help=f"{PLAN_FORM}, such as N2-900-50, N4-o1 or 0,1,4,9"
    )


def read_options(args: argparse.Namespace, device: "torch.device") -> "tuple[SampleConfig, list[Plan]]":
    """Returns the resolved options, and the plans: of --cache and of a recipe, or else of the options."""
    from sample.pipeline import resolve
    from sample.plans import make_plan, parse_plan

    cfg = resolve(load_config(SampleConfig, args.config, args.overrides), device)
    plans = [make_plan(cfg, cache) for cache in dict.fromkeys(map(parse_plan, args.cache))]
    if cfg.recipe or not plans:
        plans.append(make_plan(cfg))
    return replace(cfg, cache=plans[0].cache), plans


def file_checks(cfg: SampleConfig, output: str = "") -> list[Callable[[], object]]:
    """Returns functions that raise UserError if a file that sampling reads is missing.

    Args:
        output: the option with the folder of the videos; then ffmpeg and that folder are checked, too.
    """
    from models.autoencoder import vae_file
    from sample.media import find_ffmpeg
    from sample.recipes import check_recipe

    checks = [lambda: require_path(cfg, "ckpt"), lambda: vae_file(cfg)]
    checks += [find_ffmpeg, lambda: check_writable(cfg, output, folder=True)] if output else []
    return [*checks, lambda: check_recipe(cfg)] if cfg.recipe else checks
