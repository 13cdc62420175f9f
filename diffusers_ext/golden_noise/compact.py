"""The compact architecture of `NPNetModel`, ours: a residual from patches of the noise that attend to the prompt."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 2
_FREQUENCIES = 4


class CompactNPNet(nn.Module):
    """The residual that is added to the noise, for any latent size and any number of channels.

    It follows the idea of NPNet (arXiv:2411.09502, equation 4: golden noise is the random noise plus a
    residual that depends on the noise and the prompt), with an architecture of our own: 2 × 2 patches of the
    noise attend to the prompt's tokens, and depthwise convolutions mix the patches. Every row has its own
    prompt. The last layer starts at zero, so an untrained network is the identity.

    Args:
        latent_channels: C.
        text_dim: width of the prompt embeddings.
        max_tokens: largest number of tokens of a prompt; each has a position embedding.
        width: features per patch, a multiple of 32.
        depth: number of blocks.
        pooled_dim: width of the prompts' pooled vectors; None if it takes none.
    """

    _gradient_checkpointing_func: Any  # set by enable_gradient_checkpointing

    def __init__(
        self,
        latent_channels: int,
        text_dim: int,
        max_tokens: int,
        width: int,
        depth: int,
        pooled_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.pooled = None
        if pooled_dim is not None:
            self.pooled = nn.Sequential(nn.LayerNorm(pooled_dim), nn.Linear(pooled_dim, width))
        self.tokens = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.token_positions = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        patch = latent_channels * PATCH**2
        self.embed = nn.Linear(patch + 4 * _FREQUENCIES, width)
        self.blocks = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, patch)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.gradient_checkpointing = False

    def forward(
        self,
        noise: Tensor,
        prompt_embeds: Tensor,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
    ) -> Tensor:
        """The residual (B, C, H, W).

        Args:
            noise: (B, C, H, W).
            prompt_embeds: (B, tokens, text_dim).
            mask: (B, tokens) bool, False at padding; None if there is none.
            pooled: (B, pooled_dim), for a network that takes it.
        """
        height, width = noise.shape[2:]
        padded = F.pad(noise, (0, width % PATCH, 0, height % PATCH))
        patches = F.pixel_unshuffle(padded, PATCH)
        x = torch.cat([patches, _coordinates(patches)], 1).movedim(1, -1)
        x = self.embed(x)
        # Positions count the tokens of the prompt only, so that padding on the left does not move them.
        places = slice(prompt_embeds.shape[1]) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        text = self.tokens(prompt_embeds) + self.token_positions[places]
        if self.pooled is not None and pooled is not None:
            text = torch.cat([text, self.pooled(pooled)[:, None]], 1)
            mask = None if mask is None else F.pad(mask, (0, 1), value=True)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, text, mask)
            else:
                x = block(x, text, mask)
        residual = F.pixel_shuffle(self.out(self.norm(x)).movedim(-1, 1), PATCH)
        return residual[:, :, :height, :width]


class _Block(nn.Module):
    """Attention to the prompt, then a depthwise 5 × 5 convolution, then an MLP; all residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.attention = Attention(width, cross_attention_dim=width, heads=width // 32, dim_head=32)
        self.mix = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Patches (B, h, w, width), tokens (B, tokens, width) and their mask (B, tokens)."""
        attend, mix, mlp = self.norms
        flat = attend(x).flatten(1, 2)
        # One mask for all queries.
        every = None if mask is None else mask[:, None]
        x = x + self.attention(flat, text, attention_mask=every).unflatten(1, x.shape[1:3])
        x = x + self.mix(mix(x).movedim(-1, 1)).movedim(1, -1)
        return x + self.mlp(mlp(x))


def _coordinates(patches: Tensor) -> Tensor:
    """Sines and cosines of the relative position of every patch, (B, 4 · frequencies, h, w).

    The positions are relative to the size, so that "left of" is encoded in the same way at every size.
    """
    batch, _, height, width = patches.shape
    features = []
    for axis, size in ((0, height), (1, width)):
        place = (torch.arange(size, device=patches.device) + 0.5) / size
        waves = [f(math.pi * 2**k * place) for k in range(_FREQUENCIES) for f in (torch.sin, torch.cos)]
        table = torch.stack(waves).to(patches.dtype)
        table = table[:, :, None] if axis == 0 else table[:, None, :]
        features.append(table.expand(-1, height, width))
    return torch.cat(features).expand(batch, -1, -1, -1)
