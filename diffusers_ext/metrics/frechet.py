"""Fréchet distances between sets of features: plain, without bias, and the floor of real images.

On other features than Inception's they are not FID.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .estimate import Estimate, Groups, group_index, group_sums
from .features import check_features

_BLOCKS, _PARTITIONS = 10, 2


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
        features = check_features(features)
        size = features.shape[1]
        covariance = np.cov(features, rowvar=False).reshape(size, size)
        return cls(features.mean(0), covariance, len(features))

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

    Dowson & Landau 1982. Of samples, it is too large, about in proportion to 1/n: see `frechet_infinity` and
    `frechet_floor`.

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


@dataclass(frozen=True)
class Extrapolated:
    """A Fréchet distance for infinitely many images, or the difference of two.

    Attributes:
        value: the distance; the error may take it below 0.
        contributions: what every group of rows adds to the error, float64 (G,), with sum 0.
    """

    value: float
    contributions: np.ndarray

    @property
    def standard_error(self) -> float:
        """Cluster-robust standard error."""
        count = len(self.contributions)
        return float(np.sqrt(count / (count - 1) * (self.contributions**2).sum()))


def frechet_infinity(features: np.ndarray, reference: FeatureStats, groups: Groups = None) -> Extrapolated:
    """Fréchet distance extrapolated to infinitely many images, FD∞ (Chong & Forsyth, CVPR 2020).

    The distance of n images is taken as linear in 1/n. The line goes through the distance of all groups of rows
    and the mean distance of nine tenths of them (Quenouille's jackknife with ten random blocks; 1956). Smaller
    parts, as in the paper, leave more of the term in 1/n². The blocks do not depend on the order of the rows.

    The standard error is that of the distance's linear part, the influence function
    2(μ − μᵣ)·(x − μ) + (x − μ)ᵀ(I − T)(x − μ), T the optimal transport map from the sample's Gaussian to the
    reference's. The reference counts as exact. Where the true distance is 0, the linear part vanishes and the
    standard error is too large, by a factor of up to 1.5.

    Args:
        features: generated images (n, d), more rows than features.
        reference: statistics of real images.
        groups: labels of the rows (n,), such as their prompts.

    Raises:
        ValueError: features of another size or not finite, no more rows than features, another number of labels,
            or fewer than two groups.
    """
    sample = _Sample.of(features, reference, groups)
    return Extrapolated(sample.extrapolated(sample.contributions), sample.contributions)


def frechet_infinity_difference(
    ours: np.ndarray, control: np.ndarray, reference: FeatureStats, groups: Groups = None
) -> Extrapolated:
    """FD∞ of `ours` minus that of `control`, features (n, d) for the same prompts and seeds, row by row.

    Raises:
        ValueError: different shapes, and the errors of `frechet_infinity`.
    """
    if ours.shape != control.shape:
        raise ValueError(f"A paired comparison needs equal shapes, got {ours.shape} and {control.shape}.")
    a, b = (_Sample.of(features, reference, groups) for features in (ours, control))
    contributions = a.contributions - b.contributions
    # Both in the same blocks, so that what the blocks leave to chance cancels out.
    return Extrapolated(a.extrapolated(contributions) - b.extrapolated(contributions), contributions)


def frechet_floor(
    real_features: np.ndarray, reference: FeatureStats, n: int, draws: int = 100, seed: int = 0
) -> Estimate:
    """Plain Fréchet distance of n real images to the reference: the least that n perfect images would have.

    Args:
        real_features: real images that are not the reference's (m, d).
        reference: statistics of real images.
        n: number of images, as in the row that the floor belongs to.
        draws: how many sets of n images are drawn, without replacement within a set.
        seed: seed of the draws.

    Returns:
        The mean over draws, and the range of 95% of them, which is no confidence interval.

    Raises:
        ValueError: features of another size or not finite, fewer than n real images, or n or `draws` below 2.
    """
    real_features = check_features(real_features)
    if not 2 <= n <= len(real_features) or draws < 2:
        raise ValueError(
            f"The floor of n images needs n and draws of at least 2 and n or more real images, got n = {n},"
            f" draws = {draws} and {len(real_features)} real images."
        )
    rng = np.random.default_rng(seed)
    values = [
        frechet_distance(
            FeatureStats.of(rng.choice(real_features, n, replace=False, shuffle=False)), reference
        )
        for _ in range(draws)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(float(np.mean(values)), float(low), float(high))


@dataclass(frozen=True)
class _Sample:
    """Features against a reference, in the form in which distances of parts of them are cheap.

    With c = x − μᵣ and y = Σᵣ^½ c, the distance of a set of rows is mean‖c‖² + tr Σᵣ − 2 tr(cov(y)^½), the
    covariance with the divisor n.
    """

    index: np.ndarray  # the rows' groups
    squares: np.ndarray  # ‖c‖², (n,)
    rooted: np.ndarray  # y, (n, d)
    reference_trace: float
    distance: float
    contributions: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, reference: FeatureStats, groups: Groups) -> _Sample:
        features = check_features(features)
        n, size = features.shape
        if size != reference.mean.size:
            raise ValueError(f"Features of size {size} and {reference.mean.size} cannot be compared.")
        if n <= size:
            raise ValueError(
                f"The distance of {n} images with {size} features cannot be extrapolated: give more images than"
                " features, or use frechet_distance beside its floor, or kid."
            )
        index = group_index(groups, n)
        centred = features - reference.mean
        rooted = centred @ _root(reference.covariance)
        squares = (centred**2).sum(1)
        values, vectors = np.linalg.eigh(np.cov(rooted, rowvar=False, ddof=0).reshape(size, size))
        roots = np.sqrt(np.clip(values, 1e-12 * max(values[-1], 1e-300), None))
        mean = centred.mean(0)
        deviations = centred - mean
        moved = ((rooted - rooted.mean(0)) @ vectors) ** 2 / roots  # its sum over columns is (x − μ)ᵀT(x − μ)
        influence = 2 * deviations @ mean + (deviations**2).sum(1) - moved.sum(1)
        trace = float(np.trace(reference.covariance))
        distance = float(squares.mean()) + trace - 2 * float(roots.sum())
        contributions = group_sums(influence - influence.mean(), index) / n
        return cls(index, squares, rooted, trace, distance, contributions)

    def extrapolated(self, order: np.ndarray) -> float:
        """FD∞. `order`: (G,) values of the groups, which make the blocks independent of the groups' order."""
        sorted_groups, count = np.argsort(order, kind="stable"), len(order)
        num_blocks, rng = min(_BLOCKS, count), np.random.default_rng(0)
        ends = []
        for _ in range(_PARTITIONS):
            blocks = np.empty(count, np.int64)
            blocks[sorted_groups] = rng.permutation(np.arange(count) % num_blocks)
            kept = count / (count - np.bincount(blocks))
            distances = self._without_each(blocks[self.index], num_blocks)
            ends.append(self.distance - (distances.mean() - self.distance) / (kept.mean() - 1))
        return float(np.mean(ends))

    def _without_each(self, blocks: np.ndarray, num_blocks: int) -> np.ndarray:
        """Distances (num_blocks,) of the rows outside each block; `blocks` (n,)."""
        counts = np.bincount(blocks)
        squares = np.bincount(blocks, weights=self.squares)
        members = [self.rooted[blocks == b] for b in range(num_blocks)]
        sums = np.stack([m.sum(0) for m in members])
        products = np.stack([m.T @ m for m in members])
        n = (counts.sum() - counts).astype(np.float64)
        means = (sums.sum(0) - sums) / n[:, None]
        covariances = (products.sum(0) - products) / n[:, None, None] - means[:, :, None] * means[:, None, :]
        roots = np.sqrt(np.clip(np.linalg.eigvalsh(covariances), 0, None))
        return (squares.sum() - squares) / n + self.reference_trace - 2 * roots.sum(1)
