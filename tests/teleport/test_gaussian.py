"""The closed form against independent computations, and the statistics object around it."""

import copy
import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils import hub_utils
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.core.predictions import flow_level, ve_level, vp_level
from diffusers_ext.teleport import saving as module
from diffusers_ext.teleport.closed_form import (
    Gaussian,
    gaussian_denoiser,
    guided_transport,
    implied_mean,
    transport,
)
from diffusers_ext.teleport.gaussian import GaussianStats

# name -> (level at τ, its derivative, first τ, last τ): written out by hand, apart from the code under test.
PATHS = {
    "ve": (lambda t: (1.0, t), lambda t: (0.0, 1.0), 20.0, 0.05),
    "vp": (
        lambda t: (math.exp(-t), math.sqrt(1 - math.exp(-2 * t))),
        lambda t: (-math.exp(-t), math.exp(-2 * t) / math.sqrt(1 - math.exp(-2 * t))),
        4.0,
        0.01,
    ),
    "flow": (lambda t: (1 - t, t), lambda t: (-1.0, 1.0), 1.0, 0.02),
}


def make_parts(dimension: int = 6, rank: int = 6, seed: int = 0):
    """A random Gaussian in float64: mean, eigenvectors, eigenvalues, residual, and its dense covariance."""
    g = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(dimension, dimension, generator=g, dtype=torch.float64))[0][
        :, :rank
    ]
    values = torch.rand(rank, generator=g, dtype=torch.float64).add(0.1).mul(4).sort(descending=True).values
    mean = torch.randn(dimension, generator=g, dtype=torch.float64)
    residual = 0.07
    eye = torch.eye(dimension, dtype=torch.float64)
    dense = vectors @ values.diag() @ vectors.T + residual * (eye - vectors @ vectors.T)
    return mean, vectors, values, residual, dense


def make_stats(shape=(2, 3), rank=4, seed=0, **changes) -> GaussianStats:
    mean, vectors, values, residual, _ = make_parts(math.prod(shape), rank, seed)
    fields = {
        "mean": mean.reshape(shape),
        "eigenvectors": vectors,
        "eigenvalues": values,
        "residual": residual,
    }
    return GaussianStats(**{**fields, "num_samples": 100, **changes})


