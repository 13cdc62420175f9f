"""From a picture back to the noise that it would be drawn from, and to the embeddings that redraw it with guidance.

DDIM inversion (Song et al., arXiv:2010.02502; Dhariwal & Nichol 2021) and null-text inversion (Mokady et al.,
arXiv:2211.09794), as arXiv:2312.04410 uses them to show what a smooth latent space is good for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..pipeline_calls import encode_prompts
from ..pipeline_hooks import quiet


def _noise_predictor(pipe: Any) -> Any:
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise ValueError(
            f"DDIM inversion follows the noise schedule backwards, and {type(pipe.scheduler).__name__} has no"
            " alphas_cumprod: use a Stable Diffusion or SDXL pipeline."
        )
    return DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)


@torch.no_grad()
def encode_pictures(pipe: Any, pictures: np.ndarray | Tensor) -> Tensor:
    """Latents of pictures, the posterior's mean times the scaling factor.

    Args:
        pipe: a pipeline with a `vae`.
        pictures: (n, h, w, 3) in [0, 1] as pipelines return them, or a tensor (n, 3, h, w).

    Raises:
        ValueError: another layout or range, or a size that the autoencoder cannot halve evenly.
    """
    x = pictures if isinstance(pictures, Tensor) else torch.from_numpy(np.asarray(pictures)).movedim(-1, 1)
    factor = pipe.vae_scale_factor
    if x.ndim != 4 or x.shape[1] != 3 or not torch.isfinite(x).all() or x.min() < 0 or x.max() > 1:
        raise ValueError(
            f"Expected pictures (n, h, w, 3) in [0, 1] or a tensor (n, 3, h, w), got {tuple(pictures.shape)} of"
            f" {pictures.dtype}."
        )
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(
            f"Pictures must be multiples of {factor} high and wide, got {x.shape[2]} × {x.shape[3]}: resize or crop."
        )
    x = (2 * x - 1).to(pipe.device, pipe.vae.dtype)
    latents = pipe.vae.encode(x).latent_dist.mode() - (getattr(pipe.vae.config, "shift_factor", None) or 0)
    return latents * pipe.vae.config.scaling_factor


def ddim_invert(
    pipe: Any,
    latents: Tensor,
    prompt: str | Sequence[str] = "",
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    **call_kwargs: Any,
) -> Tensor:
    """The noise from which DDIM would draw these latents, by its steps in reverse.

    Every step takes the model's prediction at the level that it goes to, as the paper's code does.

    Args:
        pipe: Stable Diffusion, SDXL or another pipeline with their noise schedule. Its scheduler is put back.
        latents: (B, C, H, W) clean latents, see `encode_pictures`.
        prompt: one text for all, or B texts; describes the picture.
        num_inference_steps: the same number redraws it.
        guidance_scale: 1 for the conditional prediction alone; with more the way back does not meet the way out.
        call_kwargs: of the pipeline. The pictures' size follows the latents.

    Returns:
        (B, C, H, W) noise for `latents=`.

    Raises:
        ValueError: a flow pipeline, as many prompts as there are not latents, or latents of another shape.
    """
    forward = _noise_predictor(pipe)
    prompts = _prompts(prompt, latents)
    channels = pipe.vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise ValueError(f"Expected latents (B, {channels}, H, W), got {tuple(latents.shape)}.")
    size = {name: n * pipe.vae_scale_factor for name, n in zip(("height", "width"), latents.shape[2:])}
    for name, value in size.items():
        if call_kwargs.setdefault(name, value) != value:
            raise ValueError(
                f"The latents are those of a picture of {name} {value}, got {call_kwargs[name]}."
            )
    original = pipe.scheduler
    try:
        pipe.scheduler = DDIMInverseScheduler.from_config(forward.config)
        with quiet(pipe):
            return pipe(
                prompts,
                latents=latents.to(pipe.device),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
                **call_kwargs,
            ).images
    finally:
        pipe.scheduler = original


def _prompts(prompt: str | Sequence[str], latents: Tensor) -> list[str]:
    prompts = [prompt] * len(latents) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(latents):
        raise ValueError(f"{len(latents)} latents need one prompt or as many; got {len(prompts)}.")
    return prompts


@dataclass(frozen=True)
class NullTextInversion:
    """What redraws a picture under guidance: `reconstruct(pipe, inversion)`.

    Attributes:
        noise: (B, C, H, W), for `latents=`.
        null_embeds: (steps, B, tokens, width), the unconditional embeddings of every step.
        prompt_embeds: (B, tokens, width).
        guidance_scale: that they were optimised for.
        losses: (steps,) squared error at the end of every step's optimisation.
    """

    noise: Tensor
    null_embeds: Tensor
    prompt_embeds: Tensor
    guidance_scale: float
    losses: Tensor


def null_text_invert(
    pipe: Any,
    latents: Tensor,
    prompt: str | Sequence[str],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.5,
    num_inner_steps: int = 10,
    learning_rate: float = 1e-2,
    early_stop: float = 1e-5,
    progress: bool = True,
) -> NullTextInversion:
    """Unconditional embeddings, one for every step, with which guided DDIM redraws the picture.

    The steps of the inversion without guidance are the path; at every step Adam moves the unconditional embeddings, from
    those of the step before, until guided DDIM stays on it. Computed in float32.

    Args:
        pipe: `StableDiffusionPipeline` or a subclass, in float32.
        latents, prompt: as for `ddim_invert`.
        num_inference_steps, guidance_scale: of the redrawing.
        num_inner_steps: optimiser steps at most, for each step; 0 keeps the empty prompt.
        learning_rate: at the first step; it falls by a hundredth of it a step, to no less than a hundredth.
        early_stop: the squared error at which a step's optimisation ends, rising by twice that a step.
        progress: show a bar.

    Raises:
        ValueError: another kind of pipeline, half precision, or what `ddim_invert` refuses.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None or unet.config.addition_embed_type is not None:
        raise ValueError(
            f"Null-text inversion is for Stable Diffusion's conditioning, which {type(pipe).__name__} does not have."
        )
    if unet.dtype != torch.float32:
        raise ValueError(
            f"Null-text inversion optimises in float32, the pipeline is {unet.dtype}: load it in float32."
        )
    if num_inner_steps < 0 or learning_rate <= 0:
        raise ValueError("num_inner_steps must be 0 or more and learning_rate above 0.")
    scheduler = _noise_predictor(pipe)
    scheduler.set_timesteps(num_inference_steps, device=pipe.device)
    prompts = _prompts(prompt, latents)
    path = _inversion_path(pipe, latents, prompts, num_inference_steps)
    text = encode_prompts(pipe, prompts)
    null, chosen, losses = text["negative_prompt_embeds"], [], []
    x = path[0]
    steps = tqdm(scheduler.timesteps, disable=not progress, desc="null-text inversion")
    for number, (t, target) in enumerate(zip(steps, path[1:])):
        with torch.no_grad():
            conditional = unet(x, t, encoder_hidden_states=text["prompt_embeds"]).sample

        def step(embeds: Tensor, x: Tensor = x, t: Any = t, conditional: Tensor = conditional) -> Tensor:
            free = unet(x, t, encoder_hidden_states=embeds).sample
            return scheduler.step(free + guidance_scale * (conditional - free), t, x).prev_sample

        rate = learning_rate * max(1 - number / 100, 0.01)
        null = _optimise(step, null, target, num_inner_steps, rate, early_stop * (1 + 2 * number))
        with torch.no_grad():
            x = step(null)
        chosen.append(null)
        losses.append(F.mse_loss(x, target))
    return NullTextInversion(
        path[0], torch.stack(chosen), text["prompt_embeds"], guidance_scale, torch.stack(losses)
    )


