"""The losses against cases that can be solved by hand."""

import math

import pytest
import torch
from torch import Tensor

from diffusers_ext.sign import objective as losses
from diffusers_ext.sign.objective import LossWeights

MU, S = 0.3, 0.5  # the data are N(MU, S²)


def denoiser(mean: float | Tensor, std: float | Tensor, noisy: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[x | αx + σε] of N(mean, std²)."""
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (noisy - alpha * mean)


def score_loss(name: str, made: Tensor, real: Tensor, fake: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The candidates as the training calls them; `sid` with the weight 1, whose gradient has a closed form."""
    if name.startswith("sid"):
        return losses.score_identity_loss(made, real, fake, torch.ones_like(alpha), float(name[4:]))
    weight = losses.level_weight(alpha, sigma) if name == "dmd" else losses.row_weight(made, real)
    return losses.distribution_matching_loss(made, real, fake, weight)


def absolute_mean(mean: float, std: float) -> float:
    """E|x| of N(mean, std²)."""
    return std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2)) + mean * math.erf(
        mean / (std * math.sqrt(2))
    )


def expected_gradient(name: str, m: float, g: float, alpha: float, sigma: float) -> tuple[float, float]:
    """Of the mean loss in the generator's mean and spread, if both denoisers are exact and have constant weights."""
    real, fake = (alpha * std**2 / (alpha**2 * std**2 + sigma**2) for std in (S, g))
    rest = 1 - alpha * real
    if not name.startswith("sid"):
        # E[D_fake − D_real] and E[z(D_fake − D_real)].
        found = rest * (m - MU), alpha * g * (fake - real)
        weight = alpha / sigma
        if name == "dmd_l1":
            weight = 1 / absolute_mean(rest * (m - MU), math.hypot(rest * g, real * sigma))
        return weight * found[0], weight * found[1]
    # D_real − D_fake = A + B x_t and D_real − x = C + K x_t − x, by the moments of x and x_t.
    a, b, c = MU * rest - m * (1 - alpha * fake), real - fake, MU * rest
    mean, std = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (m, g))
    center, spread = alpha * mean, alpha**2 * std**2 + sigma**2
    product = (a + b * center) * (c + real * center - mean) + b * (real * spread - alpha * std**2)
    square = (a + b * center) ** 2 + b**2 * spread
    first, second = torch.autograd.grad(product - float(name[4:]) * square, (mean, std))
    return float(first), float(second)


CANDIDATES = ("dmd", "dmd_l1", "sid-1.0", "sid-1.2")


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize(("m", "g"), [(0.8, 0.5), (-0.4, 0.5), (0.3, 1.2), (0.3, 0.2), (0.9, 0.9)])
def test_the_gradient_of_two_gaussians(name: str, m: float, g: float) -> None:
    """A generator m + g·z, both denoisers exact: the gradients in m and g have closed forms."""
    draw = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(64, 4096, generator=draw, dtype=torch.float64) for _ in range(2))
    mean, std = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (m, g))
    made = mean + std * z
    for alpha, sigma in ((0.8, 0.6), (0.3, 0.7)):  # of a noise schedule and of a flow
        mean.grad = std.grad = None
        noisy = alpha * made + sigma * noise
        real, fake = denoiser(MU, S, noisy, alpha, sigma), denoiser(m, g, noisy, alpha, sigma)
        levels = torch.full((64, 1), alpha, dtype=torch.float64), torch.full((64, 1), sigma)
        score_loss(name, made, real, fake, *levels).backward(retain_graph=True)
        expected = expected_gradient(name, m, g, alpha, sigma)
        assert mean.grad is not None
        assert std.grad is not None
        # 262,144 draws of about unit variance: three standard errors are .006.
        assert float(mean.grad) == pytest.approx(expected[0], abs=0.01)
        assert float(std.grad) == pytest.approx(expected[1], abs=0.01)
        # Descending brings the generator nearer, in mean and in spread.
        assert expected[0] * (m - MU) >= -1e-9
        assert abs(expected[1]) < 1e-9 or name.startswith("sid") or (expected[1] > 0) == (g > S)


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("start", [0.1, 1.5])
def test_it_finds_the_variance_from_both_sides(name: str, start: float) -> None:
    draw = torch.Generator().manual_seed(1)
    mean, std = (torch.tensor(x, requires_grad=True) for x in (1.0, start))
    optimizer = torch.optim.Adam([mean, std], lr=0.03, betas=(0.0, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        made = mean + std * torch.randn(32, 64, generator=draw)
        alpha, sigma = 0.8, 0.6
        noisy = alpha * made + sigma * torch.randn(32, 64, generator=draw)
        real = denoiser(MU, S, noisy, alpha, sigma)
        fake = denoiser(mean.detach(), std.detach(), noisy, alpha, sigma)
        optimizer.zero_grad()
        levels = torch.full((32, 1), alpha), torch.full((32, 1), sigma)
        score_loss(name, made, real, fake, *levels).backward()
        optimizer.step()
        schedule.step()
    # The gradient of 2,048 draws has a spread, and Adam makes steps of its size, that end with the schedule.
    assert float(mean) == pytest.approx(MU, abs=0.03)
    assert abs(float(std)) == pytest.approx(S, abs=0.03)


def test_the_level_weight_gives_noise_predictions() -> None:
    made = torch.randn(2, 1, 3, 3, requires_grad=True)
    noises = torch.randn(2, 2, 1, 3, 3)
    alpha, sigma = torch.tensor([0.9, 0.4]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.6]).reshape(2, 1, 1, 1)
    noisy = torch.randn(2, 1, 3, 3)
    real, fake = ((noisy - sigma * noise) / alpha for noise in noises)
    weight = losses.level_weight(alpha, sigma)
    losses.distribution_matching_loss(made, real, fake, weight).backward()
    assert made.grad is not None
    assert torch.allclose(made.grad, (noises[0] - noises[1]) / made.numel(), atol=1e-6)


@pytest.mark.parametrize("name", CANDIDATES)
def test_scores_that_agree_give_no_gradient(name: str) -> None:
    made = torch.randn(3, 1, 4, 4, requires_grad=True)
    other = torch.randn(3, 1, 4, 4) + 0.5 * made
    level = torch.ones(3, 1, 1, 1)
    score_loss(name, made, other, other, level, level).backward()
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
        LossWeights(dmd=0)
