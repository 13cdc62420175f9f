"""Distillation of a pruned flow-matching transformer from the full one: the losses and the two objectives.

The terms are those of `distill`. The states of transformers have a few channels of very large values, which would rule a
squared error (TinyFusion, arXiv:2412.01199), so every token is divided by its norm, in the image and in the text, as in
PPCL (arXiv:2511.16156). An interval of blocks is compared as a whole: its one block that is left has the output of its last
one as the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.predictions import weighted_mse
from ..training.levels import loss_weights, noised
from ..training.transformers import Flow
from .distill import DistillWeights, Taught
from .streams import Masks, States, mean_of_tokens, ports_of, recorded_blocks


def token_loss(student: States, teacher: States, masks: Masks = (None, None)) -> Tensor:
    """‖s/‖s‖ − t/‖t‖‖² of the states of a block, averaged over tokens, rows, and image and text; between 0 and 4.

    Args:
        student, teacher: image states (b, tokens, width), and text states or None. Text is compared if both have it.
        masks: the tokens that count.

    Raises:
        ValueError: the shapes differ.
    """
    found = []
    for one, other, mask in zip(student, teacher, masks):
        if one is None or other is None:
            continue
        if one.shape != other.shape:
            raise ValueError(
                f"The states of the student have the shape {tuple(one.shape)}, those of the teacher {tuple(other.shape)}:"
                " compare blocks with the same tokens."
            )
        errors = (_directions(one) - _directions(other)).square().sum(-1)
        found.append(mean_of_tokens(errors, mask).mean())
    return torch.stack(found).mean()


def _directions(states: Tensor) -> Tensor:
    # In float32: the squares of half-precision states overflow.
    return F.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)


def pooled_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """SAS: 1 − cosine similarity of image states averaged over their tokens, between 0 and 2; mean over rows.

    Args:
        student, teacher: (b, tokens, width).
        mask: (b, tokens), the tokens that count.
    """
    one, other = (
        mean_of_tokens(states.to(torch.promote_types(states.dtype, torch.float32)), mask)
        for states in (student, teacher)
    )
    return (1 - F.cosine_similarity(one, other, dim=1)).mean()


class FlowDistillObjective(Taught):
    """The loss of one batch: the student compared with the data and with the teacher.

    Every term is a mean over rows, as in `DistillObjective`.

    Args:
        student: a pruned transformer, trained.
        teacher: the full one. It is frozen and stays in evaluation mode.
        flow: how both are called.
        blocks: {block of the student: block of the teacher with the target output}, see `teacher_blocks`.
        weights: weights of the losses.
        scheme: weights of the noise levels in the task and output losses, see `levels.loss_weights`.
        guidance: the scale that transformers with embedded guidance are told.

    Raises:
        ValueError: student and teacher are the same object.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        flow: Flow,
        blocks: Mapping[str, str],
        weights: DistillWeights | None = None,
        scheme: str = "none",
        guidance: float | None = None,
    ) -> None:
        super().__init__(student, teacher)
        self.flow, self.blocks, self.scheme, self.guidance = flow, dict(blocks), scheme, guidance
        self.weights = DistillWeights() if weights is None else weights

    @property
    def semantic_block(self) -> str:
        """The block for the semantic loss: the middle one of the first list, where image and text are apart if they are."""
        names = [name for name in self.blocks if name.split(".")[0] == next(iter(self.blocks)).split(".")[0]]
        return names[len(names) // 2]

    def forward(self, **batch: Tensor) -> Tensor:
        """The weighted sum of `losses`, a scalar."""
        found = self.losses(**batch)
        return torch.stack([getattr(self.weights, name) * loss for name, loss in found.items()]).sum()

    def losses(self, latents: Tensor, noise: Tensor, sigmas: Tensor, **texts: Tensor) -> dict[str, Tensor]:
        """The losses by their name in `DistillWeights`, without weights. Losses with weight 0 are omitted.

        Args:
            latents, noise: (b, C, H, W) clean latents and standard normal noise.
            sigmas: (b,) float32 noise levels in [0, 1].
            texts: from `encode_captions`.
        """
        weights, middle = self.weights, self.semantic_block
        compared = list(self.blocks) if weights.feature else [middle] if weights.semantic else []
        noisy = noised(latents, noise, sigmas)
        given = (noisy, sigmas, self.guidance)
        with recorded_blocks(self.student, compared) as own:
            predicted = self.flow.velocity(self.student, *given, **texts)
        rows, found = loss_weights(self.scheme, sigmas), {}
        if weights.task:
            found["task"] = weighted_mse(predicted, noise - latents, rows)
        if not (weights.output or compared):
            return found
        with torch.no_grad(), recorded_blocks(self.teacher, {self.blocks[n] for n in compared}) as theirs:
            wanted = self.flow.velocity(self.teacher, *given, **texts)
        pairs = {
            name: (own[name].leaving, theirs[self.blocks[name]].leaving, own[name].masks) for name in compared
        }
        if weights.output:
            found["output"] = weighted_mse(predicted, wanted, rows)
        if weights.feature:
            found["feature"] = torch.stack([token_loss(*pair) for pair in pairs.values()]).mean()
        if weights.semantic:
            (image, _), (wanted_image, _), (mask, _) = pairs[middle]
            found["semantic"] = pooled_loss(image, wanted_image, mask)
        return found


class IntervalObjective(Taught):
    """Trains what is left of every interval alone: a block gets what enters the teacher's interval and should leave the same.

    This is the first stage of PPCL (arXiv:2511.16156). No error is carried from one interval to the next, so all learn in
    parallel. Only these blocks of the student are trained.

    Args:
        student: a pruned transformer. All parameters outside of the intervals are frozen.
        teacher: the full one. It is frozen.
        flow: how the teacher is called.
        intervals: {block of the student: first and last block of the teacher}, see `TransformerShape.intervals`. Those of
            one block have nothing to learn and are left out.
        guidance: see `FlowDistillObjective`.

    Raises:
        ValueError: there is no interval of more than one block.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        flow: Flow,
        intervals: Mapping[str, tuple[str, str]],
        guidance: float | None = None,
    ) -> None:
        super().__init__(student, teacher)
        self.intervals = {name: ends for name, ends in intervals.items() if ends[0] != ends[1]}
        if not self.intervals:
            raise ValueError("The student has all blocks of the teacher, so no block stands for others.")
        student.requires_grad_(False)
        for name in self.intervals:
            student.get_submodule(name).requires_grad_(True)
        self.flow, self.guidance = flow, guidance

    def forward(self, **batch: Tensor) -> Tensor:
        """The mean of `losses`, a scalar."""
        return torch.stack(list(self.losses(**batch).values())).mean()

    def losses(self, latents: Tensor, noise: Tensor, sigmas: Tensor, **texts: Tensor) -> dict[str, Tensor]:
        """{block of the student: its `token_loss`}; see `FlowDistillObjective.losses` for the arguments."""
        noisy = noised(latents, noise, sigmas)
        with torch.no_grad(), recorded_blocks(self.teacher, _both(self.intervals.values())) as calls:
            self.flow.velocity(self.teacher, noisy, sigmas, self.guidance, **texts)
        found = {}
        for name, (first, last) in self.intervals.items():
            block: Any = self.student.get_submodule(name)
            output = block(*calls[first].args, **calls[first].kwargs)
            found[name] = token_loss(ports_of(block).leaving(output), calls[last].leaving, calls[last].masks)
        return found


def _both(ends: Iterable[tuple[str, str]]) -> set[str]:
    return {path for pair in ends for path in pair}
