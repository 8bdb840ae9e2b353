"""The options of sampling and training as dataclasses, and `load_config`, which reads them.

Each field carries its help, limits and choices. A YAML file overrides the defaults here, and key=value pairs on the
command line override the YAML file. YAML files of the original Latte and Skip-DiT code load unchanged
(configs/original.py).
"""

import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import UserError, choice, suggest_option
from configs.original import INERT, translate
from configs.values import nest, parse, read_yaml, write_yaml

ROOT = Path(__file__).resolve().parent.parent  # relative paths in a YAML file start here
PLAN_FORM = "N<interval>[-<start>-<stop>] or 0,<step>,..., then [-b<depth>][-o<order>]"  # CacheOptions as text
COMMAND_LINE = "command line"  # named in errors about options that no file holds
SOURCE_HINTS = {  # how to get a missing file
    "ckpt": "published weights: python pretrained/download_ckpts.py",
    "pretrained_model_path": "published weights: python pretrained/download_ckpts.py",
    "latents_path": "make them with tools/encode_latents.py, which takes the same options",
}

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------------------
# Fields that carry help, limits and choices
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
    """Returns a dataclass field with these facts, which `check_options` enforces and --help prints.

    Args:
        default: the default value, or a function that makes it.
        help: one line of help, with the unit.
        least, above, most: bounds of a number, or of each number in a list (`above` excludes the bound itself).
        choices: the valid values, or the valid entries of a list.
        path: whether the value is a path, relative to `ROOT` in a YAML file and to the current directory on the
            command line.
    """
    facts = {"help": help, "least": least, "above": above, "most": most, "choices": choices, "path": path}
    return field(**{"default_factory" if callable(default) else "default": default}, metadata=facts)


def default_of(option: Field) -> Any:
    """Returns the default value of an option."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def limits_of(option: Field) -> str:
    """Returns the limits of an option in words, such as "0 ... 3" or "at least 1"; empty if it has none."""
    least, above, most = (option.metadata.get(key) for key in ("least", "above", "most"))
    if least is not None and most is not None:
        return f"{least} ... {most}"
    bounds = [("at least", least), ("above", above), ("at most", most)]
    return ", ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)


def check_options(config: Any, prefix: str = "") -> None:
    """Raises UserError if a value, nested ones included, is outside the limits or choices of its option."""
    for each in fields(config):
        value, key = getattr(config, each.name), prefix + each.name
        if is_dataclass(value):
            check_options(value, f"{key}.")
        else:
            _check_option(key, value, each)


def _check_option(key: str, value: Any, option: Field) -> None:
    if value == [] and default_of(option) is not None:
        raise UserError(f"{key}: the list is empty")
    if value == "" and option.metadata.get("path"):
        raise UserError(f"{key}: the path is empty")
    for entry in value if isinstance(value, list) else [value]:
        if entry is None:  # always valid: the option is empty
            continue
        if option.metadata.get("choices"):
            choice(key, entry, option.metadata["choices"])
        if isinstance(entry, int | float):
            _check_limits(key, entry, option)


def _check_limits(key: str, value: float, option: Field) -> None:
    least, above, most = (option.metadata.get(name) for name in ("least", "above", "most"))
    if not math.isfinite(value) and value != default_of(option):
        raise UserError(f"{key}: {value} is not a finite number")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UserError(f"{key}: {value} does not fit into 64 bits")
    if least is not None and most is not None and not least <= value <= most:
        raise UserError(f"{key}: {value} is outside {least} ... {most}")
    if least is not None and value < least:
        raise UserError(f"{key}: {value} is less than {least}")
    if above is not None and value <= above:
        raise UserError(f"{key}: {value} is not above {above}")
    if most is not None and value > most:
        raise UserError(f"{key}: {value} is more than {most}")


def option_groups(schema: type) -> Iterator[tuple[str, list[Field]]]:
    """Yields the first line of the docstring and the fields of each class that declares options of `schema`."""
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
    """The transformer. An empty dimension is taken from the model's name."""

    model: str = option("Latte-XL/2", "Latte-{XL,L,B,S}/{2,4,8}[-skip[-cache[-N]]], or a name from the original code")
    image_size: int = option(256, "height and width in pixels, a multiple of the VAE's stride x patch_size", least=1)
    num_frames: int = option(16, "frames per clip; a VAE that compresses time takes some numbers alone", least=1)
    num_classes: int | None = option(None, "number of classes; empty: unconditional", least=1)
    extras: int | None = option(
        None, "the original's switch: 1 unconditional, 2 class-conditional; empty: num_classes decides"
    )
    learn_sigma: bool = option(True, "also predict the variance: the output has 2 x in_channels channels")
    class_dropout_prob: float = option(
        0.1, "probability of the null label in training; guidance needs more than 0", least=0, most=1
    )
    hidden_size: int | None = option(None, "width D of a token", least=1)
    depth: int | None = option(None, "number of blocks, a multiple of 4; a layer is two blocks", least=1)
    num_heads: int | None = option(None, "attention heads per block", least=1)
    patch_size: int | None = option(None, "height and width of a token, in latents", least=1)
    num_skips: int | None = option(None, "number of long skip branches, 0 ... depth / 4", least=0)
    in_channels: int | None = option(None, "channels of the latents; empty: those of the VAE", least=1)
    latent_mean: list[float] | None = option(None, "mean of each channel that training has measured; empty: none")
    latent_std: list[float] | None = option(None, "likewise, the standard deviation", above=0)
    mlp_ratio: float = option(4.0, "hidden width of an MLP divided by D", above=0)
    attention_mode: str = option(
        "auto", "attention kernel; auto: the fastest for the device and type", choices=("auto", "sdpa", "math")
    )


