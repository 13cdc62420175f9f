"""The closed form: the exact probability flow of Gaussian data, with and without guidance.

A *level* is a pair (a, s) of a noisy state x = a·x₀ + s·ε; see `diffusers_ext.core.predictions`.

If the data are N(μ, Σ), the state is N(aμ, a²Σ + s²I), and the probability-flow ODE scales every
eigendirection of Σ by the ratio of its standard deviations at the two levels (Wang & Vastola, *The
Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models*, TMLR 2024,
arXiv:2412.09726).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..core.predictions import Level, check_level, ve_level

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Gaussian(NamedTuple):
    """N(μ, U diag(λ) Uᵀ + s̄²(I − U Uᵀ)): mean (D,) or (B, D), U (D, r), λ (r,), s̄² ≥ 0."""

    mean: Tensor
    eigenvectors: Tensor
    eigenvalues: Tensor
    residual: float


class GuidedBasis(NamedTuple):
    """(D, q) orthonormal columns that span both Gaussians' eigenvectors, and these in its coordinates (q, r)."""

    columns: Tensor
    conditional: Tensor
    unconditional: Tensor


# --- the closed form ---


def _without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Disables autocast: half precision is too coarse for projections of states with values in the tens."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        x = args[0] if args else kwargs["x"]
        assert isinstance(x, Tensor)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


@_without_autocast
def transport(
    x: Tensor,
    mean: Tensor,
    eigenvectors: Tensor,
    eigenvalues: Tensor,
    residual: float,
    start: Level,
    end: Level,
    power: float = 1.0,
) -> Tensor:
    """Carries `x` from level `start` = (a₀, s₀) to `end` = (a₁, s₁) along the Gaussian's probability flow.

    x₁ = a₁μ + g(s̄²)·d + U[(g(λ) − g(s̄²)) ⊙ Uᵀd], with d = x − a₀μ and g(λ) = √((a₁²λ + s₁²)/(a₀²λ + s₀²)).
    The map is invertible, so `end` may be noisier than `start`.

    Args:
        x: (B, D), any float dtype.
        mean: (D,) or (B, D), in data units.
        eigenvectors: (D, r) with orthonormal columns. r may be 0.
        eigenvalues: (r,) variances along the columns, not negative.
        residual: s̄² ≥ 0, the variance in every direction outside the columns' span (no effect if r = D).
        start, end: levels (a, s).
        power: the exponent of g. A value other than 1 gives the flow of a score that is `power` times the
            Gaussian's. `guided_transport` uses it, for a₀ = a₁ = 1 only.

    Returns:
        (B, D), float64 if `x` is float64, else float32.

    Raises:
        ValueError: wrong shapes, invalid levels, or a direction without variance at `start` (s₀ = 0 and a
            zero eigenvalue or residual), where the flow is singular.

    Source: arXiv:2412.09726 (probability flow of a Gaussian), with the isotropic complement added.
    """
    (a0, s0), (a1, s1) = check_level(start, "start"), check_level(end, "end")
    x, mean, eigenvectors, spectrum = _prepare(x, mean, eigenvectors, eigenvalues, residual)
    variance = _variance(spectrum, a0, s0, "start")
    gain = ((a1 * a1 * spectrum + s1 * s1) / variance) ** (power / 2)
    return a1 * mean + _spectral(x - a0 * mean, eigenvectors, gain)


