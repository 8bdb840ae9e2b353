"""Reading weights, strictly and without running code from the file, and writing them atomically."""

import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import ROOT, UserError
from configs.files import atomic_path, once_per_file


def load_checkpoint(model: nn.Module, path: str | Path, optional: str | None = None, weights: str = "ema") -> list[str]:
    """Loads the weights at `path` into `model`, in the model's dtype; every name and shape must agree.

    Args:
        weights: which ones, see `load_state_dict`.
        optional: a prefix; the file may lack all the names that start with it.

    Returns:
        The optional names that the file lacks.

    Raises:
        UserError: the file is not a checkpoint of this model; the error names the options that differ.
    """
    theirs, ours = load_state_dict(path, weights), model.state_dict()
    absent = [name for name in ours if optional and name.startswith(optional)]
    if any(name in theirs for name in absent):
        absent = []
    missing = [name for name in ours if name not in theirs and name not in absent]
    surplus = [name for name in theirs if name not in ours]
    shapes = [name for name in ours if name in theirs and ours[name].shape != theirs[name].shape]
    if missing or surplus or shapes:
        raise UserError(f"{path} does not fit the model: {_misfit(theirs, ours, missing, surplus, shapes)}")
    model.load_state_dict(theirs, strict=not absent)
    return absent


def load_state_dict(path: str | Path, weights: str = "ema") -> dict[str, Tensor]:
    """Returns the weights in a .safetensors file, or in a .pt file (its `ema`, else its `model`, else all of it).

    Code in the file is never executed. Prefixes of torch.compile and DDP are removed from the names.

    Args:
        weights: "ema", or "model" for the weights of training themselves, which the file must have.

    Raises:
        UserError: the file is missing, truncated or not a checkpoint, or it lacks the `weights` asked for.
    """
    path = find_checkpoint(path)
    content = _read(path)
    parts = {key: value for key, value in content.items() if key in ("ema", "model") and isinstance(value, dict)}
    if weights == "model" and "model" not in parts:
        raise UserError(f"weights: {path} has no `model`, only {'`ema`' if parts else 'one set of weights'}: use ema")
    chosen = weights if weights in parts else next(iter(parts), None)
    state = content if chosen is None else parts[chosen]
    if not state and any(parts.values()):
        other = next(key for key, value in parts.items() if value)
        raise UserError(f"{path}: its `{chosen}` is empty, its `{other}` is not; use weights={other}")
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"the keys {', '.join(map(str, list(state)[:5]))}" if state else "nothing"
        raise UserError(f"{path} holds no weights: expected `ema`, `model` or tensors at the top, found {found}")
    for name, value in state.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: the key {name!r} is no name of a weight")
        if value.is_meta or value.layout != torch.strided or not value.is_floating_point():
            kind = "without data (meta)" if value.is_meta else f"{value.dtype}, {value.layout}".replace("torch.", "")
            raise UserError(f"{path}: {name} is {kind}; weights are dense tensors of a floating-point type")
    # torch.compile adds `_orig_mod.` and DDP `module.`; either may be the outer one.
    return {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state.items()}


@once_per_file
def load_options(path: str | Path) -> dict[str, Any]:
    """Returns the options in a checkpoint that made its weights (`models.made_of`); empty if it has none.

    A VAE beside the weights (`copy_vae`) is theirs, wherever it was at the training.
    """
    path = find_checkpoint(path)
    options, folder = _read_options(path), path.parent.absolute()
    if options and (folder / "vae/config.json").is_file():
        folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        options |= {"pretrained_model_path": str(folder), "vae": "vae"}
    return options


def _read_options(path: Path) -> dict[str, Any]:
    if not _is_safetensors(path):
        options = _read(path).get("options")
        return options if isinstance(options, dict) else {}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, path.stat().st_size))
    try:
        return json.loads(json.loads(header).get("__metadata__", {}).get("options", "{}"))
    except ValueError as error:
        raise UserError(f"{path} is truncated or damaged, fetch it again ({error})") from None