def noise(*shape: int, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integrate(x, mean, dense, path, steps):
    """RK4 on dx/dτ = a'·x₀(x) + s'·ε(x), with the conditional means of the exact Gaussian."""
    level, speed, first, last = path
    eye = torch.eye(len(mean), dtype=torch.float64)

    def velocity(tau, x):
        (a, s), (da, ds) = level(tau), speed(tau)
        score = -torch.linalg.solve(a * a * dense + s * s * eye, (x - a * mean).T).T
        # E[x₀|x] = μ − aΣ·score and E[ε|x] = −s·score need no division by a or s.
        clean = mean - a * score @ dense
        return da * clean - ds * s * score

    # Uniform in log τ: the eigenvalues pass by at every scale of the noise.
    grid = torch.linspace(math.log(first), math.log(last), steps + 1, dtype=torch.float64).exp().tolist()
    for t0, t1 in pairwise(grid):
        h, mid = t1 - t0, (t0 + t1) / 2
        k1 = velocity(t0, x)
        k2 = velocity(mid, x + h / 2 * k1)
        k3 = velocity(mid, x + h / 2 * k2)
        k4 = velocity(t1, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize("rank", [6, 3, 0])
@pytest.mark.parametrize("name", PATHS)
def test_transport_solves_the_probability_flow(name, rank):
    mean, vectors, values, residual, dense = make_parts(rank=rank)
    path = PATHS[name]
    start, end = path[0](path[2]), path[0](path[3])
    x = start[0] * mean + 2 * noise(4, 6)
    got = transport(x, mean, vectors, values, residual, start, end)
    # 600 steps leave RK4 an error of up to 5e-10 here, and 16 times less with twice the steps.
    torch.testing.assert_close(got, integrate(x, mean, dense, path, 600), rtol=0, atol=1e-8)


LEVELS = [
    ((1.0, 20.0), (1.0, 0.5)),
    ((0.05, 0.9987), (0.9, 0.436)),
    ((0.0, 1.0), (0.7, 0.3)),
    ((0.0, 1.0), (1.0, 0.0)),
]


@pytest.mark.parametrize(("start", "end"), LEVELS)
def test_there_and_back_is_the_identity(start, end):
    parts = make_parts(rank=3)[:4]
    x = noise(5, 6)
    there = transport(x, *parts, start, end)
    # Gains are at most 40 here, so rounding stays within two digits of float64's 2e-16.
    torch.testing.assert_close(transport(there, *parts, end, start), x, rtol=0, atol=1e-13)


def test_two_legs_are_one_journey():
    parts = make_parts(rank=3)[:4]
    x, a, b, c = noise(5, 6), (1.0, 30.0), (1.0, 4.0), (1.0, 0.1)
    legs = transport(transport(x, *parts, a, b), *parts, b, c)
    torch.testing.assert_close(legs, transport(x, *parts, a, c), rtol=0, atol=1e-13)


def test_staying_at_a_level_moves_nothing():
    parts = make_parts(rank=3)[:4]
    x = noise(5, 6)
    torch.testing.assert_close(transport(x, *parts, (0.6, 0.8), (0.6, 0.8)), x, rtol=0, atol=1e-15)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rank=st.integers(0, 6),
    start=st.sampled_from([level for pair in LEVELS[:3] for level in pair]),
    end=st.sampled_from([level for pair in LEVELS for level in pair]),
)
def test_transport_maps_the_marginal_at_start_to_the_one_at_end(seed, rank, start, end):
    mean, vectors, values, residual, dense = make_parts(rank=rank, seed=seed)
    eye = torch.eye(6, dtype=torch.float64)
    # The map is affine: unit vectors give its matrix, and covariances follow without sampling error.
    offset = transport(0 * eye, mean, vectors, values, residual, start, end)
    matrix = (transport(eye, mean, vectors, values, residual, start, end) - offset).T
    before = start[0] ** 2 * dense + start[1] ** 2 * eye
    after = end[0] ** 2 * dense + end[1] ** 2 * eye
    # Variances reach 400 and the gains 1/20: relative rounding of a few 1e-16 of the intermediate products.
    torch.testing.assert_close(matrix @ before @ matrix.T, after, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(matrix @ (start[0] * mean) + offset[0], end[0] * mean, rtol=1e-11, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), w=st.floats(-3, 8))
def test_transport_is_affine_in_the_mean_so_guidance_is_exact(seed, w):
    one, vectors, values, residual, _ = make_parts(rank=3, seed=seed)
    two, x = noise(6, seed=seed + 1), 10 * noise(3, 6, seed=seed)

    def move(mean):
        return transport(x, mean, vectors, values, residual, (1.0, 15.0), (1.0, 2.0))

    torch.testing.assert_close(
        move(one + w * (two - one)), move(one) + w * (move(two) - move(one)), atol=1e-11, rtol=0
    )


@pytest.mark.parametrize("function", [transport, gaussian_denoiser])
def test_rows_do_not_see_each_other(function):
    _, vectors, values, residual, _ = make_parts(rank=3)
    x, means = noise(5, 6), noise(5, 6, seed=2)
    levels = ((1.0, 15.0), (1.0, 2.0))[: 2 if function is transport else 1]
    whole = function(x, means, vectors, values, residual, *levels)
    rows = [function(x[i : i + 1], means[i], vectors, values, residual, *levels) for i in range(5)]
    # A matrix product of another size may sum in another order: rounding only.
    torch.testing.assert_close(whole, torch.cat(rows), rtol=0, atol=1e-13)


@pytest.mark.parametrize("rank", [6, 3, 0])
@pytest.mark.parametrize("level", [(1.0, 3.0), (0.6, 0.8), (0.0, 1.0), (1.0, 0.0)])
def test_denoiser_is_the_dense_formula(level, rank):
    mean, vectors, values, residual, dense = make_parts(rank=rank)
    a, s = level
    x = noise(4, 6)
    inverse = torch.linalg.inv(a * a * dense + s * s * torch.eye(6, dtype=torch.float64))
    want = mean + (x - a * mean) @ (a * dense @ inverse).T
    got = gaussian_denoiser(x, mean, vectors, values, residual, level)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)  # the inverse loses cond(Σ) ~ 60


