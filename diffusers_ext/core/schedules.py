"""Properties of a diffusers scheduler: the noise levels of its grid, its x₀-prediction and its counterparts.

An *outer step* is one interval of the grid. Second-order schedulers (`order == 2`) make two model calls per
outer step.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from .predictions import Level, clean_prediction

# alphas: ᾱ looked up by timestep; solver: VP latents with the solver's own σ → (α, σ); ve: VE latents;
# edm: VE latents with EDM preconditioning; flow: flow matching
_SCALINGS = {
    "DDIMScheduler": "alphas",
    "DDPMScheduler": "alphas",
    "CogVideoXDDIMScheduler": "alphas",
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

# The schedulers of models that are distilled to a few steps. Such a model predicts where a path ends and not its
# direction, and most of these schedulers add noise at every step.
_DISTILLED = (
    "LCMScheduler",
    "TCDScheduler",
    "SCMScheduler",
    "FlowMatchLCMScheduler",
    "CMStochasticIterativeScheduler",
    "HeliosDMDScheduler",
    "PiflowScheduler",
    "FlowMapEulerDiscreteScheduler",
)

# Their grid of a flow is in `sigmas`, and in `timesteps` what the model is told.
_FLOW_SOLVERS = (
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.SASolverScheduler,
)


# --- the grid ---


def scaling(scheduler: Any) -> str:
    """The latent scaling of `scheduler`: "alphas", "solver", "ve", "edm" or "flow".

    The class must match exactly, because a subclass may change the grid or the scaling.

    Raises:
        ValueError: a class whose noise levels are not known, or a grid that runs from data to noise.
    """
    name = type(scheduler).__name__
    if name not in _SCALINGS or type(scheduler) is not getattr(diffusers, name):
        if name in _DISTILLED:
            raise ValueError(
                f"{name} belongs to a model that is distilled to a few steps, which has no path whose first steps could"
                " be replaced. Use the model that it was distilled from."
            )
        # CogVideoX calls the steps of this class with other arguments, by its exact class.
        instead = (
            " Use pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)."
            if name == "CogVideoXDPMScheduler"
            else ""
        )
        raise ValueError(
            f"The noise levels of {name} are not known, so its first steps cannot be replaced.{instead} Supported"
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
    """Levels of the N outer steps of the current schedule, noisiest first, without the final point.

    Raises:
        ValueError: see `scaling`; or the scheduler is that of a flow, and its grid is not.
    """
    kind = "flow" if type(scheduler) is FlowSolverEulerScheduler else scaling(scheduler)
    if kind == "alphas":
        # PNDM's `timesteps` repeats points for its warm-up; `_timesteps` is the grid itself, ascending.
        times = scheduler._timesteps[::-1] if is_pndm(scheduler) else scheduler.timesteps
        alpha_bars = [float(scheduler.alphas_cumprod[int(t)]) for t in times]
        return [(math.sqrt(ab), math.sqrt(1 - ab)) for ab in alpha_bars]
    count = (len(scheduler.timesteps) + scheduler.order - 1) // scheduler.order
    sigmas = [scheduler.sigmas[i * scheduler.order] for i in range(count)]
    if kind == "solver":
        # VP latents even on a Karras grid, and (1−σ, σ) with `use_flow_sigmas`: the solver converts both.
        if scheduler.config.get("use_flow_sigmas"):
            _check_flow_grid(scheduler, torch.stack(sigmas))
        pairs = [scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in sigmas]
        return [(float(a), float(s)) for a, s in pairs]
    if kind == "flow":
        _check_flow_grid(scheduler, torch.stack(sigmas))
        return [(1 - float(sigma), float(sigma)) for sigma in sigmas]
    return [(1.0, float(sigma)) for sigma in sigmas]


def _check_flow_grid(scheduler: Any, sigmas: Tensor) -> None:
    """Raises a ValueError unless σ, (steps,), are levels of a flow.

    Of the multistep solvers, DPM-Solver and DEIS ignore `use_flow_sigmas` with any other grid in σ, and UniPC with all
    but Karras's. Their σ then are those of a diffusion, up to 157.
    """
    if not 0 <= float(sigmas.min()) <= float(sigmas.max()) <= 1:
        raise ValueError(
            f"The grid of {type(scheduler).__name__} goes from σ = {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g},"
            " expected levels of a flow, from 1 to 0. Use it with use_flow_sigmas=True and without use_karras_sigmas,"
            " use_exponential_sigmas, use_beta_sigmas and use_lu_lambdas."
        )


def levels_at(scheduler: Any, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(a, s) at `timesteps` (B,) of a scheduler with `alphas_cumprod`, float32, shaped to multiply `like`."""
    cumulative = scheduler.alphas_cumprod.to(like.device, torch.float32)[timesteps]
    cumulative = cumulative.reshape(-1, *[1] * (like.ndim - 1))
    return cumulative.sqrt(), (1 - cumulative).sqrt()


