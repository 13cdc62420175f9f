"""How often the 95% intervals of diffusers_ext.metrics contain the truth, on samplers whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from diffusers_ext.metrics.comparison import (
    Estimate,
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.metrics.kid import kid
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.grader import load_grader, scene_features
from diffusers_ext.testbed.runs import held_out_prompts, load_reference

from .framework.bench import Bench
from .framework.cells import Cell
from .framework.samples import CARDS

WRITES = ("coverage.md",)
SIZES = (288, 500, 1002, 1500, 2000)
PROMPTS = ("one row a prompt", "5 rows a prompt", "held-out prompts")
REFERENCE_ROWS = 1000  # of KID's reference
ACCURACIES = (0.75, 0.93, 0.99)
Rng = np.random.Generator


@dataclass(frozen=True)
class Case:
    """A sampler at one n, the truth of every measure, and `draw`, which returns an interval of every measure."""

    sampler: str
    prompts: str
    n: int
    truths: dict[str, float]
    draw: Callable[[Rng], list[Estimate]]
    digits: int = 2


@cache
def drawn_prompts(n: int, seed: int) -> list[str]:
    """Held-out prompts, kept for the next repetition."""
    return held_out_prompts(n, seed)


def labels_of(prompts: str, n: int, rng: Rng) -> Any:
    """Labels of n rows. Rows of one label share a random effect, whichever prompt that is."""
    if prompts == PROMPTS[0]:
        return None
    return np.arange(n) // 5 if prompts == PROMPTS[1] else drawn_prompts(n, int(rng.integers(50)))


def shared(labels: Any, n: int, rng: Rng, size: int) -> np.ndarray:
    """Normal values (n, size), equal for equal labels."""
    index = np.arange(n) if labels is None else np.unique(labels, return_inverse=True)[1]
    return rng.normal(size=(index.max() + 1, size))[index]


class Gaussian:
    """Rows from a Gaussian, half of whose variance belongs to the prompt; in pairs, half of the rest is shared."""

    def __init__(self, stats: FeatureStats, shift: np.ndarray) -> None:
        values, vectors = np.linalg.eigh(stats.covariance)
        self.root = vectors * np.sqrt(np.clip(values, 0, None))
        self.stats, self.shift = stats, shift

    def pair(self, labels: Any, n: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        """A sample, and one that is shifted."""
        size = len(self.shift)
        effect, row = shared(labels, n, rng, size), rng.normal(size=(n, size))
        parts = [
            np.sqrt(0.5) * effect + 0.5 * row + 0.5 * own for own in (row_noise(rng, n, size) for _ in "12")
        ]
        ours, control = (self.stats.mean + part @ self.root.T for part in parts)
        return ours, control + self.shift


def row_noise(rng: Rng, n: int, size: int) -> np.ndarray:
    """Normal values (n, size)."""
    return rng.normal(size=(n, size))


class Real:
    """Rows drawn from real scenes: a prompt by its frequency, then images of it; in pairs, half are the same image."""

    def __init__(self, features: np.ndarray, captions: list[str], shift: np.ndarray) -> None:
        mean, covariance = features.mean(0), np.cov(features, rowvar=False, ddof=0)
        self.stats, self.shift, self.features = FeatureStats(mean, covariance, len(features)), shift, features
        self.index = np.unique(captions, return_inverse=True)[1]
        self.members = [np.flatnonzero(self.index == i) for i in range(self.index.max() + 1)]

    def pair(self, labels: Any, n: int, rng: Rng) -> tuple[np.ndarray, np.ndarray]:
        """A sample, and one that is shifted."""
        slots = np.arange(n) if labels is None else np.unique(labels, return_inverse=True)[1]
        prompt = self.index[rng.integers(len(self.features), size=slots.max() + 1)][slots]
        ours, other = (np.array([rng.choice(self.members[p]) for p in prompt]) for _ in "12")
        control = np.where(rng.random(n) < 0.5, ours, other)
        return self.features[ours], self.features[control] + self.shift


def frechet_cells(samplers: dict[str, Any], reference: FeatureStats) -> Iterator[Case]:
    """FD∞ alone, and the difference to a sampler whose mean is shifted."""

    def moved(stats: FeatureStats, shift: np.ndarray) -> float:
        return frechet_distance(FeatureStats(stats.mean + shift, stats.covariance, 0), reference)

    for name, (sampler, all_prompts) in samplers.items():
        truth = moved(sampler.stats, 0 * sampler.shift)
        difference = truth - moved(sampler.stats, sampler.shift)
        for prompts in all_prompts:
            for n in SIZES if prompts != PROMPTS[0] else SIZES[::2]:

                def draw(
                    rng: Rng, sampler: Any = sampler, prompts: str = prompts, n: int = n
                ) -> list[Estimate]:
                    labels = labels_of(prompts, n, rng)
                    ours, control = sampler.pair(labels, n, rng)
                    return [
                        frechet_interval(ours, reference, labels),
                        paired_frechet_difference(ours, control, reference, labels),
                    ]

                truths = {"FD∞": truth, "FD∞, paired difference": difference}
                yield Case(name, prompts, n, truths, draw)


def plain_cells(sampler: Any, reference: FeatureStats, num_resamples: int = 100) -> Iterator[Case]:
    """The control: the plain distance with the bootstrap's percentiles centred on it, one row a prompt."""
    truth = frechet_distance(sampler.stats, reference)
    for n in SIZES[::2]:

        def draw(rng: Rng, n: int = n) -> list[Estimate]:
            x = sampler.pair(None, n, rng)[0]
            draws = [
                frechet_distance(FeatureStats.of(x[rng.integers(n, size=n)]), reference)
                for _ in range(num_resamples)
            ]
            value = frechet_distance(FeatureStats.of(x), reference)
            low, high = np.percentile(draws, [2.5, 97.5])
            return [Estimate(value, value - (high - low) / 2, value + (high - low) / 2)]

        yield Case("training scenes", PROMPTS[0], n, {"plain distance, bootstrap": truth}, draw)


