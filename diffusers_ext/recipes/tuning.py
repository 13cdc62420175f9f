"""`tune`: the best recipes for a user's own prompts, by successive halving."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..core.checks import check_counts
from ..core.families import guidance_of
from ..core.halving import halve, rung_sizes
from ..core.hooks import parameters_of
from ..core.pipeline import call_pipeline, quiet
from ..core.scores import Scorer, checked_scores
from ..metrics.comparison import proportion
from ..metrics.estimate import Estimate, group_index, group_sums
from .base import base_record
from .front import Front, Point, layers
from .recipe import Recipe, made_by, parts_on

Methods = Recipe | str | os.PathLike[str] | Callable[[Any], Any] | None
_REFUSED = ("prompt", "num_inference_steps", "generator", "latents", "output_type", "return_dict")


def tune(
    pipe: Any,
    prompts: Sequence[str],
    scorer: Scorer,
    *,
    budget: int = 512,
    steps: Sequence[int] = (4, 6, 8, 12, 20, 30),
    guidance: Sequence[float] | None = None,
    methods: Sequence[Methods] = (None,),
    rungs: int = 2,
    eta: int = 2,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    **call_kwargs: Any,
) -> Front:
    """Searches numbers of steps, guidance scales and methods for the best trade of time against score.

    Every combination is a candidate. In each rung of successive halving the candidates get the same prompts and
    seeds, and those of the best fronts of time against score go on to the next one, with more images. The plain
    candidate with the best score always goes on, as the control. The figures of the result are from images that
    were not used to choose, because the best of many candidates look better than they are on the images that chose
    them. The front itself is chosen by these last figures.

        front = dx.tune(pipe, prompts, scorer, methods=[None, "fast"], height=512, width=512)
        print(front)
        front[0].recipe.save_pretrained("fastest")

    Args:
        pipe: a text-to-image pipeline without methods on it, with the scheduler to use.
        prompts: the user's prompts. Image i has prompt i, from the start again after the last one.
        scorer: takes float32 images (n, h, w, 3) in [0, 1] and n prompts, and returns n numbers, higher is better.
        budget: number of images to generate, of all candidates together.
        steps: numbers of inference steps.
        guidance: guidance scales; None for that of `call_kwargs`, or the pipeline's default.
        methods: recipes, folders or repositories of recipes, or functions that add methods to a pipeline, such as
            `lambda pipe: dx.apply_teleport(pipe, stats)`. None is the plain pipeline.
        rungs: number of rungs before the last images; fewer if there are too few candidates.
        eta: the best 1/eta of the candidates of a rung go on.
        batch_size: images per call of the pipeline, on which the time of an image depends.
        seed: image i starts from the generator with the seed `seed + i`.
        progress: show a progress bar.
        call_kwargs: further arguments of all calls, such as `height`.

    Returns:
        The front, fastest first: a list of (recipe, seconds, score), see `Front`. The call of a recipe has its number
        of steps, its guidance scale and `call_kwargs`. The seconds are the median over calls of the whole pipeline,
        with text encoder and decoder, divided by the batch size.

    Raises:
        ValueError: the pipeline takes no prompts or has methods on it already, there is nothing to choose from, the
            budget is too small, a recipe does not fit, or the scorer returns something else than finite numbers.
    """
    _check_arguments(pipe, prompts, call_kwargs)
    check_counts(budget=budget, rungs=rungs, batch_size=batch_size)
    if eta < 2:
        raise ValueError(f"eta must be 2 or more, got {eta}: the best 1/eta go on to the next rung.")
    runs = _candidates(pipe, steps, guidance, methods, call_kwargs)
    while rungs and len(runs) // eta**rungs < 1:
        rungs -= 1
    sizes = rung_sizes(len(runs), rungs + 1, eta)
    counts = [budget // len(sizes) // size for size in sizes]
    if counts[0] < 2:
        raise ValueError(
            f"A budget of {budget} images is too small for {len(runs)} candidates: each needs 2 or more in the first of"
            f" {len(sizes)} rungs. Give a budget of {2 * len(runs) * len(sizes)} or more, or fewer candidates."
        )
    firsts = list(itertools.accumulate([0, *counts]))
    measure = _Measurement(pipe, list(prompts), scorer, batch_size, seed)

    with quiet(pipe), tqdm(total=sum(map(int.__mul__, counts, sizes)), disable=not progress) as bar:
        measure.warm_up(runs[0])
        running = runs

        def rank(candidates: list[_Run], rung: int) -> list[_Run]:
            measure(candidates, firsts[rung], counts[rung], bar)
            return _ranked(candidates)

        # Those of the last size are measured below, after which nothing is chosen.
        for _, kept in zip(sizes[1:], halve(runs, sizes, rank)):
            running = list(kept)
        for run in running:
            run.forget()
        measure(running, firsts[-2], counts[-1], bar)
    return Front.of([run.point(prompts, firsts[-2]) for run in running])


@dataclass(eq=False)
class _Run:
    """A candidate and what was measured of it.

    Attributes:
        methods: the recipe of its methods.
        recipe: the same with its call.
    """

    methods: Recipe
    recipe: Recipe
    scores: list[float] = field(default_factory=list)
    times: list[tuple[int, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median over the largest batches, of one image."""
        largest = max(size for size, _ in self.times)
        return float(np.median([seconds / size for size, seconds in self.times if size == largest]))

    def forget(self) -> None:
        self.scores.clear()
        self.times.clear()

    def point(self, prompts: Sequence[str], first: int) -> Point:
        scores = np.array(self.scores)
        images = range(first, first + len(scores))
        texts = [prompts[i % len(prompts)] for i in images]
        groups = texts if len(set(texts)) > 1 else None  # of one prompt, the seeds are what varies
        if set(self.scores) <= {0.0, 1.0}:
            score = proportion(scores == 1, groups)
        else:
            parts = group_sums(scores - scores.mean(), group_index(groups, len(scores))) / len(scores)
            score = Estimate.of_contributions(float(scores.mean()), parts)
        figures = {
            "seconds of an image": f"{self.seconds:.3g}",
            "score": f"{score.format(3)}, {len(scores)} images of {len(set(texts))} prompts",
        }
        return Point(replace(self.recipe, figures=figures), self.seconds, score)