# --- predictions ---


def prediction_type(scheduler: Any) -> str | None:
    """What a denoiser with this scheduler predicts, as in `PREDICTION_TYPES`; None if unknown."""
    scheduler = unwrapped(scheduler)
    if "FlowMatch" in type(scheduler).__name__ or isinstance(scheduler, FlowSolverEulerScheduler):
        return "flow_prediction"
    kind = scheduler.config.get("prediction_type")
    return "sample" if kind == "original_sample" else kind


def scheduler_prediction(
    scheduler: Any, model_output: Tensor, sample: Tensor, level: Level, *, clip: bool = True
) -> Tensor:
    """The scheduler's x₀-prediction at `level`, in float32, clipped or thresholded as its config says.

    Args:
        scheduler: a supported scheduler; its `prediction_type` says what the model predicts.
        model_output: (B, C, ...), after guidance; a learned variance in the second half of C is dropped.
        sample: (B, C, ...), the noisy latents in the scheduler's scaling, before `scale_model_input`.
        level: (a, s) of `sample`.
        clip: False leaves the prediction as it is.
    """
    kind, config, (a, s) = scaling(scheduler), scheduler.config, level
    x, output = sample.float(), model_output.float()
    if output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]
    if kind == "edm":
        clean = scheduler.precondition_outputs(x, output, torch.tensor(s))
    else:
        clean = clean_prediction(output, x, a, s, str(prediction_type(scheduler)))
    if not clip:
        return clean
    if getattr(config, "thresholding", False):
        return scheduler._threshold_sample(clean)
    # CogVideoX's has the argument and does not use it.
    if getattr(config, "clip_sample", False) and not isinstance(scheduler, CogVideoXDDIMScheduler):
        return clean.clamp(-config.clip_sample_range, config.clip_sample_range)
    return clean


# --- counterparts ---
#
# diffusers' own `from_config` depends on the history of the config: values that were left at the default of the
# source's class are replaced with the default of the other class (another timestep spacing, for Heun and KDPM2
# other betas), until the scheduler is saved and loaded. Values of a third class stay in the config and return.


def counterpart(scheduler: Any, kind: type, **changes: Any) -> Any:
    """A new scheduler of class `kind` with the noise schedule and the settings of `scheduler`.

    It depends on what `scheduler` does, and not on how it was made: saved and loaded, copied or made again
    from its config, it has the same counterpart.

    Args:
        scheduler: any diffusers scheduler. Of its config, the values of its own class's arguments are used, be
            they defaults or not.
        kind: a diffusers scheduler class. Arguments that the class of `scheduler` lacks keep their defaults.
        changes: arguments of `kind` with another value.

    Returns:
        A scheduler with the `alphas_cumprod` of `scheduler` (float32, on the CPU) if it has any, and with the
            shift of its `set_shift`.
    """
    scheduler = unwrapped(scheduler)
    config = scheduler.config
    # A None leaves the choice to the class.
    values = {
        n: config[n] for n in _arguments(type(scheduler)) & _arguments(kind) if config.get(n) is not None
    }
    if values.get("prediction_type") == "original_sample" and kind is not type(scheduler):
        values["prediction_type"] = "sample"  # the name of all other classes
    values |= changes
    if "trained_betas" in values:
        values["trained_betas"] = np.asarray(values["trained_betas"]).tolist()
    if kind is not type(scheduler) and values.get("beta_schedule", "linear") not in _BETA_SCHEDULES:
        values["trained_betas"] = scheduler.betas.tolist()
    found: Any = kind(**values)
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        # Not only what the arguments say: a pipeline or a user may have set it, and classes differ in what
        # they make of the same betas (rescale_betas_zero_snr, snr_shift_scale).
        alphas = scheduler.alphas_cumprod.detach().to("cpu", torch.float32, copy=True)
        if hasattr(found, "lambda_t"):
            alphas[alphas == 0] = 2**-24  # solvers in log-SNR keep off zero, by the same number
        found.alphas_cumprod = alphas
        for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
            if hasattr(found, name) and not found.config.set_alpha_to_one:
                setattr(found, name, alphas[0])
    if hasattr(scheduler, "set_shift") and hasattr(found, "set_shift"):
        found.set_shift(scheduler.shift)
    return found


