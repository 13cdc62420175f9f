"""Successive halving with arms whose losses are known in closed form."""

import math
from typing import Any

import numpy as np
import pytest

import diffusers_ext as dx
from diffusers_ext.asdm.halving import Rung, ranking, successive_halving


class Arms:
    """Losses floor + speed / steps, which are counted when they are asked for.

    Args:
        floors: the loss of every arm after endless training.
        speeds: how far it is from there after one step.
    """

    def __init__(self, floors: Any, speeds: Any, halving: dx.Halving) -> None:
        self.losses = {f"arm-{i}": (f, s) for i, (f, s) in enumerate(zip(floors, speeds))}
        self.steps, self.trained = halving.steps_of_rungs, dict.fromkeys(self.losses, 0)

    def evaluate(self, name: str, rung: int) -> float:
        floor, speed = self.losses[name]
        assert self.trained[name] == (self.steps[rung - 1] if rung else 0), "an arm left out a rung"
        self.trained[name] = self.steps[rung]
        return floor + speed / self.steps[rung]


@pytest.mark.parametrize(("num", "halving"), [(12, dx.Halving(10, 3, 2)), (27, dx.Halving(5, 4, 3))])
def test_the_best_arm_is_found_within_the_budget(num: int, halving: dx.Halving) -> None:
    floors = np.random.default_rng(0).permutation(num) / num
    arms = Arms(floors, np.ones(num), halving)
    best = f"arm-{int(np.argmin(floors))}"
    rungs = list(successive_halving(list(arms.losses), halving, arms.evaluate, best))
    assert ranking(rungs)[0] == best
    assert [len(rung.losses) for rung in rungs] == halving.sizes(num)
    # Every arm was trained to the steps of its last rung and no further: its sizes say how many.
    sizes = [*halving.sizes(num), 0]
    wanted = sum((a - b) * s for a, b, s in zip(sizes, sizes[1:], halving.steps_of_rungs))
    assert sum(arms.trained.values()) == wanted
    # With equal speeds no rung reorders, so the ranking is that of the floors.
    assert ranking(rungs) == [f"arm-{i}" for i in np.argsort(floors)]


def test_later_rungs_correct_the_first_one() -> None:
    # arm-0 learns fast and ends badly; arm-2 is second after 10 steps and first after 20.
    arms = Arms([0.5, 1.0, 0.4, 2.0], [1, 1, 2.5, 1], halving := dx.Halving(10, 2))
    rungs = list(successive_halving(list(arms.losses), halving, arms.evaluate, "arm-0"))
    assert rungs[0].kept == ("arm-0", "arm-2")
    assert ranking(rungs) == ["arm-2", "arm-0", "arm-1", "arm-3"]
    assert rungs[1].losses == {"arm-0": 0.5 + 1 / 20, "arm-2": 0.4 + 2.5 / 20}


def test_the_control_stays_though_it_is_worst() -> None:
    arms = Arms([9, 1, 2, 3], [0] * 4, halving := dx.Halving(1, 3))
    rungs = list(successive_halving(list(arms.losses), halving, arms.evaluate, "arm-0"))
    assert [rung.kept for rung in rungs] == [("arm-1", "arm-2", "arm-0"), ("arm-1", "arm-0"), ()]
    assert rungs[-1].losses.keys() == {"arm-1", "arm-0"}


def test_the_earlier_of_equal_arms_is_better() -> None:
    arms = Arms([1, 1], [0, 0], halving := dx.Halving(1, 2))
    rungs = list(successive_halving(list(arms.losses), halving, arms.evaluate, "arm-0"))
    assert rungs == [Rung(1, {"arm-0": 1.0, "arm-1": 1.0}, ("arm-0",)), Rung(2, {"arm-0": 1.0}, ())]


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"3 rungs, of which each keeps 1/2 .* need 4 candidates or more, got 3"
    ):
        dx.Halving(1, 3).sizes(3)
    with pytest.raises(ValueError, match="control 'b' is not one of the candidates a"):
        list(successive_halving(["a"], dx.Halving(1, 1), lambda name, rung: 0.0, "b"))
    with pytest.raises(ValueError, match="The loss of a is not finite after 1 steps"):
        list(successive_halving(["a"], dx.Halving(1, 1), lambda name, rung: math.nan, "a"))
