"""The streaming fit against numpy on all samples at once."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.teleport.fit import fit_moments
from diffusers_ext.teleport.gaussian import GaussianStats


def power_law(samples: int, dimension: int, power: float, seed: int = 0, offset: float = 3.0) -> torch.Tensor:
    """Samples of a Gaussian with variances k^(−power), rotated by a reflection, far from the origin."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, dimension + 1, dtype=torch.float32).pow(-power / 2)
    x = torch.randn(samples, dimension, generator=g) * scales
    mirror = torch.randn(dimension, generator=g)
    mirror /= mirror.norm()
    return x - 2 * (x @ mirror)[:, None] * mirror + offset


def top(covariance: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(covariance)
    return values[::-1][:rank].copy(), vectors[:, ::-1][:, :rank].copy()


def assert_fits(stats: GaussianStats, covariance: np.ndarray, rtol: float = 1e-6) -> None:
    """The kept eigenpairs and the residual are those of `covariance` (float32 storage: 6e-8 relative)."""
    values, _ = top(covariance, stats.rank)
    np.testing.assert_allclose(stats.eigenvalues.numpy(), values, rtol=rtol)
    u = stats.eigenvectors.double().numpy()
    np.testing.assert_allclose(u.T @ u, np.eye(stats.rank), atol=1e-5)
    # A dense product rather than vectors side by side: those of close eigenvalues may turn among themselves.
    np.testing.assert_allclose(covariance @ u, u * values, atol=max(rtol, 1e-5) * values[0])
    assert stats.total_variance == pytest.approx(np.trace(covariance), rel=1e-6)


def test_small_dimensions_are_exact():
    x = power_law(200, 24, 1.0).reshape(200, 2, 3, 4)
    stats = GaussianStats.fit(x.split(37), rank=10)
    assert stats.shape == (2, 3, 4)
    assert stats.num_samples == 200
    np.testing.assert_allclose(stats.mean.numpy(), x.double().mean(0).numpy(), rtol=1e-6)
    assert_fits(stats, np.cov(x.flatten(1).double().numpy().T))


def test_full_rank_leaves_nothing_over():
    x = power_law(200, 12, 1.0)
    stats = GaussianStats.fit([x], rank=12)
    assert stats.residual == 0.0
    assert_fits(stats, np.cov(x.double().numpy().T))


@pytest.mark.parametrize("exact_up_to", [0, 4096])
def test_fewer_samples_than_dimensions(exact_up_to):
    """Rank N − 1 is all there is; the low-rank path is exact too while nothing has been cut."""
    x = power_law(20, 64, 1.0)
    moments = fit_moments(x.split(7), 19, exact_up_to=exact_up_to)[0]
    stats = GaussianStats(**moments._asdict())
    # Float32 rows: their rounding is 1e-7 of the largest, so ~1e-5 of the smallest eigenvalue.
    assert_fits(stats, np.cov(x.double().numpy().T), rtol=1e-4)
    assert stats.residual < 1e-6


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=8), exact_up_to=st.sampled_from([0, 4096]))
def test_how_samples_are_cut_into_batches_does_not_matter(cuts, exact_up_to):
    x = power_law(300, 40, 1.0)
    bounds = sorted({0, *cuts, 300})
    ragged = (x[i:j] for i, j in pairwise(bounds))
    whole, split = (
        fit_moments([x], 5, exact_up_to=exact_up_to)[0],
        fit_moments(ragged, 5, exact_up_to=exact_up_to)[0],
    )
    # Equal to the last bit, since batches are regrouped into the same blocks.
    assert torch.equal(whole.mean, split.mean)
    assert torch.equal(whole.eigenvectors, split.eigenvectors)
    assert torch.equal(whole.eigenvalues, split.eigenvalues)
    assert whole.residual == split.residual


def test_the_order_of_samples_hardly_matters():
    x = power_law(300, 40, 1.0)
    one, two = GaussianStats.fit([x], rank=5), GaussianStats.fit([x.flip(0)], rank=5)
    torch.testing.assert_close(one.eigenvalues, two.eigenvalues, rtol=1e-6, atol=0)
    torch.testing.assert_close(one.eigenvectors, two.eigenvectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("power", "rtol"), [(1.0, 0.01), (2.0, 0.001)])
