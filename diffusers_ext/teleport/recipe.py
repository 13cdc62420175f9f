"""Teleportation in a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.methods import Part
from .apply import apply_teleport, check_pipeline, check_prompt_map, remove_teleport
from .gaussian import GaussianStats
from .scheduler import TeleportScheduler

TITLE = "teleportation"
OPTIONS = ("skip", "sigma", "mean_from")
CONFIG = ()


def read(pipe: Any) -> Part | None:
    """Statistics and options of the teleportation on `pipe`; None if it is off."""
    scheduler = getattr(pipe, "scheduler", None)
    if not isinstance(scheduler, TeleportScheduler):
        return None
    options = {"skip": scheduler.skip, "sigma": scheduler.sigma, "mean_from": scheduler.mean_from}
    return Part(options, scheduler.stats, scheduler.stats.source)


def is_on(pipe: Any, part: Part) -> bool:
    """Whether `pipe` has teleportation."""
    return isinstance(getattr(pipe, "scheduler", None), TeleportScheduler)


def check(pipe: Any, part: Part) -> None:
    """Raises a ValueError if teleportation with these statistics does not work on `pipe`."""
    if part.weights.prompt_map is not None and part.options["mean_from"] == "stats":
        check_prompt_map(pipe)
    check_pipeline(pipe)


def apply(pipe: Any, part: Part) -> Any:
    """Adds teleportation."""
    return apply_teleport(pipe, part.weights, **part.options)


def remove(pipe: Any, part: Part) -> Any:
    """Removes teleportation."""
    return remove_teleport(pipe)


def save(part: Part, folder: Path) -> None:
    """Writes the statistics."""
    part.weights.save_pretrained(folder)


def load(folder: Path, part: Part) -> Part:
    """Reads the statistics."""
    stats = GaussianStats.from_pretrained(folder)
    stats._note_source(part.source)
    return replace(part, weights=stats)
