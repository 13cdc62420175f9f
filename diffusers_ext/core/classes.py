"""Tools for writing pipeline classes that extend those of diffusers."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# --- an additional argument for the call of a pipeline class ---


def adds_argument(
    base: type, name: str, default: Any, doc: str, method: str = "__call__"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a `__call__` the signature and docstring of `base`'s, plus the keyword argument `name`.

    diffusers and this package inspect the signature of `pipe.__call__` to find out what a pipeline supports, and
    diffusers that of `__init__` to find the components and settings to load.

    Args:
        base: the pipeline class that is extended.
        name, default: name and default value of the new argument.
        doc: its line in the docstring.
        method: name of the method, `__call__` or `__init__`.
    """
    original: Any = getattr(base, method)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapper = functools.wraps(original)(function)
        signature = inspect.signature(original)
        extra = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default)
        )
        *named, rest = signature.parameters.values()
        # Without **kwargs, the last parameter is an ordinary one that the new one follows.
        ordered = [*named, extra, rest] if rest.kind is rest.VAR_KEYWORD else [*named, rest, extra]
        wrapper.__dict__["__signature__"] = signature.replace(parameters=ordered)
        wrapper.__doc__ = f"{original.__doc__}\n\n        {doc}\n"
        return wrapper

    return decorate


def named_arguments(
    base: type, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "__call__"
) -> dict[str, Any]:
    """The arguments of a call of a method of `base` by name. They are not checked: `base` raises the errors."""
    names = list(inspect.signature(getattr(base, method)).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


# --- pipeline classes of this package ---

# The entry of model_index.json by which diffusers finds the class: the file beside it, and the name in this file.
SAVED_CLASS = ["pipeline", "Pipeline"]
# The package, and the name by which its pipeline classes find their components, see `components`.
_PACKAGE = __name__.partition(".")[0]
_COMPONENTS = f"{_PACKAGE}.core.components"
_CODE = """\
# Written by diffusers-ext. Diffusers runs this file with trust_remote_code=True.{reason}
try:
    from {module} import (
        {name},
    )
except ImportError as error:
    raise ImportError(
        "{kind} is a class of the package diffusers-ext, which is not installed or too old."
        " Install it from https://github.com/diffusers-ext/diffusers-ext and try again."
    ) from error

__all__ = ["{exported}"]
"""
_REASON = """ It runs all local files of one name in
# one module, and refuses a module with two pipeline classes: under the same name everywhere, a later one replaces an
# earlier one."""


def pipeline_code(kind: type) -> str:
    """The content of `pipeline.py`, with which diffusers loads a pipeline class of this package."""
    name = kind.__name__
    values = {"module": kind.__module__, "name": f"{name} as {SAVED_CLASS[1]}", "kind": name}
    return _CODE.format(**values, exported=SAVED_CLASS[1], reason=_REASON)


def _component_code(name: str) -> str:
    """The content of `COMPONENT/diffusers_ext.py`, with which diffusers loads a component of this package."""
    return _CODE.format(module=_PACKAGE, name=name, kind=name, exported=name, reason="")


def _is_ours(kind: type) -> bool:
    """Whether another process can import the class from this package. A user's own subclass may be anywhere."""
    return kind.__module__.partition(".")[0] == _PACKAGE


def _is_component(entry: Any) -> bool:
    """Whether a value of `model_index.json` is a component of this package."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] == _PACKAGE


class CustomPipelineMixin:
    """Before a pipeline class: it is saved with what diffusers needs to load it, and takes over all components.

    - What it saves holds `pipeline.py`, which imports the class from this package, and such a file for each component
      of this package, so that `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` finds them.
      `from_pretrained` of the class itself needs no such permission: it never runs those files.
    - `from_pipe` takes over components of subclasses too, such as pruned UNets. diffusers looks for the exact class of
      a component among the annotations of `__init__`.

    Raises:
        ValueError: `DiffusionPipeline.from_pipe(..., custom_pipeline=...)` for a class with optional components,
            of which diffusers passes the names instead of the objects.
    """

    def to_json_string(self) -> str:
        """The content of `model_index.json`."""
        text = super().to_json_string()  # type: ignore[misc]
        if not _is_ours(type(self)):
            return text
        return json.dumps({**json.loads(text), "_class_name": SAVED_CLASS}, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes `model_index.json` and the files that import classes; the arguments are those of the base class."""
        if _is_ours(type(self)) and not os.path.isfile(save_directory):  # the base class raises an error
            os.makedirs(save_directory, exist_ok=True)
            files = {f"{SAVED_CLASS[0]}.py": pipeline_code(type(self))}
            for name, entry in self.config.items():  # type: ignore[attr-defined]
                if _is_component(entry) and Path(save_directory, name).is_dir():
                    files[f"{name}/{_PACKAGE}.py"] = _component_code(entry[1])
            for path, code in files.items():
                Path(save_directory, path).write_text(code, encoding="utf-8")
        super().save_config(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        config = super()._dict_from_json_file(json_file)  # type: ignore[misc]
        # With the entries for DiffusionPipeline, diffusers would run the files even though the classes are known.
        found = {k: [_COMPONENTS, v[1]] if _is_component(v) else v for k, v in config.items()}
        saved = isinstance(config.get("_class_name"), list)
        return {**found, "_class_name": cls.__name__} if saved else found

    def register_modules(self, **modules: Any) -> None:
        """Same as in the base class."""
        entries = {name: module for name, module in modules.items() if isinstance(module, tuple | list)}
        named = [name for name, (library, _) in entries.items() if library is not None]
        if named:
            raise ValueError(
                f"Expected components, got their names for {', '.join(named)}: DiffusionPipeline.from_pipe does"
                f" not pass optional components on. Use {type(self).__name__}.from_pipe(pipe) instead."
            )
        super().register_modules(**{**modules, **dict.fromkeys(entries)})  # type: ignore[misc]

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        types = super()._get_signature_types()  # type: ignore[misc]
        return {name: _AndSubclasses(kinds) for name, kinds in types.items()}


class _AndSubclasses(tuple[Any, ...]):
    def __contains__(self, kind: Any) -> bool:
        return any(isinstance(own, type) and issubclass(kind, own) for own in self)
