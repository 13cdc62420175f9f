"""`TeleportScheduler`: any supported diffusers scheduler without its first k steps.

At high noise the learned score is that of a Gaussian, whose probability-flow ODE has a closed form (Wang and
Vastola, TMLR 2024, arXiv:2412.09726). The first k steps of the solver are replaced with this closed form,
applied to the initial noise, and the wrapped scheduler runs the rest of *its own full* grid. Slicing the grid
instead would change `init_noise_sigma`, the order lists of the singlestep solver and the final-step rules.

Our additions, in neither the paper nor its code: a mean for each prompt (`set_mean`), and a mean computed
from the first guided model call (`mean_from="first_call"`).
"""

import inspect
import threading
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from ..core import families
from ..core.schedules import scaling, scheduler_prediction
from .gaussian import GaussianStats
from .grid import ShortenedGrid
from .proxy import Delegated
from .skipping import check_reach


class TeleportScheduler(ShortenedGrid):
    """Wraps `scheduler` and replaces its first steps with the closed form of a Gaussian.

    Args:
        scheduler: a supported diffusers scheduler (`diffusers_ext.core.schedules.SUPPORTED`). It is not
            copied; `inner` returns it.
        stats: statistics of the latents that the denoiser was trained on, of shape (C, H, W), or (C, T, H, W)
            for videos. Latents in other layouts (packed tokens, channels last) and videos need
            `apply_teleport`, which tells the scheduler the layout of the pipeline.
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
    _no_mean: str
    _guidance_scale: float
    _layout: families.Layout | None
    _latent_shape: tuple[int, ...] | None
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
        self._no_mean = _NOT_APPLIED
        self._guidance_scale = 1.0
        self._layout = self._latent_shape = None
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

    # -- the transport

    def _forget_start(self) -> None:
        self._waiting = False  # the first step has not been taken yet
        self._input_scaled = False  # the first model input was mapped by scale_model_input
        self._input_mapped = False  # ... or by a hook on the denoiser
        self._disarmed = False  # the hook was called by another pipeline
        self._cache = None  # the initial noise and its transport

    def _wait_again(self) -> None:
        self._waiting = True
        self._input_scaled = self._input_mapped = self._cache is not None

    def set_layout(self, layout: families.Layout, shape: tuple[int, ...] | None = None) -> None:
        """Sets the layout of the pipeline's latents; the hooks of `apply_teleport` call it.

        Args:
            layout: see `diffusers_ext.core.families.Family`.
            shape: of one sample of the present call, in the grid layout. Only packed latents need it.
        """
        self._layout, self._latent_shape = layout, shape

    def set_mean(self, mean: torch.Tensor | None, guidance_scale: float = 1.0) -> None:
        """Uses `mean` in place of the mean of `stats` until it is changed; None restores that of `stats`.

        Args:
            mean: (*shape) of the statistics, or (B, *shape) with one mean for every image of the batch, float,
                in x0 units.
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
        self._cache, self._no_mean = None, _NOT_APPLIED
        if mean is None:
            self._mean = None
            return
        shape = self.stats.shape
        if tuple(mean.shape) != shape and tuple(mean.shape[1:]) != shape:
            raise ValueError(
                f"The mean has shape {tuple(mean.shape)}; expected {shape} or (batch, *{shape})."
            )
        if not torch.isfinite(mean).all():
            raise ValueError("The mean contains NaN or infinite values.")
        self._mean = mean

    def refuse_mean(self, reason: str) -> None:
        """Makes a transport that needs the mean of a prompt an error, with this reason, until `set_mean`."""
        self.set_mean(None)
        self._no_mean = reason

    def _transport(self, sample: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
        """The closed form from the first grid level to the one where the wrapped scheduler takes over."""
        start, end = self._levels[0], self._levels[self._skipped]
        moved = self.stats.transport(
            self._grid(sample), start, end, mean=mean, guidance_scale=self._guidance_scale
        )
        return self._looped(moved).to(sample.dtype)

    def _grid(self, sample: torch.Tensor) -> torch.Tensor:
        """Latents of the pipeline as (B, *stats.shape); ValueError if they have another shape."""
        shape = tuple(sample.shape[1:])
        if self._layout is None and len(shape) != 3:
            raise ValueError(
                f"The latents have shape {shape}, the statistics were fitted on {self.stats.shape}. Packed latents and"
                " videos have several layouts, of which the scheduler does not know that of the pipeline: use"
                " dx.apply_teleport(pipe, stats), or dx.apply_teleport(pipe) if pipe.scheduler is a"
                " TeleportScheduler already."
            )
        if self._layout is not None:
            shape = self._latent_shape or shape
            sample = families.to_grid(self._layout, sample, shape)
        if shape != self.stats.shape:
            raise ValueError(
                f"The latents have shape {shape}, the statistics were fitted on {self.stats.shape}. "
                "Generate at the size of the statistics, or fit them at this one (GaussianStats.fit)."
            )
        return sample

    def _looped(self, grid: torch.Tensor) -> torch.Tensor:
        """The inverse of `_grid`."""
        return grid if self._layout is None else families.from_grid(self._layout, grid).contiguous()

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
            raise ValueError(f"The statistics have one mean for each prompt. {self._no_mean}")
        if mean is not None:
            mean = mean.to(sample.device)
            if self._mean_count() is not None:
                # Guidance repeats the batch as a whole: rows 0..B−1, then rows 0..B−1 again.
                if len(sample) % len(mean):
                    raise ValueError(
                        f"set_mean was given {len(mean)} means for a batch of {len(sample)} rows."
                    )
                mean = mean.repeat(len(sample) // len(mean), *[1] * (mean.ndim - 1))
        moved = self._transport(sample, mean)
        self._cache = (sample.clone(), moved)
        return moved

    def _mean_count(self) -> int | None:
        """Number of the images' own means; None if all images have the same mean."""
        own = self._mean is not None and self._mean.ndim > len(self.stats.shape)
        return len(self._mean) if self._mean is not None and own else None

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
        shown, moved = self._cache or (sample, sample)
        means = self._mean_count()
        count = min(len(shown), len(sample))  # guidance may repeat the images in either place
        if means is not None and means != count:
            raise ValueError(f"set_mean was given {means} means for {count} images.")
        first, moved = (x[:count].repeat(len(sample) // count, *[1] * (x.ndim - 1)) for x in (shown, moved))
        if torch.equal(first, sample.to(first.dtype)):
            sample = self._mapped(sample)
        elif not torch.equal(moved, sample.to(moved.dtype)):  # DiT steps from what it shows the model
            raise ValueError(
                "The first model call got other latents than step, so the transport would apply to only one of "
                'them. Use mean_from="first_call" with this pipeline.'
            )
        self._waiting = False
        return sample

    def _step_from_first_call(
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        call = inspect.signature(self.inner.step).bind(model_output, timestep, sample, *args, **kwargs)
        clean = call.arguments.get("pred_original_sample")
        if clean is None:
            clean = scheduler_prediction(self.inner, model_output, sample, self._levels[0])
        mean = self.stats.implied_mean(self._grid(sample.float()), self._grid(clean), self._levels[0])
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


# Why there is no mean, unless a hook has told another reason.
_NOT_APPLIED = (
    "None was set. Add teleportation with dx.apply_teleport(pipe, stats) (or dx.apply_teleport(pipe) after loading),"
    " which reads the prompt, or set a mean with scheduler.set_mean."
)


def _same_time(timestep: Any, expected: float) -> bool:
    """Whether a denoiser's `timestep` argument is `expected`, also in thousandths or rounded to bfloat16.

    One for each image or each token must all be equal.
    """
    if timestep is None:
        return False
    values = torch.as_tensor(timestep).double()
    return any(
        bool(((values * unit - expected).abs() <= abs(expected) / 128 + 1e-6).all()) for unit in (1, 1000)
    )
