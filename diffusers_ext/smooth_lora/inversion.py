"""Inversion: from an image to the noise that the model generates it from.

DDIM inversion (Song et al., arXiv:2010.02502; Dhariwal & Nichol 2021), as used in arXiv:2312.04410, and the
equivalent for flow models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.families import pack, packs_latents
from ..core.pipeline import call_pipeline, prompt_per_row, quiet, scheduler_of
from ..core.schedules import inverse_scheduler


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
        pipe: a Stable Diffusion, SDXL, SD3 or Flux pipeline, or one with the same schedules. Its scheduler is
            restored afterwards.
        latents: (B, C, H, W) clean latents, see `diffusers_ext.encode_images`.
        prompt: description of the images: one text for all, or B texts. None if `prompt_embeds=` is given.
        num_inference_steps: number of steps. Use the same number to generate the images again.
        guidance_scale: 1 uses the conditional prediction only. With larger values, sampling from the noise
            does not return to the same image.
        call_kwargs: arguments of the pipeline. The image size follows from the latents.

    Returns:
        Noise for `latents=`: (B, C, H, W), or packed (B, tokens, 4C) if the pipeline packs its latents.

    Raises:
        ValueError: the scheduler is not supported, the number of prompts does not match the latents, or the
            latents have the wrong shape.
    """
    inverse = inverse_scheduler(pipe.scheduler)
    if prompt is not None:
        call_kwargs["prompt"] = prompt_per_row(prompt, latents)
    channels = pipe.vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"Expected latents (B, {channels}, H, W), got {tuple(latents.shape)}.")
    for name, value in image_size(pipe, latents).items():
        if call_kwargs.setdefault(name, value) != value:
            raise ValueError(f"The latents belong to an image of {name} {value}, got {call_kwargs[name]}.")
    start = pack(latents) if packs_latents(pipe) else latents
    with scheduler_of(pipe, inverse), quiet(pipe):
        return call_pipeline(
            pipe,
            latents=start.to(pipe.device),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            **call_kwargs,
        ).images


def image_size(pipe: Any, latents: Tensor) -> dict[str, int]:
    """`height` and `width` of the images for latents (B, C, H, W)."""
    return {name: n * pipe.vae_scale_factor for name, n in zip(("height", "width"), latents.shape[2:])}
