"""The released NPNet checkpoints, whose names `released.py` keeps."""

from __future__ import annotations

import os
import pickle
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
# Stored but never used: a batch norm, the classifier's head, and tables that follow from the window's size.
_UNUSED = re.compile(r"unet_svd\.bn\.|\.swin\.head\.|\.attn_mask$|\.relative_position_index$")
_UNUSED_ATTENTION = re.compile(r"unet_svd\.attention\.")


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
        weights[key] = value.detach().float().reshape(1) if key in _SCALARS else value.detach().float()
    return weights, _sizes(path, weights)


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
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
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
    parts = {f"{ours}.{key}": value for name, ours in _NESTED.items() for key, value in given[name].items()}
    return parts | {name: torch.as_tensor(given[name]) for name in _SCALARS}


def _sizes(path: str | os.PathLike[str], weights: Weights, max_tokens: int = 77) -> dict[str, int]:
    linear = weights.get("text_embedding.linear.weight")
    if linear is None or linear.ndim != 2 or linear.shape[0] % 2 or linear.shape[1] % max_tokens:
        shape = "is missing" if linear is None else f"has shape {tuple(linear.shape)}"
        raise ValueError(
            f"{path} does not hold an NPNet: text_embedding.linear.weight {shape}, expected (2 · channels,"
            f" {max_tokens} · text width)."
        )
    return {
        "latent_channels": linear.shape[0] // 2,
        "text_dim": linear.shape[1] // max_tokens,
        "max_tokens": max_tokens,
    }
