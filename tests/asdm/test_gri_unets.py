"""GRI attention on and off whole UNets: sizes, backends, other processors, other plug-ins."""

import copy
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.asdm import gri_attention as module
from diffusers_ext.asdm.apply import apply_gri_attention, gri_attention_of, remove_gri_attention
from diffusers_ext.asdm.gri_processors import GRIAttnProcessor
from tests import tiny

# Sums of at most a few hundred float32 terms of order 1 in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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
    for path, part in pipe.unet.named_modules():
        assert set(part.__dict__) == attributes[path]
        assert not part._forward_pre_hooks
        assert not part._forward_pre_hooks_with_kwargs
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
    with pytest.raises(ValueError, match="got DDPMPipeline with UNet2DModel"):
        apply_gri_attention(tiny.build("ddpm"))
    with pytest.raises(ValueError, match="got DDPMPipeline"):
        remove_gri_attention(tiny.build("ddpm"))
    assert gri_attention_of(tiny.build("ddpm")) is None
    with pytest.raises(
        ValueError,
        match=r"no self-attention at or under 'down_blocks\.00'\. The UNet2DConditionModel has: down_",
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
    with pytest.raises(ValueError, match="on this UNet2DConditionModel already: call remove_gri_attention"):
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
        ValueError, match=rf"{DOWN} has a {type(other).__name__}, which GRI attention cannot replace"
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
    with pytest.raises(ValueError, match=r"had GRI attention, but now has a FusedAttnProcessor2_0"):
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
    with pytest.raises(ValueError, match="now has a AttnProcessor2_0"):
        predict(unet)
    remove_gri_attention(unet)
    assert unet.get_submodule(DOWN).processor is mine
    assert torch.equal(predict(unet), plain)


# Backends


def test_it_follows_the_backend(unet: Any, monkeypatch: pytest.MonkeyPatch, restored_backend: None) -> None:
    apply_gri_attention(unet, window=4, pool=2)
    asked: list[Any] = []
    real = module.dispatch_attention_fn

    def spy(*tensors: Tensor, backend: Any, **rest: Any) -> Tensor:
        asked.append(backend)
        return real(*tensors, backend=backend, **rest)

    monkeypatch.setattr(module, "dispatch_attention_fn", spy)
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


def test_attention_slicing_is_refused_before_and_after() -> None:
    pipe = tiny.build("sd")
    pipe.enable_attention_slicing()
    with pytest.raises(
        ValueError, match=r"SlicedAttnProcessor.*Call pipe.disable_attention_slicing\(\) first"
    ):
        dx.apply_gri_attention(pipe, window=4, pool=2)
    pipe.disable_attention_slicing()
    plain = tiny.images(pipe, "sd", steps=2)
    dx.apply_gri_attention(pipe, window=4, pool=2)
    changed = tiny.images(pipe, "sd", steps=2)
    assert not torch.equal(changed, plain)
    for slicing in (pipe.enable_attention_slicing, pipe.disable_attention_slicing):
        slicing()
        with pytest.raises(
            ValueError, match=r"enable_attention_slicing, .* Call remove_gri_attention, to which"
        ):
            tiny.images(pipe, "sd", steps=2)
    dx.remove_gri_attention(pipe)
    assert torch.equal(tiny.images(pipe, "sd", steps=2), plain)
    dx.apply_gri_attention(pipe, window=4, pool=2)
    assert torch.equal(tiny.images(pipe, "sd", steps=2), changed)
