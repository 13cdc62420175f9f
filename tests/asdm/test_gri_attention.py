"""GRI attention against a loop over queries, and on and off whole UNets."""

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.asdm import gri_windows
from diffusers_ext.asdm.gri_attention import (
    GRIAttnProcessor,
    apply_gri_attention,
    full_macs,
    gri_attention,
    gri_attention_of,
    gri_macs,
    remove_gri_attention,
)
from tests import tiny

# Sums of at most a few hundred terms of order 1 in another order: float64 and float32 rounding.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
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


def predict(unet: Any, height: int = 8, width: int = 8, batch: int = 2) -> Tensor:
    with torch.no_grad():
        return unet(*call(unet, height, width, batch)).sample


def call(unet: Any, height: int = 8, width: int = 8, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    noisy = draw(batch, 4, height, width, dtype=unet.dtype)
    prompt = draw(batch, 5, unet.config.cross_attention_dim, seed=1, dtype=unet.dtype)
    return noisy, torch.tensor([10, 500, 700, 900])[:batch], prompt


@pytest.fixture
def unet() -> Any:
    return tiny.build("sd").unet


@pytest.fixture
def restored_backend() -> Any:
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


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
    # Tokens (7, 6) and (7, 7) are in one cell: trading places changes their own window's sums only by their keys.
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
        patch.setattr(gri_windows, "dispatch_attention_fn", spy)
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
    with pytest.raises(ValueError, match=r"35 tokens are no square picture.*height and width"):
        attention(GRIAttnProcessor(4, 2))(x[:, :35])
    with pytest.raises(ValueError, match=r"made for 6 × 5 tokens, and was given 36"):
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
    with pytest.raises(ValueError, match="no context parallelism"):
        gri(x)


# On a UNet


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_on_and_off_leaves_no_trace(name: str) -> None:
    pipe = tiny.build(name)
    before, pictures = dict(pipe.unet.attn_processors), tiny.images(pipe, name, steps=2)
    attributes = {path: set(module.__dict__) for path, module in pipe.unet.named_modules()}
    assert gri_attention_of(pipe) is None
    assert dx.apply_gri_attention(pipe, window=4, pool=2) is pipe
    paths = [DOWN, *(f"up_blocks.1.attentions.{i}.transformer_blocks.0.attn1" for i in range(2))]
    assert gri_attention_of(pipe) == gri_attention_of(pipe.unet) == (paths, 4, 2)
    assert not torch.equal(tiny.images(pipe, name, steps=2), pictures)
    assert dx.remove_gri_attention(pipe) is pipe
    assert gri_attention_of(pipe) is None
    assert torch.equal(tiny.images(pipe, name, steps=2), pictures)
    assert all(processor is before[path] for path, processor in pipe.unet.attn_processors.items())
    for path, module in pipe.unet.named_modules():
        assert set(module.__dict__) == attributes[path]
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs
    remove_gri_attention(pipe)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10), (10, 6), (4, 16)])
def test_a_covering_window_is_the_unet_itself_at_any_size(unet: Any, height: int, width: int) -> None:
    expected = predict(unet, height, width)
    apply_gri_attention(unet, window=16)
    torch.testing.assert_close(predict(unet, height, width), expected, **ROUNDING)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10), (10, 6), (4, 16)])
def test_the_grid_is_the_picture_of_the_call(unet: Any, height: int, width: int) -> None:
    apply_gri_attention(unet, [DOWN], window=4, pool=2)
    seen: list[Any] = []
    attn = unet.get_submodule(DOWN)
    attn.register_forward_hook(lambda module, args, kwargs, out: seen.append((args, out)), with_kwargs=True)
    predict(unet, height, width)
    (x,), out = seen[0]
    alone = copy.deepcopy(attn)
    alone.set_processor(GRIAttnProcessor(4, 2, height, width))
    alone._forward_hooks.clear()
    with torch.no_grad():
        assert torch.equal(alone(x), out)


