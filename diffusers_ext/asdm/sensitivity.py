"""How much a UNet's output changes when a part of it is missing, on latents that it meets when it samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .calibration import CalibrationInput
from .prune import cut_unet
from .shape import UNetShape, possible_cuts
from .unet import unet_config

Score = Callable[[Any], float]


@dataclass(frozen=True)
class Sensitivity:
    """What goes wrong without a part.

    Attributes:
        parts: by module path, for blocks, layers and attentions: the loss if it alone is skipped; None where nothing
            can be skipped, since the channels change. Of a block, all of its parts that can be are skipped together.
        cuts: by cut, or by ("layer.S", "layer.S") for two layers: the loss if it alone is made.
    """

    parts: dict[str, float | None]
    cuts: dict[tuple[str, ...], float]


@torch.no_grad()
def predict(unet: Any, inputs: Sequence[CalibrationInput]) -> list[Tensor]:
    """The UNet's output (b, C, H, W) for every item, float32, with dropout off."""
    training = unet.training
    try:
        unet.eval()
        return [unet(**item, return_dict=False)[0].float() for item in inputs]
    finally:
        unet.train(training)


def output_change(unet: Any, inputs: Sequence[CalibrationInput], reference: Sequence[Tensor]) -> float:
    """Mean over inputs and rows of ‖ε − ε₀‖²/‖ε₀‖², where ε₀ is the whole UNet's output; see `predict`."""
    errors = []
    for found, wanted in zip(predict(unet, inputs), reference):
        errors.append((found - wanted).flatten(1).square().sum(1) / wanted.flatten(1).square().sum(1))
    return float(torch.cat(errors).double().mean())


def measure_sensitivity(
    unet: Any, inputs: Sequence[CalibrationInput], score: Score | None = None, progress: bool = False
) -> Sensitivity:
    """The loss of every part and every cut alone.

    Args:
        unet: with weights.
        inputs: see `record_calibration_inputs` and `noised_calibration_inputs`.
        score: what to measure instead of the change of the output: a function of a UNet, such as a Fréchet distance
            after a short run of the sampler, less being better. It is called for the whole UNet and about 80 times
            for Stable Diffusion's parts; the loss is the difference. The UNet's modules may be hooked in the call.
        progress: show a bar.

    Raises:
        ValueError: no inputs and no score, or a UNet that cannot be pruned.
    """
    if not inputs and score is None:
        raise ValueError("Give inputs, which record_calibration_inputs takes from a pipeline, or a score.")
    shape = UNetShape(unet_config(unet))
    reference = predict(unet, inputs) if score is None else []
    whole = 0.0 if score is None else score(unet)

    def loss(candidate: Any) -> float:
        if score is None:
            return output_change(candidate, inputs, reference)
        return score(candidate) - whole

    parts: dict[str, float | None] = {}
    for path in tqdm(_parts(shape), disable=not progress, desc="parts"):
        units = [u for u in shape.units() if f"{u}.".startswith(f"{path}.") and can_skip(shape, u)]
        with skipped(unet, ["mid_block"] if path == "mid_block" else units):
            parts[path] = loss(unet) if units else None
    cuts: dict[tuple[str, ...], float] = {}
    for group in tqdm(_groups(shape), disable=not progress, desc="cuts"):
        alone = "mid_block" if group == ("mid",) else group[0].removeprefix("attention:")
        known = parts.get(alone)
        cuts[group] = loss(cut_unet(unet, *group)) if known is None else known
    return Sensitivity(parts, cuts)


def _parts(shape: UNetShape) -> list[str]:
    """Blocks, each before its layers and attentions."""
    found: list[str] = []
    for path in shape.units():
        block = "mid_block" if path.startswith("mid_block") else ".".join(path.split(".")[:2])
        if block not in found:
            found.append(block)
        if "samplers." not in path:
            found.append(path)
    return found


def _groups(shape: UNetShape) -> list[tuple[str, ...]]:
    """Single cuts, and two, three, … layers of one resolution."""
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
    """Whether a unit of the original UNet could pass its input on: a layer of an up block drops the skip's channels."""
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
    """Within it, these attentions, layers or the mid block pass their input on; see `can_skip`."""
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
