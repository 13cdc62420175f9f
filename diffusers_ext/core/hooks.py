"""Methods of one object, followed by hooks or replaced for a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# --- the methods of one object ---


def parameters_of(owner: Any, name: str = "__call__") -> dict[str, inspect.Parameter]:
    """The parameters of a method by name: first the positional ones in their order, then the keyword-only ones.

    `*args` and `**kwargs` of an override stand for the parameters of the method that it overrides, so the names
    of the base classes follow its own.

    Raises:
        AttributeError: there is no such method.
    """
    own = [vars(owner)[name]] if name in vars(owner) else []
    classes = [vars(cls)[name] for cls in type(owner).__mro__ if name in vars(cls)]
    bound = [method.__get__(owner, type(owner)) for method in classes]
    positional: dict[str, inspect.Parameter] = {}
    keyword: dict[str, inspect.Parameter] = {}
    for method in [*own, *bound] or [getattr(owner, name)]:
        parameters = inspect.signature(method).parameters.values()
        passes_on = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for p in parameters:
            if p not in passes_on and p.name not in positional | keyword:
                (keyword if p.kind is p.KEYWORD_ONLY else positional)[p.name] = p
        if not passes_on:
            break
    return positional | keyword


class InstanceMethod:
    """A callable in the `__dict__` of one object that takes the place of one of the object's methods.

    It looks the replaced method up through its owner in every call. A copy of the owner (`copy.deepcopy`,
    pickle) therefore calls its own method. A closure would still call that of the original object. A shallow copy
    (`copy.copy`) shares this object, and so the method of the original.

    Args:
        owner: the object. The new instance is put into its `__dict__`.
        name: name of the method.

    Raises:
        AttributeError: the object has no such method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.__name__, self.__doc__ = name, getattr(owner, name).__doc__
        self.owner, self.name = owner, name
        self.own = vars(owner).get(name)  # a method of this object only, for example one set by the user
        vars(owner)[name] = self

    @property
    def original(self) -> Any:
        """The replaced method."""
        if self.own is not None:
            return self.own
        found = inspect.getattr_static(type(self.owner), self.name, None)
        if found is None:  # the owner delegates to another object
            return self.owner.__getattr__(self.name)
        return found.__get__(self.owner, type(self.owner))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def restore(self) -> None:
        """Gives the owner its own method back, unless another method has taken this one's place since."""
        if vars(self.owner).get(self.name) is self:
            del vars(self.owner)[self.name]
            if self.own is not None:
                vars(self.owner)[self.name] = self.own


# --- hooks; several plug-ins may add and remove them in any order ---

Hook = Callable[[dict[str, Any], Any], Any]


class _HookedMethod(InstanceMethod):
    """A method that is followed by hooks."""

    def __init__(self, owner: Any, name: str) -> None:
        super().__init__(owner, name)
        self.hooks: list[Hook] = []
        self.stand_in: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Before the call, which may change the lists.
        given = {**dict(zip(parameters_of(self.owner, self.name), args)), **kwargs}
        given = {key: own_list(value) for key, value in given.items()}
        result = (self.stand_in or self.original)(*args, **kwargs)
        for hook in tuple(self.hooks):
            result = hook(given, result)
        return result


class HookHandle:
    """Removes one hook. When the last hook is removed, the pipeline has its own method back."""

    def __init__(self, method: _HookedMethod, hook: Hook) -> None:
        self._method, self._hook = method, hook

    def remove(self) -> None:
        """Removes the hook."""
        self._method.hooks.remove(self._hook)
        if not self._method.hooks:
            self._method.restore()


def add_hook(pipe: Any, name: str, hook: Hook) -> HookHandle:
    """Calls `hook(arguments, result)` after each `pipe.<name>(...)`, on this pipeline object only.

    A deep copy of the pipeline, or one that was pickled, has the hook too. For a copy that is independent of
    the original, the hook must be a function of a module, or an object or a bound method of an object that
    refers to the pipeline; closures are shared with the copy and cannot be pickled.

    Args:
        pipe: any object with that method.
        name: name of the method.
        hook: takes the arguments of the call by name and its result, and returns the result to use instead.
            Hooks run in the order in which they were added.

    Raises:
        AttributeError: the pipeline has no such method.
    """
    method = vars(pipe).get(name)
    if not isinstance(method, _HookedMethod):
        method = _HookedMethod(pipe, name)
    method.hooks.append(hook)
    return HookHandle(method, hook)


@contextmanager
def stand_in(pipe: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Calls `function` in place of `pipe.<name>` within the block, followed by the hooks of the method.

    Raises:
        AttributeError: the pipeline has no such method.
    """
    handle = add_hook(pipe, name, _keep_result)
    method = vars(pipe)[name]
    before, method.stand_in = method.stand_in, function
    try:
        yield
    finally:
        method.stand_in = before
        handle.remove()


def _keep_result(given: dict[str, Any], result: Any) -> Any:
    return result


def own_list(value: Any) -> Any:
    """A copy of a list; any other value itself."""
    return list(value) if isinstance(value, list) else value
