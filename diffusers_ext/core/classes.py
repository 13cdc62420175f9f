"""Tools for writing pipeline classes that extend those of diffusers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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


# --- components of a pipeline class ---


class FromPipeMixin:
    """Before a pipeline class: `from_pipe` takes over components of subclasses too, such as pruned UNets.

    diffusers looks for the exact class of a component among the annotations of `__init__`.

    Raises:
        ValueError: `DiffusionPipeline.from_pipe(..., custom_pipeline=...)` for a class with optional components,
            of which diffusers passes the names instead of the objects.
    """

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
