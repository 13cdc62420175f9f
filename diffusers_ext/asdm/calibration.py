"""Calibration inputs: the inputs of a UNet on which its parts are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.pipeline import call_pipeline, quiet
from ..core.schedules import noising_scheduler
from .apply import check_pipeline

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
    """Records the inputs of a pipeline's UNet during sampling, at timesteps spread evenly over the run.

    Args:
        pipe: a Stable Diffusion or SDXL pipeline, or a similar one with a UNet.
        prompts: one image is sampled per prompt, all in one batch. Guidance doubles the rows.
        num_timesteps: number of timesteps to record, at most `num_inference_steps`.
        num_inference_steps: steps of the sampling run.
        seed: seed of the noise.
        call_kwargs: arguments of the pipeline, such as height, width and guidance_scale.

    Returns:
        Keyword arguments for a call of the UNet, one dict per timestep.

    Raises:
        ValueError: there are no prompts, `num_timesteps` is out of range, or the pipeline has no
            `UNet2DConditionModel` or has a ControlNet, whose outputs are added to blocks that may be pruned.
    """
    check_pipeline(pipe)
    if getattr(pipe, "controlnet", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} has a ControlNet, which a pruned UNet does not fit: use the pipeline without it."
        )
    if not prompts or not 1 <= num_timesteps <= num_inference_steps:
        raise ValueError(
            f"Expected prompts, and num_timesteps from 1 to num_inference_steps={num_inference_steps}; got"
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
            call_pipeline(
                pipe,
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
        latents: (b, C, H, W) scaled latents, as the UNet expects them.
        timesteps: each from 0 to the number of training timesteps less 1.
        scheduler: a scheduler like that of Stable Diffusion. Only its noise schedule is used.
        seed: seed of the noise.
        conditioning: further arguments of the UNet, such as encoder_hidden_states (b, tokens, width).

    Returns:
        Keyword arguments for a call of the UNet, one dict per timestep.
    """
    schedule: Any = noising_scheduler(scheduler)
    draw = torch.Generator().manual_seed(seed)
    found = []
    for timestep in timesteps:
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        when = torch.full((len(latents),), timestep, device=latents.device)
        found.append({"sample": schedule.add_noise(latents, noise, when), "timestep": when, **conditioning})
    return found