def save_weights(path: str | Path, weights: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Writes a .safetensors file with the options that made the weights in its metadata, atomically."""
    metadata = {"format": "pt", "options": json.dumps(dict(options))}
    with atomic_path(path) as temporary:
        save_file({name: value.contiguous() for name, value in weights.items()}, temporary, metadata)


def copy_vae(options: Mapping[str, Any], folder: Path) -> None:
    """Copies the diffusers VAE that `options` name into `folder`/vae, where the weights beside it find it.

    Nothing is copied if the VAE is a class of one's own, or is not on this disk.
    """
    vae = ROOT / (options.get("pretrained_model_path") or "") / (options.get("vae") or "vae")
    if (vae / "config.json").is_file() and vae.resolve() != (folder / "vae").resolve():
        shutil.copytree(vae, folder / "vae", dirs_exist_ok=True)


def _read(path: Path) -> dict[Any, Any]:
    """Returns the content of a checkpoint, its tensors mapped into memory."""
    if _is_safetensors(path):
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or damaged, fetch it again ({error})") from None
    content = _load_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights: expected `ema`, `model` or tensors, found a {type(content)}")
    return content


def _is_safetensors(path: Path) -> bool:
    """Returns whether a file is safetensors, by its first bytes as its suffix may be wrong, or else a file of torch.

    Raises:
        UserError: it is neither.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` in that repository")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"{path} is a web page saved under this name, not weights: download the file itself")
    is_safetensors = head[8:9] == b"{"  # the length of the header in 8 bytes, then the header as JSON
    if not is_safetensors and not head.startswith((b"PK\x03\x04", b"\x80")):  # a zip, or a pickle of torch before 1.6
        raise UserError(f"{path} holds no weights: neither a .pt nor a .safetensors file ({path.stat().st_size} bytes)")
    return is_safetensors


def count_skips(path: str | Path) -> int:
    """Returns the number of long skip branches of the model whose weights are at `path`."""
    return _count_skips(load_state_dict(path))


@once_per_file
def weights_hash(path: str | Path, weights: str = "ema") -> str:
    """Returns the SHA-256 of the weights at `path` in hex: of their names, types, shapes and bytes.

    It depends neither on the format of the file nor on what else the file holds.
    """
    digest = hashlib.sha256()
    for name, value in sorted(load_state_dict(path, weights).items()):  # mapped into memory: read one by one
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(path: str | Path, **state: Any) -> None:
    """Writes `state` (ema=..., model=...) with torch.save, atomically even if the machine crashes."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


class StrictHubMixin(PyTorchModelHubMixin):
    """`from_pretrained`, `save_pretrained` and `push_to_hub`; `load_checkpoint` loads the weights, strictly.

    A folder holds config.json, model.safetensors, a model card and, if it is known, the VAE.
    """

    options: Mapping[str, Any] = {}  # those that made the weights; a saved model keeps them

    @classmethod
    def _load_as_safetensor(cls, model: nn.Module, model_file: str, map_location: str, strict: bool) -> nn.Module:
        load_checkpoint(model, model_file)
        model.options = load_options(model_file)
        return model.to(map_location).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_weights(save_directory / "model.safetensors", self.state_dict(), self.options)
        copy_vae(self.options, save_directory)

    _load_as_pickle = _load_as_safetensor


def find_checkpoint(path: str | Path) -> Path:
    """Returns the file of weights at `path`, or model.safetensors in a folder; UserError if there is none."""
    path = Path(path)
    path = path / "model.safetensors" if (path / "model.safetensors").is_file() else path
    if not path.is_file():
        hint = "published weights: python pretrained/download_ckpts.py"
        raise UserError(f"no checkpoint {path}{' (a folder)' if path.is_dir() else ''}; {hint}")
    return path


def _load_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            can_map = file.read(2) == b"PK" and path.suffix != ".safetensors"  # torch.load trusts that suffix
            file.seek(0)
            return torch.load(path if can_map else file, map_location="cpu", weights_only=True, mmap=can_map)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "").partition("GLOBAL ")[2]
        held = f"Python objects ({reason.split()[0]})" if reason else "more than tensors"
        advice = "if you trust its source, save the weights alone: torch.save({'model': weights}, path)"
        raise UserError(f"{path} holds {held}, refused because loading them can run code; {advice}") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged, fetch it again ({str(error).splitlines()[0]})") from None


def _misfit(theirs: dict, ours: dict, missing: list[str], surplus: list[str], shapes: list[str]) -> str:
    """Returns how a file and a model differ, in one line: in options (if both are Lattes), names and shapes."""
    parts = []
    file, model = _options(theirs), _options(ours)
    differ = [key for key in file if key in model and file[key] != model[key]]
    if differ:
        there, here = (", ".join(f"{key}={options[key]}" for key in differ) for options in (file, model))
        parts.append(f"the file has {there}, the model {here}")
        if "num_skips" in differ and not file["num_skips"]:
            parts.append("it is a Latte without skips: sample it as model=Latte-XL/2, train from it with pretrained=")
        elif "num_skips" in differ and not model["num_skips"]:
            parts.append("it has skip branches: use model=Latte-skip")
        else:
            parts.append("set these options as in the file")
    shapes = [f"{name} {list(theirs[name].shape)}, not {list(ours[name].shape)}" for name in shapes]
    for problem, names in (("missing", missing), ("surplus", surplus), ("of another shape", shapes)):
        if names:
            parts.append(f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    return "; ".join(parts)


def _count_skips(state: dict[str, Tensor]) -> int:
    return sum(name.startswith("skip_linears.") and name.endswith(".weight") for name in state)


def _options(state: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the options of a Latte, read from the shapes of its weights; empty for another model."""
    if not {"x_embedder.proj.weight", "pos_embed", "temp_embed", "final_layer.linear.weight"} <= state.keys():
        return {}
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    latent_size = math.isqrt(state["pos_embed"].shape[1]) * patch_size
    table = state.get("y_embedder.embedding_table.weight")  # one row per class and one for the null label
    return {
        "hidden_size": hidden_size,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_skips": _count_skips(state),
        "num_classes": None if table is None else len(table) - 1,
        "num_frames": f"{state['temp_embed'].shape[1]} (of latents)",
        "image_size": f"{latent_size * 8} (with an 8x VAE)",
        "learn_sigma": len(state["final_layer.linear.weight"]) == 2 * in_channels * patch_size**2,
    }