@pytest.mark.parametrize("level", [(1.0, 14.6), (0.07, 0.9975), (0.5, 0.5), (0.0, 1.0)])
def test_implied_mean_inverts_the_denoiser(level):
    _, vectors, values, residual, _ = make_parts(rank=3)
    x, means = 5 * noise(4, 6), noise(4, 6, seed=7)
    denoised = gaussian_denoiser(x, means, vectors, values, residual, level)
    got = implied_mean(x, denoised, vectors, values, residual, level)
    torch.testing.assert_close(got, means, rtol=0, atol=5e-12)  # 1 + a²λ/s² is at most 6, |x| about 20


def test_levels():
    assert ve_level(2.5) == (1.0, 2.5)
    assert vp_level(0.36) == pytest.approx((0.6, 0.8))
    assert flow_level(0.25) == (0.75, 0.25)
    assert ve_level(torch.tensor(2.5)) == (1.0, 2.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ve_level(-1.0), "ve_level must be .* got \\(1.0, -1.0\\)"),
        (lambda: vp_level(1.5), "alpha_bar must lie in \\[0, 1\\], got 1.5"),
        (lambda: flow_level(float("nan")), "t must lie in \\[0, 1\\], got nan"),
    ],
)
def test_impossible_levels_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- dtypes and devices ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_methods_return_the_dtype_they_are_given_and_never_compute_in_half(dtype):
    stats = make_stats()
    x = (20 * noise(3, 2, 3)).to(dtype)
    exact = stats.transport(x.double(), ve_level(20), ve_level(3))
    got = stats.transport(x, ve_level(20), ve_level(3))
    assert got.dtype == dtype
    # One rounding of the result to its dtype (float32 arithmetic itself is good to ~1e-6 of |x| ~ 50).
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-5)
    assert stats.denoise(x, ve_level(20)).dtype == dtype
    assert stats.implied_mean(x, x, ve_level(20)).dtype == dtype


def test_pure_functions_answer_in_float32_for_half():
    parts = make_parts(rank=3)[:4]
    assert transport(noise(2, 6).half(), *parts, (1.0, 9.0), (1.0, 1.0)).dtype == torch.float32


