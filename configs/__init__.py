"""Every option of every program, as commented dataclasses; `load_config` lays a YAML file and key=value over them.

A YAML file holds what differs from the defaults here and what a user edits. YAML files written for the original
Latte and Skip-DiT code load unchanged: renamed keys are translated, keys without a function are named in a warning.
"""

import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent.parent  # relative paths in a YAML file start here


class UserError(ValueError):
    """Something the person at the keyboard can mend: one line that says what is wrong and what would be right."""


def path_option(default: str | None = None) -> Any:
    """A field that holds a path: relative to `ROOT` in a YAML file, to the current directory on the command line."""
    return field(default=default, metadata={"path": True})


@dataclass(kw_only=True)
class ModelOptions:
    """The transformer. Dimensions left at None come from the model's name."""

    model: str = "Latte-XL/2"  # Latte-{XL,L,B,S}/{2,4,8}[-skip[-cache[-N]]] and the original's names, see models.SIZES
    image_size: int = 256  # pixels; a multiple of the VAE's downsampling times the patch size
    num_frames: int = 16
    num_classes: int | None = None  # None: no class condition
    extras: int | None = None  # the original's switch: 1 unconditional, 2 by class; None: as num_classes says
    learn_sigma: bool = True  # predict the variance beside the noise: 2 x in_channels outputs
    class_dropout_prob: float = 0.1  # share of labels replaced by the null label in training (guidance needs it)
    hidden_size: int | None = None  # D
    depth: int | None = None  # number of blocks, a multiple of 4; a layer is two blocks
    num_heads: int | None = None
    patch_size: int | None = None
    num_skips: int | None = None  # long skip branches, 0 ... depth / 4
    in_channels: int = 4  # channels of the VAE's latents
    mlp_ratio: float = 4.0
    attention_mode: str = "auto"  # auto | sdpa | math; auto: the faster for the device and type of the run


@dataclass(kw_only=True)
class DiffusionOptions:
    """The noise process the model is trained for; sampling must use the same."""

    noise_schedule: str = "linear"  # linear | squaredcos_cap_v2
    prediction: str = "eps"  # eps | x0 | v
    diffusion_steps: int = 1000


@dataclass(kw_only=True)
class CacheOptions:
    """Skip-Cache: which steps run in full, and how many layers at each end always run."""

    interval: int | None = None  # N: every N-th step is full; 1: no cache; None: as in the model's name, -cache-N
    start: int = 900  # steps with t >= start are full (t: original timestep, 0 ... 999)
    stop: int = 50  # after a step with t < stop the cache is emptied
    depth: int = 1  # b: outer layers at each end that run on every step
    order: int = 0  # of the polynomial that forecasts the deep feature; 0: the last one as it is, as in the paper


@dataclass(kw_only=True)
class SamplerOptions:
    """How samples are drawn."""

    sample_method: str = "ddpm"  # ddpm | ddim | dpmsolver++ | unipc
    num_sampling_steps: int = 250
    eta: float = 0.0  # DDIM: 0 deterministic ... 1 as random as DDPM
    cfg_scale: float = 1.0  # classifier-free guidance; 1: none
    cache: CacheOptions = field(default_factory=CacheOptions)


@dataclass(kw_only=True)
class AutoencoderOptions:
    """Where the VAE lies: the diffusers folder `{pretrained_model_path}/{vae}`."""

    pretrained_model_path: str | None = path_option("./pretrained/Latte/")
    vae: str = "vae"  # sub-folder: vae, sd-vae-ft-ema, sd-vae-ft-mse
    vae_chunk_frames: int = 16  # frames that pass the VAE at once: bounds memory, changes no result