_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # those that all classes know


def _arguments(kind: type) -> set[str]:
    # A subclass may pass its arguments on.
    parameters = [p for base in kind.__mro__ for p in inspect.signature(base.__init__).parameters.values()]
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"self"}


def unwrapped(scheduler: Any) -> Any:
    """The wrapped scheduler, if `scheduler` stands in for another one."""
    return getattr(scheduler, "inner", scheduler)


def same_grid_deterministic(scheduler: Any) -> Any:
    """The deterministic solver on the same grid if `scheduler` is stochastic, else `scheduler` itself."""
    name, config = type(scheduler).__name__, scheduler.config
    if name in _DETERMINISTIC:
        return counterpart(scheduler, getattr(diffusers, _DETERMINISTIC[name]))
    algorithm = str(config.get("algorithm_type"))
    if algorithm.startswith("sde-"):
        return counterpart(scheduler, type(scheduler), algorithm_type=algorithm.removeprefix("sde-"))
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and config.stochastic_sampling:
        return counterpart(scheduler, type(scheduler), stochastic_sampling=False)
    return scheduler


def noising_scheduler(scheduler: Any) -> DDPMScheduler:
    """A `DDPMScheduler` with the noise schedule and prediction type of `scheduler`, for training.

    Raises:
        ValueError: `scheduler` is that of a flow, or has no `alphas_cumprod`.
    """
    _check_alphas(scheduler, flow=False)
    return counterpart(scheduler, DDPMScheduler)


def first_order_scheduler(scheduler: Any) -> Any:
    """The deterministic first-order solver with the noise schedule of `scheduler`: DDIM, or Euler for a flow.

    Inversion, editing and re-denoising use this solver. Clipping is off, so that its steps can be inverted.

    DDIM has the `alphas_cumprod`, `steps_offset` and `set_alpha_to_one` of `scheduler`, and its
    `timestep_spacing` if that is "leading" or "trailing". With "linspace" it is "leading": DDIM's steps are
    `num_train_timesteps // num_inference_steps` long, which "linspace" is not, and `DDIMInverseScheduler` has
    no "linspace". Grids in σ (`use_karras_sigmas` and the like) are not those of DDIM.

    Euler has exactly the levels and timesteps of `scheduler`, with dynamic shifting, `flow_shift` and grids
    in σ.

    Args:
        scheduler: a scheduler with `alphas_cumprod`, or one of a flow: `FlowMatchEulerDiscreteScheduler`,
            `FlowMatchHeunDiscreteScheduler`, or DPM-Solver, UniPC, DEIS or SA-Solver with `use_flow_sigmas`.

    Raises:
        ValueError: the scheduler is that of a distilled model, or is neither. `set_timesteps` of Euler
            raises a ValueError if the grid of `scheduler` is not that of a flow.
    """
    scheduler = unwrapped(scheduler)
    name, config = type(scheduler).__name__, scheduler.config
    if name in _DISTILLED:
        raise ValueError(
            f"{name} belongs to a model that is distilled to a few steps, which has no path to invert, edit or"
            " step along. Load the model that it was distilled from (without its LoRA, if it is one), or, if this"
            " model is not distilled, set the scheduler that it was trained with, such as pipe.scheduler ="
            " DDIMScheduler.from_config(pipe.scheduler.config)."
        )
    if prediction_type(scheduler) == "flow_prediction":
        return _flow_euler(scheduler)
    _check_alphas(scheduler, flow=True)
    # Also where another class has left them in the config: they describe the model's own sampling.
    kept = {key: config[key] for key in ("steps_offset", "set_alpha_to_one") if key in config}
    spacing = "trailing" if config.get("timestep_spacing") == "trailing" else "leading"
    return counterpart(
        scheduler, DDIMScheduler, **kept, timestep_spacing=spacing, clip_sample=False, thresholding=False
    )