def test_large_dimensions_are_close_to_exact(power, rtol):
    samples, dimension, rank = 1200, 4096, 32
    x = power_law(samples, dimension, power)
    stats = GaussianStats.fit(x.split(100), rank=rank)
    centred = (x.double() - x.double().mean(0)).numpy()
    values = np.linalg.eigvalsh(centred @ centred.T / (samples - 1))[::-1]
    error = stats.eigenvalues.numpy() / values[:rank] - 1
    # What is cut lowers the eigenvalues, and 64 rows beyond the rank (the default) keep that under 1%.
    assert error.max() < 1e-5
    assert error.min() > -rtol
    assert stats.total_variance == pytest.approx(values.sum(), rel=1e-6)
    u = stats.eigenvectors.double().numpy()
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-5)
    captured = np.linalg.norm(centred @ u) ** 2 / (samples - 1)
    assert captured > (1 - rtol) * values[:rank].sum()


def test_more_oversampling_is_more_exact():
    x = power_law(1200, 512, 0.7)
    exact = fit_moments([x], 16)[0].eigenvalues
    errors = [
        float((fit_moments([x], 16, oversampling=n, exact_up_to=0)[0].eigenvalues / exact - 1).abs().max())
        for n in (0, 16, 128, 512)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5  # all rows kept: exact up to float32


def test_data_in_a_subspace():
    """Directions without variance get eigenvalue 0 and still an orthonormal basis."""
    x = power_law(100, 3, 1.0) @ torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for exact_up_to in (0, 4096):
        stats = GaussianStats(**fit_moments([x], 10, exact_up_to=exact_up_to)[0]._asdict())
        assert stats.eigenvalues[3:].max() < 1e-6 * stats.eigenvalues[0]
        gram = stats.eigenvectors.T @ stats.eigenvectors
        torch.testing.assert_close(gram, torch.eye(10), rtol=0, atol=1e-5)


def test_a_large_offset_costs_no_precision():
    x = power_law(400, 16, 1.0, offset=1000.0).double()
    stats = GaussianStats.fit([x], rank=4)
    assert_fits(stats, np.cov(x.numpy().T))


# --- labels ---


def labelled(samples: int, dimension: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 3, (samples,), generator=g)
    centres = 5 * torch.randn(3, dimension, generator=g)
    return power_law(samples, dimension, 1.0, seed) + centres[index], [
        ("bag", "coat", "shoe")[i] for i in index
    ]


def pooled(x: torch.Tensor, names: list[str]) -> np.ndarray:
    """Within-class covariance, directly."""
    rows = x.double().numpy()
    labels = np.array(names)
    centred = np.concatenate([rows[labels == n] - rows[labels == n].mean(0) for n in np.unique(labels)])
    return centred.T @ centred / (len(rows) - len(np.unique(labels)))


@pytest.mark.parametrize("exact_up_to", [0, 4096])
def test_labels_give_the_pooled_within_class_covariance(exact_up_to):
    x, names = labelled(500, 32)
    batches = ((x[i : i + 70], names[i : i + 70]) for i in range(0, 500, 70))
    # With all 32 dimensions kept as rows nothing is cut, so the low-rank path must be exact as well.
    stats = GaussianStats(**fit_moments(batches, 8, exact_up_to=exact_up_to)[0]._asdict())
    assert_fits(stats, pooled(x, names), rtol=1e-5)
    assert stats.class_names is not None
    assert sorted(stats.class_names) == ["bag", "coat", "shoe"]
    for name in stats.class_names:
        want = x[torch.tensor([n == name for n in names])].double().mean(0).float()
        torch.testing.assert_close(stats.class_mean(name)[0], want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.mean, x.double().mean(0).float(), rtol=1e-6, atol=1e-6)


def test_labels_with_large_dimensions_and_many_classes():
    samples, dimension, rank = 900, 2500, 12
    x = power_law(samples, dimension, 1.5)
    ids = torch.arange(samples) % 150
    x = x + 3 * torch.randn(150, dimension, generator=torch.Generator().manual_seed(5))[ids]
    stats = GaussianStats.fit([(x[:400], ids[:400]), (x[400:], ids[400:])], rank=rank)
    covariance = pooled(x, [str(int(i)) for i in ids])
    assert stats.total_variance == pytest.approx(np.trace(covariance), rel=1e-5)
    values = np.linalg.svd(
        np.concatenate(
            [x[ids == k].double().numpy() - x[ids == k].double().numpy().mean(0) for k in range(150)]
        ),
        compute_uv=False,
    )[:rank] ** 2 / (samples - 150)
    np.testing.assert_allclose(stats.eigenvalues.numpy(), values, rtol=0.01)
    assert torch.allclose(stats.class_mean("7")[0], x[ids == 7].mean(0), atol=1e-5)


# --- inputs ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_taken(dtype):
    x = power_law(100, 8, 1.0).to(dtype)
    stats = GaussianStats.fit([x], rank=3)
    assert stats.mean.dtype == torch.float32
    assert_fits(stats, np.cov(x.double().numpy().T))


def test_one_tensor_a_loader_and_a_reused_buffer():
    x = power_law(100, 8, 1.0)
    want = GaussianStats.fit([x], rank=3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=9)

    def reuse():
        buffer = torch.empty(10, 8)
        for part in x.split(10):
            yield buffer.copy_(part)

    for batches in (x, loader, reuse(), [x[:50], x[:0], x[50:]]):
        got = GaussianStats.fit(batches, rank=3)
        assert torch.equal(got.eigenvectors, want.eigenvectors)


def test_samples_that_carry_gradients_leave_none():
    stats = GaussianStats.fit([power_law(50, 8, 1.0).requires_grad_()], rank=3)
    assert not stats.eigenvectors.requires_grad


def test_rank_zero_is_isotropic():
    x = power_law(50, 8, 1.0)
    for exact_up_to in (0, 4096):
        moments = fit_moments([x], 0, exact_up_to=exact_up_to)[0]
        assert moments.eigenvectors.shape == (8, 0)
        assert moments.residual == pytest.approx(np.trace(np.cov(x.double().numpy().T)) / 8, rel=1e-6)


def bad(value: float) -> torch.Tensor:
    x = torch.randn(4, 8)
    x[2, 3] = value
    return x


GOOD = torch.randn(10, 8)


@pytest.mark.parametrize(
    ("batches", "rank", "message"),
    [
        ([], 2, "the iterable of batches is empty"),
        ([GOOD[:0]], 2, "the iterable of batches is empty"),
        ([GOOD[:1]], 0, "at least 2 samples .* got 1"),
        ([GOOD], 9, "rank=9 is larger than the 8 dimensions .* pass rank=8 or less"),
        ([GOOD[:4]], 4, "rank=4 is larger than the 3 degrees of freedom of 4 samples: pass rank=3 or less"),
        ([GOOD], -1, "must be at least 0, got rank=-1"),
        ([GOOD, GOOD[:, :7]], 2, "Batch 1 has samples of shape \\(7,\\), .* \\(8,\\)"),
        ([GOOD, bad(float("nan"))], 2, "Batch 1 contains NaN or infinite values"),
        ([bad(float("inf"))], 2, "Batch 0 contains NaN or infinite values"),
        ([(GOOD * 100).byte()], 2, "Batch 0 has dtype torch.uint8: pass floating point"),
        ([GOOD[0]], 2, "Batch 0 must have shape \\(batch, \\*shape\\), got \\(8,\\)"),
        ([GOOD.numpy()], 2, "Batch 0 must be a tensor .* got ndarray"),
        ([(GOOD, ["a"] * 9)], 2, "Batch 0 has 10 samples and needs as many label names"),
        ([(GOOD[:3], "abc")], 2, "Batch 0 has 3 samples and needs as many label names, got 'abc'"),
        ([GOOD, (GOOD, ["a"] * 10)], 2, "Batch 1: either every batch or none must come with labels"),
        ([(GOOD, ["a"] * 10), GOOD], 2, "Batch 1: either every batch or none must come with labels"),
        (
            [(GOOD[:4], ["a", "b", "a", "b"])],
            3,
            "rank=3 is larger than the 2 degrees of freedom .* 2 classes",
        ),
        ([(GOOD[:2], ["a", "b"])], 0, "at least 2 samples .* got 2 in 2 classes"),
    ],
)
def test_fit_refuses(batches, rank, message):
    with pytest.raises(ValueError, match=message):
        GaussianStats.fit(batches, rank=rank)


def test_a_used_up_generator_is_named():
    batches = (x for x in [GOOD])
    GaussianStats.fit(batches, rank=2)
    with pytest.raises(ValueError, match="an already used generator"):
        GaussianStats.fit(batches, rank=2)
