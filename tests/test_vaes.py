"""Contracts of models/vaes.py and of the codec for each class of autoencoder, on tiny instances with random weights."""

import inspect
from typing import Any

import diffusers
import pytest
import torch

from configs import ROOT, SampleConfig, UserError
from models.autoencoder import LatentCodec, load_codec
from models.vaes import KINDS, VaeSpec, config_spec, vae_spec

KL = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=2)
WAN = dict(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
SMALL = dict(latent_channels=4, layers_per_block=1)
LTX = dict(block_out_channels=(8,) * 4, layers_per_block=(1,) * 5, latent_channels=8)
TINY: dict[str, dict[str, Any]] = {
    "AsymmetricAutoencoderKL": dict(KL, down_block_out_channels=(4, 4, 8), up_block_out_channels=(8, 8, 8)),
    "AutoencoderDC": dict(
        latent_channels=4,
        attention_head_dim=2,
        **{f"{part}_block_types": ("ResBlock", "EfficientViTBlock") for part in ("encoder", "decoder")},
        **{f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")},
        **{f"{part}_qkv_multiscales": ((), (5,)) for part in ("encoder", "decoder")},
        **{f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")},
        scaling_factor=0.41407,
    ),
    "AutoencoderKL": dict(KL, block_out_channels=(4, 4, 8), shift_factor=0.5),
    "AutoencoderKLAllegro": dict(SMALL, block_out_channels=(8,) * 4, norm_num_groups=2),
    "AutoencoderKLCogVideoX": dict(
        SMALL,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
    ),
    "AutoencoderKLCosmos": dict(
        latent_channels=4,
        encoder_block_out_channels=(4,) * 4,
        decode_block_out_channels=(4,) * 4,
        attention_resolutions=(8,),
        resolution=32,
        num_layers=1,
        latents_mean=[0.1 * i for i in range(12)],  # of 4 channels in each of 3 frames
        latents_std=[1.0 + i for i in range(12)],
    ),
    "AutoencoderKLFlux2": dict(KL, block_out_channels=(4, 4, 8), latent_channels=4),
    "AutoencoderKLHunyuanImage": dict(
        SMALL,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32,) * 3,
        spatial_compression_ratio=4,
        sample_size=64,
    ),
    "AutoencoderKLHunyuanImageRefiner": dict(SMALL, block_out_channels=(4, 4, 4, 8, 8)),
    "AutoencoderKLHunyuanVideo": dict(SMALL, block_out_channels=(4,) * 4, norm_num_groups=2),
    "AutoencoderKLHunyuanVideo15": dict(
        SMALL, block_out_channels=(4, 4, 8, 8), spatial_compression_ratio=8, temporal_compression_ratio=4
    ),
    "AutoencoderKLKVAE": dict(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1, 1)),
    "AutoencoderKLKVAEVideo": dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4),
    "AutoencoderKLLTX2Video": dict(
        LTX, decoder_block_out_channels=(16, 32, 64), decoder_layers_per_block=(1,) * 4, patch_size=1
    ),
    "AutoencoderKLLTXVideo": dict(
        LTX,
        decoder_block_out_channels=(8,) * 4,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        timestep_conditioning=True,
        patch_size=2,
    ),
    "AutoencoderKLMagvit": dict(SMALL, block_out_channels=(4,) * 4, norm_num_groups=2),
    "AutoencoderKLMochi": dict(
        latent_channels=4,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
        add_attention_block=(False, False, False, False, True),
        latents_mean=[0.1] * 4,
        latents_std=[0.9] * 4,
    ),
    "AutoencoderKLQwenImage": WAN,
    "AutoencoderKLQwenImage21": dict(WAN, dim_mult=[1] * 5, decoder_base_dim=4),
    "AutoencoderKLTemporalDecoder": dict(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), latent_channels=4
    ),
    "AutoencoderKLWan": WAN,
    "AutoencoderTiny": {
        f"{part}_{key}": (value,) * 3 for part in ("encoder", "decoder") for key, value in (("block_out_channels", 4),)
    }
    | dict(num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)),
    "AutoencoderVidTok": dict(ch=32, ch_mult=[1, 1, 1], z_channels=4, num_res_blocks=1),
    "Kandinsky6SRVAE": dict(SMALL, encoder_block_out_channels=(4, 8, 8, 8), decoder_block_out_channels=(4, 8, 8, 8)),
    "VQModel": dict(KL, block_out_channels=(4, 4, 8)),
}
INSTALLED = [name for name in KINDS if hasattr(diffusers, name)]
SIZE = 32


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(diffusers, name)(**TINY[name])


