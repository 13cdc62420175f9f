"""Images of one row of a table, graded by every judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from diffusers_ext.metrics.frechet import FeatureStats
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.grader import garment_features, grade, load_grader, scene_features
from diffusers_ext.testbed.judge import load_judge
from diffusers_ext.testbed.runs import load_reference, load_rows

from .cells import Arrays

# Both grade every image. Scorers and choices of settings may use the first; nothing but benchmarks sees the judge.
JUDGES: dict[str, Callable[[], Any]] = {"grader": load_grader, "judge": load_judge}
CARDS = {name: card_dir(f"fashion-{name}") for name in JUDGES}
SHOWN = 16


@lru_cache
def reference(kind: str, judge: str) -> FeatureStats:
    """Statistics of real images' features; `kind` is one of `testbed.runs.REFERENCES`."""
    return load_reference(kind, CARDS[judge].name)


@lru_cache
def real_rows(kind: str, judge: str) -> np.ndarray:
    """Features of 4,000 real test images of a kind, "scenes" or "garments"."""
    return load_rows(f"{kind}-test", CARDS[judge].name)


def graded(images: np.ndarray | Tensor, prompts: Sequence[str] | None = None, **more: Any) -> dict[str, Any]:
    """What a cell keeps of images: every judge's grades and features, and the first few images.

    Args:
        images: scenes (n, 32, 64, 3) with n prompts, or garments (n, 32, 32) without, in [0, 1].
        more: further arrays (n, ...) or numbers.
    """
    found: dict[str, Any] = dict(more)
    for name, load in JUDGES.items():
        judge = load()
        if prompts is None:
            features = garment_features(judge, images)
        else:
            features = scene_features(judge, images)
            found[f"aligned {name}"] = grade(judge, images, prompts)["aligned"]
            found["prompts"] = np.array(prompts)
        found[f"features {name}"] = features.astype(np.float32)
    shown = images[:SHOWN]
    return found | {"pictures": np.asarray(shown, np.float16)}


@dataclass(frozen=True)
class Samples:
    """All seeds' images of one row.

    Attributes:
        rows: arrays with a row for each image: "aligned JUDGE", "features JUDGE", "prompts", and what a cell has added.
        pictures: the first few images of the first seed.
        calls: NFE, the mean over the seeds; NaN if it was not counted.
    """

    rows: Arrays
    pictures: np.ndarray
    calls: float = float("nan")

    @classmethod
    def of(cls, parts: Sequence[Arrays]) -> Samples:
        """Joins the cells of one row's seeds."""
        names = [n for n, v in parts[0].items() if v.ndim and n != "pictures"]
        rows = {name: np.concatenate([part[name] for part in parts]) for name in names}
        calls = [float(part.get("calls", np.nan)) for part in parts]
        return cls(rows, parts[0]["pictures"].astype(np.float32), float(np.mean(calls)))

    def __len__(self) -> int:
        """The number of images."""
        return len(next(iter(self.rows.values())))

    def aligned(self, judge: str = "grader") -> np.ndarray:
        """(n,) whether an image shows every word of its prompt."""
        return self.rows[f"aligned {judge}"]

    def features(self, judge: str = "grader") -> np.ndarray:
        """(n, d) float64."""
        return self.rows[f"features {judge}"].astype(np.float64)

    @property
    def prompts(self) -> np.ndarray:
        """(n,) what belongs together in an interval: the prompt, without prompts the image itself."""
        return self.rows["prompts"] if "prompts" in self.rows else np.arange(len(self))

    def choose(self, rows: np.ndarray) -> Samples:
        """Of all arrays these rows."""
        return Samples({name: values[rows] for name, values in self.rows.items()}, self.pictures, self.calls)
