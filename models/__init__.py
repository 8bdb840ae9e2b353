"""Models by name: `get_models(args)`."""

import re
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch

from configs import ModelOptions, UserError
from models.latte import Latte

SIZES = {  # depth, hidden_size, num_heads
    "XL": (28, 1152, 16),
    "L": (24, 1024, 16),
    "B": (12, 768, 12),
    "S": (12, 384, 6),
}
PATCH_SIZES = (2, 4, 8)
LATENT_DOWNSAMPLE = 8  # pixels per latent, of the VAEs that Latte is trained with
PARTIAL_SKIPS = 2  # of the original's LatteIMG-skip-partial

NAMES = (
    f"Latte-{{{','.join(SIZES)}}}/{{{','.join(map(str, PATCH_SIZES))}}}[-skip[-cache[-N]]], "
    "Latte[-skip[-cache[-N]]] (short for XL/2), LatteIMG-..., LatteIMG-skip-partial"
)


@dataclass(frozen=True)
class Variant:
    """What a model's name says."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    num_skips: int
    cache_interval: int  # 1: no cache


def parse_name(name: str) -> Variant:
    """`Latte`, `Latte-B/2-skip-cache-3`, `LatteIMG-skip`, ... -> Variant; a cache without a number has N = 2."""
    pattern = r"Latte(?:IMG)?(?:-(XL|L|B|S)/(2|4|8))?(-skip(-partial)?(-cache(?:-(\d+))?)?)?"
    match = re.fullmatch(pattern, name)
    if not match:
        raise UserError(f"model: {name!r} is unknown; valid: {NAMES}")
    size, patch, skip, partial, cache, interval = match.groups()
    depth, hidden_size, num_heads = SIZES[size or "XL"]
    num_skips = PARTIAL_SKIPS if partial else depth // 4 if skip else 0
    return Variant(depth, hidden_size, num_heads, int(patch or 2), num_skips, int(interval or 2) if cache else 1)


def meta_model(options: ModelOptions) -> Latte:
    """The model of `options` without weights, on the meta device. Models of equal options are one object."""
    return _meta_model(tuple((each.name, getattr(options, each.name)) for each in fields(ModelOptions)))


@cache
def _meta_model(options: tuple[tuple[str, Any], ...]) -> Latte:
    with torch.device("meta"):
        return get_models(ModelOptions(**dict(options)))


def get_models(args: Any) -> Latte:
    """The model of `args`: a SampleConfig, a TrainConfig, or any object with the original YAML's keys as attributes.

    Dimensions given in `args` (hidden_size, depth, num_heads, patch_size, in_channels, num_skips, mlp_ratio) win over
    the name's.

    Raises:
        UserError: an unknown name, with the valid ones; dimensions that do not fit each other.
    """
    variant = parse_name(args.model)

    def option(key: str, default: Any) -> Any:
        value = getattr(args, key, None)
        return default if value is None else value

    depth = option("depth", variant.depth)
    num_skips = option("num_skips", depth // 4 if variant.num_skips == variant.depth // 4 else variant.num_skips)
    num_classes = option("num_classes", None)
    extras = option("extras", 1 if num_classes is None else 2)
    if extras not in (1, 2):
        raise UserError(f"extras: {extras} is unknown; valid: 1 (unconditional), 2 (by class)")
    if extras == 2 and num_classes is None:
        raise UserError("num_classes is not set, and extras: 2 asks for a class condition")
    downsample = LATENT_DOWNSAMPLE * option("patch_size", variant.patch_size)
    if args.image_size % downsample:
        raise UserError(f"image_size: {args.image_size} is not a multiple of {downsample}, a token's height in pixels")
    return Latte(
        input_size=args.image_size // LATENT_DOWNSAMPLE,
        patch_size=option("patch_size", variant.patch_size),
        in_channels=option("in_channels", 4),
        hidden_size=option("hidden_size", variant.hidden_size),
        depth=depth,
        num_heads=option("num_heads", variant.num_heads),
        mlp_ratio=option("mlp_ratio", 4.0),
        num_frames=args.num_frames,
        class_dropout_prob=option("class_dropout_prob", 0.1),
        num_classes=num_classes if extras == 2 else None,
        learn_sigma=option("learn_sigma", True),
        num_skips=num_skips,
    )
