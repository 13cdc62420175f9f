"""The responses of a pipeline's denoiser to pairs of opposite steps."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core.hooks import parameters_of
from ..core.predictions import noise_to_signal
from ..core.storage import ShardStore, read_tensors, tensors_digest, weights_digest
from .probe import denoise_at, grid_of, only_shape, repeated
from .score_fit import Pairs
from .sources import rows_of

# Neighbouring levels differ by this factor at least.
RATIO = 2**0.5


class Responses:
    """Asks a denoiser for its responses at the levels of a grid.

    Args:
        pipe: a pipeline that teleportation works on.
        call: arguments of its calls without prompts and noise, with `num_inference_steps`.
        batch_size: rows of a call, of which a pair has two.
        seed: of all that is random.
        resume_dir: folder that keeps every answer, or None.
        bar: progress bar over the rows.

    Attributes:
        shape: of one sample.
        levels: (index of the step, σ), highest first.
        calls: rows that the denoiser was shown.

    Raises:
        ValueError: the grid has no level that can be used, or the folder has answers to other questions.
    """

    def __init__(
        self,
        pipe: Any,
        call: dict[str, Any],
        batch_size: int,
        seed: int,
        resume_dir: str | os.PathLike[str] | None,
        bar: tqdm,
    ) -> None:
        self.pipe, self.call, self.bar, self.calls = pipe, call, bar, 0
        self.pairs_per_call = max(1, batch_size // 2)
        self.generator = torch.Generator().manual_seed(seed)
        self.takes_prompt = "prompt" in parameters_of(pipe)
        self.shape, grid = grid_of(pipe, {**self._call(1), **self._rows([""])})
        self._count(1)
        self.dimension = math.prod(self.shape)
        self.levels = _thinned([noise_to_signal(level) for level in grid])
        if not self.levels:
            raise ValueError(
                f"The grid of {call['num_inference_steps']} steps has no level at which the denoiser can be asked: use"
                " more num_inference_steps."
            )
        self._like = only_shape(self.shape)
        self._shards = itertools.count()
        self._store = None
        if resume_dir is not None:
            self._store = ShardStore(Path(resume_dir), self._recipe(seed, batch_size))

    def noise(self, count: int) -> Tensor:
        """(count, D) white noise."""
        return torch.randn(count, self.dimension, generator=self.generator)

    def permutation(self, count: int) -> list[int]:
        """The first `count` numbers in random order."""
        return torch.randperm(count, generator=self.generator).tolist()

    def pairs(
        self, level: int, base: Tensor, steps: Tensor, texts: Sequence[str], numbers: Sequence[int]
    ) -> Pairs:
        """The responses at base ± σ·steps.

        Args:
            level: number of the level.
            base: (D,).
            steps: (n, D).
            texts: n prompts; ignored by pipelines without prompts.
            numbers: of the prompts.
        """
        index, sigma = self.levels[level]
        plus, minus = [], []
        for low in range(0, len(steps), self.pairs_per_call):
            part = slice(low, low + self.pairs_per_call)
            moves = sigma * steps[part]
            clean = self._ask(index, torch.cat([base + moves, base - moves]), [*texts[part], *texts[part]])
            plus.append(clean[: len(moves)])
            minus.append(clean[len(moves) :])
        up, down = torch.cat(plus), torch.cat(minus)
        odd, even = (up - down) / (2 * sigma), (up + down) / 2 - base
        return Pairs(sigma, base, steps, odd, even, tuple(numbers))

    def _ask(self, index: int, states: Tensor, texts: list[str]) -> Tensor:
        """The predictions (n, D) for states (n, D) in variance-exploding units."""
        number = next(self._shards)
        path = None if self._store is None else self._store.path(number)
        kept = read_tensors(path)[0] if path is not None and path.is_file() else None
        if kept is not None and kept["states"].equal(states):
            self._count(len(states))
            return kept["clean"]
        shown = states.reshape(-1, *self.shape)
        looked = denoise_at(
            self.pipe,
            self._like,
            index,
            lambda noise, level: level[0] * repeated(shown, noise),
            rows=self._rows(texts),
            seeds=range(len(texts)),
            # The scheduler may clip what it is given, and the denoiser of a Gaussian is linear.
            clip=False,
            **self._call(len(texts)),
        )
        clean = looked.clean[: len(shown)].flatten(1).cpu()
        if not torch.isfinite(clean).all():
            raise ValueError(
                f"{type(self.pipe).__name__} predicts NaN or infinite values at σ ="
                f" {noise_to_signal(looked.level):.3g}: load it in float32, or fit the statistics to images."
            )
        if self._store is not None:
            self._store.write(number, {"states": states, "clean": clean})
        self._count(len(states))
        return clean

    def _rows(self, texts: list[str]) -> dict[str, Any]:
        return {"prompt": texts} if self.takes_prompt else {"batch_size": len(texts)}

    def _call(self, rows: int) -> dict[str, Any]:
        return {name: rows_of(name, value, rows) for name, value in self.call.items()}

    def _count(self, rows: int) -> None:
        self.calls += rows
        self.bar.update(rows)

    def _recipe(self, seed: int, batch_size: int) -> dict[str, Any]:
        """What the answers depend on besides the states, which are kept beside them, and the prompts drawn for them."""
        parts = {n: part for n, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        call = {
            name: tensors_digest({name: value}) if isinstance(value, Tensor) else repr(value)
            for name, value in self.call.items()
        }
        return {
            "weights": {name: weights_digest(part) for name, part in parts.items()},
            "scheduler": repr(self.pipe.scheduler),
            "shape": list(self.shape),
            "seed": seed,
            "batch_size": batch_size,
            "call": call,
        }


def _thinned(sigmas: Sequence[float]) -> list[tuple[int, float]]:
    """(index, σ) of steps at which the denoiser can be asked, each lower than the one before by `RATIO`."""
    found: list[tuple[int, float]] = []
    for index, sigma in enumerate(sigmas):
        # The first step is never skipped to, and pure noise has no finite σ.
        if index and 0 < sigma < math.inf and (not found or sigma * RATIO <= found[-1][1] * (1 + 1e-6)):
            found.append((index, sigma))
    return found
