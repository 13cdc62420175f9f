"""GRI attention of A-SDM (arXiv:2312.15516), as rebuilt here: local windows and a pooled global view.

The paper's code and the exact form of its attention are not public; this form is ours. In one softmax, every
query attends to the tokens of its own window and to all tokens averaged over `pool` × `pool` cells. There are
no new weights, so it can be added to any trained model. The loss of quality without training has to be
measured for each model.
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
    """The settings of one call of a processor, in tokens: image size, side of a window and side of a cell."""

    height: int | None
    width: int | None
    window: int
    pool: int


class GRIAttnProcessor:
    """Self-attention processor without parameters; `apply_gri_attention` adds it to a whole UNet.

    Keys and values are pooled after their projections (and after `norm_k`, if there is one). Averaging
    commutes with affine layers, so pooling before to_k and to_v, with or without a LoRA, would give the same
    result. The processor uses the attention dispatch of diffusers with its own `_attention_backend`, which
    `unet.set_attention_backend` sets.

    Args:
        window: side of a window in tokens.
        pool: side of a pooled cell in tokens.
        height, width: size of the images in tokens. With None, each call passes the size, as
            `apply_gri_attention` does; a processor that is set by hand then assumes square images.

    Raises:
        ValueError: a size is not a whole number of 1 or more, or only one of height and width is given. In a
            call: the tokens do not match the image size, or there is cross-attention, an attention mask or
            context parallelism.
    """

    # diffusers sets these attributes if a processor has them.
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
        """Same as `AttnProcessor2_0`, for (b, tokens, channels) or (b, channels, height, width).

        Args:
            attn: the attention layer.
            hidden_states: the input.
            encoder_hidden_states, attention_mask: must be None.
            temb: time embedding for a spatial norm.
            gri_grid: overrides the settings of the processor.

        Returns:
            The output, in the shape of the input.
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
        # Typed as optional, but never None here: attention with added keys only, which has no to_k and to_v,
        # is rejected when GRI attention is added.
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
                "GRI attention is self-attention on an image: it takes no encoder_hidden_states."
            )
        if attention_mask is not None:
            raise ValueError("GRI attention takes no attention_mask: omit it, or call remove_gri_attention.")
        if self._parallel_config is not None:
            raise ValueError(
                "GRI attention needs all tokens of an image on one device: disable context parallelism."
            )

    def _grid(self, tokens: int, given: GRIGrid | None) -> tuple[int, int, int, int]:
        height, width, window, pool = given or (self.height, self.width, self.window, self.pool)
        if height is None or width is None:
            height = width = isqrt(tokens)
            if height * width != tokens:
                raise ValueError(
                    f"{tokens} tokens are not a square image: give GRIAttnProcessor height and width, or use"
                    " apply_gri_attention, which passes the size of every call."
                )
        if height * width != tokens:
            raise ValueError(f"GRIAttnProcessor expected {height} × {width} tokens, got {tokens}.")
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
    """Joint attention to the window of each query and to the pooled image.

    Windows tile the image from the top left. If they do not divide it, the last window of a row or column is
    shifted back inside and overlaps its neighbor; it provides only the outputs that no other window has.
    Every query thus has a full window, and no mask is needed, which flash kernels would not support. A pooled
    key counts as one key. The cells of a query's own window are included, and cells at the edge average the
    tokens that they have.

    If one window covers the image, this is full attention. The pooled keys are then omitted, since every
    token is present itself.

    Args:
        query, key, value: (b, height·width, heads, d), in row-major order.
        height, width: size of the image in tokens.
        window: side of a window in tokens, 1 or more; limited to each side of the image.
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
    """One side of an image: `size` tokens in `count` windows of `window` tokens."""

    size: int
    count: int
    window: int

    def order(self) -> list[int]:
        """The token indices of all windows in sequence; tokens in two windows appear twice."""
        starts = [min(i * self.window, self.size - self.window) for i in range(self.count)]
        return [start + i for start in starts for i in range(self.window)]

    def back(self) -> list[int]:
        """The position in `order` from which each token's output is taken."""
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
    """(b, n, heads, d) to (b·windows, tokens per window, heads, d)."""
    x = x.unflatten(1, (rows.size, columns.size))
    x = _select(_select(x, 1, rows.order()), 2, columns.order())
    x = x.unflatten(2, (columns.count, columns.window)).unflatten(1, (rows.count, rows.window))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _from_windows(x: Tensor, batch: int, rows: _Tiling, columns: _Tiling) -> Tensor:
    """The inverse of `_to_windows`."""
    x = x.unflatten(1, (rows.window, columns.window)).unflatten(0, (batch, rows.count, columns.count))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return _select(_select(x, 1, rows.back()), 2, columns.back()).flatten(1, 2)


def _pooled(x: Tensor, rows: _Tiling, columns: _Tiling, pool: int) -> Tensor:
    """(b, n, heads, d) to (b·windows, cells, heads, d), with the same cells for every window."""
    image = x.flatten(2).transpose(1, 2).unflatten(2, (rows.size, columns.size))
    cells = F.avg_pool2d(image, pool, ceil_mode=True, count_include_pad=False)
    cells = cells.flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])
    return cells.repeat_interleave(rows.count * columns.count, 0)


def full_macs(height: int, width: int, channels: int) -> int:
    """Multiply-accumulates of full attention for one image: QKᵀ and the weighted sum, without projections."""
    return 2 * (height * width) ** 2 * channels


def gri_macs(height: int, width: int, channels: int, window: int = 8, pool: int = 4) -> int:
    """The same count for GRI attention, including overlapping windows at the edge."""
    if window >= max(height, width):
        return full_macs(height, width, channels)
    rows, columns = _tiling(height, window), _tiling(width, window)
    queries = rows.count * rows.window * columns.count * columns.window
    cells = -(-height // pool) * -(-width // pool)
    return 2 * queries * (rows.window * columns.window + cells) * channels