def _check_alphas(scheduler: Any, flow: bool) -> None:
    missing = getattr(scheduler, "alphas_cumprod", None) is None
    if missing or prediction_type(scheduler) == "flow_prediction":
        name = type(unwrapped(scheduler)).__name__
        raise ValueError(
            f"{name} has no alphas_cumprod{' and is not a flow' if flow else ''}, so its noise levels are not known."
            f" Use a pipeline with the noise schedule of DDIM{', DPM-Solver or FlowMatchEuler' if flow else ''}."
            if missing
            else f"{name} is that of a flow, expected the noise schedule of DDPM: use a pipeline with alphas_cumprod"
            " and a prediction_type of epsilon, v_prediction or sample."
        )


def _flow_euler(scheduler: Any) -> Any:
    kind = type(scheduler)
    if isinstance(scheduler, FlowSolverEulerScheduler):
        return kind(scheduler.solver)
    if not isinstance(scheduler, _FLOW_SOLVERS):
        expected = ", ".join(solver.__name__ for solver in _FLOW_SOLVERS)
        raise ValueError(
            f"The levels of {kind.__name__} are not known. Expected a scheduler of a flow: {expected}."
        )
    plain = kind is FlowMatchEulerDiscreteScheduler
    found = counterpart(scheduler, kind, **({"stochastic_sampling": False} if plain else {}))
    # Pipelines read settings of other classes, such as base_image_seq_len.
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    found.register_to_config(**{**settings, **found.config})
    return found if plain else FlowSolverEulerScheduler(found)


def inverse_scheduler(scheduler: Any) -> Any:
    """The scheduler that steps from the image back to the noise, on the levels of `first_order_scheduler`.

    Raises:
        ValueError: see `first_order_scheduler`.
    """
    forward = first_order_scheduler(scheduler)
    if isinstance(forward, DDIMScheduler):
        return counterpart(forward, DDIMInverseScheduler)
    return FlowMatchEulerInverseScheduler(forward)


class FlowSolverEulerScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps on the grid of another solver of a flow.

    Args:
        solver: a flow scheduler with `sigmas`. It is only used for its `set_timesteps`, whose arguments this
            scheduler takes, and for its config.
    """

    def __init__(self, solver: Any):
        super().__init__(num_train_timesteps=solver.config.num_train_timesteps)
        self.solver = solver
        # Pipelines read the settings of the shift from the config.
        values = {name: value for name, value in solver.config.items() if not name.startswith("_")}
        self.register_to_config(**{**values, "stochastic_sampling": False})

    # Pipelines inspect the signature to decide which arguments to pass.
    @property
    def set_timesteps(self) -> Callable[..., None]:  # type: ignore[override]
        """Same as that of the solver; see there.

        Raises:
            ValueError: levels outside [0, 1]. For example, DPM-Solver ignores `use_flow_sigmas` with
                `use_karras_sigmas`.
        """
        return functools.wraps(self.solver.set_timesteps)(functools.partial(type(self)._set_timesteps, self))

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        solver = self.solver
        solver.set_timesteps(*args, **kwargs)
        # Second-order solvers repeat grid points.
        sigmas = torch.cat([solver.sigmas[:-1][:: solver.order], solver.sigmas[-1:]])
        _check_flow_grid(solver, sigmas)
        # Integers would be taken for indices.
        self.sigmas, self.timesteps = sigmas, solver.timesteps[:: solver.order].to(torch.float32)
        self.num_inference_steps = len(self.timesteps)
        self._step_index = self._begin_index = None


class FlowMatchEulerInverseScheduler(FlowSolverEulerScheduler):
    """The Euler steps of `solver` in reverse, from the image to the noise.

    Every step uses the model's prediction at the level that it goes to, as in `DDIMInverseScheduler`. The
    model is therefore called at the same levels in both directions.
    """

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super()._set_timesteps(*args, **kwargs)
        self.sigmas, self.timesteps = self.sigmas.flip(0), self.timesteps.flip(0)
