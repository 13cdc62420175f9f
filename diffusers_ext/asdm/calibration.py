"""Calibration inputs: what a UNet is called with, to measure its parts on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ..core.pipeline import quiet

CalibrationInput = dict[str, Any]


@torch.no_grad()
def record_calibration_inputs(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_timesteps: int = 4,
    num_inference_steps: int = 20,
    seed: int = 0,
    **call_kwargs: Any,
) -> list[CalibrationInput]:
    """What a pipeline's UNet is given while it samples, at some timesteps spread evenly over the run.

    Args:
        pipe: a Stable Diffusion or SDXL pipeline, or its kin.
        prompts: one picture each, all in one batch; with guidance that is twice the rows.
        num_timesteps: at most `num_inference_steps`.
        num_inference_steps: of the run.
        seed: of its noise.
        call_kwargs: of the pipeline's call, such as height, width and guidance_scale.

    Returns:
        Keyword arguments of the UNet's call, one dict for every timestep.

    Raises:
        ValueError: no prompts, or a number of timesteps that the run does not have.
    """
    if not prompts or not 1 <= num_timesteps <= num_inference_steps:
        raise ValueError(
            f"Give one or more prompts, and num_timesteps from 1 to num_inference_steps={num_inference_steps}; got"
            f" {len(prompts)} prompts and {num_timesteps}."
        )
    found: list[CalibrationInput] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args))
        kept = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
        found.append({**named, **kept})

    handle = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with quiet(pipe):
            pipe(
                list(prompts),
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
                output_type="latent",
                **call_kwargs,
            )
    finally:
        handle.remove()
    # The middle of each of num_timesteps equal parts of the run.
    return [found[int((k + 0.5) * len(found) / num_timesteps)] for k in range(num_timesteps)]


def noised_calibration_inputs(
    latents: Tensor, timesteps: Sequence[int], scheduler: Any, seed: int = 0, **conditioning: Any
) -> list[CalibrationInput]:
    """Calibration inputs from real images: their latents with noise added.

    Args:
        latents: (b, C, H, W), in the scale that the UNet works in.
        timesteps: from 0 to the scheduler's number of training steps less 1.
        scheduler: of Stable Diffusion's kind; only its noise schedule counts.
        seed: of the noise.
        conditioning: of the UNet's call, as encoder_hidden_states (b, tokens, width).
    """
    schedule: Any = DDPMScheduler.from_config(scheduler.config)
    draw = torch.Generator().manual_seed(seed)
    found = []
    for timestep in timesteps:
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        when = torch.full((len(latents),), timestep, device=latents.device)
        found.append({"sample": schedule.add_noise(latents, noise, when), "timestep": when, **conditioning})
    return found
