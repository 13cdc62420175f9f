"""A small noise network of our own, for any latent size and any number of channels.

It keeps the idea of NPNet (arXiv:2411.09502, equation 4: the golden noise is the random one plus a residual that
depends on noise and prompt) and none of its sizes: 2 × 2 patches of the noise attend to the prompt's tokens, and
depthwise convolutions tell them of each other. Every row has its own prompt. The last layer starts at zero, so an
untrained network is the identity.
"""

import math

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional as F

PATCH = 2
_FREQUENCIES = 4


class CompactNPNet(nn.Module):
    """The residual that is added to the noise.

    Args:
        latent_channels: C.
        text_dim: width of the prompt embeddings.
        max_tokens: the most tokens of a prompt; each has a position embedding.
        width: features of a patch, a multiple of 64.
        depth: number of blocks.
    """

    def __init__(self, latent_channels: int, text_dim: int, max_tokens: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, width))
        self.token_positions = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        patch = latent_channels * PATCH**2
        self.embed = nn.Linear(patch + 4 * _FREQUENCIES, width)
        self.blocks = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, patch)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, noise: Tensor, prompt_embeds: Tensor) -> Tensor:
        """(B, C, H, W) noise and (B, tokens, text_dim) prompts; returns the residual (B, C, H, W)."""
        height, width = noise.shape[2:]
        padded = F.pad(noise, (0, width % PATCH, 0, height % PATCH))
        patches = F.pixel_unshuffle(padded, PATCH)
        x = torch.cat([patches, _coordinates(patches)], 1).movedim(1, -1)
        x = self.embed(x)
        text = self.tokens(prompt_embeds) + self.token_positions[: prompt_embeds.shape[1]]
        for block in self.blocks:
            x = block(x, text)
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

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Patches (B, h, w, width) and tokens (B, tokens, width)."""
        attend, mix, mlp = self.norms
        flat = attend(x).flatten(1, 2)
        x = x + self.attention(flat, text).unflatten(1, x.shape[1:3])
        x = x + self.mix(mix(x).movedim(-1, 1)).movedim(1, -1)
        return x + self.mlp(mlp(x))


def _coordinates(patches: Tensor) -> Tensor:
    """Sines and cosines of the relative position of every patch, (B, 4 · frequencies, h, w).

    Relative, so that "left of" means the same at every size.
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
