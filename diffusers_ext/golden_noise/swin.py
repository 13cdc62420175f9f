"""Swin-Tiny (Liu et al., arXiv:2103.14030) for 224 × 224 images, with the NPNet weights' parameter names.

`transformers.SwinModel` computes the same, but its parameter names change between releases, and a saved NPNet
would then fail to load.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 224
_WINDOW = 7
_DEPTHS, _HEADS, _WIDTH, _PATCH = (2, 2, 6, 2), (3, 6, 12, 24), 96, 4


class SwinTiny(nn.Module):
    """Images (B, 3, 224, 224) → normalised features (B, 7, 7, 768), channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, _WIDTH, _PATCH, stride=_PATCH), "norm": nn.LayerNorm(_WIDTH)}
        )
        side = SIZE // _PATCH
        stages = []
        for number, (depth, heads) in enumerate(zip(_DEPTHS, _HEADS)):
            stages.append(_Stage(_WIDTH * 2**number, depth, heads, side // 2**number, merge=number > 0))
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(_WIDTH * 2 ** (len(_DEPTHS) - 1))

    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        x = self.patch_embed["norm"](self.patch_embed["proj"](pictures).movedim(1, -1))
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)


class _Stage(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, side: int, merge: bool) -> None:
        super().__init__()
        self.downsample = _Merge(width // 2) if merge else nn.Identity()
        shifts = [_WINDOW // 2 if n % 2 and side > _WINDOW else 0 for n in range(depth)]
        self.blocks = nn.ModuleList([_Block(width, heads, side, shift) for shift in shifts])

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class _Merge(nn.Module):
    """Merges each 2 × 2 patches into one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, side: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _WindowAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.register_buffer("mask", _shift_mask(side, shift) if shift else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[1]
        shifted = self.norm1(x).roll((-self.shift, -self.shift), (1, 2))
        attended = _from_windows(self.attn(_windows(shifted), self.mask), side)
        x = x + attended.roll((self.shift, self.shift), (1, 2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _WindowAttention(nn.Module):
    index: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * _WINDOW - 1) ** 2, heads))
        self.register_buffer("index", _relative_positions(), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, windows, 49, width) → the same; `mask` is (windows, 49, 49), True where two may attend."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in self.qkv(x).chunk(3, -1))
        bias = self.relative_position_bias_table[self.index].movedim(-1, 0)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None], float("-inf"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(*q.shape[:3], -1, -1))
        return self.proj(out.transpose(2, 3).flatten(3))


def _windows(x: Tensor) -> Tensor:
    """(B, side, side, width) → (B, windows, 49, width)."""
    x = x.unflatten(1, (-1, _WINDOW)).unflatten(3, (-1, _WINDOW)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _from_windows(x: Tensor, side: int) -> Tensor:
    """The inverse of `_windows`."""
    count = side // _WINDOW
    x = x.unflatten(1, (count, count)).unflatten(3, (_WINDOW, _WINDOW)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _relative_positions() -> Tensor:
    """Rows of the bias table for all pairs of positions in a window, (49, 49)."""
    place = torch.cartesian_prod(torch.arange(_WINDOW), torch.arange(_WINDOW))
    offset = place[:, None] - place[None] + _WINDOW - 1
    return offset[..., 0] * (2 * _WINDOW - 1) + offset[..., 1]


def _shift_mask(side: int, shift: int) -> Tensor:
    """Which positions of a shifted window were neighbours before the shift, (windows, 49, 49)."""
    position = torch.arange(side)
    region = (position >= side - _WINDOW).long() + (position >= side - shift).long()
    areas = _windows((3 * region[:, None] + region[None])[None, :, :, None])[0, :, :, 0]
    return areas[:, :, None] == areas[:, None, :]
