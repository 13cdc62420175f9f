"""ISTD: how evenly images change along a path between two noises.

Interpolation standard deviation, Guo et al., arXiv:2312.04410, section 4.2, whose code was not released. Each
prompt has one pair of noises, slerp at η = 0, 0.1 … 1, and eleven images. The standard deviation of the L2
distances of the ten adjacent pairs in pixel space is averaged over prompts. A model that blurs, or that
generates the same image for every noise, has a small ISTD too. The mean distance and the distance of the ends
are therefore reported with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..core.hooks import parameters_of
from ..core.noise import noise_path
from ..core.pipeline import call_pipeline, initial_noise, quiet
from ..core.storage import digest, write_json


@dataclass(frozen=True)
class ISTD:
    """Results per prompt, float64 (n,); the properties are means over prompts.

    Attributes:
        deviations: standard deviation of a path's adjacent distances.
        distances: mean of a path's adjacent distances.
        endpoints: distance between a path's first and last image.
    """

    deviations: np.ndarray
    distances: np.ndarray
    endpoints: np.ndarray

    @property
    def istd(self) -> float:
        """The metric: mean over prompts of the standard deviation."""
        return float(self.deviations.mean())

    @property
    def mean_distance(self) -> float:
        """Mean adjacent distance."""
        return float(self.distances.mean())

    @property
    def relative(self) -> float:
        """Mean over prompts of standard deviation over mean distance; independent of the images' contrast."""
        return float((self.deviations / np.maximum(self.distances, 1e-12)).mean())

    @property
    def endpoint_distance(self) -> float:
        """Mean distance between the ends."""
        return float(self.endpoints.mean())


def path_statistics(pictures: np.ndarray, ddof: int = 0) -> tuple[float, float, float]:
    """(standard deviation, mean) of one path's adjacent L2 distances, and the distance between its ends.

    Args:
        pictures: (m, ...) images along the path, m ≥ 3, in the value range for the distances.
        ddof: 0 divides by the number of distances, m − 1; 1 divides by m − 2.

    Raises:
        ValueError: fewer than three images, or values that are not finite.
    """
    x = np.asarray(pictures, dtype=np.float64).reshape(len(pictures), -1)
    if len(x) < 3 or not np.isfinite(x).all():
        raise ValueError(f"A path needs three or more finite images, got {len(x)} of shape {x.shape[1:]}.")
    steps = np.linalg.norm(np.diff(x, axis=0), axis=1)
    return float(steps.std(ddof=ddof)), float(steps.mean()), float(np.linalg.norm(x[-1] - x[0]))


@torch.no_grad()
def compute_istd(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_frames: int = 11,
    seed: int = 0,
    value_range: tuple[float, float] = (-1.0, 1.0),
    ddof: int = 0,
    batch_size: int = 11,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    **call_kwargs: Any,
) -> ISTD:
    """ISTD of a text-to-image pipeline. The same prompts and seed give every model the same noises.

    Args:
        pipe: any pipeline that takes `prompt` and `latents`.
        prompts: one path each; 500 in the paper.
        num_frames: images per path, at equal steps of η from 0 to 1.
        seed: seed of the noises; prompt i's pair depends on `(seed, i)`.
        value_range: values of black and white for the distances. The tables of the paper are consistent with
            [−1, 1].
        ddof: delta degrees of freedom of the standard deviation.
        batch_size: images per call.
        cache_dir: folder for one small file per prompt, so that an interrupted run can be resumed. File names
            depend on the settings and the prompt but not on the model: use a separate folder for each model.
        progress: show a progress bar.
        call_kwargs: passed to the pipeline: `num_inference_steps` (50 in the paper), `guidance_scale` (7.5),
            ...

    Raises:
        ValueError: no prompts, fewer than three frames, or images that are not finite.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise ValueError("Give at least one prompt, got an empty list.")
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}.")
    if num_frames < 3 or batch_size < 1:
        raise ValueError(
            f"num_frames must be 3 or more and batch_size 1 or more, got {num_frames}, {batch_size}."
        )
    settings = {"frames": num_frames, "seed": seed, "range": value_range, "ddof": ddof, **call_kwargs}
    rows = []
    for number, prompt in enumerate(tqdm(prompts, desc="ISTD", unit="prompt", disable=not progress)):
        path = None if cache_dir is None else _cache_path(Path(cache_dir), settings, number, prompt)
        if path is not None and path.is_file():
            rows.append(json.loads(path.read_text()))
            continue
        images = _path(pipe, prompt, num_frames, (seed, number), batch_size, call_kwargs)
        low, high = value_range
        rows.append(path_statistics(low + (high - low) * images, ddof))
        if path is not None:
            write_json(path, rows[-1])
    return ISTD(*np.array(rows).T)


def _path(
    pipe: Any, prompt: str, frames: int, seeds: tuple[int, int], batch_size: int, call: dict[str, Any]
) -> np.ndarray:
    """Images (frames, h, w, 3) in [0, 1] along one path."""
    seed = (1_000_003 * seeds[0] + seeds[1]) * 2
    generators = [torch.Generator().manual_seed((seed + end) % 2**63) for end in (0, 1)]
    if "use_resolution_binning" in parameters_of(pipe):
        call = {"use_resolution_binning": False, **call}  # it replaces the size, to which the latents belong
    with quiet(pipe):
        ends = initial_noise(pipe, {**call, "prompt": [prompt] * 2, "generator": generators})
        latents, _ = noise_path(ends, frames)
        images = [
            call_pipeline(
                pipe,
                **call,
                prompt=[prompt] * len(part),
                latents=part,
                output_type="np",
                return_dict=False,
            )[0]
            for part in latents.split(batch_size)
        ]
    return np.concatenate(images)


def _cache_path(folder: Path, settings: dict[str, Any], number: int, prompt: str) -> Path:
    return folder / f"istd-{number:05d}-{digest([settings, number, prompt])[:12]}.json"