@_without_autocast
def guided_transport(
    x: Tensor,
    conditional: Gaussian,
    unconditional: Gaussian,
    guidance_scale: float,
    start: Level,
    end: Level,
    basis: GuidedBasis | None = None,
) -> Tensor:
    """`transport` under classifier-free guidance, where the two scores belong to two different Gaussians.

    With D_w = D_u + w(D_c − D_u) the flow in variance-exploding coordinates is dx/d ln σ = (1−w)(x − D_u(x))
    + w(x − D_c(x)). It is linear, but the covariances of all samples and of one prompt's samples do not
    commute. Each of the two terms alone has the closed form `transport(..., power=1−w or w)`. They alternate
    in symmetric (Strang) steps of ln σ, whose error decreases with the square of the number of steps. The
    steps act only on the at most 2r dimensions that the eigenvectors span (`guided_basis`).

    This is our addition; the paper has no conditional case. Guiding the means alone, with one covariance,
    overshoots: the unconditional denoiser follows the sample as σ decreases, so the effect of guidance
    decreases too.

    Args:
        x: (B, D), any float dtype.
        conditional: the Gaussian of the prompt, with a mean (D,) or (B, D).
        unconditional: the Gaussian of all samples.
        guidance_scale: w ≥ 0; 1 is the conditional flow, 0 the unconditional one.
        start, end: levels; both need noise (s > 0).
        basis: the result of `guided_basis` for the two, if available; computing it costs as much as the rest.

    Returns:
        (B, D), float64 if `x` is float64, else float32.

    Raises:
        ValueError: a negative `guidance_scale`, a level without noise, or invalid arguments for `transport`.
    """
    (a0, s0), (a1, s1) = check_level(start, "start"), check_level(end, "end")
    w = float(guidance_scale)
    if not (math.isfinite(w) and w >= 0):
        raise ValueError(f"guidance_scale must be finite and not negative, got {guidance_scale}.")
    if w in (0.0, 1.0):
        return transport(x, *(conditional if w else unconditional), start, end)
    if s0 == 0 or s1 == 0 or a1 == 0:
        raise ValueError(
            f"Guided transport needs noise at both levels and a > 0 at the end, got {start}, {end}."
        )
    if a0 == 0:
        # Pure noise has no finite σ. Far above the scale of the data, guidance acts on the means only.
        both = (unconditional, conditional)
        largest = max([1.0, *(v for g in both for v in (g.residual, *g.eigenvalues[:1].tolist()))])
        far = 1e3 * math.sqrt(largest)
        middle = (1 / math.hypot(1, far), far / math.hypot(1, far))
        mean = unconditional.mean + w * (conditional.mean - unconditional.mean)
        x, (a0, s0) = transport(x, mean, *conditional[1:], start, middle), middle
    basis = guided_basis(conditional, unconditional) if basis is None else basis
    ratio = math.log((s1 / a1) / (s0 / a0))
    steps = max(8, math.ceil(8 * max(w, 1.0) * abs(ratio)))
    sigmas = [s0 / a0 * math.exp(ratio * i / (2 * steps)) for i in range(2 * steps + 1)]
    return a1 * _alternate(x.to(_working_dtype(x)) / a0, conditional, unconditional, w, sigmas, basis)


def guided_basis(conditional: Gaussian, unconditional: Gaussian) -> GuidedBasis:
    """The subspace that `guided_transport` works in; q = min(D, 2r)."""
    both = (conditional.eigenvectors, unconditional.eigenvectors)
    columns = torch.linalg.qr(torch.cat(both, 1)).Q
    return GuidedBasis(columns, *(columns.T @ vectors for vectors in both))


def _alternate(
    y: Tensor,
    conditional: Gaussian,
    unconditional: Gaussian,
    w: float,
    sigmas: list[float],
    basis: GuidedBasis,
) -> Tensor:
    """The Strang steps of `guided_transport`, computed in the coordinates of `basis`.

    Outside this subspace every step multiplies the state by a scalar and adds multiples of the two means, so
    three scalars represent the other D − q dimensions.
    """
    columns, *vectors = (t.to(y) for t in basis)
    parts = [y, *(g.mean.to(y).expand_as(y) for g in (conditional, unconditional))]
    inside = [p @ columns for p in parts]
    outside = [p - q @ columns.T for p, q in zip(parts, inside)]
    flows = [
        (index, Gaussian(inside[index], vectors[index - 1], g.eigenvalues, g.residual), power)
        for index, g, power in ((1, conditional, w), (2, unconditional, 1 - w))
    ]
    z, share = inside[0], [1.0, 0.0, 0.0]
    for i in range(0, len(sigmas) - 1, 2):
        first, middle, last = sigmas[i : i + 3]
        legs = ((flows[1], first, middle), (flows[0], first, last), (flows[1], middle, last))
        for (index, gaussian, power), before, after in legs:
            if columns.shape[1]:  # two isotropic Gaussians span nothing
                z = transport(z, *gaussian, ve_level(before), ve_level(after), power=power)
            variance = (gaussian.residual + after**2) / (gaussian.residual + before**2)
            gain = variance ** (power / 2)
            share = [gain * s for s in share]
            share[index] += 1 - gain
    return z @ columns.T + sum(s * p for s, p in zip(share, outside))


