"""The conditional convolution against its kept convolution and against a loop over pictures."""

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusers_ext.asdm.condconv import CLMECondConv2d, add_cond_convs, fold_cond_convs
from tests import tiny

# The same float64 sums in another order.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def convs(count: int, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> list[nn.Conv2d]:
    torch.manual_seed(seed)
    given: dict[str, Any] = {
        "in_channels": 6,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 1,
        "dtype": dtype,
    }
    return [nn.Conv2d(**{**given, **config}) for _ in range(count)]


def layer(count: int = 3, routed: bool = True, dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    kept, *removed = convs(count, dtype, **config)
    made = CLMECondConv2d.from_convs(kept, removed)
    if routed:
        nn.init.normal_(made.routing.weight)
        nn.init.normal_(made.routing.bias)
    return made


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(made: CLMECondConv2d, x: Tensor) -> Tensor:
    """One picture and one expert at a time."""
    out = []
    for row in x:
        alpha = made.routing.weight @ row.mean((1, 2)) + made.routing.bias
        alpha = alpha + F.one_hot(torch.tensor(0), made.num_experts)
        total: Any = 0
        for i, a in enumerate(alpha):
            bias = None if made.bias is None else made.bias[i]
            shape: dict[str, Any] = {
                "stride": made.stride,
                "padding": made.padding,
                "dilation": made.dilation,
            }
            total = total + a * F.conv2d(row[None], made.weight[i], bias, **shape)
        out.append(total)
    return torch.cat(out)


SHAPES: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"stride": 2},
    {"kernel_size": 1, "padding": 0},
    {"kernel_size": (1, 3), "padding": (0, 1)},
    {"dilation": 2, "padding": 2},
    {"padding": "same"},
]


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(7, 5), (9, 9)])  # few positions, and more
def test_it_is_the_loop_over_pictures_and_experts(
    config: dict[str, Any], batch: int, size: tuple[int, int]
) -> None:
    made = layer(**config)
    x = draw(batch, 6, *size)
    torch.testing.assert_close(made(x), by_hand(made, x), **EXACT)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(3, 9), st.integers(3, 9), st.sampled_from(SHAPES))
