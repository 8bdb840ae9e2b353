"""Every option of every program, as dataclasses whose fields carry their help, limits and choices; `load_config`.

A YAML file holds what differs from the defaults here and what a user edits; key=value pairs win over it. YAML files
written for the original Latte and Skip-DiT code load unchanged (configs/original.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import UserError, choice, suggest
from configs.original import translate

ROOT = Path(__file__).resolve().parent.parent  # relative paths in a YAML file start here
COMMAND_LINE = "command line"  # where options come from, beside files
SOURCE_HINTS = {  # how to fill a path that a run needs
    "ckpt": "published weights: python pretrained/download_ckpts.py",
    "pretrained_model_path": "published weights: python pretrained/download_ckpts.py",
    "latents_path": "make them with tools/encode_latents.py, which takes the same options",
}

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------------------
# Options that carry their own facts
# ---------------------------------------------------------------------------------------------------------------------


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    choices: Sequence[Any] | None = None,
    path: bool = False,
) -> Any:
    """A field of an options class. `check_options` holds its value to the facts; --help prints them.

    Args:
        default: the value, or a function without arguments that makes it.
        help: one line: what the option does, with its unit.
        least, above, most: limits of a number, or of each number in a list; None is always allowed.
        choices: the valid values, or the valid entries of a list.
        path: a path; relative to `ROOT` in a YAML file, to the current directory on the command line.
    """
    facts = {"help": help, "least": least, "above": above, "most": most, "choices": choices, "path": path}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=facts)


def default_of(option: Field) -> Any:
    """The value of an option that nobody sets."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def limits_of(option: Field) -> str:
    """The limits of an option in words, as "0 ... 3" or "at least 1"; empty if it has none."""
    least, above, most = (option.metadata.get(key) for key in ("least", "above", "most"))
    if least is not None and most is not None:
        return f"{least} ... {most}"
    bounds = [("at least", least), ("above", above), ("at most", most)]
    return ", ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


def check_options(config: Any, prefix: str = "") -> None:
    """Raises UserError for a value outside the limits or choices of its option; nested options are checked, too."""
    for each in fields(config):
        value, key = getattr(config, each.name), prefix + each.name
        if is_dataclass(value):
            check_options(value, f"{key}.")
        for entry in value if isinstance(value, list) else [value]:
            if entry is None:
                continue
            if each.metadata.get("choices"):
                choice(key, entry, each.metadata["choices"])
            _check_limits(key, entry, each)


def _check_limits(key: str, value: Any, option: Field) -> None:
    least, above, most = (option.metadata.get(name) for name in ("least", "above", "most"))
    if not isinstance(value, int | float) or (least, above, most) == (None, None, None):
        return
    if not math.isfinite(value):
        raise UserError(f"{key}: {value} is not a finite number")
    if least is not None and most is not None and not least <= value <= most:
        raise UserError(f"{key}: {value} is outside {least} ... {most}")
    if least is not None and value < least:
        raise UserError(f"{key}: {value} is less than {least}")
    if above is not None and value <= above:
        raise UserError(f"{key}: {value} is not above {above}")
    if most is not None and value > most:
        raise UserError(f"{key}: {value} is more than {most}")


def option_groups(schema: type) -> Iterator[tuple[str, list[Field]]]:
    """The options of `schema` by the class that declares them: (first line of its docstring, its fields)."""
    by_name = {each.name: each for each in fields(schema)}
    for cls in schema.__mro__:
        own = [by_name.pop(name) for name in vars(cls).get("__annotations__", {}) if name in by_name]
        if own:
            yield (cls.__doc__ or cls.__name__).splitlines()[0], own


