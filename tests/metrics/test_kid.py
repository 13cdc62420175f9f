import numpy as np
import pytest
import torch
from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel

from diffusers_ext.metrics import kid as module
from diffusers_ext.metrics.kid import kid


@pytest.fixture
def samples():
    rng = np.random.default_rng(0)
    return rng.normal(0.2, 1.2, size=(40, 6)), rng.normal(size=(40, 6))


def test_arithmetic_of_torchmetrics(samples):
    x, y = (torch.from_numpy(s) for s in samples)
    expected = maximum_mean_discrepancy(poly_kernel(x, x), poly_kernel(x, y), poly_kernel(y, y))
    assert kid(*samples).value == pytest.approx(float(expected), rel=1e-10)


def test_by_loops_with_groups_and_sets_of_different_sizes(samples):
    x, y, groups = samples[0], samples[1][:25], np.repeat(np.arange(10), [1, 2, 3, 4, 5, 5, 5, 5, 5, 5])

    def mean(pairs):
        return np.mean([(a @ b / 6 + 1) ** 3 for a, b in pairs])

    own = mean((a, b) for i, a in enumerate(x) for j, b in enumerate(x) if groups[i] != groups[j])
    real = mean((a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j)
    cross = mean((a, b) for a in x for b in y)
    assert kid(x, y, groups).value == pytest.approx(own + real - 2 * cross, rel=1e-10)


def test_kernels_in_parts_are_the_same(samples, monkeypatch):
    whole = kid(*samples)
    monkeypatch.setattr(module, "_ROWS", 7)
    assert kid(*samples).high == pytest.approx(whole.high, rel=1e-10)


def test_the_standard_error_is_that_of_repetitions():
    rng = np.random.default_rng(1)
    found = [kid(rng.normal(0.5, 1, size=(80, 5)), rng.normal(size=(100, 5))) for _ in range(200)]
    half_width = np.mean([e.high - e.low for e in found]) / 2 / 1.99
    # A standard deviation of 200 values is known to 5%.
    assert half_width == pytest.approx(np.std([e.value for e in found]), rel=0.2)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), "size 3 and 4"),
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least two rows"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "15 values that are not finite"),
    ],
)
def test_errors(x, y, match):
    with pytest.raises(ValueError, match=match):
        kid(x, y)
