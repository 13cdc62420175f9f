"""The small network: sizes, identity, prompts row by row, dtypes, saving and refusals."""

from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusers_ext as dx


def build(channels: int = 4, trained: bool = True, **config: Any) -> dx.NPNetModel:
    options = {"text_dim": 8, "max_tokens": 6, "width": 32, "depth": 2, **config}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = dx.NPNetModel(channels, **options)
        if trained:
            torch.nn.init.normal_(model.compact.out.weight, std=0.2)
    return model.eval().requires_grad_(False)


def inputs(*shape: int, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=draw), torch.randn(shape[0], tokens, 8, generator=draw)


@pytest.mark.parametrize("channels", [1, 3, 4, 16, 64])
@given(height=st.integers(1, 13), width=st.integers(1, 13), tokens=st.integers(1, 6))
@settings(max_examples=15, deadline=None)
def test_any_size_and_the_identity_before_training(
    channels: int, height: int, width: int, tokens: int
) -> None:
    noise, text = inputs(2, channels, height, width, tokens=tokens)
    assert torch.equal(build(channels, trained=False)(noise, text).sample, noise)
    golden = build(channels)(noise, text).sample
    assert golden.shape == noise.shape
    assert torch.isfinite(golden).all()
    assert not torch.equal(golden, noise)


def test_every_row_has_its_own_prompt() -> None:
    model = build()
    noise, text = inputs(3, 4, 6, 10)
    batch = model(noise, text).sample
    rows = torch.cat([model(noise[i : i + 1], text[i : i + 1]).sample for i in range(3)])
    # Another batch size may take another matrix kernel: float32 rounding.
    assert torch.allclose(batch, rows, atol=1e-5)
    other = model(noise, text[[0, 2, 1]]).sample
    assert torch.equal(other[0], batch[0])
    assert not torch.allclose(other[1:], batch[1:], atol=1e-3)


def test_every_token_and_its_place_count() -> None:
    model = build()
    noise, text = inputs(1, 4, 6, 6)
    for i in range(6):
        changed = text.clone()
        changed[:, i] += 1 + torch.arange(8.0)
        assert not torch.allclose(model(noise, changed).sample, model(noise, text).sample, atol=1e-4)
    assert not torch.allclose(model(noise, text.flip(1)).sample, model(noise, text).sample, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_has_no_effect(side: str, dtype: torch.dtype) -> None:
    """A prompt of four tokens in a batch with one of six is the prompt alone."""
    model = build().to(dtype)
    noise, text = (x.to(dtype) for x in inputs(2, 4, 6, 6))
    mask = torch.ones(2, 6, dtype=torch.bool)
    short = slice(0, 4) if side == "right" else slice(2, 6)
    mask[1] = False
    mask[1, short] = True
    batch = model(noise, text, mask).sample
    alone = torch.cat([model(noise[:1], text[:1]).sample, model(noise[1:], text[1:, short]).sample])
    # Rounding of values up to 5: another number of tokens may take another matrix kernel.
    assert torch.allclose(batch, alone, atol=1e-5 if dtype == torch.float32 else 0.1)
    other = text.clone()
    other[~mask] = 7.0
    assert torch.equal(model(noise, other, mask).sample, batch)
    assert not torch.allclose(model(noise, other).sample[1], batch[1], atol=0.2)


def test_a_mask_without_padding_is_none() -> None:
    model = build()
    noise, text = inputs(2, 4, 6, 6)
    assert torch.equal(
        model(noise, text, torch.ones(2, 6, dtype=torch.bool)).sample, model(noise, text).sample
    )


@pytest.mark.parametrize("masked", [False, True])
def test_pooled_vectors_are_one_more_token(masked: bool) -> None:
    model = build(pooled_dim=5)
    noise, text = inputs(2, 4, 6, 6)
    pooled = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4]) if masked else None
    golden = model(noise, text, mask, pooled).sample
    assert not torch.allclose(model(noise, text, mask, pooled.flip(0)).sample, golden, atol=1e-3)
    # Each row has its own, and the padding still has no effect.
    other = torch.stack([pooled[0], -pooled[1]])
    assert torch.equal(model(noise, text, mask, other).sample[0], golden[0])
    if mask is not None:
        assert torch.equal(model(noise, text.masked_fill(~mask[..., None], 7.0), mask, pooled).sample, golden)


def test_pooled_vectors_that_do_not_fit_are_named() -> None:
    noise, text = inputs(2, 4, 6, 6)
    with pytest.raises(ValueError, match=r"pooled_prompt_embeds \(2, 5\), one row for each noise, got none"):
        build(pooled_dim=5)(noise, text)
    with pytest.raises(ValueError, match=r"pooled_prompt_embeds \(2, 5\), .* got \(2, 6\)"):
        build(pooled_dim=5)(noise, text, None, torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"made without pooled vectors, got \(2, 5\)"):
        build()(noise, text, None, torch.zeros(2, 5))


