"""Training of NPNet: the objective, the held-out split, and a validation with controls."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.families import pack, packs_latents
from ..core.pipeline import call_pipeline, quiet
from ..core.prompts import prompt_embeddings
from .npnet import NPNetModel
from .pairs import NoisePairs
from .scorers import Scorer, checked_scores


class NPNetObjective(nn.Module):
    """The squared error to the golden noise, arXiv:2411.09502, equation 6."""

    def __init__(self, npnet: NPNetModel) -> None:
        super().__init__()
        self.npnet = npnet

    def forward(self, noise: Tensor, golden: Tensor, prompt_embeds: Tensor) -> Tensor:
        """(b, C, H, W) noise and golden noise, (b, tokens, text_dim) embeddings, one per noise → the loss."""
        return F.mse_loss(self.npnet(noise, prompt_embeds).sample, golden)


def split_by_prompt(pairs: NoisePairs, share: float) -> tuple[NoisePairs, NoisePairs]:
    """(training, held-out) pairs. All pairs of a prompt are on one side, and the split is deterministic.

    Raises:
        ValueError: one side is empty.
    """
    held_out = torch.tensor([_fraction(prompt) < share for prompt in pairs.prompts])
    if held_out.all() or not held_out.any():
        raise ValueError(
            f"{len(set(pairs.prompts))} prompts cannot be split with {share:.0%} held out: collect pairs of more"
            " prompts."
        )
    return pairs.subset(torch.nonzero(~held_out)[:, 0]), pairs.subset(torch.nonzero(held_out)[:, 0])


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


@torch.no_grad()
def relative_error(npnet: NPNetModel, pipe: Any, pairs: NoisePairs, batch_size: int = 64) -> float:
    """Mean squared error on pairs over that of the identity; 1 or more means that nothing was learned."""
    error = identity = 0.0
    for rows in torch.arange(len(pairs)).split(batch_size):
        part = pairs.subset(rows)
        noise, golden = (x.float().to(npnet.device) for x in (part.noise, part.golden))
        made = npnet(noise, prompt_embeddings(pipe, part.prompts)).sample
        error += float((made - golden).square().sum())
        identity += float((noise - golden).square().sum())
    return error / identity


@torch.no_grad()
def variants(npnet: NPNetModel, pipe: Any, pairs: NoisePairs) -> dict[str, Tensor]:
    """Initial noises to compare, (n, C, H, W) float32 each.

    `plain` is the random noise, `npnet` the golden noise, `re-denoised` the target. The controls are
    `random`, a random perturbation with the norm of each row's change, `shuffled`, the network with another
    row's prompt, and `rescaled`, the random noise with the golden noise's mean and variance.
    """
    noise, golden = (x.float().to(npnet.device) for x in (pairs.noise, pairs.golden))
    embeds = prompt_embeddings(pipe, pairs.prompts)
    made = npnet(noise, embeds).sample
    return {
        "plain": noise,
        "npnet": made,
        "re-denoised": golden,
        "random": noise + equal_norm(made - noise, torch.Generator().manual_seed(0)),
        "shuffled": npnet(noise, embeds.roll(1, 0)).sample,
        "rescaled": rescaled(noise, made),
    }


def equal_norm(change: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction for every row of `change`, scaled to the norm of that row."""
    draw = torch.randn(change.shape, generator=generator).to(change)
    factor = change.flatten(1).norm(dim=1) / draw.flatten(1).norm(dim=1)
    return draw * factor[:, None, None, None]


def rescaled(noise: Tensor, like: Tensor) -> Tensor:
    """`noise` with each row's mean and standard deviation those of `like`."""
    axes = (1, 2, 3)
    unit = (noise - noise.mean(axes, keepdim=True)) / noise.std(axes, keepdim=True)
    return unit * like.std(axes, keepdim=True) + like.mean(axes, keepdim=True)


@torch.no_grad()
def sample(
    pipe: Any, prompts: Sequence[str], latents: Tensor, batch_size: int = 32, **call_kwargs: Any
) -> np.ndarray:
    """Images float32 (n, h, w, 3) in [0, 1] from unit-variance noise (n, C, H, W), packed here if needed."""
    packs = packs_latents(pipe)
    parts = []
    for rows in torch.arange(len(prompts)).split(batch_size):
        x = latents[rows].to(pipe._execution_device, pipe.dtype)
        chosen = [prompts[i] for i in rows.tolist()]
        with quiet(pipe):
            result = call_pipeline(
                pipe, chosen, latents=pack(x) if packs else x, output_type="np", **call_kwargs
            )
        parts.append(np.asarray(result.images, dtype=np.float32))
    return np.concatenate(parts)


def compare(
    npnet: NPNetModel, pipe: Any, pairs: NoisePairs, scorer: Scorer | None, **call_kwargs: Any
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Mean scores of all `variants` on held-out pairs, and their images.

    Without a scorer, there are no scores and only the images of the first three variants.
    """
    starts = variants(npnet, pipe, pairs)
    if scorer is None:
        starts = {name: starts[name] for name in ("plain", "npnet", "re-denoised")}
    images = {name: sample(pipe, pairs.prompts, x, **call_kwargs) for name, x in starts.items()}
    if scorer is None:
        return {}, images
    scores = {
        f"score, {name}": float(checked_scores(scorer, part, pairs.prompts).mean())
        for name, part in images.items()
    }
    return scores, images
