"""GRI attention of A-SDM (arXiv:2312.15516), as rebuilt here: local windows and a pooled global view.

The paper's code and the exact form of its attention are not public; this form is ours. In one softmax, every
query attends to the tokens of its own window and to the rest of the image averaged over `pool` × `pool` cells.
A cell of n tokens counts n times: log n is added to its logit. Every token is thus represented exactly once,
and the result approximates full attention. There are no new weights, so it can be added to any trained model.
The loss of quality without training has to be measured for each model.

In the joint attention of transformers, image and text are one sequence. There, image tokens attend to all text tokens
too, in the same softmax, and text tokens attend to everything, as in CLEAR (arXiv:2412.16112), whose pooled keys are
learned.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from math import log
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

# Each window has a copy of all cells and text tokens among its keys. Windows are computed in groups whose keys have at
# most this many elements, 256 MiB in float32. At 128 × 128 tokens and Flux's width, all at once would be 26 times the
# keys of full attention.
_MOST = 2**26

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
    text: tuple[Tensor, Tensor] | None = None,
    text_mask: Tensor | None = None,
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

    Without a `text_mask` no mask is needed, which flash kernels would not support: log n_c is the product of one more
    dimension of queries (1) and keys (log n_c / s). Queries, keys and values are padded to the next multiple of 8.

    Args:
        query, key, value: (b, height·width, heads, d), in row-major order.
        height, width: size of the image in tokens.
        window: side of a window in tokens, 1 or more; limited to each side of the image.
        pool: side of a pooled cell in tokens, 1 or more.
        text: more keys and values, (b, m, heads, d), that all queries attend to as they are.
        text_mask: (b, m), True for the text tokens that count; default: all.
        scale: factor s of the logits; default: 1/√d.
        backend: attention backend of diffusers; default: the active one.

    Returns:
        (b, height·width, heads, d).
    """
    key_text, value_text = text or (key[:, :0], value[:, :0])
    if _is_full(height, width, window, pool):
        mask = _key_mask(text_mask, query.shape[1])
        key, value = (torch.cat(pair, 1) for pair in ((key_text, key), (value_text, value)))
        return dispatch_attention_fn(query, key, value, attn_mask=mask, scale=scale, backend=backend)
    rows, columns = _Side(height, min(window, height)), _Side(width, min(window, width))
    batch, _, heads, dim = query.shape
    factor: float = dim**-0.5 if scale is None else scale
    # 1 in the dimension of the biases and 0 in those that only pad.
    one = (torch.arange(padded_width(dim) - dim, device=query.device) == 0).to(query.dtype)
    queries, own_keys, own_values = (_windows(x, rows, columns) for x in (query, key, value))
    queries = torch.cat([queries, one.expand(*queries.shape[:-1], -1)], -1)
    shared_keys = torch.cat([_cells(key, rows, columns, pool), key_text], 1)
    shared_values = torch.cat([_cells(value, rows, columns, pool), value_text], 1)
    bias = _bias(rows, columns, pool, query) / factor
    mask = _key_mask(text_mask, rows.window * columns.window + bias.shape[1], image_first=True)
    windows, tokens = queries.shape[1:3]
    each = batch * (tokens + shared_keys.shape[1]) * heads * padded_width(dim)
    out = []
    step = max(1, _MOST // each)
    for part in (slice(start, start + step) for start in range(0, windows, step)):
        keys, values = (
            _keys(own[:, part], shared)
            for own, shared in ((own_keys, shared_keys), (own_values, shared_values))
        )
        keys[:, :, tokens : tokens + bias.shape[1], :, dim] = bias[part, :, None]
        found = dispatch_attention_fn(
            queries[:, part].flatten(0, 1),
            keys.flatten(0, 1),
            values.flatten(0, 1),
            attn_mask=None if mask is None else mask.repeat_interleave(keys.shape[1], 0),
            scale=factor,
            backend=backend,
        )
        out.append(found[..., :dim].unflatten(0, (batch, -1)))
    return _from_windows(out[0] if len(out) == 1 else torch.cat(out, 1), rows, columns)


def joint_gri_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    height: int,
    width: int,
    window: int,
    pool: int,
    *,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    backend: Any = None,
) -> Tensor:
    """Approximates the full attention of text and image tokens in one sequence.

    Image queries attend to all text keys and, by `gri_attention`, to the image. Text queries attend to all keys. The
    number m of text tokens is what the image leaves of the sequence; it may be 0.

    Args:
        query, key, value: (b, m + height·width, heads, d), the text first and the image in row-major order.
        height, width, window, pool, scale, backend: see `gri_attention`.
        text_mask: (b, m), True for the text tokens that count as keys; default: all.

    Returns:
        (b, m + height·width, heads, d), in the same order.

    Raises:
        ValueError: there are fewer tokens than the image has.
    """
    text = query.shape[1] - height * width
    if text < 0:
        raise ValueError(
            f"GRI attention expected the {height} × {width} tokens of an image and more of its text, got"
            f" {query.shape[1]} in all."
        )
    full: Any = {"attn_mask": _key_mask(text_mask, height * width), "scale": scale, "backend": backend}
    if _is_full(height, width, window, pool):
        return dispatch_attention_fn(query, key, value, **full)
    image = gri_attention(
        query[:, text:],
        key[:, text:],
        value[:, text:],
        height,
        width,
        window,
        pool,
        text=(key[:, :text], value[:, :text]),
        text_mask=text_mask,
        scale=scale,
        backend=backend,
    )
    if text == 0:
        return image
    return torch.cat([dispatch_attention_fn(query[:, :text], key, value, **full), image], 1)


