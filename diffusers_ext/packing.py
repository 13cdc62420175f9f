"""Flux keeps latents as a row of tokens, each a 2 × 2 patch: (B, H/2·W/2, 4C)."""

import torch


def is_packed(rows: torch.Size, shape: tuple[int, ...]) -> bool:
    """Whether latents of row shape `rows` are `shape` = (C, H, W) packed as Flux does: (H/2·W/2, 4C)."""
    if len(rows) != 2 or len(shape) != 3:
        return False
    channels, height, width = shape
    return height % 2 == 0 and width % 2 == 0 and tuple(rows) == (height * width // 4, 4 * channels)


def unpack(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """(B, H/2·W/2, 4C) → (B, C, H, W): every token holds a 2×2 patch, channels slowest."""
    channels, height, width = shape
    patches = x.reshape(len(x), height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(x), channels, height, width)


def pack(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) → (B, H/2·W/2, 4C), the inverse of `unpack`."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)
