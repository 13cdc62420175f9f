"""Confidence intervals, paired comparisons, and Markdown tables for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .frechet import FeatureStats, frechet_distance


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% confidence interval."""

    value: float
    low: float
    high: float

    def excludes(self, number: float) -> bool:
        """Whether `number` lies outside the interval."""
        return not self.low <= number <= self.high

    def format(self, digits: int = 2, scale: float = 1.0) -> str:
        """Formats the estimate as "value [low, high]"."""
        value, low, high = (f"{scale * x:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def marked(self, digits: int = 2, scale: float = 1.0) -> str:
        """Same as `format`, but bold in Markdown if the interval excludes 0."""
        text = self.format(digits, scale)
        return f"**{text}**" if self.excludes(0) else text


def proportion(right: np.ndarray) -> Estimate:
    """Share of True in a boolean array (n,), with Wilson's score interval (Wilson 1927).

    Raises:
        ValueError: the array is empty.
    """
    n, z = len(right), 1.959964
    if n == 0:
        raise ValueError("No results to average: give at least one image.")
    p = float(np.mean(right))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return Estimate(p, min(p, centre - half), max(p, centre + half))


def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, num_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Percentile bootstrap of `statistic`, a function of row indices (n,)."""
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(n, size=n)) for _ in range(num_resamples)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(statistic(np.arange(n)), float(low), float(high))


def paired_difference(ours: np.ndarray, control: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of `ours − control`, two results (n,) for the same prompts and seeds, by bootstrap over the pairs.

    Raises:
        ValueError: different shapes, or fewer than two results.
    """
    if ours.shape != control.shape or ours.ndim != 1 or len(ours) < 2:
        raise ValueError(
            f"A paired comparison needs two results of the same length, at least 2; got shapes {ours.shape}"
            f" and {control.shape}. Run both on the same prompts and seeds."
        )
    difference = ours.astype(np.float64) - control
    return bootstrap(lambda rows: float(difference[rows].mean()), len(difference), 2000, seed)


def paired_frechet_difference(
    ours: np.ndarray,
    control: np.ndarray,
    reference: FeatureStats,
    num_resamples: int = 100,
    seed: int = 0,
    group_size: int = 1,
) -> Estimate:
    """Fréchet distance of `ours` minus that of `control`, features (n, d) for the same seeds.

    Both are distances to one reference. Consecutive rows in groups of `group_size`, such as the images of one
    prompt, are resampled together.

    Resampling increases both distances by a similar amount (repeated rows reduce the rank), so the
    percentiles are centred on the difference of the full sets.

    Raises:
        ValueError: different shapes.
    """
    if ours.shape != control.shape:
        raise ValueError(f"A paired comparison needs equal shapes, got {ours.shape} and {control.shape}.")

    def difference(groups: np.ndarray) -> float:
        rows = _rows(groups, group_size)
        a, b = FeatureStats.of(ours[rows]), FeatureStats.of(control[rows])
        return frechet_distance(a, reference) - frechet_distance(b, reference)

    return _centred(bootstrap(difference, len(ours) // group_size, num_resamples, seed))


def _centred(estimate: Estimate) -> Estimate:
    half = (estimate.high - estimate.low) / 2
    return Estimate(estimate.value, estimate.value - half, estimate.value + half)


def frechet_interval(
    features: np.ndarray,
    reference: FeatureStats,
    num_resamples: int = 100,
    seed: int = 0,
    group_size: int = 1,
) -> Estimate:
    """Fréchet distance of features (n, d) to a reference, with a bootstrap interval centred on it.

    `group_size`: see `paired_frechet_difference`.
    """

    def distance(groups: np.ndarray) -> float:
        return frechet_distance(FeatureStats.of(features[_rows(groups, group_size)]), reference)

    return _centred(bootstrap(distance, len(features) // group_size, num_resamples, seed))


def _rows(groups: np.ndarray, group_size: int) -> np.ndarray:
    return (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
