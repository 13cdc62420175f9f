"""Noise and what the teacher draws from it, computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from tqdm.auto import tqdm

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
    """The teacher's pictures (or latents), by DPM-Solver++.

    Args:
        noise: (b, C, H, W): unit noise, or α · data + σ · noise at `timestep`.
        num_inference_steps: evaluations of the network, fewer where there are not as many timesteps.
        conditions, negative: arguments of the network for the guided and for the unguided prediction.
        timestep: where the flow begins; None: at the end of the schedule.
    """
    solver: Any = DPMSolverMultistepScheduler.from_config(scheduler.config, timestep_spacing="trailing")
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
    """Pairs in a folder of shards; a killed collection goes on where it stopped.

    Args:
        folder: created if need be.
        num_pairs: rounded up to whole shards.
        recipe: what the pairs depend on, JSON-serialisable. A folder made by another one is refused.

    Raises:
        ValueError: the folder holds pairs made in another way.
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
        """(noise, drawn), each (n, *shape) float32; makes the shards that are not there, shared among the processes.

        A source has the distribution of noisy data at the projector's level, so the teacher goes on from there; without
        one, unit noise has it at the end of the schedule alone.

        Args:
            projector: the teacher's network, and the source.
            shape: of one row.
            conditions_of: for row indices (b,), the arguments of the network with and without the prompt.
        """
        mine = range(accelerator.process_index, self.num_shards, accelerator.num_processes)
        missing = [i for i in mine if not self.store.path(i).is_file()]
        for i in tqdm(missing, desc="teacher's pictures", disable=not accelerator.is_local_main_process):
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
