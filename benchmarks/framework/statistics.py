"""Estimates of rows and of their differences to a control: the one place that calls the library's statistics.

Every interval is over prompts: the images of one prompt count as one group.
"""

from dataclasses import dataclass

import numpy as np

from diffusers_ext.metrics.comparison import (
    Estimate,
    bootstrap,
    frechet_interval,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.metrics.estimate import group_index, group_sums
from diffusers_ext.metrics.frechet import frechet_distance
from diffusers_ext.metrics.kid import kid
from diffusers_ext.metrics.prdc import PRDC, prdc

from .samples import Samples, real_rows, reference

UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


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
        return proportion(ours.aligned(judge), ours.prompts)

    def accuracy_difference(self, ours: Samples, control: Samples, judge: str) -> Estimate:
        """`accuracy` less the control's, on the same prompts and noise."""
        return paired_difference(ours.aligned(judge), control.aligned(judge), ours.prompts)

    def distance(self, ours: Samples, judge: str) -> Estimate:
        """FD∞ to real test images, not known for fewer images than features, as in small runs."""
        features = ours.features(judge)
        if len(features) <= features.shape[1]:
            return UNKNOWN
        return frechet_interval(features, reference(f"{self.kind}-test", judge), ours.prompts)

    def distance_difference(self, ours: Samples, control: Samples, judge: str) -> Estimate:
        """`distance` less the control's, on the same prompts and noise."""
        a, b = ours.features(judge), control.features(judge)
        if len(a) <= a.shape[1]:
            return UNKNOWN
        return paired_frechet_difference(a, b, reference(f"{self.kind}-test", judge), ours.prompts)

    def kernel_distance(self, ours: Samples, judge: str) -> Estimate:
        """KID's arithmetic against real test images, times 1,000."""
        found = kid(ours.features(judge), real_rows(self.kind, judge), ours.prompts)
        return Estimate(1000 * found.value, 1000 * found.low, 1000 * found.high, found.p_value)

    def density_and_coverage(self, ours: Samples, judge: str) -> str:
        """ "density / coverage" against as many real test images."""
        found = self.coverage(ours, judge)
        return f"{found.density:.2f} / {found.coverage:.2f}"

    def coverage(self, ours: Samples, judge: str, num_neighbors: int = 5) -> PRDC:
        """Precision, recall, density and coverage against as many real test images, with at most `num_neighbors`."""
        features = ours.features(judge)
        rows = real_rows(self.kind, judge)[: len(features)]
        return prdc(features, rows, min(num_neighbors, len(features) - 1))

    def diversity_change(self, ours: Samples, control: Samples, judge: str) -> Estimate:
        """Relative change of the mean feature distance between two images of one prompt.

        Pairs count whose images show their prompt in both rows, as wrong images are diverse too.
        """
        first, second, group = pairs_of(ours.prompts)
        right = ours.aligned(judge) & control.aligned(judge)
        kept = right[first] & right[second]
        first, second, group = first[kept], second[kept], group[kept]
        if len(np.unique(group)) < 2:
            return UNKNOWN
        a, b = (
            np.linalg.norm(x[first] - x[second], axis=-1)
            for x in (ours.features(judge), control.features(judge))
        )
        return self._ratio(a, b, group)

    def floor(self, judge: str) -> float:
        """Fréchet distance of 8,000 real training images to 8,000 real test images: the limit for a perfect model."""
        return frechet_distance(*(reference(f"{self.kind}-{split}", judge) for split in ("train", "test")))

    def mean(self, values: np.ndarray, groups: np.ndarray | None = None) -> Estimate:
        """Mean of values (n,), of which those of one group (n,) belong together."""
        return paired_difference(values, np.zeros(len(values)), groups)

    def difference(self, ours: np.ndarray, control: np.ndarray, groups: np.ndarray | None = None) -> Estimate:
        """Mean of the differences of two results (n,) on the same prompts and noise."""
        return paired_difference(ours, control, groups)

    def ratio_change(
        self, ours: np.ndarray, control: np.ndarray, groups: np.ndarray | None = None
    ) -> Estimate:
        """Change of a mean as a share of the control's."""
        return self._ratio(ours, control, np.arange(len(ours)) if groups is None else groups)

    def _ratio(self, ours: np.ndarray, control: np.ndarray, groups: np.ndarray) -> Estimate:
        # Sums over the groups, so that a resample is cheap.
        index = group_index(groups, len(groups))
        a, b = (group_sums(np.asarray(x, np.float64), index) for x in (ours, control))

        def change(drawn: np.ndarray) -> float:
            return float(a[drawn].sum() / b[drawn].sum() - 1)

        return bootstrap(change, len(a), self.resamples)


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