def possible_lengths(spec: VaeSpec) -> list[int]:
    """The first three lengths of a clip."""
    step, first = spec.time * spec.multiple, int(spec.causal)
    return [first + step * k for k in range(3) if first + step * k] if spec.time > 1 else [1, 2, 5]


def videos(num_frames: int, num_clips: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(num_clips, num_frames, 3, SIZE, SIZE, generator=generator) * 2 - 1


@pytest.mark.parametrize("name", INSTALLED)
def test_each_class_has_the_shapes_that_its_config_says(name):
    """Latents and decoded videos of all lengths, stills among them; bytes, chunks and normalization change nothing."""
    codec = LatentCodec(make(name))
    spec = codec.spec
    for num_frames in possible_lengths(spec):
        x = videos(num_frames)
        mean, std = codec.moments(x)
        shape = (2, spec.latent_frames(num_frames), spec.channels, SIZE // spec.space, SIZE // spec.space)
        assert mean.shape == std.shape == shape and mean.dtype == torch.float32
        decoded = codec.decode(mean)
        assert decoded.shape == x.shape and decoded.abs().max() <= 1 and decoded.std() > 0
    if spec.causal:
        both = codec.moments(torch.cat([x, videos(3)], dim=1), num_stills=3)[0]
        alone = codec.moments(videos(3).flatten(0, 1)[:, None])[0].unflatten(0, (2, 3))[:, :, 0]
        torch.testing.assert_close(both[:, : shape[1]], mean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(both[:, shape[1] :], alone, rtol=1e-3, atol=1e-3)


def test_lengths_are_those_of_the_class_and_others_are_refused_with_the_nearest():
    """1 + 4k for Wan, 1 + 8k for CogVideoX, whose decoder pairs latent frames, 4k for Allegro, any for images."""
    wan, cog = VaeSpec("Wan", 16, 4, 8), VaeSpec("CogVideoX", 16, 4, 8, multiple=2)
    allegro, kl = VaeSpec("Allegro", 4, 4, 8, causal=False), VaeSpec("KL", 4, 1, 8)
    assert [wan.latent_frames(n) for n in (1, 5, 17, 81)] == [1, 2, 5, 21]
    assert [cog.latent_frames(n) for n in (1, 9, 17, 49)] == [1, 3, 5, 13]
    assert [allegro.latent_frames(n) for n in (4, 16)] == [1, 4]
    assert [kl.latent_frames(n) for n in (1, 16)] == [1, 16]
    for spec, bad, near in ((wan, 16, "13 and 17"), (wan, 2, "1 and 5"), (cog, 5, "1 and 9"), (allegro, 3, "4")):
        with pytest.raises(UserError, match=rf"num_frames: \w+ takes \S+.* frames, not {bad}; the nearest: {near}$"):
            spec.latent_frames(bad)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('{"_class_name": "AutoencoderOobleck"}', "AutoencoderOobleck in .* cannot be used; these can: Asymm.*Wan"),
        ('{"_class_name": "AutoencoderRAE"}', "AutoencoderRAE in .* cannot be used"),
        ('{"_class_name": "AutoencoderKLWan"}', "lacks"),
        ('{"_class_name": "AutoencoderKL", "latent_channels": 4}', "lacks"),
        ("[1, 2]", "config.json is damaged"),
        ("{", "config.json is damaged"),
    ],
)
def test_a_vae_that_cannot_work_is_one_line(tmp_path, config, says):
    (tmp_path / "config.json").write_text(config)
    args = SampleConfig(vae=str(tmp_path))
    with pytest.raises(UserError, match=says) as error:
        vae_spec(args)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=says):
        LatentCodec.from_pretrained(tmp_path)


