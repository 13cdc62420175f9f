"""What the package holds: one line a room. A method's line is all that it needs here.

The star imports are for type checkers, which read a room's names from its `__init__.pyi`. At run time a room has no
names before one is asked for, and importing it only makes it known (`core.methods.register`).
"""

# ruff: noqa: F403

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .core import *
from .core.methods import ROOMS, Room
from .metrics import *

# The methods, in the order of `dx.summary` and of the command line:
from .teleport import *  # isort: skip
from .golden_noise import *  # isort: skip
from .smooth_lora import *  # isort: skip
from .sign import *  # isort: skip
from .asdm import *  # isort: skip


def exports() -> dict[str, Room]:
    """Every public name with the room that has it."""
    return {name: room for room in ROOMS for name in room.names}


def methods() -> Iterator[Room]:
    """The rooms that are methods."""
    return (room for room in ROOMS if room.title is not None)


@dataclass(frozen=True)
class Summary:
    """What is on one pipeline; `str()` of it is the report.

    Attributes:
        pipeline: class name of the pipeline.
        methods: one line for every method that is on, by its name; empty for a plain pipeline.
    """

    pipeline: str
    methods: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"  {name}: {text}" for name, text in self.methods.items()] or ["  nothing added"]
        return "\n".join([self.pipeline, *lines])


def summary(pipe: Any) -> Summary:
    """A small report of the methods on `pipe`; `print(dx.summary(pipe))`."""
    found = {
        str(room.title): room.load(room.describe)(pipe) for room in methods() if room.describe is not None
    }
    return Summary(type(pipe).__name__, {name: text for name, text in found.items() if text})