@dataclass(kw_only=True)
class SampleConfig(ModelOptions, DiffusionOptions, SamplerOptions, AutoencoderOptions):
    """Options of sample/sample.py and sample/sample_ddp.py."""

    ckpt: str | None = path_option()  # weights: .pt (ema | model | bare) or .safetensors
    save_video_path: str = path_option("./sample_videos/")
    seed: int = 0  # seeds s, s+1, ...: a seed names a sample at any batch size and number of processes
    sample_names: list[Any] | None = None  # sample.py: classes by index or name, one clip each; None: every class
    samples_per_class: int = 1  # sample.py
    dataset: str | None = None  # gives the classes their names: ucf101 or a data set below
    data_path: str | None = path_option()  # its class folders, which name the classes (UCF101's names ship)
    fps: int = 8  # of the files written
    precision: str = "auto"  # auto | fp32 | bf16 | fp16; auto: bf16 where the device has the units for it
    use_fp16: bool = False  # the original's switch: fp16 on CUDA, the fastest half type of a CPU
    use_compile: bool = False  # torch.compile of the full and of the cached step
    per_proc_batch_size: int = 2
    num_fvd_samples: int = 2048  # sample_ddp.py: number of videos
    labels: str = "balanced"  # sample_ddp.py: balanced (seed modulo num_classes) | random


@dataclass(kw_only=True)
class DataOptions:
    """Training clips."""

    dataset: str = "ucf101"
    data_path: str | None = path_option()
    frame_data_path: str | None = path_option()  # stills of the *_img sets; None: data_path
    frame_data_txt: str | None = path_option()  # their list file; None: the videos' own frames
    frame_interval: int = 3  # frames from one to the next of a clip
    use_image_num: int = 0  # stills per clip (joint image-video training)
    horizontal_flip: bool | None = None  # mirror half of the clips; None: as published for the data set
    video_reader: str = "pyav"  # pyav | decord (PyAV still reads the files in which it seeks wrongly)
    max_bad_fraction: float = 0.1  # stop when more of the files seen than this cannot be used
    latents_path: str | None = path_option()  # latents encoded before the training; None: encode while training
    num_workers: int = 8


@dataclass(kw_only=True)
class TrainConfig(ModelOptions, DiffusionOptions, SamplerOptions, AutoencoderOptions, DataOptions):
    """Options of train.py and of tools/encode_latents.py. The sampler's are those of the previews."""

    results_dir: str = path_option("./results")
    pretrained: str | None = path_option()  # weights to start from, of Skip-DiT or of Latte
    skip_init: str = "identity"  # skip branches for a Latte checkpoint: identity (they pass x on) | xavier
    resume_from_checkpoint: str = "auto"  # auto: the newest run of the same options | a run's folder | no: a new run
    learning_rate: float = 1e-4
    lr_schedule: str = "constant"  # constant | linear | cosine | wsd (falls in the last fifth)
    lr_warmup_steps: int = 0
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    clip_max_norm: float = 0.1  # of the gradient, from start_clip_iter on
    start_clip_iter: int = 500_000
    local_batch_size: int = 5  # clips per process and forward
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1_000_000
    max_bad_steps: int = 20  # steps in a row without a finite loss and gradient before the run stops
    train_only: str = "all"  # all | skip | temporal: which weights move
    mixed_precision: str = "no"  # no | bf16 | fp16
    gradient_checkpointing: bool = False
    use_compile: bool = False  # torch.compile of the blocks
    global_seed: int = 3407
    log_every: int = 100
    ckpt_every: int = 10_000
    preview_every: int = 0  # steps between preview videos from the EMA, without and with cache; 0: none
    preview_clips: int = 4
    validation_every: int = 0  # steps between losses of the EMA on fixed clips at fixed noise; 0: none
    validation_path: str | None = path_option()  # those clips, laid out as data_path
    validation_clips: int = 16
    keep_resume_states: int = 2  # resume states kept (weights for sampling are all kept)


ALIASES = {  # the original's keys -> ours
    "save_img_path": "save_video_path",
    "accumulation_steps": "gradient_accumulation_steps",
}
INERT = {  # the original's keys that do nothing here, and why
    "attention_bias": "the attention always has its bias, as in every checkpoint",
    "save_ceph": "files are written to save_video_path or results_dir",
    "load_from_ceph": "files are read from data_path",
    "enable_xformers_memory_efficient_attention": "attention_mode: auto picks the fastest",
    "run_time": "videos are counted by num_fvd_samples",
    "num_sample": "videos are counted by num_fvd_samples, or samples_per_class",
    "negative_name": "the null label comes from num_classes",
    "frame_interval": "clips are sampled at the interval of their training",
}
HINTS = {  # what fills a path
    "ckpt": "published weights: python pretrained/download_ckpts.py",
    "pretrained_model_path": "published weights: python pretrained/download_ckpts.py",
    "latents_path": "make them with tools/encode_latents.py, which takes the same options",
}
BARE_WORDS = {  # YAML reads a bare `no` as False; the original had False for mixed_precision
    "mixed_precision": {False: "no", True: "bf16", None: "no"},
    "resume_from_checkpoint": {False: "no", True: "auto", None: "auto"},
}

