"""GRI attention in joint attention: the formula with text, and the networks of Stable Diffusion 3, Flux.1 and Qwen-Image."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import JointAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.asdm import gri_attention as module
from diffusers_ext.asdm import gri_processors
from diffusers_ext.asdm.apply import gri_attention_of
from diffusers_ext.asdm.gri_attention import gri_attention, joint_gri_attention
from diffusers_ext.asdm.gri_processors import GRIJointAttnProcessor, JointProcessor
from tests import families
from tests.asdm.test_gri_attention import EXACT, ROUNDING, by_hand, draw, full, qkv, sides

words = st.integers(0, 4)


@pytest.fixture
def windows_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and cells are computed even where they leave nothing to approximate."""
    monkeypatch.setattr(module, "_is_full", lambda *sizes: False)


# The formula


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 6), st.integers(1, 5), words)
def test_it_is_the_loop_over_queries(height: int, width: int, window: int, pool: int, text: int) -> None:
    tensors = qkv(1, text + height * width)
    found = joint_gri_attention(*tensors, height, width, window, pool)
    torch.testing.assert_close(found, by_hand(*tensors, height, width, window, pool, text), **EXACT)


@settings(max_examples=60, deadline=None)
@given(sides, sides, st.integers(1, 6), st.integers(1, 7), st.lists(st.booleans(), max_size=4))
def test_every_key_counts_once(height: int, width: int, window: int, pool: int, kept: list[bool]) -> None:
    tokens = len(kept) + height * width
    q, k = draw(1, tokens, 1, tokens), torch.zeros(1, tokens, 1, tokens, dtype=torch.float64)
    one_hot = torch.eye(tokens, dtype=torch.float64)[None, :, None]
    mask = torch.tensor([kept], dtype=torch.bool) if kept else None
    weights = joint_gri_attention(q, k, one_hot, height, width, window, pool, text_mask=mask)[0, :, 0]
    seen = torch.tensor([*kept, *[True] * (height * width)], dtype=torch.float64)
    torch.testing.assert_close(weights, (seen / seen.sum()).expand(tokens, tokens), **EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_cells_of_one_token_are_full_attention(windows_always: None, masked: bool) -> None:
    tensors = qkv(1, 4 + 5 * 7)
    mask = torch.tensor([[True, False, True, True], [False, True, False, True]]) if masked else None
    found = joint_gri_attention(*tensors, 5, 7, 3, 1, text_mask=mask)
    if mask is None:
        torch.testing.assert_close(found, full(*tensors), **EXACT)
        return
    for row, kept in enumerate(mask):
        keys = [i for i in range(39) if i >= 4 or kept[i]]
        query, key, value = (x[row : row + 1] for x in tensors)
        torch.testing.assert_close(found[row : row + 1], full(query, key[:, keys], value[:, keys]), **EXACT)


def test_a_mask_is_the_text_without_those_tokens() -> None:
    q, k, v = qkv(1, 5 + 6 * 10)
    kept = [0, 2, 3]
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, kept] = True
    places = [*kept, *range(5, 65)]
    shorter = joint_gri_attention(q[:, places], k[:, places], v[:, places], 6, 10, 4, 2)
    longer = joint_gri_attention(q, k, v, 6, 10, 4, 2, text_mask=mask)
    torch.testing.assert_close(longer[:, places], shorter, **EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_windows_in_groups_are_windows_at_once(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    tensors = qkv(1, 3 + 7 * 9)
    mask = torch.tensor([[True, False, True], [True, True, False]]) if masked else None
    once = joint_gri_attention(*tensors, 7, 9, 2, 2, text_mask=mask)
    calls = []
    real = module.dispatch_attention_fn

    def spy(query: Tensor, *rest: Any, **more: Any) -> Tensor:
        calls.append(len(query))
        return real(query, *rest, **more)

    monkeypatch.setattr(module, "dispatch_attention_fn", spy)
    # 20 windows of 4 tokens with 30 cells (5 × 6) and 3 words, 2 heads of 3 and 5 more, in batches of 2: 6 at a time.
    monkeypatch.setattr(module, "_MOST", 6 * 2 * (4 + 30 + 3) * 2 * 8)
    found = joint_gri_attention(*tensors, 7, 9, 2, 2, text_mask=mask)
    assert calls == [12, 12, 12, 4, 2]  # the text comes last
    torch.testing.assert_close(found, once, **EXACT)


def test_gradients_agree_with_finite_differences() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2 + 3 * 5, batch=1))
    assert torch.autograd.gradcheck(lambda *x: joint_gri_attention(*x, 3, 5, 2, 2), (q, k, v))