@dataclass(frozen=True)
class _Measurement:
    """Generates images of candidates, and adds their scores and the time of the calls."""

    pipe: Any
    prompts: list[str]
    scorer: Scorer
    batch_size: int
    seed: int

    def __call__(self, runs: Sequence[_Run], first: int, count: int, bar: Any) -> None:
        """Images `first` to `first + count - 1` of every candidate, batch by batch, so that all see the same drift."""
        by_methods = {id(run.methods): run.methods for run in runs}
        for low in range(first, first + count, self.batch_size):
            rows = range(low, min(low + self.batch_size, first + count))
            for key, methods in by_methods.items():
                with methods.on(self.pipe):
                    for run in (run for run in runs if id(run.methods) == key):
                        self._add(run, rows)
                        bar.update(len(rows))

    def warm_up(self, run: _Run) -> None:
        """One call whose time does not count."""
        with run.methods.on(self.pipe):
            self._generate(run, range(self.batch_size))

    def _add(self, run: _Run, rows: range) -> None:
        start = time.perf_counter()
        images = self._generate(run, rows)
        run.times.append((len(rows), time.perf_counter() - start))
        run.scores += checked_scores(self.scorer, images, self._texts(rows)).tolist()

    def _texts(self, rows: range) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in rows]

    def _generate(self, run: _Run, rows: range) -> np.ndarray:
        generators = [torch.Generator().manual_seed(self.seed + i) for i in rows]
        call = {**run.recipe.call, "prompt": self._texts(rows), "generator": generators}
        images = call_pipeline(self.pipe, **call, output_type="np", return_dict=False)[0]
        return np.asarray(images, dtype=np.float32)


def _check_arguments(pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
    if "prompt" not in parameters_of(pipe):
        raise ValueError(f"{type(pipe).__name__} takes no prompts: tune needs a text-to-image pipeline.")
    if isinstance(prompts, str) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"prompts must be one or more texts in a list, got {prompts!r}.")
    refused = [name for name in _REFUSED if name in call]
    if refused:
        raise ValueError(f"tune sets {', '.join(refused)} itself: use steps=, prompts= and seed=.")
    on = parts_on(pipe)
    if on:
        raise ValueError(
            f"tune needs a plain pipeline, and this {type(pipe).__name__} has {', '.join(on)}: remove it, and give it as"
            " one of methods=, such as dx.Recipe.from_pipe(pipe)."
        )


def _candidates(
    pipe: Any,
    steps: Sequence[int],
    guidance: Sequence[float] | None,
    methods: Sequence[Methods],
    call_kwargs: Mapping[str, Any],
) -> list[_Run]:
    scales: list[dict[str, Any]] = [{}]
    if guidance is not None:
        name = guidance_of(pipe).scale
        if name is None:
            raise ValueError(f"{type(pipe).__name__} has no guidance scale: leave guidance= out.")
        scales = [{name: scale} for scale in guidance]
    recipes = [_recipe(pipe, given) for given in methods]
    runs = []
    for recipe, count, scale in itertools.product(recipes, steps, scales):
        call = {"num_inference_steps": count, **call_kwargs, **scale}
        runs.append(_Run(recipe, replace(recipe, call=call)))
    if not runs:
        raise ValueError(
            "There is nothing to choose from: give one or more steps, guidance scales and methods."
        )
    return runs


def _recipe(pipe: Any, given: Methods) -> Recipe:
    if given is None:
        return Recipe({}, base_record(pipe))
    if isinstance(given, Recipe):
        return given
    return Recipe.from_pretrained(given) if isinstance(given, str | os.PathLike) else made_by(given, pipe)


def _ranked(runs: list[_Run]) -> list[_Run]:
    """The candidates, front by front, those of one front so that any first few of them cover it; best plain one first."""
    measured = [(run.seconds, float(np.mean(run.scores))) for run in runs]
    order = [runs[i] for layer in layers(measured) for i in _spread(layer, measured)]
    plain = [run for run in runs if not run.methods.methods]
    control = max(plain, key=lambda run: np.mean(run.scores), default=None)
    return order if control is None else [control, *(run for run in order if run is not control)]


def _spread(layer: list[int], measured: Sequence[tuple[float, float]]) -> list[int]:
    """The best score, and then always the candidate that is farthest in log time from those before."""
    left = sorted(layer, key=lambda i: measured[i][1])
    order = [left.pop()]
    while left:
        times = [np.log(measured[i][0]) for i in order]
        far = max(left, key=lambda i: min(abs(np.log(measured[i][0]) - t) for t in times))
        left.remove(far)
        order.append(far)
    return order
