"""Pairs of noise and the images that the teacher generates from it, computed once and stored in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from ..core.schedules import counterpart
from ..training.encodings import SHARD, Shards, encode_once
from .projector import Projector, falling_timesteps

CHUNK = 64


@torch.no_grad()
def teacher_flow(
    unet: Any,
    scheduler: Any,
    noise: Tensor,
    num_inference_steps: int,
    conditions: dict[str, Tensor] | None = None,
    negative: dict[str, Tensor] | None = None,
    guidance_scale: float = 1.0,
    timestep: int | None = None,
) -> Tensor:
    """The images (or latents) that the teacher generates with DPM-Solver++.

    Args:
        unet: the network of the teacher.
        scheduler: the scheduler of the teacher.
        noise: (b, C, H, W) unit-variance noise, or α · data + σ · noise at `timestep`.
        num_inference_steps: number of network evaluations; fewer if there are fewer timesteps.
        conditions, negative: arguments of the network for the conditional and the unconditional prediction.
        guidance_scale: 1 uses the conditional prediction only.
        timestep: where sampling begins. None is the end of the schedule.

    Returns:
        (b, C, H, W).
    """
    solver = counterpart(
        scheduler, DPMSolverMultistepScheduler, timestep_spacing="trailing", algorithm_type="dpmsolver++"
    )
    if timestep is None:
        solver.set_timesteps(num_inference_steps, device=noise.device)
    else:
        falling = falling_timesteps(timestep, num_inference_steps)
        solver.set_timesteps(timesteps=falling, device=noise.device)
    x = noise
    for t in solver.timesteps:
        output = unet(x, t, **(conditions or {})).sample
        if guidance_scale != 1 and negative:
            without = unet(x, t, **negative).sample
            output = without + guidance_scale * (output - without)
        x = solver.step(output, t, x).prev_sample
    return x


def teacher_pairs(
    accelerator: Accelerator,
    folder: str | Path,
    num_pairs: int,
    recipe: Mapping[str, Any],
    projector: Projector,
    shape: Sequence[int],
    num_inference_steps: int,
    conditions_of: Any = None,
    guidance_scale: float = 1.0,
) -> Shards:
    """Generates the pairs that are not in the folder yet, see `encode_once`.

    With a source, sampling starts at the timestep of the projector, because the source has the distribution of noisy
    data there. Without one, it starts from unit-variance noise at the end of the schedule.

    Args:
        accelerator: the processes that share the work.
        folder: created if needed.
        num_pairs: rounded up to whole shards.
        recipe: everything that the pairs depend on.
        projector: provides the network of the teacher and the source.
        shape: (C, H, W) of one row.
        num_inference_steps, guidance_scale: see `teacher_flow`.
        conditions_of: maps row indices (b,) to the arguments of the network with and without the prompt. None if the
            teacher has no prompts.

    Returns:
        Shards of `noise` and `drawn`, each (n, C, H, W) float16.

    Raises:
        ValueError: the folder contains pairs of another recipe.
    """

    def draw(rows: Sequence[int]) -> dict[str, Tensor]:
        number, low = divmod(rows[0], SHARD)
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(SHARD, *shape, generator=generator).half()[low : low + len(rows)]
        given = conditions_of(torch.tensor(rows)) if conditions_of else (None, None)
        start, timestep = noise.float().to(accelerator.device), None
        if projector.source is not None:
            timestep = projector.timestep
            start = projector.start(start) / (1 + projector.sigma**2) ** 0.5
        drawn = teacher_flow(
            projector.unet,
            projector.scheduler,
            start,
            num_inference_steps,
            *given,
            guidance_scale=guidance_scale,
            timestep=timestep,
        )
        return {"noise": noise, "drawn": drawn.half()}

    whole = -(-num_pairs // SHARD) * SHARD
    return encode_once(accelerator, folder, recipe, whole, draw, CHUNK)