def test_statistics_are_those_of_the_config():
    """A shift; mean and deviation of channels; of channels and frames for Cosmos, the last frame's from there on."""
    x, raw = videos(17), {}
    for name in ("AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLCosmos"):
        codec = LatentCodec(make(name))
        clip = x if codec.spec.time > 1 else x[:, :1]
        z = codec.vae.encode(clip[:1].transpose(1, 2) if codec.spec.time > 1 else clip[:1, 0]).latent_dist.mode()
        raw[name] = z.transpose(1, 2)[0] if codec.spec.time > 1 else z, codec.encode(clip)[0], codec.vae.config
    z, ours, config = raw["AutoencoderKL"]
    torch.testing.assert_close(ours, (z - 0.5) * config.scaling_factor, rtol=1e-3, atol=1e-4)
    z, ours, config = raw["AutoencoderKLWan"]
    mean, std = (torch.tensor(each)[:, None, None] for each in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(ours, (z - mean) / std, rtol=1e-3, atol=1e-4)
    z, ours, config = raw["AutoencoderKLCosmos"]
    for frame in range(3):
        mean, std = (torch.tensor(each[frame::3])[:, None, None] for each in (config.latents_mean, config.latents_std))
        torch.testing.assert_close(ours[frame], (z[frame] - mean) / std, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderKLWan"])
def test_measured_statistics_bring_channels_to_mean_0_and_deviation_1_and_decode_the_same(name):
    codec = LatentCodec(make(name))
    x = videos(5)
    z, decoded, encoder = codec.encode(x), codec.decode(codec.encode(x)), codec.fingerprint()
    codec.normalize(z.mean((0, 1, 3, 4)).tolist(), z.std((0, 1, 3, 4)).tolist())
    measured = codec.encode(x)
    torch.testing.assert_close(measured.mean((0, 1, 3, 4)), torch.zeros(codec.spec.channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(measured.std((0, 1, 3, 4)), torch.ones(codec.spec.channels), rtol=1e-3, atol=0)
    torch.testing.assert_close(codec.decode(measured), decoded, rtol=1e-3, atol=1e-3)
    assert codec.fingerprint() == encoder  # latents on disk are without them


PUBLISHED = {  # where the defaults of a class are not the published model
    "AsymmetricAutoencoderKL": dict(down_block_out_channels=(128, 256, 512, 512)),
    "AutoencoderKL": dict(block_out_channels=(128, 256, 512, 512)),
    "AutoencoderKLHunyuanImage": dict(latent_channels=64, spatial_compression_ratio=32),
    "AutoencoderKLTemporalDecoder": dict(block_out_channels=(128, 256, 512, 512)),
    "VQModel": dict(block_out_channels=(128, 256, 512), latent_channels=3),
}


def table_row(name: str) -> str:
    """A row of the table in train_scripts/README.md."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    config = {each.name: each.default for each in parameters} | PUBLISHED.get(name, {}) | {"_class_name": name}
    spec, codec = config_spec(config), LatentCodec(make(name))
    statistics = "stated" if codec.has_statistics else "measured"
    cells = (f"`{name}`", spec.channels, spec.time, spec.space, spec.lengths, statistics, KINDS[name].memory)
    return f"| {' | '.join(map(str, cells))} |"


def test_the_readme_has_the_table_of_all_classes():
    assert list(TINY) == list(KINDS) == sorted(KINDS)
    text = (ROOT / "train_scripts/README.md").read_text()
    missing = [row for row in map(table_row, INSTALLED) if row not in text]
    assert not missing, "\n".join(missing)


def test_config_keys_of_published_models_are_read():
    """LTX 0.9.5 halves time and space in separate stages; Wan 2.2 starts with patches of 2."""
    stages = dict(spatio_temporal_scaling=[True] * 4, patch_size=4, patch_size_t=1, latent_channels=128)
    kinds = ["spatial", "temporal", "spatiotemporal", "spatiotemporal"]
    ltx = config_spec({"_class_name": "AutoencoderKLLTXVideo", **stages, "downsample_type": kinds})
    assert (ltx.time, ltx.space) == (8, 32)
    wan = {"_class_name": "AutoencoderKLWan", "z_dim": 48, "temperal_downsample": [False, True, True], "patch_size": 2}
    assert config_spec(wan) == VaeSpec("AutoencoderKLWan", 48, 4, 16)
    fewer = {"_class_name": "AutoencoderVidTok", "z_channels": 4, "ch_mult": [1, 2, 4, 4], "is_causal": False}
    fewer |= {"spatial_ds": None, "tempo_ds": None}
    assert config_spec(fewer).lengths == "16k"


def test_own_tiles_bound_what_the_vae_sees_along_time(tmp_path):
    """LTX decodes 33 frames in tiles, where asked; a class without tiles says so."""
    make("AutoencoderKLLTXVideo").save_pretrained(tmp_path)
    z, seen = torch.randn(1, 9, 8, 4, 4), []
    for tiling in (None, True):
        codec = load_codec(SampleConfig(vae=str(tmp_path), vae_tiling=tiling), torch.device("cpu"))
        codec.vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
        assert codec.decode(z).shape == (1, 33, 3, 32, 32)
    assert seen[0] == 9 and len(seen[1:]) > 1 and max(seen[1:]) < 9
    for name in ("AutoencoderKLTemporalDecoder", "Kandinsky6SRVAE"):
        with pytest.raises(UserError, match=f"vae_tiling: {name} has no tiles; leave it out"):
            LatentCodec(make(name)).use_own_tiles()
