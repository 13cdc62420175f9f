"""GRI attention against a loop over queries: the function, its cost, the processor."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_ext.asdm import gri_attention as module
from diffusers_ext.asdm.gri_attention import full_macs, gri_attention, gri_macs
from diffusers_ext.asdm.gri_processors import GRIAttnProcessor

# Sums of at most a few hundred terms of order 1 in another order: float64 and float32 rounding.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
sides = st.integers(1, 9)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(height: int, width: int, batch: int = 2) -> list[Tensor]:
    return [draw(batch, height * width, 2, 3, seed=seed) for seed in range(3)]


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v)


def start_of_window(place: int, size: int, window: int) -> int:
    """Windows from the first token on; the last one is moved back inside."""
    return max(min(place // window * window, size - window), 0)


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, height: int, width: int, window: int, pool: int, text: int = 0
) -> Tensor:
    """One query at a time: its window's tokens, n times the mean of every cell of n tokens outside, and all text tokens.

    The first `text` tokens are text. As queries they attend to every token.
    """
    if window >= height and window >= width:
        return full(q, k, v)
    grid = text + torch.arange(height * width).view(height, width)

    def edges(size: int) -> list[int]:
        starts = {start_of_window(i, size, window) for i in range(size)}
        return sorted(starts | {min(start + window, size) for start in starts})

    def spans(size: int) -> list[tuple[int, int]]:
        """Cells of one side, from every edge of a window on."""
        cut = edges(size)
        return [(i, min(i + pool, end)) for start, end in pairwise(cut) for i in range(start, end, pool)]

    out = list(full(q, k, v)[:, :text].unbind(1))
    for i in range(height * width):
        top, left = start_of_window(i // width, height, window), start_of_window(i % width, width, window)
        groups = [[token] for row in grid[top : top + window, left : left + window].tolist() for token in row]
        own = {token for group in groups for token in group}
        for r, r_end in spans(height):
            for c, c_end in spans(width):
                cell = grid[r:r_end, c:c_end].flatten().tolist()
                assert own.isdisjoint(cell) or own.issuperset(cell)
                groups += [] if own & set(cell) else [cell]
        groups += [[token] for token in range(text)]
        keys, values = (torch.stack([x[:, group].mean(1) for group in groups], 1) for x in (k, v))
        logits = torch.einsum("bhd,bkhd->bhk", q[:, text + i], keys) / q.shape[-1] ** 0.5
        logits = logits + torch.tensor([float(len(group)) for group in groups]).double().log()
        out.append(torch.einsum("bhk,bkhd->bhd", logits.softmax(-1), values))
    return torch.stack(out, 1)


def attention(processor: Any = None, **config: Any) -> Attention:
    torch.manual_seed(0)
    given: dict[str, Any] = {"query_dim": 12, "heads": 2, "dim_head": 6, **config}
    made = Attention(**given).eval()
    if processor is not None:
        made.set_processor(processor)
    return made


# The function


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 6), st.integers(1, 5))
def test_it_is_the_loop_over_queries(height: int, width: int, window: int, pool: int) -> None:
    q, k, v = qkv(height, width)
    found = gri_attention(q, k, v, height, width, window, pool)
    torch.testing.assert_close(found, by_hand(q, k, v, height, width, window, pool), **EXACT)


@settings(max_examples=30, deadline=None)
@given(sides, sides, st.integers(0, 3), st.integers(1, 5))
def test_a_window_over_all_is_full_attention(height: int, width: int, more: int, pool: int) -> None:
    q, k, v = qkv(height, width)
    found = gri_attention(q, k, v, height, width, max(height, width) + more, pool)
    torch.testing.assert_close(found, full(q, k, v), **EXACT)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 6), st.integers(1, 7))
def test_equal_logits_give_every_token_the_same_weight(
    height: int, width: int, window: int, pool: int
) -> None:
    tokens = height * width
    q, k = draw(1, tokens, 1, tokens), torch.zeros(1, tokens, 1, tokens, dtype=torch.float64)
    one_hot = torch.eye(tokens, dtype=torch.float64)[None, :, None]
    weights = gri_attention(q, k, one_hot, height, width, window, pool)[0, :, 0]
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / tokens), **EXACT)


def test_the_own_window_has_its_share_through_the_processor() -> None:
    attn = attention(GRIAttnProcessor(8, 4, 64, 64), query_dim=1, heads=1, dim_head=1)
    for layer, weight in ((attn.to_q, 0.0), (attn.to_k, 0.0), (attn.to_v, 1.0), (attn.to_out[0], 1.0)):
        torch.nn.init.constant_(layer.weight, weight)
    torch.nn.init.zeros_(attn.to_out[0].bias)
    marked = torch.zeros(64, 64)
    marked[24:32, 40:48] = 1
    with torch.no_grad():
        share = attn(marked.view(1, -1, 1)).view(64, 64)
    # 64 of 4096 tokens, for the queries in the marked window and for all others.
    torch.testing.assert_close(share, torch.full_like(share, 64 / 4096), **ROUNDING)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_keys_that_are_constant_in_every_cell_are_exact(
    rows: int, columns: int, cells: int, pool: int
) -> None:
    window = cells * pool
    height, width = rows * window, columns * window
    q, k, v = qkv(height, width)
    coarse = k.unflatten(1, (height, width))[:, ::pool, ::pool]
    k = coarse.repeat_interleave(pool, 1).repeat_interleave(pool, 2).flatten(1, 2)
    torch.testing.assert_close(gri_attention(q, k, v, height, width, window, pool), full(q, k, v), **EXACT)


@settings(max_examples=30, deadline=None)
@given(sides, sides, st.integers(1, 6), st.integers(1, 5))
def test_constant_values_are_exact(height: int, width: int, window: int, pool: int) -> None:
    q, k, v = qkv(height, width)
    v = v[:, :1].expand_as(v)
    torch.testing.assert_close(gri_attention(q, k, v, height, width, window, pool), v, **EXACT)


@settings(max_examples=30, deadline=None)
@given(sides, sides, st.integers(1, 6))
def test_cells_of_one_token_are_full_attention(height: int, width: int, window: int) -> None:
    q, k, v = qkv(height, width)
    torch.testing.assert_close(gri_attention(q, k, v, height, width, window, 1), full(q, k, v), **EXACT)
    # The same by windows and cells, which a pool of 1 does not need.
    rows, columns = (module._Side(size, min(window, size)) for size in (height, width))
    assert sum(length * number for length, number in rows.cells(1)) == height
    bias = module._bias(rows, columns, 1, q)
    assert (bias == 0).sum(1).tolist() == [height * width - rows.window * columns.window] * len(bias)


def test_the_left_out_cells_have_no_weight_whatever_the_logits() -> None:
    q, k, v = qkv(8, 8)
    k = 300 * k
    torch.testing.assert_close(gri_attention(q, k, v, 8, 8, 4, 2), by_hand(q, k, v, 8, 8, 4, 2), **EXACT)


def test_a_scale_is_that_of_the_logits_alone() -> None:
    q, k, v = qkv(6, 10)
    scaled = gri_attention(q, k, v, 6, 10, 4, 2, scale=1.0)
    torch.testing.assert_close(scaled, by_hand(q * 3**0.5, k, v, 6, 10, 4, 2), **EXACT)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "_native_efficient"])
def test_backends(backend: str) -> None:
    tensors = [x.float() for x in qkv(6, 10)]
    try:
        found = gri_attention(*tensors, 6, 10, 4, 2, backend=AttentionBackendName(backend))
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"{backend} does not run here: {str(error).splitlines()[0]}")
    torch.testing.assert_close(found, by_hand(*qkv(6, 10), 6, 10, 4, 2).float(), **ROUNDING)


def test_far_tokens_are_seen_through_their_cells_alone() -> None:
    q, k, v = qkv(8, 8, batch=1)
    before = gri_attention(q, k, v, 8, 8, window=4, pool=2)
    swapped = v.clone()
    # Tokens (7, 6) and (7, 7) are in one cell: only their own window sees that they trade places.
    swapped[:, [62, 63]] = v[:, [63, 62]]
    after = gri_attention(q, k, swapped, 8, 8, window=4, pool=2)
    changed = (after - before).abs().amax((0, 2, 3)).unflatten(0, (8, 8)) > 1e-9
    assert changed[4:, 4:].all()
    assert not changed[:4].any()
    assert not changed[:, :4].any()


def test_rows_do_not_mix() -> None:
    q, k, v = qkv(5, 7, batch=3)
    together = gri_attention(q, k, v, 5, 7, 3, 2)
    alone = torch.cat([gri_attention(*(x[i : i + 1] for x in (q, k, v)), 5, 7, 3, 2) for i in range(3)])
    torch.testing.assert_close(together, alone, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = qkv(6, 10)
    found = gri_attention(*(x.to(dtype) for x in (q, k, v)), 6, 10, 4, 2)
    assert found.dtype == dtype
    # Inputs of order 1 rounded to 8 bits (bfloat16); float16 has 11.
    torch.testing.assert_close(found.double(), by_hand(q, k, v, 6, 10, 4, 2), rtol=0, atol=5e-2)


@pytest.mark.slow
def test_it_compiles_with_its_gradients() -> None:
    tensors = [x.float().requires_grad_() for x in qkv(6, 10)]
    compiled: Any = torch.compile(gri_attention, fullgraph=True)
    found, expected = (of(*tensors, 6, 10, 4, 2) for of in (compiled, gri_attention))
    torch.testing.assert_close(found, expected, **ROUNDING)
    gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in (found, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, **ROUNDING)


def test_gradients_reach_all_tokens_and_agree_with_finite_differences() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(3, 5, batch=1))
    assert torch.autograd.gradcheck(lambda *x: gri_attention(*x, 3, 5, 2, 2), (q, k, v))


# What it costs


def test_macs_of_stable_diffusion() -> None:
    # 4096 queries, 64 + 256 keys, 8 heads of 40 and 8 more dimensions, QKᵀ and the weighted sum.
    assert gri_macs(64, 64, 8, 40) == 2 * 4096 * 320 * 384
    assert full_macs(64, 64, 320) == 2 * 4096**2 * 320
    assert (
        gri_macs(8, 6, 8, 40) == gri_macs(64, 6, 8, 40, window=64) // (64 // 8) ** 2 == full_macs(8, 6, 320)
    )
    assert gri_macs(16, 16, 8, 40, pool=1) == full_macs(16, 16, 320)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 6), st.integers(1, 5), st.integers(0, 4))
def test_macs_are_those_of_the_dispatched_attention(
    height: int, width: int, window: int, pool: int, text: int
) -> None:
    seen = []

    def spy(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        seen.append(2 * len(query) * query.shape[1] * key.shape[1] * query.shape[2:].numel())
        return query

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dispatch_attention_fn", spy)
        tensors = qkv(1, text + height * width, batch=1)
        module.joint_gri_attention(*tensors, height, width, window, pool)
    assert sum(seen) == gri_macs(height, width, 2, 3, window, pool, text)


# The processor


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bias": True},
        {"norm_num_groups": 3},
        {"residual_connection": True, "rescale_output_factor": 1.7},
        {"qk_norm": "layer_norm"},
    ],
)
def test_full_attention_of_every_kind(config: dict[str, Any]) -> None:
    plain, gri = attention(AttnProcessor2_0(), **config), attention(GRIAttnProcessor(window=5), **config)
    x = draw(2, 25, 12, dtype=torch.float32)
    torch.testing.assert_close(gri(x), plain(x), **ROUNDING)
    picture = draw(2, 12, 3, 5, dtype=torch.float32)
    torch.testing.assert_close(gri(picture), plain(picture), **ROUNDING)


def test_unscaled_and_spatially_normed_attention() -> None:
    plain, gri = (attention(p, scale_qk=False) for p in (processors.AttnProcessor(), GRIAttnProcessor(5)))
    x = draw(2, 25, 12, dtype=torch.float32)
    torch.testing.assert_close(gri(x), plain(x), **ROUNDING)
    config = {"query_dim": 32, "spatial_norm_dim": 4}
    plain, gri = (attention(p, **config) for p in (AttnProcessor2_0(), GRIAttnProcessor(5)))
    picture, temb = draw(2, 32, 3, 5, dtype=torch.float32), draw(2, 4, 3, 5, dtype=torch.float32)
    torch.testing.assert_close(gri(picture, temb=temb), plain(picture, temb=temb), **ROUNDING)


def test_the_processor_alone_takes_a_square_or_its_own_size() -> None:
    x = draw(2, 36, 12, dtype=torch.float32)
    square = attention(GRIAttnProcessor(4, 2))(x)
    assert torch.equal(square, attention(GRIAttnProcessor(4, 2, 6, 6))(x))
    assert not torch.allclose(square, attention(GRIAttnProcessor(4, 2, 4, 9))(x), atol=1e-4)
    assert torch.equal(square, attention(GRIAttnProcessor(4, 2))(x))
    with pytest.raises(ValueError, match=r"35 tokens are not a square image.*height and width"):
        attention(GRIAttnProcessor(4, 2))(x[:, :35])
    with pytest.raises(ValueError, match=r"expected 6 × 5 tokens, got 36"):
        attention(GRIAttnProcessor(4, 2, 6, 5))(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be a whole number of 1 or more, got 0"),
        ({"pool": 2.5}, "pool must be a whole number of 1 or more, got 2.5"),
        ({"window": True}, "window must be a whole number of 1 or more, got True"),
        ({"height": 4}, "Give both height and width or neither, got 4 and None"),
        ({"height": 4, "width": -1}, "width must be a whole number of 1 or more, got -1"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRIAttnProcessor(**arguments)


def test_what_the_processor_refuses() -> None:
    gri = attention(GRIAttnProcessor(4, 2))
    x = draw(2, 36, 12, dtype=torch.float32)
    with pytest.raises(ValueError, match="takes no encoder_hidden_states"):
        gri(x, encoder_hidden_states=x)
    with pytest.raises(ValueError, match="takes no attention_mask"):
        gri(x, attention_mask=torch.zeros(2, 1, 36))
    gri.processor._parallel_config = object()
    with pytest.raises(ValueError, match="disable context parallelism"):
        gri(x)
