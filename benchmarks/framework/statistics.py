"""Estimates of rows and of their differences to a control: the one place that calls the library's statistics.

Every interval is over prompts: the images of one prompt are resampled together.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_ext.metrics.comparison import Estimate, bootstrap
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance

from .samples import Samples, reference


@dataclass(frozen=True)
class Statistics:
    """The measures of samples.

    Attributes:
        kind: of the images, "scenes" or "garments".
        resamples: of every bootstrap.
    """

    kind: str
    resamples: int

    def accuracy(self, ours: Samples, judge: str) -> Estimate:
        """Share of the images that show every word of their prompt."""
        return self.mean(ours.aligned(judge), ours.prompts)

    def accuracy_difference(self, ours: Samples, control: Samples, judge: str) -> Estimate:
        """`accuracy` less the control's, on the same prompts and noise."""
        return self.difference(ours.aligned(judge), control.aligned(judge), ours.prompts)

    def distance(self, ours: Samples, judge: str) -> Estimate:
        """Fréchet distance to real test images."""
        features, real = ours.features(judge), reference(f"{self.kind}-test", judge)
        return _centred(
            self._grouped(lambda rows: frechet_distance(FeatureStats.of(features[rows]), real), ours.prompts)
        )

    def distance_difference(self, ours: Samples, control: Samples, judge: str) -> Estimate:
        """`distance` less the control's, on the same prompts and noise."""
        a, b, real = ours.features(judge), control.features(judge), reference(f"{self.kind}-test", judge)

        def less(rows: np.ndarray) -> float:
            own, other = (frechet_distance(FeatureStats.of(x[rows]), real) for x in (a, b))
            return own - other

        return _centred(self._grouped(less, ours.prompts))

    def diversity_change(
        self, ours: Samples, control: Samples, judge: str, right_only: bool = False
    ) -> Estimate:
        """Relative change of the mean feature distance between two images of one prompt.

        `right_only`: of the pairs whose images show their prompt in both rows, as wrong images are diverse too.
        """
        first, second, group = pairs_of(ours.prompts)
        if right_only:
            right = ours.aligned(judge) & control.aligned(judge)
            kept = right[first] & right[second]
            first, second, group = first[kept], second[kept], group[kept]
        if not len(first):
            return Estimate(float("nan"), float("nan"), float("nan"))
        a, b = (
            np.linalg.norm(x[first] - x[second], axis=-1)
            for x in (ours.features(judge), control.features(judge))
        )
        return self._grouped(lambda rows: float(a[rows].mean() / b[rows].mean() - 1), group)

    def floor(self, judge: str) -> float:
        """Fréchet distance of real training images to real test images."""
        return frechet_distance(*(reference(f"{self.kind}-{split}", judge) for split in ("train", "test")))

    def mean(self, values: np.ndarray, groups: np.ndarray | None = None) -> Estimate:
        """Mean of values (n,), of which those of one group (n,) are resampled together."""
        return self._grouped(lambda rows: float(values[rows].mean()), _groups(values, groups))

    def difference(self, ours: np.ndarray, control: np.ndarray, groups: np.ndarray | None = None) -> Estimate:
        """Mean of the differences of two results (n,) on the same prompts and noise."""
        return self.mean(ours.astype(np.float64) - control, groups)

    def ratio_change(
        self, ours: np.ndarray, control: np.ndarray, groups: np.ndarray | None = None
    ) -> Estimate:
        """Change of a mean as a share of the control's."""
        return self._grouped(
            lambda rows: float(ours[rows].mean() / control[rows].mean() - 1), _groups(ours, groups)
        )

    def _grouped(self, statistic: Callable[[np.ndarray], float], groups: np.ndarray) -> Estimate:
        order = np.argsort(groups, kind="stable")
        _, starts = np.unique(groups[order], return_index=True)
        members = np.split(order, starts[1:])
        return bootstrap(
            lambda drawn: statistic(np.concatenate([members[k] for k in drawn])), len(members), self.resamples
        )


def _groups(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    return np.arange(len(values)) if groups is None else groups


def _centred(estimate: Estimate) -> Estimate:
    half = (estimate.high - estimate.low) / 2
    return Estimate(estimate.value, estimate.value - half, estimate.value + half)


def pairs_of(prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of images of one prompt: the rows of both, and the number of the prompt, (pairs,) each."""
    _, group = np.unique(prompts, return_inverse=True)
    found = []
    for number in range(group.max() + 1):
        rows = np.flatnonzero(group == number)
        upper = np.triu_indices(len(rows), 1)
        found.append((rows[upper[0]], rows[upper[1]], np.full(len(upper[0]), number)))
    first, second, number = (np.concatenate(part) for part in zip(*found))
    return first, second, number


def paired_ratio(ours: np.ndarray, control: np.ndarray) -> Estimate:
    """Median over rounds of `ours ÷ control`, seconds (rounds,), with a bootstrap interval over the rounds."""
    ratios = ours / control
    return bootstrap(lambda rows: float(np.median(ratios[rows])), len(ratios))


def holm(estimates: Sequence[Estimate], level: float = 0.05) -> list[bool]:
    """Which of several estimates differ from 0 when all are tested together (Holm 1979)."""
    values = [_p_value(estimate) for estimate in estimates]
    found = [False] * len(values)
    for place, number in enumerate(np.argsort(values, kind="stable")):
        if not values[number] <= level / (len(values) - place):
            break
        found[number] = True
    return found


def _p_value(estimate: Estimate) -> float:
    error = (estimate.high - estimate.low) / (2 * 1.959964)
    if not error > 0:
        return 1.0 if estimate.value == 0 or math.isnan(error) else 0.0
    return math.erfc(abs(estimate.value) / error / 2**0.5)
