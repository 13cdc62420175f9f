"""Smooth-LoRAs in a recipe: their weights, their scales, and which of them are active."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from ..core.families import denoiser_of
from ..core.methods import Part
from ..core.storage import read_tensors, write_tensors
from ..training.lora import lora_state
from .apply import (
    adapters_of,
    add_weights,
    check_pipeline,
    lora_denoiser,
    remove_smooth_lora,
    smooth_loras_of,
    sources_of,
)

TITLE = "Smooth-LoRA"
# {"adapters": {name: {"scale": one number, or one for each layer by its name; "active": bool; "source": str or None}}}
OPTIONS = ("adapters",)
CONFIG = ()


def read(pipe: Any) -> Part | None:
    """The Smooth-LoRAs of `pipe`; None if there are none.

    Raises:
        ValueError: the weights are offloaded to nowhere (`enable_sequential_cpu_offload`).
    """
    if denoiser_of(pipe) is None or not smooth_loras_of(pipe):
        return None
    denoiser, sources = lora_denoiser(pipe), sources_of(pipe)
    if any(value.is_meta for value in denoiser.parameters()):
        raise ValueError(
            f"The weights of {type(pipe).__name__} are not in memory (enable_sequential_cpu_offload): make the recipe"
            " before the offloading."
        )
    active = {name: is_active for name, (_, is_active) in smooth_loras_of(pipe).items()}
    adapters = {
        name: {"scale": _scale(denoiser, name), "active": is_active, "source": sources[name]}
        for name, is_active in active.items()
    }
    weights = {name: lora_state(denoiser, name) for name in adapters}
    known = [source for source in sources.values() if source is not None]
    return Part({"adapters": adapters}, weights, ", ".join(known) or None)


def is_on(pipe: Any, part: Part) -> bool:
    """Whether `pipe` has an adapter of one of the names."""
    return bool(set(adapters_of(pipe)) & set(part.options["adapters"]))


def check(pipe: Any, part: Part) -> None:
    """Raises a ValueError if a Smooth-LoRA does not work on `pipe`."""
    check_pipeline(pipe)


def apply(pipe: Any, part: Part) -> Any:
    """Adds the adapters. Those that are active before stay active, so that removing the new ones restores the images."""
    denoiser = lora_denoiser(pipe)
    active = list(denoiser.active_adapters()) if adapters_of(pipe) else []
    for name, settings in part.options["adapters"].items():
        add_weights(pipe, part.weights[name], name, settings["source"])
        active += [name] if settings["active"] else []
    for path, layer in _layers(denoiser):
        layer.set_adapter(active)
        for name, settings in part.options["adapters"].items():
            scale = settings["scale"]
            if name in getattr(layer, "scaling", {}):
                layer.scaling[name] = scale[path] if isinstance(scale, dict) else scale
    return pipe


def remove(pipe: Any, part: Part) -> Any:
    """Removes the adapters."""
    for name in part.options["adapters"]:
        remove_smooth_lora(pipe, name)
    return pipe


def save(part: Part, folder: Path) -> None:
    """Writes a file for each adapter, numbered: a name of an adapter may not be one of a file."""
    for number, name in enumerate(part.options["adapters"]):
        write_tensors(folder / f"{number}.safetensors", part.weights[name])


def load(folder: Path, part: Part) -> Part:
    """Reads the weights."""
    names = list(part.options["adapters"])
    files = [read_tensors(folder / f"{number}.safetensors")[0] for number in range(len(names))]
    return replace(part, weights=dict(zip(names, files)))


def _layers(denoiser: Any) -> Iterator[tuple[str, Any]]:
    return ((path, part) for path, part in denoiser.named_modules() if isinstance(part, BaseTunerLayer))


def _scale(denoiser: Any, name: str) -> float | dict[str, float]:
    """What `set_adapters` has set the scale of an adapter to; one number if it is the same in all layers.

    PEFT multiplies it by α/r, which is 1 for the adapters of `apply_smooth_lora`.
    """
    found = {
        path: layer.scaling[name]
        for path, layer in _layers(denoiser)
        if name in getattr(layer, "scaling", {})
    }
    different = set(found.values())
    return different.pop() if len(different) == 1 else found
