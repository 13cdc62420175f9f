"""Selects the steps of a scheduler's grid that are skipped."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch

from ..core.predictions import Level, noise_to_signal
from ..core.schedules import is_pndm
from .gaussian import GaussianStats


def check_reach(skip: Any, sigma: Any, stats: GaussianStats) -> None:
    """Validates `skip` and `sigma` and raises a ValueError if they are invalid; see `TeleportScheduler`."""
    if sigma is not None:
        if skip != "auto":
            raise ValueError(f"Give either skip or sigma, not both (skip={skip!r}, sigma={sigma!r}).")
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma < math.inf:
            raise ValueError(f"sigma must be a finite number above 0, not {sigma!r}.")
    elif skip == "auto":
        if "sigma" not in stats.calibration:
            raise ValueError(
                'skip="auto" needs calibrated statistics: run dx.calibrate_skip, or give skip= (a fraction '
                "of the steps) or sigma= yourself."
            )
    elif isinstance(skip, bool) or not isinstance(skip, int | float) or not 0 <= skip < 1:
        raise ValueError(f'skip must be "auto" or a fraction of the steps in [0, 1), not {skip!r}.')


def max_skip(scheduler: Any, count: int) -> int:
    """How many of `count` outer steps may be skipped. One must remain, four for PNDM's Runge-Kutta start."""
    if is_pndm(scheduler) and not scheduler.config.skip_prk_steps:
        return max(count - scheduler.pndm_order, 0)
    return count - 1


def steps_to_sigma(levels: list[Level], sigma: float) -> int:
    """Index of the last grid point with a noise-to-signal ratio of at least `sigma`; 0 if there is none."""
    # The grid is float32, so a σ taken from it may exceed the stored value by a rounding error.
    reached = [i for i, level in enumerate(levels) if noise_to_signal(level) >= sigma * (1 - 1e-6)]
    return max(reached, default=0)


def calibrated_steps(levels: list[Level], calibration: dict[str, Any]) -> int:
    """How many steps of a grid `skip="auto"` skips.

    The calibration of the smallest step count that is not below the grid's decides. No step below its σ is skipped, and
    no larger share of the steps: a grid with more of its steps at high noise, as that of a flow with a larger shift,
    has a smaller error there, and the map would have to be better too.

    Args:
        levels: of the grid, noisiest first.
        calibration: of `GaussianStats`: "sigma", and the "trials" with which it was found.
    """
    sigma, count = calibration["sigma"], len(levels)
    if not isinstance(sigma, dict):
        return 0 if sigma is None else steps_to_sigma(levels, sigma)
    calibrated = min((n for n in map(int, sigma) if n >= count), default=None)
    # Above the largest calibrated count the solver's error is smaller than all that were compared.
    if calibrated is None or sigma[str(calibrated)] is None:
        return 0
    reached = sigma[str(calibrated)]
    trials = calibration.get("trials", {}).get(str(calibrated), {"errors": []})["errors"]
    most = next((-(-skipped * count // calibrated) for skipped, to, _ in trials if to == reached), count)
    return min(steps_to_sigma(levels, reached), most)


def restart_pndm(scheduler: Any, skip: int) -> None:
    """Shortens PNDM's grid by its `skip` noisiest points, so that its warm-up happens at the new start.

    PNDM finds its position by counting calls. With `skip_prk_steps` it visits the first point after the start
    twice (a Heun step). Without, it starts with three Runge-Kutta steps of four calls each. Slicing
    `timesteps` would give these calls the wrong points. `set_timesteps` undoes this.
    """
    grid = scheduler._timesteps[: len(scheduler._timesteps) - skip]
    down = grid[::-1]
    if scheduler.config.skip_prk_steps:
        runge_kutta = np.array([])
        multistep = np.concatenate([down[:2], down[1:]])
    else:
        middle = scheduler.config.num_train_timesteps // scheduler.num_inference_steps // 2
        stages = [(now, nxt + middle, nxt + middle, nxt) for now, nxt in itertools.pairwise(down[:4])]
        runge_kutta = np.array(stages).reshape(-1)
        multistep = down[3:]
    device = scheduler.timesteps.device
    scheduler.prk_timesteps = runge_kutta
    scheduler.plms_timesteps = multistep
    timesteps = np.concatenate([runge_kutta, multistep]).astype(np.int64)
    scheduler.timesteps = torch.from_numpy(timesteps).to(device)