@_without_autocast
def gaussian_denoiser(
    x: Tensor, mean: Tensor, eigenvectors: Tensor, eigenvalues: Tensor, residual: float, level: Level
) -> Tensor:
    """E[x₀ | x] at level (a, s): D(x) = μ + aΣ(a²Σ + s²I)⁻¹(x − aμ).

    Arguments, result and errors are those of `transport`.
    """
    a, s = check_level(level)
    x, mean, eigenvectors, spectrum = _prepare(x, mean, eigenvectors, eigenvalues, residual)
    return mean + _spectral(x - a * mean, eigenvectors, a * spectrum / _variance(spectrum, a, s, "level"))


@_without_autocast
def implied_mean(
    x: Tensor, denoised: Tensor, eigenvectors: Tensor, eigenvalues: Tensor, residual: float, level: Level
) -> Tensor:
    """The mean (B, D) for which `gaussian_denoiser` at `level` maps `x` to `denoised`.

    Solving D = μ + aΣ(a²Σ + s²I)⁻¹(x − aμ) for μ needs no inverse: μ = D + (a/s²) Σ (aD − x). One call of a
    conditional denoiser at high noise thus gives the mean of its prompt. At a = 0 it is the denoised sample
    itself.

    Arguments, result and errors are those of `transport`; `denoised` is (B, D) in data units. Rounding and
    model errors in `denoised` are amplified by 1 + a²λ/s², so choose a level with s²/a² well above the
    largest eigenvalue.

    Raises:
        ValueError: also if s = 0, where the denoiser returns x/a for every mean.
    """
    a, s = check_level(level)
    if s == 0:
        raise ValueError("implied_mean needs a level with s > 0: without noise no mean is implied.")
    x, denoised, eigenvectors, spectrum = _prepare(x, denoised, eigenvectors, eigenvalues, residual)
    return denoised + _spectral(a * denoised - x, eigenvectors, (a / (s * s)) * spectrum)


def _prepare(
    x: Tensor, mean: Tensor, eigenvectors: Tensor, eigenvalues: Tensor, residual: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Checks shapes, converts all to one dtype (float32 or float64), and appends s̄² to λ: (r + 1,)."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a float tensor (batch, dimensions), got {tuple(x.shape)} {x.dtype}.")
    dimension = x.shape[1]
    if tuple(mean.shape) not in ((dimension,), (x.shape[0], dimension)):
        raise ValueError(
            f"The mean (or denoised sample) must have shape ({dimension},) or {tuple(x.shape)} like x, "
            f"got {tuple(mean.shape)}."
        )
    if tuple(eigenvectors.shape) != (dimension, eigenvalues.numel()):
        raise ValueError(
            f"eigenvectors must have shape ({dimension}, {eigenvalues.numel()}): dimensions of x, number of "
            f"eigenvalues; got {tuple(eigenvectors.shape)}."
        )
    dtype = _working_dtype(x)
    mean, eigenvectors, eigenvalues = (
        t.to(device=x.device, dtype=dtype) for t in (mean, eigenvectors, eigenvalues)
    )
    # A full basis has no complement. The last eigenvalue is a placeholder that makes nothing singular.
    rest = eigenvalues[-1:] if eigenvalues.numel() == dimension else eigenvalues.new_tensor([residual])
    return x.to(dtype), mean, eigenvectors, torch.cat([eigenvalues, rest])


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _variance(spectrum: Tensor, a: float, s: float, name: str) -> Tensor:
    """a²λ + s²; ValueError if it is zero. Values are read at s = 0 only, since this waits for the device."""
    variance = a * a * spectrum + s * s
    if s == 0 and bool((variance <= 0).any()):
        raise ValueError(
            f"{name}=({a}, {s}) has no noise and the Gaussian has directions without variance, so a²λ + s² "
            "is 0 there: use a level with s > 0, or statistics with a positive residual and eigenvalues."
        )
    return variance


def _spectral(d: Tensor, eigenvectors: Tensor, factors: Tensor) -> Tensor:
    """f(Σ) d, given f(λ) and, last, f(s̄²): two thin matrix products, 2Dr multiply-adds per sample."""
    rest = factors[-1]
    return rest * d + ((d @ eigenvectors) * (factors[:-1] - rest)) @ eigenvectors.T
