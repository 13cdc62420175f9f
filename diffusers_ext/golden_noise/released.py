"""The network of the released NPNet weights, from the formulas of arXiv:2411.09502 and what the weights expect.

    golden = SVD(x) + (2 · sigmoid(α) − 1) · e + β · Swin(x + e),    e = AdaGroupNorm(x, prompt)

Three things follow the released code and not the paper, because the weights were trained that way: the Swin
features are read with their axes in the wrong order (`_SwinBranch`), the number of latents is fixed, and without
attention the rows are averaged in another place (`_SVDBranch`).
"""

import torch
from diffusers.models.normalization import AdaGroupNorm
from torch import Tensor, nn
from torch.nn import functional as F

from .swin import SIZE, SwinTiny

_HIDDEN = 64


class ReleasedNPNet(nn.Module):
    """Released architecture; the names of its parts are those of the weights.

    Args:
        latent_channels: C: 4, the only number whose latents fold into a square.
        text_dim, max_tokens: prompts are (B, max_tokens, text_dim), flattened: no other length will do.
        sample_size: S: noise is (B, C, S, S).
        svd_attention: whether the singular values go through attention. The released SDXL weights were trained
            without it and hold untrained attention weights, which the released inference code applies.
    """

    def __init__(
        self, latent_channels: int, text_dim: int, max_tokens: int, sample_size: int, svd_attention: bool
    ) -> None:
        super().__init__()
        self.unet_svd = _SVDBranch(latent_channels * sample_size // 2, svd_attention)
        self.unet_embedding = _SwinBranch(latent_channels)
        self.text_embedding = AdaGroupNorm(max_tokens * text_dim, latent_channels, num_groups=1, eps=1e-6)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, noise: Tensor, prompt_embeds: Tensor) -> Tensor:
        """(B, C, S, S) noise and (B, max_tokens, text_dim) prompts; returns golden noise, float32."""
        dtype = self.alpha.dtype
        e = self.text_embedding(noise.to(dtype), prompt_embeds.to(dtype).flatten(1))
        scale = 2 * torch.sigmoid(self.alpha) - 1
        residual = self.beta * self.unet_embedding(noise.to(dtype) + e)
        return self.unet_svd(noise.float()) + (scale * e + residual).float()


class _SVDBranch(nn.Module):
    """Predicts new singular values for the noise, laid out as one square matrix.

    The paper's figure and formula: U diag(s + MLP(attention(φ(U, s, V)))) Vᵀ. φ has one row for each singular
    vector; the mean over them is taken before the MLP, but in the network without attention after it.
    """

    def __init__(self, size: int, attention: bool) -> None:
        super().__init__()
        self.mlp1, self.mlp2 = (_mlp(size, _HIDDEN) for _ in range(2))
        self.mlp3 = nn.Sequential(nn.Linear(size, size))
        self.attention = _SelfAttention(size) if attention else None
        self.mlp4 = _mlp(size, 1024)

    def forward(self, noise: Tensor) -> Tensor:
        """float32 (B, C, S, S) → the same; the decomposition has no half-precision kernel."""
        batch, channels, height, width = noise.shape
        # Channel 2a + c is the block in row a and column c.
        matrix = noise.reshape(batch, 2, channels // 2, height, width).transpose(2, 3)
        matrix = matrix.reshape(batch, 2 * height, channels // 2 * width)
        u, s, vh = torch.linalg.svd(matrix)
        dtype = self.mlp3[0].weight.dtype
        features = self.mlp1(u.mT.to(dtype)) + self.mlp2(vh.to(dtype)) + self.mlp3(s.to(dtype))[:, None]
        if self.attention is None:
            change = self.mlp4(features).mean(1)
        else:
            change = self.mlp4(self.attention(features).mean(1))
        matrix = u @ ((s + change.float())[:, :, None] * vh)
        blocks = matrix.reshape(batch, 2, height, channels // 2, width).transpose(2, 3)
        return blocks.reshape(batch, channels, height, width)


def _mlp(size: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, size))


class _SelfAttention(nn.Module):
    """Eight heads, one joint projection without bias, as the weights are stored."""

    def __init__(self, size: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, size) → the same."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _SwinBranch(nn.Module):
    """Swin-Tiny between two nearest-neighbour resizings.

    Swin gives 7 × 7 positions of 768 features, channels last. The released network reads them as seven channels
    of 7 × 768 pixels, so that the residual has no more than seven distinct rows. The weights know no other way.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.downconv = nn.Conv2d(channels, 3, 1)
        self.upconv = nn.Conv2d(7, channels, 1)
        self.swin = SwinTiny()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) → the same."""
        picture = self.downconv(F.interpolate(x, [SIZE, SIZE]))
        return self.upconv(F.interpolate(self.swin(picture), x.shape[2:]))
