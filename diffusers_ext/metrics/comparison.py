"""Confidence intervals, paired comparisons, and Markdown tables for them.

Rows that are not independent, such as the images of one prompt, are named by `groups`: one label per row. The
intervals are then over the groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .estimate import Estimate as Estimate
from .estimate import Groups, Z, group_index, group_sums, t_of_normal
from .estimate import holm as holm
from .frechet import FeatureStats, frechet_infinity, frechet_infinity_difference


def proportion(right: np.ndarray, groups: Groups = None) -> Estimate:
    """Share of True, with Wilson's score interval (Wilson 1927) at the effective sample size.

    The effective sample size is n divided by the design effect: the cluster-robust variance of the share over
    that of n independent rows, corrected for the number of groups as by Korn & Graubard (Survey Methodology
    1998). Where all rows are equal the design effect is not known: the number of groups is used, as if the rows
    of a group were always equal. Without groups it is the plain Wilson interval.

    Args:
        right: booleans (n,).
        groups: labels of the rows (n,), such as their prompts.

    Raises:
        ValueError: the array is empty or no vector, another number of labels, or fewer than two groups.
    """
    n = len(right)
    if n == 0 or np.ndim(right) != 1:
        raise ValueError(
            f"No results to average: give booleans (n,), at least one, got shape {np.shape(right)}."
        )
    p = float(np.mean(right))
    size = float(n) if groups is None else _effective_size(right, group_index(groups, n))
    centre = (p + Z * Z / (2 * size)) / (1 + Z * Z / size)
    half = Z / (1 + Z * Z / size) * math.sqrt(p * (1 - p) / size + Z * Z / (4 * size * size))
    return Estimate(p, min(p, centre - half), max(p, centre + half))


def _effective_size(right: np.ndarray, index: np.ndarray) -> float:
    n, count, p = len(right), int(index.max()) + 1, float(np.mean(right))
    if p in (0.0, 1.0):
        return float(count)
    sums = group_sums(right - p, index)
    variance = count / (count - 1) * float((sums**2).sum()) / n**2
    few_groups = (t_of_normal(Z, count - 1) / t_of_normal(Z, n - 1)) ** 2
    design_effect = few_groups * variance / (p * (1 - p) / (n - 1))
    # Below 1 it is the noise of few groups.
    return n / max(1.0, design_effect)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    num_resamples: int = 10_000,
    seed: int = 0,
    groups: Groups = None,
) -> Estimate:
    """Percentile bootstrap of a statistic that is no mean: a ratio, a median.

    Whole groups are drawn with replacement. The p-value comes from the same resamples, so it is never below
    2/(num_resamples + 1).

    Args:
        statistic: function of row indices (m,).
        n: number of rows.
        num_resamples: how often to resample.
        seed: seed of the resampling.
        groups: labels of the rows (n,), such as their prompts.

    Raises:
        ValueError: another number of labels than rows, fewer than two groups, or a statistic that is not finite.
    """
    index = group_index(groups, n)
    count = int(index.max()) + 1
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    rng = np.random.default_rng(seed)
    draws = np.empty(num_resamples)
    for i in range(num_resamples):
        chosen = rng.integers(count, size=count)
        draws[i] = statistic(chosen if count == n else np.concatenate([members[g] for g in chosen]))
    value = float(statistic(np.arange(n)))
    bad = int((~np.isfinite(draws)).sum())
    if bad or not math.isfinite(value):
        raise ValueError(
            f"The statistic of {n} rows is {value} and is not finite in {bad} of {num_resamples} resamples: give"
            " more rows."
        )
    low, high = np.percentile(draws, [2.5, 97.5])
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    return Estimate(value, float(low), float(high), min(1.0, 2 * float(tail + 1) / (num_resamples + 1)))


def paired_difference(ours: np.ndarray, control: np.ndarray, groups: Groups = None) -> Estimate:
    """Mean of `ours − control`, with the cluster-robust t interval over the groups of pairs.

    Args:
        ours, control: results (n,) for the same prompts and seeds; booleans count as 0 and 1.
        groups: labels of the rows (n,), such as their prompts.

    Raises:
        ValueError: different shapes, another number of labels, or fewer than two groups.
    """
    if ours.shape != control.shape or ours.ndim != 1 or len(ours) < 2:
        raise ValueError(
            f"A paired comparison needs two results of the same length, at least 2; got shapes {ours.shape}"
            f" and {control.shape}. Run both on the same prompts and seeds."
        )
    difference = ours.astype(np.float64) - control.astype(np.float64)
    index = group_index(groups, len(difference))
    value = float(difference.mean())
    return Estimate.of_contributions(value, group_sums(difference - value, index) / len(difference))


def frechet_interval(features: np.ndarray, reference: FeatureStats, groups: Groups = None) -> Estimate:
    """FD∞ of features (n, d) to a reference, with the cluster-robust t interval.

    See `frechet_infinity` for the arguments and the errors. Where the true distance is 0, the interval is too
    wide and almost always contains 0. The distance cannot be below 0, so what it then says is
    one-sided: the distance is at most `high`.
    """
    found = frechet_infinity(features, reference, groups)
    return Estimate.of_contributions(found.value, found.contributions)


def paired_frechet_difference(
    ours: np.ndarray, control: np.ndarray, reference: FeatureStats, groups: Groups = None
) -> Estimate:
    """FD∞ of `ours` minus that of `control`, with the cluster-robust t interval over the groups of pairs.

    See `frechet_infinity_difference` for the arguments and the errors.
    """
    found = frechet_infinity_difference(ours, control, reference, groups)
    return Estimate.of_contributions(found.value, found.contributions)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
