"""The cost of a UNet and of its parts: parameters, multiply-accumulates (MACs) and milliseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.checks import check_counts
from .networks import Shape, shape_of
from .shape import UNetShape
from .unet import build_unet, empty_unet, unet_config


def check_measure(measure: str) -> None:
    """Raises a ValueError unless this is the name of a cost."""
    if measure not in ("macs", "milliseconds", "parameters"):
        raise ValueError(f"The cost must be macs, milliseconds or parameters, got {measure!r}.")


@dataclass(frozen=True)
class Cost:
    """The cost of a network or of a part.

    Attributes:
        parameters: number of parameters.
        macs: multiply-accumulates for one image, of convolutions, linear layers and attention, as PyTorch
            counts them (half of its floating-point operations).
        milliseconds: time of one call; None if it was not measured.
    """

    parameters: int
    macs: int
    milliseconds: float | None = None

    def __add__(self, other: Cost) -> Cost:
        return self._with(other, 1)

    def __sub__(self, other: Cost) -> Cost:
        return self._with(other, -1)

    def _with(self, other: Cost, sign: int) -> Cost:
        known = self.milliseconds is not None and other.milliseconds is not None
        return Cost(
            self.parameters + sign * other.parameters,
            self.macs + sign * other.macs,
            self.milliseconds + sign * other.milliseconds if known else None,  # type: ignore[operator]
        )

    def times(self, share: Fraction) -> Cost:
        """A share of this cost."""
        time = self.milliseconds
        return Cost(
            int(self.parameters * share),
            int(self.macs * share),
            None if time is None else time * float(share),
        )

    def of(self, measure: str) -> float:
        """The cost by the name of its measure: "macs", "milliseconds" or "parameters".

        Raises:
            ValueError: the name is unknown, or milliseconds were not measured.
        """
        check_measure(measure)
        found = getattr(self, measure)
        if found is None:
            raise ValueError(
                "Milliseconds were not measured: measure with repeats of 1 or more, or plan by 'macs'."
            )
        return found


@dataclass(frozen=True)
class CostTable:
    """The cost of a network and of its parts.

    Attributes:
        total: cost of the full network.
        parts: cost by module path, of resnets, attentions, samplers and the blocks that contain them; of transformers, of
            blocks and of what a block may lose when it becomes the last one.
        gri: cost of attentions with GRI attention in place of self-attention, where that is another computation:
            windows that cover the whole image are full attention.
        height, width: size of the latents; None if they are packed.
        tokens: length of the prompt; None if the prompts of a batch have their own.
    """

    total: Cost
    parts: dict[str, Cost]
    gri: dict[str, Cost]
    height: int | None
    width: int | None
    tokens: int | None

    def of_shape(self, shape: Shape) -> Cost:
        """The cost after cuts.

        Parameters and MACs are exact, because a kept module keeps its shape and its resolution. Milliseconds
        assume that the times of the parts add up.
        """
        found = self.total
        for path, share in shape.removed().items():
            found -= self.parts[path].times(share)
        before = set(shape_of(shape.base).gri())
        for path in shape.gri():
            if path not in before and path in self.gri:
                found += self.gri[path] - self.parts[path]
        return found


def example_inputs(
    config: Mapping[str, Any],
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    tokens: int = 77,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random keyword arguments for a call of a UNet.

    Args:
        config: config of the UNet.
        batch_size: number of images.
        height, width: size of the latents; default: `sample_size` of the config.
        tokens: length of the prompts.
        device, dtype: device and dtype of the tensors.

    Raises:
        ValueError: the size is missing, or the UNet needs inputs other than text, the text and time
            conditions of SDXL, and class labels.
    """
    height, width = latent_size(config, height, width)
    kinds = {None, "text_time"}
    known = config.get("addition_embed_type") in kinds and config.get("encoder_hid_dim_type") in (
        None,
        "text_proj",
    )
    if not known or config.get("class_embed_type") not in (None, "timestep"):
        raise ValueError(
            f"No example inputs are known for addition_embed_type={config.get('addition_embed_type')!r},"
            f" encoder_hid_dim_type={config.get('encoder_hid_dim_type')!r} and"
            f" class_embed_type={config.get('class_embed_type')!r}: this UNet is not supported."
        )
    like: Any = {"device": device, "dtype": dtype}
    features = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    features = features if isinstance(features, int) else features[0]
    found: dict[str, Any] = {
        "sample": torch.randn(batch_size, config["in_channels"], height, width, **like),
        "timestep": torch.full((batch_size,), 500, device=device),
        "encoder_hidden_states": torch.randn(batch_size, tokens, features, **like),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        found["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch_size, pooled, **like),
            "time_ids": torch.zeros(batch_size, 6, **like),
        }
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") == "timestep":
        found["class_labels"] = torch.zeros(batch_size, dtype=torch.long, device=device)
    return found


def latent_size(config: Mapping[str, Any], height: int | None, width: int | None) -> tuple[int, int]:
    """The given size, or `sample_size` of the config.

    Raises:
        ValueError: neither is given, or only one of height and width.
    """
    size = config.get("sample_size")
    if (height is None) != (width is None) or (height is None and size is None):
        raise ValueError(f"Expected both height and width of the latents, got {height} and {width}.")
    if height is not None and width is not None:
        return height, width
    return (size, size) if isinstance(size, int) else (size[0], size[1])  # type: ignore[index]


def count_macs(config: Mapping[str, Any], height: int, width: int, tokens: int = 77) -> dict[str, int]:
    """MACs for one image by module path, with the full UNet under "".

    They are counted on the meta device, without weights, so the size does not matter.

    Raises:
        ValueError: see `example_inputs`.
    """
    with torch.device("meta"):
        unet = empty_unet(dict(config))
    inputs = example_inputs(config, 1, height, width, tokens, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(**inputs)
    prefix = type(unet).__name__ + "."
    found = {
        name[len(prefix) :]: sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name.startswith(prefix)
    }
    return {**found, "": counter.get_total_flops() // 2}


def cost_table(
    unet: Any,
    height: int | None = None,
    width: int | None = None,
    tokens: int = 77,
    repeats: int = 0,
    batch_size: int = 1,
) -> CostTable:
    """Counts and measures the cost of the parts of a UNet.

    Args:
        unet: a stock UNet or an `ASDMUNet2DConditionModel`. It can be on the meta device if `repeats` is 0.
        height, width: size of the latents; default: `sample_size` of the config.
        tokens: length of the prompt.
        repeats: number of time measurements, of which the median is used; 0: none.
        batch_size: batch size of the measured calls.

    Raises:
        ValueError: see `example_inputs` and `unet_config`.
    """
    config = unet_config(unet)
    height, width = latent_size(config, height, width)
    shape = UNetShape(config)
    everywhere = _gri_everywhere(config, shape)
    macs, gri_macs = (
        count_macs(c, height, width, tokens) if c is not None else {} for c in (config, everywhere)
    )
    times, gri_times = {}, {}
    paths = [*shape.units(), *_all_blocks(shape)]
    if repeats:
        device, dtype = next((p.device, p.dtype) for p in unet.parameters())
        inputs = example_inputs(config, batch_size, height, width, tokens, device, dtype)
        times = measure_milliseconds(unet, inputs, paths, repeats)
        if everywhere is not None:
            swapped = build_unet(everywhere, unet.state_dict()).train(unet.training)
            gri_times = measure_milliseconds(swapped, inputs, shape.attentions(), repeats)
    modules = dict(unet.named_modules())

    def cost(path: str, counted: dict[str, int], measured: dict[str, float]) -> Cost:
        parameters = sum(p.numel() for p in modules[path].parameters())
        return Cost(parameters, counted.get(path, 0), measured.get(path))

    parts = {path: cost(path, macs, times) for path in paths}
    before = {path.split(".transformer_blocks")[0] for path in shape.gri()}
    # Where the work is the same, a difference of times is noise.
    other = [p for p in shape.attentions() if gri_macs and p not in before and gri_macs[p] != macs[p]]
    swaps = {path: cost(path, gri_macs, gri_times) for path in other}
    return CostTable(cost("", macs, times), parts, swaps, height, width, tokens)


def _all_blocks(shape: UNetShape) -> list[str]:
    return list(shape.blocks())


def _gri_everywhere(config: dict[str, Any], shape: UNetShape) -> dict[str, Any] | None:
    """The config with GRI attention for all self-attention, or None if there is none."""
    if config.get("only_cross_attention") not in (None, False) or not shape.attentions():
        return None
    cuts = [f"gri.{s}" for s in range(shape.num_stages) if set(shape.attentions(s)) - set(shape.gri())]
    return {**config, "gri_attention": shape.cut(*cuts).config()["gri_attention"]}


@torch.no_grad()
def measure_milliseconds(
    unet: nn.Module, inputs: Mapping[str, Any], paths: list[str], repeats: int = 10
) -> dict[str, float]:
    """Median time of one call of each module and, under "", of the full UNet.

    The full UNet is measured in separate calls, without the hooks of the modules.

    Args:
        unet: the UNet, on the CPU or an accelerator.
        inputs: keyword arguments of the call.
        paths: paths of modules. Each must run once per call of the UNet.
        repeats: number of measurements, 1 or more, after one warmup call.

    Raises:
        ValueError: `repeats` is below 1.
    """
    check_counts(repeats=repeats)
    modules = dict(unet.named_modules())
    found: dict[str, list[float]] = {path: [] for path in ["", *paths]}
    device = next(unet.parameters()).device.type
    unet(**inputs)
    for _ in range(repeats):
        for chosen in ([""], paths):
            marks: dict[str, list[Any]] = {path: [] for path in chosen}
            with _stopwatches({path: modules[path] for path in chosen}, marks, device):
                unet(**inputs)
            for path, (start, end) in marks.items():
                found[path].append(_elapsed(start, end))
    return {path: statistics.median(values) for path, values in found.items()}


@torch.no_grad()
def time_ratio(unet: nn.Module, other: nn.Module, inputs: Mapping[str, Any], repeats: int = 10) -> float:
    """The time of one call of `unet` divided by that of `other`: median over calls in turns.

    Args:
        unet, other: UNets with the same inputs.
        inputs: keyword arguments of the calls.
        repeats: number of calls of each, 1 or more, after one warmup call.

    Raises:
        ValueError: `repeats` is below 1.
    """
    check_counts(repeats=repeats)
    both = {"unet": unet, "other": other}
    device, found = next(unet.parameters()).device.type, []
    for number in range(repeats + 1):
        marks: dict[str, list[Any]] = {name: [] for name in both}
        with _stopwatches(both, marks, device):
            for network in both.values():
                network(**inputs)
        if number:
            found.append(_elapsed(*marks["unet"]) / _elapsed(*marks["other"]))
    return statistics.median(found)


@contextmanager
def _stopwatches(modules: dict[str, nn.Module], marks: dict[str, list[Any]], device: str) -> Iterator[None]:
    """Records when each module starts and ends."""
    handles: list[Any] = []
    for path, module in modules.items():

        def note(*_: Any, path: str = path) -> None:
            marks[path].append(_now(device))

        handles += [module.register_forward_pre_hook(note), module.register_forward_hook(note)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if device != "cpu":
        torch.accelerator.synchronize()


def _now(device: str) -> Any:
    """The time on the CPU, or an event in the queue of the accelerator.

    Reading the time of an accelerator directly would require a synchronization.
    """
    if device == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _elapsed(start: Any, end: Any) -> float:
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)
