"""Properties of a diffusers scheduler: the noise levels of its grid, its x₀-prediction and its counterparts.

An *outer step* is one interval of the grid. Second-order schedulers (`order == 2`) make two model calls per
outer step.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import diffusers
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .predictions import Level, clean_prediction

# alphas: ᾱ looked up by timestep; solver: VP latents with the solver's own σ → (α, σ); ve: VE latents;
# edm: VE latents with EDM preconditioning; flow: flow matching
_SCALINGS = {
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

SUPPORTED = tuple(_SCALINGS)

# A stochastic solver has no reference trajectory, unlike its deterministic counterpart on the same grid.
_DETERMINISTIC = {
    "DDPMScheduler": "DDIMScheduler",
    "EulerAncestralDiscreteScheduler": "EulerDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler": "KDPM2DiscreteScheduler",
}


# --- the grid ---


def scaling(scheduler: Any) -> str:
    """The latent scaling of `scheduler`: "alphas", "solver", "ve", "edm" or "flow".

    The class must match exactly, because a subclass may change the grid or the scaling.

    Raises:
        ValueError: a class whose noise levels are not known, or a grid that runs from data to noise.
    """
    name = type(scheduler).__name__
    if name not in _SCALINGS or type(scheduler) is not getattr(diffusers, name):
        raise ValueError(
            f"The noise levels of {name} are not known, so its first steps cannot be replaced. Supported"
            f" schedulers: {', '.join(SUPPORTED)}."
        )
    if getattr(scheduler.config, "invert_sigmas", False):
        raise ValueError(
            f"{name} with invert_sigmas=True is not supported: its grid runs from data to noise."
        )
    return _SCALINGS[name]


def scheduler_class(name: str) -> Any:
    """The supported diffusers scheduler class called `name`; ValueError for any other name."""
    if name not in _SCALINGS:
        raise ValueError(f"{name!r} is not a supported scheduler. Supported: {', '.join(SUPPORTED)}.")
    return getattr(diffusers, name)


def is_pndm(scheduler: Any) -> bool:
    """Whether `scheduler` is PNDM, which counts its calls instead of keeping a step index."""
    return type(scheduler) is diffusers.PNDMScheduler


def grid_levels(scheduler: Any) -> list[Level]:
    """Levels of the N outer steps of the current schedule, noisiest first, without the final point."""
    kind = scaling(scheduler)
    if kind == "alphas":
        # PNDM's `timesteps` repeats points for its warm-up; `_timesteps` is the grid itself, ascending.
        times = scheduler._timesteps[::-1] if is_pndm(scheduler) else scheduler.timesteps
        alpha_bars = [float(scheduler.alphas_cumprod[int(t)]) for t in times]
        return [(math.sqrt(ab), math.sqrt(1 - ab)) for ab in alpha_bars]
    count = (len(scheduler.timesteps) + scheduler.order - 1) // scheduler.order
    sigmas = [scheduler.sigmas[i * scheduler.order] for i in range(count)]
    if kind == "solver":
        # VP latents even on a Karras grid, and (1−σ, σ) with `use_flow_sigmas`: the solver converts both.
        pairs = [scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in sigmas]
        return [(float(a), float(s)) for a, s in pairs]
    if kind == "flow":
        return [(1 - float(sigma), float(sigma)) for sigma in sigmas]
    return [(1.0, float(sigma)) for sigma in sigmas]


def levels_at(scheduler: Any, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) at `timesteps` (B,) of a scheduler with `alphas_cumprod`, float32, shaped to multiply `like`."""
    cumulative = scheduler.alphas_cumprod.to(like.device, torch.float32)[timesteps]
    cumulative = cumulative.reshape(-1, *[1] * (like.ndim - 1))
    return cumulative.sqrt(), (1 - cumulative).sqrt()


# --- predictions ---


def prediction_type(scheduler: Any) -> str | None:
    """What a denoiser with this scheduler predicts, as in `PREDICTION_TYPES`; None if unknown."""
    if "FlowMatch" in type(scheduler).__name__:
        return "flow_prediction"
    kind = scheduler.config.get("prediction_type")
    return "sample" if kind == "original_sample" else kind


def scheduler_prediction(scheduler: Any, model_output: Tensor, sample: Tensor, level: Level) -> Tensor:
    """The scheduler's x₀-prediction at `level`, in float32, clipped or thresholded as its config says.

    Args:
        scheduler: a supported scheduler; its `prediction_type` says what the model predicts.
        model_output: (B, C, ...), after guidance; a learned variance in the second half of C is dropped.
        sample: (B, C, ...), the noisy latents in the scheduler's scaling, before `scale_model_input`.
        level: (a, s) of `sample`.
    """
    kind, config, (a, s) = scaling(scheduler), scheduler.config, level
    x, output = sample.float(), model_output.float()
    if output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    if kind == "edm":
        clean = scheduler.precondition_outputs(x, output, torch.tensor(s))
    else:
        clean = clean_prediction(output, x, a, s, str(prediction_type(scheduler)))
    if getattr(config, "thresholding", False):
        return scheduler._threshold_sample(clean)
    if getattr(config, "clip_sample", False):
        return clean.clamp(-config.clip_sample_range, config.clip_sample_range)
    return clean


# --- counterparts ---


def same_grid_deterministic(scheduler: Any) -> Any:
    """The deterministic solver on the same grid if `scheduler` is stochastic, else `scheduler` itself."""
    name = _DETERMINISTIC.get(type(scheduler).__name__)
    return getattr(diffusers, name).from_config(scheduler.config) if name else scheduler


def first_order_scheduler(scheduler: Any) -> Any:
    """The deterministic first-order solver with the noise schedule of `scheduler`: DDIM, or Euler for a flow.

    Clipping is off, so that its steps can be inverted. Inversion, editing and re-denoising use this solver.

    Raises:
        ValueError: the scheduler has no `alphas_cumprod` and is not a flow.
    """
    config = scheduler.config
    if prediction_type(scheduler) == "flow_prediction":
        # Solvers of other families name the shift of flow sigmas `flow_shift`.
        shift = {"shift": config["flow_shift"]} if "flow_shift" in config else {}
        return FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False, **shift)
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod and is not a flow, so its noise levels are not known."
            " Use a pipeline with the noise schedule of DDIM, DPM-Solver or FlowMatchEuler."
        )
    return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)


def inverse_scheduler(scheduler: Any) -> Any:
    """The scheduler that steps from the image back to the noise, on the levels of `first_order_scheduler`.

    Raises:
        ValueError: see `first_order_scheduler`.
    """
    forward = first_order_scheduler(scheduler)
    if isinstance(forward, DDIMScheduler):
        return DDIMInverseScheduler.from_config(forward.config)
    return FlowMatchEulerInverseScheduler.from_config(forward.config)


class FlowMatchEulerInverseScheduler(FlowMatchEulerDiscreteScheduler):
    """The Euler steps of `FlowMatchEulerDiscreteScheduler` in reverse, from the image to the noise.

    Every step uses the model's prediction at the level that it goes to, as in `DDIMInverseScheduler`. The
    model is therefore called at the same levels in both directions.
    """

    # Pipelines inspect this signature to decide which arguments to pass.
    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Same as in the base class, but from the lowest level up."""
        super().set_timesteps(*args, **kwargs)
        self.sigmas, self.timesteps = self.sigmas.flip(0), self.timesteps.flip(0)
