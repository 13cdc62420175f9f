"""From a picture back to the noise that it would be drawn from.

DDIM inversion (Song et al., arXiv:2010.02502; Dhariwal & Nichol 2021), as arXiv:2312.04410 uses it to show what a
smooth latent space is good for, and the same for flow models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.families import pack, packs_latents
from ..core.pipeline import prompt_per_row, quiet, scheduler_of
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
    """The noise from which DDIM would draw these latents, by its steps in reverse; for a flow, the Euler steps.

    Every step takes the model's prediction at the level that it goes to, as the paper's code does.

    Args:
        pipe: Stable Diffusion, SDXL, SD3, Flux or a pipeline with their schedules. Its scheduler is put back.
        latents: (B, C, H, W) clean latents, see `diffusers_ext.encode_images`.
        prompt: one text for all, or B texts; describes the picture. None with `prompt_embeds=`.
        num_inference_steps: the same number redraws it.
        guidance_scale: 1 for the conditional prediction alone; with more the way back does not meet the way out.
        call_kwargs: of the pipeline. The pictures' size follows the latents.

    Returns:
        Noise for `latents=`: (B, C, H, W), or packed (B, tokens, 4C) where the pipeline packs its latents.

    Raises:
        ValueError: a scheduler of another kind, as many prompts as there are not latents, or latents of another
            shape.
    """
    inverse = inverse_scheduler(pipe.scheduler)
    if prompt is not None:
        call_kwargs["prompt"] = prompt_per_row(prompt, latents)
    channels = pipe.vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"Expected latents (B, {channels}, H, W), got {tuple(latents.shape)}.")
    for name, value in image_size(pipe, latents).items():
        if call_kwargs.setdefault(name, value) != value:
            raise ValueError(
                f"The latents are those of a picture of {name} {value}, got {call_kwargs[name]}."
            )
    start = pack(latents) if packs_latents(pipe) else latents
    with scheduler_of(pipe, inverse), quiet(pipe):
        return pipe(
            latents=start.to(pipe.device),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            **call_kwargs,
        ).images


def image_size(pipe: Any, latents: Tensor) -> dict[str, int]:
    """`height` and `width` of the pictures of latents (B, C, H, W)."""
    return {name: n * pipe.vae_scale_factor for name, n in zip(("height", "width"), latents.shape[2:])}