T = TypeVar("T")


def load_config(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """The options of `schema`: its defaults, then the YAML file, then `key=value` pairs (nested: `cache.interval=2`).

    Raises:
        UserError: no such file, no valid YAML, an unknown key (with the nearest valid one), a value of another type.
    """
    values = _translate(schema, _read_yaml(path), path) if path else {}
    changes = _parse_overrides(schema, overrides)
    _anchor_paths(schema, changes, Path.cwd())
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values, changes))
    except OmegaConfBaseException as error:
        where = f"{path or COMMAND_LINE}: " + (f"{error.full_key}: " if error.full_key else "")
        raise UserError(where + str(error).splitlines()[0]) from None
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
        raise UserError(f"{key}: nothing at {value}" + (f"; {HINTS[key]}" if key in HINTS else ""))
    return Path(value)


COMMAND_LINE = "command line"  # where options come from, beside files
CACHE_FORM = "N<interval>[-<start>-<stop>][-b<depth>][-o<order>]"


def parse_cache(text: str) -> CacheOptions:
    """`N2`, `N2-900-50`, `N2-900-50-b1` or `N2-900-50-b1-o1` -> CacheOptions; what is left out is the default."""
    match = re.fullmatch(
        r"N(?P<interval>\d+)(-(?P<start>\d+)-(?P<stop>\d+))?(-b(?P<depth>\d+))?(-o(?P<order>\d+))?", text
    )
    if not match:
        raise UserError(f"--cache {text}: expected {CACHE_FORM}, as in N2-900-50 or N4-o1")
    return CacheOptions(**{key: int(value) for key, value in match.groupdict().items() if value is not None})


def choice(key: str, value: str, valid: Sequence[str]) -> str:
    """`value`, if it is among `valid`; else an error that lists them."""
    if value not in valid:
        raise UserError(f"{key}: {value!r} is unknown; valid: {', '.join(valid)}")
    return value


def _read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.yaml")], n=1, cutoff=0)
        raise UserError(f"no configuration file {path}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # PyYAML's and OmegaConf's errors share no base class
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no `key: value` lines")
    return values


def _translate(schema: type, values: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The original's keys and values in our terms; unknown keys raise."""
    known = {f.name: f for f in fields(schema)}
    ours: dict[str, Any] = {}
    for key, value in values.items():
        key = ALIASES.get(key, key)
        if key == "fixed_spatial" and "train_only" in known:
            if value:
                ours["train_only"] = "temporal"
        elif key in BARE_WORDS and key in known:
            ours[key] = BARE_WORDS[key].get(value, value)
        elif key in known:
            if value is None and known[key].default is not None and path != COMMAND_LINE:
                continue  # an empty line in a YAML file means the default
            ours[key] = value
        elif key in INERT:
            warnings.warn(f"{path}: {key} does nothing here ({INERT[key]})", stacklevel=3)
        elif key == "fixed_spatial":
            continue  # a training option in the original's sampling files, always False there
        else:
            raise UserError(f"{path}: unknown key {key}{_nearest(key, known)}")
    return ours


def _parse_overrides(schema: type, overrides: Sequence[str]) -> dict[str, Any]:
    known = {f.name: f for f in fields(schema)}
    for item in overrides:
        key = item.partition("=")[0]
        if "=" not in item:
            raise UserError(f"{item}: expected key=value")
        if key.split(".")[0] not in known:
            raise UserError(f"unknown key {key}{_nearest(key, known)}")
    values = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    return _translate(schema, values, COMMAND_LINE)


def _nearest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(sorted(known))}"


def _anchor_paths(schema: type, values: dict[str, Any], base: Path) -> None:
    for f in fields(schema):
        value = values.get(f.name)
        if f.metadata.get("path") and isinstance(value, str) and value and not _is_placeholder(value):
            values[f.name] = str((base / Path(value).expanduser()).resolve())


def _is_placeholder(value: str) -> bool:
    return value.lstrip("/").startswith("path/to")
