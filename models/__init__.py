"""Models by name: `get_models(args)`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from configs import ROOT, DiffusionOptions, ModelOptions, UserError
from models.latte import Latte, check_dimensions
from models.vaes import vae_spec

SIZES = {  # depth, hidden_size, num_heads
    "XL": (28, 1152, 16),
    "L": (24, 1024, 16),
    "B": (12, 768, 12),
    "S": (12, 384, 6),
}
PATCH_SIZES = (2, 4, 8)
PARTIAL_SKIPS = 2  # num_skips of the original's LatteIMG-skip-partial

MADE_OF = [each.name for group in (ModelOptions, DiffusionOptions) for each in fields(group)]
MADE_OF = [
    name for name in MADE_OF if name not in ("extras", "attention_mode", "time_shift")
]  # what weights say of themselves
HINTS = ["dataset", "class_names", "pretrained_model_path", "vae", "time_shift"]  # of which sampling may use others
NAMED = ("depth", "hidden_size", "num_heads", "patch_size", "num_skips")  # dimensions that a model's name stands for

NAMES = (
    f"Latte-{{{','.join(SIZES)}}}/{{{','.join(map(str, PATCH_SIZES))}}}[-skip[-cache[-N]]], "
    "Latte[-skip[-cache[-N]]] (short for XL/2), LatteIMG-..., LatteIMG-skip-partial"
)


@dataclass(frozen=True)
class Variant:
    """The options that a model's name stands for."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    num_skips: int
    cache_interval: int  # 1: no cache


def parse_name(name: str) -> Variant:
    """Returns the options behind `Latte`, `Latte-B/2-skip-cache-3`, `LatteIMG-skip`, ...; -cache alone means N = 2."""
    size_pattern = rf"(?:-({'|'.join(SIZES)})/({'|'.join(map(str, PATCH_SIZES))}))?"
    match = re.fullmatch(rf"Latte(?:IMG)?{size_pattern}(-skip(-partial)?(-cache(?:-(\d+))?)?)?", name)
    if not match:
        raise UserError(f"model: {name!r} is unknown; valid: {NAMES}")
    size, patch, skip, partial, cache, interval = match.groups()
    depth, hidden_size, num_heads = SIZES[size or "XL"]
    num_skips = PARTIAL_SKIPS if partial else depth // 4 if skip else 0
    return Variant(depth, hidden_size, num_heads, int(patch or 2), num_skips, int(interval or 2) if cache else 1)


def get_models(args: Any) -> Latte:
    """Returns the model that `args` describes (see `model_dimensions`), with initial weights."""
    return Latte(**model_dimensions(args))


def model_dimensions(args: Any) -> dict[str, Any]:
    """Returns the arguments of Latte for the model that `args` describes, without making it.

    Args:
        args: a SampleConfig, a TrainConfig, or any object with the original YAML's keys as attributes. Its dimensions
            (hidden_size, depth, num_heads, patch_size, num_skips), where set, override those of the model's name.
            Those of the latents are those that the VAE gives to num_frames frames of image_size (models/vaes.py).

    Raises:
        UserError: the name is unknown (the error lists the valid names), or the dimensions do not fit together.
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
        raise UserError(f"extras: {extras} is unknown; valid: 1 (unconditional), 2 (class-conditional)")
    if extras == 2 and num_classes is None:
        raise UserError("num_classes is not set, but extras: 2 makes the model class-conditional")
    patch_size = option("patch_size", variant.patch_size)
    vae = vae_spec(args)
    token_size = vae.space * patch_size
    if args.image_size % token_size:
        raise UserError(f"image_size: {args.image_size} is not a multiple of {token_size}, a token's height in pixels")
    dimensions = dict(
        input_size=args.image_size // vae.space,
        patch_size=patch_size,
        in_channels=option("in_channels", vae.channels),
        hidden_size=option("hidden_size", variant.hidden_size),
        depth=depth,
        num_heads=option("num_heads", variant.num_heads),
        mlp_ratio=option("mlp_ratio", 4.0),
        num_frames=vae.latent_frames(args.num_frames),
        class_dropout_prob=option("class_dropout_prob", 0.1),
        num_classes=num_classes if extras == 2 else None,
        learn_sigma=option("learn_sigma", True),
        num_skips=num_skips,
    )
    check_dimensions(**dimensions)
    return dimensions


def made_of(args: Any, class_names: Sequence[str] | None, **facts: Any) -> dict[str, Any]:
    """Returns the options of a training as its weights carry them, in plain values.

    They are MADE_OF, HINTS, `facts`, and as `latte` the arguments of Latte. A path inside the repository is relative.
    """
    options = {key: getattr(args, key, None) for key in HINTS} | _model_and_process(args) | facts
    options["latte"] = model_dimensions(args)
    options["class_names"] = None if class_names is None else list(class_names)
    folder = Path(options["pretrained_model_path"] or "")
    if folder.is_relative_to(ROOT):
        options["pretrained_model_path"] = str(folder.relative_to(ROOT))
    return options


def check_made_of(args: Any, options: Mapping[str, Any], ckpt: Any, source: Callable[[str], str] | None = None) -> None:
    """Raises UserError if `args` contradicts the options that the weights at `ckpt` carry; the error names both.

    Args:
        source: from an option to where its value comes from.
    """
    ours = _model_and_process(args)
    differ = [key for key in MADE_OF if key in options and key != "model" and ours[key] != options[key]]
    if differ:
        given = {key: f"{key}={ours[key]}" + (f" ({source(key)})" if source else "") for key in differ}
        pairs = "; ".join(f"{text}, not {options[key]}" for key, text in given.items())
        advice = "leave them out" if source else "set them as in the weights"
        raise UserError(f"{ckpt} was trained with other options than {pairs}: {advice}")


def _model_and_process(args: Any) -> dict[str, Any]:
    """Returns the options in MADE_OF; those that the model's name or the VAE stand for are spelled out."""
    dimensions = {key: value for key, value in model_dimensions(args).items() if key != "num_frames"}  # latent frames
    return {key: dimensions.get(key, getattr(args, key, None)) for key in MADE_OF}
