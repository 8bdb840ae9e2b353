"""tools/metrics/statistics.py and the intervals of distances: closed forms, and coverage in simulations."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from tools.metrics import statistics
from tools.metrics.scores import change_of_distance, distance_to_real, frechet_distance
from tools.metrics.statistics import (
    difference_interval,
    interval_text,
    jackknife,
    mean_and_margin,
    positive_interval,
    ratio_interval,
    swap_test,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_paired_intervals_are_those_of_scipys_paired_t_test():
    """Clips differ far more from one another than the two ways to sample do: only pairs resolve the difference."""
    a = torch.rand(30).double() * 20 + 20
    b = a + 0.3 + 0.5 * torch.randn(30).double()
    found = difference_interval(b.tolist(), a.tolist())
    expected = stats.ttest_rel(b.numpy(), a.numpy()).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["low"] > 0 and found["value"] < mean_and_margin(a.tolist())["margin"]
    ratio = ratio_interval(b.exp().tolist(), a.exp().tolist())
    assert ratio == pytest.approx({key: math.exp(value) for key, value in found.items()})


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(1.1, 1.9, "1.50 (1.10 to 1.90)"), (0.9, 2.1, "1.50 (0.90 to 2.10), not resolved"), (1.0, 2.0, "not resolved")],
)
def test_an_interval_that_holds_both_answers_resolves_nothing(low, high, text):
    assert interval_text({"value": 1.5, "low": low, "high": high}, 2, equal=1).endswith(text)
    assert interval_text(None, 2, equal=1) == ""


@pytest.mark.parametrize("groups", [20, 60, 100])
def test_the_jackknife_of_a_mean_is_students_interval(groups):
    """With a clip a group to the last digit, and without bias; more groups than clips are as many as there are."""
    x = torch.randn(60).double()
    value, margin, bias = jackknife(lambda clips: x[clips].mean().item(), 60, groups)
    expected = mean_and_margin(x.tolist())
    assert value == pytest.approx(expected["mean"]) and bias == pytest.approx(0, abs=1e-12)
    assert margin == pytest.approx(expected["margin"], rel=1e-9 if groups >= 60 else 0.3)


def test_the_jackknife_removes_a_bias_that_falls_as_one_over_n():
    """The variance over N has the bias -var / N: without it, it is the one over N - 1."""
    x = torch.randn(50).double()
    value, _, bias = jackknife(lambda clips: x[clips].var(correction=0).item(), 50, 50)
    assert value - bias == pytest.approx(x.var().item())


def test_the_swap_test_is_exact_on_all_swaps():
    """Of 8 pairs whose differences all have one sign, 2 of 256 swaps are as extreme; zeros are no evidence."""
    differences = torch.arange(1.0, 9)
    p = swap_test(lambda swapped: torch.where(swapped, -differences, differences).sum().item(), 8)
    assert p == pytest.approx(2 / 256, abs=0.02) and p >= 1 / (1 + statistics.PERMUTATIONS)
    assert swap_test(lambda swapped: 0.0, 8) == 1


def test_intervals_of_distances_never_reach_below_zero():
    assert positive_interval(2.0, 0.5) == [1.5, 2.5] and positive_interval(1.0, 3.0) == [0, 4]
    x = torch.randn(40, 1, 3)
    assert min(distance_to_real(x, x, 20)["interval"]) >= 0


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("num_fake, groups, has_interval", [(2, 20, False), (3, 2, False), (9, 1, False), (4, 2, True)])
def test_an_interval_needs_two_groups_and_four_clips(num_fake, groups, has_interval, correction):
    """With less there is a value alone: a covariance of the clips that are left needs two of them."""
    row = distance_to_real(torch.randn(9, 1, 3), torch.randn(num_fake, 1, 3), groups, correction=correction)
    assert math.isfinite(row["value"]) and ("interval" in row) == has_interval
    assert all(map(math.isfinite, row.get("interval", ())))


def test_frames_of_one_clip_are_not_independent():
    """Frames that are all alike add nothing: the interval is that of one frame a clip."""
    real, fake = torch.randn(100, 1, 3), torch.randn(50, 1, 3)
    intervals = [distance_to_real(real, f, 20)["interval"] for f in (fake, fake.expand(-1, 16, -1))]
    alone, repeated = (high - low for low, high in intervals)
    assert repeated == pytest.approx(alone, rel=0.1)


def test_nothing_is_extrapolated_from_few_clips():
    """From 3 clips a feature on, the distance is a line over 1/N; frames do not count as clips."""
    real = torch.randn(100, 4, 8)
    assert "infinite" in distance_to_real(real, torch.randn(24, 4, 8), 20)
    assert "infinite" not in distance_to_real(real, torch.randn(23, 4, 8), 20)
    assert distance_to_real(real, torch.randn(23, 4, 8), 0).keys() == {"value"}


# What a simulation repeats: D features, N fakes and 300 real rows; the fakes' mean and scale.
SETS = [(4, 60, 0.0, 1.0), (4, 60, 0.4, 0.6), (12, 150, 0.0, 1.0), (12, 150, 0.3, 0.7)]
REPEATS, SURE = 300, 0.91  # of intervals; the share that holds the truth should be 0.95 and is this at least


@pytest.mark.slow
@pytest.mark.parametrize(("D", "N", "shift", "scale"), SETS)
def test_intervals_of_distances_hold_the_truth(D, N, shift, scale):
    """The mean distance of N fakes, and that of infinitely many: in 95 % of repeats, and not far wider than needed."""
    real = torch.randn(300, 1, D).double()

    def fakes(n: int) -> Tensor:
        return torch.randn(n, 1, D).double() * scale + shift

    distances = [frechet_distance(real[:, 0], fakes(N)[:, 0]) for _ in range(400)]
    mean, infinite = np.mean(distances), frechet_distance(real[:, 0], fakes(200_000)[:, 0])
    found = [distance_to_real(real, fakes(N), 20, seed) for seed in range(REPEATS)]
    assert np.mean([f["interval"][0] <= mean <= f["interval"][1] for f in found]) >= SURE
    assert np.mean([f["infinite_interval"][0] <= infinite <= f["infinite_interval"][1] for f in found]) >= SURE
    extrapolated = np.array([f["infinite"] for f in found])
    sure = 4 * extrapolated.std() / REPEATS**0.5
    assert extrapolated.mean() == pytest.approx(infinite, abs=sure + 0.1 * (mean - infinite))
    width = np.mean([f["interval"][1] - f["interval"][0] for f in found])
    assert width < 1.6 * 2 * 2.09 * np.std(distances)  # 2.09: Student's t of 20 groups


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "noise"), [(0.0, 0.3), (0.4, 0.3), (0.4, 0.0)])
def test_paired_changes_of_distances_hold_the_truth(shift, noise, monkeypatch):
    """Sets that share seeds; the interval holds the mean change, though each distance alone varies far more."""
    monkeypatch.setattr("tools.metrics.scores.swap_test", lambda *_: 1.0)
    real, N, D = torch.randn(300, 6).double(), 90, 6

    def pair() -> tuple[Tensor, Tensor]:
        z = torch.randn(N, D).double()
        return z + shift + 0.1 + noise * torch.randn(N, D).double(), z + shift

    pairs = [pair() for _ in range(400)]
    distances = np.array([[frechet_distance(real, x) for x in each] for each in pairs])
    truth = (distances[:, 0] - distances[:, 1]).mean()
    found = [change_of_distance(real, *pair(), seed) for seed in range(REPEATS)]
    assert np.mean([f["low"] <= truth <= f["high"] for f in found]) >= SURE
    width = np.mean([f["high"] - f["low"] for f in found])
    assert width < 2 * 2.09 * 1.6 * (distances[:, 0] - distances[:, 1]).std()
    assert width < 2 * 2.09 * distances[:, 0].std()


@pytest.mark.slow
def test_the_swap_test_of_distances_rejects_as_often_as_it_says():
    """Sets that are alike: p below 0.05 in 5 % of repeats. Sets that are not: nearly always."""
    real, N, D = torch.randn(200, 3).double(), 40, 3

    def p(worse: float) -> float:
        z = torch.randn(N, D).double()
        a, b = (z + 0.3 * torch.randn(N, D).double() for _ in range(2))
        return change_of_distance(real, a + worse, b)["p"]

    assert np.mean([p(0.0) <= 0.05 for _ in range(100)]) <= 0.12  # 5 % and three standard deviations
    assert np.mean([p(0.5) <= 0.05 for _ in range(20)]) >= 0.9


@pytest.mark.slow
def test_intervals_of_means_and_ratios_hold_the_truth():
    """On skewed values, as errors are: near 95 % of 70 clips."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(400):
        control = rng.lognormal(0, 1, 70)
        values = control * rng.lognormal(0.2, 0.5, 70)
        ratio = ratio_interval(values, control)
        change = difference_interval(np.log(control) + rng.gamma(2, 1, 70), np.log(control))
        hits.append((ratio["low"] <= math.exp(0.2) <= ratio["high"], change["low"] <= 2 <= change["high"]))
    assert (np.mean(hits, axis=0) >= 0.92).all()