def test_a_sequence_shorter_than_the_image_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected the 3 × 5 tokens of an image and more of its text, got 14"
    ):
        joint_gri_attention(*qkv(1, 14), 3, 5, 2, 2)


def test_text_of_the_image_alone() -> None:
    q, k, v = qkv(6, 10)
    text_key, text_value = draw(2, 3, 2, 3, seed=4), draw(2, 3, 2, 3, seed=5)
    for window in (4, 10):
        found = gri_attention(q, k, v, 6, 10, window, 2, text=(text_key, text_value))
        joined = [torch.cat(pair, 1) for pair in ((text_key, q), (text_key, k), (text_value, v))]
        torch.testing.assert_close(found, joint_gri_attention(*joined, 6, 10, window, 2)[:, 3:], **EXACT)


# Networks

_ATTENTION: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12}


def _sd3(**config: Any) -> Any:
    return diffusers.SD3Transformer2DModel(
        **{
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 3,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 16,
            "dual_attention_layers": (0, 2),
            "qk_norm": "rms_norm",
            **_ATTENTION,
            **config,
        }
    )


def _flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        **_ATTENTION,
    )


def _qwen() -> Any:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, axes_dims_rope=(8, 4, 4), **_ATTENTION
    )


MAKERS: dict[str, Callable[[], Any]] = {"sd3": _sd3, "flux": _flux, "qwen": _qwen}
LAYERS = {
    "sd3": [f"transformer_blocks.{name}" for name in ("0.attn", "0.attn2", "1.attn", "2.attn", "2.attn2")],
    "flux": [f"{kind}transformer_blocks.{i}.attn" for kind in ("", "single_") for i in range(2)],
    "qwen": [f"transformer_blocks.{i}.attn" for i in range(2)],
}
each = pytest.mark.parametrize("name", MAKERS)
SIZES = [(4, 4), (3, 5), (7, 2)]


