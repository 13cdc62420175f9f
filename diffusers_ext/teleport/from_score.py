"""Statistics read off the denoiser itself, without data and without sampling: `GaussianStats.from_score`.

The maths are in `score_fit`. Here is the order of the questions: at which level, about which base, with which steps.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor
from tqdm.auto import tqdm

from ..core.checks import check_counts
from ..core.hooks import parameters_of
from .apply import check_pipeline
from .gaussian import GaussianStats
from .prompts import unguided
from .scheduler import TeleportScheduler
from .score_calls import Responses
from .score_fit import (
    Covariance,
    Pairs,
    fit_covariance,
    halves,
    implied_means,
    isotropic,
    relative_difference,
    squared_response,
    steps_of,
    top_response,
    unexplained,
    with_means,
)
from .sources import check_prompts

logger = logging.get_logger(__name__)

FEWEST_CALLS = 100
# Levels are compared from `_ABOVE` levels above the lowest one where tr J² of all samples is at most this.
_RESPONSE = 1.0
_ABOVE = 2
_LOOK = 6  # pairs for the first look at a level
_CANDIDATES = 4  # levels that are compared
_AGREEMENT = 0.4  # of the responses unexplained: the error of the network is not what limits the fit
_NOTICEABLE = 0.03
_SHARE = 0.12  # of the pairs, for each level and for the first fit
_EMPTY = 0.1  # of the calls, for the mean of the empty prompt
_NOTHING = (
    0.9  # relative difference of two halves that have hardly anything in common; without anything it is 1
)
_SHOWN = 8  # eigenpairs in the report

_INSTEAD = (
    "Fit the statistics to images or samples instead (encoded_images, pipeline_samples), or, with a model that is not"
    " distilled, ask at other levels with another num_inference_steps."
)


def fit_to_score(
    pipe: Any,
    prompts: str | Sequence[str] | None = None,
    *,
    rank: int,
    calls: int,
    batch_size: int,
    num_inference_steps: int,
    seed: int,
    resume_dir: str | os.PathLike[str] | None,
    progress: bool,
    **call_kwargs: Any,
) -> GaussianStats:
    """See `GaussianStats.from_score`."""
    check_counts(rank=rank, calls=calls, batch_size=batch_size, num_inference_steps=num_inference_steps)
    if calls < FEWEST_CALLS:
        raise ValueError(f"calls={calls} are too few to fit a covariance: use {FEWEST_CALLS} or more.")
    texts = _check(pipe, prompts, call_kwargs)
    call = {**unguided(pipe), **call_kwargs, "num_inference_steps": num_inference_steps}
    with tqdm(total=calls, desc="denoiser calls", disable=not progress) as bar:
        responses = Responses(pipe, call, batch_size, seed, resume_dir, bar)
        alone = 0 if texts is None else int(calls * _EMPTY)
        search = _Search(responses, rank, calls - alone, texts)
        search.find_level()
        search.choose_level()
        search.ask_the_rest()
        found = search.statistics()
        if texts is None:
            return found
        return dataclasses.replace(found, unconditional=search.unconditional(calls))


def _check(pipe: Any, prompts: Any, call_kwargs: dict[str, Any]) -> list[str] | None:
    """The prompts; ValueError for a pipeline or arguments that do not work."""
    if isinstance(pipe.scheduler, TeleportScheduler):
        raise ValueError(
            "Teleportation is on this pipeline: remove it first (dx.remove_teleport(pipe)), as its statistics are about"
            " to be fitted."
        )
    check_pipeline(pipe)
    ours = ("prompt_embeds", "guidance_scale", "true_cfg_scale", "latents", "generator")
    given = [name for name in ours if name in call_kwargs]
    if given:
        raise ValueError(
            f"from_score takes no {', '.join(given)}: it asks for the predictions without guidance, for prompts that are"
            " texts, at states of its own. Leave the argument out; teleportation adds the guidance of each call."
        )
    if prompts is not None:
        return check_prompts(pipe, prompts)
    if not {"prompt", "batch_size"} & set(parameters_of(pipe)):
        raise ValueError(
            f"{type(pipe).__name__} takes neither a prompt nor a batch_size, so it cannot be called here. Fit the"
            " statistics to batches of its latents yourself: GaussianStats.fit(batches)."
        )
    return None


class _Search:
    """Spends calls on pairs, and knows the Gaussian that they imply so far.

    Args:
        responses: of the denoiser.
        rank: largest number of eigenpairs.
        calls: at which to stop, those that were made before included.
        prompts: each pair has one of them; None for the empty prompt.
    """

    def __init__(self, responses: Responses, rank: int, calls: int, prompts: list[str] | None) -> None:
        self.responses, self.rank, self.prompts = responses, rank, prompts
        self.left = max(0, calls - responses.calls) // 2  # pairs
        self.share = max(6, int(_SHARE * self.left))
        self.level = 0
        self.mean = torch.zeros(responses.dimension)
        self.covariance = isotropic(responses.dimension, 0.0)
        self.first: list[Pairs] = []  # about zero, as the mean is not known yet
        self.pairs: list[Pairs] = []  # about the mean
        self.tried: list[list[float]] = []
        self.waiting: list[int] = []  # numbers of prompts that are still to come

    def ask(self, level: int, count: int) -> Pairs:
        """Responses about the mean, to steps with the covariance of the noisy data, as far as both are known."""
        self.left -= count
        names = self.prompts or [""]
        while len(self.waiting) < count:  # every prompt once before one comes again
            self.waiting += self.responses.permutation(len(names))
        numbers, self.waiting = self.waiting[:count], self.waiting[count:]
        sigma = self.responses.levels[level][1]
        steps = steps_of(self.responses.noise(count), self.covariance, sigma)
        return self.responses.pairs(level, self.mean, steps, [names[i] for i in numbers], numbers)

    def fit(self) -> None:
        """Fits the Gaussian to all pairs."""
        self.covariance = fit_covariance(self.first + self.pairs, self.rank)
        means = [implied_means(group, self.covariance) for group in self.pairs or self.first]
        self.mean = torch.cat(means).mean(0)

    def find_level(self) -> None:
        """Looks for the lowest level with a small response, by bisection, and fits a first Gaussian above it."""
        low, high, prompts = 0, len(self.responses.levels) - 1, self.prompts
        self.prompts = (
            None  # the response of all samples is larger than that of a prompt, and so is its bound
        )
        while low < high and self.left > (_CANDIDATES + 3) * self.share:
            middle = (low + high + 1) // 2
            small = squared_response(self.ask(middle, _LOOK)) <= _RESPONSE
            low, high = (middle, high) if small else (low, middle - 1)
        self.prompts, self.waiting, self.level = prompts, [], max(low - _ABOVE, 0)
        self.first = [self.ask(self.level, self.share)]
        self._check_response(self.first[0])
        self.fit()

    def choose_level(self) -> None:
        """Goes down from there as long as two halves of the responses predict each other better than before.

        At a high level the error of the network outweighs the response. At a low one the response is not linear, and what
        the halves agree on is smaller than the covariance: a level at which they agree is not left, and at none a
        direction may have more than twice as much data as noise.
        """
        best = math.inf
        for level in range(self.level, min(self.level + _CANDIDATES, len(self.responses.levels))):
            if self.pairs and self.responses.levels[level][1] ** 2 < self._largest() / 2:
                return
            group = self.ask(level, self.share)
            if not self.pairs:
                self._check_response(group)
            error = self._error(group)
            self.tried.append([group.sigma, error])
            if self.pairs and (top_response(group) >= 1 or error > best + _NOTICEABLE):
                return
            self.pairs.append(group)
            self.level, best = level, min(best, error)
            self.fit()
            if error <= _AGREEMENT:
                return

    def _largest(self) -> float:
        """The largest variance of all samples in any direction, as far as it is known."""
        every = self.covariance
        if self.prompts is not None:
            every = with_means(every, self.pairs, self.rank)
        return float(every.spectrum[0])

    def ask_the_rest(self) -> None:
        """Spends what is left at the level chosen, in two rounds."""
        for rounds in (2, 1):
            if self.left >= rounds:
                self.pairs.append(self.ask(self.level, self.left // rounds))
                self._check_response(self.pairs[-1])
                self.fit()

    def _error(self, group: Pairs) -> float:
        """The share of each half of the responses that the other half does not predict."""
        one, other = halves(group)
        before = self.first + self.pairs
        fits = [fit_covariance([*before, half], self.rank) for half in (one, other)]
        return (unexplained(other, fits[0]) + unexplained(one, fits[1])) / 2

    def _check_response(self, group: Pairs) -> None:
        response = top_response(group)
        if response >= 1:
            raise ValueError(
                f"At σ = {group.sigma:.3g} the denoiser's response is {response:.3g} times the change of its input, and that"
                f" of any data is below 1: no covariance can be read off it. {_INSTEAD}"
            )

    def statistics(self) -> GaussianStats:
        """The Gaussian, with a report on its accuracy.

        Raises:
            ValueError: two halves of the pairs have nothing in common.
        """
        shape, everything = self.responses.shape, self.first + self.pairs
        parts = [halves(group) for group in everything]
        fits = [fit_covariance([part[i] for part in parts], self.rank) for i in (0, 1)]
        last = halves(self.pairs[-1])
        left = (unexplained(last[1], fits[0]) + unexplained(last[0], fits[1])) / 2
        report = self._report(fits[0], fits[1], left)
        if report["error"] > _NOTHING:
            raise ValueError(
                f"The covariances that two halves of the denoiser's responses at σ = {report['sigma']:.3g} imply differ by"
                f" {report['error']:.0%} of their sum: the error of the network hides the covariance. Use more calls."
                f" {_INSTEAD}"
            )
        logger.info(f"Statistics from the score: {report}")
        classes = {} if self.prompts is None else self._classes()
        return GaussianStats(
            mean=self.mean.reshape(shape),
            eigenvectors=self.covariance.vectors,
            eigenvalues=self.covariance.values,
            residual=self.covariance.residual,
            num_samples=2 * sum(len(group.odd) for group in everything),
            calibration={"score": report},
            **classes,
        )

    def unconditional(self, calls: int) -> GaussianStats:
        """The Gaussian of all prompts: the covariance within them and between them, and the mean of the empty prompt."""
        within, self.prompts, self.waiting = self.covariance, None, []
        every = with_means(within, self.pairs, self.rank)
        self.covariance, self.left = every, max(calls - self.responses.calls, 2) // 2
        pairs = self.ask(max(self.level - 1, 0), self.left)
        means = implied_means(pairs, every)
        return GaussianStats(
            mean=means.mean(0).reshape(self.responses.shape),
            eigenvectors=every.vectors,
            eigenvalues=every.values,
            residual=every.residual,
            num_samples=2 * sum(len(group.odd) for group in [*self.pairs, pairs]),
            calibration={"score": {"unexplained": unexplained(pairs, every)}},
        )

    def _report(self, one: Covariance, other: Covariance, left: float) -> dict[str, Any]:
        count = min(one.vectors.shape[1], other.vectors.shape[1], _SHOWN)
        cosines = torch.linalg.svdvals(one.vectors[:, :count].T @ other.vectors[:, :count])
        return {
            "calls": self.responses.calls,
            "sigma": self.responses.levels[self.level][1],
            "levels": self.tried,
            "unexplained": left,
            "error": relative_difference(one, other),
            "eigenvalues_of_halves": [fit.values[:_SHOWN].tolist() for fit in (one, other)],
            "cosines_of_halves": cosines.tolist(),
        }

    def _classes(self) -> dict[str, Any]:
        """The mean that the denoiser implies for every prompt that was asked about the mean of all."""
        assert self.prompts is not None
        found: dict[str, list[Tensor]] = {}
        for group in self.pairs:
            for number, mean in zip(group.prompts, implied_means(group, self.covariance)):
                found.setdefault(self.prompts[number], []).append(mean)
        means = torch.stack([torch.stack(each).mean(0) for each in found.values()])
        return {
            "class_means": means.reshape(-1, *self.responses.shape),
            "class_names": list(found),
            "class_counts": [len(each) for each in found.values()],
        }
