"""Pairs of random and golden noise, the training data of NPNet: collection, storage in shards, and loading.

Attempt i has prompt i (modulo the number of prompts) and its own seed. The pairs therefore do not depend on
the size of the last batch, on the number of processes, or on interruptions.

A shard contains one batch of attempts: `noise` and `golden` (n, C, H, W) float16, `index` (n,) int64 with the
number of each attempt, `scores` (n, 2) float32 if there was a scorer, and the prompts in its metadata. If a
shard exists, its whole batch was tried, including the pairs that were not kept.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.families import denoisers_of, family_of, to_grid
from ..core.pipeline import call_pipeline, given_latents, initial_grid, quiet
from ..core.records import pipeline_record
from ..core.scores import Scorer, checked_scores
from ..core.storage import ShardStore, digest, open_tensors, read_tensors, require_finite, tensors_digest
from .apply import check_pipeline
from .gaps import Gap, guided_call, sampling_weight
from .redenoising import redenoise, settle
from .scorers import scorer_record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made.

    Attributes:
        gap, num_inference_steps, jump, guidance_scale, inversion_guidance_scale, num_rounds, legacy_inversion: see
            `redenoise`.
        sampling_steps, sampling_guidance_scale: settings of the images that a scorer compares; the scale as in
            `guided_call`, by default 5.5, or 1 for a model without guidance.
        margin: a pair is kept if the score of the golden noise's image exceeds that of the other by more than
            this.
    """

    gap: Gap | None = None
    num_inference_steps: int | None = None
    jump: float | None = None
    guidance_scale: float | None = None
    inversion_guidance_scale: float | None = None
    num_rounds: int = 1
    legacy_inversion: bool = False
    sampling_steps: int = 30
    sampling_guidance_scale: float | None = None
    margin: float = 0.0

    def redenoising(self) -> dict[str, Any]:
        """The arguments of `settle`."""
        return {name: getattr(self, name) for name in inspect.signature(settle).parameters if name != "pipe"}

    def settled(self, pipe: Any) -> PairSettings:
        """These settings with the defaults for a pipeline in place of None.

        Raises:
            ValueError: see `settle` and `guided_call`.
        """
        weight = sampling_weight(pipe, self.sampling_guidance_scale)
        guided_call(pipe, {}, weight)
        return replace(self, **settle(pipe, **self.redenoising()), sampling_guidance_scale=weight)


