"""GRI attention on tensors: a window of a picture and the pooled whole, in one softmax; and what it costs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.nn import functional as F


def gri_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    height: int,
    width: int,
    window: int,
    pool: int,
    **dispatched: Any,
) -> Tensor:
    """Joint attention to the own window and to the pooled picture.

    Windows tile the picture from the top left. Where they don't divide it, the last of a row or column moves back
    inside and overlaps its neighbour, and answers only for the tokens that no other window has: so each query has a
    full window and no mask is needed, which flash kernels would refuse. A pooled key counts as one key; the cells of
    the own window are among them, and cells at the edge average what they have.

    A window that covers the picture makes this full attention; then the pooled keys are left out, since every token
    is there itself.

    Args:
        query, key, value: (b, height·width, heads, d), rows of the picture one after the other.
        window: side of a window in tokens, 1 or more; along a shorter side of the picture it is that side.
        pool: side of a pooled cell in tokens, 1 or more.
        dispatched: keyword arguments of `dispatch_attention_fn`.

    Returns:
        (b, height·width, heads, d).
    """
    if window >= max(height, width):
        return dispatch_attention_fn(query, key, value, **dispatched)
    rows, columns = _tiling(height, window), _tiling(width, window)
    keys, values = (
        torch.cat([_to_windows(x, rows, columns), _pooled(x, rows, columns, pool)], 1) for x in (key, value)
    )
    out = dispatch_attention_fn(_to_windows(query, rows, columns), keys, values, **dispatched)
    return _from_windows(out, len(query), rows, columns)


class _Tiling(NamedTuple):
    """One side of a picture of `size` tokens in `count` windows of `window` tokens."""

    size: int
    count: int
    window: int

    def order(self) -> list[int]:
        """The tokens of all windows, end to end; those where two windows overlap come twice."""
        starts = [min(i * self.window, self.size - self.window) for i in range(self.count)]
        return [start + i for start in starts for i in range(self.window)]

    def back(self) -> list[int]:
        """Where in `order` each token is taken from."""
        overlap = self.count * self.window - self.size
        last = self.size - self.window + overlap
        return [i if i < last else i + overlap for i in range(self.size)]


def _tiling(size: int, window: int) -> _Tiling:
    window = min(window, size)
    return _Tiling(size, -(-size // window), window)


def _select(x: Tensor, dim: int, indices: list[int]) -> Tensor:
    if indices == list(range(x.shape[dim])):
        return x
    return x.index_select(dim, torch.tensor(indices, device=x.device))


def _to_windows(x: Tensor, rows: _Tiling, columns: _Tiling) -> Tensor:
    """(b, n, heads, d) to (b·windows, tokens of a window, heads, d)."""
    x = x.unflatten(1, (rows.size, columns.size))
    x = _select(_select(x, 1, rows.order()), 2, columns.order())
    x = x.unflatten(2, (columns.count, columns.window)).unflatten(1, (rows.count, rows.window))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _from_windows(x: Tensor, batch: int, rows: _Tiling, columns: _Tiling) -> Tensor:
    """The reverse of `_to_windows`."""
    x = x.unflatten(1, (rows.window, columns.window)).unflatten(0, (batch, rows.count, columns.count))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return _select(_select(x, 1, rows.back()), 2, columns.back()).flatten(1, 2)


def _pooled(x: Tensor, rows: _Tiling, columns: _Tiling, pool: int) -> Tensor:
    """(b, n, heads, d) to (b·windows, cells, heads, d): every window is shown the same cells."""
    picture = x.flatten(2).transpose(1, 2).unflatten(2, (rows.size, columns.size))
    cells = F.avg_pool2d(picture, pool, ceil_mode=True, count_include_pad=False)
    cells = cells.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
    return cells.repeat_interleave(rows.count * columns.count, 0)


def full_macs(height: int, width: int, channels: int) -> int:
    """Multiply-accumulates of full attention on one picture: QKᵀ and the weighted sum, no projections."""
    return 2 * (height * width) ** 2 * channels


def gri_macs(height: int, width: int, channels: int, window: int = 8, pool: int = 4) -> int:
    """The same count for GRI attention, overlapping windows at the edge included."""
    if window >= max(height, width):
        return full_macs(height, width, channels)
    rows, columns = _tiling(height, window), _tiling(width, window)
    queries = rows.count * rows.window * columns.count * columns.window
    cells = -(-height // pool) * -(-width // pool)
    return 2 * queries * (rows.window * columns.window + cells) * channels
