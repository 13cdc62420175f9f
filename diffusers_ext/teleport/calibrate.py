"""How far may a model skip? Measured once against the model itself, and kept with the statistics.

Criterion: with the same noise and prompts, a run that skips k steps must end no further from a fine reference
than the full schedule does. The solver's own discretisation error is thus the allowance: a fine grid leaves
none. (Wang & Vastola, arXiv 2412.09726, sweep k against FID instead.)

The reference is the best trajectory that is known. At the highest noise many models denoise worse than the data's
Gaussian does, because a noise prediction there says little about the picture; following them would punish the map
for being right. So the reference takes the closed form down to the level where the model is first no worse at
denoising clean samples, and the model on a fine grid from there.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..pipeline_hooks import quiet
from .gaussian import GaussianStats
from .inject import apply_teleport, remove_teleport
from .prompt_map import prompt_features
from .sources import pipeline_samples
from .trust import trusted_sigma

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
    samples: Tensor | None = None,
    num_inference_steps: int | Sequence[int] = 20,
    num_images: int = 64,
    mean_from: str = "stats",
    means: Tensor | None = None,
    tolerance: float = 0.0,
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
        samples: (B, *shape), clean samples in the denoiser's scale, real ones if possible: one for each prompt, or
            `num_images`. None draws them from the pipeline.
        num_inference_steps: step counts to calibrate for. A run uses the entry of the smallest calibrated
            count that is not below its own, and skips nothing above the largest.
        num_images: batch size of an unconditional pipeline.
        mean_from: as in `TeleportScheduler`.
        means: (B, *shape), the prompts' own means, if they will be set in use too and `stats` has no prompt map.
            With statistics that have an `unconditional` part the map then follows the `guidance_scale`.
        tolerance: by how much of the full schedule's error the error may exceed it.
        refinement: the reference takes that many times the steps, at least 50.
        seed: of the initial noise.
        progress: show a progress bar over the trial runs.
        call_kwargs: passed to the pipeline, such as `guidance_scale`, `height`, `width`.

    Returns:
        A copy of `stats` whose `calibration` holds, for each step count, `sigma` (None: skip nothing), the
        mean squared errors of the full schedule and of each trial, the level down to which the reference trusts
        the Gaussian, and the model calls spent.

    Raises:
        ValueError: a step count below 2, samples that do not match, or what `apply_teleport` refuses.
    """
    counts = sorted(
        {num_inference_steps} if isinstance(num_inference_steps, int) else set(num_inference_steps)
    )
    if not counts or counts[0] < 2:
        raise ValueError(f"num_inference_steps must be 2 or more to skip any, got {num_inference_steps!r}.")
    original = pipe.scheduler
    kind = _DETERMINISTIC.get(type(original).__name__)
    inner = getattr(diffusers, kind).from_config(original.config) if kind else original
    run = _Runner(pipe, stats, prompts, num_images, mean_from, means, seed, call_kwargs)
    if samples is not None and tuple(samples.shape) != (run.size, *stats.shape):
        raise ValueError(
            f"samples have shape {tuple(samples.shape)}, expected {(run.size, *stats.shape)}: one of the"
            " statistics' shape for each image."
        )
    fine = max(50, refinement * counts[-1])
    entries: dict[str, Any] = {}
    try:
        pipe.scheduler = inner
        with run.counting():
            trusted, looked = run.trust(samples, fine) if mean_from == "stats" else (None, [])
            reference = run(fine, sigma=trusted)
            for count in counts:
                entries[str(count)] = _sweep(run, reference, count, tolerance, progress)
    finally:
        remove_teleport(pipe)
        pipe.scheduler = original
    calibration = {
        "sigma": {count: entry["sigma"] for count, entry in entries.items()},
        "scheduler": type(inner).__name__,
        "mean_from": mean_from,
        "guidance_scale": run.guidance_scale,
        "calls": run.calls,
        "trusted_sigma": trusted,
        "excess_loss": looked,
        "trials": entries,
    }
    return dataclasses.replace(stats, calibration=calibration)


