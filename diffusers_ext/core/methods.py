"""The registry of methods: their public names, commands, parts of recipes, and lines of `dx.summary` and `dx.support`.

The `__init__.py` of each method's package calls `register`. Its public names are listed in `__init__.pyi`,
which `lazy_loader` reads at run time and type checkers read directly. Nothing is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import lazy_loader


@dataclass(frozen=True)
class Part:
    """What a recipe has of one method.

    Attributes:
        options: what the method is applied with, as values of JSON.
        weights: what it is applied with besides; None for a method without weights.
        source: the folder or repository that the weights came from; None if it is not known.
    """

    options: dict[str, Any] = field(default_factory=dict)
    weights: Any = None
    source: str | None = None


class PartModule(Protocol):
    """What the `recipe.py` of a method has: a tuple and functions of the module."""

    TITLE: str  # what the recipe calls it
    OPTIONS: tuple[str, ...]  # the names of `Part.options`
    CONFIG: tuple[str, ...]  # entries that the method writes into the config of the denoiser
    read: Callable[[Any], Part | None]  # (pipe) → the method as it is on the pipeline; None if it is off
    is_on: Callable[
        [Any, Part], bool
    ]  # (pipe, part) → whether it is on already, so that it cannot be applied
    check: Callable[[Any, Part], None]  # (pipe, part): ValueError if it does not work on the pipeline
    apply: Callable[[Any, Part], Any]  # (pipe, part)
    remove: Callable[[Any, Part], Any]  # (pipe, part); does nothing if it is off
    save: Callable[[Part, Path], None]  # (part, folder): writes the weights
    load: Callable[[Path, Part], Part]  # (folder, part without weights) → the part with them


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
        recipe: the module of the package that puts the method into recipes, see `PartModule`. None for a method that
            is not added to a pipeline.
        options: "module:function" in the package, for the command `generate`. The function takes a pipeline and
            options of the command line, applies the method if they ask for it, and says whether they do.
    """

    package: str
    names: tuple[str, ...]
    title: str | None = None
    describe: str | None = None
    commands: str | None = None
    checks: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None
    options: str | None = None

    @property
    def key(self) -> str:
        """The last part of the package's name, by which recipes call the method."""
        return self.package.rpartition(".")[2]

    def part_module(self) -> PartModule:
        """Imports the module that `recipe` names."""
        module: Any = import_module(f"{self.package}.{self.recipe}")
        return module

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