def _is_full(height: int, width: int, window: int, pool: int) -> bool:
    """Whether windows or cells leave nothing to approximate."""
    return window >= max(height, width) or pool == 1


def _key_mask(text_mask: Tensor | None, others: int, image_first: bool = False) -> Tensor | None:
    """(b, 1, 1, m + others): `text_mask` for the text, True for all other keys."""
    if text_mask is None:
        return None
    parts = [text_mask.bool(), text_mask.new_ones(len(text_mask), others, dtype=torch.bool)]
    return torch.cat(parts[::-1] if image_first else parts, 1)[:, None, None]


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


def _cells(x: Tensor, rows: _Side, columns: _Side, pool: int) -> Tensor:
    """(b, n, heads, d) to (b, cells, heads, d)."""
    image = x.unflatten(1, (rows.size, columns.size))
    return _means(_means(image, 1, rows.cells(pool)), 2, columns.cells(pool)).flatten(1, 2)


def _keys(own: Tensor, shared: Tensor) -> Tensor:
    """Keys or values of some windows: their tokens, then what all windows share.

    Args:
        own: (b, windows, tokens, heads, d).
        shared: (b, m, heads, d).

    Returns:
        (b, windows, tokens + m, heads, padded d), zero in the padding.
    """
    batch, windows, tokens, heads, dim = own.shape
    # Filled in place, as concatenating windows, cells and padding would copy most of it twice.
    out = own.new_zeros(batch, windows, tokens + shared.shape[1], heads, padded_width(dim))
    out[:, :, :tokens, :, :dim] = own
    out[:, :, tokens:, :, :dim] = shared[:, None]
    return out


def _windows(x: Tensor, rows: _Side, columns: _Side) -> Tensor:
    """(b, n, heads, d) to (b, windows, tokens of a window, heads, d)."""
    x = x.unflatten(1, (rows.size, columns.size))
    for dim, side in ((1, rows), (2, columns)):
        if side.size % side.window:
            last = x.narrow(dim, side.size - side.window, side.window)
            x = torch.cat([x.narrow(dim, 0, side.before_last), last], dim)
    x = x.unflatten(2, (columns.count, columns.window)).unflatten(1, (rows.count, rows.window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _from_windows(x: Tensor, rows: _Side, columns: _Side) -> Tensor:
    """(b, windows, tokens of a window, heads, d) to (b, n, heads, d), each token from one window."""
    x = x.unflatten(2, (rows.window, columns.window)).unflatten(1, (rows.count, columns.count))
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


def full_macs(height: int, width: int, channels: int, text: int = 0) -> int:
    """Multiply-accumulates of full attention for one image and `text` tokens: QKᵀ and the weighted sum, without projections."""
    return 2 * (height * width + text) ** 2 * channels


def gri_macs(
    height: int, width: int, heads: int, dim: int, window: int = 8, pool: int = 4, text: int = 0
) -> int:
    """The same count for GRI attention with `heads` heads of width `dim`, with all that is computed.

    That includes windows that overlap at the edge, the cells of the own window, and the padded dimensions.
    """
    if _is_full(height, width, window, pool):
        return full_macs(height, width, heads * dim, text)
    rows, columns = _Side(height, min(window, height)), _Side(width, min(window, width))
    tokens = rows.window * columns.window
    cells = [sum(number for _, number in side.cells(pool)) for side in (rows, columns)]
    windows = rows.count * columns.count
    image = 2 * windows * tokens * (tokens + cells[0] * cells[1] + text) * heads * padded_width(dim)
    return image + 2 * text * (text + height * width) * heads * dim
