"""Re-denoising: golden noise from the model itself, the target of NPNet (arXiv:2411.09502, section 3.1).

One step goes down from the highest noise level with a large guidance scale, and one step goes back up with a
small one. The difference stays in the noise. Models without a guidance scale have another gap, see `gaps`. For a noise prediction ε both steps together are

    x'_T = x_T + k (ε_inv − ε_l),    k = σ_T − (α_T / α_s) σ_s,

where ε_l is the guided prediction of the step down and ε_inv the prediction of the step up. For a flow it is
x'_T = x_T + (σ_T − σ_s)(v_inv − v_l).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_counts, check_finite, check_latents
from ..core.families import check_starts_from_noise, check_steps
from ..core.latents import with_latents
from ..core.pipeline import scheduler_of
from ..core.predictions import Level, clean_prediction, noise_prediction
from ..core.schedules import first_order_scheduler, grid_levels, prediction_type
from .gaps import WEIGHTS, Gap, gap_of, sides

# σ of a flow that a step goes down: the first of 10 steps, as in the paper, without shift.
FLOW_JUMP = 0.1


def move(output: Tensor, sample: Tensor, here: Level, there: Level, prediction_type: str) -> Tensor:
    """The deterministic (DDIM, Euler) step from the level `here` to the level `there`, up or down.

    `output` is the model's output for `sample` at `here`. On the way up it is evaluated at the level `there`,
    but interpreted as a prediction for a sample at `here`, as in `DDIMInverseScheduler`.
    """
    clean = clean_prediction(output, sample, *here, prediction_type)
    noise = noise_prediction(output, sample, *here, prediction_type)
    return there[0] * clean + there[1] * noise


def level_below(top: Level, jump: float, *, flow: bool) -> Level:
    """The level whose σ/(α + σ) is lower than that of `top` by `jump`.

    Args:
        top: (α, σ).
        jump: the difference, above 0.
        flow: α + σ = 1 for both levels; otherwise α² + σ² is that of `top`.

    Raises:
        ValueError: the level would be that of the data, or lower.
    """
    share = top[1] / (top[0] + top[1])
    if not 0 < jump < share:
        raise ValueError(
            f"jump must be above 0 and below {share:.4g}, the first σ/(α + σ) of the schedule, got {jump}."
        )
    below = share - jump
    if flow:
        return 1 - below, below
    factor = math.hypot(*top) / math.hypot(1 - below, below)
    return factor * (1 - below), factor * below


def displacement_factor(top: Level, below: Level) -> float:
    """k of the module's formula, the factor from a difference of predictions to a change of the noise."""
    return top[1] - top[0] / below[0] * below[1]


