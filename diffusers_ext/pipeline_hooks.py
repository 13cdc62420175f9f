"""Hooks on the methods of one pipeline object, which several plug-ins may add and remove in any order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Hook = Callable[[dict[str, Any], Any], Any]


class HookHandle:
    """`remove()` takes one hook off again; with the last one the pipeline has its own method back."""

    def __init__(self, pipe: Any, name: str, hook: Hook) -> None:
        self._pipe, self._name, self._hook = pipe, name, hook

    def remove(self) -> None:
        """Takes the hook off."""
        hooks = self._pipe.__dict__[self._name].hooks
        hooks.remove(self._hook)
        if not hooks:
            own = self._pipe.__dict__.pop(self._name).own
            if own is not None:
                self._pipe.__dict__[self._name] = own


def add_hook(pipe: Any, name: str, hook: Hook) -> HookHandle:
    """Calls `hook(arguments, result)` after each `pipe.<name>(...)`, on this one pipeline object.

    Args:
        pipe: any object with that method.
        name: of the method.
        hook: given the call's arguments by name and its result, returns the result to use instead. Hooks run in
            the order in which they were added.

    Raises:
        AttributeError: the pipeline has no such method.
    """
    method: Any = getattr(pipe, name)
    if not hasattr(method, "hooks"):
        method = _hooked(method, pipe.__dict__.get(name))
        pipe.__dict__[name] = method
    method.hooks.append(hook)
    return HookHandle(pipe, name, hook)


def _hooked(original: Callable[..., Any], own: Any) -> Any:
    signature = inspect.signature(original)
    hooks: list[Hook] = []

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        for hook in tuple(hooks):
            result = hook(given, result)
        return result

    wrapper.__dict__.update(hooks=hooks, own=own)
    return wrapper


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar off."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


@contextmanager
def scheduler_of(pipe: Any, scheduler: Any) -> Iterator[None]:
    """`scheduler` in the place of the pipeline's own, for the time of the block."""
    original, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = original