def collect_pairs(
    pipe: Any,
    prompts: Sequence[str],
    num_pairs: int,
    output_dir: str | Path,
    settings: PairSettings,
    *,
    seed: int = 0,
    batch_size: int = 8,
    scorer: Scorer | None = None,
    scorer_name: str | None = None,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
    model: Mapping[str, Any] | None = None,
    **call_kwargs: Any,
) -> ShardSummary:
    """Tries `num_pairs` pairs and keeps those that the scorer prefers. Resumes an interrupted run.

    Args:
        pipe: a text-to-image pipeline.
        prompts: attempt i has prompt i, modulo their number.
        num_pairs: total number of attempts of all processes.
        output_dir: folder of the shards and their recipe.
        settings: how pairs are made.
        seed: attempt i's noise depends on `(seed, i)`.
        batch_size: attempts per shard. Like the settings, it must stay the same for one folder.
        scorer: None keeps every pair.
        scorer_name: name of the scorer in the recipe.
        rank, world: this process makes batches rank, rank + world, ...
        progress: show a progress bar with the numbers of pairs kept and tried.
        model: `pipeline_record` of the pipeline as it is stored. Give it if the weights were cast to half precision;
            training compares it with its own. Default: the record of `pipe`.
        call_kwargs: passed to the pipeline, such as `height`, `width`, `clip_skip` and `max_sequence_length`.
            They are in the recipe, from which training takes them, so they must be values of JSON. Not those that
            `settings` sets.

    Returns:
        Numbers of pairs kept and tried in this process's batches, including earlier runs.

    Raises:
        ValueError: no prompts, counts below 1, a pipeline that golden noise or re-denoising does not work on,
            arguments that are no values of JSON or that `settings` sets, a folder whose pairs were made with other settings, a corrupted
            shard, or scores that are not finite.
    """
    check_pipeline(pipe)
    prompts = list(prompts)
    if not prompts or num_pairs < 1 or batch_size < 1:
        raise ValueError(
            f"Give prompts, and num_pairs and batch_size of 1 or more; got {len(prompts)} prompts, {num_pairs} and"
            f" {batch_size}."
        )
    settings = settings.settled(pipe)
    recipe = {
        "model": pipeline_record(pipe) if model is None else model,
        "dtype": str(denoisers_of(pipe)[0].dtype),
        "prompts": {"count": len(prompts), "digest": digest(prompts)},
        "num_pairs": num_pairs,
        "seed": seed,
        "batch_size": batch_size,
        "scorer": scorer_record(scorer, scorer_name),
        "settings": asdict(settings),
        "call": _recorded(call_kwargs),
    }
    store = ShardStore(output_dir, recipe)
    kept = tried = 0
    batches = range(rank, -(-num_pairs // batch_size), world)
    bar = tqdm(total=len(batches) * batch_size, disable=not progress, unit="pair", desc="noise pairs")
    for batch in batches:
        path = store.path(batch)
        if not path.is_file():
            rows = range(batch * batch_size, min((batch + 1) * batch_size, num_pairs))
            chosen = [prompts[i % len(prompts)] for i in rows]
            tensors, names = _pairs(pipe, rows, chosen, seed, settings, scorer, call_kwargs)
            store.write(batch, tensors, {"prompts": json.dumps(names), "tried": str(len(rows))})
        done = read_summary(path)
        kept, tried = kept + done.kept, tried + done.tried
        bar.update(done.tried)
        bar.set_postfix_str(f"kept {kept}/{tried}")
    bar.close()
    return ShardSummary(kept, tried)


def _recorded(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as they are read from a JSON file."""
    for name, value in call.items():
        if name in {field.name for field in fields(PairSettings)}:
            raise ValueError(
                f"{name} is set by the settings of the pairs, got {name}={value!r} among the arguments of the call."
                " Set it there."
            )
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"{name} is a {type(value).__name__}, which the recipe of the pairs cannot hold and training cannot"
                " repeat. Give numbers, texts, lists or None."
            ) from error
    return json.loads(json.dumps(call, sort_keys=True))


@torch.no_grad()
def _pairs(
    pipe: Any,
    rows: range,
    prompts: list[str],
    seed: int,
    settings: PairSettings,
    scorer: Scorer | None,
    call_kwargs: dict[str, Any],
) -> tuple[dict[str, Tensor], list[str]]:
    """One shard's tensors and prompts."""
    generators = [torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63) for i in rows]
    call = {"prompt": prompts, **call_kwargs}
    with quiet(pipe):
        drawn = initial_grid(pipe, {**call, "generator": generators})
    # Rounded as in the file, so that the target belongs to exactly this noise.
    grid = drawn.half().to(drawn.dtype)
    noise = given_latents(pipe, grid)
    golden = redenoise(pipe, noise, num_rounds=settings.num_rounds, **settings.redenoising(), **call)
    family = family_of(pipe)
    target = golden if family.unpacked else to_grid(family.layout, golden, tuple(grid.shape[1:]))
    stored = {"noise": grid.half().cpu(), "golden": target.half().cpu()}
    stored["index"] = torch.tensor(list(rows), dtype=torch.int64)
    if scorer is None:
        return stored, prompts
    scores = np.stack(
        [_score(pipe, x.to(noise), prompts, settings, scorer, call) for x in (noise, golden)], 1
    )
    stored["scores"] = torch.from_numpy(scores).float()
    keep = torch.from_numpy(scores[:, 1] - scores[:, 0] > settings.margin)
    return (
        {name: value[keep] for name, value in stored.items()},
        [prompt for prompt, wanted in zip(prompts, keep.tolist()) if wanted],
    )


def _score(
    pipe: Any,
    latents: Tensor,
    prompts: list[str],
    settings: PairSettings,
    scorer: Scorer,
    call: dict[str, Any],
) -> np.ndarray:
    guided = guided_call(pipe, call, sampling_weight(pipe, settings.sampling_guidance_scale))
    options = {"num_inference_steps": settings.sampling_steps, "output_type": "np"}
    with quiet(pipe):
        # The images are called `image` in some pipelines.
        images = call_pipeline(pipe, **guided, **options, latents=latents)[0]
    return checked_scores(scorer, np.asarray(images, dtype=np.float32), prompts)


# --- the pairs on disk ---


@dataclass(frozen=True)
class ShardSummary:
    """Numbers of pairs kept and tried."""

    kept: int
    tried: int


def read_summary(path: Path) -> ShardSummary:
    """The summary of a shard, read from its header only."""
    with open_tensors(path) as file:
        return ShardSummary(file.get_slice("index").get_shape()[0], int(file.metadata()["tried"]))


@dataclass(frozen=True)
class NoisePairs:
    """Pairs in memory.

    Attributes:
        noise: (n, C, H, W) float16, random noise.
        golden: like `noise`, the target.
        prompts: n texts.
        index: (n,) int64, numbers of the attempts.
    """

    noise: Tensor
    golden: Tensor
    prompts: list[str]
    index: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def load(cls, folder: str | Path) -> NoisePairs:
        """Loads all shards of a folder, and warns if there are to be more.

        Raises:
            ValueError: no recipe, no pairs, or a shard that is corrupted, has another layout, or contains
                values that are not finite; the message names it.
        """
        try:
            recipe = ShardStore.recipe_of(folder)
        except ValueError as error:
            raise ValueError(
                f"No noise pairs: {error} Collect pairs with training/collect_noise_pairs.py."
            ) from error
        parts = [_read(path) for path in ShardStore.paths(folder)]
        planned = -(-recipe["num_pairs"] // recipe["batch_size"])
        if len(parts) < planned:
            logger.warning(
                "%s holds %d of %d shards: the collector has not finished. To use them all, start it again and wait.",
                *(folder, len(parts), planned),
            )
        parts = [part for part in parts if len(part)]
        if not parts:
            raise ValueError(
                f"{folder} holds no pairs: the collector has not kept any yet; lower its --margin."
            )
        shapes = {tuple(part.noise.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"{folder} holds pairs of different shapes: {sorted(shapes)}.")
        return cls(
            torch.cat([p.noise for p in parts]),
            torch.cat([p.golden for p in parts]),
            [prompt for p in parts for prompt in p.prompts],
            torch.cat([p.index for p in parts]),
        )

    def digest(self) -> str:
        """Digest of all pairs and their prompts."""
        values = {"noise": self.noise, "golden": self.golden, "index": self.index}
        return digest([tensors_digest(values), self.prompts])

    def subset(self, rows: Tensor) -> NoisePairs:
        """The pairs of the given rows (m,) int64."""
        chosen = [self.prompts[i] for i in rows.tolist()]
        return NoisePairs(self.noise[rows], self.golden[rows], chosen, self.index[rows])


def _read(path: Path) -> NoisePairs:
    tensors, metadata = read_tensors(path)
    if not {"noise", "golden", "index"} <= tensors.keys() or "prompts" not in metadata:
        raise ValueError(
            f"{path} is not a shard of noise pairs: it holds {', '.join(sorted(tensors)) or 'nothing'}, expected"
            " noise, golden and index with the prompts in its metadata."
        )
    noise, golden, index = (tensors[name] for name in ("noise", "golden", "index"))
    prompts = json.loads(metadata["prompts"])
    if noise.shape != golden.shape or not len(noise) == len(index) == len(prompts):
        raise ValueError(
            f"{path} does not hold pairs: noise {tuple(noise.shape)}, golden {tuple(golden.shape)},"
            f" {len(index)} indices and {len(prompts)} prompts."
        )
    require_finite(tensors, path)
    return NoisePairs(noise, golden, prompts, index)