@dataclass(kw_only=True)
class DiffusionOptions:
    """The noise process. Sampling must use the one that the model was trained with."""

    process: str = option(
        "gaussian", "gaussian: DDPM | flow: flow matching, x_s = (1 - s) x + s eps", choices=("gaussian", "flow")
    )
    noise_schedule: str = option("linear", "schedule of the betas", choices=("linear", "squaredcos_cap_v2"))
    prediction: str = option("eps", "the model's target; a flow's v is eps - x", choices=("eps", "x0", "v"))
    diffusion_steps: int = option(1000, "number of timesteps in training", least=2)
    time_shift: float = option(
        1.0, "flow: k moves times s to k s / (1 + (k - 1) s), in training and sampling; above 1: to noise", above=0
    )


@dataclass(kw_only=True)
class CacheOptions:
    """Skip-Cache: which steps run in full, and which layers run on every step."""

    interval: int | None = option(
        None, "N: every N-th step is full; 1: no cache; empty: N of the model's name (-cache-N)", least=1
    )
    start: int = option(
        900, "steps with t >= start are full (t: original timestep, 0 ... 999; of a flow: 1000 s)", least=0
    )
    stop: int = option(50, "the cache is emptied after a step with t < stop", least=0)
    depth: int = option(
        1, "outer layers at each end that run on every step; 0: nothing runs, the last estimate of x_0 is held", least=0
    )
    order: int = option(
        0, "order of the polynomial forecast of the deep feature; 0: reuse, as in the paper", least=0, most=3
    )
    full_steps: list[int] | None = option(
        None, "numbers of the full steps, 0, ..., in place of interval, start and stop", least=0
    )

    def __post_init__(self) -> None:
        if self.full_steps is not None:  # equal plans are equal options
            self.interval, self.start, self.stop = None, CacheOptions.start, CacheOptions.stop

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def is_off(self) -> bool:
        """Whether all steps run in full, whatever their number."""
        return self.interval == 1


@dataclass(kw_only=True)
class SamplerOptions:
    """The sampler."""

    sample_method: str = option(
        "ddpm",
        "the sampler; euler is ddim with eta=0, heun runs the model twice in a step",
        choices=("ddpm", "ddim", "euler", "heun", "dpmsolver++", "unipc"),
    )
    num_sampling_steps: int = option(250, "denoising steps", least=1)
    eta: float = option(0.0, "DDIM's noise: 0 is deterministic, 1 is as random as DDPM", least=0, most=1)
    cfg_scale: float = option(1.0, "scale of classifier-free guidance; 1: none", least=0, most=100)
    cache: CacheOptions = field(default_factory=CacheOptions)
    recipe: str | None = option(
        None, "a file of tools/calibrate.py, in place of sample_method, num_sampling_steps and cache", path=True
    )
    recipe_anyway: bool = option(False, "use a recipe that was made for another guidance, length or size")


@dataclass(kw_only=True)
class AutoencoderOptions:
    """The VAE: any autoencoder of diffusers, the folder {pretrained_model_path}/{vae}, or a class."""

    pretrained_model_path: str | None = option("./pretrained/Latte/", "the folder that holds the VAE's", path=True)
    vae: str = option("vae", "its folder, such as vae or sd-vae-ft-mse, an absolute path, or package.module:Class")
    vae_chunk_frames: int = option(
        16, "frames that the VAE processes at once; limits memory, changes no result", least=1
    )
    vae_tiling: bool | None = option(None, "the VAE's own tiles: large clips in less memory, slightly other pixels")


