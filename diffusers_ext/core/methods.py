"""The registry of methods: their public names, commands, and lines of `dx.summary` and `dx.support`.

The `__init__.py` of each method's package calls `register`. Its public names are listed in `__init__.pyi`,
which `lazy_loader` reads at run time and type checkers read directly. Nothing is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import lazy_loader


@dataclass(frozen=True)
class Room:
    """A registered package with public names.

    Attributes:
        package: dotted name of the package.
        names: names that the package exports.
        title: title of the method in `dx.summary`; None for a package that is not a method.
        describe: "module:function" in the package. The function takes a pipeline and returns one line about
            the method for `dx.summary`, or None if the method is not applied.
        commands: "module:function" in the package. The function adds the commands of the package to a typer
            app. None for a package without commands.
        checks: for every use of the method, by its name in `dx.support`, "module:function" in the package. The
            function takes a pipeline and raises a ValueError if the method does not work on it.
    """

    package: str
    names: tuple[str, ...]
    title: str | None = None
    describe: str | None = None
    commands: str | None = None
    checks: dict[str, str] = field(default_factory=dict)

    def load(self, reference: str) -> Callable[..., Any]:
        """Imports the function that "module:function" names."""
        module, _, function = reference.partition(":")
        return getattr(import_module(f"{self.package}.{module}"), function)


ROOMS: list[Room] = []


def register(package: str, file: str, **options: Any) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Registers a package and returns its `__getattr__` and `__dir__`.

    Args:
        package, file: `__name__` and `__file__` of the package.
        options: the other attributes of `Room`.
    """
    getter, lister, names = lazy_loader.attach_stub(package, file)
    ROOMS.append(Room(package, tuple(names), **options))
    return getter, lister
