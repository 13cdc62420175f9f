"""GRI attention against a loop over queries: the function, its cost, the processor."""

from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_ext.asdm import gri_attention as module
from diffusers_ext.asdm.gri_attention import GRIAttnProcessor, full_macs, gri_attention, gri_macs

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


def by_hand(q: Tensor, k: Tensor, v: Tensor, height: int, width: int, window: int, pool: int) -> Tensor:
    """One query at a time."""
    if window >= height and window >= width:
        return full(q, k, v)
    rows, columns = range(0, height, pool), range(0, width, pool)

    def cells(x: Tensor) -> Tensor:
        x = x.unflatten(1, (height, width))
        means = [x[:, r : r + pool, c : c + pool].flatten(1, 2).mean(1) for r in rows for c in columns]
        return torch.stack(means, 1)

    def own(x: Tensor, row: int, column: int) -> Tensor:
        top, left = start_of_window(row, height, window), start_of_window(column, width, window)
        return x.unflatten(1, (height, width))[:, top : top + window, left : left + window].flatten(1, 2)

    out = []
    for i in range(height * width):
        keys, values = (torch.cat([own(x, i // width, i % width), cells(x)], 1) for x in (k, v))
        out.append(full(q[:, i : i + 1], keys, values))
    return torch.cat(out, 1)


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


def test_far_tokens_are_seen_through_their_cells_alone() -> None:
    q, k, v = qkv(8, 8, batch=1)
    before = gri_attention(q, k, v, 8, 8, window=4, pool=2)
    swapped = v.clone()
    # Tokens (7, 6) and (7, 7) are in one cell: trading places changes their own window's sums only by their
    # keys.
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


def test_gradients_reach_all_tokens_and_agree_with_finite_differences() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(3, 5, batch=1))
    assert torch.autograd.gradcheck(lambda *x: gri_attention(*x, 3, 5, 2, 2), (q, k, v))


# What it costs


def test_macs_of_stable_diffusion() -> None:
    # 4096 queries, 64 + 256 keys, 320 channels, QKᵀ and the weighted sum.
    assert gri_macs(64, 64, 320) == 2 * 4096 * 320 * 320
    assert full_macs(64, 64, 320) == 2 * 4096**2 * 320
    assert gri_macs(8, 6, 320) == full_macs(8, 6, 320)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 6), st.integers(1, 5))
def test_macs_are_those_of_the_dispatched_attention(height: int, width: int, window: int, pool: int) -> None:
    seen = []

    def spy(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        seen.append(2 * len(query) * query.shape[1] * key.shape[1] * query.shape[2:].numel())
        return query

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dispatch_attention_fn", spy)
        gri_attention(*qkv(height, width, batch=1), height, width, window, pool)
    assert seen == [gri_macs(height, width, 6, window, pool)]


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
