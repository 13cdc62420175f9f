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

# What combines them:
from .recipes import *  # isort: skip


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


@dataclass(frozen=True)
class Support:
    """Which methods work on one pipeline; `str()` of it is the report.

    Attributes:
        pipeline: class name of the pipeline.
        refusals: for every use of a method, by its name, the reason why it does not work on this pipeline; None where
            it works.
    """

    pipeline: str
    refusals: dict[str, str | None]

    def __str__(self) -> str:
        lines = (f"  {name}: {reason or 'works'}" for name, reason in self.refusals.items())
        return "\n".join([self.pipeline, *lines])


def support(pipe: Any) -> Support:
    """Which methods work on `pipe`, and why the others do not; `print(dx.support(pipe))`.

    The answer is that of the checks with which the methods themselves refuse a pipeline. The pipeline is neither called
    nor changed. A method that works may still refuse single calls, for example those with an argument that it does not
    support, and weights or statistics that do not fit.
    """
    refusals: dict[str, str | None] = {}
    for room in methods():
        for name, reference in room.checks.items():
            try:
                room.load(reference)(pipe)
                refusals[name] = None
            except ValueError as error:
                refusals[name] = str(error)
    return Support(type(pipe).__name__, refusals)