def gaussian_kernel_mean(a: FeatureStats, b: FeatureStats) -> float:
    """E (x·y/d + 1)³ of independent x and y from two Gaussians."""
    d, dot = len(a.mean), float(a.mean @ b.mean)
    sa, sb = a.covariance, b.covariance
    second = np.sum((sa + np.outer(a.mean, a.mean)) * (sb + np.outer(b.mean, b.mean)))
    third = dot**3 + 3 * dot * (a.mean @ sb @ a.mean + b.mean @ sa @ b.mean + np.sum(sa * sb))
    third += 6 * a.mean @ sb @ sa @ b.mean
    return float(third / d**3 + 3 * second / d**2 + 3 * dot / d + 1)


def kid_cells(samplers: dict[str, Any], reference: FeatureStats) -> Iterator[Case]:
    """KID, with a new reference sample every time."""
    real = Gaussian(reference, 0 * reference.mean)
    for name, (sampler, all_prompts) in samplers.items():
        means = [gaussian_kernel_mean(a, b) for a, b in
                 ((sampler.stats,) * 2, (reference,) * 2, (sampler.stats, reference))]  # fmt: skip
        for prompts in all_prompts:
            for n in SIZES[:3:2]:

                def draw(
                    rng: Rng, sampler: Any = sampler, prompts: str = prompts, n: int = n
                ) -> list[Estimate]:
                    labels = labels_of(prompts, n, rng)
                    reference_rows = real.pair(None, REFERENCE_ROWS, rng)[0]
                    return [kid(sampler.pair(labels, n, rng)[0], reference_rows, labels)]

                truth = means[0] + means[1] - 2 * means[2]
                yield Case(name, prompts, n, {"KID": truth}, draw, 4)


def accuracy_cells() -> Iterator[Case]:
    """The share of right images and the paired difference to a control, on probit models with prompt effects."""

    def right(labels: Any, n: int, rng: Rng, shares: tuple[float, ...]) -> list[np.ndarray]:
        common = np.sqrt(0.4) * shared(labels, n, rng, 1)[:, 0] + np.sqrt(0.3) * rng.normal(size=n)
        return [common + np.sqrt(0.3) * rng.normal(size=n) < NormalDist().inv_cdf(share) for share in shares]

    for share in ACCURACIES:
        for prompts in PROMPTS:
            for n in SIZES[::2]:

                def draw(
                    rng: Rng, share: float = share, prompts: str = prompts, n: int = n
                ) -> list[Estimate]:
                    labels = labels_of(prompts, n, rng)
                    ours, control = right(labels, n, rng, (share, share - 0.03))
                    return [proportion(ours, labels), paired_difference(ours, control, labels)]

                truths = {"accuracy": share, "accuracy, paired difference": 0.03}
                yield Case(f"{share:.0%} right", prompts, n, truths, draw, 3)