def test_autocast_does_not_reach_the_arithmetic():
    stats, x = make_stats(), 20 * noise(3, 2, 3, dtype=torch.float32)
    plain = stats.transport(x, ve_level(20), ve_level(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(stats.transport(x, ve_level(20), ve_level(3)), plain)


def test_inference_mode_leaves_nothing_behind_that_gradients_trip_over():
    stats, x = make_stats(), noise(3, 2, 3)  # float64, so that a copy is made and remembered
    with torch.inference_mode():
        stats.transport(x, ve_level(20), ve_level(3))
    y = x.clone().requires_grad_()
    stats.transport(y, ve_level(20), ve_level(3)).sum().backward()
    assert y.grad is not None
    assert torch.isfinite(y.grad).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tensors_follow_the_state_to_its_device():
    stats, x = make_stats(), 20 * noise(3, 2, 3, dtype=torch.float32)
    here = stats.transport(x, ve_level(20), ve_level(3))
    there = stats.transport(x.cuda(), ve_level(20), ve_level(3))
    assert there.is_cuda
    assert stats.mean.device.type == "cpu"
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=2e-5)


# --- the statistics ---


def test_methods_agree_with_the_functions():
    stats, x, means = make_stats(), noise(3, 2, 3), noise(3, 2, 3, seed=4)
    parts = (stats.eigenvectors, stats.eigenvalues, stats.residual)
    start, end = ve_level(9), ve_level(1)
    want = transport(x.flatten(1), stats.mean.flatten(), *parts, start, end).reshape(x.shape)
    assert torch.equal(stats.transport(x, start, end), want)
    assert torch.equal(stats.transport(x, start, end, mean=stats.mean), want)
    want = transport(x.flatten(1), means.flatten(1), *parts, start, end).reshape(x.shape)
    assert torch.equal(stats.transport(x, start, end, mean=means), want)
    denoised = stats.denoise(x, start, mean=means)
    # The stored eigenvectors are float32, so orthonormal to 1e-7 only, and λ/s² is at most 0.05.
    torch.testing.assert_close(stats.implied_mean(x, denoised, start), means, rtol=0, atol=1e-8)


def test_samples_have_the_moments_asked_for():
    stats = make_stats()
    x = stats.sample(40_000, (0.6, 0.8), torch.Generator().manual_seed(0))
    assert x.shape == (40_000, 2, 3)
    assert x.dtype == torch.float32
    dense = make_parts(6, 4)[4].numpy()
    # Four standard errors: σ/√N for the mean, about √2·σ²/√N for a variance; σ² ≤ 0.36·4.4 + 0.64 = 2.3 here.
    assert np.abs(x.mean(0).numpy() - 0.6 * stats.mean.numpy()).max() < 4 * math.sqrt(2.3 / 40_000)
    covariance = np.cov(x.flatten(1).numpy().T)
    assert np.abs(covariance - 0.36 * dense - 0.64 * np.eye(6)).max() < 4 * 2.3 * math.sqrt(2 / 40_000)
    assert torch.equal(x, stats.sample(40_000, (0.6, 0.8), torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("rank", [0, 1, 3, 4])
def test_truncation_keeps_the_total_variance(rank):
    stats = make_stats()
    cut = stats.truncate(rank)
    assert cut.rank == rank
    assert cut.total_variance == pytest.approx(stats.total_variance, rel=1e-12)
    dropped = float(stats.eigenvalues[rank:].double().sum())
    assert cut.residual == pytest.approx((dropped + 2 * stats.residual) / (6 - rank), rel=1e-12)
    assert torch.equal(cut.eigenvectors, stats.eigenvectors[:, :rank])


def test_isotropic_is_one_variance_everywhere():
    stats = make_stats()
    control = stats.isotropic()
    assert control.rank == 0
    assert control.residual == pytest.approx(stats.total_variance / 6, rel=1e-12)
    assert control.sample(2).shape == (2, 2, 3)


def test_a_full_basis_has_no_complement():
    stats = make_stats(rank=6, residual=0.0)
    x = noise(3, 2, 3)
    back = stats.transport(stats.transport(x, (1.0, 0.0), ve_level(9)), ve_level(9), (1.0, 0.0))
    # The stored eigenvectors are float32, orthonormal to 1e-7, and gains reach 9/√0.4 both ways.
    torch.testing.assert_close(back, x, rtol=0, atol=1e-5)
    assert stats.truncate(6).residual == 0.0


def test_class_means():
    means = torch.arange(18.0).reshape(3, 2, 3)
    stats = make_stats(class_means=means, class_names=["bag", "coat", "shoe"])
    assert torch.equal(stats.class_mean("coat"), means[1:2])
    assert torch.equal(stats.class_mean(["shoe", "bag", "shoe"]), means[[2, 0, 2]])
    with pytest.raises(
        ValueError, match="Unknown class 'hat'; the 3 known classes are 'bag', 'coat', 'shoe'"
    ):
        stats.class_mean(["bag", "hat"])
    with pytest.raises(ValueError, match="no class means: fit them to pairs"):
        make_stats().class_mean("coat")


def test_stats_are_immutable_copyable_and_short_to_print():
    notes = {"sigma": 9.7, "tried": (1, 2)}
    stats = make_stats(calibration=notes)
    notes["sigma"] = 0.0
    assert stats.calibration == {"sigma": 9.7, "tried": [1, 2]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.residual = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    stats.denoise(noise(1, 2, 3), ve_level(1))
    twin = copy.deepcopy(dataclasses.replace(stats, calibration={"sigma": 3.0}))
    assert twin.calibration == {"sigma": 3.0}
    assert torch.equal(twin.eigenvectors, stats.eigenvectors)
    assert len(repr(stats)) < 200


# --- errors ---


def parts_with(**changes):
    mean, vectors, values, residual, _ = make_parts(rank=3)
    arguments = {"x": noise(2, 6), "mean": mean, "eigenvectors": vectors, "eigenvalues": values}
    return {**arguments, "residual": residual, "start": (1.0, 9.0), "end": (1.0, 1.0), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": noise(2, 2, 3)}, "x must be a float tensor \\(batch, dimensions\\), got \\(2, 2, 3\\)"),
        ({"x": torch.zeros(2, 6, dtype=torch.long)}, "x must be a float tensor .* torch.int64"),
        ({"mean": noise(5)}, "mean .* must have shape \\(6,\\) or \\(2, 6\\) like x, got \\(5,\\)"),
        ({"eigenvalues": noise(2)}, "eigenvectors must have shape \\(6, 2\\).* got \\(6, 3\\)"),
        ({"start": (1.0, math.inf)}, "start must be .* got \\(1.0, inf\\)"),
        ({"end": (1.0, -0.1)}, "end must be .* s >= 0 .* got \\(1.0, -0.1\\)"),
        ({"end": (0.0, 0.0)}, "end must be .* not both zero"),
        ({"end": (1.0, 0.1, 0.2)}, "end must be a pair \\(a, s\\)"),
        (
            {"start": (1.0, 0.0), "residual": 0.0},
            "start=\\(1.0, 0.0\\) has no noise .* use a level with s > 0",
        ),
    ],
)
def test_transport_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        transport(**parts_with(**changes))


def test_implied_mean_needs_noise():
    _, vectors, values, residual, _ = make_parts(rank=3)
    with pytest.raises(ValueError, match="needs a level with s > 0"):
        implied_mean(noise(2, 6), noise(2, 6), vectors, values, residual, (1.0, 0.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: s.transport(noise(1, 3, 2), (1, 2), (1, 1)),
            "x has shape \\(1, 3, 2\\), .*\\(2, 3\\).*resolution",
        ),
        (lambda s: s.denoise(noise(2, 3), (1, 2)), "x has shape \\(2, 3\\)"),
        (
            lambda s: s.denoise(noise(4, 2, 3), (1, 2), mean=noise(3, 2, 3)),
            "mean has shape \\(3, 2, 3\\), expected",
        ),
        (lambda s: s.implied_mean(noise(1, 2, 3), noise(2, 2, 3), (1, 2)), "denoised has shape"),
        (lambda s: s.truncate(5), "rank must lie in \\[0, 4\\] .* got 5"),
        (lambda s: s.truncate(-1), "rank must lie in \\[0, 4\\]"),
    ],
)
def test_methods_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_stats())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": torch.tensor(1.0)}, "mean must have at least one dimension"),
        ({"mean": torch.zeros(5)}, "eigenvectors must have shape \\(5, 4\\), got \\(6, 4\\)"),
        ({"mean": torch.full((2, 3), math.nan)}, "mean contains NaN"),
        ({"eigenvalues": torch.tensor([1.0, 2.0, 3.0, 4.0])}, "descending"),
        ({"eigenvalues": torch.tensor([1.0, 0.5, 0.2, -0.1])}, "not negative"),
        ({"eigenvectors": torch.ones(6, 4)}, "columns of length 1"),
        (
            {"eigenvectors": torch.ones(6, 7), "eigenvalues": torch.ones(7)},
            "rank 7 is larger than the 6 dimensions",
        ),
        ({"residual": -1.0}, "residual must be finite and not negative, got -1.0"),
        ({"residual": math.inf}, "residual must be finite"),
        ({"num_samples": -1}, "num_samples must not be negative"),
        ({"class_names": ("a",)}, "must be given together"),
        ({"class_names": ("a", "a"), "class_means": torch.zeros(2, 2, 3)}, "different class_names"),
        ({"class_names": ("a",), "class_means": torch.zeros(2, 2, 3)}, "got \\(2, 2, 3\\) and 1 different"),
        ({"calibration": {"sigma": math.nan}}, "calibration must hold finite JSON values"),
        ({"calibration": {"sigma": torch.ones(1)}}, "calibration must hold finite JSON values"),
    ],
)
def test_fields_that_make_no_gaussian_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_stats(**changes)


