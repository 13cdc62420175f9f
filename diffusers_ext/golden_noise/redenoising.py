"""Re-denoising: golden noise from the model itself, the target of NPNet (arXiv:2411.09502, section 3.1).

One step goes down from the highest noise level with a large guidance scale, and one step goes back up with a
small one. The difference stays in the noise. For a noise prediction ε both steps together are

    x'_T = x_T + k (ε_inv − ε_l),    k = σ_T − (α_T / α_s) σ_s,

where ε_l is the guided prediction of the step down and ε_inv the prediction of the step up. For a flow it is
x'_T = x_T + (σ_T − σ_s)(v_inv − v_l).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_counts, check_latents
from ..core.families import check_starts_from_noise, guidance_of
from ..core.latents import with_latents
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
        pipe: a text-to-image or text-to-video pipeline with guidance; its noise schedule is used with DDIM
            steps, or Euler steps for a flow.
        noise: unit-variance noise in the layout of `latents=`: (B, C, H, W), packed (B, tokens, 4C), ...
        num_inference_steps: number of steps of the schedule, whose first two levels are the ends of the step;
            10 gives the step size of the paper.
        guidance_scale: w_l, guidance scale of the step down; see `guided_call`.
        inversion_guidance_scale: w_inv, guidance scale of the step up.
        num_rounds: number of rounds, each of which starts from the result of the last. This is our addition:
            repeated small steps go further along the prompt's direction than one large step.
        legacy_inversion: step up between the second and the third level instead, as the official code did
            with diffusers 0.22 and later. With equal predictions it does not return to its start.
        call_kwargs: passed to the pipeline: `prompt`, `height`, `width`, `clip_skip`, ...

    Returns:
        Golden noise in the shape of `noise`, float32.

    Raises:
        ValueError: noise that does not have the shape of the pipeline's, an unknown noise schedule, too few steps,
            fewer than one round, a pipeline that does not start from noise or has no guidance (see `guided_call`), or a
            result that is not finite.
    """
    check_counts(num_rounds=num_rounds, num_inference_steps=num_inference_steps)
    check_latents(noise, "noise")
    check_starts_from_noise(pipe)
    call = {**call_kwargs, "num_inference_steps": num_inference_steps}
    down, up = (guided_call(pipe, call, w) for w in (guidance_scale, inversion_guidance_scale))
    down = with_latents(pipe, noise, down)  # encodes the prompt, so once for both
    up |= {name: down[name] for name in ("height", "width", "use_resolution_binning") if name in down}
    scheduler = first_order_scheduler(pipe.scheduler)
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


def guided_call(pipe: Any, call: Mapping[str, Any], weight: float) -> dict[str, Any]:
    """`call` with the guidance scale `weight`, by the argument of the pipeline that has an effect.

    Args:
        pipe: the pipeline.
        call: the other arguments.
        weight: the scale that the denoiser is given as an input, where it takes one (Flux.1 dev, Flux.2).
            Otherwise w ≥ 1 of classifier-free guidance u + w(c − u): `true_cfg_scale` with the negative prompt of
            the call or a blank one (Qwen-Image, Flux.1 schnell), or `guidance_scale`, which is w − 1 in Z-Image.

    Raises:
        ValueError: the pipeline has no guidance, `call` sets its scale or has `ip_adapter_image_embeds`, or w is
            below 1.
    """
    guidance = guidance_of(pipe)
    name = guidance.embedded or guidance.argument
    if name is None:
        raise ValueError(
            f"{type(pipe).__name__} has no guidance scale that has an effect, as models that were distilled to a few"
            " steps. Re-denoising keeps the difference between two scales in the noise, so it needs a model with"
            " guidance."
        )
    if name in call:
        raise ValueError(
            f"The scale of {type(pipe).__name__} is set by guidance_scale and inversion_guidance_scale of"
            f" re-denoising, got {name}={call[name]!r} as well. Leave it out."
        )
    if guidance.embedded:
        return {**call, name: weight}
    if call.get("ip_adapter_image_embeds") is not None:
        raise ValueError(
            "ip_adapter_image_embeds are of another shape with guidance than without, and re-denoising makes calls of"
            " both kinds. Give ip_adapter_image instead."
        )
    if weight < 1:
        raise ValueError(
            f"Classifier-free guidance scales must be 1 or more, got {weight:g}: below 1 pipelines turn guidance off."
        )
    added: dict[str, Any] = guidance.call(weight)
    if "negative_prompt" in added:
        added["negative_prompt"] = _blank_prompts(added["negative_prompt"], call)
    given = {key: value for key, value in call.items() if value is not None}
    return {**call, **({} if "negative_prompt_embeds" in given else added), **given, name: added[name]}


def _blank_prompts(blank: str, call: Mapping[str, Any]) -> str | list[str]:
    """As many as there are prompts."""
    prompt = call.get("prompt")
    rows = call.get("prompt_embeds") if prompt is None else prompt
    return blank if isinstance(rows, str) or rows is None else [blank] * len(rows)


def _first_levels(scheduler: Any, count: int) -> list[Level]:
    levels = grid_levels(scheduler)
    if len(levels) < count:
        raise ValueError(f"Re-denoising needs num_inference_steps of at least {count}, got {len(levels)}.")
    return levels[:count]
