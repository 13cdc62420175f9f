import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance


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
