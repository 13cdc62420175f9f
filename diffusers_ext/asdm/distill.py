"""How a pruned UNet learns from the whole one: the losses, the features they compare, the objective of a step.

Task and output loss on every sample and a loss on the blocks' outputs are BK-SDM's (arXiv:2305.15798); the semantic
alignment is our reading of A-SDM's SAS (arXiv:2312.15516), whose features are not public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.predictions import min_snr_weights, training_target, weighted_mse

Features = dict[str, Tensor]


@dataclass(frozen=True)
class DistillWeights:
    """Weights of the losses, each 0 or more; a loss of weight 0 is not computed.

    Raises:
        ValueError: a negative weight or one that is not finite, or none above 0.
    """

    task: float = 1.0
    output: float = 1.0
    feature: float = 1.0
    semantic: float = 0.1

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        wrong = {name: w for name, w in given.items() if not (math.isfinite(w) and w >= 0)}
        if wrong:
            raise ValueError(f"Weights must be finite and 0 or more, got {wrong}.")
        if not any(given.values()):
            raise ValueError("All weights are 0, so there is nothing to train: set one above 0.")


def feature_loss(student: Features, teacher: Features) -> Tensor:
    """Mean over blocks and rows of ‖s − t‖²/‖t‖², the student's feature's relative squared error.

    The features of blocks differ in size by orders of magnitude, so that of BK-SDM's plain sum of squared errors a
    few blocks make nearly all; LAPTOP-Diff (arXiv:2404.11098) therefore normalises by block. Here every row has its
    own norm, so that no row's loss depends on what else is in the batch, or in the other process's.

    Args:
        student, teacher: (b, …) by block, of equal names and shapes.

    Raises:
        ValueError: different names or shapes, or no features.
    """
    if student.keys() != teacher.keys() or not student:
        raise ValueError(
            f"Expected features of the same blocks, got {sorted(student)} of the student and {sorted(teacher)} of"
            " the teacher."
        )
    blocks = [_relative_error(name, feature, teacher[name]) for name, feature in student.items()]
    return torch.stack(blocks).mean()


def _relative_error(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    _check_shapes(name, student, teacher)
    student, teacher = _precise(student).flatten(1), _precise(teacher).flatten(1)
    size = teacher.square().mean(1)
    # A teacher's block that gives zeros has nothing to be relative to; its rows then count absolutely.
    size = torch.where(size > 0, size, torch.ones_like(size))
    return ((student - teacher).square().mean(1) / size).mean()


def semantic_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of 1 − cosine of two features' means over the picture, between 0 and 2.

    What is where is averaged away and its size does not count: what is left is which channels are on.

    Args:
        student, teacher: (b, channels, height, width).

    Raises:
        ValueError: different shapes.
    """
    _check_shapes("the semantic features", student, teacher)
    pooled = (_precise(feature).flatten(2).mean(2) for feature in (student, teacher))
    return (1 - F.cosine_similarity(*pooled, dim=1)).mean()


def _check_shapes(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"The shapes of {name} differ: {tuple(student.shape)} of the student, {tuple(teacher.shape)} of the"
            " teacher. Blocks are compared that kept their channels and their place."
        )


def _precise(x: Tensor) -> Tensor:
    """Squares of half-precision features overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def block_names(unet: nn.Module) -> list[str]:
    """The blocks of a UNet in the order in which they run: down_blocks.i, mid_block if there is one, up_blocks.i."""
    model: Any = unet
    middle = [] if getattr(model, "mid_block", None) is None else ["mid_block"]
    down, up = (
        [f"{side}.{i}" for i in range(len(getattr(model, side)))] for side in ("down_blocks", "up_blocks")
    )
    return [*down, *middle, *up]


def shared_blocks(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The names of blocks that both have."""
    theirs = set(block_names(teacher))
    return [name for name in block_names(student) if name in theirs]


