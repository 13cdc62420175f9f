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
from .flows import TIMES, FlowProjector
from .projector import Projector, falling_timesteps, nested

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
        output = unet(x, t, **nested(conditions or {})).sample
        if guidance_scale != 1 and negative:
            without = unet(x, t, **nested(negative)).sample
            output = without + guidance_scale * (output - without)
        x = solver.step(output, t, x).prev_sample
    return x


@torch.no_grad()
def euler_flow(
    projector: FlowProjector,
    sample: Tensor,
    num_inference_steps: int,
    conditions: dict[str, Tensor] | None = None,
    negative: dict[str, Tensor] | None = None,
    guidance_scale: float = 1.0,
    timestep: float = TIMES,
) -> Tensor:
    """The images (or latents) that a flow makes of noisy ones with Euler steps, evenly spaced in σ.

    Args:
        projector: has the network of the teacher.
        sample: (b, C, H, W) noisy data (1 − σ) · data + σ · noise at the timestep 1000σ.
        num_inference_steps, conditions, negative, guidance_scale: see `teacher_flow`.
        timestep: where sampling begins; 1000 is noise alone.
    """
    given, x, network = conditions or {}, sample, projector.network
    for k in range(num_inference_steps):
        share = 1 - k / num_inference_steps
        times = torch.full((len(x),), timestep * share, device=x.device)
        clean = projector.denoise(network, x, times, **given)
        if guidance_scale != 1 and negative:
            without = projector.denoise(network, x, times, **negative)
            clean = without + guidance_scale * (clean - without)
        alpha, sigma = projector.levels(times, x)
        after, sigma_after = projector.levels(times - timestep / num_inference_steps, x)
        x = after * clean + sigma_after * (x - alpha * clean) / sigma
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
        conditions_of: maps row indices (b,) to the arguments of the network with and without the prompt, and the means of
            the prompts, see `Projector.start`. None if the teacher has no prompts.

    Returns:
        Shards of `noise` and `drawn`, each (n, C, H, W) float16.

    Raises:
        ValueError: the folder contains pairs of another recipe.
    """

    def draw(rows: Sequence[int]) -> dict[str, Tensor]:
        number, low = divmod(rows[0], SHARD)
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(SHARD, *shape, generator=generator).half()[low : low + len(rows)]
        given = conditions_of(torch.tensor(rows)) if conditions_of else (None, None, None)
        conditions, negative, mean = given
        start, timestep = noise.float().to(accelerator.device), None
        if projector.source is not None:
            timestep = projector.timestep
            times = torch.full((len(start),), timestep, device=start.device)
            alpha, _ = projector.levels(times, start)
            start = alpha * projector.start(start, mean=mean)
        texts = conditions, negative, guidance_scale
        if isinstance(projector, FlowProjector):
            highest = TIMES if timestep is None else timestep
            drawn = euler_flow(projector, start, num_inference_steps, *texts, timestep=highest)
        else:
            unet, scheduler = projector.unet, projector.scheduler
            drawn = teacher_flow(unet, scheduler, start, num_inference_steps, *texts, timestep=timestep)
        return {"noise": noise, "drawn": drawn.half()}

    whole = -(-num_pairs // SHARD) * SHARD
    return encode_once(accelerator, folder, recipe, whole, draw, CHUNK)