# ---------------------------------------------------------------------------------------------------------------------
# The options
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ModelOptions:
    """The transformer. Dimensions left empty come from the model's name."""

    model: str = option("Latte-XL/2", "Latte-{XL,L,B,S}/{2,4,8}[-skip[-cache[-N]]], or a name of the original's")
    image_size: int = option(256, "pixels of a side, a multiple of the VAE's stride times the patch size", least=1)
    num_frames: int = option(16, "frames of a clip", least=1)
    num_classes: int | None = option(None, "classes; empty: no class condition", least=1)
    extras: int | None = option(None, "the original's switch: 1 unconditional, 2 by class; empty: as num_classes says")
    learn_sigma: bool = option(True, "predict the variance beside the noise: 2 x in_channels outputs")
    class_dropout_prob: float = option(
        0.1, "share of labels replaced by the null label in training (guidance needs it)", least=0, most=1
    )
    hidden_size: int | None = option(None, "D, the width", least=1)
    depth: int | None = option(None, "number of blocks, a multiple of 4; a layer is two blocks", least=1)
    num_heads: int | None = option(None, "attention heads", least=1)
    patch_size: int | None = option(None, "height and width of a token, in latents", least=1)
    num_skips: int | None = option(None, "long skip branches, 0 ... depth / 4", least=0)
    in_channels: int = option(4, "channels of the VAE's latents", least=1)
    mlp_ratio: float = option(4.0, "hidden width of a block's MLP over D", above=0)
    attention_mode: str = option(
        "auto", "attention kernel; auto: the fastest for device and type", choices=("auto", "sdpa", "math")
    )


@dataclass(kw_only=True)
class DiffusionOptions:
    """The noise process that the model is trained for; sampling must use the same."""

    noise_schedule: str = option("linear", "betas of the process", choices=("linear", "squaredcos_cap_v2"))
    prediction: str = option("eps", "what the model predicts", choices=("eps", "x0", "v"))
    diffusion_steps: int = option(1000, "timesteps of the process", least=2)


@dataclass(kw_only=True, unsafe_hash=True)
class CacheOptions:
    """Skip-Cache: which steps run in full, and how many layers at each end always run."""

    interval: int | None = option(
        None, "N: every N-th step is full; 1: no cache; empty: as in the model's name, -cache-N", least=1
    )
    start: int = option(900, "steps with t >= start are full (t: original timestep, 0 ... 999)")
    stop: int = option(50, "after a step with t < stop the cache is emptied")
    depth: int = option(1, "outer layers at each end that run on every step", least=1)
    order: int = option(
        0, "of the polynomial that forecasts the deep feature; 0: the last one is reused, as in the paper",
        least=0, most=3,
    )  # fmt: skip


@dataclass(kw_only=True)
class SamplerOptions:
    """How samples are drawn."""

    sample_method: str = option("ddpm", "the sampler", choices=("ddpm", "ddim", "dpmsolver++", "unipc"))
    num_sampling_steps: int = option(250, "denoising steps", least=1)
    eta: float = option(0.0, "DDIM: 0 deterministic ... 1 as random as DDPM", least=0, most=1)
    cfg_scale: float = option(1.0, "classifier-free guidance; 1: none", least=0, most=1000)
    cache: CacheOptions = field(default_factory=CacheOptions)


@dataclass(kw_only=True)
class AutoencoderOptions:
    """The VAE: the diffusers folder {pretrained_model_path}/{vae}."""

    pretrained_model_path: str | None = option("./pretrained/Latte/", "the folder above the VAE's", path=True)
    vae: str = option("vae", "the VAE's folder: vae, sd-vae-ft-ema, sd-vae-ft-mse")
    vae_chunk_frames: int = option(
        16, "frames that pass the VAE at once: bounds the memory, changes no result", least=1
    )