@dataclass(frozen=True)
class Settings:
    """How often every case is repeated: of distances, of accuracies, and of the plain distance."""

    distances: int = 200
    accuracies: int = 1000
    control: int = 40
    real_scenes: int = 8000


@lru_cache(maxsize=1)
def cases(data_dir: Path, settings: Settings) -> list[tuple[Case, int]]:
    """All cases, each with the number of its repetitions."""
    train, test = load_reference("scenes-train"), load_reference("scenes-test")
    direction = np.random.default_rng(0).normal(size=train.mean.size)
    direction /= np.linalg.norm(direction)
    pictures, captions = fashion_scenes.scene_arrays(data_dir, "test", settings.real_scenes, seed=1)
    real = Real(scene_features(load_grader(), pictures), captions, 0.5 * direction)
    one, five, held_out = PROMPTS
    near, exact = Gaussian(train, 0.5 * direction), Gaussian(test, 0.5 * direction)
    far = Gaussian(FeatureStats(train.mean + direction, train.covariance, 0), 0.5 * direction)
    gaussian = {
        "training scenes": (near, (one, five)),
        "the reference itself": (exact, (one,)),
        "shifted training scenes": (far, (one,)),
    }
    groups = [
        (settings.accuracies, accuracy_cells()),
        (settings.distances, frechet_cells({"real scenes": (real, (one, held_out))}, train)),
        (settings.distances, frechet_cells(gaussian, test)),
        (settings.distances, kid_cells(gaussian, test)),
        (settings.control, plain_cells(near, test)),
    ]
    return [(case, count) for count, found in groups for case in found]


def simulated(number: int, data_dir: Path, settings: Settings) -> dict[str, Any]:
    """Estimates of every repetition of a case, (repetitions, measures) of values, and of both ends."""
    case, count = cases(data_dir, settings)[number]
    found = [case.draw(np.random.default_rng([seed, case.n])) for seed in range(count)]
    return {
        name: np.array([[getattr(e, name) for e in row] for row in found])
        for name in ("value", "low", "high")
    }


def lines(case: Case, found: dict[str, np.ndarray]) -> Iterator[list[str]]:
    """The rows of the table, one a measure."""
    for i, (measure, truth) in enumerate(case.truths.items()):
        value, low, high = (found[name][:, i] for name in ("value", "low", "high"))
        covered = np.mean((low <= truth) & (truth <= high))
        numbers = [truth, value.mean(), value.std(), (high - low).mean() / 2]
        shown = [f"{x:.{case.digits}f}" for x in numbers]
        yield [measure, case.sampler, case.prompts, f"{case.n:,}", *shown, f"{covered:.1%}", str(len(value))]


def main(bench: Bench) -> None:
    """Runs the simulations that are missing, and writes the page."""
    settings = bench.pick(Settings(), Settings(2, 2, 1, 200))
    all_cases = cases(bench.data_dir, settings)
    # In a small run one of every kind.
    numbers = range(0, len(all_cases), 1 if not bench.quick else 9)
    cells = {n: Cell(simulated, (n, bench.data_dir, settings), (CARDS["grader"],)) for n in numbers}
    found = bench.run(cells.values())
    rows = [line for n, cell in cells.items() for line in lines(all_cases[n][0], found[cell])]
    rows.sort(key=lambda row: row[0])
    header = [
        "measure",
        "sampler",
        "prompts",
        "n",
        "truth",
        "mean",
        "std",
        "half-width",
        "covered",
        "repetitions",
    ]
    bench.write(
        "coverage.md",
        "Share of nominal 95% intervals that contain the truth. Of 200 repetitions it has a standard error of 1.5 points, of"
        " 1,000 of 0.7.",
        markdown_table(header, rows),
    )
