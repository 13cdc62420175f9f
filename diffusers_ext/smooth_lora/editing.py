"""Editing of inverted images by a change of prompt during sampling (arXiv:2312.04410, section 4.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.pipeline import call_pipeline, prompt_per_row, quiet, scheduler_of
from ..core.prompts import encode_prompts
from ..core.schedules import first_order_scheduler
from .inversion import image_size

# {tensor of a pipeline's callback: the prompt encoding that it holds}
_IN_CALLBACK = {
    "prompt_embeds": "prompt_embeds",
    "add_text_embeds": "pooled_prompt_embeds",
    "pooled_prompt_embeds": "pooled_prompt_embeds",
}


@torch.no_grad()
def edit(
    pipe: Any,
    prompt: str | Sequence[str],
    target_prompt: str | Sequence[str],
    *,
    latents: Tensor,
    strength: float = 0.7,
    null_embeds: Tensor | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    **call_kwargs: Any,
) -> Any:
    """Generates images from inverted noise, first with their own prompt and then with the target prompt.

        noise = dx.ddim_invert(pipe, latents, "a red bag")
        image = dx.edit(pipe, "a red bag", "a blue bag", latents=noise, guidance_scale=2.0).images[0]

    The pipeline samples with DDIM, or with Euler steps if it is a flow model. Its scheduler is restored
    afterwards.

    Args:
        pipe: a Stable Diffusion, SDXL, SD3 or Flux pipeline. On Flux, only the token embeddings of the prompt
            change during sampling, not the pooled ones.
        prompt: description of the inverted images: one text for all, or one per image.
        target_prompt: description of the edited images: one text for all, or one per image.
        latents: the noise of the images, from `ddim_invert` or `null_text_invert(...).noise`.
        strength: share of the steps that use the target prompt, in [0, 1]. 0 reconstructs the image; 1
            generates a new one from its noise. The paper uses 0.6 to 0.9.
        null_embeds: `null_text_invert(...).null_embeds`. The number of steps and the guidance scale must be
            those of the inversion.
        num_inference_steps, guidance_scale, call_kwargs: arguments of the pipeline.

    Returns:
        The output of the pipeline.

    Raises:
        ValueError: the strength is outside [0, 1], the number of prompts does not match the latents,
            `null_embeds` are for another number of steps or used without guidance, or the scheduler has no
            first-order equivalent.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}.")
    guided = guidance_scale > 1
    before, after = (
        encode_prompts(pipe, prompt_per_row(text, latents), guided) for text in (prompt, target_prompt)
    )
    switch = round((1 - strength) * num_inference_steps)
    if switch == 0:
        before = after
    return redraw(
        pipe,
        before,
        latents,
        then=after,
        switch=switch,
        null_embeds=null_embeds,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        **call_kwargs,
    )


def redraw(
    pipe: Any,
    encoded: dict[str, Tensor],
    latents: Tensor,
    *,
    then: dict[str, Tensor] | None = None,
    switch: int = 0,
    null_embeds: Tensor | None = None,
    num_inference_steps: int,
    guidance_scale: float,
    **call_kwargs: Any,
) -> Any:
    """Samples from `latents` with embeddings that change during sampling.

    Args:
        pipe, latents, null_embeds, num_inference_steps, guidance_scale, call_kwargs: see `edit`. The image
            size follows from the latents unless they are packed.
        encoded: the encoded prompt, from `encode_prompts`.
        then: the encoded prompt to use from step `switch` on.

    Returns:
        The output of the pipeline.

    Raises:
        ValueError: see `edit`.
    """
    if null_embeds is not None and (len(null_embeds) != num_inference_steps or guidance_scale <= 1):
        raise ValueError(
            f"null_embeds were made for {len(null_embeds)} steps with guidance, got num_inference_steps"
            f" {num_inference_steps} and guidance_scale {guidance_scale}: use the values of the inversion."
        )
    if null_embeds is not None:
        encoded = {**encoded, "negative_prompt_embeds": null_embeds[0]}
    size = image_size(pipe, latents) if latents.ndim == 4 else {}
    batch = len(latents)
    wanted = [name for name in _IN_CALLBACK if name in pipe._callback_tensor_inputs]

    def next_step(pipe: Any, number: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if null_embeds is not None and number + 1 < num_inference_steps:
            positive = tensors["prompt_embeds"][-batch:]
            tensors["prompt_embeds"] = torch.cat([null_embeds[number + 1].to(positive), positive])
        if then is not None and number + 1 == switch:
            for name in wanted:
                # Under guidance the negative prompt's rows come first.
                target = then[_IN_CALLBACK[name]].to(tensors[name])
                tensors[name] = torch.cat([tensors[name][:-batch], target])
        return tensors

    with scheduler_of(pipe, first_order_scheduler(pipe.scheduler)), quiet(pipe):
        return call_pipeline(
            pipe,
            **{**encoded, **size, **call_kwargs},
            latents=latents,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            callback_on_step_end=next_step,
            callback_on_step_end_tensor_inputs=wanted,
        )
