"""Different pruning plans that reach one target of measured time, for `search_plans` to choose from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .block_scores import block_costs
from .calibration import CalibrationInput, num_rows, the_latents, with_rows
from .cost import Cost, CostTable, cost_table, example_inputs, time_ratio
from .fronts import Cuts
from .networks import Shape, network_config, shape_of
from .plan import PruningPlan
from .prune import cut_network
from .search import PruningProfile, check_goal
from .sensitivity import Sensitivity, guidance_change, measure_sensitivity, predict
from .transformers import is_transformer

Times = dict[int, float]
# Standard deviation of the logarithm of the factors of perturbed losses. The losses of cuts differ by orders of
# magnitude, so a smaller one hardly changes the plan.
_SPREAD = 1.0
# Perturbations to try for each candidate that is asked for.
_TRIES = 20


@dataclass(frozen=True)
class Candidate:
    """A pruning plan to train a student of.

    Attributes:
        source: what the search for its cuts minimized.
        plan: the plan. Its predicted milliseconds are those of the first batch size.
        times: {rows of a call: measured time as a share of that of the full UNet}.
    """

    source: str
    plan: PruningPlan
    times: Times


@dataclass(frozen=True)
class _Source:
    """One search for cuts: the losses of the cuts, and the weights of the batch sizes in the time."""

    label: str
    sensitivity: Sensitivity
    weights: Times


def find_candidates(
    network: Any,
    inputs: Sequence[CalibrationInput],
    target: float,
    *,
    batch_sizes: Sequence[int] = (8, 1),
    num_candidates: int = 12,
    stock_only: bool = False,
    repeats: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> list[Candidate]:
    """Plans after which a call of the network takes at most `target` of its time, for every batch size.

    The first one is that of the plain search: the smallest sum of the changes of the output
    (`output_change`). The others come from the losses of `guidance_change`, from the time at single batch
    sizes in place of their mean, from searches without GRI attention, and then from losses multiplied by
    random log-normal factors. For transformers there are also the losses of intervals and the similarity in place of GRI
    attention, see `PruningProfile`. Two plans that leave the same network count once. The time of every plan is
    measured in turns with the full network; a plan that is too slow is replaced by the next one of its search.

    Args:
        network: the full network, with weights, on its target device.
        inputs: calibration inputs. Only those of a run with guidance have `guidance_change`.
        target: share of the time that may remain, between 0 and 1.
        batch_sizes: rows of the timed calls.
        num_candidates: number of plans to find.
        stock_only: see `PruningProfile.plan`.
        repeats: number of calls that a time is the median of.
        seed: seed of the random factors.
        progress: show a progress bar.

    Returns:
        `num_candidates` plans, or fewer if there are no more, that of the plain search first.

    Raises:
        ValueError: see `profile_network`; or the plain search does not reach the target.
    """
    check_goal(target, "milliseconds")
    config = network_config(network)
    rows_of = _calls(config, inputs[0])
    if is_transformer(config):
        tables = {b: block_costs(network, rows_of(b), repeats) for b in batch_sizes}
        scores = _block_scores(measure_sensitivity(network, inputs, None, progress, "contiguous"))
    else:
        sizes = _sizes(inputs[0])
        tables = {b: cost_table(network, *sizes, repeats, b) for b in batch_sizes}
        scores = {"output": measure_sensitivity(network, inputs, progress=progress)}
    if all(num_rows(item) % 2 == 0 and _guided(item) for item in inputs):
        reference = predict(network, inputs)
        scores["guidance"] = measure_sensitivity(
            network, inputs, lambda other: guidance_change(other, inputs, reference), progress
        )

    @cache
    def measured(cuts: Cuts) -> tuple[tuple[int, float], ...]:
        pruned = cut_network(network, *cuts).eval()
        found = []
        # The smallest is timed first: it takes the least time and is usually the first to be too slow.
        for b in sorted(tables):
            found.append((b, time_ratio(pruned, network, rows_of(b), repeats)))
            if found[-1][1] > target:
                break
        return tuple(found)

    network = network.eval()
    return choose_candidates(
        shape_of(config).base,
        scores,
        tables,
        target,
        lambda cuts: dict(measured(cuts)),
        num_candidates=num_candidates,
        stock_only=stock_only,
        seed=seed,
        progress=progress,
    )


def _sizes(given: CalibrationInput) -> tuple[int, int, int]:
    """Height and width of the latents, and the length of the prompts."""
    height, width = given["sample"].shape[2:]
    return height, width, given["encoder_hidden_states"].shape[1]


def _calls(config: Mapping[str, Any], given: CalibrationInput) -> Callable[[int], CalibrationInput]:
    """A function that makes the inputs of a call with a number of rows, of the sizes of a calibration input."""
    if is_transformer(config):
        return lambda rows: with_rows(given, rows)
    height, width, tokens = _sizes(given)
    like = {"device": given["sample"].device, "dtype": given["sample"].dtype}
    return lambda rows: example_inputs(config, rows, height, width, tokens, **like)


def _block_scores(measured: Sensitivity) -> dict[str, Sensitivity]:
    """The losses of the blocks of a transformer by all criteria, from those of "contiguous"."""
    single = {cuts: loss for cuts, loss in measured.cuts.items() if "-" not in cuts[0]}
    turns = {cuts: measured.turns[cuts[0].removeprefix("block:")] for cuts in single}
    return {
        "output": replace(measured, cuts=single),
        "interval": measured,
        "similarity": replace(measured, cuts=turns),
    }


def _guided(item: CalibrationInput) -> bool:
    """Whether the two halves of the rows have the same latents, and so differ in the prompt alone."""
    one, other = the_latents(item).chunk(2)
    return torch.equal(one, other)


def choose_candidates(
    config: Mapping[str, Any],
    scores: Mapping[str, Sensitivity],
    tables: Mapping[int, CostTable],
    target: float,
    measure: Callable[[Cuts], Times],
    *,
    num_candidates: int,
    stock_only: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> list[Candidate]:
    """The plans of `find_candidates` from measurements.

    Args:
        config: entries of the config that determine the modules, as in a `PruningPlan`.
        scores: {name of a score: the losses of the cuts}, that of the plain search first.
        tables: {rows of a call: cost of the parts, with milliseconds}.
        target, num_candidates, stock_only, seed, progress: see `find_candidates`.
        measure: takes cuts and returns the measured times. Those after one above the target may be missing.

    Raises:
        ValueError: see `find_candidates`.
    """
    found: dict[str, Candidate] = {}
    tries = num_candidates * _TRIES
    sources = itertools.islice(_sources(scores, tables, np.random.default_rng(seed)), tries)
    with tqdm(total=num_candidates, disable=not progress, desc="candidates") as bar:
        for source in sources:
            candidate = _first_fast(config, source, tables, target, measure, stock_only)
            if candidate is None and not found:
                raise ValueError(
                    f"No plan leaves {target:.1%} of the time for {' and '.join(map(str, tables))} rows: set a larger"
                    " target, or allow more cuts."
                )
            if candidate is not None:
                found.setdefault(candidate.plan.shape().identity(), candidate)
            bar.update(len(found) - bar.n)
            if len(found) == num_candidates:
                break
    return list(found.values())


def _sources(
    scores: Mapping[str, Sensitivity], tables: Mapping[int, CostTable], rng: np.random.Generator
) -> Iterator[_Source]:
    """The searches: all combinations of scores, times and GRI attention, then without end perturbed ones."""
    batch_sizes = list(tables)
    times = {"": dict.fromkeys(batch_sizes, 1 / len(batch_sizes))}
    if len(batch_sizes) > 1:
        times |= {f", time of {b} row{'s' if b > 1 else ''}": {b: 1.0} for b in batch_sizes}
    plain = [
        _Source(f"{score} change{time}{'' if gri else ', no GRI'}", _allowed(losses, gri), weights)
        for gri in ((True, False) if any(table.gri for table in tables.values()) else (True,))
        for time, weights in times.items()
        for score, losses in scores.items()
    ]
    yield from plain
    for number in itertools.count(1):
        source = plain[rng.integers(len(plain))]
        yield replace(
            source,
            label=f"{source.label}, perturbed {number}",
            sensitivity=_perturbed(source.sensitivity, rng),
        )


def _allowed(losses: Sensitivity, gri: bool) -> Sensitivity:
    return (
        losses if gri else replace(losses, cuts={c: v for c, v in losses.cuts.items() if c[0][:4] != "gri."})
    )


def _perturbed(losses: Sensitivity, rng: np.random.Generator) -> Sensitivity:
    """One factor for each name of a cut, so that two layers still have a larger loss than one."""
    names = dict.fromkeys(cuts[0] for cuts in losses.cuts)
    factors = dict(zip(names, np.exp(_SPREAD * rng.standard_normal(len(names))).tolist()))
    return replace(losses, cuts={cuts: value * factors[cuts[0]] for cuts, value in losses.cuts.items()})


def _first_fast(
    config: Mapping[str, Any],
    source: _Source,
    tables: Mapping[int, CostTable],
    target: float,
    measure: Callable[[Cuts], Times],
    stock_only: bool,
) -> Candidate | None:
    """The plan of one search with the smallest loss that is fast enough by prediction and by measurement."""
    profile = PruningProfile(dict(config), _weighted(tables, source.weights), source.sensitivity)
    shape = shape_of(config)
    for option in profile.front("milliseconds", stock_only):
        after = shape.cut(*option.cuts)
        predicted = [_left(table, after) for table in tables.values()]
        if max(predicted) > target:
            continue
        times = measure(option.cuts)
        if max(times.values()) <= target:
            own = replace(profile, costs=next(iter(tables.values())))
            return Candidate(source.label, own.staged(option.cuts, "milliseconds", 3), times)
    return None


def _left(table: CostTable, shape: Shape) -> float:
    """The share of the time that remains, by the sum of the times of the parts."""
    return table.of_shape(shape).of("milliseconds") / table.total.of("milliseconds")


def _weighted(tables: Mapping[int, CostTable], weights: Times) -> CostTable:
    """A table whose milliseconds are the weighted mean of the shares of the full UNet's time."""

    def mixed(pick: Callable[[CostTable], Cost]) -> Cost:
        shares = [
            w * pick(tables[b]).of("milliseconds") / tables[b].total.of("milliseconds")
            for b, w in weights.items()
        ]
        return replace(pick(one), milliseconds=sum(shares))

    one = next(iter(tables.values()))
    return replace(
        one,
        total=mixed(lambda table: table.total),
        parts={path: mixed(lambda table, path=path: table.parts[path]) for path in one.parts},
        gri={path: mixed(lambda table, path=path: table.gri[path]) for path in one.gri},
    )
