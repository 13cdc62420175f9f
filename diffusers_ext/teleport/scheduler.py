"""`TeleportScheduler`: any supported diffusers scheduler without its first k steps.

At high noise the learned score is that of a Gaussian, whose probability-flow ODE has a closed form (Wang and
Vastola, TMLR 2024, arXiv:2412.09726). The first k steps of the solver are replaced with this closed form,
applied to the initial noise, and the wrapped scheduler runs the rest of *its own full* grid. Slicing the grid
instead would change `init_noise_sigma`, the order lists of the singlestep solver and the final-step rules.

Our additions, in neither the paper nor its code: a mean for each prompt (`set_mean`), and a mean computed
from the first guided model call (`mean_from="first_call"`).
"""

import inspect
import math
import threading
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from ..core import families
from ..core.predictions import Level, noise_to_signal
from ..core.schedules import grid_levels, is_pndm, scaling, scheduler_prediction
from .gaussian import GaussianStats
from .proxy import Delegated, SchedulerProxy
from .skipping import check_reach, max_skip, restart_pndm, steps_to_sigma


class TeleportScheduler(SchedulerProxy):
    """Wraps `scheduler` and replaces its first steps with the closed form of a Gaussian.

    Args:
        scheduler: a supported diffusers scheduler (`diffusers_ext.core.schedules.SUPPORTED`). It is not
            copied; `inner` returns it.
        stats: statistics of the latents that the denoiser was trained on, fitted to (C, H, W) latents or, for
            Flux, also to packed (tokens, 4C) ones.
        skip: fraction of the steps to skip, in [0, 1), or `"auto"` to skip down to
            `stats.calibration["sigma"]`.
        sigma: instead of `skip`, skip to the last grid point with a noise-to-signal ratio s/a ≥ `sigma` (>
            0).
        mean_from: with `"stats"` the transport precedes the first model call and uses the mean of `stats` or
            of `set_mean`. With `"first_call"` the first model call is made at full noise, the mean that its
            guided x0-prediction implies replaces that of `stats`, and the transport follows. This costs one
            call, and adapts to the prompt with any pipeline.

    At least one step of the wrapped scheduler always remains. If there is nothing to skip (or only a single
    step in `"first_call"` mode, which would save nothing), every call goes to the wrapped scheduler
    unchanged.

    All other attributes are those of the wrapped scheduler, also when they are set. While steps are skipped,
    `timesteps`, `sigmas`, `step_index`, `begin_index` and `index_for_timestep` refer to the remaining grid.
    `timesteps` and `sigmas` may then be moved to another device or dtype, and setting other values is an error.

    Raises:
        ValueError: an unsupported or already wrapped scheduler, a `skip`, `sigma` or `mean_from` out of
            range, or `skip="auto"` with uncalibrated `stats`.
    """

    # The instance attributes that are not the wrapped scheduler's.
    _mean: torch.Tensor | None
    _guidance_scale: float
    _known_levels: list[Level] | None
    _skipped: int
    _offset: int
    _shown: torch.Tensor | None
    _waiting: bool
    _input_scaled: bool
    _input_mapped: bool
    _disarmed: bool
    _thread: int | None
    _cache: tuple[torch.Tensor, torch.Tensor] | None

    def __init__(
        self,
        scheduler: Any,
        stats: GaussianStats,
        skip: float | str = "auto",
        sigma: float | None = None,
        mean_from: str = "stats",
    ):
        if isinstance(scheduler, TeleportScheduler):
            raise ValueError(
                "This scheduler is a TeleportScheduler already. Wrap its inner scheduler: "
                "TeleportScheduler.from_scheduler(scheduler.inner, stats, ...)."
            )
        scaling(scheduler)
        if not isinstance(stats, GaussianStats):
            raise ValueError(f"stats must be a GaussianStats, not {type(stats).__name__}.")
        if mean_from not in ("stats", "first_call"):
            raise ValueError(f'mean_from must be "stats" or "first_call", not {mean_from!r}.')
        check_reach(skip, sigma, stats)
        self.inner = scheduler
        self.stats = stats
        self.skip = skip
        self.sigma = sigma
        self.mean_from = mean_from
        self._mean = None
        self._guidance_scale = 1.0
        self._forget_schedule()

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        stats: GaussianStats,
        skip: float | str = "auto",
        *,
        sigma: float | None = None,
        mean_from: str = "stats",
    ) -> "TeleportScheduler":
        """`pipe.scheduler = TeleportScheduler.from_scheduler(pipe.scheduler, stats)`; see the class."""
        return cls(scheduler, stats, skip, sigma, mean_from)

    # -- the schedule

    def _forget_schedule(self) -> None:
        self._known_levels = None
        self._thread = None  # the one that runs the pipeline
        self._skipped = 0  # outer steps that the transport replaces
        self._offset = 0  # entries that the exposed grid lacks at its start
        self._shown = None  # the exposed timesteps, if they are not the wrapped scheduler's
        self._forget_start()

    def _forget_start(self) -> None:
        self._waiting = False  # the first step has not been taken yet
        self._input_scaled = False  # the first model input was mapped by scale_model_input
        self._input_mapped = False  # ... or by a hook on the denoiser
        self._disarmed = False  # the hook was called by another pipeline
        self._cache = None  # the initial noise and its transport

    def _wrapped_changed(self) -> None:
        self._known_levels = None

    @property
    def _levels(self) -> list[Level]:
        # Computed when needed: with nothing to skip, a grid without known levels must work too.
        if self._known_levels is None:
            self._known_levels = grid_levels(self.inner)
        return self._known_levels

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        inner = self.inner
        inner.set_timesteps(*args, **kwargs)
        self._forget_schedule()
        skipped = self._steps_to_skip()
        if skipped <= (1 if self.mean_from == "first_call" else 0):
            return
        self._skipped, self._waiting, self._thread = skipped, True, threading.get_ident()
        first = inner.timesteps[:1]
        if is_pndm(inner):
            restart_pndm(inner, skipped)
        else:
            self._offset = skipped * inner.order
        kept = inner.timesteps[self._offset :]
        self._shown = torch.cat([first, kept]) if self.mean_from == "first_call" else kept
        if self.mean_from == "first_call":
            if hasattr(inner, "sigmas"):
                # `sigmas` is a view of the wrapped ones, so that writing its elements has an effect.
                inner.sigmas[self._offset - 1] = inner.sigmas[0]
            self._begin_at(0)
        else:
            self._begin_at(self._offset)

    def _steps_to_skip(self) -> int:
        if self.sigma is None and self.skip == 0:
            return 0
        count = len(self._levels)
        sigma = self.sigma
        if sigma is None and self.skip == "auto":
            sigma = self._calibrated_sigma(count)
            if sigma is None:
                return 0
        if sigma is None:
            wanted = math.floor(float(self.skip) * count + 1e-9)
        else:
            wanted = steps_to_sigma(self._levels, sigma)
        return max(min(wanted, max_skip(self.inner, count)), 0)

    def _calibrated_sigma(self, count: int) -> float | None:
        """The result of `calibrate_skip` for the smallest calibrated step count that is not below `count`."""
        sigma = self.stats.calibration["sigma"]
        if not isinstance(sigma, dict):
            return sigma
        fitting = [n for n in map(int, sigma) if n >= count]
        # Above the largest calibrated count the solver's error is smaller than all that were compared.
        return sigma[str(min(fitting))] if fitting else None

    def _begin_at(self, index: int) -> None:
        # DDIM, DDPM and PNDM find their position by timestep or by counting calls; others need the index.
        if hasattr(self.inner, "set_begin_index"):
            self.inner._step_index = None
            self.inner.set_begin_index(index)

    def _set_begin_index(self, begin_index: int = 0) -> None:
        if self._skipped == 0:
            self.inner.set_begin_index(begin_index)
        elif begin_index != 0:
            raise ValueError(
                f"The pipeline starts at step {begin_index} of the schedule, from a noised image. "
                "Teleportation starts from pure noise: use it with text-to-image or unconditional pipelines, "
                "or restore the wrapped scheduler (dx.remove_teleport(pipe) or pipe.scheduler.inner)."
            )

    def _index_for_timestep(self, timestep: Any, schedule_timesteps: torch.Tensor | None = None) -> int:
        if schedule_timesteps is None and self._skipped:
            schedule_timesteps = self.timesteps
        return self.inner.index_for_timestep(timestep, schedule_timesteps)

    set_timesteps = Delegated(_set_timesteps)
    set_begin_index = Delegated(_set_begin_index)
    index_for_timestep = Delegated(_index_for_timestep)

    @property
    def timesteps(self) -> torch.Tensor:
        """The timesteps that the pipeline iterates over: the grid without its skipped part."""
        return self.inner.timesteps if self._shown is None else self._shown

    @timesteps.setter
    def timesteps(self, timesteps: torch.Tensor) -> None:
        self._set_grid("timesteps", timesteps)
        if self._skipped:
            self._shown = timesteps

    @property
    def sigmas(self) -> torch.Tensor:
        """The wrapped σ grid cut like `timesteps`; AttributeError if the wrapped scheduler has none."""
        return self.inner.sigmas[self._first_shown :] if self._skipped else self.inner.sigmas

    @sigmas.setter
    def sigmas(self, sigmas: torch.Tensor) -> None:
        self._set_grid("sigmas", sigmas)

    def _set_grid(self, name: str, values: torch.Tensor) -> None:
        if self._skipped:
            shown = getattr(self, name)
            if values.shape != shown.shape or not torch.equal(values, shown.to(values)):
                raise ValueError(
                    f"{name} was set to other values while {self._skipped} steps are skipped, which would no longer"
                    " fit the skipped part. Give the schedule to set_timesteps(timesteps=... or sigmas=...), or set"
                    f" {name} on the wrapped scheduler (dx.remove_teleport(pipe) or pipe.scheduler.inner)."
                )
            values = getattr(self.inner, name).to(values)
        setattr(self.inner, name, values)

    @property
    def _first_shown(self) -> int:
        """Index in the wrapped grid of the entry that is exposed as the first."""
        return self._offset - (1 if self._skipped and self.mean_from == "first_call" else 0)

    @property
    def step_index(self) -> int | None:
        """Position in the exposed grid, so that `sigmas[step_index]` is the current σ."""
        return self._shown_index(self.inner.step_index)

    @property
    def _step_index(self) -> int | None:
        return self._shown_index(self.inner._step_index)

    @_step_index.setter
    def _step_index(self, index: int | None) -> None:
        # CosmosTextToWorldPipeline repeats every step: one for the x0-prediction, one after guidance.
        if not self._skipped or index is None:
            self.inner._step_index = index
        elif index == 0:
            self._waiting = True
            self._input_scaled = self._input_mapped = self._cache is not None
            self.inner._step_index = 0 if self.mean_from == "first_call" else self._offset
        else:
            self.inner._step_index = index + self._first_shown

    @property
    def begin_index(self) -> int | None:
        """The first index of the exposed grid, as in the wrapped scheduler."""
        return self._shown_index(self.inner.begin_index)

    @property
    def _begin_index(self) -> int | None:
        return self._shown_index(self.inner._begin_index)

    @_begin_index.setter
    def _begin_index(self, index: int | None) -> None:
        if self._skipped:
            self._set_begin_index(index or 0)
        else:
            self.inner._begin_index = index

    def _shown_index(self, index: int | None) -> int | None:
        at_start = self._waiting and self.mean_from == "first_call"
        return index if index is None or at_start else index - self._first_shown

    @property
    def num_skipped_steps(self) -> int:
        """Outer steps that the current schedule saves; `first_call` uses up one of them."""
        return self._skipped - (1 if self._skipped and self.mean_from == "first_call" else 0)

    @property
    def skipped_to(self) -> float | None:
        """σ = s/a where the wrapped scheduler takes over; None if nothing is skipped."""
        return noise_to_signal(self._levels[self._skipped]) if self._skipped else None

    # -- the transport

    def set_mean(self, mean: torch.Tensor | None, guidance_scale: float = 1.0) -> None:
        """Uses `mean` in place of the mean of `stats` until it is changed; None restores that of `stats`.

        Args:
            mean: (*shape), or (B, *shape) with one mean for every image of the batch, float, in x0 units.
            guidance_scale: the pipeline's guidance scale, for a transport along the guided flow
                (`guided_transport`). It needs within-prompt statistics with an `unconditional` part. 1 is a
                transport without guidance.

        Raises:
            ValueError: a mean of another shape or with NaN, or guidance without `stats.unconditional`.
        """
        if guidance_scale != 1 and self.stats.unconditional is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs statistics with an unconditional part: fit them to pairs"
                " (tensor, prompts), or use guidance_scale=1 for a transport without guidance."
            )
        self._guidance_scale = float(guidance_scale)
        self._cache = None
        if mean is None:
            self._mean = None
            return
        shape = tuple(self.stats.shape)
        if families.is_packed(mean.shape[-2:], shape) and mean.ndim in (2, 3):
            mean = families.unpack(mean.reshape(-1, *mean.shape[-2:]), shape).reshape(
                *mean.shape[:-2], *shape
            )
        if tuple(mean.shape) != shape and tuple(mean.shape[1:]) != shape:
            raise ValueError(
                f"The mean has shape {tuple(mean.shape)}; expected {shape} or (batch, *{shape})."
            )
        if not torch.isfinite(mean).all():
            raise ValueError("The mean contains NaN or infinite values.")
        self._mean = mean

    def _transport(self, sample: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
        """The closed form from the first grid level to the one where the wrapped scheduler takes over."""
        start, end = self._levels[0], self._levels[self._skipped]
        moved = self.stats.transport(
            self._rows(sample), start, end, mean=mean, guidance_scale=self._guidance_scale
        )
        if sample.shape[1:] != moved.shape[1:]:
            moved = families.pack(moved)
        return moved.to(sample.dtype)

    def _rows(self, sample: torch.Tensor) -> torch.Tensor:
        """`sample` as (B, *stats.shape); ValueError if its rows have another shape."""
        shape = tuple(self.stats.shape)
        if tuple(sample.shape[1:]) == shape:
            return sample
        if families.is_packed(sample.shape[1:], shape):
            return families.unpack(sample, shape)
        raise ValueError(
            f"The latents have shape {tuple(sample.shape[1:])}, the statistics were fitted on {shape}. "
            "Generate at the size of the statistics, or fit them at this one (GaussianStats.fit)."
        )

    def _mapped(self, sample: torch.Tensor) -> torch.Tensor:
        """`sample` (the batch, possibly repeated for guidance), transported to the solver's first level."""
        if self._cache is not None:
            before, after = self._cache
            rows = len(sample)
            same = (
                before.shape[1:] == sample.shape[1:] and before.dtype == sample.dtype and rows <= len(before)
            )
            if same and torch.equal(before[:rows], sample):
                return after[:rows]
        mean = self._mean
        if mean is None and self.stats.prompt_map is not None:
            raise ValueError(
                "The statistics have one mean for each prompt, and none was set. Add teleportation with"
                " dx.apply_teleport(pipe, stats) (or dx.apply_teleport(pipe) after loading), which reads the prompt,"
                " or set a mean with scheduler.set_mean."
            )
        if mean is not None:
            mean = mean.to(sample.device)
            if mean.ndim > len(self.stats.shape):
                # Guidance repeats the batch as a whole: rows 0..B−1, then rows 0..B−1 again.
                if len(sample) % len(mean):
                    raise ValueError(
                        f"set_mean was given {len(mean)} means for a batch of {len(sample)} rows."
                    )
                mean = mean.repeat(len(sample) // len(mean), *[1] * (mean.ndim - 1))
        moved = self._transport(sample, mean)
        self._cache = (sample.clone(), moved)
        return moved

    def map_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        """The model input that replaces `sample`, for pipelines that do not call `scale_model_input`.

        The hook of `apply_teleport` calls it. It returns `sample` unchanged after the first step, and at
        other timesteps than the first one of this schedule: such calls come from a second pipeline that
        shares the denoiser.
        """
        if not self._waiting or self._input_scaled or self.mean_from != "stats":
            return sample
        if self._thread != threading.get_ident():
            return sample  # a pipeline in another thread shares the denoiser
        if self._disarmed or not _same_time(timestep, float(self.timesteps[0])):
            # Our run was interrupted before its first step, and another pipeline that shares the denoiser is
            # running. It will also reach our first timestep, so the hook is disarmed. If our run is not over,
            # `step` raises an error.
            self._disarmed, self._input_mapped = True, False
            return sample
        self._input_mapped = True
        return self._mapped(sample)

    def _scale_model_input(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._waiting and self.mean_from == "stats":
            self._input_scaled = True
            sample = self._mapped(sample)
        return self.inner.scale_model_input(sample, *args, **kwargs)

    def _step(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if self._waiting and self.mean_from == "first_call":
            return self._step_from_first_call(model_output, timestep, sample, *args, **kwargs)
        if self._waiting:
            sample = self._first_sample(sample)
        else:
            self._cache = None
        if self._skipped and isinstance(self.inner, diffusers.LMSDiscreteScheduler):
            # LMS takes its order from the step index, which includes the skipped steps without derivatives.
            call = inspect.signature(self.inner.step).bind(model_output, timestep, sample, *args, **kwargs)
            call.apply_defaults()
            call.arguments["order"] = min(call.arguments["order"], len(self.inner.derivatives) + 1)
            return self.inner.step(*call.args, **call.kwargs)
        return self.inner.step(model_output, timestep, sample, *args, **kwargs)

    def _first_sample(self, sample: torch.Tensor) -> torch.Tensor:
        if not (self._input_scaled or self._input_mapped):
            raise ValueError(
                "The first model call got the initial noise at the timestep of a later step, because this "
                "pipeline never calls scale_model_input. Use dx.apply_teleport(pipe, stats, ...) (or "
                "dx.apply_teleport(pipe) if pipe.scheduler is a TeleportScheduler already), which adds a "
                'hook on its denoiser, or mean_from="first_call", which needs none.'
            )
        shown = self._cache[0] if self._cache else sample
        count = min(len(shown), len(sample))  # guidance may repeat the images in either place
        if self._mean is not None and self._mean.ndim == sample.ndim and len(self._mean) != count:
            raise ValueError(f"set_mean was given {len(self._mean)} means for {count} images.")
        repeated = shown[:count].repeat(len(sample) // count, *[1] * (shown.ndim - 1))
        if not torch.equal(repeated, sample.to(shown.dtype)):
            raise ValueError(
                "The first model call got other latents than step, so the transport would apply to only one of "
                'them. Use mean_from="first_call" with this pipeline.'
            )
        sample = self._mapped(sample)
        self._waiting = False
        return sample

    def _step_from_first_call(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        call = inspect.signature(self.inner.step).bind(model_output, timestep, sample, *args, **kwargs)
        clean = call.arguments.get("pred_original_sample")
        if clean is None:
            clean = scheduler_prediction(self.inner, model_output, sample, self._levels[0])
        mean = self.stats.implied_mean(self._rows(sample.float()), self._rows(clean), self._levels[0])
        moved = self._transport(sample, mean)
        clean = clean.to(sample.dtype)
        self._forget_start()
        self._begin_at(self._offset)
        if hasattr(self.inner, "set_begin_index"):
            self.inner._step_index = self._offset
        if call.arguments.get("return_dict", True):
            return DDIMSchedulerOutput(prev_sample=moved, pred_original_sample=clean)
        return moved, clean

    def _refuse_noised_start(self, name: str, *args: Any, **kwargs: Any) -> Any:
        # Inpainting also adds noise to its image after every step, when the transport is already done.
        if self._waiting:
            raise ValueError(
                f"The pipeline calls {name} before the first step: it starts from a noised image, and "
                "teleportation starts from pure noise. Restore the wrapped scheduler for image-to-image "
                "(dx.remove_teleport(pipe) or pipe.scheduler.inner)."
            )
        return getattr(self.inner, name)(*args, **kwargs)

    def _add_noise(self, *args: Any, **kwargs: Any) -> Any:
        return self._refuse_noised_start("add_noise", *args, **kwargs)

    def _scale_noise(self, *args: Any, **kwargs: Any) -> Any:
        return self._refuse_noised_start("scale_noise", *args, **kwargs)

    scale_model_input = Delegated(_scale_model_input)
    step = Delegated(_step)
    add_noise = Delegated(_add_noise)
    scale_noise = Delegated(_scale_noise)


def _same_time(timestep: Any, expected: float) -> bool:
    """Whether a denoiser's `timestep` argument is `expected`, also in thousandths or rounded to bfloat16."""
    if timestep is None:
        return False
    value = float(timestep.reshape(-1)[0]) if isinstance(timestep, torch.Tensor) else float(timestep)
    return any(abs(value * unit - expected) <= abs(expected) / 128 + 1e-6 for unit in (1, 1000))
