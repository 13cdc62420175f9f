"""Sets of cuts that reach a cost with the smallest sum of losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .transformers import interval_of

Cuts = tuple[str, ...]


@dataclass(frozen=True)
class Option:
    """A set of cuts: the sum of their losses, and the cost that they save."""

    loss: float
    saved: float
    cuts: Cuts


def pareto(options: Sequence[Option]) -> list[Option]:
    """The options for which no other one has a smaller loss and saves as much, sorted by loss."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.loss, -o.saved, len(o.cuts))):
        if not found or option.saved > found[-1].saved:
            found.append(option)
    return found


def cross(one: list[Option], other: list[Option]) -> list[Option]:
    """The best combinations of two lists of options.

    The lists concern different parts of the network, so losses and savings add up.
    """
    loss = np.add.outer([o.loss for o in one], [o.loss for o in other]).ravel()
    saved = np.add.outer([o.saved for o in one], [o.saved for o in other]).ravel()
    order = np.lexsort((-saved, loss))
    best = np.maximum.accumulate(saved[order])
    keep = order[np.concatenate([[True], best[1:] > best[:-1]])]
    pairs = [divmod(int(index), len(other)) for index in keep]
    return [
        Option(float(loss[i]), float(saved[i]), one[a].cuts + other[b].cuts) for i, (a, b) in zip(keep, pairs)
    ]


def block_front(
    cuts: Iterable[str], counts: dict[str, int], loss: Callable[[str], float], saved: Callable[[str], float]
) -> list[Option]:
    """The front of cuts of blocks, all combinations of those that leave a block in every list.

    If there are cuts of intervals, two intervals that touch are not combined: their loss is that of the joined interval.

    Args:
        cuts: as from `possible_block_cuts` or `possible_interval_cuts`.
        counts: {list: its number of blocks}.
        loss, saved: of one cut.
    """
    by_list: dict[str, dict[int, list[tuple[int, str]]]] = {name: {} for name in counts}
    joined = False
    for cut in cuts:
        name, first, last = interval_of(cut)
        joined |= last > first
        by_list[name].setdefault(first, []).append((last, cut))
    fronts = [
        _list_front(count, by_list[name], joined, lambda cut: Option(loss(cut), saved(cut), (cut,)))
        for name, count in counts.items()
    ]
    found = fronts[0]
    for front in fronts[1:]:
        found = cross(found, front)
    return found


def _list_front(
    count: int, cuts: dict[int, list[tuple[int, str]]], joined: bool, option: Callable[[str], Option]
) -> list[Option]:
    nothing = Option(0.0, 0.0, ())
    # Fronts of the blocks before a number: of those, at least one is kept or none is; with `joined`, also whether the last
    # one is kept.
    states: list[dict[tuple[bool, bool], list[Option]]] = [{} for _ in range(count + 1)]
    states[0] = {(False, True): [nothing]}
    for number in range(count):
        for (any_kept, last_kept), front in states[number].items():
            front = pareto(front)
            states[number + 1].setdefault((True, True), []).extend(front)
            if joined and not last_kept:
                continue
            for last, cut in cuts.get(number, []):
                added = option(cut)
                longer = [Option(o.loss + added.loss, o.saved + added.saved, (*o.cuts, cut)) for o in front]
                states[last + 1].setdefault((any_kept, not joined), []).extend(longer)
    ends = [front for (any_kept, _), front in states[count].items() if any_kept]
    return pareto([o for front in ends for o in front])
