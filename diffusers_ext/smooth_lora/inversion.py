"""Inversion: from an image to the noise that the model generates it from.

DDIM inversion (Song et al., arXiv:2010.02502; Dhariwal & Nichol 2021), as used in arXiv:2312.04410, and the
equivalent for flow models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.checks import check_counts, check_latents
from ..core.families import guidance_of, token_side
from ..core.hooks import parameters_of
from ..core.latents import image_size, starting_from, with_size
from ..core.pipeline import final_latents, given_latents, quiet, scheduler_of
from ..core.schedules import inverse_scheduler
from .calls import check_not_distilled, check_text_to_image, prompts_per_row, refuse

_REFUSED = {
    "num_images_per_prompt": "there is one image for each row of the latents",
    "output_type": "the result is the noise",
    "return_dict": "the result is the noise",
    "generator": "its steps draw nothing at random",
}


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError if `ddim_invert` does not work on the pipeline."""
    check_text_to_image(pipe)
    check_not_distilled(pipe)
    inverse_scheduler(pipe.scheduler)


def ddim_invert(
    pipe: Any,
    latents: Tensor,
    prompt: str | Sequence[str] | None = "",
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    **call_kwargs: Any,
) -> Tensor:
    """The noise from which DDIM generates the given latents, computed with its steps in reverse.

    A flow model uses Euler steps instead. Every step uses the prediction of the model at the noise level that
    it goes to, as the paper's code does.

    Args:
        pipe: a text-to-image pipeline. Its scheduler is restored afterwards.
        latents: (B, C, H, W) clean latents, see `diffusers_ext.encode_images`.
        prompt: description of the images: one text for all, or B texts. None if `prompt_embeds=` is given.
        num_inference_steps: number of steps. Use the same number to generate the images again.
        guidance_scale: w of u + w(c − u), where c and u are the outputs with and without the prompt; the input of the
            model if it has an embedded guidance scale, as that of Flux. 1 uses the prediction with the prompt only,
            on every pipeline. With larger values, sampling from the noise does not return to the same image.
        call_kwargs: arguments of the pipeline. The image size follows from the latents. Perturbed-attention guidance
            is off unless `pag_scale=` is given.

    Returns:
        Noise for `latents=`, in the layout that the pipeline takes: (B, C, H, W), or packed (B, tokens, 4C) as for
        Flux and Qwen-Image, which need `height=` and `width=` with it.

    Raises:
        ValueError: the pipeline or its scheduler is not supported, the number of prompts does not match the
            latents, or the latents have the wrong shape.
    """
    check_pipeline(pipe)
    refuse("ddim_invert", call_kwargs, _REFUSED)
    check_counts(num_inference_steps=num_inference_steps)
    check_latents(latents)
    call = {**_guided(pipe, guidance_scale), **call_kwargs, "num_inference_steps": num_inference_steps}
    if "pag_scale" in parameters_of(pipe):
        call.setdefault("pag_scale", 0.0)
    call = prompts_per_row({**call, "prompt": prompt}, latents)
    multiple = token_side(pipe)
    if latents.ndim != 4 or any(n % multiple for n in latents.shape[2:]):
        sizes = f" with H and W that are multiples of {multiple}" if multiple > 1 else ""
        raise ValueError(f"Expected latents (B, C, H, W){sizes}, got {tuple(latents.shape)}.")
    call = with_size(call, image_size(pipe, *latents.shape[2:]))
    call = starting_from(pipe, given_latents(pipe, latents), call)
    with scheduler_of(pipe, inverse_scheduler(pipe.scheduler)), quiet(pipe):
        return given_latents(pipe, final_latents(pipe, call))


def _guided(pipe: Any, scale: float) -> dict[str, Any]:
    guidance = guidance_of(pipe)
    if guidance.embedded is not None:
        return {**guidance.call(1.0), guidance.embedded: scale}
    return guidance.call(scale)
