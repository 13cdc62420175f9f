"""Null-text inversion: unconditional embeddings with which guided sampling reconstructs an image.

Mokady et al., *Null-text Inversion for Editing Real Images using Guided Diffusion Models*, arXiv:2211.09794.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..core.checks import check_counts, check_latents
from ..core.latents import starting_from
from ..core.pipeline import prompt_per_row
from ..core.prompts import encode_prompts
from ..core.schedules import first_order_scheduler
from . import inversion
from .editing import FirstSteps, continued, null_text


@dataclass(frozen=True)
class NullTextInversion:
    """The result of `null_text_invert`, for `reconstruct` and `edit`.

    Attributes:
        noise: (B, C, H, W), for `latents=`.
        null_embeds: (steps, B, tokens, width), the unconditional embeddings of every step.
        prompt_embeds: (B, tokens, width).
        guidance_scale: the scale that the embeddings were optimized for.
        losses: (steps,) squared error at the end of the optimization of every step.
    """

    noise: Tensor
    null_embeds: Tensor
    prompt_embeds: Tensor
    guidance_scale: float
    losses: Tensor


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError if `null_text_invert` does not work on the pipeline."""
    name = type(pipe).__name__
    if not isinstance(pipe, StableDiffusionPipeline):
        raise ValueError(
            f"Null-text inversion needs the conditioning and the guidance of StableDiffusionPipeline, which {name}"
            " does not have. Load the model with it, or use ddim_invert."
        )
    inversion.check_pipeline(pipe)
    if pipe.unet.config.encoder_hid_dim_type is not None:
        raise ValueError(
            f"Null-text inversion has no image prompts, and {name} has an IP-Adapter. Call"
            " pipe.unload_ip_adapter() first."
        )
    # With layerwise casting, the dtype of the model is not that of its weights.
    other = {value.dtype for value in pipe.unet.parameters()} - {torch.float32}
    if other:
        raise ValueError(
            f"Null-text inversion optimizes in float32, and the UNet of {name} has weights of"
            f" {', '.join(sorted(map(str, other)))}: load it in float32, without layerwise casting."
        )


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
    """Optimizes unconditional embeddings, one per step, so that guided DDIM reconstructs the images.

    Inversion without guidance gives the path. At every step, Adam optimizes the unconditional embeddings,
    starting from those of the step before, until guided DDIM follows the path. Computed in float32.

    Args:
        pipe: `StableDiffusionPipeline` or a subclass, in float32.
        latents, prompt: see `ddim_invert`.
        num_inference_steps, guidance_scale: settings of the reconstruction.
        num_inner_steps: maximum number of optimizer steps per sampling step. 0 keeps the embeddings of the
            empty prompt.
        learning_rate: learning rate at the first step. It decreases by 1% of this value per step, down to 1%.
        early_stop: squared error at which the optimization of the first step stops. It increases by twice
            this value per step.
        progress: show a progress bar.

    Returns:
        A `NullTextInversion`.

    Raises:
        ValueError: the pipeline is of another kind or in half precision, a number is out of range, or
            `ddim_invert` raises an error.
    """
    check_pipeline(pipe)
    check_counts(num_inference_steps=num_inference_steps)
    check_latents(latents)
    if torch.is_inference_mode_enabled() or latents.is_inference():
        raise ValueError(
            "Null-text inversion needs gradients, which torch.inference_mode() does not allow: call it and make the"
            " latents outside, or under torch.no_grad()."
        )
    if num_inner_steps < 0 or learning_rate <= 0:
        raise ValueError(
            f"Expected num_inner_steps of 0 or more and learning_rate above 0, got {num_inner_steps} and"
            f" {learning_rate}."
        )
    if guidance_scale <= 1:
        raise ValueError(
            f"guidance_scale must be above 1, got {guidance_scale}: without guidance the unconditional embeddings have"
            " no effect. Use ddim_invert."
        )
    unet, scheduler = pipe.unet, first_order_scheduler(pipe.scheduler)
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
    """The latents of all inversion steps, from the noise to the clean latents."""
    seen: list[Tensor] = [latents.to(pipe.device)]

    def keep(pipe: Any, number: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    inversion.ddim_invert(pipe, latents, prompts, num_inference_steps=steps, callback_on_step_end=keep)
    return seen[::-1]


@torch.no_grad()
def reconstruct(pipe: Any, inversion: NullTextInversion, **call_kwargs: Any) -> Any:
    """Generates an inverted image again with guided DDIM. Use `edit` to change it.

    Args:
        pipe: the pipeline of the inversion. Its scheduler is restored afterwards.
        inversion: the result of `null_text_invert`.
        call_kwargs: arguments of the pipeline.

    Returns:
        The output of the pipeline.

    Raises:
        ValueError: see `null_text_invert` and `edit`.
    """
    check_pipeline(pipe)
    call = {
        "num_inference_steps": len(inversion.null_embeds),
        "guidance_scale": inversion.guidance_scale,
        **call_kwargs,
        "prompt_embeds": inversion.prompt_embeds,
    }
    call |= null_text(pipe, inversion.null_embeds, call)
    return continued(pipe, starting_from(pipe, inversion.noise, call), FirstSteps())
