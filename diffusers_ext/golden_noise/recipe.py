"""Golden noise in a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..core.methods import Part
from .apply import apply_golden_noise, check_channels, check_pipeline, golden_noise_of, remove_golden_noise
from .npnet import NPNetModel

TITLE = "golden noise"
# The network computes in the dtype of its weights, so that another one would give other images.
OPTIONS = ("strength", "dtype")
CONFIG = ()
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def read(pipe: Any) -> Part | None:
    """Network and options of the golden noise on `pipe`; None if it is off.

    A network that is a component of the pipeline has the strength 1, unless a call says otherwise.
    """
    applied = golden_noise_of(pipe)
    npnet: Any = applied.npnet if applied else getattr(pipe, "npnet", None)
    if npnet is None:
        return None
    strength = applied.strength if applied else 1.0
    options = {"strength": strength, "dtype": str(npnet.dtype).removeprefix("torch.")}
    source = npnet.config.get("_name_or_path")
    return Part(options, npnet, str(source) if source else None)


def is_on(pipe: Any, part: Part) -> bool:
    """Whether `pipe` has golden noise."""
    return golden_noise_of(pipe) is not None or getattr(pipe, "npnet", None) is not None


def check(pipe: Any, part: Part) -> None:
    """Raises a ValueError if golden noise of this network does not work on `pipe`."""
    check_pipeline(pipe)
    check_channels(pipe, part.weights)


def apply(pipe: Any, part: Part) -> Any:
    """Adds golden noise; the network moves to the device of the pipeline."""
    return apply_golden_noise(pipe, part.weights.to(pipe.device), part.options["strength"])


def remove(pipe: Any, part: Part) -> Any:
    """Removes golden noise."""
    return remove_golden_noise(pipe)


def save(part: Part, folder: Path) -> None:
    """Writes the network. Its config does not tell where on this machine it came from."""
    npnet = part.weights
    before = npnet.config.get("_name_or_path")
    npnet.register_to_config(_name_or_path=part.source)
    try:
        npnet.save_pretrained(folder)
    finally:
        npnet.register_to_config(_name_or_path=before)


def load(folder: Path, part: Part) -> Part:
    """Reads the network.

    Raises:
        ValueError: an unknown dtype.
    """
    dtype = part.options["dtype"]
    if dtype not in _DTYPES:
        raise ValueError(f"The dtype of the NPNet must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    npnet: Any = NPNetModel.from_pretrained(folder, dtype=_DTYPES[dtype])
    npnet.register_to_config(_name_or_path=part.source)
    return replace(part, weights=npnet)
