"""How far may a model skip? Measured once against the model itself, and kept with the statistics.

Criterion: with the same noise and prompts, a run that skips k steps must end no further from a fine reference
than the full schedule does. The solver's own discretisation error is thus the allowance: a fine grid leaves
none, and then nothing is skipped. (Wang & Vastola, arXiv 2412.09726, sweep k against FID instead.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .gaussian import GaussianStats
from .inject import apply_teleport, remove_teleport

# A noisy solver has no reference trajectory; its deterministic counterpart has, on the same grid.
_DETERMINISTIC = {
    "DDPMScheduler": "DDIMScheduler",
    "EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "KDPM2DiscreteScheduler",
}


def calibrate_skip(
    pipe: Any,
    stats: GaussianStats,
    *,
    prompts: Sequence[str] | None = None,
    num_inference_steps: int | Sequence[int] = 20,
    num_images: int = 16,
    mean_from: str = "stats",
    means: Tensor | None = None,
    tolerance: float = 0.05,
    refinement: int = 4,
    seed: int = 0,
    progress: bool = True,
    **call_kwargs: Any,
) -> GaussianStats:
    """Finds how far `pipe` may skip with `stats`, for `skip="auto"`.

    Args:
        pipe: any pipeline that `apply_teleport` takes; it is left as it was found.
        stats: statistics of the pipeline's latents.
        prompts: what to generate, one image each; None for an unconditional pipeline.
        num_inference_steps: step counts to calibrate for. A run uses the entry of the smallest calibrated
            count that is not below its own, and skips nothing above the largest.
        num_images: batch size of an unconditional pipeline.
        mean_from: as in `TeleportScheduler`.
        means: (B, *shape), the prompts' own means, if they will be set in use too. With statistics that have
            an `unconditional` part the map then follows the pipeline's `guidance_scale`.
        tolerance: by how much of the full schedule's error the error may exceed it.
        refinement: the reference takes that many times the steps, at least 50.
        seed: of the initial noise.
        progress: show a progress bar over the trial runs.
        call_kwargs: passed to the pipeline, such as `guidance_scale`, `height`, `width`.

    Returns:
        A copy of `stats` whose `calibration` holds, for each step count, `sigma` (None: skip nothing), the
        mean squared errors of the full schedule and of each trial, and the model calls spent.

    Raises:
        ValueError: a step count below 2, or what `apply_teleport` refuses.
    """
    counts = sorted(
        {num_inference_steps} if isinstance(num_inference_steps, int) else set(num_inference_steps)
    )
    if not counts or counts[0] < 2:
        raise ValueError(f"num_inference_steps must be 2 or more to skip any, got {num_inference_steps!r}.")
    original = pipe.scheduler
    kind = _DETERMINISTIC.get(type(original).__name__)
    inner = getattr(diffusers, kind).from_config(original.config) if kind else original
    run = _Runner(pipe, prompts, num_images, seed, call_kwargs)
    entries: dict[str, Any] = {}
    try:
        pipe.scheduler = inner
        reference = run(max(50, refinement * counts[-1]))
        for count in counts:
            entries[str(count)] = _sweep(run, reference, stats, count, mean_from, means, tolerance, progress)
    finally:
        remove_teleport(pipe)
        pipe.scheduler = original
    calibration = {
        "sigma": {count: entry["sigma"] for count, entry in entries.items()},
        "scheduler": type(inner).__name__,
        "mean_from": mean_from,
        "calls": run.calls,
        "trials": entries,
    }
    return dataclasses.replace(stats, calibration=calibration)


def _sweep(
    run: _Runner,
    reference: np.ndarray,
    stats: GaussianStats,
    count: int,
    mean_from: str,
    means: Tensor | None,
    tolerance: float,
    progress: bool,
) -> dict[str, Any]:
    full = _squared_error(run(count), reference)
    entry: dict[str, Any] = {"sigma": None, "full_error": full, "errors": []}
    first = 2 if mean_from == "first_call" else 1
    for skipped in tqdm(range(first, count), desc=f"calibrating {count} steps", disable=not progress):
        apply_teleport(run.pipe, stats, skip=(skipped + 0.5) / count, mean_from=mean_from)
        guidance = run.kwargs.get("guidance_scale", 1.0) if stats.unconditional and means is not None else 1.0
        run.pipe.scheduler.set_mean(means, guidance)
        result, sigma = run(count), run.pipe.scheduler.skipped_to
        remove_teleport(run.pipe)
        if sigma is None:
            break
        error = _squared_error(result, reference)
        entry["errors"].append([skipped, sigma, error])
        if error <= (1 + tolerance) * full:
            entry["sigma"] = sigma
        elif error > 2 * full:
            break  # errors grow with the distance skipped: nothing further away can qualify
    return entry


class _Runner:
    """Runs a pipeline on fixed noise and prompts, and counts the model calls."""

    def __init__(
        self, pipe: Any, prompts: Sequence[str] | None, num_images: int, seed: int, kwargs: dict[str, Any]
    ):
        self.pipe, self.seed, self.kwargs, self.calls = pipe, seed, kwargs, 0
        self.first = {"batch_size": num_images} if prompts is None else {"prompt": list(prompts)}
        self.size = num_images if prompts is None else len(prompts)

    def __call__(self, num_inference_steps: int) -> np.ndarray:
        """Final states (B, ...) as float64."""
        model = next(
            m for m in (getattr(self.pipe, n, None) for n in ("unet", "transformer")) if m is not None
        )
        handle = model.register_forward_pre_hook(self._count)
        generators = [torch.Generator().manual_seed(self.seed + i) for i in range(self.size)]
        try:
            images = self.pipe(
                **self.first,
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="latent",
                **self.kwargs,
            ).images
        finally:
            handle.remove()
        return images.double().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images, np.float64)

    def _count(self, *_: Any) -> None:
        self.calls += 1


def _squared_error(states: np.ndarray, reference: np.ndarray) -> float:
    return float(np.mean((states - reference) ** 2))