@torch.no_grad()
def redenoise(
    pipe: Any,
    noise: Tensor,
    *,
    gap: Gap | None = None,
    num_inference_steps: int | None = None,
    jump: float | None = None,
    guidance_scale: float | None = None,
    inversion_guidance_scale: float | None = None,
    num_rounds: int = 1,
    legacy_inversion: bool = False,
    **call_kwargs: Any,
) -> Tensor:
    """Golden noise by re-denoising, with two model calls per round and without training.

    Both model calls of a round are made at the first timestep, as in the paper.

    Args:
        pipe: a text-to-image or text-to-video pipeline; its noise schedule is used with DDIM steps, or Euler steps
            for a flow.
        noise: unit-variance noise in the layout of `latents=`: (B, C, H, W), packed (B, tokens, 4C), ...
        gap: what makes the step down differ from the step up: "guidance", "embedding" or "cfg", see
            `golden_noise.gaps`. None for the one that the pipeline has.
        num_inference_steps: number of steps of the schedule, whose first level is the upper end of the step. Without
            `jump`, the second is the lower end; 10 gives the step size of the paper. Default: 50.
        jump: how far the step goes down, as the difference of σ/(α + σ) between its ends, for levels αx₀ + σε. For a
            flow this is the difference of its σ, after the shift. Default: 0.1 for a flow without
            `num_inference_steps`, the first of 10 steps without shift; None, `num_inference_steps`, for all others.
        guidance_scale: w_l, the weight of the step down. Default: 5.5, or 1.5 for `gap="embedding"`.
        inversion_guidance_scale: w_inv, the weight of the step up. Default: 1, or 0.5 for `gap="embedding"`.
        num_rounds: number of rounds, each of which starts from the result of the last. This is our addition:
            repeated small steps go further along the prompt's direction than one large step.
        legacy_inversion: step up between the second and the third level instead, as the official code did
            with diffusers 0.22 and later. With equal predictions it does not return to its start. Not with `jump`.
        call_kwargs: passed to the pipeline: `prompt`, `height`, `width`, `clip_skip`, ...

    Returns:
        Golden noise in the shape of `noise`, float32.

    Raises:
        ValueError: noise that does not have the shape of the pipeline's, an unknown noise schedule, too few steps, a
            jump that does not end above the data, fewer than one round, a pipeline that does not start from noise or
            does not have this gap (see `gap_of`, `guided_call` and `blended`), or a result that is not finite.
    """
    check_counts(num_rounds=num_rounds)
    check_latents(noise, "noise")
    check_starts_from_noise(pipe)
    check_steps(pipe)
    settled = settle(
        pipe,
        gap=gap,
        num_inference_steps=num_inference_steps,
        jump=jump,
        guidance_scale=guidance_scale,
        inversion_guidance_scale=inversion_guidance_scale,
        legacy_inversion=legacy_inversion,
    )
    jump = settled["jump"]
    call = {**call_kwargs, "num_inference_steps": settled["num_inference_steps"]}
    weights = settled["guidance_scale"], settled["inversion_guidance_scale"]
    down, up = sides(pipe, call, settled["gap"], weights)
    placed = with_latents(pipe, noise, down.call)
    size = {name: placed[name] for name in ("height", "width", "use_resolution_binning") if name in placed}
    down, up = (replace(side, call={**side.call, **size}) for side in (down, up))
    scheduler = first_order_scheduler(pipe.scheduler)
    x = noise.float()
    with scheduler_of(pipe, scheduler):
        for _ in range(num_rounds):
            guided = down.output(pipe, x.to(noise.dtype))
            kind = str(prediction_type(scheduler))
            if jump is None:
                levels = _first_levels(scheduler, 3 if legacy_inversion else 2)
            else:
                (top,) = _first_levels(scheduler, 1)
                levels = [top, level_below(top, jump, flow=kind == "flow_prediction")]
            lower = move(guided, x, levels[0], levels[1], kind)
            back = up.output(pipe, lower.to(noise.dtype))
            above, below = (levels[1], levels[2]) if legacy_inversion else (levels[0], levels[1])
            x = move(back, lower, below, above, kind)
    if not torch.isfinite(x).all():
        raise ValueError(
            "Re-denoising gave values that are not finite: the model overflows, or its noise schedule ends at zero"
            " SNR (rescale_betas_zero_snr), where a noise prediction contains no information."
        )
    return x


def settle(
    pipe: Any,
    *,
    gap: Gap | None = None,
    num_inference_steps: int | None = None,
    jump: float | None = None,
    guidance_scale: float | None = None,
    inversion_guidance_scale: float | None = None,
    legacy_inversion: bool = False,
) -> dict[str, Any]:
    """These arguments of `redenoise`, with the defaults for this pipeline in place of None.

    Raises:
        ValueError: see `gap_of`; a count below 1, a jump of 0 or less, or one with `legacy_inversion`.
    """
    gap = gap_of(pipe, gap)
    weights = [
        default if given is None else given
        for default, given in zip(WEIGHTS[gap], (guidance_scale, inversion_guidance_scale))
    ]
    if jump is not None:
        check_finite(jump=jump)
        if jump <= 0 or legacy_inversion:
            raise ValueError(
                f"legacy_inversion goes up between levels of the schedule, got jump={jump} as well. Use"
                " num_inference_steps for the length of its steps."
                if legacy_inversion
                else f"jump must be above 0, got {jump}: it is how far the step goes down."
            )
    elif num_inference_steps is None and not legacy_inversion and _is_flow(pipe.scheduler):
        jump = FLOW_JUMP
    num_inference_steps = 50 if num_inference_steps is None else num_inference_steps
    check_counts(num_inference_steps=num_inference_steps)
    return {
        "gap": gap,
        "num_inference_steps": num_inference_steps,
        "jump": jump,
        "guidance_scale": weights[0],
        "inversion_guidance_scale": weights[1],
        "legacy_inversion": legacy_inversion,
    }


def _is_flow(scheduler: Any) -> bool:
    return prediction_type(scheduler) == "flow_prediction"


def _first_levels(scheduler: Any, count: int) -> list[Level]:
    levels = grid_levels(scheduler)
    if len(levels) < count:
        raise ValueError(f"Re-denoising needs num_inference_steps of at least {count}, got {len(levels)}.")
    return levels[:count]
