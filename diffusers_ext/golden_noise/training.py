"""Training of NPNet: the objective, the held-out split, and a validation with controls."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.pipeline import call_pipeline, given_latents, quiet
from ..core.prompts import PromptEmbeds, prompt_embeddings
from ..core.scores import Scorer, checked_scores
from ..training.rows import Rows
from .apply import predict
from .gaps import guided_call, sampling_weight
from .npnet import NPNetModel
from .pairs import NoisePairs


class NPNetObjective(nn.Module):
    """The squared error to the golden noise, arXiv:2411.09502, equation 6."""

    def __init__(self, npnet: NPNetModel) -> None:
        super().__init__()
        self.npnet = npnet

    def forward(
        self,
        noise: Tensor,
        golden: Tensor,
        prompt_embeds: Tensor,
        encoder_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            noise, golden: (b, C, H, W).
            prompt_embeds: (b, tokens, text_dim), one row for each noise.
            encoder_attention_mask: (b, tokens) bool, False at padding; None if there is none.
            pooled_prompt_embeds: (b, pooled_dim), for a network that takes them.
        """
        made = self.npnet(noise, prompt_embeds, encoder_attention_mask, pooled_prompt_embeds).sample
        return F.mse_loss(made, golden)


@dataclass(frozen=True)
class PairRows:
    """Reads random pairs and their prompts."""

    pairs: NoisePairs

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """`noise` and `golden` (n, C, H, W) float32, and n `prompts`."""
        part = self.pairs.subset(rows.indices(len(self.pairs)))
        return {"noise": part.noise.float(), "golden": part.golden.float(), "prompts": part.prompts}


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
def relative_error(
    npnet: NPNetModel, pipe: Any, pairs: NoisePairs, batch_size: int = 64, **call_kwargs: Any
) -> float:
    """Mean squared error on pairs over that of the identity; 1 or more means that nothing was learned.

    `call_kwargs` are the arguments of the pipeline's call that the pairs were made with.
    """
    error = identity = 0.0
    for rows in torch.arange(len(pairs)).split(batch_size):
        part = pairs.subset(rows)
        noise, golden = (x.float().to(npnet.device) for x in (part.noise, part.golden))
        made = predict(npnet, noise, _embeddings(npnet, pipe, part.prompts, **call_kwargs))
        error += float((made - golden).square().sum())
        identity += float((noise - golden).square().sum())
    return error / identity


def _embeddings(npnet: NPNetModel, pipe: Any, prompts: Sequence[str], **call_kwargs: Any) -> PromptEmbeds:
    """The embeddings of prompts for a network in another data type than the pipeline's."""
    found = prompt_embeddings(pipe, prompts, **call_kwargs)
    others = {name: getattr(found, name) for name in ("padded", "pooled")}
    cast = {name: None if value is None else value.to(npnet.dtype) for name, value in others.items()}
    return replace(found, embeds=found.embeds.to(npnet.dtype), **cast)


@torch.no_grad()
def variants(npnet: NPNetModel, pipe: Any, pairs: NoisePairs, **call_kwargs: Any) -> dict[str, Tensor]:
    """Initial noises to compare, (n, C, H, W) float32 each.

    `plain` is the random noise, `npnet` the golden noise, `re-denoised` the target. The controls are
    `random`, a random perturbation with the norm of each row's change, `shuffled`, the network with another
    row's prompt, and `rescaled`, the random noise with the golden noise's mean and variance. `call_kwargs` are
    as for `relative_error`.
    """
    noise, golden = (x.float().to(npnet.device) for x in (pairs.noise, pairs.golden))
    embeds = _embeddings(npnet, pipe, pairs.prompts, **call_kwargs)
    made = predict(npnet, noise, embeds)
    return {
        "plain": noise,
        "npnet": made,
        "re-denoised": golden,
        "random": noise + equal_norm(made - noise, torch.Generator().manual_seed(0)),
        "shuffled": predict(npnet, noise, embeds.rows(torch.arange(len(noise)).roll(1))),
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
    pipe: Any,
    prompts: Sequence[str],
    latents: Tensor,
    batch_size: int = 32,
    *,
    guidance_scale: float | None,
    **call_kwargs: Any,
) -> np.ndarray:
    """Images of prompts from given noise.

    Args:
        pipe: a text-to-image pipeline.
        prompts: n texts.
        latents: unit-variance noise (n, C, H, W), which is brought to the layout of `latents=`.
        batch_size: images per call.
        guidance_scale: see `sampling_weight`.
        call_kwargs: other arguments of the call.

    Returns:
        float32 (n, h, w, 3) in [0, 1].

    Raises:
        ValueError: see `guided_call`.
    """
    parts = []
    for rows in torch.arange(len(prompts)).split(batch_size):
        x = latents[rows].to(pipe._execution_device, pipe.dtype)
        chosen = [prompts[i] for i in rows.tolist()]
        weight = sampling_weight(pipe, guidance_scale)
        call = guided_call(pipe, {**call_kwargs, "prompt": chosen}, weight)
        with quiet(pipe):
            images = call_pipeline(pipe, **call, latents=given_latents(pipe, x), output_type="np")[0]
        parts.append(np.asarray(images, dtype=np.float32))
    return np.concatenate(parts)


def compare(
    npnet: NPNetModel,
    pipe: Any,
    pairs: NoisePairs,
    scorer: Scorer | None,
    *,
    guidance_scale: float | None,
    num_inference_steps: int,
    **call_kwargs: Any,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Mean scores of all `variants` on held-out pairs, and their images.

    Without a scorer, there are no scores and only the images of the first three variants. `call_kwargs` are as
    for `relative_error`.
    """
    starts = variants(npnet, pipe, pairs, **call_kwargs)
    if scorer is None:
        starts = {name: starts[name] for name in ("plain", "npnet", "re-denoised")}
    call = {**call_kwargs, "guidance_scale": guidance_scale, "num_inference_steps": num_inference_steps}
    images = {name: sample(pipe, pairs.prompts, x, **call) for name, x in starts.items()}
    if scorer is None:
        return {}, images
    scores = {
        f"score, {name}": float(checked_scores(scorer, part, pairs.prompts).mean())
        for name, part in images.items()
    }
    return scores, images