def test_gradients_do_not_reach_the_padding() -> None:
    model = build().requires_grad_(True)
    model.enable_gradient_checkpointing()
    noise, text = inputs(2, 4, 6, 6)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    text.requires_grad_(True)
    model(noise, text, mask).sample.square().mean().backward()
    assert not text.grad[~mask].any()
    assert text.grad[mask].any(1).all()


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6), torch.tensor([[True] * 6, [False] * 6])],
)
def test_wrong_masks_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"encoder_attention_mask \(2, 6\) bool with True in every row"):
        build()(*inputs(2, 4, 6, 6), mask)


def test_the_same_patch_elsewhere_is_changed_otherwise() -> None:
    golden = build()(torch.zeros(1, 4, 12, 12), inputs(1, 4, 1, 1)[1]).sample
    assert not torch.allclose(golden[..., :6], golden[..., 6:], atol=1e-3)
    assert not torch.allclose(golden[..., :6, :], golden[..., 6:, :], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_and_inputs(dtype: torch.dtype) -> None:
    noise, text = inputs(2, 4, 6, 6)
    exact = build()(noise, text).sample
    half = build().to(dtype)(noise.to(dtype), text.to(dtype)).sample
    assert half.dtype == dtype
    # Three or two significant digits of a residual of about 1.
    assert (half - exact).abs().max() < (0.02 if dtype == torch.float16 else 0.15)
    mixed = build().to(dtype)(noise, text).sample
    assert mixed.dtype == torch.float32
    untrained = build(trained=False).to(dtype)
    assert torch.equal(untrained(noise, text).sample, noise)


def test_save_and_load(tmp_path: Any) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded: Any = dx.NPNetModel.from_pretrained(tmp_path)
    noise, text = inputs(2, 4, 5, 7)
    # Weights that lie elsewhere in memory may take another kernel.
    assert torch.allclose(loaded(noise, text).sample, model(noise, text).sample, atol=1e-5)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert dict(loaded.config)["text_dim"] == 8


def test_gradients_reach_every_parameter() -> None:
    model = build().requires_grad_(True)
    noise, text = inputs(2, 4, 6, 6)
    model(noise, text).sample.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # A key's bias adds the same to every token's score, and softmax doesn't see it.
    assert [name for name in without if not name.endswith("to_k.bias")] == []


@pytest.mark.parametrize(
    ("noise", "text", "message"),
    [
        ((2, 3, 6, 6), (2, 6, 8), r"noise \(B, 4, H, W\), got \(2, 3, 6, 6\)"),
        ((4, 6, 6), (2, 6, 8), r"noise \(B, 4, H, W\)"),
        ((2, 4, 6, 6), (2, 6, 9), "width 8, got 9"),
        ((2, 4, 6, 6), (2, 7, 8), "at most 6 tokens, got 7"),
        ((2, 4, 6, 6), (1, 6, 8), "one row for each of the 2 noises"),
        ((2, 4, 6, 6), (2, 8), r"got \(2, 8\)"),
    ],
)
def test_wrong_shapes_are_named(noise: Any, text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(noise), torch.zeros(text))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"width": 40}, "width must be a multiple of 32"),
        ({"depth": 0}, "must be 1 or more"),
        ({"pooled_dim": 0}, "pooled_dim must be 1 or more"),
        ({"legacy": True, "pooled_dim": 5}, "released architecture takes no pooled vectors"),
        ({"legacy": True, "latent_channels": 3}, "lays four channels out as one square"),
    ],
)
def test_sizes_that_do_not_go_together(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.NPNetModel(**config)


def test_the_output_has_the_forms_of_a_diffusers_model() -> None:
    model = build()
    noise, text = inputs(2, 4, 6, 6)
    output = model(noise, text)
    (golden,) = model(noise, text, return_dict=False)
    assert isinstance(output, BaseOutput)
    assert output["sample"] is output.sample is output[0]
    assert torch.equal(output.sample, golden)


def test_gradient_checkpointing_has_the_same_gradients() -> None:
    noise, text = inputs(2, 4, 6, 6)
    plain, saving = build().requires_grad_(True), build().requires_grad_(True)
    saving.enable_gradient_checkpointing()
    calls, inner = [], saving.compact._gradient_checkpointing_func
    saving.compact._gradient_checkpointing_func = lambda *args: calls.append(args) or inner(*args)
    for model in (plain, saving):
        model(noise, text).sample.square().mean().backward()
    assert len(calls) == len(saving.compact.blocks)
    found = zip(plain.parameters(), saving.parameters())
    assert all(a.grad is b.grad is None or torch.equal(a.grad, b.grad) for a, b in found)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting(storage: torch.dtype) -> None:
    noise, text = inputs(2, 4, 6, 6)
    exact, model = build()(noise, text).sample, build()
    model.enable_layerwise_casting(storage_dtype=storage)
    assert model.compact.embed.weight.dtype == storage
    assert (model(noise, text).sample - exact).abs().mean() < (
        0.1 if storage == torch.float8_e4m3fn else 0.02
    )