def test_other_attentions_hear_nothing_of_the_grid(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(processors.logger, "warning", warned.append)
    apply_gri_attention(unet, window=4, pool=2)
    predict(unet)
    assert not warned


def test_positional_and_missing_cross_attention_kwargs(unet: Any) -> None:
    apply_gri_attention(unet, window=4, pool=2)
    transformer = unet.get_submodule("down_blocks.0.attentions.0")
    x, prompt = draw(1, 8, 6, 10, dtype=torch.float32), draw(1, 5, 16, dtype=torch.float32)
    mine: dict[str, Any] = {}
    with torch.no_grad():
        by_place = transformer(x, prompt, None, None, None, mine).sample
        by_name = transformer(hidden_states=x, encoder_hidden_states=prompt).sample
    assert torch.equal(by_place, by_name)
    assert mine == {}


def test_gradient_checkpointing_repeats_each_call_with_its_own_size(unet: Any) -> None:
    apply_gri_attention(unet, window=4, pool=2)

    def gradients() -> list[Tensor]:
        unet.zero_grad()
        # The same number of tokens in two shapes, both alive until the backward pass.
        sum(unet(*call(unet, *size)).sample.square().mean() for size in ((4, 16), (16, 4))).backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    plain = gradients()
    unet.train().enable_gradient_checkpointing()
    repeated = gradients()
    assert len(plain) == len(repeated) > 0
    for a, b in zip(plain, repeated):
        torch.testing.assert_close(a, b, **ROUNDING)


@pytest.mark.slow
def test_it_compiles_to_one_graph(unet: Any) -> None:
    apply_gri_attention(unet, window=4, pool=2)
    compiled: Any = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        for height, width in ((8, 8), (6, 10)):
            noisy, times, prompt = call(unet, height, width)
            assert torch.equal(compiled(noisy, times, prompt).sample, predict(unet, height, width))


def test_a_batch_is_its_rows(unet: Any) -> None:
    apply_gri_attention(unet, window=4, pool=2)
    noisy, times, prompt = call(unet, 6, 10)
    with torch.no_grad():
        together = unet(noisy, times, prompt).sample
        alone = [unet(noisy[i : i + 1], times[i : i + 1], prompt[i : i + 1]).sample for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), **ROUNDING)
    assert torch.equal(predict(unet, 6, 10), together)


def test_two_unets_and_a_copy_are_apart(unet: Any) -> None:
    other = tiny.build("sd").unet
    plain = predict(unet)
    apply_gri_attention(unet, window=4, pool=2)
    assert gri_attention_of(other) is None
    assert torch.equal(predict(other), plain)
    copied = copy.deepcopy(unet)
    with_gri = predict(unet)
    assert torch.equal(predict(copied), with_gri)
    remove_gri_attention(copied)
    assert torch.equal(predict(copied), plain)
    assert torch.equal(predict(unet), with_gri)
    remove_gri_attention(unet)
    assert torch.equal(predict(unet), plain)


def test_paths_choose(unet: Any) -> None:
    every = [name for name, module in unet.named_modules() if name.endswith("attn1")]
    assert len(every) == 4
    for paths, expected in [
        ([DOWN], [DOWN]),
        (["down_blocks"], [DOWN]),
        (["mid_block", "down_blocks.0"], [DOWN, every[-1]]),
        (["up_blocks.1.attentions.1", "up_blocks.1.attentions"], every[1:3]),
    ]:
        apply_gri_attention(unet, paths, window=4, pool=2)
        found = gri_attention_of(unet)
        assert found is not None
        assert sorted(found[0]) == sorted(expected)
        predict(unet)
        remove_gri_attention(unet)


def test_the_default_is_the_highest_resolution_that_has_attention() -> None:
    unet = tiny.unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    apply_gri_attention(unet, window=2, pool=2)
    found = gri_attention_of(unet)
    assert found is not None
    assert {path.split(".attentions")[0] for path in found[0]} == {"down_blocks.1", "up_blocks.0"}
    predict(unet)


