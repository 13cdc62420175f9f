"""The released NPNet checkpoints, whose names `released.py` keeps."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]

# The two layouts: one dictionary a module, whose text part is misspelt, or one flat dictionary.
_NESTED = {"unet_svd": "unet_svd", "unet_embedding": "unet_embedding", "embeeding": "text_embedding"}
_SCALARS = ("alpha", "beta")
_CHANNELS = 4
# Stored but never used: a batch norm, the classifier's head, and tables that follow from the window's size.
_UNUSED = re.compile(r"unet_svd\.bn\.|\.swin\.head\.|\.attn_mask$|\.relative_position_index$")
_UNUSED_ATTENTION = re.compile(r"unet_svd\.attention\.")
# Layers that read the folded latents, a matrix of 2S × 2S.
_ON_MATRIX = [f"unet_svd.mlp{n}.0.weight" for n in (1, 2, 3, 4)]


def read_original(path: str | os.PathLike[str], svd_attention: bool = True) -> tuple[Weights, dict[str, int]]:
    """The weights of a released file in the flat layout, and the sizes they imply.

    Args:
        path: `.safetensors` for the flat port, anything else for the official layout, which is read without
            running any code in it.
        svd_attention: drop the attention's weights if it is off.

    Returns:
        Weights for `ReleasedNPNet`, float32, and `latent_channels`, `text_dim` and `max_tokens`.

    Raises:
        ValueError: not one of the two layouts.
        OSError: no such file.
    """
    flat = _read_flat(path) if str(path).endswith(".safetensors") else _read_nested(path)
    weights: Weights = {}
    for key, value in flat.items():
        if _UNUSED.search(key) or (not svd_attention and _UNUSED_ATTENTION.match(key)):
            continue
        scalar = key in _SCALARS and value.numel() == 1
        weights[key] = value.detach().float().reshape(1) if scalar else value.detach().float()
    return weights, _sizes(path, weights)


def latent_size(weights: Weights) -> int | None:
    """S of the S × S latents that the weights are for; None if they do not agree on one."""
    shapes = [weights[key].shape for key in _ON_MATRIX if key in weights]
    sides = {shape[-1] // 2 for shape in shapes if shape}
    return sides.pop() if len(sides) == 1 else None


def _read_flat(path: str | os.PathLike[str]) -> Weights:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again.") from error


def _read_nested(path: str | os.PathLike[str]) -> Weights:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        given: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes the unpickler raise nearly anything
        raise ValueError(
            f"{path} was not loaded: it holds more than tensors, which could run code, or is not whole. Expected"
            f" the official NPNet checkpoint or its safetensors port. ({str(error).partition(chr(10))[0] or type(error).__name__})"
        ) from error
    expected = {*_NESTED, *_SCALARS}
    if not isinstance(given, dict) or not expected <= given.keys():
        have = ", ".join(sorted(map(str, given))) if isinstance(given, dict) else type(given).__name__
        raise ValueError(
            f"{path} is not an official NPNet checkpoint: expected the keys {', '.join(sorted(expected))}, got"
            f" {have or 'none'}."
        )
    scalars = {name: given[name] for name in _SCALARS}
    flat = {name: torch.tensor(x) if isinstance(x, float) else x for name, x in scalars.items()}
    for name, ours in _NESTED.items():
        part = given[name]
        # A part that is no dictionary is refused by its own name.
        flat |= {f"{ours}.{k}": v for k, v in part.items()} if isinstance(part, dict) else {name: part}
    other = sorted(key for key, value in flat.items() if not isinstance(value, Tensor))
    if other:
        raise ValueError(f"{path} is not an official NPNet checkpoint: no tensors at {', '.join(other)}.")
    return flat


def _sizes(path: str | os.PathLike[str], weights: Weights, max_tokens: int = 77) -> dict[str, int]:
    linear = weights.get("text_embedding.linear.weight")
    if linear is None or linear.ndim != 2 or linear.shape[0] != 2 * _CHANNELS or linear.shape[1] % max_tokens:
        shape = "is missing" if linear is None else f"has shape {tuple(linear.shape)}"
        raise ValueError(
            f"{path} does not hold an NPNet: text_embedding.linear.weight {shape}, expected ({2 * _CHANNELS},"
            f" {max_tokens} · text width)."
        )
    return {
        "latent_channels": _CHANNELS,
        "text_dim": linear.shape[1] // max_tokens,
        "max_tokens": max_tokens,
    }
