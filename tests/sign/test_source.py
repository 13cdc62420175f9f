"""The Gaussian that samples start from, against its closed form."""

from pathlib import Path

import pytest
import torch

from diffusers_ext.sign.source import GaussianSource

SHAPE = (1, 3, 4)


def data(count: int = 40) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    mixing = torch.randn(3, 12, generator=draw) * torch.tensor([4.0, 2.0, 1.0])[:, None]
    rows = torch.randn(count, 3, generator=draw) @ mixing + 0.01 * torch.randn(count, 12, generator=draw)
    return rows.reshape(count, *SHAPE) + 0.7


def test_its_covariance_is_the_datas_and_the_noises() -> None:
    given, sigma = data(), 2.5
    source = GaussianSource.fit(given, 6)
    # Linear in the noise: the images of a basis are the columns of a square root.
    root = (source(torch.eye(12).reshape(12, *SHAPE), sigma) - source.mean).flatten(1)
    expected = torch.cov(given.flatten(1).T) + sigma**2 * torch.eye(12)
    # The nine directions that are left out have a variance of 1e-4; the largest is of order 1000.
    assert torch.allclose(root.T @ root, expected, atol=1e-2)
    assert torch.allclose(root, root.T, atol=1e-3)
    assert torch.allclose(source.mean, given.mean(0), atol=1e-5)


def test_at_a_high_level_it_is_white_noise() -> None:
    noise = torch.randn(5, *SHAPE)
    found = GaussianSource.fit(data(), 6)(noise, 1e5)
    # (λ + σ²)^½ − σ ≈ λ / 2σ = 0.005, and the mean 0.7.
    assert (found - 1e5 * noise).abs().max() < 1.5


def test_the_same_fit_twice_and_torchs_generator_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = GaussianSource.fit(data(), 6), GaussianSource.fit(data(), 6)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.directions, second.directions)
    assert not any(p.requires_grad for p in first.parameters())


def test_saved_and_loaded(tmp_path: Path) -> None:
    source, noise = GaussianSource.fit(data(), 6), torch.randn(2, *SHAPE)
    source.save_pretrained(tmp_path)
    loaded = GaussianSource.from_pretrained(tmp_path)
    assert torch.equal(loaded(noise, 2.5), source(noise, 2.5))
    half = source.half()(noise.half(), 2.5)
    assert half.dtype == torch.float16
    assert torch.isfinite(half).all()


@pytest.mark.parametrize("rank", [0, 12, 100])
def test_a_rank_beyond_the_data_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and 11 for 40 samples of 12 elements, got {rank}"):
        GaussianSource.fit(data(), rank)
