"""Successive halving: evaluates many candidates a little and the best of them longer.

Jamieson and Talwalkar 2016, arXiv:1502.07943; the inner loop of Hyperband (Li et al. 2018, arXiv:1603.06560).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Candidate = TypeVar("Candidate")


def rung_sizes(num_candidates: int, rungs: int, eta: int) -> list[int]:
    """Number of candidates in every rung, of which the best 1/`eta` go on to the next one.

    Raises:
        ValueError: no candidate is left for the last rung.
    """
    sizes = [num_candidates // eta**rung for rung in range(rungs)]
    if sizes[-1] < 1:
        raise ValueError(
            f"{rungs} rungs, of which each keeps 1/{eta} of the candidates, need {eta ** (rungs - 1)} candidates or"
            f" more, got {num_candidates}: use fewer rungs, or find more candidates."
        )
    return sizes


def halve(
    candidates: Sequence[Candidate],
    sizes: Sequence[int],
    rank: Callable[[list[Candidate], int], list[Candidate]],
    control: Candidate | None = None,
) -> Iterator[tuple[Candidate, ...]]:
    """Evaluates the candidates rung by rung.

    Args:
        candidates: the candidates of the first rung.
        sizes: see `rung_sizes`.
        rank: takes the candidates of a rung and its number, from 0, and returns them with the best first.
        control: takes part in every rung, in addition to the best ones if it is not one of them; None for no control.

    Yields:
        The candidates that go on, best first, after every rung; none after the last one.
    """
    running = list(candidates)
    for rung, size in enumerate([*sizes[1:], 0]):
        running = rank(running, rung)[:size]
        if running and control is not None and control not in running:
            running.append(control)
        yield tuple(running)
