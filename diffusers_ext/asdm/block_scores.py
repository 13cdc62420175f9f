"""The blocks of a transformer: their cost, and the loss without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from .calibration import CalibrationInput, num_rows, the_latents
from .cost import Cost, CostTable, measure_milliseconds
from .networks import evaluating, network_config
from .streams import BlockCall, mean_of_tokens, recorded_blocks, skipped_blocks
from .transformers import TransformerShape, interval_of, possible_block_cuts, possible_interval_cuts

CRITERIA = ("drop", "similarity", "contiguous")


def check_criterion(criterion: str) -> None:
    """Raises a ValueError unless this is the name of a criterion."""
    if criterion not in CRITERIA:
        raise ValueError(f"The criterion must be {', '.join(CRITERIA)}, got {criterion!r}.")


# --- cost ---


def block_costs(network: Any, given: CalibrationInput, repeats: int = 0) -> CostTable:
    """Counts and measures the cost of a transformer's blocks in one call of its own forward.

    The MACs of attention are counted as matrix products.

    Args:
        network: the transformer. It can be on the meta device if `repeats` is 0.
        given: the arguments of the call, see `record_calibration_inputs`.
        repeats: number of time measurements, of which the median is used; 0: none. The times of blocks with the same work
            are averaged.

    Raises:
        ValueError: see `network_config`.
    """
    shape = TransformerShape(network_config(network))
    modules = dict(network.named_modules())
    own = ("ff_context", "attn.to_add_out", "norm1_context")  # see TransformerShape.removed
    paths = [
        path
        for unit in shape.units()
        for path in (unit, *(f"{unit}.{name}" for name in own))
        if modules.get(path) is not None
    ]
    macs, rows = macs_of(network, lambda: network(**given)), num_rows(given)
    times = measure_milliseconds(network, given, paths, repeats) if repeats else {}

    def cost(path: str) -> Cost:
        parameters = sum(p.numel() for p in modules[path].parameters())
        return Cost(parameters, macs.get(path, 0) // rows, times.get(path))

    latents, text = the_latents(given), given.get("encoder_hidden_states")
    height, width = latents.shape[-2:] if latents.ndim > 3 else (None, None)
    tokens = text.shape[1] if isinstance(text, Tensor) else None
    parts = _averaged({path: cost(path) for path in paths}, modules)
    return CostTable(cost(""), parts, {}, height, width, tokens)


@torch.no_grad()
def macs_of(network: Any, run: Callable[[], Any]) -> dict[str, int]:
    """MACs by module path of what `run` does with a network, with all of them under ""."""
    # The counter knows no fused attention of the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    prefix = type(network).__name__ + "."
    found = {
        name[len(prefix) :]: sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name.startswith(prefix)
    }
    return {**found, "": counter.get_total_flops() // 2}


def _averaged(parts: dict[str, Cost], modules: Mapping[str, nn.Module]) -> dict[str, Cost]:
    """The mean time of the parts with the same work, which differ by noise alone."""
    alike: dict[Any, list[str]] = {}
    for path, cost in parts.items():
        alike.setdefault((type(modules[path]), cost.parameters, cost.macs), []).append(path)
    found = dict(parts)
    for paths in alike.values():
        times = [parts[path].milliseconds for path in paths]
        if None not in times:
            mean = sum(times) / len(times)  # type: ignore[arg-type]
            found |= {path: replace(parts[path], milliseconds=mean) for path in paths}
    return found


# --- loss ---


def block_losses(
    network: Any, loss: Callable[[Any], float], progress: bool = False
) -> dict[str, float | None]:
    """{block: the loss if it is left out}; None if it cannot be removed."""
    shape = TransformerShape(network_config(network))
    allowed = set(possible_block_cuts(shape.base))
    found: dict[str, float | None] = {}
    for path in tqdm(shape.units(), disable=not progress, desc="blocks"):
        found[path] = None
        if f"block:{path}" in allowed:
            with skipped_blocks(network, [path]):
                found[path] = loss(network)
    return found


def cut_losses(
    network: Any,
    blocks: Mapping[str, float | None],
    turns: Mapping[str, float],
    loss: Callable[[Any], float],
    criterion: str,
    progress: bool = False,
) -> dict[tuple[str, ...], float]:
    """The losses of cuts by a criterion.

    Args:
        network: the transformer.
        blocks: the loss without each block, from `block_losses`.
        turns: 1 − cosine of what enters and leaves each block, from `similarity`.
        loss: the loss of a network, for intervals.
        criterion: "drop" takes `blocks`, "similarity" takes `turns`. "contiguous" measures the loss of every interval of
            blocks, left out together: n(n + 1)/2 calls of `loss` for a list of n blocks.
        progress: show a progress bar.

    Raises:
        ValueError: the criterion is unknown.
    """
    check_criterion(criterion)
    config = network_config(network)
    single = possible_block_cuts(config)
    if criterion == "similarity":
        return {(cut,): turns[cut.removeprefix("block:")] for cut in single}
    known = {(cut,): blocks[cut.removeprefix("block:")] for cut in single}
    found = {cuts: value for cuts, value in known.items() if value is not None}
    if criterion == "contiguous":
        longer = [cut for cut in possible_interval_cuts(config) if (cut,) not in found]
        for cut in tqdm(longer, disable=not progress, desc="intervals"):
            name, first, last = interval_of(cut)
            with skipped_blocks(network, [f"{name}.{number}" for number in range(first, last + 1)]):
                found[(cut,)] = loss(network)
    return found


@torch.no_grad()
def similarity(network: Any, inputs: Sequence[CalibrationInput]) -> dict[str, float]:
    """{block: 1 − cosine of the states that enter and leave it}, averaged over tokens and over image and text.

    A block that hardly turns its states is a candidate to be removed: SANA 1.5 (arXiv:2501.18427) ranks blocks so.

    Args:
        network: the transformer.
        inputs: calibration inputs.
    """
    paths = list(TransformerShape(network_config(network)).units())
    sums = dict.fromkeys(paths, 0.0)
    with evaluating(network):
        for given in inputs:
            with recorded_blocks(network, paths) as calls:
                network(**given)
            for path, call in calls.items():
                sums[path] += _turn(call) / len(inputs)
    return sums


def _turn(call: BlockCall) -> float:
    cosines = [
        mean_of_tokens(F.cosine_similarity(one.float(), other.float(), dim=-1), mask).mean()
        for one, other, mask in zip(call.entering, call.leaving, call.masks)
        if one is not None and other is not None
    ]
    return float(1 - torch.stack(cosines).double().mean())