class BlockFeatures:
    """The outputs of named blocks while the `with` block lasts; afterwards the network is as it was.

    ```python
    with BlockFeatures(unet, ["down_blocks.0", "mid_block"]) as features:
        unet(noisy, timesteps)
    features["mid_block"]
    ```

    Of a block that returns several tensors (down blocks also return what the skip connections take) the first counts,
    its hidden states. A second forward overwrites the first one's features.

    Args:
        model: the network that has the blocks.
        names: of its modules.

    Raises:
        ValueError: a module that is not there.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        missing = [name for name in names if name not in modules]
        if missing:
            raise ValueError(f"{type(model).__name__} has no {', '.join(missing)}.")
        self._modules = {name: modules[name] for name in names}
        self._handles: list[Any] = []

    def __enter__(self) -> Features:
        found: Features = {}
        for name, module in self._modules.items():

            def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                found[name] = output[0] if isinstance(output, tuple) else output

            self._handles.append(module.register_forward_hook(keep))
        return found

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class DistillObjective(nn.Module):
    """The loss of one batch: the student against the data and against its teacher.

    Every term is a mean over rows and no row's depends on another's, so the mean over processes with equally many
    rows is the loss of one process with all.

    Args:
        student: a diffusers UNet, trained.
        teacher: a UNet with the same inputs and kind of prediction, frozen and never in training mode.
        scheduler: gives the noise schedule and, by its `prediction_type`, the target.
        weights: of the losses.
        snr_gamma: the cap of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556) of the two losses on
            predictions; None for equal weights.
        blocks: {student's block: the teacher's} to compare; None: those of one name. After a "stage.S" cut blocks
            count otherwise, see `teacher_blocks`.

    Raises:
        ValueError: a scheduler without that noise schedule, an unknown prediction type, a gamma that is not above 0,
            the same network on both sides, or features to compare and no block that both networks have.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        scheduler: DDPMScheduler | DDIMScheduler,
        weights: DistillWeights | None = None,
        snr_gamma: float | None = None,
        blocks: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        if student is teacher:
            raise ValueError("Student and teacher are the same object: the student must be a copy.")
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"snr_gamma must be above 0 or None, got {snr_gamma}.")
        _check_scheduler(scheduler)
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        self.scheduler, self.snr_gamma = scheduler, snr_gamma
        self.weights = DistillWeights() if weights is None else weights
        compared = self.weights.feature or self.weights.semantic
        pairs = {name: name for name in shared_blocks(student, teacher)} if blocks is None else blocks
        # In the order in which the student runs them.
        own = [name for name in block_names(student) if name in pairs] if compared else []
        self.blocks = {name: pairs[name] for name in own}
        if compared and not self.blocks:
            raise ValueError("Student and teacher have no block in common: set feature and semantic to 0.")

    def train(self, mode: bool = True) -> DistillObjective:
        """As usual, but the teacher never drops anything out."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def semantic_block(self) -> str:
        """Where meaning is compared: the mid block, or where one has none the last down block that both have."""
        down = [name for name in self.blocks if name.startswith("down_blocks.")]
        return "mid_block" if "mid_block" in self.blocks else (down or list(self.blocks))[-1]

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The weighted sum of `losses`, a scalar."""
        found = self.losses(latents, noise, timesteps, encoder_hidden_states, added_cond_kwargs)
        return torch.stack([getattr(self.weights, name) * loss for name, loss in found.items()]).sum()

    def losses(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The losses by their name in `DistillWeights`, unweighted; those of weight 0 are left out.

        Args:
            latents: (b, C, H, W) clean, scaled.
            noise: (b, C, H, W), standard normal.
            timesteps: (b,) integers.
            encoder_hidden_states: (b, tokens, width) where the networks have prompts.
            added_cond_kwargs: what SDXL's UNet wants beside them.
        """
        conditions = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added_cond_kwargs}
        conditions = {name: value for name, value in conditions.items() if value is not None}
        noisy = self.scheduler.add_noise(latents, noise, timesteps)  # type: ignore[arg-type]
        weights = self.weights
        blocks = [self.semantic_block] if weights.semantic and not weights.feature else list(self.blocks)
        predicted, own = _run(self.student, blocks, noisy, timesteps, conditions)
        gamma = self.snr_gamma
        rows = None if gamma is None else min_snr_weights(self.scheduler, timesteps, gamma)
        found = {}
        if weights.task:
            found["task"] = weighted_mse(
                predicted, training_target(self.scheduler, latents, noise, timesteps), rows
            )
        if not (weights.output or weights.feature or weights.semantic):
            return found
        with torch.no_grad():
            sources = [self.blocks[name] for name in blocks]
            wanted, features = _run(self.teacher, sources, noisy, timesteps, conditions)
        theirs = {name: features[source] for name, source in zip(blocks, sources)}
        if weights.output:
            found["output"] = weighted_mse(predicted, wanted, rows)
        if weights.feature:
            found["feature"] = feature_loss(own, theirs)
        if weights.semantic:
            found["semantic"] = semantic_loss(own[self.semantic_block], theirs[self.semantic_block])
        return found


def _check_scheduler(scheduler: Any) -> None:
    if not isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        raise ValueError(
            f"Training needs a DDPMScheduler or DDIMScheduler, got {type(scheduler).__name__}:"
            " DDPMScheduler.from_config(pipe.scheduler.config) makes one of the same noise schedule."
        )
    kind = scheduler.config["prediction_type"]
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"Unknown prediction_type {kind!r}: expected epsilon, v_prediction or sample.")


def _run(
    unet: nn.Module, blocks: Sequence[str], noisy: Tensor, timesteps: Tensor, conditions: dict[str, Any]
) -> tuple[Tensor, Features]:
    """A network's prediction and its blocks' features."""
    with BlockFeatures(unet, blocks) as features:
        predicted = unet(noisy, timesteps, **conditions).sample
    return predicted, features
