"""Re-denoising: golden noise from the model itself, the target of NPNet (arXiv:2411.09502, section 3.1).

One step goes down from the highest noise level with a large guidance scale, and one step goes back up with a
small one. The difference stays in the noise. For a noise prediction ε both steps together are

    x'_T = x_T + k (ε_inv − ε_l),    k = σ_T − (α_T / α_s) σ_s,

where ε_l is the guided prediction of the step down and ε_inv the prediction of the step up. For a flow it is
x'_T = x_T + (σ_T − σ_s)(v_inv − v_l).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.hooks import parameters_of
from ..core.pipeline import model_output, scheduler_of
from ..core.predictions import Level, clean_prediction, noise_prediction
from ..core.schedules import first_order_scheduler, grid_levels, prediction_type


def move(output: Tensor, sample: Tensor, here: Level, there: Level, prediction_type: str) -> Tensor:
    """The deterministic (DDIM, Euler) step from the level `here` to the level `there`, up or down.

    `output` is the model's output for `sample` at `here`. On the way up it is evaluated at the level `there`,
    but interpreted as a prediction for a sample at `here`, as in `DDIMInverseScheduler`.
    """
    clean = clean_prediction(output, sample, *here, prediction_type)
    noise = noise_prediction(output, sample, *here, prediction_type)
    return there[0] * clean + there[1] * noise


def displacement_factor(top: Level, below: Level) -> float:
    """k of the module's formula, the factor from a difference of predictions to a change of the noise."""
    return top[1] - top[0] / below[0] * below[1]


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
    """Golden noise by re-denoising, with two model calls per round and without training.

    Both model calls of a round are made at the first timestep, as in the paper.

    Args:
        pipe: a text-to-image pipeline; its noise schedule is used with DDIM steps, or Euler steps for a flow.
        noise: unit-variance noise as passed in `latents=`, (B, C, H, W) or packed.
        num_inference_steps: number of steps of the schedule, whose first two levels are the ends of the step;
            10 gives the step size of the paper.
        guidance_scale: w_l, guidance scale of the step down.
        inversion_guidance_scale: w_inv, guidance scale of the step up.
        num_rounds: number of rounds, each of which starts from the result of the last. This is our addition:
            repeated small steps go further along the prompt's direction than one large step.
        legacy_inversion: step up between the second and the third level instead, as the official code did
            with diffusers 0.22 and later. With equal predictions it does not return to its start.
        call_kwargs: passed to the pipeline: `prompt`, `height`, `width`, ...

    Returns:
        Golden noise in the shape of `noise`, float32.

    Raises:
        ValueError: an unknown noise schedule, too few steps, fewer than one round, a pipeline without
            guidance, or a result that is not finite.
    """
    if num_rounds < 1:
        raise ValueError(f"num_rounds must be 1 or more, got {num_rounds}.")
    scheduler = first_order_scheduler(pipe.scheduler)
    call = {**call_kwargs, "num_inference_steps": num_inference_steps}
    down, up = ({**call, _scale_name(pipe): w} for w in (guidance_scale, inversion_guidance_scale))
    x = noise.float()
    with scheduler_of(pipe, scheduler):
        for _ in range(num_rounds):
            guided = model_output(pipe, x.to(noise.dtype), down)
            levels, kind = (
                _first_levels(scheduler, 3 if legacy_inversion else 2),
                str(prediction_type(scheduler)),
            )
            lower = move(guided, x, levels[0], levels[1], kind)
            back = model_output(pipe, lower.to(noise.dtype), up)
            above, below = (levels[1], levels[2]) if legacy_inversion else (levels[0], levels[1])
            x = move(back, lower, below, above, kind)
    if not torch.isfinite(x).all():
        raise ValueError(
            "Re-denoising gave values that are not finite: the model overflows, or its noise schedule ends at zero"
            " SNR (rescale_betas_zero_snr), where a noise prediction contains no information."
        )
    return x


def _scale_name(pipe: Any) -> str:
    parameters = parameters_of(pipe)
    for name in ("guidance_scale", "true_cfg_scale"):
        if name in parameters:
            return name
    raise ValueError(f"{type(pipe).__name__} has no guidance_scale, which re-denoising needs.")


def _first_levels(scheduler: Any, count: int) -> list[Level]:
    levels = grid_levels(scheduler)
    if len(levels) < count:
        raise ValueError(f"Re-denoising needs num_inference_steps of at least {count}, got {len(levels)}.")
    return levels[:count]