# --- files ---


def full_stats() -> GaussianStats:
    return make_stats(
        residual=0.1 + 0.2,  # 0.30000000000000004 shows a lost digit
        class_means=noise(2, 2, 3),
        class_names=("a", "Ångström"),
        calibration={"sigma": 9.7, "grid": [1, 2]},
    )


def assert_same(one: GaussianStats, two: GaussianStats) -> None:
    for field in dataclasses.fields(GaussianStats):
        left, right = getattr(one, field.name), getattr(two, field.name)
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype
            assert torch.equal(left, right), field.name
        elif field.init:
            assert left == right, field.name


@pytest.mark.parametrize("make", [full_stats, make_stats, lambda: make_stats().isotropic()])
def test_saving_is_bit_exact(make, tmp_path):
    stats = make()
    stats.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "gaussian_stats.safetensors",
    ]
    assert_same(stats, GaussianStats.from_pretrained(tmp_path / "new" / "folder"))
    assert_same(stats, GaussianStats.from_pretrained(str(tmp_path / "new"), subfolder="folder"))


@pytest.mark.parametrize("make", [full_stats, make_stats])
def test_arrays_are_bit_exact_and_need_no_pickle(make, tmp_path):
    stats = make()
    np.savez(tmp_path / "stats.npz", **stats.to_dict_of_arrays())
    with np.load(tmp_path / "stats.npz", allow_pickle=False) as arrays:
        assert_same(stats, GaussianStats.from_arrays(arrays))


