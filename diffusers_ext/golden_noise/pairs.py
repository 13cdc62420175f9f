"""Collects pairs of random and golden noise from a pipeline: what NPNet is trained on.

Attempt i has prompt i (round the list) and its own seed, so the pairs don't depend on the batch size's remainder,
on how many processes share the work, or on how often they were killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import packing
from ..pipeline_calls import initial_noise, unpacked_shape
from ..pipeline_hooks import quiet
from .pair_store import ShardSummary, read_summary, shard_path, write_manifest, write_shard
from .redenoise import pair_scheduler, redenoise
from .scorers import Scorer, checked_scores


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made.

    Attributes:
        num_inference_steps, guidance_scale, inversion_guidance_scale, num_rounds, legacy_inversion: see
            `redenoise`.
        sampling_steps, sampling_guidance_scale: of the pictures that a scorer compares.
        margin: a pair is kept if the golden picture's score exceeds the other's by more than this.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 5.5
    inversion_guidance_scale: float = 1.0
    num_rounds: int = 1
    legacy_inversion: bool = False
    sampling_steps: int = 30
    sampling_guidance_scale: float = 5.5
    margin: float = 0.0


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
    **call_kwargs: Any,
) -> ShardSummary:
    """Tries `num_pairs` pairs, keeps those that the scorer prefers, and goes on where an earlier run stopped.

    Args:
        pipe: a text-to-image pipeline.
        prompts: attempt i has prompt i, round the list.
        num_pairs: attempts in all, over all processes.
        output_dir: of the shards and the manifest.
        settings: how pairs are made.
        seed: attempt i's noise depends on `(seed, i)`.
        batch_size: attempts a shard; it belongs to the folder, like the settings.
        scorer: None keeps every pair.
        scorer_name: for the manifest.
        rank, world: this process makes batches rank, rank + world, ...
        progress: show a bar that says kept and tried.
        call_kwargs: of the pipeline, such as `height` and `width`.

    Returns:
        Kept and tried, of this process's batches, earlier runs included.

    Raises:
        ValueError: no prompts, counts below 1, a folder whose pairs were made otherwise, a broken shard, or a
            scorer that returns something not finite.
    """
    prompts = list(prompts)
    if not prompts or num_pairs < 1 or batch_size < 1:
        raise ValueError(
            f"Give prompts, and num_pairs and batch_size of 1 or more; got {len(prompts)} prompts, {num_pairs} and"
            f" {batch_size}."
        )
    write_manifest(
        output_dir,
        {
            "model": describe_model(pipe),
            "prompts": {"count": len(prompts), "digest": _digest("\n".join(prompts))},
            "num_pairs": num_pairs,
            "seed": seed,
            "batch_size": batch_size,
            "scorer": scorer_name,
            "settings": asdict(settings),
            "call": {key: repr(value) for key, value in sorted(call_kwargs.items())},
        },
    )
    kept = tried = 0
    batches = range(rank, -(-num_pairs // batch_size), world)
    bar = tqdm(total=len(batches) * batch_size, disable=not progress, unit="pair", desc="noise pairs")
    for batch in batches:
        path = shard_path(output_dir, batch)
        if not path.is_file():
            rows = range(batch * batch_size, min((batch + 1) * batch_size, num_pairs))
            chosen = [prompts[i % len(prompts)] for i in rows]
            tensors, names = _pairs(pipe, rows, chosen, seed, settings, scorer, call_kwargs)
            write_shard(path, tensors, names, len(rows))
        done = read_summary(path)
        kept, tried = kept + done.kept, tried + done.tried
        bar.update(done.tried)
        bar.set_postfix_str(f"kept {kept}/{tried}")
    bar.close()
    return ShardSummary(kept, tried)


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
        drawn, given = initial_noise(pipe, {**call, "generator": generators})
    # As it will be stored, so that the target belongs to exactly this noise.
    noise = drawn.half().to(drawn.dtype)
    golden = redenoise(
        pipe,
        noise,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        inversion_guidance_scale=settings.inversion_guidance_scale,
        num_rounds=settings.num_rounds,
        legacy_inversion=settings.legacy_inversion,
        **call,
    )
    shape = unpacked_shape(pipe, noise, given) if noise.ndim == 3 else None
    stored = {
        name: (packing.unpack(x, shape) if shape else x).half().cpu()
        for name, x in (("noise", noise), ("golden", golden))
    }
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
    with quiet(pipe):
        images = pipe(
            **call,
            latents=latents,
            num_inference_steps=settings.sampling_steps,
            guidance_scale=settings.sampling_guidance_scale,
            output_type="np",
        ).images
    return checked_scores(scorer, np.asarray(images, dtype=np.float32), prompts)


def describe_model(pipe: Any) -> dict[str, str]:
    """Class, noise schedule and a digest of the denoiser's weights: what the pairs belong to."""
    denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    hasher = hashlib.sha256()
    for name, value in sorted(denoiser.state_dict().items()):
        # A few values of every tensor: enough to tell two models apart, and quick for large ones.
        hasher.update(f"{name}{tuple(value.shape)}".encode())
        hasher.update(value.detach().flatten()[:64].float().cpu().numpy().tobytes())
    config = {
        key: value for key, value in pair_scheduler(pipe.scheduler).config.items() if not key.startswith("_")
    }
    return {
        "pipeline": type(pipe).__name__,
        "weights": hasher.hexdigest()[:16],
        "schedule": _digest(json.dumps(config, sort_keys=True, default=repr)),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
