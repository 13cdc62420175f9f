"""Hooks on one object's methods come and go in any order and leave nothing behind."""

import inspect
from itertools import permutations

import pytest

from diffusers_ext.core.pipeline import add_hook


class Thing:
    def double(self, x: int, plus: int = 0) -> int:
        return 2 * x + plus


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
