"""Pipelines whose call takes one argument more than that of their base class."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def adds_argument(
    base: type, name: str, default: Any, doc: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a `__call__` the signature and text of `base`'s, plus the keyword argument `name`.

    diffusers and this package read a pipeline's abilities off `inspect.signature(pipe.__call__)`.

    Args:
        base: the pipeline class that is extended.
        name, default: of the new argument.
        doc: its line in the docstring.
    """
    original: Any = base.__call__

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapper = functools.wraps(original)(function)
        signature = inspect.signature(original)
        extra = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default)
        )
        *named, rest = signature.parameters.values()
        # A call that takes no further keyword arguments ends with an ordinary one.
        ordered = [*named, extra, rest] if rest.kind is rest.VAR_KEYWORD else [*named, rest, extra]
        wrapper.__dict__["__signature__"] = signature.replace(parameters=ordered)
        wrapper.__doc__ = f"{original.__doc__}\n\n        {doc}\n"
        return wrapper

    return decorate


def named_arguments(base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `base` by name; a wrong call is left for `base` to refuse."""
    names = list(inspect.signature(base.__call__).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}
