"""The features of a prompt: its embeddings as one vector, from which its mean can be predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .families import family_of
from .prompts import PromptEmbeds, prompt_options

# Embeddings longer than Stable Diffusion's 77 × 768 (T5's have two million entries) are averaged over tokens.
LARGEST_FLAT = 2**16


def features_of(pipe: Any, embeds: PromptEmbeds) -> Tensor:
    """Embeddings of prompts → (B, E) float32.

    They are flattened if every prompt has the same number of tokens, as with CLIP, and if this is not too long.
    Otherwise they are averaged over the tokens that are not padding. Stable Diffusion 3 has both, CLIP's tokens and an
    average over those of T5.
    """
    length = getattr(getattr(pipe, "tokenizer", None), "model_max_length", None)
    first, rest = _parts(pipe, embeds)
    fixed = embeds.mask is None and first.shape[1] == length
    flat = first.flatten(1).float()
    found = flat if fixed and flat.shape[1] <= LARGEST_FLAT else replace(embeds, embeds=first).mean()
    return found if rest is None else torch.cat([found, rest.float().mean(1)], 1)


def encoding_options(pipe: Any, embeds: PromptEmbeds, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that the features of its prompts depend on, with their values."""
    options = prompt_options(pipe, call)
    first, rest = _parts(pipe, embeds)
    # Of the encoders that do not mask their padding, it is a part of the average; of those that are left out, a zero.
    padding = first if rest is None else rest
    if embeds.mask is not None or not bool(padding.any()):
        options.pop("max_sequence_length", None)
    return options


def _parts(pipe: Any, embeds: PromptEmbeds) -> tuple[Tensor, Tensor | None]:
    """The tokens (B, tokens, width), and apart from them those of T5 that follow on CLIP's; see `Family.clip_first`."""
    tokens = embeds.embeds
    if not family_of(pipe).clip_first:
        return tokens, None
    length = pipe.tokenizer.model_max_length
    return tokens[:, :length], tokens[:, length:]