@dataclass(kw_only=True)
class SampleConfig(ModelOptions, DiffusionOptions, SamplerOptions, AutoencoderOptions):
    """Weights, seeds and files of a sampling run."""

    ckpt: str | None = option(None, "weights: .pt (ema | model | bare) or .safetensors", path=True)
    save_video_path: str = option("./sample_videos/", "the folder to write", path=True)
    seed: int = option(0, "the first seed; seeds seed, seed + 1, ... each name a clip")
    sample_names: list[Any] | None = option(
        None, "sample.py: classes by index or name, one clip each; empty: every class"
    )
    samples_per_class: int = option(1, "sample.py: clips of each class", least=1)
    dataset: str | None = option(None, "gives the classes their names: ucf101, or the name of a training set")
    data_path: str | None = option(None, "the class folders that name the classes (UCF101's names ship)", path=True)
    fps: int = option(8, "frames per second of the files written", least=1)
    precision: str = option(
        "auto",
        "type of the weights; auto: bf16 if the device has units for it",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    use_fp16: bool = option(False, "the original's switch: fp16 on CUDA, the fastest half type of a CPU")
    use_compile: bool = option(False, "torch.compile of the full and of the cached step")
    per_proc_batch_size: int = option(2, "clips of a batch", least=1)
    num_fvd_samples: int = option(2048, "sample_ddp.py: number of clips", least=1)
    labels: str = option(
        "balanced", "sample_ddp.py: balanced (seed modulo num_classes) | random", choices=("balanced", "random")
    )


@dataclass(kw_only=True)
class DataOptions:
    """Training clips."""

    dataset: str = option("ucf101", "ucf101 | ffs | taichi | sky, each also with _img, | video_folder | frame_folder")
    data_path: str | None = option(None, "the videos, or the folders of frames", path=True)
    frame_data_path: str | None = option(
        None, "the folder that frame_data_txt starts from; empty: data_path", path=True
    )
    frame_data_txt: str | None = option(
        None, "list of the stills of a *_img set; empty: frames of the videos", path=True
    )
    frame_interval: int = option(3, "frames from one to the next of a clip", least=1)
    use_image_num: int = option(0, "stills per clip (joint image-video training)", least=0)
    horizontal_flip: bool | None = option(None, "mirror half of the clips; empty: as published for the data set")
    video_reader: str = option(
        "pyav", "decord still leaves to PyAV the files in which it seeks wrongly", choices=("pyav", "decord")
    )
    max_bad_fraction: float = option(0.1, "stop if more of the files seen than this cannot be used", least=0, most=1)
    latents_path: str | None = option(
        None, "latents encoded before the training; empty: encode while training", path=True
    )
    num_workers: int = option(8, "processes that read the data; 0: the training's own", least=0)


@dataclass(kw_only=True)
class TrainConfig(ModelOptions, DiffusionOptions, SamplerOptions, AutoencoderOptions, DataOptions):
    """The training. The sampler's options are those of the previews."""

    results_dir: str = option("./results", "the folder of the run folders", path=True)
    pretrained: str | None = option(None, "weights to start from, of Skip-DiT or of Latte", path=True)
    skip_init: str = option(
        "identity", "skip branches for a Latte checkpoint; identity: they pass x on", choices=("identity", "xavier")
    )
    resume_from_checkpoint: str = option(
        "auto", "auto: the newest run of the same options | a run's folder | no: a new run"
    )
    learning_rate: float = option(1e-4, "AdamW's, after the warm-up", above=0)
    lr_schedule: str = option(
        "constant", "after the warm-up; wsd falls in the last fifth", choices=("constant", "linear", "cosine", "wsd")
    )
    lr_warmup_steps: int = option(0, "steps of linear warm-up", least=0)
    weight_decay: float = option(0.0, "AdamW's", least=0)
    ema_decay: float = option(0.9999, "of the averaged weights", least=0, most=1)
    clip_max_norm: float = option(0.1, "largest norm of the gradient, from start_clip_iter on", above=0)
    start_clip_iter: int = option(500_000, "the first step whose gradient is clipped", least=0)
    local_batch_size: int = option(5, "clips per process and forward", least=1)
    gradient_accumulation_steps: int = option(1, "forwards per step", least=1)
    max_train_steps: int = option(1_000_000, "the last step", least=1)
    max_bad_steps: int = option(20, "steps in a row without a finite loss and gradient before the run stops", least=1)
    train_only: str = option("all", "which weights move", choices=("all", "skip", "temporal"))
    mixed_precision: str = option("no", "type of the products", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, "recompute layers in the backward pass: less memory, more time")
    use_compile: bool = option(False, "torch.compile of the blocks")
    global_seed: int = option(3407, "all that is random follows from it", least=0)
    log_every: int = option(100, "steps between report lines", least=1)
    ckpt_every: int = option(10_000, "steps between checkpoints", least=1)
    preview_every: int = option(
        0, "steps between preview videos from the EMA, without and with cache; 0: none", least=0
    )
    preview_clips: int = option(4, "clips of a preview", least=1)
    validation_every: int = option(0, "steps between losses of the EMA on fixed clips at fixed noise; 0: none", least=0)
    validation_path: str | None = option(None, "those clips, laid out as data_path", path=True)
    validation_clips: int = option(16, "number of those clips", least=1)
    keep_resume_states: int = option(2, "resume states kept (weights for sampling are all kept)", least=1)


# ---------------------------------------------------------------------------------------------------------------------
# Reading them
# ---------------------------------------------------------------------------------------------------------------------


def load_config(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """The options of `schema`: its defaults, then the YAML file, then `key=value` pairs (nested: `cache.interval=2`).

    Raises:
        UserError: no such file, no valid YAML, an unknown key (with the nearest valid one), a value of another type
            or outside its option's limits.
    """
    values = _check_keys(schema, _read_yaml(path), path) if path else {}
    changes = _parse_overrides(schema, overrides)
    _anchor_paths(schema, changes, Path.cwd())
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values, changes))
    except OmegaConfBaseException as error:
        where = f"{path or COMMAND_LINE}: " + (f"{error.full_key}: " if error.full_key else "")
        raise UserError(where + str(error).splitlines()[0]) from None
    check_options(config)
    _anchor_paths(schema, vars(config), ROOT)
    if getattr(config, "extras", None) == 1:
        config.num_classes = None  # may be left over in the file; from here on it alone tells
    return config


