"""How the students of a pipeline are trained and compared: those of UNets and those of flow-matching transformers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..core.schedules import noising_scheduler
from ..training.captioned import CaptionedBatches, check_captioned_training
from ..training.levels import noised, training_sigmas
from ..training.rows import Batch, on_device, rows_of_step
from ..training.transformers import FLOWS, Flow, flow_of, flow_of_class
from . import training as asdm
from .block_scores import macs_of
from .distill import DistillWeights
from .flow_distill import FlowDistillObjective
from .networks import evaluating, prunable
from .plan import PruningPlan
from .prune import teacher_blocks
from .sensitivity import predict


def check_teacher(pipe: Any) -> None:
    """Raises a ValueError unless students of the pipeline's network can be trained on captioned images.

    Those are Stable Diffusion, SDXL and the pipelines of `training.transformers.FLOWS` whose transformer can be pruned.
    """
    if flow_of_class(type(pipe)) is not None:
        flow_of(pipe)
        training_sigmas(pipe.scheduler)
        prunable(pipe)
    elif getattr(pipe, "transformer", None) is not None:
        raise ValueError(
            f"Students can be trained of Stable Diffusion, SDXL, {', '.join(FLOWS)}, got {type(pipe).__name__}. Use one of"
            " these, or prune its transformer with prune_network and train it with a loop of your own."
        )
    else:
        check_captioned_training(pipe)


@dataclass(frozen=True)
class Teaching:
    """The training of students of a pipeline's UNet or transformer.

    Attributes:
        args: as of the training script.
        pipe: the pipeline of the teacher, see `check_teacher`.
    """

    args: argparse.Namespace
    pipe: Any

    @cached_property
    def flow(self) -> Flow | None:
        """How the transformer is called; None for a UNet."""
        return None if flow_of_class(type(self.pipe)) is None else flow_of(self.pipe)

    @property
    def part(self) -> str:
        """ "unet" or "transformer"."""
        return "unet" if self.flow is None else "transformer"

    @property
    def teacher(self) -> Any:
        """The full network."""
        return getattr(self.pipe, self.part)

    @property
    def guidance(self) -> float | None:
        """The scale that a transformer with embedded guidance is told."""
        return getattr(self.args, "guidance_scale", None)

    @cached_property
    def scheduler(self) -> Any:
        """The noise schedule of a UNet."""
        return noising_scheduler(self.pipe.scheduler)

    def objective(
        self, student: Any, plan: PruningPlan, stage: int, weights: DistillWeights | None = None
    ) -> nn.Module:
        """The loss of the student of a stage compared with the full network."""
        blocks = teacher_blocks(plan, stage)
        if self.flow is None:
            gamma = getattr(self.args, "snr_gamma", None)
            return asdm.StageObjective(student, self.teacher, blocks, self.scheduler, weights, gamma)
        scheme = self.args.weighting_scheme or self.flow.weighting_scheme
        return FlowDistillObjective(student, self.teacher, self.flow, blocks, weights, scheme, self.guidance)

    @torch.no_grad()
    def predict(self, network: Any, batches: Sequence[Batch]) -> list[Tensor]:
        """The predictions (b, C, H, W) of a network for batches of `CaptionedBatches`, float32, in evaluation mode."""
        if self.flow is None:
            return predict(network, [self._call(batch) for batch in batches])
        with evaluating(network):
            return [self._velocity(network, **batch) for batch in batches]

    def _call(self, batch: Batch) -> dict[str, Any]:
        given = asdm.conditioned(**batch)
        latents, noise, timesteps = (given.pop(key) for key in ("latents", "noise", "timesteps"))
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        return {"sample": noisy, "timestep": timesteps, **given}

    def _velocity(
        self, network: Any, latents: Tensor, noise: Tensor, sigmas: Tensor, **texts: Tensor
    ) -> Tensor:
        assert self.flow is not None
        noisy = noised(latents, noise, sigmas)
        return self.flow.velocity(network, noisy, sigmas, self.guidance, **texts).float()

    def figures(self, network: Any, batches: CaptionedBatches) -> Mapping[str, int]:
        """Parameters, and MACs of one call for one image of the training size."""
        if self.flow is None:
            return asdm.cost_figures(network, *batches.size, self.pipe.tokenizer.model_max_length)
        read = on_device(batches.read(rows_of_step(10**9, 0, 0, 1)), self.pipe.device)
        batch = batches.encode(read)
        macs = macs_of(network, lambda: self._velocity(network, **batch))[""]
        return {"parameters": network.num_parameters(), "MACs": macs}
