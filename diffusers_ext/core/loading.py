"""Makes diffusers accept a package's classes as components of saved pipelines, without importing diffusers.

diffusers writes a component as `["<package>", "<Class>"]`, and downloads and finds it again, only if the package is in
the table `LOADABLE_CLASSES` of one of its modules. While that module is not loaded, an import hook waits for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

TABLE = "diffusers.pipelines.pipeline_loading_utils"


def register_components(package: str, base_classes: Mapping[str, Sequence[str]]) -> None:
    """Enters a package into diffusers' table, now or as soon as there is one; a second call changes nothing.

    Args:
        package: top-level name; the package has the base classes as attributes.
        base_classes: names that diffusers itself lists, each with the names of its methods that save and load.
    """
    finder = _Finder(package, {name: list(methods) for name, methods in base_classes.items()})
    if finder not in sys.meta_path:
        # Before the question below, so that a thread which starts to import the table in between meets it.
        sys.meta_path.insert(0, finder)
    if TABLE in sys.modules:
        finder.register(import_module(TABLE))  # waits for another thread that is still importing it


class _Finder(NamedTuple):
    """Registers whenever the table's module has run: a reload starts from diffusers' own table, so it stays."""

    package: str
    base_classes: dict[str, list[str]]

    def register(self, module: ModuleType) -> None:
        # A diffusers without the table is no reason for its import to fail.
        getattr(module, "LOADABLE_CLASSES", {})[self.package] = self.base_classes

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        finders = list(sys.meta_path)
        # Only those behind this one, so that two of its kind wrap one another instead of asking in circles.
        for finder in finders[finders.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                spec.loader = spec.loader and _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """The module's own loader in all but `exec_module`, to which the module goes back when it runs."""

    def __init__(self, own: Any, finder: _Finder) -> None:
        self.own, self.finder = own, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        self.finder.register(module)
