"""One call of a pipeline's denoiser, at a noise level and with states of our choice.

A probe replaces the scheduler of a pipeline for one call. The pipeline itself encodes the prompts, scales and packs the
latents and calls its denoiser, so a probe works on every pipeline that teleportation works on.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from ..core.pipeline import call_pipeline, quiet, scheduler_of
from ..core.predictions import Level
from ..core.schedules import scheduler_prediction
from .apply import apply_teleport, remove_teleport, telling_layout
from .gaussian import GaussianStats
from .proxy import Delegated
from .scheduler import TeleportScheduler
from .skipping import max_skip

# The state (rows, *shape) that the denoiser is shown at a level, given unit-variance noise of that shape.
State = Callable[[Tensor, Level], Tensor]


def repeated(rows: Tensor, like: Tensor) -> Tensor:
    """`rows` on the device and in the data type of the batch `like`, as often as guidance has repeated it."""
    return rows.to(like).repeat(len(like) // len(rows), *[1] * (like.ndim - 1))


def only_shape(shape: tuple[int, ...]) -> GaussianStats:
    """Statistics of which only the shape means something, for `denoise_at`."""
    none = torch.zeros(math.prod(shape), 0)
    return GaussianStats(torch.zeros(shape), none, none[0], 0.0, 0)


class OneCall(TeleportScheduler):
    """A scheduler that makes one model call only. `_look` reads its prediction and returns the result."""

    def _one_step(self, *args: Any, **kwargs: Any) -> None:
        self._set_timesteps(*args, **kwargs)
        self._shown = self.timesteps[:1]
        self._begin_at(self._offset)

    def _read(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        clean = self._look(model_output, sample).to(sample.dtype)
        call = inspect.signature(self.inner.step).bind(model_output, timestep, sample, *args, **kwargs)
        if call.arguments.get("return_dict", True):
            return DDIMSchedulerOutput(prev_sample=clean, pred_original_sample=clean)
        return clean, clean

    def _look(self, model_output: Tensor, sample: Tensor) -> Tensor:
        raise NotImplementedError

    set_timesteps = Delegated(_one_step)
    step = Delegated(_read)


class Denoised(NamedTuple):
    """What the denoiser was shown and what it predicts, each (rows, *shape) float32, at `level`."""

    level: Level
    noisy: Tensor
    clean: Tensor


class _Shown(OneCall):
    """Replaces the pipeline's noise with a state at step `index` of the grid, and records the prediction for it."""

    state: State
    index: int
    clip: bool
    found: Denoised

    def __init__(self, scheduler: Any, stats: GaussianStats, state: State, index: int, clip: bool) -> None:
        super().__init__(scheduler, dataclasses.replace(stats, prompt_map=None), skip=0.0)
        self.state, self.index, self.clip = state, index, clip

    def _steps_to_skip(self) -> int:
        return min(self.index, max_skip(self.inner, len(self._levels)))

    def _transport(self, sample: Tensor, mean: Tensor | None) -> Tensor:
        noise = self._grid(sample).float() / float(getattr(self.inner, "init_noise_sigma", 1.0))
        return self._looped(self.state(noise, self._levels[self._skipped])).to(sample.dtype)

    def _look(self, model_output: Tensor, sample: Tensor) -> Tensor:
        sample, level = self._first_sample(sample), self._levels[self._skipped]
        clean = scheduler_prediction(self.inner, model_output, sample, level, clip=self.clip)
        self.found = Denoised(level, self._grid(sample).float(), self._grid(clean).float())
        return clean


@torch.no_grad()
def denoise_at(
    pipe: Any,
    stats: GaussianStats,
    index: int,
    state: State,
    *,
    rows: Mapping[str, Any],
    seeds: Sequence[int],
    num_inference_steps: int,
    clip: bool = True,
    **call_kwargs: Any,
) -> Denoised:
    """Shows the denoiser of `pipe` a state at step `index` of its grid.

    Args:
        pipe: a pipeline with a supported scheduler and without teleportation; it is not changed.
        stats: only their shape is used.
        index: index of the step, 1 or more. The last step that can be shown is used for a larger one.
        state: see `State`. Guidance may repeat the batch, so that there are several times as many rows.
        rows: the argument of the call that says how many rows there are, a list of prompts or a batch size.
        seeds: of the noise, one for each row.
        num_inference_steps: number of steps of the grid.
        clip: clip or threshold the prediction as the config of the scheduler says.
        call_kwargs: passed to the pipeline.
    """
    original = pipe.scheduler
    probe = _Shown(original, stats, state, index, clip)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        pipe.scheduler = probe
        apply_teleport(pipe)
        with quiet(pipe):
            call_pipeline(
                pipe,
                **rows,
                num_inference_steps=num_inference_steps,
                generator=generators,
                output_type="np" if getattr(pipe, "vae", None) is None else "latent",
                **call_kwargs,
            )
    finally:
        remove_teleport(pipe)
        pipe.scheduler = original
    return probe.found


class _Grid(OneCall):
    """Records the shape of one sample and the levels of the grid."""

    found: tuple[tuple[int, ...], list[Level]]

    def _look(self, model_output: Tensor, sample: Tensor) -> Tensor:
        count = max_skip(self.inner, len(self._levels))
        self.found = self._latent_shape or tuple(sample.shape[1:]), self._levels[: count + 1]
        return sample


@torch.no_grad()
def grid_of(pipe: Any, call: Mapping[str, Any]) -> tuple[tuple[int, ...], list[Level]]:
    """The shape of one sample in the grid layout, and the levels at which `denoise_at` can look; costs one call.

    The levels depend on the size of the sample where a pipeline shifts them by it.
    """
    probe = _Grid(pipe.scheduler, only_shape((1,)), skip=0.0)
    with scheduler_of(pipe, probe), telling_layout(pipe), quiet(pipe):
        output = "np" if getattr(pipe, "vae", None) is None else "latent"
        call_pipeline(pipe, generator=torch.Generator().manual_seed(0), output_type=output, **call)
    return probe.found
