"""The command line of the programs that sample. Only its functions import torch, so that --help is quick."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from configs import COMMAND_LINE, PLAN_FORM, ROOT, SampleConfig, load_config, require_path
from configs.cli import Parser
from configs.errors import UserError
from configs.files import check_writable

if TYPE_CHECKING:
    import torch

    from sample.plans import Plan

T = TypeVar("T", bound=SampleConfig)

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


def load_sampling(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Returns the options as `load_config` does, with those in the weights at `ckpt` in place of the schema's defaults.

    With `ckpt` on the command line, the file is read only if it is not the default one, DEMO.

    Raises:
        UserError: options contradict those in the weights, or the weights have none and need a file.
    """
    from datasets import class_changes
    from datasets.clips import class_folders
    from models import HINTS, MADE_OF, NAMED, check_made_of, parse_name
    from models.checkpoint import find_checkpoint, load_options

    typed = {item.partition("=")[0] for item in overrides}
    without = path is DEMO and "ckpt" in typed  # `is`: --config with the same file reads it
    path = None if without else path
    cfg = load_config(schema, path, overrides)
    try:
        cfg.ckpt = str(find_checkpoint(require_path(cfg, "ckpt")))
    except UserError:
        if without:
            raise
        return cfg  # the checks of files say what is missing
    options = load_options(cfg.ckpt)
    if not options:
        if without:
            raise UserError(f"{cfg.ckpt} does not say which options made it: give its YAML with --config")
        return cfg
    own = {key: options[key] for key in MADE_OF + HINTS if options.get(key) is not None}
    overrides = [*overrides, f"ckpt={cfg.ckpt}"]
    cfg = load_config(schema, path, overrides, own)
    if replace(parse_name(cfg.model), cache_interval=1) != replace(parse_name(options["model"]), cache_interval=1):
        own = {key: value for key, value in own.items() if key not in NAMED}  # the name given stands for them
        cfg = load_config(schema, path, overrides, own)

    def source(key: str) -> str:
        names = {key} | ({"model"} & typed if key in NAMED else set()) | ({"extras"} & typed)
        return COMMAND_LINE if names & typed else str(path)

    check_made_of(cfg, options, cfg.ckpt, source)
    folder, names = Path(cfg.data_path or ""), options.get("class_names")
    if names and cfg.data_path and folder.is_dir() and (changes := class_changes(names, class_folders(folder))):
        raise UserError(f"data_path: {folder} has other classes than {cfg.ckpt} was trained with: {changes}")
    return cfg


def read_options(args: argparse.Namespace, device: "torch.device") -> "tuple[SampleConfig, list[Plan]]":
    """Returns the resolved options, and the plans: of --cache and of a recipe, or else of the options."""
    from sample.pipeline import resolve
    from sample.plans import make_plan, parse_plan

    cfg = resolve(load_sampling(SampleConfig, args.config, args.overrides), device)
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
