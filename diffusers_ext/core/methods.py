"""What the rest of the package needs to know of a method, said by the method's own room.

A room's `__init__.py` calls `register`. Its public names stand in `__init__.pyi`, from which `lazy_loader` takes them
at run time and type checkers take them always. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import lazy_loader


@dataclass(frozen=True)
class Room:
    """A package with public names.

    Attributes:
        package: its dotted name.
        names: what it exports.
        title: of the method in `dx.summary`; None for a package that is not a method.
        describe: "module:function" in the room, of a pipeline: one line about the method on it, or None.
        commands: "module:function" in the room, which adds its commands to a typer app; None for none.
    """

    package: str
    names: tuple[str, ...]
    title: str | None = None
    describe: str | None = None
    commands: str | None = None

    def load(self, reference: str) -> Callable[..., Any]:
        """The function that "module:function" names."""
        module, _, function = reference.partition(":")
        return getattr(import_module(f"{self.package}.{module}"), function)


ROOMS: list[Room] = []


def register(package: str, file: str, **options: Any) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes a room known; returns its `__getattr__` and `__dir__`.

    Args:
        package, file: the room's `__name__` and `__file__`.
        options: the further attributes of `Room`.
    """
    getter, lister, names = lazy_loader.attach_stub(package, file)
    ROOMS.append(Room(package, tuple(names), **options))
    return getter, lister
