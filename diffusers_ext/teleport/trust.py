"""Down to which noise level a Gaussian denoises clean samples at least as well as the model does.

Both are asked for the clean sample in noised ones. The difference of their squared errors is the model's own
denoising loss less the Gaussian's, whatever the unknown optimum is; it is measured pairwise, on the same noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import packing
from ..pipeline_hooks import quiet
from . import levels
from .gaussian import GaussianStats
from .inject import apply_teleport, remove_teleport
from .prompt_mean import OneCall


class _Probe(OneCall):
    """One model call on noised clean samples, in place of what the map makes of the pipeline's noise."""

    level: levels.Level
    noisy: Tensor
    denoised: Tensor

    def __init__(self, scheduler: Any, stats: GaussianStats, clean: Tensor, index: int) -> None:
        super().__init__(scheduler, dataclasses.replace(stats, prompt_map=None), skip=0.0)
        self.clean, self.index = self._rows(clean), index

    def _steps_to_skip(self) -> int:
        return min(self.index, levels.max_skip(self.inner, len(self._levels)))

    def _transport(self, sample: Tensor, mean: Tensor | None) -> Tensor:
        self.level = a, s = self._levels[self._skipped]
        noise = self._rows(sample).float() / float(getattr(self.inner, "init_noise_sigma", 1.0))
        noised = a * self.clean.to(noise.device) + s * noise
        if sample.shape[1:] != noised.shape[1:]:
            noised = packing.pack(noised)
        return noised.to(sample.dtype)

    def _look(self, model_output: Tensor, sample: Tensor) -> Tensor:
        sample = self._first_sample(sample)
        clean = levels.predicted_clean(self.inner, model_output, sample, self.level)
        self.noisy, self.denoised = self._rows(sample).float(), self._rows(clean).float()
        return clean


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
        pipe: a pipeline with a supported scheduler, without teleportation; it is left as it was found.
        stats: the Gaussian, its mean replaced by `mean` (B, *shape) where given.
        clean: (B, *shape) samples in the scale of the denoiser, or packed as it keeps them.
        index: from 1 up.
        prompts: one for each sample; None for a pipeline without prompts.
        num_inference_steps: of the grid.
        seed: image i is noised from `seed + i`.
        call_kwargs: passed to the pipeline. Leave guidance off: a guided denoiser has no clean samples.

    Returns:
        The noise-to-signal ratio σ there, and (B,) float64, E‖D_G − x₀‖² − E‖D_θ − x₀‖² per dimension and σ².
        Negative where the Gaussian is nearer.
    """
    original, count = pipe.scheduler, len(clean)
    probe = _Probe(original, stats, clean, index)
    first: dict[str, Any] = {"batch_size": count} if prompts is None else {"prompt": list(prompts)}
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    try:
        pipe.scheduler = probe
        apply_teleport(pipe)
        with quiet(pipe):
            pipe(
                **first,
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="np" if getattr(pipe, "vae", None) is None else "latent",
                **call_kwargs,
            )
    finally:
        remove_teleport(pipe)
        pipe.scheduler = original
    noisy, model = probe.noisy, probe.denoised
    gaussian = stats.denoise(noisy, probe.level, None if mean is None else mean.to(noisy))
    truth = probe.clean.to(noisy)
    worse = (gaussian - truth).square() - (model - truth).square()
    sigma = levels.noise_to_signal(probe.level)
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
    """The lowest σ down to which the Gaussian is, two standard errors off, no worse than the model.

    Arguments as in `excess_loss`; `call` holds its further ones, `num_inference_steps` among them, and
    `guidance_scale` is the map's. Under guidance the conditional and the unconditional Gaussian enter with the
    squares of their weights in D_w = w·D_c + (1 − w)·D_u.

    Returns:
        σ, or None if there is no such level, and for each level looked at [σ, mean excess, standard error].
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