def test_what_apply_refuses(unet: Any) -> None:
    with pytest.raises(
        ValueError, match=r"UNet2DConditionModel, or a pipeline whose \.unet is one, got FluxPipeline"
    ):
        apply_gri_attention(tiny.build("flux"))
    with pytest.raises(ValueError, match="got DDPMPipeline"):
        remove_gri_attention(tiny.build("ddpm"))
    assert gri_attention_of(tiny.build("flux")) is None
    with pytest.raises(
        ValueError, match=r"no attn1 at or under 'down_blocks\.00'\. The UNet has: down_blocks\.0\."
    ):
        apply_gri_attention(unet, ["down_blocks.00"])
    with pytest.raises(ValueError, match="sequence of one or more module names, got 'mid_block'"):
        apply_gri_attention(unet, "mid_block")
    with pytest.raises(ValueError, match="window must be"):
        apply_gri_attention(unet, window=0)
    plain = tiny.unet(
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2D",
    )
    with pytest.raises(ValueError, match="has no attn1 in its down and up blocks"):
        apply_gri_attention(plain)
    with pytest.raises(ValueError, match="cross-attention"):
        apply_gri_attention(tiny.unet(only_cross_attention=True))
    apply_gri_attention(unet)
    with pytest.raises(ValueError, match="on this UNet already: call remove_gri_attention"):
        apply_gri_attention(unet, ["mid_block"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: processors.CustomDiffusionAttnProcessor2_0(train_kv=False, hidden_size=8),
        lambda: processors.SlicedAttnProcessor(1),
        lambda: type("MyProcessor", (AttnProcessor2_0,), {})(),
    ],
)
def test_other_processors_are_never_dropped(unet: Any, make: Any) -> None:
    other = make()
    unet.get_submodule(DOWN).set_processor(other)
    with pytest.raises(
        ValueError, match=rf"{DOWN} has a {type(other).__name__}, which GRI attention would drop"
    ):
        apply_gri_attention(unet)
    assert gri_attention_of(unet) is None
    assert unet.get_submodule(DOWN).processor is other


def test_fused_projections(unet: Any) -> None:
    plain = predict(unet)
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"FusedAttnProcessor2_0.*unfuse_qkv_projections\(\) first"):
        apply_gri_attention(unet)
    unet.unfuse_qkv_projections()
    apply_gri_attention(unet, window=4, pool=2)
    with_gri = predict(unet)
    unet.fuse_qkv_projections()
    with pytest.raises(
        ValueError, match=r"GRI attention was put on .* but FusedAttnProcessor2_0 stands there now"
    ):
        predict(unet)
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\) first"):
        remove_gri_attention(unet)
    unet.unfuse_qkv_projections()
    assert torch.equal(predict(unet), with_gri)
    remove_gri_attention(unet)
    assert torch.equal(predict(unet), plain)


def test_a_processor_set_since_is_left_where_it_is(unet: Any) -> None:
    plain = predict(unet)
    apply_gri_attention(unet, window=4, pool=2)
    mine = AttnProcessor2_0()
    unet.get_submodule(DOWN).set_processor(mine)
    with pytest.raises(ValueError, match="AttnProcessor2_0 stands there now"):
        predict(unet)
    remove_gri_attention(unet)
    assert unet.get_submodule(DOWN).processor is mine
    assert torch.equal(predict(unet), plain)


# Backends


def test_it_follows_the_backend(unet: Any, monkeypatch: pytest.MonkeyPatch, restored_backend: None) -> None:
    apply_gri_attention(unet, window=4, pool=2)
    asked: list[Any] = []
    real = gri_windows.dispatch_attention_fn

    def spy(*tensors: Tensor, backend: Any, **rest: Any) -> Tensor:
        asked.append(backend)
        return real(*tensors, backend=backend, **rest)

    monkeypatch.setattr(gri_windows, "dispatch_attention_fn", spy)
    default = predict(unet)
    assert asked == [None] * 3
    for name in ("native", "_native_math"):
        asked.clear()
        unet.set_attention_backend(name)
        # Two algorithms for the same sums.
        torch.testing.assert_close(predict(unet), default, **ROUNDING)
        assert asked == [AttentionBackendName(name)] * 3
    asked.clear()
    unet.reset_attention_backend()
    predict(unet)
    assert asked == [None] * 3


def test_the_backend_context_reaches_it(unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_gri_attention(unet, window=4, pool=2)
    ran: list[bool] = []
    math = AttentionBackendName._NATIVE_MATH
    real = _AttentionBackendRegistry._backends[math]

    def spy(**arguments: Any) -> Tensor:
        ran.append(arguments["attn_mask"] is None)
        return real(**arguments)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, math, spy)
    with diffusers.attention_backend("_native_math"):
        predict(unet, 6, 10)
    # Flash kernels take no mask, so none is needed at sizes that windows don't divide either.
    assert ran == [True] * 3