@dataclass(kw_only=True)
class SampleConfig(ModelOptions, DiffusionOptions, SamplerOptions, AutoencoderOptions):
    """Weights, seeds and files of a sampling run."""

    ckpt: str | None = option(None, "weights: .pt (ema | model | bare) or .safetensors", path=True)
    save_video_path: str = option("./sample_videos/", "the output folder", path=True)
    seed: int = option(0, "the first seed; clip i has seed + i", least=0)
    weights: str = option("ema", "which weights of a .pt; model: not averaged", choices=("ema", "model"))
    class_names: list[str] | None = option(
        None, "names of the classes by label; empty: those in the weights, or those of data_path"
    )
    sample_names: list[Any] | None = option(None, "sample.py: classes by index or name; empty: every class")
    samples_per_class: int = option(1, "sample.py: clips per class", least=1)
    dataset: str | None = option(None, "the data set that names the classes: ucf101, or any training set")
    data_path: str | None = option(None, "the class folders that name the classes (ucf101 needs none)", path=True)
    fps: int = option(8, "frames per second of the videos written", least=1, most=1000)
    precision: str = option(
        "auto",
        "number type of the weights; auto: bf16 where the hardware computes it",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    use_fp16: bool = option(False, "the original's switch: with precision=auto, fp16 on CUDA")
    use_compile: bool = option(False, "torch.compile the full step and the cached step")
    per_proc_batch_size: int = option(2, "clips per batch", least=1)
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
        None, "the folder that the lines of frame_data_txt start from; empty: data_path", path=True
    )
    frame_data_txt: str | None = option(
        None, "list of the stills of an _img set; empty: stills are frames of the videos", path=True
    )
    frame_interval: int = option(3, "step from one frame of a clip to the next, in frames of the video", least=1)
    fps: float | None = option(
        None, "frames of a clip per second of the video, for videos of mixed rates; needs frame_interval=1", above=0
    )
    short_clips: str = option(
        "spread",
        "videos below num_frames x frame_interval; spread: used whole, frames spread evenly; skip: left out",
        choices=("spread", "skip"),
    )
    use_image_num: int = option(0, "stills per clip (joint image-video training)", least=0)
    horizontal_flip: bool | None = option(None, "mirror half of the clips; empty: as published for the data set")
    video_reader: str = option(
        "pyav", "decord: PyAV still reads files in which decord seeks wrongly", choices=("pyav", "decord")
    )
    max_bad_fraction: float = option(
        0.1, "largest share of unusable files before training stops with an error", least=0, most=1
    )
    latents_path: str | None = option(
        None, "latents from tools/encode_latents.py; empty: encode during training", path=True
    )
    latents_clips: int = option(8, "clips of each video that it encodes with a VAE that compresses time", least=1)
    video_index_path: str | None = option(
        "~/.cache/latte/video_index",
        "folder of the indices of long videos; empty: each process makes its own",
        path=True,
    )
    num_workers: int = option(8, "processes that read data; 0: the training process reads", least=0)
    loader_timeout: float = option(
        600.0, "seconds that those processes may take for a batch before the run ends; 0: for ever", least=0
    )