def test_a_folder_is_read_without_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "hf_hub_download", lambda *args, **kwargs: pytest.fail("network"))
    make_stats().save_pretrained(tmp_path)
    GaussianStats.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"No file .*config\.json: expected config\.json and gaussian_stats"):
        GaussianStats.from_pretrained(tmp_path)


def test_a_hub_repository_is_downloaded_file_by_file(tmp_path, monkeypatch):
    stats = make_stats()
    stats.save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options["subfolder"], options["revision"]))
        return str(tmp_path / filename)

    monkeypatch.setattr(module, "hf_hub_download", download)
    assert_same(stats, GaussianStats.from_pretrained("someone/stats", subfolder="sd", revision="v1"))
    names = ("config.json", "gaussian_stats.safetensors")
    assert asked == [("someone/stats", name, "sd", "v1") for name in names]


def test_what_is_neither_folder_nor_repository_is_named(tmp_path):
    with pytest.raises(OSError, match="'not a/repo/id' is not a local directory"):
        GaussianStats.from_pretrained("not a/repo/id")
    with pytest.raises(OSError, match="'someone/absent' is not a local directory"):
        GaussianStats.from_pretrained("someone/absent", local_files_only=True, cache_dir=tmp_path)


def test_push_to_hub_uploads_what_from_pretrained_reads(tmp_path, monkeypatch):
    stats, uploaded = full_stats(), []

    class Card:
        def save(self, path):
            Path(path).write_text("card")

    def upload(self, working_dir, repo_id, **options):
        uploaded.append(GaussianStats.from_pretrained(working_dir))
        return repo_id

    monkeypatch.setattr(
        hub_utils, "create_repo", lambda repo_id, **options: type("Repo", (), {"repo_id": repo_id})
    )
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(hub_utils, "populate_model_card", lambda card: card)
    monkeypatch.setattr(GaussianStats, "_upload_folder", upload)
    assert stats.push_to_hub("someone/stats") == "someone/stats"
    assert_same(stats, uploaded[0])


def test_pickle_and_variants_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no pickle, no variants"):
        make_stats().save_pretrained(tmp_path, safe_serialization=False)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    stats = make_stats()
    stats.save_pretrained(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        full_stats().save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(stats, GaussianStats.from_pretrained(tmp_path))


def test_damaged_weights_are_refused(tmp_path):
    make_stats().save_pretrained(tmp_path)
    path = tmp_path / "gaussian_stats.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-8]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"gaussian_stats.safetensors .{len(damaged)} bytes. is damaged"):
            GaussianStats.from_pretrained(tmp_path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"is not the file that .*config\.json describes"):
        GaussianStats.from_pretrained(tmp_path)


def test_files_of_two_saves_are_not_mixed(tmp_path):
    make_stats(seed=1).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    make_stats(seed=2).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match="from another save"):
        GaussianStats.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:-10], "config.json: the configuration is not valid JSON"),
        (lambda text: "[1]", "describes 'list', expected 'GaussianStats'"),
        (lambda text: text.replace("GaussianStats", "UNet2DModel"), "describes 'UNet2DModel', expected"),
        (lambda text: text.replace('"residual"', '"rest"'), "lacks \\['residual'\\]"),
        (lambda text: text.replace('"residual": 0.07', '"residual": NaN'), "residual must be finite"),
        (
            lambda text: text.replace('"rank": 4', '"rank": 5'),
            "the configuration says shape \\[2, 3\\], rank 5",
        ),
        (
            lambda text: text.replace('"num_samples": 100', '"num_samples": "x"'),
            "holds no valid GaussianStats",
        ),
    ],
)
def test_damaged_configurations_are_refused(edit, message, tmp_path):
    make_stats().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    edited = edit(path.read_text())
    assert edited != path.read_text()
    path.write_text(edited)
    with pytest.raises(ValueError, match=message):
        GaussianStats.from_pretrained(tmp_path)


