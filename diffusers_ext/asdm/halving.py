"""Successive halving of trainings: trains many candidates a little and the best of them longer; see `core.halving`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..core.checks import check_counts
from ..core.halving import halve, rung_sizes


@dataclass(frozen=True)
class Halving:
    """The budget of successive halving.

    Attributes:
        steps: training steps of every candidate at the end of the first rung.
        rungs: number of rungs. Every rung has `eta` times as many steps as the one before, counted from the
            start of the training.
        eta: the best 1/eta of a rung's candidates go on to the next one.

    Raises:
        ValueError: `steps` or `rungs` is below 1, or `eta` below 2.
    """

    steps: int = 100
    rungs: int = 3
    eta: int = 2

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, rungs=self.rungs, eta=self.eta)
        if self.eta < 2:
            raise ValueError(f"eta must be 2 or more, got {self.eta}: the best 1/eta go on to the next rung.")

    @property
    def steps_of_rungs(self) -> list[int]:
        """Training steps at the end of every rung, counted from the start of the training."""
        return [self.steps * self.eta**rung for rung in range(self.rungs)]

    def sizes(self, num_candidates: int) -> list[int]:
        """Number of candidates in every rung.

        Raises:
            ValueError: no candidate is left for the last rung.
        """
        return rung_sizes(num_candidates, self.rungs, self.eta)


@dataclass(frozen=True)
class Rung:
    """The result of a rung.

    Attributes:
        steps: training steps of its candidates, from the start of their training.
        losses: {candidate: its loss}.
        kept: the candidates of the next rung, best first; none after the last rung.
    """

    steps: int
    losses: dict[str, float]
    kept: tuple[str, ...]


def successive_halving(
    names: Sequence[str], halving: Halving, evaluate: Callable[[str, int], float], control: str
) -> Iterator[Rung]:
    """Evaluates the candidates rung by rung.

    Args:
        names: the candidates. Of equal ones, the earlier one is better.
        halving: the budget.
        evaluate: takes a candidate and the number of a rung, from 0, trains the candidate to the steps of that
            rung and returns its loss; lower is better.
        control: the candidate that takes part in every rung, in addition to the best ones if it is not one of
            them.

    Yields:
        The result of every rung, as soon as it is known.

    Raises:
        ValueError: see `Halving.sizes`; the control is no candidate; or a loss is not finite.
    """
    if control not in names:
        raise ValueError(f"The control {control!r} is not one of the candidates {', '.join(names)}.")
    steps, losses = halving.steps_of_rungs, dict[str, float]()

    def rank(running: list[str], rung: int) -> list[str]:
        losses.clear()
        losses.update({name: evaluate(name, rung) for name in running})
        bad = [name for name, loss in losses.items() if not math.isfinite(loss)]
        if bad:
            raise ValueError(
                f"The loss of {', '.join(bad)} is not finite after {steps[rung]} steps: lower the learning rate."
            )
        return sorted(losses, key=lambda name: losses[name])

    for rung, kept in enumerate(halve(names, halving.sizes(len(names)), rank, control)):
        yield Rung(steps[rung], dict(losses), kept)


def ranking(rungs: Sequence[Rung]) -> list[str]:
    """All candidates, best first: those that came further first, of equal ones that with the lower loss."""
    last = {name: (-number, rung.losses[name]) for number, rung in enumerate(rungs) for name in rung.losses}
    return sorted(last, key=lambda name: last[name])
