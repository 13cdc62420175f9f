"""Runs the testbed's models on fixed prompts and noise, and measures the results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from ..core.families import denoiser_of
from ..core.pipeline import call_pipeline
from ..metrics.frechet import FeatureStats
from . import fashion_scenes
from .embedded import card_dir
from .grader import garment_features, grade, load_grader, scene_features
from .judge import load_judge

GRADERS = ("fashion-grader", "fashion-judge")
REFERENCES = ("scenes-train", "scenes-test", "garments-train", "garments-test")


def load_reference(name: str, grader: str = "fashion-grader") -> FeatureStats:
    """Feature statistics of real images.

    Args:
        name: one of `REFERENCES`: `-test` are held-out combinations and garments that the grader was not trained on,
            `-train` training combinations and garments that it was trained on.
        grader: whose features, one of `GRADERS`.

    Raises:
        ValueError: another grader, or no such reference.
    """
    return FeatureStats.load(_of_grader(grader) / f"{name}.safetensors")


def load_rows(name: str, grader: str = "fashion-grader") -> np.ndarray:
    """Features of 4,000 real images, float64 (4000, d), stored in half precision.

    They are other draws than those of `load_reference`, but of the same garments.

    Args:
        name: `scenes-test` or `garments-test`, see `load_reference`.
        grader: whose features, one of `GRADERS`.

    Raises:
        ValueError: another grader, or there are no such rows.
    """
    path = _of_grader(grader) / f"{name}-rows.safetensors"
    if not path.is_file():
        raise ValueError(f"There are no rows called {name!r}: expected scenes-test or garments-test.")
    return load_file(path)["features"].astype(np.float64)


def _of_grader(name: str) -> Path:
    if name not in GRADERS:
        raise ValueError(f"No grader is called {name!r}: expected {' or '.join(GRADERS)}.")
    return card_dir(name)


@dataclass
class Run:
    """Images that a pipeline generated from a list of prompts (or without prompts), and their cost.

    Attributes:
        images: float32 (n, h, w[, 3]) in [0, 1].
        features: (n, d) of the first grader, for distances between samples.
        grades: boolean arrays (n,), see `grade`; those of the judge begin with `judge_`. Empty without prompts.
        calls: NFE: denoiser evaluations per image, where a guided step counts as one.
        seconds: wall-clock time of the sampling.
        judge_features: (n, d) of the judge; (0, 0) if it has not seen the images.
    """

    images: np.ndarray
    features: np.ndarray
    grades: dict[str, np.ndarray] = field(default_factory=dict)
    calls: float = 0.0
    seconds: float = 0.0
    judge_features: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))

    @classmethod
    def join(cls, parts: Sequence[Run], extra_calls: float = 0.0) -> Run:
        """Joins the parts to one run; `extra_calls` is the NFE per image outside the pipeline."""
        return cls(
            np.concatenate([p.images for p in parts]),
            np.concatenate([p.features for p in parts]),
            {k: np.concatenate([p.grades[k] for p in parts]) for k in parts[0].grades},
            float(np.mean([p.calls for p in parts])) + extra_calls,
            sum(p.seconds for p in parts),
            np.concatenate([p.judge_features for p in parts]),
        )


def held_out_prompts(num_prompts: int, seed: int = 0) -> list[str]:
    """Prompts of the test split: held-out two-garment combinations, and a quarter with one garment."""
    return [fashion_scenes.caption(s) for s in fashion_scenes.draw_scenes("test", num_prompts, seed)]


@contextmanager
def _count_rows(module: nn.Module) -> Iterator[list[int]]:
    """Records how many rows each denoiser call evaluates, so that guidance and extra calls are counted."""
    rows: list[int] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample: Any = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        rows.append(len(sample))

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def run_scenes(
    pipe: Any, prompts: list[str], *, seed: int = 0, offset: int = 0, batch_size: int = 64, **call_kwargs: Any
) -> Run:
    """Generates one image per prompt; image i starts from the noise of (seed, offset + i) in any batch."""
    parts, start = [], time.perf_counter()
    with _count_rows(denoiser_of(pipe)) as rows:
        for low in range(0, len(prompts), batch_size):
            chunk = prompts[low : low + batch_size]
            generators = [
                torch.Generator().manual_seed(1_000_000 * seed + offset + low + i) for i in range(len(chunk))
            ]
            result = call_pipeline(
                pipe, chunk, height=32, width=64, generator=generators, output_type="np", **call_kwargs
            )
            parts.append(result.images)
    seconds = time.perf_counter() - start
    stacked = np.concatenate(parts).astype(np.float32)
    rows_per_step = 2 if call_kwargs.get("guidance_scale", 7.5) > 1 else 1
    return Run(
        stacked,
        scene_features(load_grader(), stacked),
        both_grades(stacked, prompts),
        sum(rows) / len(prompts) / rows_per_step,
        seconds,
        scene_features(load_judge(), stacked),
    )


def both_grades(pictures: np.ndarray | Tensor, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The results of `grade` by the first grader, and by the judge under names that begin with `judge_`."""
    second = {f"judge_{name}": right for name, right in grade(load_judge(), pictures, prompts).items()}
    return {**grade(load_grader(), pictures, prompts), **second}


def run_garments(
    pipe: Any, num_images: int, *, seed: int = 0, batch_size: int = 250, **call_kwargs: Any
) -> Run:
    """Generates grey garments; image i starts from the noise of seed (seed, i)."""
    parts, start = [], time.perf_counter()
    with _count_rows(pipe.unet) as rows:
        for low in range(0, num_images, batch_size):
            size = min(batch_size, num_images - low)
            generators = [torch.Generator().manual_seed(1_000_000 * seed + low + i) for i in range(size)]
            result = call_pipeline(
                pipe, batch_size=size, generator=generators, output_type="np", **call_kwargs
            )
            parts.append(result.images)
    seconds = time.perf_counter() - start
    stacked = np.concatenate(parts).astype(np.float32)
    first, second = (garment_features(grader, stacked) for grader in (load_grader(), load_judge()))
    return Run(stacked, first, {}, sum(rows) / num_images, seconds, second)
