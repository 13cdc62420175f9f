"""Null-text inversion: the embeddings with which guidance redraws a picture (Mokady et al., arXiv:2211.09794)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..core.pipeline import encode_prompts, prompt_per_row
from ..core.schedules import first_order_scheduler
from .editing import redraw
from .inversion import ddim_invert


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
    scheduler = first_order_scheduler(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps, device=pipe.device)
    prompts = prompt_per_row(prompt, latents)
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
    """Redraws an inverted picture with guided DDIM; returns the pipeline's output. `edit` changes it.

    Args:
        pipe: the pipeline of the inversion. Its scheduler is put back.
        inversion: of `null_text_invert`.
        call_kwargs: of the pipeline.
    """
    options = {
        "num_inference_steps": len(inversion.null_embeds),
        "guidance_scale": inversion.guidance_scale,
        **call_kwargs,
    }
    encoded = {"prompt_embeds": inversion.prompt_embeds}
    return redraw(pipe, encoded, inversion.noise, null_embeds=inversion.null_embeds, **options)
