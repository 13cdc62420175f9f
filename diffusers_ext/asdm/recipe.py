"""GRI attention in a recipe. A pruned network is not added to a pipeline; it is the pipeline's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.methods import Part
from .apply import apply_gri_attention, check_gri_attention, gri_attention_of, remove_gri_attention
from .gri_places import chosen_attentions, network_of

TITLE = "GRI attention"
OPTIONS = ("paths", "window", "pool")
CONFIG = ("gri_attention",)  # of an ASDMUNet2DConditionModel


def read(pipe: Any) -> Part | None:
    """Layers and options of the GRI attention on `pipe`; None if there is none."""
    found = gri_attention_of(pipe)
    return None if found is None else Part(dict(zip(OPTIONS, found)))


def is_on(pipe: Any, part: Part) -> bool:
    """Whether `pipe` has GRI attention."""
    return gri_attention_of(pipe) is not None


def check(pipe: Any, part: Part) -> None:
    """Raises a ValueError if GRI attention in these layers does not work on `pipe`."""
    check_gri_attention(pipe)
    chosen_attentions(network_of(pipe), part.options["paths"])


def apply(pipe: Any, part: Part) -> Any:
    """Adds GRI attention."""
    return apply_gri_attention(pipe, **part.options)


def remove(pipe: Any, part: Part) -> Any:
    """Removes GRI attention."""
    return remove_gri_attention(pipe)


def save(part: Part, folder: Path) -> None:
    """There are no weights."""


def load(folder: Path, part: Part) -> Part:
    """There are no weights."""
    return part
