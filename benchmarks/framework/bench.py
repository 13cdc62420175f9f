"""What a benchmark is given: where things lie, how large it is, and who measures and writes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import cells
from .cells import Arrays, Cell
from .samples import Samples
from .statistics import Statistics
from .trainings import Training, train

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True)
class Bench:
    """One run of a benchmark.

    Attributes:
        output_dir: folder of the pages.
        cache_dir: folder of what is kept: measurements and trained controls.
        data_dir: Fashion-MNIST's idx files, or the embedded sample of them.
        workers: processes that measure side by side; 0: this one.
        quick: whether the smaller settings are meant.
    """

    output_dir: Path
    cache_dir: Path
    data_dir: Path
    workers: int = 2
    quick: bool = False

    def pick(self, full: T, quick: T) -> T:
        """The settings of this run."""
        return quick if self.quick else full

    def run(self, wanted: Iterable[Cell]) -> dict[Cell, Arrays]:
        """Measures what is missing, and returns everything."""
        return cells.run(wanted, self.cache_dir / "cells", self.workers)

    def samples(self, rows: Mapping[K, Sequence[Cell]]) -> dict[K, Samples]:
        """Measures what is missing of rows with a cell for each seed, and joins the seeds."""
        found = self.run(cell for cells_of_row in rows.values() for cell in cells_of_row)
        return {row: Samples.of([found[cell] for cell in parts]) for row, parts in rows.items()}

    def statistics(self, kind: str) -> Statistics:
        """The measures of images of a kind, "scenes" or "garments"."""
        return Statistics(kind, self.pick(1000, 5))

    def train(self, trainings: Mapping[str, Training]) -> dict[str, Path]:
        """Trains what is missing, and returns the folders of the finished models."""
        return train(trainings, self.cache_dir / "trained", max(self.workers, 1))

    def write(self, name: str, *parts: str) -> None:
        """Writes a page, its parts one below the other, and prints it."""
        page = "\n\n".join(part for part in parts if part) + "\n"
        self.path(name).write_text(page, encoding="utf-8")
        print(page)

    def path(self, name: str) -> Path:
        """Where a file of the benchmark belongs."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        return self.output_dir / name