def build(name: str) -> Any:
    """A small network whose attention is not close to uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MAKERS[name]().eval()
        for path, weight in network.named_parameters():
            if path.endswith(
                ("norm_q.weight", "norm_k.weight", "norm_added_q.weight", "norm_added_k.weight")
            ):
                torch.nn.init.normal_(weight, 1.0, 0.5)
    return network


def flux_ids(height: int, width: int) -> Tensor:
    ids = torch.zeros(height, width, 3)
    ids[..., 1], ids[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    return ids.flatten(0, 1)


def inputs(name: str, height: int, width: int, batch: int = 2, text: int = 3) -> dict[str, Any]:
    """A call for an image of height × width tokens, with one row for each sample."""

    def rows(*shape: int, seed: int) -> Tensor:
        return torch.cat([draw(1, *shape, seed=seed + i, dtype=torch.float32) for i in range(batch)])

    found: dict[str, Any] = {
        "encoder_hidden_states": rows(text, 12, seed=20),
        "timestep": torch.tensor([0.9, 0.4, 0.2])[:batch],
    }
    if name == "sd3":
        found |= {"timestep": 1000 * found["timestep"], "pooled_projections": rows(8, seed=30)}
        return {**found, "hidden_states": rows(4, 2 * height, 2 * width, seed=10)}
    found["hidden_states"] = rows(height * width, 16, seed=10)
    if name == "flux":
        found |= {"pooled_projections": rows(8, seed=30), "txt_ids": torch.zeros(text, 3)}
        return {**found, "img_ids": flux_ids(height, width)}
    return {**found, "img_shapes": [[(1, height, width)]] * batch}


def predict(network: Any, call: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return network(**call).sample


@each
@pytest.mark.parametrize("size", SIZES)
def test_cells_of_one_token_are_the_network_itself(
    name: str, size: tuple[int, int], windows_always: None
) -> None:
    network, call = build(name), inputs(name, *size)
    plain = predict(network, call)
    dx.apply_gri_attention(network, window=2, pool=1)
    torch.testing.assert_close(predict(network, call), plain, **ROUNDING)


@each
@pytest.mark.parametrize("settings", [(9, 2), (2, 1)])
def test_nothing_to_approximate_is_the_network_itself(name: str, settings: tuple[int, int]) -> None:
    network, call = build(name), inputs(name, 3, 5)
    plain = predict(network, call)
    dx.apply_gri_attention(network, None, *settings)
    torch.testing.assert_close(predict(network, call), plain, **ROUNDING)


@each
def test_on_and_off_leaves_no_trace(name: str) -> None:
    network, call = build(name), inputs(name, 4, 6)
    plain, before = predict(network, call), dict(network.attn_processors)
    attributes = {path: set(vars(part)) for path, part in network.named_modules()}
    assert dx.apply_gri_attention(network, window=2, pool=2) is network
    assert gri_attention_of(network) == (LAYERS[name], 2, 2)
    assert not torch.allclose(predict(network, call), plain, atol=1e-3)
    copied = copy.deepcopy(network)
    assert torch.equal(predict(copied, call), predict(network, call))
    assert dx.remove_gri_attention(network) is network
    assert gri_attention_of(network) is None
    assert torch.equal(predict(network, call), plain)
    assert all(processor is before[path] for path, processor in network.attn_processors.items())
    for path, part in network.named_modules():
        assert set(vars(part)) == attributes[path]
        assert not part._forward_pre_hooks
        assert not part._forward_pre_hooks_with_kwargs
    assert not torch.equal(predict(copied, call), plain)


@each
def test_the_grid_and_the_words_of_every_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, call = build(name), inputs(name, 3, 5, text=4)
    dx.apply_gri_attention(network, window=2, pool=2)
    seen = []
    real = gri_processors.joint_gri_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, *sizes: int, **rest: Any) -> Tensor:
        seen.append((query.shape[1], *sizes))
        return real(query, key, value, *sizes, **rest)

    monkeypatch.setattr(gri_processors, "joint_gri_attention", spy)
    predict(network, call)
    # The second attention of a block of Stable Diffusion 3.5 is of the image alone.
    assert seen == [(15 if layer.endswith("2") else 19, 3, 5, 2, 2) for layer in LAYERS[name]]


@each
def test_text_sees_everything(name: str) -> None:
    network, call = build(name), inputs(name, 4, 6)
    found: list[Tensor] = []
    block = network.transformer_blocks[0]
    block.register_forward_hook(lambda module, args, out: found.extend(out))
    predict(network, call)
    dx.apply_gri_attention(network, ["transformer_blocks.0"], window=2, pool=2)
    predict(network, call)
    plain_text, plain_image, text, image = found
    torch.testing.assert_close(text, plain_text, **ROUNDING)
    assert not torch.allclose(image, plain_image, atol=1e-3)


@each
def test_every_image_token_sees_every_word(name: str) -> None:
    network, call = build(name), inputs(name, 4, 6, batch=1)
    dx.apply_gri_attention(network, window=2, pool=2)
    plain = predict(network, call)
    call["encoder_hidden_states"] = call["encoder_hidden_states"].clone()
    call["encoder_hidden_states"][:, -1] += 1
    changed = (predict(network, call) - plain).abs()
    # By pixel of the latents, or by token.
    assert (changed.amax(1 if name == "sd3" else -1) > 1e-6).all()


@each
def test_a_batch_is_its_rows(name: str) -> None:
    network, call = build(name), inputs(name, 3, 5, batch=3)
    dx.apply_gri_attention(network, window=2, pool=2)
    together = predict(network, call)
    for i in range(3):
        shared = ("img_ids", "txt_ids")
        row = {key: value if key in shared else value[i : i + 1] for key, value in call.items()}
        torch.testing.assert_close(predict(network, row), together[i : i + 1], **ROUNDING)


@each
def test_gradient_checkpointing_repeats_each_call_with_its_own_size(name: str) -> None:
    network = build(name)
    dx.apply_gri_attention(network, window=2, pool=2)

    def gradients() -> list[Tensor]:
        network.zero_grad()
        # The same number of tokens in two shapes, both alive until the backward pass.
        losses = [network(**inputs(name, *size)).sample.square().mean() for size in ((3, 8), (8, 3))]
        sum(losses).backward()  # type: ignore[union-attr]
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    plain = gradients()
    network.train().enable_gradient_checkpointing()
    repeated = gradients()
    assert len(plain) == len(repeated) > 0
    for a, b in zip(plain, repeated):
        torch.testing.assert_close(a, b, **ROUNDING)


@each
def test_bfloat16(name: str) -> None:
    network, call = build(name), inputs(name, 4, 6)
    dx.apply_gri_attention(network, window=2, pool=2)
    exact = predict(network, call)
    # Also the positions of Flux, as its pipeline does.
    half = {key: value.bfloat16() if isinstance(value, Tensor) else value for key, value in call.items()}
    found = predict(network.bfloat16(), half)
    assert found.dtype == torch.bfloat16
    # Weights and activations of 8 bits, through two or three blocks.
    assert (found.float() - exact).norm() < 0.05 * exact.norm()


@each
def test_positional_arguments_and_the_users_own(name: str) -> None:
    network, call = build(name), inputs(name, 4, 6)
    dx.apply_gri_attention(network, window=2, pool=2)
    expected = predict(network, call)
    argument = "attention_kwargs" if name == "qwen" else "joint_attention_kwargs"
    mine: dict[str, Any] = {}
    assert torch.equal(predict(network, {**call, argument: mine}), expected)

    order = list(inspect.signature(type(network).forward).parameters)[1:]
    args = [{**call, argument: mine}.get(key) for key in order[: order.index(argument) + 1]]
    with torch.no_grad():
        assert torch.equal(network(*args).sample, expected)
    assert mine == {}


@each
def test_only_the_chosen_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    for logger in (
        diffusers.models.attention_processor.logger,
        diffusers.models.transformers.transformer_flux.logger,
    ):
        monkeypatch.setattr(logger, "warning", warned.append)
    network, call = build(name), inputs(name, 4, 6)
    chosen = LAYERS[name][-1]
    dx.apply_gri_attention(network, [chosen], window=2, pool=2)
    assert gri_attention_of(network) == ([chosen], 2, 2)
    others = [layer for layer in LAYERS[name] if layer != chosen]
    assert not any(isinstance(network.get_submodule(layer).processor, JointProcessor) for layer in others)
    predict(network, call)
    assert not warned


@each
def test_backends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, call = build(name), inputs(name, 4, 6)
    dx.apply_gri_attention(network, window=2, pool=2)
    default, asked = predict(network, call), []
    real = module.dispatch_attention_fn

    def spy(*tensors: Tensor, backend: Any, **rest: Any) -> Tensor:
        asked.append((backend, rest["attn_mask"]))
        return real(*tensors, backend=backend, **rest)

    monkeypatch.setattr(module, "dispatch_attention_fn", spy)
    network.set_attention_backend("_native_math")
    # Two algorithms for the same sums.
    torch.testing.assert_close(predict(network, call), default, **ROUNDING)
    assert set(asked) == {(AttentionBackendName._NATIVE_MATH, None)}


@pytest.mark.slow
@each
def test_it_compiles(name: str) -> None:
    torch.compiler.reset()
    network = build(name)
    dx.apply_gri_attention(network, window=2, pool=2)
    # The positions of Flux are read in every call, which is no part of a graph; its blocks are.
    compiled: Any = torch.compile(network, backend="eager", fullgraph=name != "flux")
    for size in ((4, 6), (3, 5)):
        call = inputs(name, *size)
        expected = predict(network, call)
        with torch.no_grad():
            assert torch.equal(compiled(**call).sample, expected)
    if name != "sd3":  # which names no repeated blocks
        network.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(predict(network, call), expected)


def test_the_text_mask_of_qwen() -> None:
    network, call = build("qwen"), inputs("qwen", 3, 5, text=4)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    for apply in (lambda: None, lambda: dx.apply_gri_attention(network, window=2, pool=2)):
        apply()
        padded = predict(network, {**call, "encoder_hidden_states_mask": mask})
        for i, words in enumerate((2, 4)):
            row = {key: value[i : i + 1] for key, value in call.items()}
            row["encoder_hidden_states"] = row["encoder_hidden_states"][:, :words]
            torch.testing.assert_close(predict(network, row), padded[i : i + 1], **ROUNDING)
        assert not torch.allclose(predict(network, call)[:1], padded[:1], atol=1e-3)


def test_fused_projections_of_flux() -> None:
    network, call = build("flux"), inputs("flux", 4, 6)
    dx.apply_gri_attention(network, window=2, pool=2)
    expected = predict(network, call)
    with torch.no_grad():
        network.fuse_qkv_projections()
    for part in network.modules():
        if hasattr(part, "to_q"):
            part.to_q.weight.data.zero_()
    torch.testing.assert_close(predict(network, call), expected, **ROUNDING)
    with pytest.raises(ValueError, match="on this FluxTransformer2DModel already"):
        dx.apply_gri_attention(network)


def test_fused_projections_of_stable_diffusion_3() -> None:
    network, call = _sd3(qk_norm=None, dual_attention_layers=()).eval(), inputs("sd3", 4, 6)
    with torch.no_grad():
        network.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"FusedJointAttnProcessor2_0.*unfuse_qkv_projections\(\) first"):
        dx.apply_gri_attention(network)
    network.unfuse_qkv_projections()
    # The fused weights stay where they were, and nothing may use them any more.
    network.transformer_blocks[0].attn.to_q.weight.data.mul_(-1)
    plain = predict(network, call)
    dx.apply_gri_attention(network, window=2, pool=1)
    torch.testing.assert_close(predict(network, call), plain, **ROUNDING)
    with torch.no_grad():
        network.fuse_qkv_projections()
    with pytest.raises(ValueError, match="had GRI attention, but now has a FusedJointAttnProcessor2_0"):
        predict(network, call)
    with pytest.raises(ValueError, match=r"unfuse_qkv_projections\(\) first"):
        dx.remove_gri_attention(network)


# Refusals


def test_a_second_image_in_the_sequence_is_refused() -> None:
    flux, call = build("flux"), inputs("flux", 4, 6)
    dx.apply_gri_attention(flux, window=2, pool=2)
    second = flux_ids(4, 6)
    second[:, 0] = 1
    two = {
        "img_ids": torch.cat([call["img_ids"], second]),
        "hidden_states": call["hidden_states"].repeat(1, 2, 1),
    }
    for wrong in (two, {"img_ids": call["img_ids"].flip(0)}, {"img_ids": 2 * call["img_ids"]}):
        with pytest.raises(ValueError, match=r"expected img_ids that number .* one image.*Flux Kontext"):
            predict(flux, {**call, **wrong})
    qwen, call = build("qwen"), inputs("qwen", 4, 6)
    dx.apply_gri_attention(qwen, window=2, pool=2)
    for shapes in ([[(1, 4, 3), (1, 4, 3)]] * 2, [[(1, 4, 6)], [(1, 6, 4)]], [[(2, 4, 3)]] * 2):
        with pytest.raises(ValueError, match=r"expected img_shapes with one image"):
            predict(qwen, {**call, "img_shapes": shapes})
    # What one sample's shape may look like, too.
    assert torch.equal(predict(qwen, {**call, "img_shapes": [(1, 4, 6)] * 2}), predict(qwen, call))


def test_positions_of_flux_may_have_a_batch_and_an_offset() -> None:
    flux, call = build("flux"), inputs("flux", 3, 5)
    dx.apply_gri_attention(flux, window=2, pool=2)
    expected = predict(flux, call)
    assert torch.equal(predict(flux, {**call, "img_ids": call["img_ids"][None]}), expected)
    # Rotary embeddings are of distances. The text is at 0, so its distances change.
    moved = predict(flux, {**call, "img_ids": call["img_ids"] + 1})
    assert torch.isfinite(moved).all()
    big = flux_ids(300, 2).bfloat16()  # rows beyond 256 are rounded
    call |= {"img_ids": big, "hidden_states": draw(2, 600, 16, dtype=torch.float32)}
    assert torch.isfinite(predict(flux, call)).all()


@each
def test_tokens_of_another_image_are_refused(name: str) -> None:
    network = build(name)
    dx.apply_gri_attention(network, window=2, pool=2)
    attn = network.get_submodule(LAYERS[name][0])
    x, text = draw(1, 14, 32, dtype=torch.float32), draw(1, 3, 32, dtype=torch.float32)
    kind = type(attn.processor).__name__
    with pytest.raises(ValueError, match=f"{kind} needs the size of the image in every call: use apply_gri"):
        attn(x, text)
    with pytest.raises(ValueError, match=f"{kind} expected the 3 × 5 tokens of one image, got 14"):
        attn(x, text, gri_grid=gri_processors.GRIGrid(3, 5, 2, 2))
    with pytest.raises(ValueError, match="takes no attention_mask"):
        attn(x, text, attention_mask=torch.ones(1, 17), gri_grid=gri_processors.GRIGrid(2, 7, 2, 2))
    attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match="disable context parallelism"):
        attn(x, text, gri_grid=gri_processors.GRIGrid(2, 7, 2, 2))


def test_what_apply_refuses() -> None:
    network = build("sd3")
    with pytest.raises(ValueError, match=r"no self-attention at or under 'transformer_blocks\.3'"):
        dx.apply_gri_attention(network, ["transformer_blocks.3"])
    with pytest.raises(ValueError, match="pool must be a whole number"):
        dx.apply_gri_attention(network, pool=0)
    mine = type("MyProcessor", (JointAttnProcessor2_0,), {})()
    network.transformer_blocks[1].attn.set_processor(mine)
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn has a MyProcessor, which GRI"):
        dx.apply_gri_attention(network)
    assert gri_attention_of(network) is None
    dx.apply_gri_attention(network, ["transformer_blocks.0"])
    assert isinstance(network.transformer_blocks[0].attn.processor, GRIJointAttnProcessor)
    with pytest.raises(ValueError, match="on this SD3Transformer2DModel already"):
        dx.apply_gri_attention(network)
    # A processor that was set since is kept.
    network.transformer_blocks[0].attn.set_processor(mine)
    with pytest.raises(ValueError, match=r"0\.attn had GRI attention, but now has a MyProcessor"):
        predict(network, inputs("sd3", 4, 6))
    dx.remove_gri_attention(network)
    assert network.transformer_blocks[0].attn.processor is mine


# Pipelines

_JOINT = ("sd3", "flux", "flux-schnell", "qwen", "modular-flux")
_UNETS = (
    "sd",
    "sd2",
    "sdxl",
    "sdxl-img2img",
    "sd-controlnet",
    "sd-ip-adapter",
    "sd-pag",
    "lcm",
    "ldm",
    "modular-sdxl",
)


@pytest.mark.parametrize("name", families.NAMES)
def test_support_is_what_apply_does(name: str) -> None:
    pipe = families.build(name)
    reason = dx.support(pipe).refusals["GRI attention"]
    if name in (*_JOINT, *_UNETS):
        assert reason is None
        dx.apply_gri_attention(pipe, window=2, pool=2)
        # A grid of 8 × 8 or of 4 × 4 tokens.
        assert torch.isfinite(families.images(pipe, name, 2, steps=2)).all()
        assert "GRI attention in" in str(dx.summary(pipe))
        return
    for call in (dx.apply_gri_attention, dx.remove_gri_attention):
        with pytest.raises(ValueError, match="GRI attention needs a UNet2DConditionModel, SD3Tr") as refused:
            call(pipe)
        assert str(refused.value) == reason
    denoiser = families.FAMILIES[name].denoisers[0]
    assert type(getattr(pipe, denoiser)).__name__ in str(reason)
    assert ("is linear in the number of tokens" in str(reason)) == (name == "sana")


@pytest.mark.parametrize("name", _JOINT)
@pytest.mark.parametrize("guided", [True, False])
def test_pipelines_with_cells_of_one_token(name: str, guided: bool, windows_always: None) -> None:
    pipe = families.build(name)
    argument = families.FAMILIES[name].per_prompt

    def images() -> Tensor:
        more: dict[str, Any] = {} if argument is None else {argument: 2, "generator": families.generators(4)}
        return families.images(pipe, name, 2, steps=2, guided=guided, **more)

    plain = images()
    assert len(plain) == (2 if argument is None else 4)
    dx.apply_gri_attention(pipe, window=2, pool=1)
    # Rounding, of a random network over two steps and the autoencoder.
    torch.testing.assert_close(images(), plain, rtol=1e-3, atol=1e-3)
    dx.remove_gri_attention(pipe)
    assert torch.equal(images(), plain)


def test_prompts_of_two_lengths_on_qwen(windows_always: None) -> None:
    pipe = families.build("qwen")
    prompts = ["a bag", "a much longer bag"]
    plain = families.images(pipe, "qwen", 2, steps=2, prompt=prompts)
    dx.apply_gri_attention(pipe, window=2, pool=1)
    torch.testing.assert_close(
        families.images(pipe, "qwen", 2, steps=2, prompt=prompts), plain, rtol=1e-3, atol=1e-3
    )