def test_calibration_can_be_edited_by_hand(tmp_path):
    make_stats().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "calibration": {"sigma": 5.0}}))
    assert GaussianStats.from_pretrained(tmp_path).calibration == {"sigma": 5.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("config"), "the.npz: no entry 'config'"),
        (lambda a: a.pop("mean"), "the.npz holds .* expected .*'mean'"),
        (lambda a: a.update(extra=a["mean"]), "the.npz holds .*'extra'.* expected"),
        (
            lambda a: a.update(mean=a["mean"] * np.nan),
            "the.npz holds no valid GaussianStats: mean contains NaN",
        ),
    ],
)
def test_wrong_arrays_are_refused(change, message):
    arrays = make_stats().to_dict_of_arrays()
    change(arrays)
    with pytest.raises(ValueError, match=message):
        GaussianStats.from_arrays(arrays, source="the.npz")


# --- guidance: two Gaussians whose covariances do not commute ---


def guided_reference(x, conditional, unconditional, w, path, steps=3000):
    """The guided probability-flow ODE by RK4, in dense float64, apart from the code under test."""
    level, slope, first, last = path
    dense = [_dense(g) for g in (conditional, unconditional)]
    means = [conditional.mean, unconditional.mean]

    def velocity(t, y):
        (a, s), (da, ds) = level(t), slope(t)
        eye = torch.eye(y.shape[1], dtype=y.dtype)
        clean = [
            m + a * torch.linalg.solve(a * a * c + s * s * eye, (y - a * m).T).T @ c
            for m, c in zip(means, dense)
        ]
        guided = clean[1] + w * (clean[0] - clean[1])
        return da * guided + ds * (y - a * guided) / s

    h = (last - first) / steps
    for i in range(steps):
        t = first + i * h
        k1 = velocity(t, x)
        k2 = velocity(t + h / 2, x + h / 2 * k1)
        k3 = velocity(t + h / 2, x + h / 2 * k2)
        k4 = velocity(t + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def _dense(gaussian):
    basis = gaussian.eigenvectors
    excess = (basis * (gaussian.eigenvalues - gaussian.residual)) @ basis.T
    return excess + gaussian.residual * torch.eye(len(basis), dtype=basis.dtype)


def _two_gaussians():
    mean_u, vectors_u, values_u, residual_u = make_parts(6, 3, seed=1)[:4]
    mean_c, vectors_c, values_c, residual_c = make_parts(6, 3, seed=2)[:4]
    return Gaussian(mean_c, vectors_c, values_c / 4, residual_c), Gaussian(
        mean_u, vectors_u, values_u, residual_u
    )


GUIDED_PATHS = {
    "ve": (lambda t: (1.0, t), lambda t: (0.0, 1.0), 15.0, 1.5),
    "flow": (lambda t: (1 - t, t), lambda t: (-1.0, 1.0), 1.0, 0.7),
}


@pytest.mark.parametrize("name", list(GUIDED_PATHS))
@pytest.mark.parametrize("w", [*(pytest.param(w, marks=pytest.mark.slow) for w in (1.5, 3.0)), 7.5])
def test_guided_transport_follows_the_guided_ode(name, w):
    conditional, unconditional = _two_gaussians()
    path = GUIDED_PATHS[name]
    start, end = path[0](path[2]), path[0](path[3])
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * start[1]
    expected = guided_reference(x, conditional, unconditional, w, path)
    moved = guided_transport(x, conditional, unconditional, w, start, end)
    # Splitting error of the default step number; the way travelled is of order 1 to 10.
    assert float((moved - expected).abs().max()) < 5e-3 * float((expected - x).abs().max())


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_guidance_of_zero_and_one_is_one_gaussian_alone(w):
    conditional, unconditional = _two_gaussians()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = transport(x, *(conditional if w else unconditional), (1.0, 10.0), (1.0, 2.0))
    assert torch.equal(guided_transport(x, conditional, unconditional, w, (1.0, 10.0), (1.0, 2.0)), expected)


def test_guidance_between_equal_covariances_only_moves_the_mean():
    conditional, _ = _two_gaussians()
    unconditional = conditional._replace(mean=conditional.mean + 1)
    x = torch.randn(4, 6, dtype=torch.float64) * 10
    guided_mean = unconditional.mean + 3 * (conditional.mean - unconditional.mean)
    expected = transport(x, guided_mean, *conditional[1:], (1.0, 10.0), (1.0, 2.0))
    moved = guided_transport(x, conditional, unconditional, 3.0, (1.0, 10.0), (1.0, 2.0))
    # The two fields commute but are split between two means: a second-order error.
    assert torch.allclose(moved, expected, atol=5e-3)


def test_guidance_between_isotropic_gaussians():
    """Without eigenvectors as with one whose variance is that of all other directions."""
    conditional, unconditional = (
        g._replace(eigenvalues=g.residual * torch.ones(1)) for g in _two_gaussians()
    )
    with_one = [g._replace(eigenvectors=g.eigenvectors[:, :1]) for g in (conditional, unconditional)]
    none = [g._replace(eigenvectors=g.eigenvectors[:, :0], eigenvalues=torch.zeros(0)) for g in with_one]
    x = torch.randn(4, 6, dtype=torch.float64) * 10
    expected = guided_transport(x, *with_one, 3.0, (1.0, 10.0), (1.0, 2.0))
    assert torch.allclose(guided_transport(x, *none, 3.0, (1.0, 10.0), (1.0, 2.0)), expected, atol=1e-10)


def test_guided_transport_refuses():
    conditional, unconditional = _two_gaussians()
    x = torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="guidance_scale must be finite and not negative"):
        guided_transport(x, conditional, unconditional, -1.0, (1.0, 10.0), (1.0, 2.0))
    with pytest.raises(ValueError, match="needs noise at both levels"):
        guided_transport(x, conditional, unconditional, 2.0, (1.0, 10.0), (1.0, 0.0))