def _optimise(step: Any, start: Tensor, target: Tensor, count: int, rate: float, enough: float) -> Tensor:
    embeds = start.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([embeds], lr=rate)
    with torch.enable_grad():
        for _ in range(count):
            loss = F.mse_loss(step(embeds), target)
            if float(loss.detach()) < enough:
                break
            (embeds.grad,) = torch.autograd.grad(loss, embeds)
            optimizer.step()
    return embeds.detach()


def _inversion_path(pipe: Any, latents: Tensor, prompts: list[str], steps: int) -> list[Tensor]:
    """Latents from the noise down to the picture, as inversion went through them."""
    seen: list[Tensor] = [latents.to(pipe.device)]

    def keep(pipe: Any, number: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    ddim_invert(pipe, latents, prompts, num_inference_steps=steps, callback_on_step_end=keep)
    return seen[::-1]


@torch.no_grad()
def reconstruct(pipe: Any, inversion: NullTextInversion, **call_kwargs: Any) -> Any:
    """Redraws an inverted picture with guided DDIM; returns the pipeline's output.

    Args:
        pipe: the pipeline of the inversion. Its scheduler is put back.
        inversion: of `null_text_invert`.
        call_kwargs: of the pipeline; `prompt_embeds=` of another prompt edits the picture.
    """
    height, width = (n * pipe.vae_scale_factor for n in inversion.noise.shape[2:])
    given = {"prompt_embeds": inversion.prompt_embeds, "height": height, "width": width, **call_kwargs}
    batch = len(inversion.noise)

    def next_null(pipe: Any, number: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if number + 1 < len(inversion.null_embeds):
            tensors["prompt_embeds"] = torch.cat(
                [inversion.null_embeds[number + 1], tensors["prompt_embeds"][batch:]]
            )
        return tensors

    original = pipe.scheduler
    try:
        pipe.scheduler = _noise_predictor(pipe)
        with quiet(pipe):
            return pipe(
                **given,
                negative_prompt_embeds=inversion.null_embeds[0],
                latents=inversion.noise,
                num_inference_steps=len(inversion.null_embeds),
                guidance_scale=inversion.guidance_scale,
                callback_on_step_end=next_null,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
            )
    finally:
        pipe.scheduler = original