def _sweep(
    run: _Runner, reference: np.ndarray, count: int, tolerance: float, progress: bool
) -> dict[str, Any]:
    full = _squared_error(run(count), reference)
    entry: dict[str, Any] = {"sigma": None, "full_error": full, "errors": []}
    first = 2 if run.mean_from == "first_call" else 1
    for skipped in tqdm(range(first, count), desc=f"calibrating {count} steps", disable=not progress):
        result = run(count, skip=(skipped + 0.5) / count)
        if run.skipped_to is None:
            break
        error = _squared_error(result, reference)
        entry["errors"].append([skipped, run.skipped_to, error])
        if error <= (1 + tolerance) * full:
            entry["sigma"] = run.skipped_to
        elif error > 2 * full:
            break  # errors grow with the distance skipped: nothing further away can qualify
    return entry


class _Runner:
    """Runs a pipeline on fixed noise and prompts, and counts the model calls."""

    def __init__(
        self,
        pipe: Any,
        stats: GaussianStats,
        prompts: Sequence[str] | None,
        num_images: int,
        mean_from: str,
        means: Tensor | None,
        seed: int,
        kwargs: dict[str, Any],
    ):
        self.pipe, self.stats, self.mean_from, self.means = pipe, stats, mean_from, means
        self.prompts = None if prompts is None else list(prompts)
        self.size = num_images if self.prompts is None else len(self.prompts)
        self.seed, self.kwargs, self.calls = seed, kwargs, 0
        self.skipped_to: float | None = None
        # Flux and its like take the scale as an input: their denoiser is one, guided or not.
        self.guided = hasattr(type(pipe), "do_classifier_free_guidance")
        default = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
        scale = kwargs.get("guidance_scale", default.default if default else 1.0)
        self.guidance_scale = max(1.0, float(scale)) if self.guided else 1.0

    def __call__(self, num_inference_steps: int, skip: float = 0.0, sigma: float | None = None) -> np.ndarray:
        """Final states (B, ...) as float64, skipping a share of the steps, or down to `sigma`."""
        on = skip > 0 or sigma is not None
        if on:
            reach: dict[str, Any] = {"skip": skip} if sigma is None else {"sigma": sigma}
            apply_teleport(self.pipe, self.stats, mean_from=self.mean_from, **reach)
            if self.means is not None:
                follows = self.stats.unconditional is not None
                self.pipe.scheduler.set_mean(self.means, self.guidance_scale if follows else 1.0)
        first = {"batch_size": self.size} if self.prompts is None else {"prompt": self.prompts}
        generators = [torch.Generator().manual_seed(self.seed + i) for i in range(self.size)]
        try:
            with quiet(self.pipe):
                images = self.pipe(
                    **first,
                    num_inference_steps=num_inference_steps,
                    generator=generators,
                    output_type="latent",
                    **self.kwargs,
                ).images
        finally:
            self.skipped_to = self.pipe.scheduler.skipped_to if on else None
            remove_teleport(self.pipe)
        return images.double().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images, np.float64)

    def trust(
        self, samples: Tensor | None, num_inference_steps: int
    ) -> tuple[float | None, list[list[float]]]:
        """`trusted_sigma` on the samples given, or on the pipeline's own."""
        plain = {**self.kwargs, "num_inference_steps": num_inference_steps, "seed": self.seed}
        if self.guided:
            plain["guidance_scale"] = 1.0
        if samples is None:
            # From other noise than they are noised with: a sample is a function of the noise it came from.
            other = {**plain, "seed": self.seed + self.size}
            drawn = pipeline_samples(
                self.pipe, self.size, batch_size=self.size, prompts=self.prompts, progress=False, **other
            )
            batch = next(drawn)
            samples = batch if isinstance(batch, Tensor) else batch[0]
        mean = self.means
        if mean is None and self.stats.prompt_map is not None and self.prompts is not None:
            mean = self.stats.prompt_mean(prompt_features(self.pipe, self.prompts))
        return trusted_sigma(
            self.pipe,
            self.stats,
            samples,
            mean=mean,
            prompts=self.prompts,
            guidance_scale=self.guidance_scale,
            call=plain,
        )

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts the calls of the denoiser."""
        model = next(
            m for m in (getattr(self.pipe, n, None) for n in ("unet", "transformer")) if m is not None
        )
        handle = model.register_forward_pre_hook(self._count)
        try:
            yield
        finally:
            handle.remove()

    def _count(self, *_: Any) -> None:
        self.calls += 1


def _squared_error(states: np.ndarray, reference: np.ndarray) -> float:
    return float(np.mean((states - reference) ** 2))