def test_xformers_processors_hand_their_backend_on(unet: Any) -> None:
    before = processors.XFormersAttnProcessor()
    unet.get_submodule(DOWN).set_processor(before)
    apply_gri_attention(unet)
    backends = [unet.get_submodule(path).processor._attention_backend for path in gri_attention_of(unet)[0]]  # type: ignore[index]
    assert backends == [AttentionBackendName.XFORMERS, None, None]
    remove_gri_attention(unet)
    assert unet.get_submodule(DOWN).processor is before


# With other plug-ins


@pytest.mark.parametrize("name", ["sd", "sdxl"])
@pytest.mark.parametrize("lora_first", [True, False])
def test_with_a_lora(name: str, lora_first: bool) -> None:
    pytest.importorskip("peft")
    pipe = tiny.build(name)
    plain = tiny.images(pipe, name, steps=2)
    gri_alone = tiny.images(apply_gri_attention(pipe, window=4, pool=2), name, steps=2)
    if lora_first:
        remove_gri_attention(pipe)
    pipe.load_lora_weights(tiny.lora(name))
    if lora_first:
        apply_gri_attention(pipe, window=4, pool=2)
    both = tiny.images(pipe, name, steps=2)
    assert not torch.allclose(both, gri_alone, atol=1e-4)
    # The LoRA's sum on every projection against the same sum in its weights.
    pipe.fuse_lora()
    torch.testing.assert_close(tiny.images(pipe, name, steps=2), both, rtol=0, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    # Unfusing subtracts what was added, in float32.
    torch.testing.assert_close(tiny.images(pipe, name, steps=2), gri_alone, rtol=0, atol=1e-3)
    remove_gri_attention(pipe)
    torch.testing.assert_close(tiny.images(pipe, name, steps=2), plain, rtol=0, atol=1e-3)


def ip_adapter(unet: Any) -> dict[str, Any]:
    """A random IP-Adapter of four image tokens, in the released layout."""
    projections = {}
    cross = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    for i, attn in enumerate(cross):
        for kind, seed in (("k", 2 * i), ("v", 2 * i + 1)):
            weight = draw(attn.to_q.out_features, 16, seed=seed, dtype=torch.float32)
            projections[f"{2 * i + 1}.to_{kind}_ip.weight"] = weight
    image = {
        "proj.weight": draw(4 * 16, 6, dtype=torch.float32),
        "proj.bias": torch.zeros(64),
        "norm.weight": torch.ones(16),
        "norm.bias": torch.zeros(16),
    }
    return {"image_proj": image, "ip_adapter": projections}


@pytest.mark.parametrize("adapter_first", [True, False])
def test_with_an_ip_adapter(unet: Any, adapter_first: bool) -> None:
    def predicted() -> Tensor:
        image = [draw(2, 1, 6, seed=5, dtype=torch.float32)]
        with torch.no_grad():
            return unet(*call(unet, 6, 10), added_cond_kwargs={"image_embeds": image}).sample

    if not adapter_first:
        apply_gri_attention(unet, window=4, pool=2)
    unet._load_ip_adapter_weights([ip_adapter(unet)])
    if adapter_first:
        alone = predicted()
        apply_gri_attention(unet, window=4, pool=2)
        assert not torch.allclose(predicted(), alone, atol=1e-4)
    both = predicted()
    # Loading makes new processors of the same class; the window must be the one that was asked for.
    remove_gri_attention(unet)
    alone = predicted()
    assert not torch.allclose(both, alone, atol=1e-4)
    apply_gri_attention(unet, window=4, pool=2)
    assert torch.equal(predicted(), both)
    remove_gri_attention(unet)
    assert torch.equal(predicted(), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    pipe = tiny.build("sd", dtype=dtype)
    plain = tiny.images(pipe, "sd", steps=2)
    assert torch.isfinite(tiny.images(apply_gri_attention(pipe, window=4, pool=2), "sd", steps=2)).all()
    assert torch.equal(tiny.images(remove_gri_attention(pipe), "sd", steps=2), plain)