def test_labelled_fit_brings_the_unconditional_statistics(tmp_path):
    x = torch.randn(60, 2, 3, generator=torch.Generator().manual_seed(0))
    names = ["a", "b", "c"] * 20
    x = x + torch.tensor([0.0, 3.0, -2.0]).repeat(20)[:, None, None]
    stats = GaussianStats.fit([(x[:35], names[:35]), (x[35:], names[35:])], rank=6)
    plain = GaussianStats.fit([x], rank=6)
    assert stats.unconditional is not None
    assert torch.allclose(stats.unconditional.eigenvalues, plain.eigenvalues, rtol=1e-5)
    assert torch.allclose(stats.unconditional.mean, plain.mean, atol=1e-6)
    assert stats.total_variance < plain.total_variance
    stats.save_pretrained(tmp_path)
    for back in (
        GaussianStats.from_pretrained(tmp_path),
        GaussianStats.from_arrays(stats.to_dict_of_arrays()),
    ):
        assert back.unconditional is not None
        assert torch.equal(back.unconditional.eigenvectors, stats.unconditional.eigenvectors)
        moved = [s.transport(x, (1.0, 9.0), (1.0, 3.0), guidance_scale=2.0) for s in (back, stats)]
        assert torch.equal(*moved)
    with pytest.raises(ValueError, match="needs statistics with an unconditional part"):
        plain.transport(x, (1.0, 9.0), (1.0, 3.0), guidance_scale=2.0)
    with pytest.raises(ValueError, match="unconditional statistics have shape"):
        dataclasses.replace(stats, unconditional=GaussianStats.fit([x.flatten(1)], rank=2))