@dataclass(kw_only=True)
class TrainConfig(ModelOptions, DiffusionOptions, SamplerOptions, AutoencoderOptions, DataOptions):
    """Training. The sampler's options are those of the previews."""

    results_dir: str = option("./results", "the folder that holds the run folders", path=True)
    latent_statistics: str = option(
        "vae",
        "normalization of latents; measured: by statistics of training clips, as for a VAE that states none",
        choices=("vae", "measured"),
    )
    pretrained: str | None = option(None, "initial weights, of Skip-DiT or Latte", path=True)
    skip_init: str = option(
        "identity",
        "initial skip branches for a Latte checkpoint; identity: they return x",
        choices=("identity", "xavier"),
    )
    resume_from_checkpoint: str = option(
        "auto", "auto: the newest run with the same options | a run's folder | no: a new run"
    )
    time_sampling: str = option(
        "uniform",
        "timesteps to train at; logit-normal: more in the middle, fewer at the ends",
        choices=("uniform", "logit-normal"),
    )
    min_snr: float = option(0.0, "gamma of min-SNR loss weights (arXiv:2303.09556), such as 5; 0: none", least=0)
    optimizer: str = option(
        "adamw",
        "muon: Muon for the matrices of blocks and skips, AdamW for the rest, at one learning rate",
        choices=("adamw", "muon"),
    )
    learning_rate: float = option(1e-4, "learning rate after the warm-up", above=0)
    lr_schedule: str = option(
        "constant",
        "learning rate after the warm-up; wsd decays in the last fifth",
        choices=("constant", "linear", "cosine", "wsd"),
    )
    lr_warmup_steps: int = option(0, "steps of linear warm-up", least=0)
    weight_decay: float = option(0.0, "weight decay", least=0)
    ema_decay: float = option(0.9999, "decay of the averaged weights", least=0, most=1)
    clip_max_norm: float = option(0.1, "largest gradient norm, from start_clip_iter on", above=0)
    start_clip_iter: int = option(500_000, "the first step with gradient clipping", least=0)
    local_batch_size: int = option(5, "clips per process and forward pass", least=1)
    gradient_accumulation_steps: int = option(1, "forward passes per step", least=1)
    max_train_steps: int = option(1_000_000, "the last step", least=1)
    max_bad_steps: int = option(20, "steps in a row with a non-finite loss or gradient before the run stops", least=1)
    train_only: str = option("all", "weights to train", choices=("all", "skip", "temporal"))
    stale_features: float = option(
        0.0, "share of clips whose deep feature comes from a noisier timestep, as in a cached step", least=0, most=1
    )
    stale_gap: int = option(100, "stale_features: the largest distance of the two timesteps", least=1)
    mixed_precision: str = option("no", "autocast type", choices=("no", "bf16", "fp16"))
    gradient_checkpointing: bool = option(False, "recompute layers in the backward pass: less memory, more time")
    use_compile: bool = option(False, "torch.compile the blocks")
    global_seed: int = option(3407, "seed of all randomness", least=0)
    log_every: int = option(100, "steps between report lines", least=1)
    report_to: str = option(
        "tensorboard", "where curves go, beside log.jsonl", choices=("tensorboard", "wandb", "none")
    )
    ckpt_every: int = option(10_000, "steps between checkpoints", least=1)
    preview_every: int = option(0, "steps between preview videos from the EMA, uncached and cached; 0: none", least=0)
    preview_clips: int = option(4, "clips per preview", least=1)
    validation_every: int = option(
        0, "steps between losses of the EMA, on fixed clips with fixed noise, and errors of x_0; 0: none", least=0
    )
    validation_path: str | None = option(None, "validation clips, laid out like data_path", path=True)
    validation_clips: int = option(16, "number of validation clips", least=1)
    log_snrs: list[float] = option(
        lambda: [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0],
        "noise levels of the errors of x_0, log(alpha^2 / sigma^2)",
        least=-20,
        most=20,
    )
    keep_resume_states: int = option(2, "number of resume states kept (all checkpoints are kept)", least=1)


# ---------------------------------------------------------------------------------------------------------------------
# Reading options
# ---------------------------------------------------------------------------------------------------------------------


