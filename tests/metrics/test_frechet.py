import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.metrics.frechet import (
    FeatureStats,
    frechet_distance,
    frechet_floor,
    frechet_infinity,
    frechet_infinity_difference,
)


def _stats(seed: int, n: int = 60, d: int = 5) -> FeatureStats:
    rng = np.random.default_rng(seed)
    return FeatureStats.of(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d))


@given(st.integers(0, 1000), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_distance_is_a_symmetric_non_negative_number_and_zero_to_itself(i, j):
    a, b = _stats(i), _stats(j)
    assert frechet_distance(a, b) >= 0
    # Rounding of an eigendecomposition of numbers of order 10.
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_distance_equals_the_textbook_formula():
    a, b = _stats(1), _stats(2)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_of_diagonal_gaussians():
    a = FeatureStats(np.zeros(2), np.diag([4.0, 9.0]), 10)
    b = FeatureStats(np.array([3.0, 4.0]), np.diag([1.0, 1.0]), 10)
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 4)


def test_a_singular_covariance_gives_a_real_distance():
    rng = np.random.default_rng(0)
    flat = FeatureStats.of(np.repeat(rng.normal(size=(30, 1)), 4, axis=1))
    assert np.isfinite(frechet_distance(flat, _stats(3, d=4)))


def test_save_and_load(tmp_path):
    stats = _stats(5)
    stats.save(tmp_path / "stats.safetensors")
    back = FeatureStats.load(tmp_path / "stats.safetensors")
    assert np.array_equal(back.mean, stats.mean)
    assert np.array_equal(back.covariance, stats.covariance)
    assert back.num_samples == stats.num_samples


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="at least two rows"):
        FeatureStats.of(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="1 values that are not finite"):
        FeatureStats.of(np.array([[1.0, np.nan], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="size 5 and 4"):
        frechet_distance(_stats(0, d=5), _stats(0, d=4))
    path = tmp_path / "stats.safetensors"
    with pytest.raises(ValueError, match="not a valid file"):
        FeatureStats.load(path)
    _stats(0).save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a valid file"):
        FeatureStats.load(path)


def _gaussian(seed, n, d=5, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=(n, d))


UNIT = FeatureStats(np.zeros(5), np.eye(5), 10**6)


def test_extrapolation_removes_the_bias_of_small_samples():
    plain = [frechet_distance(FeatureStats.of(_gaussian(i, 40)), UNIT) for i in range(200)]
    extrapolated = [frechet_infinity(_gaussian(i, 40), UNIT).value for i in range(200)]
    # d/n of the mean and d(d + 1)/4n of the covariance, for d = 5 and n = 40.
    assert np.mean(plain) == pytest.approx(0.125 + 0.1875, rel=0.1)
    # The mean of 200 of deviation .08 has a standard error of .006.
    assert abs(np.mean(extrapolated)) < 0.02


def test_the_distance_of_many_rows_is_the_truth():
    truth = 5 * 0.4**2 + 5 * 0.3**2
    found = frechet_infinity(_gaussian(0, 50_000, scale=1.3) + 0.4, UNIT)
    # In each of the 5 dimensions the influence function 2 · 0.4 z + (1 − 1/1.3) z², z of variance 1.3², has the
    # variance 0.8² · 1.3² + 2 (0.3 · 1.3)².
    expected = np.sqrt(5 * (0.64 * 1.69 + 2 * 0.39**2) / 50_000)
    assert found.standard_error == pytest.approx(expected, rel=0.03)
    assert found.value == pytest.approx(truth, abs=3 * found.standard_error)


def test_contributions_are_the_derivative_of_the_distance():
    x, reference = _gaussian(1, 60) @ np.diag([1, 2, 0.5, 1, 1]) + 0.3, _stats(2)
    n, step = len(x), 1e-5
    contributions = frechet_infinity(x, reference).contributions
    assert contributions.sum() == pytest.approx(0, abs=1e-9)

    def distance(weights):
        mean = weights @ x / weights.sum()
        covariance = (x - mean).T @ np.diag(weights / weights.sum()) @ (x - mean)
        return frechet_distance(FeatureStats(mean, covariance, n), reference)

    for row in (0, 7, 31):
        change = np.zeros(n)
        change[row] = step
        slope = (distance(np.ones(n) + change) - distance(np.ones(n) - change)) / (2 * step)
        # Central differences are exact to the square of the step.
        assert contributions[row] == pytest.approx(slope, rel=1e-4)


def test_the_difference_is_that_of_the_two():
    x, y = _gaussian(1, 300), _gaussian(2, 300, scale=1.5)
    difference = frechet_infinity_difference(y, x, UNIT)
    a, b = frechet_infinity(y, UNIT), frechet_infinity(x, UNIT)
    assert np.allclose(difference.contributions, a.contributions - b.contributions)
    # Other blocks, which leave a little of a distance to chance.
    assert difference.value == pytest.approx(a.value - b.value, abs=0.2 * difference.standard_error)


def test_a_dead_feature_does_not_disturb():
    x = np.concatenate([_gaussian(3, 100), np.ones((100, 1))], 1)
    reference = FeatureStats(np.r_[np.zeros(5), 1], np.diag([1, 1, 1, 1, 1, 0.0]), 100)
    alone = frechet_infinity(x[:, :5], UNIT)
    # Its variance is clipped at 1e-12 of the largest.
    assert frechet_infinity(x, reference).value == pytest.approx(alone.value, abs=1e-4)
    assert frechet_infinity(x, reference).standard_error == pytest.approx(alone.standard_error, rel=1e-4)


def test_one_feature():
    x = _gaussian(4, 2000, d=1)
    found = frechet_infinity(x, FeatureStats.of(_gaussian(5, 5000, d=1) + 1))
    assert found.value == pytest.approx(1, abs=0.2)


def test_floor_is_the_distance_of_as_many_real_images():
    real = _gaussian(6, 1000)
    floor = frechet_floor(real, UNIT, 40, draws=200)
    # See the bias above.
    assert floor.value == pytest.approx(0.3125, rel=0.1)
    assert floor.low < floor.value < floor.high
    whole = frechet_floor(real, UNIT, 1000, draws=2)
    assert whole.value == pytest.approx(frechet_distance(FeatureStats.of(real), UNIT))
    assert whole.low == pytest.approx(whole.high)
    assert frechet_floor(real, UNIT, 40, draws=5) == frechet_floor(real, UNIT, 40, draws=5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: frechet_infinity(np.zeros((9, 4)), UNIT), "size 4 and 5"),
        (lambda: frechet_infinity(np.zeros((5, 5)), UNIT), "5 images with 5 features cannot be extrapolated"),
        (lambda: frechet_infinity(np.full((9, 5), np.inf), UNIT), "45 values that are not finite"),
        (lambda: frechet_infinity_difference(np.zeros((9, 5)), np.zeros((8, 5)), UNIT), "equal shapes"),
        (lambda: frechet_floor(_gaussian(0, 9), UNIT, 10), "n = 10, draws = 100 and 9 real images"),
        (lambda: frechet_floor(_gaussian(0, 9), UNIT, 5, draws=1), "draws = 1"),
    ],
)
def test_errors_of_the_extrapolation_and_the_floor(call, match):
    with pytest.raises(ValueError, match=match):
        call()
