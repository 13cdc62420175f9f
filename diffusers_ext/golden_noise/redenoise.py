"""Re-denoising: golden noise from the model itself, the target that NPNet learns (arXiv:2411.09502, section 3.1).

One step down from the highest level with much guidance, one step back up with little: what the prompt's guidance
adds stays in the noise. For a noise prediction ε both steps together are

    x'_T = x_T + k (ε_inv − ε_l),    k = σ_T − (α_T / α_s) σ_s,

with ε_l the guided prediction and ε_inv the one for the way back; for a flow x'_T = x_T + (σ_T − σ_s)(v_inv − v_l).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..pipeline_calls import model_output
from ..pipeline_hooks import scheduler_of

_PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class Level:
    """A noise level: x = alpha · clean + sigma · noise."""

    alpha: float
    sigma: float


def split_prediction(
    output: Tensor, sample: Tensor, level: Level, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """(clean, noise) that a model output means for a sample of that level.

    Raises:
        ValueError: an unknown `prediction_type`.
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction_type == "epsilon":
        return (sample - sigma * output) / alpha, output
    if prediction_type == "v_prediction":
        return alpha * sample - sigma * output, alpha * output + sigma * sample
    if prediction_type == "sample":
        return output, (sample - alpha * output) / sigma
    if prediction_type == "flow_prediction":  # alpha + sigma = 1, the output is noise − clean
        return sample - sigma * output, sample + alpha * output
    raise ValueError(f"prediction_type must be one of {', '.join(_PREDICTIONS)}, got {prediction_type!r}.")


def move(output: Tensor, sample: Tensor, here: Level, there: Level, prediction_type: str) -> Tensor:
    """The deterministic (DDIM, Euler) step from one level to another, up or down.

    A sample at `here`, and the model's output for it. On the way up `output` is the model's at the level `there`,
    but is read as a prediction for a sample `here`, as `DDIMInverseScheduler` does.
    """
    clean, noise = split_prediction(output, sample, here, prediction_type)
    return there.alpha * clean + there.sigma * noise


def displacement_factor(top: Level, below: Level) -> float:
    """k of the module's formula: how far a difference of noise predictions moves the noise."""
    return top.sigma - top.alpha / below.alpha * below.sigma


def pair_scheduler(scheduler: Any) -> Any:
    """The scheduler whose steps re-denoising takes: DDIM, or Euler for a flow, with the noise schedule given.

    Raises:
        ValueError: the scheduler has neither kind of noise schedule.
    """
    if (
        getattr(scheduler.config, "prediction_type", None) == "flow_prediction"
        or "FlowMatch" in type(scheduler).__name__
    ):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod and is no flow: re-denoising does not know its noise"
            " levels. Use a pipeline with DDIM's, DPM-Solver's or FlowMatch Euler's noise schedule."
        )
    # A noise schedule with zero terminal SNR has alpha = 0 at the top, where noise predictions say nothing.
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, thresholding=False)


def schedule_levels(scheduler: Any, count: int) -> list[Level]:
    """The first `count` levels of a scheduler made by `pair_scheduler`, after its `set_timesteps`.

    Raises:
        ValueError: fewer steps than that.
    """
    timesteps: Any = scheduler.timesteps
    if (have := len(timesteps)) < count:
        raise ValueError(f"Re-denoising needs num_inference_steps of at least {count}, got {have}.")
    if prediction_of(scheduler) == "flow_prediction":
        return [Level(1 - sigma, sigma) for sigma in scheduler.sigmas.tolist()[:count]]
    cumulative = [float(scheduler.alphas_cumprod[int(t)]) for t in timesteps.tolist()[:count]]
    return [Level(a**0.5, (1 - a) ** 0.5) for a in cumulative]


def prediction_of(scheduler: Any) -> str:
    """The prediction type of a scheduler made by `pair_scheduler`."""
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    return "flow_prediction" if flow else scheduler.config.prediction_type


@torch.no_grad()
def redenoise(
    pipe: Any,
    noise: Tensor,
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 5.5,
    inversion_guidance_scale: float = 1.0,
    num_rounds: int = 1,
    legacy_inversion: bool = False,
    **call_kwargs: Any,
) -> Tensor:
    """Golden noise by re-denoising; two model calls a round, and no training.

    Both model calls of a round are made at the first timestep, as the paper's.

    Args:
        pipe: a text-to-image pipeline; its noise schedule is used with DDIM's steps, or Euler's for a flow.
        noise: unit noise as `latents=` takes it, (B, C, H, W) or packed.
        num_inference_steps: of the schedule, so its first two levels are the step's ends: 10 for the paper's jump.
        guidance_scale: w_l, of the step down.
        inversion_guidance_scale: w_inv, of the step up.
        num_rounds: how often, each from the last round's result. Ours: small steps repeated go further along the
            prompt's direction than one large step does.
        legacy_inversion: step up between the second and the third level instead, as the official code did with
            diffusers 0.22 and later. With equal predictions it does not return to where it began.
        call_kwargs: of the pipeline: `prompt`, `height`, `width`, ...

    Returns:
        Like `noise`, float32.

    Raises:
        ValueError: an unknown noise schedule, too few steps, fewer than one round, or a result that is not finite.
    """
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be 1 or more, got {num_rounds}.")
    scheduler = pair_scheduler(pipe.scheduler)
    call = {**call_kwargs, "num_inference_steps": num_inference_steps}
    down, up = ({**call, _scale_name(pipe): w} for w in (guidance_scale, inversion_guidance_scale))
    x = noise.float()
    with scheduler_of(pipe, scheduler):
        for _ in range(num_rounds):
            guided = model_output(pipe, x.to(noise.dtype), down)
            levels, kind = schedule_levels(scheduler, 3 if legacy_inversion else 2), prediction_of(scheduler)
            lower = move(guided, x, levels[0], levels[1], kind)
            back = model_output(pipe, lower.to(noise.dtype), up)
            above, below = (levels[1], levels[2]) if legacy_inversion else (levels[0], levels[1])
            x = move(back, lower, below, above, kind)
    if not torch.isfinite(x).all():
        raise ValueError(
            "Re-denoising has given values that are not finite: the model overflows, or its noise schedule ends in"
            " zero signal (rescale_betas_zero_snr), where a noise prediction says nothing."
        )
    return x


def _scale_name(pipe: Any) -> str:
    parameters = inspect.signature(pipe.__call__).parameters
    for name in ("guidance_scale", "true_cfg_scale"):
        if name in parameters:
            return name
    raise ValueError(f"{type(pipe).__name__} has no guidance_scale, which re-denoising lives from.")
