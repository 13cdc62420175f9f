"""The released NPNet: its architecture, and a reader of its checkpoints.

    golden = SVD(x) + (2 · sigmoid(α) − 1) · e + β · Swin(x + e),    e = AdaGroupNorm(x, prompt)

Implemented from the formulas of arXiv:2411.09502 and the layout of the weights. Three things follow the
released code and not the paper, because the weights were trained that way: the Swin features are read with
their axes in the wrong order (`_SwinBranch`), the latent size is fixed, and without attention the rows are
averaged at another place (`_SVDBranch`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.models.normalization import AdaGroupNorm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from .swin import SIZE, SwinTiny

_HIDDEN = 64


class ReleasedNPNet(nn.Module):
    """The released architecture; its parameters have the names of the released weights.

    Args:
        latent_channels: C; must be 4, so that the latents form a square.
        text_dim, max_tokens: prompts are (B, max_tokens, text_dim) and flattened, so no other length is
            possible.
        sample_size: S of the noise (B, C, S, S).
        svd_attention: whether the singular values go through attention. The released SDXL weights were
            trained without it. They contain untrained attention weights, which the released inference code
            applies.
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
    vector. The mean over the rows is taken before the MLP, or after it in the network without attention.
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

    Swin outputs 7 × 7 positions of 768 features, channels last. The released network reads them as seven
    channels of 7 × 768 pixels, so the residual has at most seven distinct rows. The weights require this.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.downconv = nn.Conv2d(channels, 3, 1)
        self.upconv = nn.Conv2d(7, channels, 1)
        self.swin = SwinTiny()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, S, S) → the same."""
        image = self.downconv(F.interpolate(x, [SIZE, SIZE]))
        return self.upconv(F.interpolate(self.swin(image), x.shape[2:]))


# --- the checkpoints ---

Weights = dict[str, Tensor]

# The two layouts: one dictionary per module, with a misspelt key for the text part, or one flat dictionary.
_NESTED = {"unet_svd": "unet_svd", "unet_embedding": "unet_embedding", "embeeding": "text_embedding"}
_SCALARS = ("alpha", "beta")
_CHANNELS = 4
# Stored but not used: a batch norm, the classifier's head, and tables that follow from the window size.
_UNUSED = re.compile(r"unet_svd\.bn\.|\.swin\.head\.|\.attn_mask$|\.relative_position_index$")
_UNUSED_ATTENTION = re.compile(r"unet_svd\.attention\.")
# Layers that read the folded latents, a matrix of 2S × 2S.
_ON_MATRIX = [f"unet_svd.mlp{n}.0.weight" for n in (1, 2, 3, 4)]


def read_original(path: str | os.PathLike[str], svd_attention: bool = True) -> tuple[Weights, dict[str, int]]:
    """The weights of a released file in the flat layout, and the sizes they imply.

    Args:
        path: `.safetensors` for the flat port, any other suffix for the official layout, which is read
            without executing code from the file.
        svd_attention: False drops the weights of the attention.

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
    """S of the S × S latents that the weights are for; None if they disagree."""
    shapes = [weights[key].shape for key in _ON_MATRIX if key in weights]
    sides = {shape[-1] // 2 for shape in shapes if shape}
    return sides.pop() if len(sides) == 1 else None


def _read_flat(path: str | os.PathLike[str]) -> Weights:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file ({error}): download it again.") from error


def _read_nested(path: str | os.PathLike[str]) -> Weights:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        given: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes the unpickler raise nearly anything
        raise ValueError(
            f"{path} was not loaded: it holds more than tensors, which could run code, or is corrupted. Expected"
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
        # A part that is not a dictionary keeps its name, which the error below shows.
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
