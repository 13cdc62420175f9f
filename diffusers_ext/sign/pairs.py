"""Pairs of noise and the images that the teacher generates from it, computed once and stored in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from tqdm.auto import tqdm

from ..core.schedules import counterpart
from ..core.storage import ShardStore, read_tensors
from .projector import Projector, falling_timesteps

SHARD = 256
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


class TeacherPairs:
    """Pairs in a folder of shards. An interrupted collection resumes with the missing shards.

    Args:
        folder: created if it does not exist.
        num_pairs: rounded up to whole shards.
        recipe: everything that the pairs depend on, JSON-serializable. It is stored in the folder.

    Raises:
        ValueError: the folder contains pairs of another recipe.
    """

    def __init__(self, folder: str | Path, num_pairs: int, recipe: dict[str, Any]) -> None:
        self.num_shards = -(-num_pairs // SHARD)
        self.store = ShardStore(folder, recipe)

    def collect(
        self,
        accelerator: Accelerator,
        projector: Projector,
        shape: Sequence[int],
        num_inference_steps: int,
        conditions_of: Any = None,
        guidance_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Generates the missing shards, divided among the processes, and loads all pairs.

        With a source, sampling starts at the timestep of the projector, because the source has the
        distribution of noisy data there. Without one, it starts from unit-variance noise at the end of the
        schedule.

        Args:
            accelerator: the processes that share the work.
            projector: provides the network of the teacher and the source.
            shape: (C, H, W) of one row.
            num_inference_steps, guidance_scale: see `teacher_flow`.
            conditions_of: maps row indices (b,) to the arguments of the network with and without the prompt.
                None if the teacher has no prompts.

        Returns:
            (noise, images), each (n, C, H, W) float32.
        """
        mine = range(accelerator.process_index, self.num_shards, accelerator.num_processes)
        missing = [i for i in mine if not self.store.path(i).is_file()]
        for i in tqdm(missing, desc="teacher images", disable=not accelerator.is_local_main_process):
            generator = torch.Generator().manual_seed(i)
            noise = torch.randn(SHARD, *shape, generator=generator).half()
            parts = []
            for low in range(0, SHARD, CHUNK):
                rows = torch.arange(i * SHARD + low, i * SHARD + low + CHUNK)
                given = conditions_of(rows) if conditions_of else (None, None)
                start, timestep = noise[low : low + CHUNK].float().to(accelerator.device), None
                if projector.source is not None:
                    timestep = projector.timestep
                    start = projector.start(start) / (1 + projector.sigma**2) ** 0.5
                drawn = teacher_flow(
                    projector.unet,
                    projector.scheduler,
                    start,
                    num_inference_steps,
                    *given,
                    guidance_scale,
                    timestep,
                )
                parts.append(drawn.cpu())
            drawn = torch.cat(parts)
            self.store.write(i, {"noise": noise, "drawn": drawn.half()})
        accelerator.wait_for_everyone()
        parts = [read_tensors(self.store.path(i))[0] for i in range(self.num_shards)]
        noise, drawn = (torch.cat([part[name] for part in parts]).float() for name in ("noise", "drawn"))
        return noise, drawn
