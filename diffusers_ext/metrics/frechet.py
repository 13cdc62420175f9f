"""Fréchet distance between small feature sets. It is not FID, which uses Inception features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


@dataclass(frozen=True)
class FeatureStats:
    """Mean (d,) and covariance (d, d) of features, float64, and the number of images they come from."""

    mean: np.ndarray
    covariance: np.ndarray
    num_samples: int

    @classmethod
    def of(cls, features: np.ndarray) -> FeatureStats:
        """Statistics of features (n, d).

        Raises:
            ValueError: fewer than two rows, or a value that is not finite.
        """
        if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
            raise ValueError(
                f"Expected at least two rows of finite features (n, d), got shape {features.shape}"
                f" with {int((~np.isfinite(features)).sum())} values that are not finite."
            )
        features = features.astype(np.float64)
        return cls(features.mean(0), np.cov(features, rowvar=False), len(features))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        arrays = {"mean": self.mean, "covariance": self.covariance, "num_samples": np.array(self.num_samples)}
        save_file(arrays, path)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStats:
        """Reads a file written by `save`.

        Raises:
            ValueError: the file is missing, corrupted or of another kind.
        """
        try:
            arrays = load_file(path)
            return cls(arrays["mean"], arrays["covariance"], int(arrays["num_samples"]))
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"{path} is not a valid file of feature statistics ({error}): create it again."
            ) from error


def frechet_distance(a: FeatureStats, b: FeatureStats) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½): the squared 2-Wasserstein distance of two Gaussians.

    Dowson & Landau 1982.

    Raises:
        ValueError: features of different sizes.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"Features of size {a.mean.size} and {b.mean.size} cannot be compared.")
    # The trace of the square root is the sum of the singular values of Σ₁^½ Σ₂^½. These roots are symmetric,
    # so that nearly singular covariances give no complex part.
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance), compute_uv=False).sum()
    offset = float(((a.mean - b.mean) ** 2).sum())
    return max(0.0, offset + float(np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross))


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
