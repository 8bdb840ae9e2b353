"""A video VAE, a VAE without statistics and a class of one's own, from YAML to video: latents, training, sampling."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import train as train_program
from configs import ROOT, SampleConfig, TrainConfig, UserError, load_config
from datasets import get_dataset
from datasets.readers import read_video
from models.autoencoder import load_codec
from sample import sample as sample_program
from tests.test_vaes import make
from tools import encode_latents as encode_program
from tools.common.training import latent_moments

pytestmark = pytest.mark.usefixtures("fresh_process_state")

MODEL = ["model=Latte-skip", "image_size=32", "num_classes=2", "hidden_size=16", "depth=8", "num_heads=2"]
TRAIN = [
    "dataset=video_folder",
    "num_workers=0",
    "local_batch_size=2",
    "max_train_steps=2",
    "log_every=1",
    "frame_interval=2",
]


class Squares:
    """A class of one's own: squares of 8 pixels, and groups of 2 frames, of their mean."""

    latent_channels = 3
    stride = (2, 8)
    causal = False

    def encode(self, videos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = pixel_unshuffle(videos, 8).unflatten(2, (3, 64)).mean(3)  # (B, F, 3, h, w)
        mean = 5 + x.unflatten(1, (-1, 2)).mean(2)
        return mean, torch.full_like(mean, 0.1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return pixel_shuffle((latents - 5).repeat_interleave(64, 2).repeat_interleave(2, 1), 8)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two of the demo's clips of 24 frames, in two classes."""
    for name in ("Box", "City"):
        (tmp_path / "videos" / name).mkdir(parents=True)
        shutil.copy(ROOT / f"datasets/demo/train/{name}/v_{name}_g01_c01.mp4", tmp_path / "videos" / name)
    return tmp_path / "videos"


def call(monkeypatch, program, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, *options])
    program.main()


def run_of(folder: Path) -> Path:
    return folder / "results/000-Latte-skip-video_folder"


def sample(monkeypatch, folder: Path, *options: str) -> None:
    ckpt, out = run_of(folder) / "checkpoints/0000002.pt", folder / "samples"
    few = ["sample_method=ddim", "num_sampling_steps=3", "cfg_scale=2", "samples_per_class=1", "precision=fp32"]
    config = folder / "empty.yaml"
    config.write_text("seed: 0\n")
    call(monkeypatch, sample_program, "--config", str(config), f"ckpt={ckpt}", f"save_video_path={out}", *few, *options)


def test_a_causal_video_vae_from_yaml_to_video(videos, tmp_path, monkeypatch):
    """9 frames are 3 x 16 x 4 x 4 latents. Clips and stills on disk are those of the codec; a sample has 9 frames."""
    make("AutoencoderKLWan").save_pretrained(tmp_path / "wan")
    shared = [*MODEL, f"vae={tmp_path}/wan", "num_frames=9"]
    data = [
        *TRAIN,
        f"data_path={videos}",
        f"latents_path={tmp_path}/latents",
        "latents_clips=3",
        "horizontal_flip=true",
    ]
    call(monkeypatch, encode_program, *shared, *data)
    with pytest.raises(UserError, match=r"^latents_path: .* was made with latents_clips=3, not 4; choose another"):
        call(monkeypatch, encode_program, *shared, *data, "latents_clips=4")
    stored = load_file(tmp_path / "latents/Box/v_Box_g01_c01.mp4.safetensors")
    assert stored["starts"].tolist() == [0, 2, 4, 24]  # of 7 possible ones, 9 frames 2 apart; 24 frames
    assert stored["moments"].shape == (3, 3, 2, 32, 4, 4) and stored["stills"].shape == (3, 2, 32, 4, 4)

    cfg = load_config(TrainConfig, None, [*shared, *data, "use_image_num=2"])
    item = get_dataset(cfg)[0, 1]
    assert item["video"].shape == (3 + 2, 32, 4, 4)
    pixels = load_config(TrainConfig, None, [*shared, *TRAIN, f"data_path={videos}"])
    codec = load_codec(cfg, torch.device("cpu"))
    frames = get_dataset(pixels).read(videos / "Box/v_Box_g01_c01.mp4", lambda total: range(4, 22, 2))
    frames = encode_program.make_variants(pixels, get_dataset(pixels), frames).transpose(0, 1)  # (1, 9, 3, 32, 32)
    mean, std = codec.moments(torch.cat([frames, frames[:, :1]], dim=1), num_stills=1)
    for part, expected in (("moments", slice(3)), ("stills", 3)):
        ours = torch.cat([mean, std], dim=2)[0, expected]
        torch.testing.assert_close(stored[part][2, ..., 0, :, :, :].float(), ours, rtol=2e-3, atol=2e-3)

    few = [
        "preview_every=2",
        "preview_clips=1",
        "sample_method=ddim",
        "num_sampling_steps=2",
        f"results_dir={tmp_path}/results",
    ]
    call(monkeypatch, train_program, *shared, *data, *few, "use_image_num=2")
    assert (run_of(tmp_path) / "previews/0000002-uncached.mp4").stat().st_size > 500
    with pytest.raises(UserError, match="was made with num_frames=9, not 17"):
        call(monkeypatch, train_program, *shared, *data, *few, "num_frames=17")
    sample(monkeypatch, tmp_path, *shared, f"data_path={videos}", "dataset=video_folder")
    assert read_video(tmp_path / "samples/uncached/000000_Box.mp4", range).shape == (9, 3, 32, 32)
    with pytest.raises(UserError, match=r"AutoencoderKLWan takes 1 \+ 4k frames, not 16; the nearest: 13 and 17"):
        sample(monkeypatch, tmp_path, *shared, "num_frames=16")


@pytest.mark.parametrize("encoded", [False, True], ids=["pixels", "latents"])
def test_statistics_of_a_class_of_ones_own_are_measured_once_and_kept(videos, tmp_path, monkeypatch, encoded):
    """Latents that the model sees have mean 0 and deviation 1; a resumed run and a sampler have the same numbers."""
    shared = [*MODEL, "vae=tests.test_vae_runs:Squares", "num_frames=8"]
    data = [*TRAIN, f"data_path={videos}", f"results_dir={tmp_path}/results"]
    if encoded:
        data += [f"latents_path={tmp_path}/latents", "latents_clips=1"]
        call(monkeypatch, encode_program, *shared, *data)
    seen = []
    clip_losses = train_program.clip_losses
    monkeypatch.setattr(train_program, "clip_losses", lambda *args: seen.append(args) or clip_losses(*args))
    call(monkeypatch, train_program, *shared, *data)
    run = load_config(TrainConfig, run_of(tmp_path) / "config.yaml")
    assert len(run.latent_mean) == 3 and all(3 < mean < 7 for mean in run.latent_mean)
    _, _, encoder, batch, _, cfg, _ = seen[0]
    assert cfg.latent_mean == run.latent_mean and (encoder is None) == encoded
    mean, std = latent_moments(batch["video"], encoder, cfg)  # two clips, both of those measured
    assert mean.shape == (2, 4, 3, 4, 4)
    if encoded:  # the one clip of each video
        torch.testing.assert_close(mean.mean((0, 1, 3, 4)), torch.zeros(3), rtol=0, atol=1e-2)
        square = (mean**2 + std**2).mean((0, 1, 3, 4))
        torch.testing.assert_close(square, torch.ones(3), rtol=1e-2, atol=0)

    AcceleratorState._reset_state(reset_partial_state=True)
    call(monkeypatch, train_program, *shared, *data, "max_train_steps=3")
    assert [path.name for path in (tmp_path / "results").iterdir()] == [run_of(tmp_path).name]
    assert seen[-1][5].latent_mean == run.latent_mean
    log = (run_of(tmp_path) / "log.txt").read_text()
    assert log.count("measured mean") == 1 and "steps 3 to 3" in log

    with pytest.raises(UserError, match=r"Squares states no statistics; give latent_mean"):
        load_codec(SampleConfig(vae=f"{__name__}:Squares"), torch.device("cpu"))
    sample(monkeypatch, tmp_path, *shared)  # the weights carry the numbers
    record = json.loads((tmp_path / "samples/sample.json").read_text())
    assert record["config"]["latent_mean"] == run.latent_mean and record["config"]["in_channels"] == 3


class Unfit(Squares):
    stride = (2, 16)


class Needy(Squares):
    def __init__(self, weights: str):
        pass


class Misstated(Squares):
    stride = 8


@pytest.mark.parametrize(
    ("vae", "says"),
    [
        ("no.such:Thing", "cannot import no.such:Thing"),
        ("json:loads", "lacks latent_channels, stride, encode, decode"),
        (f"{__name__}:Needy", "is made without arguments"),
        (f"{__name__}:Misstated", r"stride \(time, space\), not 8"),
        (f"{__name__}:Unfit", r"Unfit.encode: latents \[1, 1, 3, 4, 4\] and .* do not fit videos \[1, 2, 3, 32, 32\]"),
    ],
)
def test_a_class_that_is_no_vae_is_one_line(vae, says):
    with pytest.raises(UserError, match=says):
        load_codec(SampleConfig(vae=vae), torch.device("cpu"), need_statistics=False).encode(
            torch.zeros(1, 2, 3, 32, 32)
        )


def test_latents_of_another_shape_than_the_vae_gives_are_refused(videos, tmp_path, monkeypatch):
    """Also where no VAE is loaded: here its folder is gone since, and the options mean the published one."""
    make("AutoencoderKLWan").save_pretrained(tmp_path / "wan")
    shared = [*MODEL, *TRAIN, f"vae={tmp_path}/wan", "num_frames=9", f"data_path={videos}"]
    shared += [f"latents_path={tmp_path}/latents", f"results_dir={tmp_path}/results"]
    call(monkeypatch, encode_program, *shared)
    shutil.rmtree(tmp_path / "wan")
    with pytest.raises(UserError, match=r"its clips are \[3, 32, 4, 4\], those of vae=\S+ are \[9, 8, 4, 4\]"):
        call(monkeypatch, train_program, *shared)
