"""The means of prompts: predicted from embeddings, or read from one denoiser call at the highest noise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_counts
from ..core.families import guidance_of
from ..core.features import encoding_options, features_of
from ..core.hooks import parameters_of
from ..core.pipeline import call_pipeline, quiet, scheduler_of
from ..core.prompts import prompt_embeddings
from ..core.schedules import scheduler_prediction
from .apply import check_pipeline, telling_layout
from .gaussian import GaussianStats
from .probe import OneCall
from .prompt_map import PromptMap
from .scheduler import TeleportScheduler
from .sources import check_prompts


def fit_prompt_map(
    pipe: Any, stats: GaussianStats, rank: int = 256, batch_size: int = 64, **call_kwargs: Any
) -> GaussianStats:
    """Adds a prompt map to `stats`, which predicts the mean of every prompt that `pipe` can encode.

    Neither fitting nor using the map costs a denoiser call.

    Args:
        pipe: a text-to-image pipeline with `encode_prompt`.
        stats: statistics fitted to pairs (samples, prompts); the map is fitted to their `class_means`. Many
            different prompts matter more than many samples per prompt.
        rank: number of principal directions of the prompts' embeddings, ≥ 1.
        batch_size: prompts encoded together.
        call_kwargs: passed to the pipeline. Give those that act on the encoding of prompts and that the calls
            will have too, such as `clip_skip` and `max_sequence_length`: calls that encode their prompts in another
            way are refused.

    Returns:
        A copy of `stats` with `prompt_map`. Its `score` is the R² of the prompts' means, where each is
        predicted from the other prompts; 1 is perfect.

    Raises:
        ValueError: statistics without class means, a pipeline without `encode_prompt`, or prompts whose
            embeddings do not predict their means.
    """
    if stats.class_means is None or stats.class_names is None:
        raise ValueError(
            "A prompt map is fitted to class means: fit the statistics to pairs (tensor, prompts)."
        )
    names = stats.class_names
    counts = torch.tensor(stats.class_counts or [1] * len(names))
    parts, options = [], {}
    for i in range(0, len(names), batch_size):
        embeds = prompt_embeddings(pipe, names[i : i + batch_size], **call_kwargs)
        parts.append(features_of(pipe, embeds).cpu())
        options |= encoding_options(pipe, embeds, call_kwargs)
    found = PromptMap.fit(torch.cat(parts), stats.class_means.flatten(1), counts, rank)
    found = dataclasses.replace(found, options=json.loads(json.dumps(options, default=str)))
    return dataclasses.replace(stats, prompt_map=found)


def prompt_features(pipe: Any, prompts: Sequence[str], **call: Any) -> Tensor:
    """The embeddings of `prompts` in a call with these arguments, as (B, E); see `features_of`."""
    return features_of(pipe, prompt_embeddings(pipe, prompts, **call))


def unguided(pipe: Any) -> dict[str, Any]:
    """Arguments of a call whose predictions are those for the prompt alone."""
    perturbed = {"pag_scale": 0.0} if "pag_scale" in parameters_of(pipe) else {}
    return guidance_of(pipe).call(1.0) | perturbed


class _FirstCall(OneCall):
    """Computes the implied mean from a call at the highest noise level."""

    found: Tensor

    def _look(self, model_output: Tensor, sample: Tensor) -> Tensor:
        clean = scheduler_prediction(self.inner, model_output, sample, self._levels[0])
        self.found = self.stats.implied_mean(self._grid(sample.float()), self._grid(clean), self._levels[0])
        return clean


@torch.no_grad()
def prompt_means(
    pipe: Any,
    stats: GaussianStats,
    prompts: str | Sequence[str],
    *,
    num_calls: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    **call_kwargs: Any,
) -> Tensor:
    """The mean that the denoiser itself implies for each prompt, from one call at the highest noise level.

    The Gaussian denoiser D = μ + aΣ(a²Σ + s²I)⁻¹(x − aμ) is solved for μ, with the model's x0-prediction as D
    (`GaussianStats.implied_mean`). The calls use no guidance, so that the mean is that of the prompt's own
    distribution; pass `guidance_scale=` for the guided one. This is our addition; arXiv:2412.09726 has no
    conditional case.

    Args:
        pipe: a text-to-image pipeline with a supported scheduler, or a `TeleportScheduler` around one. Its
            scheduler is restored, also after an error.
        stats: statistics whose covariance is used: the within-prompt one, as from `pipeline_samples` with
            prompts.
        prompts: B texts, or one.
        num_calls: number of calls to average, ≥ 1, each with its own noise.
        seed: seed of the noise, which is the same for every prompt, so that a prompt's mean does not depend
            on the other prompts.
        batch_size: prompts per call, ≥ 1.
        call_kwargs: passed to the pipeline, such as `height`, `width` and `num_inference_steps` (with
            "leading" timestep spacing, more steps start at higher noise).

    Returns:
        (B, *stats.shape) float32 on the CPU, for `TeleportScheduler.set_mean`.

    Raises:
        ValueError: no prompts, a count below 1, a pipeline without prompts or one that teleportation does not work
            on, or latents of another shape than the statistics.
    """
    check_pipeline(pipe)
    prompts = check_prompts(pipe, prompts)
    check_counts(num_calls=num_calls, batch_size=batch_size)
    call = unguided(pipe) | call_kwargs
    original = pipe.scheduler
    inner = original.inner if isinstance(original, TeleportScheduler) else original
    probe = _FirstCall(inner, stats, skip=0.0)
    total = torch.zeros(len(prompts), *stats.shape)
    with scheduler_of(pipe, probe), telling_layout(pipe), quiet(pipe):
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            for number in range(num_calls):
                noise = [torch.Generator().manual_seed(seed + number) for _ in chunk]
                call_pipeline(pipe, prompt=chunk, generator=noise, output_type="latent", **call)
                total[start : start + len(chunk)] += probe.found.float().cpu()
    return total / num_calls
