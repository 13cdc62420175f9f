"""Sensitivity: how much the output of a network changes without a part, on latents from sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .block_scores import block_losses, check_criterion, cut_losses, similarity
from .calibration import CalibrationInput, the_latents
from .networks import evaluating, network_config, shape_of
from .prune import cut_network
from .shape import UNetShape, possible_cuts

Score = Callable[[Any], float]


@dataclass(frozen=True)
class Sensitivity:
    """The loss without each part, and the loss of each cut.

    Attributes:
        parts: {path of a block, layer or attention: the loss if it alone is skipped}. None if it cannot be
            skipped because its number of channels changes. For a block, all of its parts that can be skipped
            are skipped together.
        cuts: {cut: the loss if it alone is made}. The key of two layers is ("layer.S", "layer.S").
        turns: of the blocks of a transformer, 1 − cosine of what enters and leaves them; see `block_scores.similarity`.
    """

    parts: dict[str, float | None]
    cuts: dict[tuple[str, ...], float]
    turns: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def predict(network: Any, inputs: Sequence[CalibrationInput]) -> list[Tensor]:
    """The output (b, ...) of the network for every input, without a learned variance, float32, in evaluation mode."""
    with evaluating(network):
        return [_prediction(network(**item, return_dict=False)[0], the_latents(item)) for item in inputs]


def _prediction(output: Any, latents: Tensor) -> Tensor:
    output = torch.stack(output) if isinstance(output, list) else output  # as of Z-Image
    if output.ndim == 4 and output.shape[1] == 2 * latents.shape[1]:
        output = output[:, : latents.shape[1]]  # as of PixArt
    return output.float()


def output_change(unet: Any, inputs: Sequence[CalibrationInput], reference: Sequence[Tensor]) -> float:
    """Mean over inputs and rows of ‖ε − ε₀‖²/‖ε₀‖², where ε₀ is the output of the full network.

    Args:
        unet: the network to compare.
        inputs: calibration inputs.
        reference: the outputs of the full network, from `predict`.
    """
    errors = []
    for found, wanted in zip(predict(unet, inputs), reference):
        errors.append((found - wanted).flatten(1).square().sum(1) / wanted.flatten(1).square().sum(1))
    return float(torch.cat(errors).double().mean())


def guidance_change(unet: Any, inputs: Sequence[CalibrationInput], reference: Sequence[Tensor]) -> float:
    """Mean over inputs and pairs of rows of ‖δ − δ₀‖²/‖δ₀‖².

    δ is the output with the prompt less that without it, and δ₀ that of the full UNet. This is what guidance
    multiplies. Most of a UNet's output does not depend on the prompt, so `output_change` hardly shows whether
    a part carries the prompt.

    Args:
        unet: the UNet to compare.
        inputs: calibration inputs of a run with guidance: the rows without prompt, then those with prompt.
        reference: the outputs of the full network, from `predict`.

    Raises:
        ValueError: the inputs have an odd number of rows, or the prompts do not change the output of the full
            UNet.
    """
    errors = []
    for found, wanted in zip(predict(unet, inputs), reference):
        if len(wanted) % 2:
            raise ValueError(
                f"Expected rows with and without guidance, got {len(wanted)} rows: use guidance."
            )
        (without, given), (base, whole) = found.chunk(2), wanted.chunk(2)
        size = (whole - base).flatten(1).square().sum(1)
        if not size.all():
            raise ValueError("The prompts do not change the output of the full UNet: use other prompts.")
        errors.append((given - without - whole + base).flatten(1).square().sum(1) / size)
    return float(torch.cat(errors).double().mean())


def measure_sensitivity(
    network: Any,
    inputs: Sequence[CalibrationInput],
    score: Score | None = None,
    progress: bool = False,
    criterion: str = "drop",
) -> Sensitivity:
    """Measures the loss of every part and every cut alone.

    Args:
        network: the UNet or transformer, with weights.
        inputs: see `record_calibration_inputs` and `noised_calibration_inputs`.
        score: a function of a network to use in place of the change of the output, such as a Fréchet distance
            after a short sampling run; lower is better. The loss is the difference from the score of the full
            network. It is called about 80 times for Stable Diffusion. The network may have forward hooks, and a
            transformer blocks that are bypassed, during the call.
        progress: show a progress bar.
        criterion: of the cuts of a transformer, see `PruningProfile`.

    Returns:
        Losses of all parts and cuts.

    Raises:
        ValueError: there are neither inputs nor a score, the criterion is unknown or not possible, or the network cannot
            be pruned.
    """
    check_criterion(criterion)
    if not inputs and score is None:
        raise ValueError("Expected inputs (see record_calibration_inputs) or a score, got neither.")
    shape = shape_of(network_config(network))
    if criterion != "drop" and isinstance(shape, UNetShape):
        raise ValueError(f"criterion={criterion!r} is for the blocks of transformers: use 'drop' for a UNet.")
    if criterion == "similarity" and not inputs:
        raise ValueError("criterion='similarity' compares what enters and leaves a block: give inputs.")
    reference = predict(network, inputs) if score is None else []
    whole = 0.0 if score is None else score(network)

    def loss(candidate: Any) -> float:
        if score is None:
            return output_change(candidate, inputs, reference)
        return score(candidate) - whole

    if not isinstance(shape, UNetShape):
        blocks = block_losses(network, loss, progress)
        turns = similarity(network, inputs) if inputs else {}
        return Sensitivity(blocks, cut_losses(network, blocks, turns, loss, criterion, progress), turns)
    unet = network
    parts: dict[str, float | None] = {}
    for path in tqdm(_parts(shape), disable=not progress, desc="parts"):
        units = [u for u in shape.units() if f"{u}.".startswith(f"{path}.") and can_skip(shape, u)]
        with skipped(unet, ["mid_block"] if path == "mid_block" else units):
            parts[path] = loss(unet) if units else None
    cuts: dict[tuple[str, ...], float] = {}
    for group in tqdm(_groups(shape), disable=not progress, desc="cuts"):
        alone = "mid_block" if group == ("mid",) else group[0].removeprefix("attention:")
        known = parts.get(alone)
        cuts[group] = loss(cut_network(unet, *group)) if known is None else known
    return Sensitivity(parts, cuts)


def _parts(shape: UNetShape) -> list[str]:
    """The blocks, each followed by its layers and attentions."""
    found: list[str] = []
    for path in shape.units():
        block = "mid_block" if path.startswith("mid_block") else ".".join(path.split(".")[:2])
        if block not in found:
            found.append(block)
        if "samplers." not in path:
            found.append(path)
    return found


def _groups(shape: UNetShape) -> list[tuple[str, ...]]:
    """The single cuts, and groups of two or more layers of one resolution."""
    found: list[tuple[str, ...]] = []
    for name in possible_cuts(shape.base):
        group = (name,)
        while True:
            found.append(group)
            group = (*group, name)
            if not name.startswith("layer.") or not _possible(shape, group):
                break
    return found


def _possible(shape: UNetShape, cuts: tuple[str, ...]) -> bool:
    try:
        shape.cut(*cuts)
    except ValueError:
        return False
    return True


def can_skip(shape: UNetShape, unit: str) -> bool:
    """Whether a unit of the original UNet can be replaced by its input.

    A layer of an up block then drops the channels of the skip connection.
    """
    if "samplers." in unit:
        return False
    if ".attentions." in unit or unit.startswith("mid_block"):
        return True
    side, block, _, layer = unit.split(".")
    channels = shape.base["block_out_channels"]
    if int(layer) > 0:
        return True
    if side == "down_blocks":
        return channels[max(int(block) - 1, 0)] == channels[int(block)]
    stage = len(channels) - 1 - int(block)
    return channels[min(stage + 1, len(channels) - 1)] == channels[stage]


@contextmanager
def skipped(unet: Any, paths: Sequence[str]) -> Iterator[None]:
    """Replaces attentions, layers or the mid block by their inputs within the `with` block.

    See `can_skip` for the layers that this works for.
    """
    handles: list[Any] = []
    for path in paths:

        def skip(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            given = (
                args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "input_tensor"]
            )
            if isinstance(output, Tensor):
                return given[:, : output.shape[1]]
            return (given,) if isinstance(output, tuple) else type(output)(sample=given)

        handles.append(unet.get_submodule(path).register_forward_hook(skip, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
