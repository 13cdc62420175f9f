"""GRI attention of A-SDM (arXiv:2312.15516), as rebuilt here: a window and a pooled view of the rest, in one softmax.

The paper's code and its attention's exact form are not public; this form is ours. Every query attends to the tokens
of its own window and to all tokens averaged over `pool` × `pool` cells. There are no new weights, so any trained
model can have it put on and taken off; how much it loses without training is for a benchmark to say.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn import functional as F


class GRIGrid(NamedTuple):
    """What one call of a processor works with: the picture's size in tokens, the window's side, the cell's side."""

    height: int | None
    width: int | None
    window: int
    pool: int


class GRIAttnProcessor:
    """Self-attention processor without parameters; `apply_gri_attention` puts it on a whole UNet.

    Keys and values are pooled after their projections (and after `norm_k`, if there is one). Averaging commutes with
    an affine layer, so for to_k and to_v, and a LoRA on them, pooling before would be the same.

    It calls diffusers' attention dispatch with its own `_attention_backend`, which `unet.set_attention_backend` sets.

    Args:
        window: side of a window in tokens.
        pool: side of a pooled cell in tokens.
        height, width: size in tokens of the pictures it will see; None to be told by each call, as under
            `apply_gri_attention`. A processor that is set by hand without them takes the picture for a square.

    Raises:
        ValueError: a size that is no whole number of 1 or more, or height without width. In a call: tokens that
            don't fill the picture, cross-attention, an attention mask, context parallelism.
    """

    # diffusers sets these two on the processors that have them.
    _attention_backend = None
    _parallel_config = None

    def __init__(
        self, window: int = 8, pool: int = 4, height: int | None = None, width: int | None = None
    ) -> None:
        if (height is None) != (width is None):
            raise ValueError(f"Give both height and width or neither, got {height} and {width}.")
        for name, size in {"window": window, "pool": pool, "height": height, "width": width}.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be a whole number of 1 or more, got {size!r}.")
        self.window, self.pool, self.height, self.width = window, pool, height, width

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        gri_grid: GRIGrid | None = None,
    ) -> Tensor:
        """As `AttnProcessor2_0`, of (b, tokens, channels) or (b, channels, height, width).

        Args:
            gri_grid: goes before the processor's own settings.
        """
        self._refuse(encoder_hidden_states, attention_mask)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if residual.ndim == 4:
            gri_grid = GRIGrid(residual.shape[2], residual.shape[3], self.window, self.pool)
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        height, width, window, pool = self._grid(hidden_states.shape[1], gri_grid)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        # Typed as optional: attention with added keys alone has no to_k and to_v, and is refused where it is set up.
        projections: list[Any] = [attn.to_q, attn.to_k, attn.to_v]
        query, key, value = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in projections)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        out = gri_attention(
            query, key, value, height, width, window, pool, scale=attn.scale, backend=self._attention_backend
        )
        out = out.flatten(2).to(query.dtype)
        for layer in attn.to_out:  # type: ignore[union-attr]
            out = layer(out)
        if residual.ndim == 4:
            out = out.transpose(1, 2).reshape(residual.shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _refuse(self, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None) -> None:
        if encoder_hidden_states is not None:
            raise ValueError(
                "GRI attention is self-attention on a picture: it takes no encoder_hidden_states."
            )
        if attention_mask is not None:
            raise ValueError(
                "GRI attention takes no attention_mask: pass none to the UNet, or call remove_gri_attention."
            )
        if self._parallel_config is not None:
            raise ValueError(
                "GRI attention needs all tokens of a picture on one device: no context parallelism."
            )

    def _grid(self, tokens: int, given: GRIGrid | None) -> tuple[int, int, int, int]:
        height, width, window, pool = given or (self.height, self.width, self.window, self.pool)
        if height is None or width is None:
            height = width = isqrt(tokens)
            if height * width != tokens:
                raise ValueError(
                    f"{tokens} tokens are no square picture: give GRIAttnProcessor height and width, or use"
                    " apply_gri_attention, which tells it the size of every call."
                )
        if height * width != tokens:
            raise ValueError(
                f"GRIAttnProcessor was made for {height} × {width} tokens, and was given {tokens}."
            )
        return height, width, window, pool


# --- on tensors ---


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
