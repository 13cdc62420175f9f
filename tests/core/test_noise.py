import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.core.noise import slerp


def pair(seed: int, shape: tuple[int, ...] = (3, 4, 8, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, *shape, generator=generator)
    return a, b


@given(seed=st.integers(0, 99), eta=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_on_the_arc_at_the_share_of_the_angle(seed: int, eta: float) -> None:
    a, b = (x / x.flatten(1).norm(dim=1)[:, None] for x in (y.double() for y in pair(seed, (3, 50))))
    point = slerp(a, b, eta)
    assert torch.allclose(point.norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-9)
    whole, part = (torch.acos((a * x).sum(1).clamp(-1, 1)) for x in (b, point))
    assert torch.allclose(part, eta * whole, atol=1e-6)
    assert torch.allclose(slerp(b, a, 1 - eta), point, atol=1e-9)


def test_ends_are_exact_and_rows_have_their_own_share() -> None:
    a, b = pair(0)
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)
    shares = torch.tensor([0.0, 0.3, 1.0])
    rows = slerp(a, b, shares)
    for i, share in enumerate(shares.tolist()):
        assert torch.allclose(rows[i], slerp(a[i : i + 1], b[i : i + 1], share)[0], atol=1e-6)


def test_noise_keeps_its_length_where_a_line_does_not() -> None:
    a, b = pair(1, (1, 4, 64, 64))
    assert float(slerp(a, b, 0.5).std()) == pytest.approx(1, abs=0.02)
    assert float(((a + b) / 2).std()) < 0.75


def test_parallel_rows_are_a_straight_line() -> None:
    a, _ = pair(2)
    assert torch.allclose(slerp(a, 3 * a, 0.25), 1.5 * a, atol=1e-5)
    assert torch.allclose(slerp(a, -a, 0.25), 0.5 * a, atol=1e-5)
    assert slerp(a.half(), a.half(), 0.5).dtype == torch.float16


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), torch.tensor([0.5, 0.5, 2.0])])
def test_shares_outside_are_refused(eta: float | torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        slerp(*pair(0), eta)


def test_wrong_shapes_are_refused() -> None:
    a, b = pair(0)
    with pytest.raises(ValueError, match="two batches of one shape"):
        slerp(a, b[:2], 0.5)
    with pytest.raises(ValueError, match="two batches of one shape"):
        slerp(a, b, torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="row of zeros"):
        slerp(a, torch.zeros_like(a), 0.5)
