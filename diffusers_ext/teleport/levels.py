"""Where a diffusers scheduler stands: noise levels of its grid, its own x0-prediction, latent layouts.

A *level* is the pair (a, s) of x = a·x0 + s·ε in the scheduler's own latent scaling: (1, σ) for the
variance-exploding ones, (√ᾱ, √(1−ᾱ)) for the variance-preserving ones, (1−t, t) for flow matching.
An *outer step* is one grid interval; second-order schedulers spend two model calls on it (`order == 2`).
"""

import itertools
import math
from typing import Any

import diffusers
import numpy as np
import torch

Level = tuple[float, float]

# ᾱ looked up by timestep · a multistep VP solver's own σ → (α, σ) · VE latents · EDM preconditioning · flow
_FAMILIES = {
    "DDIMScheduler": "alphas",
    "DDPMScheduler": "alphas",
    "PNDMScheduler": "alphas",
    "DPMSolverMultistepScheduler": "solver",
    "DPMSolverSinglestepScheduler": "solver",
    "UniPCMultistepScheduler": "solver",
    "DEISMultistepScheduler": "solver",
    "EulerDiscreteScheduler": "ve",
    "EulerAncestralDiscreteScheduler": "ve",
    "HeunDiscreteScheduler": "ve",
    "KDPM2DiscreteScheduler": "ve",
    "KDPM2AncestralDiscreteScheduler": "ve",
    "LMSDiscreteScheduler": "ve",
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
}

SUPPORTED = tuple(_FAMILIES)


def family(scheduler: Any) -> str:
    """The latent scaling of `scheduler`; raises ValueError for a class whose levels are not known here.

    The class must match exactly: a subclass may change the grid or the scaling.
    """
    name = type(scheduler).__name__
    if name not in _FAMILIES or type(scheduler) is not getattr(diffusers, name):
        raise ValueError(
            f"TeleportScheduler cannot wrap {name}: its noise levels are not known, so the skipped steps "
            f"cannot be replaced. Supported schedulers: {', '.join(SUPPORTED)}."
        )
    if getattr(scheduler.config, "invert_sigmas", False):
        raise ValueError(
            f"TeleportScheduler cannot wrap {name} with invert_sigmas=True: its grid runs from data to noise."
        )
    return _FAMILIES[name]


def scheduler_class(name: str) -> Any:
    """The supported diffusers scheduler class called `name`; ValueError for any other name."""
    if name not in _FAMILIES:
        raise ValueError(f"{name!r} is not a supported scheduler. Supported: {', '.join(SUPPORTED)}.")
    return getattr(diffusers, name)


def is_pndm(scheduler: Any) -> bool:
    """Whether `scheduler` keeps its own call counter instead of a step index."""
    return type(scheduler) is diffusers.PNDMScheduler


def grid_levels(scheduler: Any) -> list[Level]:
    """Levels of the N outer steps of the current schedule, noisiest first, without the final point."""
    kind = family(scheduler)
    if kind == "alphas":
        # PNDM's `timesteps` repeats points for its warm-up; `_timesteps` is the grid itself, ascending.
        times = scheduler._timesteps[::-1] if is_pndm(scheduler) else scheduler.timesteps
        alpha_bars = [float(scheduler.alphas_cumprod[int(t)]) for t in times]
        return [(math.sqrt(ab), math.sqrt(1 - ab)) for ab in alpha_bars]
    count = (len(scheduler.timesteps) + scheduler.order - 1) // scheduler.order
    sigmas = [scheduler.sigmas[i * scheduler.order] for i in range(count)]
    if kind == "solver":
        # VP latents even on a Karras grid; (1−σ, σ) when `use_flow_sigmas` is set: the solver itself knows.
        pairs = [scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in sigmas]
        return [(float(a), float(s)) for a, s in pairs]
    if kind == "flow":
        return [(1 - float(sigma), float(sigma)) for sigma in sigmas]
    return [(1.0, float(sigma)) for sigma in sigmas]


def noise_to_signal(level: Level) -> float:
    """σ in variance-exploding units, s/a; infinite where no signal is left (zero-SNR ᾱ, flow t = 1)."""
    a, s = level
    return s / a if a > 0 else math.inf


def max_skip(scheduler: Any, count: int) -> int:
    """How many of `count` outer steps may be skipped: one must remain, four for PNDM's Runge-Kutta start."""
    if is_pndm(scheduler) and not scheduler.config.skip_prk_steps:
        return max(count - scheduler.pndm_order, 0)
    return count - 1


def steps_to_sigma(levels: list[Level], sigma: float) -> int:
    """Index of the last grid point whose noise-to-signal ratio is still at least `sigma`; 0 where none is."""
    # The grid is kept in float32, so a σ read off it may come back a rounding error higher.
    reached = [i for i, level in enumerate(levels) if noise_to_signal(level) >= sigma * (1 - 1e-6)]
    return max(reached, default=0)


def restart_pndm(scheduler: Any, skip: int) -> None:
    """Shortens PNDM's grid by its `skip` noisiest points, so that its warm-up happens at the new start.

    PNDM tells where it is from a call counter: with `skip_prk_steps` the first point after the start is
    visited twice (a Heun step), without it three Runge-Kutta steps of four calls open the sampling. Slicing
    `timesteps` would hand it the wrong points for those calls. `set_timesteps` undoes this.
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


def predicted_clean(
    scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor, level: Level
) -> torch.Tensor:
    """The scheduler's own x0-prediction at `level`, in float32, clipped as its config asks.

    Args:
        scheduler: a supported scheduler; its `prediction_type` says what the model predicts.
        model_output: (B, C, ...), after guidance; a learned variance in the second half of C is dropped.
        sample: (B, C, ...), the latents the model was shown, in the scheduler's scaling (unscaled input).
        level: (a, s) of `sample`.
    """
    kind, config, (a, s) = family(scheduler), scheduler.config, level
    x, output = sample.float(), model_output.float()
    if output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    prediction = "flow_prediction" if kind == "flow" else config.prediction_type
    if kind == "edm":
        clean = scheduler.precondition_outputs(x, output, torch.tensor(s))
    elif prediction in ("sample", "original_sample"):
        clean = output
    elif prediction == "flow_prediction":
        clean = x - s * output
    elif prediction == "epsilon":
        clean = (x - s * output) / a
    elif prediction == "v_prediction":
        # v is defined on the unit-variance latent √(a²+s²)⁻¹ x, which for VP is x itself.
        clean = (a * x - s * math.sqrt(a * a + s * s) * output) / (a * a + s * s)
    else:
        raise ValueError(f"{type(scheduler).__name__}: unknown prediction_type {prediction!r}.")
    if getattr(config, "thresholding", False):
        return scheduler._threshold_sample(clean)
    if getattr(config, "clip_sample", False):
        return clean.clamp(-config.clip_sample_range, config.clip_sample_range)
    return clean
