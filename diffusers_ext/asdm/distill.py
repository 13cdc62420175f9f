"""Distillation of a pruned UNet from the full UNet: the losses, the block features and the objective.

The task loss, the output loss and the loss on block outputs are those of BK-SDM (arXiv:2305.15798). The
semantic loss is our reading of SAS in A-SDM (arXiv:2312.15516), whose features are not public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.predictions import min_snr_weights, training_target, weighted_mse

Features = dict[str, Tensor]


@dataclass(frozen=True)
class DistillWeights:
    """Weights of the losses, each 0 or more. A loss with weight 0 is not computed.

    Raises:
        ValueError: a weight is negative or not finite, or all weights are 0.
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
    """The relative squared error ‖s − t‖²/‖t‖² of the student's features, averaged over blocks and rows.

    The features of blocks differ in size by orders of magnitude, so a few blocks would dominate the plain sum
    of squared errors of BK-SDM. LAPTOP-Diff (arXiv:2404.11098) therefore normalizes by block. Here every row
    is normalized by its own norm, so that its loss does not depend on the other rows of the batch or on other
    processes.

    Args:
        student, teacher: {block: (b, …)}, with equal names and shapes.

    Raises:
        ValueError: names or shapes differ, or there are no features.
    """
    if student.keys() != teacher.keys() or not student:
        raise ValueError(
            f"Expected features of the same blocks, got {sorted(student)} of the student and"
            f" {sorted(teacher)} of the teacher."
        )
    blocks = [_relative_error(name, feature, teacher[name]) for name, feature in student.items()]
    return torch.stack(blocks).mean()


def _relative_error(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    _check_shapes(name, student, teacher)
    student, teacher = _precise(student).flatten(1), _precise(teacher).flatten(1)
    size = teacher.square().mean(1)
    # If a block of the teacher outputs only zeros, the absolute error is used.
    size = torch.where(size > 0, size, torch.ones_like(size))
    return ((student - teacher).square().mean(1) / size).mean()


def semantic_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 − cosine similarity of two features after averaging over the image, between 0 and 2; mean over rows.

    The average discards positions and the cosine discards the norm, so the loss compares only the relative
    strength of the channels.

    Args:
        student, teacher: (b, channels, height, width).

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes("the semantic features", student, teacher)
    pooled = (_precise(feature).flatten(2).mean(2) for feature in (student, teacher))
    return (1 - F.cosine_similarity(*pooled, dim=1)).mean()


def _check_shapes(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"The shapes of {name} differ: {tuple(student.shape)} of the student, {tuple(teacher.shape)} of"
            " the teacher. Only blocks with the same channels and resolution can be compared."
        )


def _precise(x: Tensor) -> Tensor:
    """Converts half precision to float32, because squares of features overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def block_names(unet: nn.Module) -> list[str]:
    """The blocks of a UNet in the order in which they run: down_blocks.i, mid_block, up_blocks.i."""
    model: Any = unet
    middle = [] if getattr(model, "mid_block", None) is None else ["mid_block"]
    down, up = (
        [f"{side}.{i}" for i in range(len(getattr(model, side)))] for side in ("down_blocks", "up_blocks")
    )
    return [*down, *middle, *up]


def shared_blocks(student: nn.Module, teacher: nn.Module) -> list[str]:
    """The names of the blocks that both networks have."""
    theirs = set(block_names(teacher))
    return [name for name in block_names(student) if name in theirs]


class BlockFeatures:
    """Records the outputs of named blocks within a `with` block, and removes its hooks afterwards.

    ```python
    with BlockFeatures(unet, ["down_blocks.0", "mid_block"]) as features:
        unet(noisy, timesteps)
    features["mid_block"]
    ```

    If a block returns several tensors (down blocks also return the skip connections), the first one, its
    hidden states, is recorded. A second forward pass overwrites the features.

    Args:
        model: the network.
        names: names of the modules.

    Raises:
        ValueError: a module does not exist.
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


class Taught(nn.Module):
    """A student, which is trained, and its teacher, which is frozen and stays in evaluation mode.

    Raises:
        ValueError: they are the same object.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        if student is teacher:
            raise ValueError("Student and teacher are the same object: the student must be a copy.")
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Sets the training mode of the student."""
        super().train(mode)
        self.teacher.eval()
        return self


class DistillObjective(Taught):
    """The loss of one batch: the student compared with the data and with the teacher.

    Every term is a mean over rows, and no row depends on another. With the same number of rows per process,
    the mean over processes therefore equals the loss of a single process with all rows.

    Args:
        student: a diffusers UNet, trained.
        teacher: a UNet with the same inputs and prediction type. It is frozen and stays in evaluation mode.
        scheduler: provides the noise schedule and, by its `prediction_type`, the target.
        weights: weights of the losses.
        snr_gamma: γ of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556) for the task and output losses.
            None weights all timesteps equally.
        blocks: {block of the student: block of the teacher} to compare. None compares the blocks with the
            same name. A "stage.S" cut changes the numbering, see `teacher_blocks`.

    Raises:
        ValueError: the scheduler or its prediction type is not supported, `snr_gamma` is not above 0, student
            and teacher are the same object, or a feature loss is used and the networks have no block in
            common.
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
        super().__init__(student, teacher)
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"snr_gamma must be above 0 or None, got {snr_gamma}.")
        _check_scheduler(scheduler)
        self.scheduler, self.snr_gamma = scheduler, snr_gamma
        self.weights = DistillWeights() if weights is None else weights
        compared = self.weights.feature or self.weights.semantic
        pairs = {name: name for name in shared_blocks(student, teacher)} if blocks is None else blocks
        # In the order in which the student runs them.
        own = [name for name in block_names(student) if name in pairs] if compared else []
        self.blocks = {name: pairs[name] for name in own}
        if compared and not self.blocks:
            raise ValueError("Student and teacher have no block in common: set feature and semantic to 0.")

    @property
    def semantic_block(self) -> str:
        """The block for the semantic loss.

        This is the mid block or, without one, the last down block that both networks have.
        """
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
        """The losses by their name in `DistillWeights`, without weights. Losses with weight 0 are omitted.

        Args:
            latents: (b, C, H, W) clean, scaled latents.
            noise: (b, C, H, W) standard normal noise.
            timesteps: (b,) integers.
            encoder_hidden_states: (b, tokens, width), if the networks have prompts.
            added_cond_kwargs: the additional conditions of SDXL.
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
            " DDPMScheduler.from_config(pipe.scheduler.config) makes one with the same noise schedule."
        )
    kind = scheduler.config["prediction_type"]
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"Unknown prediction_type {kind!r}: expected epsilon, v_prediction or sample.")


def _run(
    unet: nn.Module, blocks: Sequence[str], noisy: Tensor, timesteps: Tensor, conditions: dict[str, Any]
) -> tuple[Tensor, Features]:
    """The prediction of a network and the features of its blocks."""
    with BlockFeatures(unet, blocks) as features:
        predicted = unet(noisy, timesteps, **conditions).sample
    return predicted, features