def test_at_step_0_it_is_the_kept_convolution(
    experts: int, batch: int, height: int, width: int, config: dict[str, Any]
) -> None:
    for dtype in (torch.float32, torch.float64):
        kept = convs(1, dtype, **config)[0]
        made = layer(experts, routed=False, dtype=dtype, **config)
        x = draw(batch, 6, height, width, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(made(x), kept(x))
        assert torch.equal(made(x[:1]), kept(x[:1]))
        # Grouped: sums of up to 54 products of order ¼ in another order, of eps 1.2e-7 and 2.2e-16.
        torch.testing.assert_close(made(x), kept(x), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_equal_pictures_share_a_kernel_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(), draw(3, 6, 9, 9)
    groups: list[int] = []
    real = F.conv2d

    def spy(*arguments: Any) -> Tensor:
        groups.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(F, "conv2d", spy)
    made(x)
    made(x[:1].expand(3, -1, -1, -1))
    with torch.no_grad():
        made(x)
        made(x[:1].expand(3, -1, -1, -1))
        made(x[:1])
    assert groups == [3, 3, 3, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    made = layer(routed=False, dtype=torch.float32)
    kept = convs(1)[0]
    x = draw(3, 6, 8, 8, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(made.to(dtype)(x), kept.to(dtype)(x))
    routed = layer()
    expected = routed(x.double())
    found = routed.to(dtype)(x)
    assert found.dtype == dtype
    # Three experts' sums of 54 products of order ¼, in 8 bits (bfloat16).
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)


def test_all_parameters_learn_and_gradients_are_right() -> None:
    made = layer(2, in_channels=2, out_channels=2)
    names, values = zip(*made.named_parameters())
    x = draw(2, 2, 3, 3).requires_grad_()

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_at_step_0_the_routing_and_the_kept_kernel_learn() -> None:
    made = layer(routed=False)
    made(draw(3, 6, 8, 8)).square().mean().backward()
    assert made.routing.weight.grad.abs().amax(1).gt(0).all()
    assert made.weight.grad[0].abs().gt(0).any()
    # The others follow from the first step on, when they have a weight.
    assert not made.weight.grad[1:].any()


def test_gradient_checkpointing_changes_nothing() -> None:
    made, x = layer(), draw(2, 6, 8, 8)
    grads = []
    for run in (made, functools.partial(checkpoint, made, use_reentrant=False)):
        made.zero_grad()
        run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in made.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_saved_and_loaded() -> None:
    made = layer()
    again = CLMECondConv2d.like(convs(1, torch.float64, seed=5)[0], made.num_experts)
    assert not again.weight.any()
    again.load_state_dict(made.state_dict())
    x = draw(2, 6, 5, 5)
    assert torch.equal(again(x), made(x))
    assert sorted(made.state_dict()) == ["bias", "routing.bias", "routing.weight", "weight"]
    assert tuple(made.weight.shape) == (3, 4, 6, 3, 3)
    assert "num_experts=3" in repr(made)


@pytest.mark.parametrize("config", SHAPES)
def test_folded(config: dict[str, Any]) -> None:
    made = layer(**config)
    with pytest.raises(ValueError, match=r"mixes a kernel for every image.*constant routing"):
        made.fold()
    nn.init.zeros_(made.routing.weight)
    folded = made.fold()
    assert type(folded) is nn.Conv2d
    x = draw(2, 6, 7, 5)
    torch.testing.assert_close(folded(x), made(x), **EXACT)
    kept = convs(1, torch.float64, **config)[0]
    fresh = layer(routed=False, **config).fold()
    assert torch.equal(fresh.weight, kept.weight)
    assert torch.equal(fresh(x), kept(x))
    assert fresh.stride == kept.stride


def test_experts_that_do_not_fit() -> None:
    kept = convs(1)[0]
    with pytest.raises(
        ValueError,
        match=r"kept convolution has \(4, 6, 3, 3\) with bias, removed\s+convolution 0 has \(4, 5, 3, 3\)",
    ):
        CLMECondConv2d.from_convs(kept, convs(1, in_channels=5))
    with pytest.raises(ValueError, match=r"convolution 1 has \(4, 6, 3, 3\) without bias"):
        CLMECondConv2d.from_convs(kept, [*convs(1), *convs(1, bias=False)])
    with pytest.raises(ValueError, match="Removed convolution 0 has groups=2"):
        CLMECondConv2d.from_convs(kept, convs(1, groups=2))
    with pytest.raises(ValueError, match="kept convolution has groups=1 and padding_mode='circular'"):
        CLMECondConv2d.from_convs(convs(1, padding_mode="circular")[0], convs(1))
    with pytest.raises(ValueError, match=r"Removed convolution 0 must be a torch\.nn\.Conv2d, got Linear"):
        CLMECondConv2d.from_convs(kept, [nn.Linear(2, 2)])  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match="num_experts includes the kept convolution: expected 1 or more, got 0"
    ):
        CLMECondConv2d.like(kept, 0)


# In a UNet

PATH = "up_blocks.1.resnets.1.conv2"
EXPERT = "up_blocks.1.resnets.0.conv2"


def predict(unet: Any) -> Tensor:
    with torch.no_grad():
        return unet(
            draw(3, 4, 8, 8, dtype=torch.float32),
            torch.tensor([1, 500, 900]),
            draw(3, 5, 16, dtype=torch.float32),
        ).sample


def test_in_a_unet_and_back() -> None:
    unet = tiny.build("sd").unet
    plain = predict(unet)
    before = copy.deepcopy(unet.state_dict())
    assert add_cond_convs(unet, {PATH: [unet.get_submodule(EXPERT)]}) == {PATH: 2}
    made = unet.get_submodule(PATH)
    assert isinstance(made, CLMECondConv2d)
    assert made.training == unet.training
    assert torch.equal(predict(unet), plain)
    nn.init.normal_(made.routing.weight)
    assert not torch.allclose(predict(unet), plain, atol=1e-4)
    with pytest.raises(ValueError, match=rf"'{PATH}': This CLMECondConv2d mixes"):
        fold_cond_convs(unet)
    nn.init.zeros_(made.routing.weight)
    assert fold_cond_convs(unet) == [PATH]
    assert torch.equal(predict(unet), plain)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert fold_cond_convs(unet) == []
    with pytest.raises(ValueError, match=r"itself: use its fold\(\)"):
        fold_cond_convs(layer())


def test_all_or_none() -> None:
    unet = tiny.build("sd").unet
    expert = unet.get_submodule(EXPERT)
    for path, experts, message in [
        ("up_blocks.7.conv", [expert], "at 'up_blocks.7.conv' of UNet2DConditionModel, found nothing"),
        ("mid_block", [expert], "found a UNetMidBlock2DCrossAttn"),
        ("", [expert], "found nothing"),
        ("conv_in", [], "no removed convolutions for 'conv_in'"),
        (
            "conv_in",
            [expert],
            r"'conv_in': Experts need kernels of one shape: the kept convolution has \(8, 4, 3, 3\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            add_cond_convs(unet, {PATH: [expert], path: experts})
        assert not any(isinstance(module, CLMECondConv2d) for module in unet.modules())
