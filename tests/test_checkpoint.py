"""models/checkpoint.py: every form of file loads, strictly; every wrong file is one clear line."""

import argparse
import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from configs import SampleConfig, UserError, load_config
from configs.files import atomic_path, file_hash
from models import get_models, made_of
from models.checkpoint import count_skips, load_checkpoint, load_state_dict, save_checkpoint, weights_hash
from models.latte import Latte
from sample.pipeline import generate, load
from tools import export_checkpoint

SIZE = {
    "input_size": 8,
    "hidden_size": 16,
    "depth": 8,
    "num_heads": 2,
    "num_frames": 4,
    "num_classes": 5,
    "num_skips": 2,
}


def latte(**changes) -> Latte:
    return Latte(**SIZE | changes)


def randomise(model: Latte) -> Latte:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def assert_loads(path: Path, expected: dict[str, torch.Tensor]) -> None:
    model = latte()
    load_checkpoint(model, path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name].to(value.dtype), rtol=0, atol=0)


def error_of(path: Path, model: Latte | None = None) -> str:
    """The message of the UserError that loading `path` raises, which must be one line that names the file."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(model or latte(), path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_every_form_of_file_loads(tmp_path):
    """`ema` before `model` before bare, in the zip and the old torch format, and safetensors under any name."""
    weights = randomise(latte()).state_dict()
    other = latte().state_dict()
    torch.save({"model": other, "ema": weights}, tmp_path / "ema.pt")
    torch.save({"model": weights, "step": 7}, tmp_path / "model.pt")
    torch.save(weights, tmp_path / "bare.pt")
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "weights.safetensors")
    save_file(weights, tmp_path / "safetensors.pt")
    for path in tmp_path.iterdir():
        assert_loads(path, weights)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_stripped(tmp_path, prefix):
    weights = randomise(latte()).state_dict()
    torch.save({"model": {prefix + name: value for name, value in weights.items()}}, tmp_path / "a.pt")
    assert_loads(tmp_path / "a.pt", weights)


def test_half_precision_takes_the_models_type(tmp_path):
    weights = {name: value.bfloat16() for name, value in randomise(latte()).state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    assert_loads(tmp_path / "a.safetensors", weights)


@pytest.mark.parametrize(
    ("saved", "loaded", "words"),
    [
        ({"input_size": 16}, {}, ["image_size=128", "image_size=64", "pos_embed"]),
        ({"num_frames": 16}, {}, ["num_frames=16", "num_frames=4", "temp_embed"]),
        ({"num_classes": 101}, {}, ["num_classes=101", "num_classes=5", "y_embedder"]),
        ({"num_classes": None}, {}, ["num_classes=None", "1 missing", "y_embedder"]),
        ({}, {"num_classes": None}, ["the file has num_classes=5", "1 surplus"]),
        ({"num_skips": 0}, {}, ["model=Latte-XL/2", "pretrained=", "8 missing (skip_norms.0.weight"]),
        ({}, {"num_skips": 0}, ["model=Latte-skip", "8 surplus"]),
        ({"num_skips": 1}, {}, ["num_skips=1", "num_skips=2"]),
        ({"depth": 12}, {}, ["depth=12", "depth=8", "surplus (blocks."]),
        ({"hidden_size": 32}, {}, ["hidden_size=32", "of another shape"]),
        ({"learn_sigma": False}, {}, ["learn_sigma=False"]),
        ({"mlp_ratio": 2.0}, {}, ["blocks.0.mlp.fc1.weight [32, 16], not [64, 16]"]),
    ],
)
def test_a_checkpoint_of_another_model_is_explained(tmp_path, saved, loaded, words):
    """The line names the options that differ, in the file and in the model, and the first names concerned."""
    save_checkpoint(tmp_path / "a.pt", ema=latte(**saved).state_dict())
    message = error_of(tmp_path / "a.pt", latte(**loaded))
    assert all(word in message for word in words), message


def test_a_missing_and_a_surplus_name_are_listed(tmp_path):
    weights = latte().state_dict()
    weights["extra"] = weights.pop("final_layer.linear.bias")
    save_checkpoint(tmp_path / "a.pt", model=weights)
    message = error_of(tmp_path / "a.pt")
    assert "1 missing (final_layer.linear.bias)" in message and "1 surplus (extra)" in message


@pytest.mark.parametrize("keep", [0.5, 0.99])
@pytest.mark.parametrize("name", ["a.pt", "old.pt", "a.safetensors"])
def test_truncated_file(tmp_path, name, keep):
    weights = randomise(latte()).state_dict()
    path = tmp_path / name
    if name == "a.safetensors":
        save_file(weights, path)
    else:
        torch.save({"ema": weights}, path, _use_new_zipfile_serialization=name == "a.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert "truncated or damaged" in error_of(path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2771053040\n", "git lfs pull"),
        (b'{"error": "Repository not found"}', "holds no weights"),
        (b"", "0 bytes"),
    ],
)
def test_something_else_under_the_name_of_a_checkpoint(tmp_path, content, word):
    (tmp_path / "a.pt").write_bytes(content)
    assert word in error_of(tmp_path / "a.pt")


def test_no_file_names_the_download(tmp_path):
    assert "pretrained/download_ckpts.py" in error_of(tmp_path / "ucf101-skip.pt")
    assert "folder" in error_of(tmp_path)


def test_a_full_pickle_is_refused(tmp_path):
    """An object of any class could run code when unpickled; the line names the class and the way out."""
    path = tmp_path / "a.pt"
    torch.save({"model": latte().state_dict(), "args": argparse.Namespace(lr=1)}, path)
    message = error_of(path)
    assert "argparse.Namespace" in message and "torch.save" in message


def test_a_dict_without_weights(tmp_path):
    save_checkpoint(tmp_path / "a.pt", optimizer={"lr": 1.0}, step=3)
    assert "found the keys optimizer, step" in error_of(tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    assert "list" in error_of(tmp_path / "b.pt")


def test_saving_is_atomic(tmp_path):
    """A failed save leaves the file of before and no other."""
    path = tmp_path / "folder" / "a.pt"
    save_checkpoint(path, ema={"a": torch.ones(2)})
    with pytest.raises(AttributeError):
        save_checkpoint(path, ema=lambda: None)  # cannot be pickled
    assert list(path.parent.iterdir()) == [path]
    torch.testing.assert_close(load_state_dict(path), {"a": torch.ones(2)})


def test_atomic_path_hides_what_is_half_written(tmp_path):
    with atomic_path(tmp_path / "a.mp4") as temporary:
        temporary.write_text("half")
        assert not list(tmp_path.glob("*.mp4"))
    assert (tmp_path / "a.mp4").read_text() == "half"


def test_file_hash_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"weights" * 1000)
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"weights" * 1000).hexdigest()


def test_the_hash_of_weights_depends_on_the_weights_alone(tmp_path):
    """Format, metadata, prefixes, order and what else a file holds do not matter; a type, shape, name or bit does."""
    weights = {"b": torch.tensor([1.0, 2.0]), "a": torch.ones((), dtype=torch.bfloat16), "c": torch.ones(2, 3).T}
    same = {f"module.{name}": value for name, value in reversed(weights.items())}
    torch.save({"ema": weights, "model": {"b": torch.zeros(2)}, "step": 3}, tmp_path / "ema.pt")
    torch.save(same, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    weights = {name: value.contiguous() for name, value in weights.items()}
    save_file(weights, tmp_path / "a.safetensors", metadata={"options": "{}"})
    digest = hashlib.sha256()
    for head, value in (("a torch.bfloat16 []", weights["a"]), ("b torch.float32 [2]", weights["b"])):
        digest.update(f"{head}\n".encode() + bytes(value.flatten().view(torch.uint8).tolist()))
    digest.update(b"c torch.float32 [3, 2]\n" + np.ones(6, np.float32).tobytes())
    assert {weights_hash(path) for path in tmp_path.iterdir()} == {digest.hexdigest()}
    for name, value in (
        ("b", weights["b"].half()),
        ("b", weights["b"][None]),
        ("d", weights["b"]),
        ("b", -weights["b"]),
    ):
        save_file({key: weights[key] for key in "ac"} | {name: value}, tmp_path / "other.safetensors")
        assert weights_hash(tmp_path / "other.safetensors") != digest.hexdigest()


def test_hub_folder_round_trip(tmp_path):
    """save_pretrained keeps the options beside the weights; from_pretrained needs nothing else, and is in eval mode."""
    model = randomise(latte())
    model.save_pretrained(tmp_path)
    again = Latte.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert again.num_skips == 2 and not again.training


def test_a_model_that_is_shared_samples_the_same_elsewhere(tiny, tmp_path, monkeypatch):
    """push_to_hub uploads config, weights with their options, a model card and the VAE. A copy needs nothing else."""
    cfg = load_config(SampleConfig, tiny)
    model = get_models(cfg)
    load_checkpoint(model, cfg.ckpt)
    vae = tmp_path / "mine"
    shutil.copytree(tiny.parent / "vae", vae / "vae")
    model.options = made_of(cfg, ["ball", "cup", "dog"], step=20) | {"pretrained_model_path": str(vae)}
    shared = tmp_path / "shared"

    def upload_folder(self, *, repo_id, folder_path, **others):
        assert repo_id == "you/latte"
        shutil.copytree(folder_path, shared)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **others: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model.push_to_hub("you/latte")
    there = {str(path.relative_to(shared)) for path in shared.rglob("*") if path.is_file()}
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert there == {"README.md", "config.json", "model.safetensors", "vae/config.json", weights}

    sampler = {"sample_method": "ddim", "num_sampling_steps": 3, "precision": "fp32", "cfg_scale": 2.0}
    first = generate(load(tiny, "cpu", num_sampling_steps=3), [3], [1])
    vae.rename(tmp_path / "gone")
    again = load(shared, "cpu", **sampler)
    assert torch.equal(generate(again, [3], ["cup"]), first)
    again.model.save_pretrained(tmp_path / "twice")  # what was loaded can be shared, too
    assert torch.equal(generate(load(tmp_path / "twice", "cpu", **sampler), [3], ["cup"]), first)


def test_hub_folder_loads_strictly(tmp_path):
    """The mixin's own default drops what does not fit in silence."""
    model = latte()
    model.save_pretrained(tmp_path)
    weights = model.state_dict()
    del weights["final_layer.linear.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(final_layer.linear.bias\)"):
        Latte.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="num_skips=2, the model num_skips=0"):
        Latte.from_pretrained(tmp_path, num_skips=0)


