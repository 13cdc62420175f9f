"""Facts about pipelines that cannot be read from a call: the layout and the scale of their latents."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

# --- packed latents: Flux stores latents as tokens, one for each 2 × 2 patch: (B, H/2·W/2, 4C) ---


def is_packed(rows: torch.Size, shape: tuple[int, ...]) -> bool:
    """Whether `rows`, the shape of one sample, is `shape` = (C, H, W) packed as in Flux: (H/2·W/2, 4C)."""
    if len(rows) != 2 or len(shape) != 3:
        return False
    channels, height, width = shape
    return height % 2 == 0 and width % 2 == 0 and tuple(rows) == (height * width // 4, 4 * channels)


def unpack(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, H/2·W/2, 4C) → (B, C, H, W). Each token is a 2 × 2 patch, with the channel as the slowest index."""
    channels, height, width = shape
    patches = x.reshape(len(x), height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(x), channels, height, width)


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H/2·W/2, 4C), the inverse of `unpack`."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def packs_latents(pipe: Any) -> bool:
    """Whether the `latents=` of the pipeline are packed."""
    return hasattr(pipe, "_pack_latents")


def unpacked_shape(pipe: Any, packed: Tensor, given: dict[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of latents packed to (B, H/2 · W/2, 4C).

    Args:
        pipe: the pipeline.
        packed: its latents.
        given: arguments that include the image's `height` and `width`, such as those of `prepare_latents`.

    Raises:
        ValueError: the latents are not packed in 2 × 2 patches.
    """
    step = 2 * getattr(pipe, "vae_scale_factor", 0)  # pipelines for videos have other factors
    if step:
        shape = (packed.shape[2] // 4, 2 * (int(given["height"]) // step), 2 * (int(given["width"]) // step))
        if is_packed(packed.shape[1:], shape):
            return shape
    raise ValueError(
        f"{type(pipe).__name__} has latents of shape {tuple(packed.shape[1:])}, which are not those of an image in"
        " 2 × 2 patches: this layout is not supported."
    )


# --- scale ---


def noise_scale(pipe: Any) -> float:
    """The factor between unit-variance noise for `latents=` and the result of `prepare_latents`."""
    # Flow pipelines do not multiply by init_noise_sigma, even if their scheduler has it. All classes are
    # searched, because a subclass may only wrap the method.
    methods = [vars(c)["prepare_latents"] for c in type(pipe).__mro__ if "prepare_latents" in vars(c)]
    scales = any("init_noise_sigma" in inspect.unwrap(method).__code__.co_names for method in methods)
    return float(pipe.scheduler.init_noise_sigma) if scales else 1.0
