"""The losses against cases that can be solved by hand."""

import math

import pytest
import torch

from diffusers_ext.sign import objective as losses
from diffusers_ext.sign.objective import LossWeights


def absolute_mean(mean: float, std: float) -> float:
    """E|x| of N(mean, std²)."""
    return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2)) + mean * math.erf(
        mean / (std * math.sqrt(2))
    )


@pytest.mark.parametrize(("m", "g"), [(0.8, 0.5), (-0.4, 0.5), (0.3, 1.2), (0.3, 0.2), (0.9, 0.9)])
def test_the_score_difference_of_two_gaussians(m: float, g: float) -> None:
    """Data N(μ, s²), generator m + g·z, both denoisers exact: the gradients in m and g have closed forms."""
    mu, s, alpha, sigma = 0.3, 0.5, 0.8, 0.6
    draw = torch.Generator().manual_seed(0)
    rows, size = 64, 4096
    z, noise = (torch.randn(rows, size, generator=draw, dtype=torch.float64) for _ in range(2))
    mean, std = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (m, g))
    made = mean + std * z
    noisy = alpha * made.detach() + sigma * noise
    gain_real = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
    gain_fake = alpha * g**2 / (alpha**2 * g**2 + sigma**2)
    real = mu + gain_real * (noisy - alpha * mu)
    fake = m + gain_fake * (noisy - alpha * m)
    losses.distribution_matching_loss(made, real, fake).backward()
    rest = 1 - alpha * gain_real
    scale = absolute_mean(rest * (m - mu), math.hypot(rest * g, gain_real * sigma))
    # E[D_fake − D_real] and E[z(D_fake − D_real)].
    expected_mean = rest * (m - mu) / scale
    expected_std = alpha * g * (gain_fake - gain_real) / scale
    # 262,144 draws of about unit variance: three standard errors are .006.
    assert mean.grad is not None
    assert std.grad is not None
    assert float(mean.grad) == pytest.approx(expected_mean, abs=0.01)
    assert float(std.grad) == pytest.approx(expected_std, abs=0.01)
    # Descending brings the generator nearer, in mean and in spread.
    assert float(mean.grad) * (m - mu) >= 0 or abs(m - mu) < 0.01
    assert (float(std.grad) > 0) == (g > s) or abs(g - s) < 1e-9 or abs(expected_std) < 0.01


def test_scores_that_agree_give_no_gradient() -> None:
    made = torch.randn(3, 1, 4, 4, requires_grad=True)
    other = torch.randn(3, 1, 4, 4)
    losses.distribution_matching_loss(made, other, other).backward()
    assert made.grad is not None
    assert not made.grad.any()


def test_idempotence_moves_the_inner_projection_only() -> None:
    inner = torch.tensor(0.5, requires_grad=True)
    outer = torch.tensor(0.5, requires_grad=True)
    z = torch.full((2, 1, 2, 2), 4.0)
    loss = losses.idempotence_loss(lambda x: outer.detach() * x, inner * z)
    loss.backward()
    # |0.5·0.5·4 − 0.5·4| = 1 = 4·|inner|·0.5, so its slope is 2.
    assert loss.item() == pytest.approx(1.0)
    assert inner.grad is not None
    assert inner.grad.item() == pytest.approx(2.0)
    assert outer.grad is None


def test_consistency_has_a_constant_target() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    here, nearer = torch.full((2, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1), 1.0)
    loss = losses.consistency_loss(weight * here, lambda x: weight * x, nearer)
    loss.backward()
    assert loss.item() == pytest.approx(4.0)
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(3.0)  # not 3 − 1: nothing flows through the target


def test_score_matching_is_the_noise_predictions_error() -> None:
    made, noise, predicted = (torch.randn(4, 1, 3, 3) for _ in range(3))
    alpha, sigma = torch.full((4, 1, 1, 1), 0.8), torch.full((4, 1, 1, 1), 0.6)
    clean = (alpha * made + sigma * noise - sigma * predicted) / alpha
    found = losses.score_matching_loss(clean, made, alpha, sigma)
    assert found.item() == pytest.approx((predicted - noise).square().mean().item(), rel=1e-5)
    # At a low level the weight stays at γ: (0.995/0.1)² would be 99.
    found = losses.score_matching_loss(
        clean, made, torch.full_like(alpha, 0.995), torch.full_like(sigma, 0.1)
    )
    assert found.item() == pytest.approx(5 * (clean - made).square().mean().item(), rel=1e-5)


def test_tightness_is_bounded_and_pushes_away() -> None:
    weight = torch.tensor(0.9, requires_grad=True)
    made, reconstruction = torch.full((3, 1, 1, 1), 2.0), torch.tensor([0.1, 0.2, 0.3])
    loss = losses.tightness_loss(weight * made, made, reconstruction)
    expected = -(torch.tanh(torch.full((3,), 0.2) / (1.5 * reconstruction)) * 1.5 * reconstruction).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.item() > 0  # a step against it takes f(f'(z)) further from f'(z)
    far = losses.tightness_loss(100 * made, made, reconstruction)
    assert far.item() == pytest.approx(-0.3, abs=1e-6)  # −1.5 · the mean of the reconstruction's


@pytest.mark.parametrize("name", ["reconstruction_loss", "regression_loss", "denoising_loss"])
def test_plain_distances(name: str) -> None:
    a, b = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert getattr(losses, name)(a, b).item() == 2.0


def test_weights_that_cannot_train_a_projector() -> None:
    with pytest.raises(ValueError, match="0 or more, got idem=-1"):
        LossWeights(idem=-1)
    with pytest.raises(ValueError, match="The identity is the best projector"):
        LossWeights(dmd=0, reg=0, flow=0)
