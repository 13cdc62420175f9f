"""Calibration of `skip="auto"`: how far a model may skip, measured against the model itself.

Criterion: with the same noise and prompts, a run that skips k steps must end no further from a fine reference
than the full schedule does. The discretisation error of the solver is thus the tolerance, and a fine grid
leaves none. (Wang & Vastola, arXiv:2412.09726, sweep k against FID instead.)

The reference is the best available trajectory. At the highest noise levels many models denoise worse than the
Gaussian of the data, because a noise prediction contains little information about the image there. A
reference that follows the model would count the better result of the Gaussian as an error. The reference
therefore follows the closed form down to the level where the model first denoises clean samples at least as
well, and the model on a fine grid from there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.checks import check_counts
from ..core.families import denoisers_of, guidance_of
from ..core.hooks import parameters_of
from ..core.pipeline import final_latents, quiet
from ..core.predictions import noise_to_signal
from ..core.schedules import same_grid_deterministic
from .apply import apply_teleport, check_pipeline, remove_teleport
from .gaussian import GaussianStats
from .probe import denoise_at, repeated
from .prompts import prompt_features, unguided
from .sources import check_prompts, pipeline_samples


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
        pipe: any pipeline that `apply_teleport` supports; it is not changed.
        stats: statistics of the pipeline's latents.
        prompts: the prompts to generate, one image each; None for an unconditional pipeline.
        samples: (B, *stats.shape), clean samples in the denoiser's scale, real ones if possible: one for each
            prompt, or `num_images`. None generates them with the pipeline.
        num_inference_steps: step counts to calibrate for. A run uses the entry of the smallest calibrated
            count that is not below its own, and skips nothing above the largest.
        num_images: number of images of an unconditional pipeline.
        mean_from: see `TeleportScheduler`.
        means: (B, *stats.shape), the prompts' own means, if sampling will set them too and `stats` has no prompt
            map. With statistics that have an `unconditional` part, the transport then follows the guidance
            of the calls.
        tolerance: relative amount by which the error may exceed that of the full schedule.
        refinement: the reference takes the largest step count times this factor, and at least 50 steps.
        seed: seed of the initial noise.
        progress: show a progress bar over the trial runs.
        call_kwargs: passed to the pipeline, such as `guidance_scale`, `height`, `width`.

    Returns:
        A copy of `stats` with `calibration`. For each step count it has `sigma` (None: skip nothing) and the
            mean squared errors of the full schedule and of each trial. It also has the level down to which
            the reference follows the Gaussian, and the number of model calls.

    Raises:
        ValueError: a step count below 2, another count or a tolerance out of range, an empty list of prompts, samples that do not match, a pipeline that takes neither prompts nor a
            batch size, or what `apply_teleport` refuses.
    """
    check_pipeline(pipe)
    counts = sorted(
        {num_inference_steps} if isinstance(num_inference_steps, int) else set(num_inference_steps)
    )
    if not counts or counts[0] < 2:
        raise ValueError(f"num_inference_steps must be 2 or more to skip any, got {num_inference_steps!r}.")
    check_counts(num_images=num_images, refinement=refinement)
    if prompts is not None:
        prompts = check_prompts(pipe, prompts)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a finite number of 0 or more, got {tolerance}.")
    original = pipe.scheduler
    # A stochastic solver has no reference trajectory.
    inner = same_grid_deterministic(original)
    run = _Runner(pipe, stats, prompts, num_images, mean_from, means, seed, call_kwargs)
    if samples is not None and tuple(samples.shape) != (run.size, *stats.shape):
        raise ValueError(
            f"samples have shape {tuple(samples.shape)}, expected {(run.size, *stats.shape)}: one"
            " sample of the statistics' shape per image."
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
        **{name: value for name, value in stats.calibration.items() if name == "score"},
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
            break  # errors grow with the distance skipped, so no later trial can qualify
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
        parameters = parameters_of(pipe)
        if self.prompts is None and "batch_size" not in parameters:
            raise ValueError(
                f"{type(pipe).__name__} takes no batch_size: give prompts."
                if "prompt" in parameters
                else f"{type(pipe).__name__} takes neither a prompt nor a batch_size, so its steps cannot be"
                " calibrated here. Give skip= or sigma= to apply_teleport."
            )
        defaults = {name: parameter.default for name, parameter in parameters.items()}
        call, guidance = {**defaults, **kwargs}, guidance_of(pipe)
        self.guidance_scale = guidance.weight(call)
        altered = guidance.altered(call)
        if mean_from == "stats" and self.guidance_scale != 1 and altered is not None:
            raise ValueError(
                "The calibration compares with the guided flow u + w(c − u), which"
                f' {type(pipe).__name__} does not follow. {altered} Or use mean_from="first_call".'
            )

    def __call__(self, num_inference_steps: int, skip: float = 0.0, sigma: float | None = None) -> np.ndarray:
        """Final states (B, ...) as float64, after skipping a fraction of the steps, or down to `sigma`."""
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
                states = final_latents(
                    self.pipe,
                    {
                        **first,
                        "num_inference_steps": num_inference_steps,
                        "generator": generators,
                        **self.kwargs,
                    },
                )
        finally:
            self.skipped_to = self.pipe.scheduler.skipped_to if on else None
            remove_teleport(self.pipe)
        return states.double().cpu().numpy()

    def trust(
        self, samples: Tensor | None, num_inference_steps: int
    ) -> tuple[float | None, list[list[float]]]:
        """`trusted_sigma` for the given samples, or for samples of the pipeline."""
        options = {"num_inference_steps": num_inference_steps, "seed": self.seed}
        plain = {**self.kwargs, **unguided(self.pipe), **options}
        if samples is None:
            # Other seeds than for noising them, because a sample depends on the noise it was generated from.
            other = {**plain, "seed": self.seed + self.size}
            drawn = pipeline_samples(
                self.pipe, self.size, batch_size=self.size, prompts=self.prompts, progress=False, **other
            )
            batch = next(drawn)
            samples = batch if isinstance(batch, Tensor) else batch[0]
        mean = self.means
        if mean is None and self.stats.prompt_map is not None and self.prompts is not None:
            mean = self.stats.prompt_mean(prompt_features(self.pipe, self.prompts, **self.kwargs))
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
        """Counts the calls of the denoisers."""
        handles = [model.register_forward_pre_hook(self._count) for model in denoisers_of(self.pipe)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, *_: Any) -> None:
        self.calls += 1


def _squared_error(states: np.ndarray, reference: np.ndarray) -> float:
    return float(np.mean((states - reference) ** 2))


# --- the level down to which the Gaussian denoises clean samples at least as well as the model ---
#
# Both denoise the same noised samples. The difference of their squared errors is the difference of their
# denoising losses, in which the unknown optimal loss cancels. It is measured in pairs, on the same noise.


@torch.no_grad()
def excess_loss(
    pipe: Any,
    stats: GaussianStats,
    clean: Tensor,
    index: int,
    *,
    mean: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    num_inference_steps: int = 50,
    seed: int = 0,
    **call_kwargs: Any,
) -> tuple[float, Tensor]:
    """How much worse than `pipe` the Gaussian denoises `clean` at step `index` of the grid.

    Args:
        pipe: a pipeline with a supported scheduler and without teleportation; it is not changed.
        stats: the Gaussian; `mean` (B, *stats.shape) replaces its mean if given.
        clean: (B, *stats.shape) samples in the scale of the denoiser.
        index: index of the step, 1 or more.
        prompts: one for each sample; None for a pipeline without prompts.
        num_inference_steps: number of steps of the grid.
        seed: the noise of image i has the seed `seed + i`.
        call_kwargs: passed to the pipeline. Use no guidance, because the loss is defined for unguided
            predictions only.

    Returns:
        The noise-to-signal ratio σ of the step, and (B,) float64: E‖D_G − x₀‖² − E‖D_θ − x₀‖² per dimension
            and σ². It is negative if the Gaussian is nearer to the clean samples.
    """
    count = len(clean)
    looked = denoise_at(
        pipe,
        stats,
        index,
        lambda noise, level: level[0] * repeated(clean, noise) + level[1] * noise,
        rows={"batch_size": count} if prompts is None else {"prompt": list(prompts)},
        seeds=range(seed, seed + count),
        num_inference_steps=num_inference_steps,
        **call_kwargs,
    )
    gaussian = stats.denoise(looked.noisy, looked.level, None if mean is None else mean.to(looked.noisy))
    truth = clean.to(looked.noisy)
    worse = (gaussian - truth).square() - (looked.clean - truth).square()
    sigma = noise_to_signal(looked.level)
    return sigma, worse.flatten(1).double().mean(1).cpu() / sigma**2


def trusted_sigma(
    pipe: Any,
    stats: GaussianStats,
    clean: Tensor,
    *,
    mean: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    guidance_scale: float = 1.0,
    call: dict[str, Any],
) -> tuple[float | None, list[list[float]]]:
    """The lowest σ down to which the Gaussian is no worse than the model, by a margin of two standard errors.

    The arguments are those of `excess_loss`. `call` contains its keyword arguments, including
    `num_inference_steps`, and `guidance_scale` is that of the transport. With guidance, the excess losses of
    the conditional and the unconditional Gaussian are weighted by the squares of their weights in D_w = w·D_c
    + (1 − w)·D_u.

    Returns:
        σ, or None if there is no such level, and [σ, mean excess, standard error] for each level tested.
    """
    found, looked = None, []
    count = call["num_inference_steps"]
    for index in range(1, count, max(1, count // 20)):
        sigma, excess = excess_loss(pipe, stats, clean, index, mean=mean, prompts=prompts, **call)
        if guidance_scale != 1:
            every, empty = stats.unconditional or stats, [""] * len(clean)
            other = excess_loss(pipe, every, clean, index, prompts=empty, **call)[1]
            excess = guidance_scale**2 * excess + (guidance_scale - 1) ** 2 * other
        error = float(excess.std() / len(excess) ** 0.5)
        looked.append([sigma, float(excess.mean()), error])
        if not float(excess.mean()) + 2 * error <= 0:
            break
        found = sigma
    return found, looked