def load_config(
    schema: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """Returns the options of `schema`: defaults, overridden by the YAML file, overridden by `key=value` pairs.

    Args:
        overrides: pairs such as `seed=3`, or `cache.interval=2` for a nested option.
        defaults: values in place of the schema's own defaults, taken as they are.

    Raises:
        UserError: the file is missing or is not YAML, a key is unknown (the error suggests the nearest valid one), or
            a value has the wrong type or is outside the limits of its option. The error names the file, or the command
            line.
    """
    values = _read_values(schema, _read_file(path), str(path)) if path else {}
    changes = _read_values(schema, _split(overrides), COMMAND_LINE)
    if "interval" in (cache := changes.get("cache") or {}):  # in place of the file's list
        cache.setdefault("full_steps", None)
    _anchor_paths(schema, changes, Path.cwd())
    config = _build(schema, dict(defaults or {}), values, changes)
    _anchor_paths(schema, vars(config), ROOT)
    if getattr(config, "extras", None) == 1:
        config.num_classes = None  # the original's files set it even then; the rest of the code ignores `extras`
    return config


def to_yaml(config: Any) -> str:
    """Returns the options as YAML that `load_config` can read."""
    return write_yaml(asdict(config))


def require_path(config: Any, key: str, folder: bool | None = None) -> Path:
    """Returns the path in option `key`; raises UserError, naming the key, if it is empty or does not exist.

    Args:
        folder: whether it must be a folder (True) or a file (False); None: either.
    """
    value = getattr(config, key)
    if not value:
        raise UserError(f"{key} is not set: give its path in the YAML file or as {key}=PATH")
    if _is_placeholder(value):
        raise UserError(f"{key} still holds the placeholder {value}: replace it in the YAML file, or pass {key}=PATH")
    try:
        is_folder = stat.S_ISDIR(Path(value).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        hint = f"; {SOURCE_HINTS[key]}" if key in SOURCE_HINTS else ""
        raise UserError(f"{key}: nothing at {value}{hint}") from None
    except (OSError, ValueError) as error:  # closed to this user, a name too long, a disk that fails
        raise UserError(f"{key}: {value} cannot be read ({getattr(error, 'strerror', error)})") from None
    if folder is not None and folder != is_folder:
        there, wanted = ("a folder", "a file") if is_folder else ("a file", "a folder")
        raise UserError(f"{key}: {value} is {there}, where {wanted} is needed")
    return Path(value)


def _read_file(path: str | Path) -> dict[str, Any]:
    """Returns the text of the values in a YAML file, with ${...} resolved."""
    from omegaconf import OmegaConf  # here: the models run where it is not installed

    path = Path(path)
    if not path.is_file():
        near = get_close_matches(str(path), [str(p) for p in path.parent.glob("*.yaml")], n=1, cutoff=0)
        raise UserError(f"no configuration file {path}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
        values = OmegaConf.to_container(OmegaConf.create({} if content is None else content), resolve=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base class
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no `key: value` lines")
    return values


def _split(overrides: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            more = "; clip i has seed + i, so one seed is enough" if "seed" in values else ""
            more = f"; a YAML file is given as --config {item}" if item.endswith((".yaml", ".yml")) else more
            raise UserError(f"{item}: expected key=value{more}")
        if any("\ud800" <= character <= "\udfff" for character in item):  # a byte of another encoding
            raise UserError(f"{item} is not UTF-8, which YAML files need: rename the file, or give a link to it")
        values.pop(key, None)  # the last one wins, under whatever name
        values[key] = value
    return values


def _read_values(schema: type, texts: dict[str, Any], source: str, group: str = "") -> dict[str, Any]:
    """Returns values by the names and of the types of the options in `schema`, from text.

    A key without a value in a YAML file means the default.

    Args:
        source: the file, or COMMAND_LINE: named in errors.
        group: what stands before the names of nested options in errors.
    """
    options = {each.name: each for each in fields(schema)}
    if issubclass(schema, SampleConfig) and source != COMMAND_LINE:  # a run's own file samples, too
        training = {each.name for each in fields(TrainConfig)} - options.keys()
        training -= set() if "results_dir" in texts else INERT.keys()
        texts = {key: text for key, text in texts.items() if key not in training}
    texts, values = nest(translate(texts, options, source)), {}
    for key, text in texts.items():
        if key not in options:
            raise UserError(f"{source}: unknown key {group}{key}{suggest_option(key, options)}")
        name, option = f"{group}{key}", options[key]
        if text is None and default_of(option) is not None and source != COMMAND_LINE:
            continue
        if is_dataclass(option.type):
            parts = read_yaml(text) if isinstance(text, str) and text.startswith("{") else text
            if not isinstance(parts, dict):
                parts = ", ".join(f"{name}.{each.name}" for each in fields(option.type))
                raise UserError(f"{source}: {name}: {text} is no value; give {parts}, as in {name}.interval=2")
            values[key] = _read_values(option.type, parts, source, f"{name}.")
            continue
        try:
            values[key] = parse(text, option.type)
            _check_option(name, values[key], option)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except ValueError as error:
            raise UserError(f"{source}: {name}: {error}") from None
    return values


def _build(schema: type[T], *layers: dict[str, Any]) -> T:
    """Returns the options with the values of all layers; a later layer wins."""
    values = {key: value for layer in layers for key, value in layer.items()}
    for each in fields(schema):
        if is_dataclass(each.type):
            values[each.name] = _build(each.type, *(layer.get(each.name, {}) for layer in layers))
    return schema(**values)


def _anchor_paths(schema: type, values: dict[str, Any], base: Path) -> None:
    """Makes the relative paths among `values` absolute, starting from `base`, in place."""
    for each in fields(schema):
        value = values.get(each.name)
        if each.metadata.get("path") and isinstance(value, str) and value and not _is_placeholder(value):
            values[each.name] = str(absolute_path(value, base))


def absolute_path(text: str, base: Path) -> Path:
    """Returns the path that a user wrote, starting from `base`; ~ is the home folder, ~name is a name like others."""
    return (base / (Path(text).expanduser() if text.partition("/")[0] == "~" else text)).resolve()


def _is_placeholder(value: str) -> bool:
    return value.lstrip("/").startswith("path/to")