def test_skips_of_a_file_are_counted(tmp_path):
    for num_skips in (0, 2):
        save_checkpoint(tmp_path / "a.pt", ema=latte(num_skips=num_skips).state_dict())
        assert count_skips(tmp_path / "a.pt") == num_skips


def test_export_keeps_the_ema_and_refuses_what_half_precision_cannot_hold(tmp_path, monkeypatch):
    def export(source: str, *flags: str) -> None:
        argv = ["export_checkpoint.py", f"{tmp_path}/{source}.pt", f"{tmp_path}/{source}.safetensors", *flags]
        monkeypatch.setattr("sys.argv", argv)
        export_checkpoint.main()

    torch.save({"ema": {"w": torch.tensor([1.0])}, "model": {"w": torch.tensor([2.0])}}, tmp_path / "a.pt")
    export("a", "--dtype", "fp16", "--dry-run")
    assert not (tmp_path / "a.safetensors").exists()
    export("a", "--dtype", "fp16")
    weight = load_state_dict(tmp_path / "a.safetensors")["w"]
    assert weight.dtype == torch.float16 and weight.item() == 1.0
    torch.save({"ema": {"w": torch.tensor([1e6])}}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="1 weights are not finite in fp16, w the first"):
        export("b", "--dtype", "fp16")
    assert not (tmp_path / "b.safetensors").exists()
    export("b")
    assert load_state_dict(tmp_path / "b.safetensors")["w"].dtype == torch.float32
