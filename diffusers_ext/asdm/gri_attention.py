"""GRI attention of A-SDM (arXiv:2312.15516), as rebuilt here: local windows and a pooled global view.

The paper's code and the exact form of its attention are not public; this form is ours. In one softmax, every
query attends to the tokens of its own window and to the rest of the image averaged over `pool` × `pool` cells.
A cell of n tokens counts n times: log n is added to its logit. Every token is thus represented exactly once,
and the result approximates full attention. There are no new weights, so it can be added to any trained model.
The loss of quality without training has to be measured for each model.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from math import isqrt, log
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import Tensor


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

# The bias of the cells in a query's own window. The logit of a cell is the mean of its tokens' logits, so its
# exponential is at most the mean of theirs, which are in the same softmax: e^-40 leaves such a cell less than
# 5e-18 of the weight of its tokens, whatever the inputs. A larger bias would be coarse in half precision.
_LEFT_OUT = -40.0


def gri_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    height: int,
    width: int,
    window: int,
    pool: int,
    *,
    scale: float | None = None,
    backend: Any = None,
) -> Tensor:
    """Approximates full attention by the window of each query and the pooled rest of the image.

    The keys of a query are the k_j of its window W and the means k_c of the cells c outside of it. A cell of
    n_c tokens counts n_c times:

        out = (Σ_{j∈W} e^{s q·k_j} v_j + Σ_{c∉W} n_c e^{s q·k_c} v_c) / (the same sum without values)

    Every token is in exactly one of the terms, so equal logits give equal weights to all tokens, and a `pool`
    of 1 or one window over the whole image gives full attention.

    Windows tile the image from the top left. If they do not divide it, the last window of a row or column is
    shifted back inside and overlaps its neighbor; it provides only the outputs that no other window has.
    Every query thus has a full window. Cells do not cross the edges of windows: where `pool` does not divide
    the parts between the edges, the last cell of a part is smaller. A `pool` above `window` has the cells of
    `pool = window`.

    No mask is needed, which flash kernels would not support: log n_c is the product of one more dimension of
    queries (1) and keys (log n_c / s). Queries, keys and values are padded to the next multiple of 8.

    Args:
        query, key, value: (b, height·width, heads, d), in row-major order.
        height, width: size of the image in tokens.
        window: side of a window in tokens, 1 or more; limited to each side of the image.
        pool: side of a pooled cell in tokens, 1 or more.
        scale: factor s of the logits; default: 1/√d.
        backend: attention backend of diffusers; default: the active one.

    Returns:
        (b, height·width, heads, d).
    """
    if window >= max(height, width) or pool == 1:
        return dispatch_attention_fn(query, key, value, scale=scale, backend=backend)
    rows, columns = _Side(height, min(window, height)), _Side(width, min(window, width))
    dim = query.shape[-1]
    factor: float = dim**-0.5 if scale is None else scale
    # 1 in the dimension of the biases and 0 in those that only pad.
    one = (torch.arange(padded_width(dim) - dim, device=query.device) == 0).to(query.dtype)
    queries = _windows(query, rows, columns)
    queries = torch.cat([queries, one.expand(*queries.shape[:-1], -1)], -1).flatten(3, 4).flatten(0, 2)
    keys, values = (_keys(x, rows, columns, pool) for x in (key, value))
    bias = _bias(rows, columns, pool, query) / factor
    keys[:, :, -bias.shape[1] :, :, dim] = bias[:, :, None]
    out = dispatch_attention_fn(
        queries, keys.flatten(0, 1), values.flatten(0, 1), scale=factor, backend=backend
    )
    return _from_windows(out[..., :dim], len(query), rows, columns)


class _Side(NamedTuple):
    """One side of an image: `size` tokens in windows of `window` tokens, the last of which may overlap."""

    size: int
    window: int

    @property
    def count(self) -> int:
        """The number of windows."""
        return -(-self.size // self.window)

    @property
    def before_last(self) -> int:
        """The number of tokens in all windows but the last one."""
        return (self.count - 1) * self.window

    def cells(self, pool: int) -> list[tuple[int, int]]:
        """(length, number) of the runs of equal cells that tile the side and cross no edge of a window."""
        edges = sorted({*range(0, self.size, self.window), self.size - self.window, self.size})
        lengths: list[int] = []
        for start, end in pairwise(edges):
            whole, rest = divmod(end - start, pool)
            lengths += [pool] * whole + [rest] * (rest > 0)
        return [(length, len(list(run))) for length, run in groupby(lengths)]


def _means(x: Tensor, dim: int, cells: list[tuple[int, int]]) -> Tensor:
    """Averages a dimension over cells, given as in `_Side.cells`."""
    parts = x.split([length * number for length, number in cells], dim)
    means = [part.unflatten(dim, (-1, length)).mean(dim + 1) for part, (length, _) in zip(parts, cells)]
    return means[0] if len(means) == 1 else torch.cat(means, dim)


def _bias(rows: _Side, columns: _Side, pool: int, like: Tensor) -> Tensor:
    """(windows, cells): log of the number of tokens of each cell, `_LEFT_OUT` in the own window.

    In float32, or in float64 like the queries.
    """
    kind: Any = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    logs, inside = [], []
    for side in (rows, columns):
        cells = side.cells(pool)
        # Made on the device: a copy from the CPU in every call would wait for the device.
        logs.append(torch.cat([torch.full((number,), log(length), **kind) for length, number in cells]))
        middle = _means(torch.arange(side.size, **kind), 0, cells)
        start = (torch.arange(side.count, **kind) * side.window).clamp(max=side.size - side.window)[:, None]
        inside.append((middle >= start) & (middle < start + side.window))
    own = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    return torch.where(own, _LEFT_OUT, logs[0][:, None] + logs[1]).flatten(2).flatten(0, 1)


def _keys(x: Tensor, rows: _Side, columns: _Side, pool: int) -> Tensor:
    """Keys or values of every window: its tokens, then all cells of the image.

    Args:
        x: (b, n, heads, d).
        rows, columns: the sides of the image.
        pool: side of a cell.

    Returns:
        (b, windows, tokens per window + cells, heads, padded d), zero in the padding.
    """
    batch, _, heads, dim = x.shape
    image = x.unflatten(1, (rows.size, columns.size))
    cells = _means(_means(image, 1, rows.cells(pool)), 2, columns.cells(pool)).flatten(1, 2)
    windows, tokens = rows.count * columns.count, rows.window * columns.window
    # Filled in place, as concatenating windows, cells and padding would copy most of it twice.
    out = x.new_zeros(batch, windows, tokens + cells.shape[1], heads, padded_width(dim))
    local = out[:, :, :tokens, :, :dim].unflatten(2, (rows.window, columns.window))
    local.unflatten(1, (rows.count, columns.count)).copy_(_windows(x, rows, columns))
    out[:, :, tokens:, :, :dim] = cells[:, None]
    return out


def _windows(x: Tensor, rows: _Side, columns: _Side) -> Tensor:
    """(b, n, heads, d) to (b, rows of windows, windows, rows, columns, heads, d)."""
    x = x.unflatten(1, (rows.size, columns.size))
    for dim, side in ((1, rows), (2, columns)):
        if side.size % side.window:
            last = x.narrow(dim, side.size - side.window, side.window)
            x = torch.cat([x.narrow(dim, 0, side.before_last), last], dim)
    x = x.unflatten(2, (columns.count, columns.window)).unflatten(1, (rows.count, rows.window))
    return x.transpose(2, 3)


def _from_windows(x: Tensor, batch: int, rows: _Side, columns: _Side) -> Tensor:
    """(b·windows, tokens per window, heads, d) to (b, n, heads, d), each token from one window."""
    x = x.unflatten(1, (rows.window, columns.window)).unflatten(0, (batch, rows.count, columns.count))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    for dim, side in ((1, rows), (2, columns)):
        if side.size % side.window:
            rest = side.size - side.before_last
            last = x.narrow(dim, x.shape[dim] - rest, rest)
            x = torch.cat([x.narrow(dim, 0, side.before_last), last], dim)
    return x.flatten(1, 2)


def padded_width(dim: int) -> int:
    """The width of a head with one more dimension, as a multiple of 8."""
    return dim + 8 - dim % 8


def full_macs(height: int, width: int, channels: int) -> int:
    """Multiply-accumulates of full attention for one image: QKᵀ and the weighted sum, without projections."""
    return 2 * (height * width) ** 2 * channels


def gri_macs(height: int, width: int, heads: int, dim: int, window: int = 8, pool: int = 4) -> int:
    """The same count for GRI attention with `heads` heads of width `dim`, with all that is computed.

    That includes windows that overlap at the edge, the cells of the own window, and the padded dimensions.
    """
    if window >= max(height, width) or pool == 1:
        return full_macs(height, width, heads * dim)
    rows, columns = _Side(height, min(window, height)), _Side(width, min(window, width))
    tokens = rows.window * columns.window
    cells = [sum(number for _, number in side.cells(pool)) for side in (rows, columns)]
    windows = rows.count * columns.count
    return 2 * windows * tokens * (tokens + cells[0] * cells[1]) * heads * padded_width(dim)
