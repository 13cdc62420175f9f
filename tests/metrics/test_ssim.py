"""Structural similarity against cases that can be worked out."""

import math

import numpy as np
import pytest

from diffusers_ext.metrics.ssim import ssim


def pictures(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((3, 13, 12, 2))


def test_equal_pictures_have_one_and_order_does_not_matter() -> None:
    a, b = pictures(0), pictures(1)
    assert np.allclose(ssim(a, a), 1)
    assert np.allclose(ssim(a, b), ssim(b, a))
    assert (ssim(a, b) < 0.3).all()


def test_constant_pictures_differ_in_luminance_alone() -> None:
    a, b = np.full((1, 11, 11, 1), 0.2), np.full((1, 11, 11, 1), 0.7)
    expected = (2 * 0.2 * 0.7 + 1e-4) / (0.2**2 + 0.7**2 + 1e-4)
    assert ssim(a, b)[0] == pytest.approx(expected)


def test_the_formula_window_by_window() -> None:
    a, b = pictures(2), pictures(3)
    line = np.array([math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)])
    weights = np.outer(line, line) / line.sum() ** 2
    found = []
    for row, column, channel in np.ndindex(3, 2, 2):
        x, y = (p[1, row : row + 11, column : column + 11, channel] for p in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        vxy = (weights * (x - mx) * (y - my)).sum()
        found.append((2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)))
    assert ssim(a, b)[1] == pytest.approx(np.mean(found))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"got \(3, 13, 12, 2\) and \(3, 13, 12, 1\)"):
        ssim(pictures(0), pictures(0)[..., :1])
    with pytest.raises(ValueError, match="at least 11 × 11"):
        ssim(pictures(0)[:, :10], pictures(0)[:, :10])
