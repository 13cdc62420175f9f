"""Kernel distance between two sets of features: unbiased at any number of images.

On Inception features it is KID (Bińkowski et al., *Demystifying MMD GANs*, ICLR 2018). On other features the
values are not comparable with published ones.
"""

from __future__ import annotations

import math

import numpy as np

from .estimate import Estimate, Groups, group_index, group_sums
from .features import check_pair

_ROWS = 1024  # of a kernel matrix at a time


def kid(features: np.ndarray, reference_features: np.ndarray, groups: Groups = None) -> Estimate:
    """Squared maximum mean discrepancy of two sets with the kernel (x·y/d + 1)³, as KID.

    It is the unbiased U-statistic: pairs of a row with itself are left out, and with `groups` all pairs of one
    group. The interval is Student's t over the groups, with the standard error of the statistic's linear part
    (Hoeffding 1948), and includes the error of both sets. Where the true value is 0, half of all values are
    negative.

    Args:
        features: generated images (n, d).
        reference_features: real images (m, d), independent of each other.
        groups: labels of the generated rows (n,), such as their prompts.

    Raises:
        ValueError: features of different sizes or not finite, fewer than two rows, another number of labels, or
            fewer than two groups.
    """
    x, y = check_pair(features, reference_features)
    index, rows_of_reference = group_index(groups, len(x)), np.arange(len(y))
    own, own_contributions = _between_groups(x, index)
    real, real_contributions = _between_groups(y, rows_of_reference)
    by_row, by_real_row = _sums(x, y)
    cross = float(by_row.mean()) / len(y)
    own_contributions -= 2 * group_sums(by_row / len(y) - cross, index) / len(x)
    real_contributions -= 2 * (by_real_row / len(x) - cross) / len(y)
    variance = sum(
        len(c) / (len(c) - 1) * float((c**2).sum()) for c in (own_contributions, real_contributions)
    )
    return Estimate.of_error(own + real - 2 * cross, math.sqrt(variance), len(own_contributions) - 1)


def _between_groups(x: np.ndarray, index: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of the kernel over the pairs of rows in different groups, and every group's contribution (G,) to it."""
    sizes = np.bincount(index).astype(np.float64)
    by_row = _sums(x, x)[0] - _sums_within(x, index)
    partners = len(x) - sizes
    pairs = float((sizes * partners).sum())
    mean = float(by_row.sum()) / pairs
    return mean, 2 * (group_sums(by_row, index) - mean * sizes * partners) / pairs


def _sums(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the kernel matrix of x (n, d) and y (m, d) over its columns (n,) and over its rows (m,)."""
    by_row, by_column = np.empty(len(x)), np.zeros(len(y))
    for low in range(0, len(x), _ROWS):
        block = _kernel(x[low : low + _ROWS], y)
        by_row[low : low + _ROWS] = block.sum(1)
        by_column += block.sum(0)
    return by_row, by_column


def _sums_within(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Sums (n,) of the kernel of every row with the rows of its group, itself included."""
    if index[-1] == len(x) - 1:  # every row is a group
        base = (x * x).sum(1) / x.shape[1] + 1
        return base**3
    sums = np.empty(len(x))
    for members in np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1]):
        sums[members] = _kernel(x[members], x[members]).sum(1)
    return sums


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base
