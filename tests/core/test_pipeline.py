"""Hooks on one object's methods come and go in any order and leave nothing behind."""

import copy
import functools
import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch

import diffusers_ext
from diffusers_ext.core.hooks import InstanceMethod, add_hook, parameters_of
from diffusers_ext.core.pipeline import call_pipeline, model_output
from tests import families


class Thing:
    factor = 2

    def double(self, x: int, plus: int = 0) -> int:
        return self.factor * x + plus


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_hooks_run_in_order_and_come_off_in_any(order: tuple[int, ...]) -> None:
    thing, other = Thing(), Thing()
    seen: list[tuple[int, dict]] = []

    def hook(number: int):
        def change(given, result):
            seen.append((number, given))
            return 10 * result + number

        return change

    handles = [add_hook(thing, "double", hook(number)) for number in range(3)]
    assert thing.double(3, plus=1) == 7012
    assert seen == [(n, {"x": 3, "plus": 1}) for n in range(3)]
    assert other.double(3) == 6
    assert list(inspect.signature(thing.double).parameters) == ["x", "plus"]
    left = [0, 1, 2]
    for number in order:
        handles[number].remove()
        left.remove(number)
        assert thing.double(0) == int("0" + "".join(map(str, left)))
    assert vars(thing) == {}


def test_an_own_method_of_the_object_comes_back() -> None:
    thing = Thing()
    thing.double = own = lambda x, plus=0: -x
    handle = add_hook(thing, "double", lambda given, result: result - 1)
    assert thing.double(4) == -5
    handle.remove()
    assert vars(thing) == {"double": own}
    with pytest.raises(AttributeError):
        add_hook(thing, "triple", lambda given, result: result)


# --- copies ---


class Add:
    def __init__(self, thing: Thing, amount: int) -> None:
        self.thing, self.amount = thing, amount

    def __call__(self, given: dict[str, Any], result: int) -> int:
        return result + self.amount * self.thing.factor

    def negate(self, given: dict[str, Any], result: int) -> int:
        return -result * self.thing.factor


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.parametrize("own", [False, True])
def test_a_copy_has_hooks_of_its_own(copied: Callable[[Any], Any], own: bool) -> None:
    thing: Any = Thing()
    if own:
        thing.double = Thing().double
    add = Add(thing, 5)
    thing.handles = [add_hook(thing, "double", add), add_hook(thing, "double", add.negate)]
    twin = copied(thing)
    assert thing.double(1) == twin.double(1) == -24
    twin.factor = twin.double.owner.factor = 3
    assert twin.double.owner is twin
    assert thing.double(1) == -24
    assert twin.double(1, plus=1) == (-54 if own else -57)
    for one, other, left in ((twin, thing, -24), (thing, None, None)):
        for handle in one.__dict__.pop("handles"):
            handle.remove()
        assert vars(one).keys() - {"factor"} == ({"double"} if own else set())
        assert not isinstance(one.double, InstanceMethod)
        assert other is None or other.double(1) == left


def test_a_method_put_over_a_hooked_one_stays() -> None:
    thing: Any = Thing()
    handle = add_hook(thing, "double", lambda given, result: result + 1)
    hooked = thing.double
    thing.double = over = lambda x: 10 * hooked(x)
    assert thing.double(1) == 30
    handle.remove()
    assert thing.double is over
    assert thing.double(1) == 20


# --- the names of arguments ---


class Passes(Thing):
    def double(self, *args: Any, **kwargs: Any) -> int:
        return super().double(*args, **kwargs)


class Adds(Thing):
    def double(self, x: int, *args: Any, minus: int = 0, **kwargs: Any) -> int:
        return super().double(x, *args, **kwargs) - minus


@pytest.mark.parametrize("kind", [Thing, Passes, Adds, type("Passes2", (Passes,), {})])
def test_hooks_get_arguments_by_name_through_overrides(kind: type) -> None:
    thing, seen = kind(), []
    names = ["x", "plus", "minus"] if kind is Adds else ["x", "plus"]
    assert list(parameters_of(thing, "double")) == names
    assert parameters_of(thing, "double")["plus"].default == 0
    handle = add_hook(thing, "double", lambda given, result: seen.append(given) or result)
    assert list(parameters_of(thing, "double")) == names
    for call in (thing.double(1, 2), thing.double(1, plus=2), thing.double(x=1, plus=2)):
        assert call == 4
    assert seen == [{"x": 1, "plus": 2}] * 3
    handle.remove()
    thing.double = functools.partial(lambda *args, **kwargs: kind.double(thing, *args, **kwargs))
    assert list(parameters_of(thing, "double"))[:2] == ["x", "plus"]
    with pytest.raises(AttributeError):
        parameters_of(thing, "triple")


def _overrides() -> list[Any]:
    """(class, method, class that it overrides it of) for the package's subclasses of other libraries' classes."""
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(diffusers_ext.__path__, "diffusers_ext.")
        if not found.name.endswith("__main__")
    ]
    classes = {
        c for m in modules for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__
    }
    return [
        pytest.param(cls, name, base, id=f"{cls.__name__}.{name}")
        for cls in sorted(classes, key=lambda cls: cls.__name__)
        for name, method in vars(cls).items()
        if inspect.isfunction(method) and (name == "__call__" or not name.startswith("_"))
        for base in [next((b for b in cls.__mro__[1:] if name in vars(b)), object)]
        if base.__module__.startswith("diffusers.") and inspect.isfunction(vars(base)[name])
    ]


@pytest.mark.parametrize(("cls", "name", "base"), _overrides())
def test_overrides_show_the_parameters_of_their_base(cls: type, name: str, base: type) -> None:
    """Pipelines and hooks inspect signatures to find out what a method supports."""
    shown, expected = (inspect.signature(getattr(c, name)).parameters for c in (cls, base))
    assert list(expected) == [key for key in shown if key in expected]
    assert not any(p.kind is p.VAR_POSITIONAL for p in shown.values() if p.name not in expected)


# --- lists ---


def test_calls_get_lists_of_their_own() -> None:
    class Template:
        def encode(self, prompt: list[str], negative: Any = None) -> list[str]:
            for texts in (prompt, negative or []):
                texts[:] = [f"user {text}" for text in texts]
            return prompt

        def __call__(self, prompt: list[str], *, negative: Any = None) -> Any:
            return self.encode(prompt, negative)

    pipe, prompt, negative, seen = Template(), ["a", "b"], ["c"], []
    assert call_pipeline(pipe, prompt, negative=negative) == ["user a", "user b"]
    assert call_pipeline(pipe, prompt=prompt) == ["user a", "user b"]
    assert (prompt, negative) == (["a", "b"], ["c"])
    add_hook(pipe, "encode", lambda given, result: seen.append(given) or result)
    pipe(prompt, negative=negative)
    assert seen == [{"prompt": ["a", "b"], "negative": ["c"]}]
    assert prompt == ["user a", "user b"]  # the user's own call is not changed


def test_a_stopped_call_leaves_what_a_whole_call_leaves() -> None:
    """Perturbed-attention guidance sets attention processors in its call and restores them at the end."""
    pipe = families.build("sd-pag")
    before = dict(pipe.unet.attn_processors)
    noise = torch.randn(1, 4, 8, 8)
    model_output(pipe, noise, {"prompt": "a", "height": 8, "width": 8, "pag_scale": 3.0})
    assert pipe.unet.attn_processors == before
