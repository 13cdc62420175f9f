"""Precision, recall, density and coverage: fidelity and diversity of images, apart from each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .features import check_pair

_ROWS = 1024  # of a distance matrix at a time


@dataclass(frozen=True)
class PRDC:
    """Fidelity (precision, density) and diversity (recall, coverage) of generated images.

    A ball surrounds every image and reaches to its k-th nearest neighbour in its own set.

    Attributes:
        precision: share of generated images inside the ball of a real image.
        recall: share of real images inside the ball of a generated image.
        density: mean number of real images whose balls contain a generated image, over k; 1 in expectation for
            equal distributions, and it can exceed 1.
        coverage: share of real images whose balls contain a generated image.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(features: np.ndarray, reference_features: np.ndarray, num_neighbors: int = 5) -> PRDC:
    """Precision and recall (Kynkäänniemi et al., NeurIPS 2019), density and coverage (Naeem et al., ICML 2020).

    All depend on the numbers of images: compare rows of one table, with a row of real images beside them.
    Memory: 1,024 rows of a distance matrix at a time.

    Args:
        features: generated images (n, d).
        reference_features: real images (m, d).
        num_neighbors: k; 5 in the paper of density and coverage, 3 in that of precision and recall.

    Raises:
        ValueError: features of different sizes or not finite, or `num_neighbors` below 1 or not below n and m.
    """
    x, y = check_pair(features, reference_features)
    if not 1 <= num_neighbors < min(len(x), len(y)):
        raise ValueError(
            f"num_neighbors must be at least 1 and below the number of images, got {num_neighbors} for {len(x)}"
            f" generated and {len(y)} real images."
        )
    own_radii, real_radii = _radii(x, num_neighbors), _radii(y, num_neighbors)
    real_balls = np.empty(len(x))  # how many contain a generated image
    nearest, recalled = np.full(len(y), np.inf), np.zeros(len(y), bool)
    for low in range(0, len(x), _ROWS):
        rows = slice(low, low + _ROWS)
        distances = _squared_distances(x[rows], y)
        real_balls[rows] = (distances <= real_radii).sum(1)
        nearest = np.minimum(nearest, distances.min(0))
        recalled |= (distances <= own_radii[rows, None]).any(0)
    return PRDC(
        precision=float((real_balls > 0).mean()),
        recall=float(recalled.mean()),
        density=float(real_balls.mean()) / num_neighbors,
        coverage=float((nearest <= real_radii).mean()),
    )


def _radii(x: np.ndarray, num_neighbors: int) -> np.ndarray:
    """Squared distance (n,) of every row to its k-th nearest other row."""
    radii = np.empty(len(x))
    for low in range(0, len(x), _ROWS):
        distances = _squared_distances(x[low : low + _ROWS], x)
        # A row itself is at distance 0, so that the k-th of the others is the (k + 1)-th of all.
        radii[low : low + _ROWS] = np.partition(distances, num_neighbors, axis=1)[:, num_neighbors]
    return radii


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)
    return np.maximum(squares - 2 * (x @ y.T), 0)
