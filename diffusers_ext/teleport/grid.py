"""The grid of a `TeleportScheduler`: the wrapped scheduler's own, without its first steps."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch

from ..core.predictions import Level, noise_to_signal
from ..core.schedules import grid_levels, is_pndm
from .proxy import Delegated, SchedulerProxy
from .skipping import calibrated_steps, max_skip, restart_pndm, steps_to_sigma


class ShortenedGrid(SchedulerProxy):
    """Cuts the first steps off the grid that a pipeline sees, and keeps all positions in it consistent."""

    _known_levels: list[Level] | None
    _skipped: int
    _offset: int
    _shown: torch.Tensor | None
    _waiting: bool

    def _forget_start(self) -> None:
        """Called when the schedule is set: no step was taken yet."""
        raise NotImplementedError

    def _wait_again(self) -> None:
        """Called when the position is set back to the first step."""
        raise NotImplementedError

    def _forget_schedule(self) -> None:
        self._known_levels = None
        self._thread = None  # the one that runs the pipeline
        self._skipped = 0  # outer steps that the transport replaces
        self._offset = 0  # entries that the exposed grid lacks at its start
        self._shown = None  # the exposed timesteps, if they are not the wrapped scheduler's
        self._forget_start()

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
        if self.sigma is not None:
            wanted = steps_to_sigma(self._levels, self.sigma)
        elif self.skip == "auto":
            wanted = calibrated_steps(self._levels, self.stats.calibration)
        else:
            wanted = math.floor(float(self.skip) * count + 1e-9)
        return max(min(wanted, max_skip(self.inner, count)), 0)

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
            self._wait_again()
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