def to_yaml(config: Any) -> str:
    """The resolved options, as YAML that `load_config` reads again."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def require_path(config: Any, key: str) -> Path:
    """The path in `config.<key>`, which must be filled in and exist; the error names the key."""
    value = getattr(config, key)
    if not value:
        raise UserError(f"{key} is not set: give its path in the YAML file or as {key}=PATH")
    if _is_placeholder(value):
        raise UserError(f"{key} still holds the placeholder {value}: put your path there, or pass {key}=PATH")
    if not Path(value).exists():
        raise UserError(f"{key}: nothing at {value}" + (f"; {SOURCE_HINTS[key]}" if key in SOURCE_HINTS else ""))
    return Path(value)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        near = get_close_matches(str(path), [str(p) for p in path.parent.glob("*.yaml")], n=1, cutoff=0)
        raise UserError(f"no configuration file {path}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base class
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no `key: value` lines")
    return values


def _check_keys(schema: type, values: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The values under our keys; an unknown key raises. An empty line of a YAML file means the default."""
    defaults = {each.name: default_of(each) for each in fields(schema)}
    values = translate(values, defaults, str(source))
    for key in values:
        if key not in defaults:
            raise UserError(f"{source}: unknown key {key}{suggest(key, defaults)}")
    if source == COMMAND_LINE:
        return values
    return {key: value for key, value in values.items() if value is not None or defaults[key] is None}


def _parse_overrides(schema: type, overrides: Sequence[str]) -> dict[str, Any]:
    known = {each.name for each in fields(schema)}
    for item in overrides:
        key = item.partition("=")[0]
        if "=" not in item:
            raise UserError(f"{item}: expected key=value")
        if key.split(".")[0] not in known:
            raise UserError(f"unknown key {key}{suggest(key, known)}")
    values = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    return _check_keys(schema, values, COMMAND_LINE)


def _anchor_paths(schema: type, values: dict[str, Any], base: Path) -> None:
    for each in fields(schema):
        value = values.get(each.name)
        if each.metadata.get("path") and isinstance(value, str) and value and not _is_placeholder(value):
            values[each.name] = str((base / Path(value).expanduser()).resolve())


def _is_placeholder(value: str) -> bool:
    return value.lstrip("/").startswith("path/to")
