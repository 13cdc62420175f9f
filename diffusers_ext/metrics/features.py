"""Checks of feature arrays."""

from __future__ import annotations

import numpy as np


def check_features(features: np.ndarray) -> np.ndarray:
    """Features (n, d) as float64.

    Raises:
        ValueError: fewer than two rows, or a value that is not finite.
    """
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise ValueError(
            f"Expected at least two rows of finite features (n, d), got shape {features.shape}"
            f" with {int((~np.isfinite(features)).sum())} values that are not finite."
        )
    return features.astype(np.float64)


def check_pair(features: np.ndarray, reference_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features, (n, d) and (m, d), as float64.

    Raises:
        ValueError: see `check_features`, or features of different sizes.
    """
    x, y = check_features(features), check_features(reference_features)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"Features of size {x.shape[1]} and {y.shape[1]} cannot be compared.")
    return x, y
