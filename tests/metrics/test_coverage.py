"""Intervals contain the truth as often as they say. The whole simulation is benchmarks/coverage.py."""

import numpy as np
import pytest

from diffusers_ext.metrics.comparison import (
    frechet_interval,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.metrics.kid import kid
from diffusers_ext.testbed.runs import load_reference

SHIFT = 0.5


def _rows(rng, groups, size, share=0.5):
    """Standard normal rows, a share of whose variance is common to a group."""
    common = rng.normal(size=(groups.max() + 1, size))[groups]
    return np.sqrt(share) * common + np.sqrt(1 - share) * rng.normal(size=(len(groups), size))


def _accuracy(rng, groups):
    return proportion(_rows(rng, groups, 1)[:, 0] < 1.2815516, groups), 0.9


def _difference(rng, groups):
    x = _rows(rng, groups, 2)
    return paired_difference(x[:, 0] + SHIFT, x[:, 1], groups), SHIFT


def _frechet(rng, groups):
    reference = FeatureStats(np.zeros(8), np.eye(8), 10**6)
    return frechet_interval(_rows(rng, groups, 8) + SHIFT, reference, groups), 8 * SHIFT**2


def _paired_frechet(rng, groups):
    reference, x = FeatureStats(np.zeros(8), np.eye(8), 10**6), _rows(rng, groups, 8)
    control = np.sqrt(0.5) * (x + _rows(rng, groups, 8))
    return paired_frechet_difference(x + SHIFT, control, reference, groups), 8 * SHIFT**2


def _kid(rng, groups):
    x, y = _rows(rng, groups, 8) + SHIFT, rng.normal(size=(200, 8))
    # With E(x·y)ᵏ of Gaussians: for equal ones 3m/d + 3(d + 2m + m²)/d² + (m³ + 3m(d + 2m) + 6m)/d³ + 1 for
    # m = ‖μ‖², and with μ = 0 of one of them 3/d + 1 on both sides.
    d, m = 8, 8 * SHIFT**2
    own = 3 * m / d + 3 * (d + 2 * m + m * m) / d**2 + (m**3 + 3 * m * (d + 2 * m) + 6 * m) / d**3 + 1
    cross = 3 * (d + m) / d**2 + 1
    return kid(x, y, groups), own + (3 / d + 1) - 2 * cross


MEASURES = [_accuracy, _difference, _frechet, _paired_frechet, _kid]


@pytest.mark.parametrize("measure", MEASURES)
def test_intervals_over_groups_contain_the_truth(measure):
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(50), 3)
    covered = 0
    for _ in range(100):
        estimate, truth = measure(rng, groups)
        covered += not estimate.excludes(truth)
    # 95 expected with a binomial standard deviation of 2.2: three of them.
    assert covered >= 88


def test_without_their_groups_they_do_not():
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(30), 10)
    missed = sum(proportion(_rows(rng, groups, 1, 0.8)[:, 0] < 1.2815516).excludes(0.9) for _ in range(100))
    assert missed > 20


@pytest.mark.slow
@pytest.mark.parametrize("n", [288, 1002])
def test_the_distance_of_scenes(n):
    reference, train = load_reference("scenes-test"), load_reference("scenes-train")
    values, vectors = np.linalg.eigh(train.covariance)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    truth = frechet_distance(train, reference)
    rng, missed = np.random.default_rng(0), {"alone": 0, "paired": 0, "plain": 0}
    for _ in range(200):
        x, other = (train.mean + rng.normal(size=(n, len(root))) @ root.T for _ in range(2))
        alone = frechet_interval(x, reference)
        missed["alone"] += alone.excludes(truth)
        control = train.mean + np.sqrt(0.5) * (x + other - 2 * train.mean)
        missed["paired"] += paired_frechet_difference(x, control, reference).excludes(0)
        half = (alone.high - alone.low) / 2
        missed["plain"] += abs(frechet_distance(FeatureStats.of(x), reference) - truth) > half
    # 10 expected of 200, binomial standard deviation 3.1; at most 20, which is 90%.
    assert max(missed["alone"], missed["paired"]) <= 20
    assert missed["plain"] > 180  # as much as the same half-width is worth around the plain distance
