"""The Gaussian that a denoiser's responses imply: the maths of `GaussianStats.from_score`.

The denoiser of N(μ, Σ) at the noise-to-signal ratio σ is D(x) = μ + J(x − μ), with J = Σ(Σ + σ²I)⁻¹. Two states b ± σw
about a base b therefore give

    [D(b + σw) − D(b − σw)] / 2σ = Jw = y,     [D(b + σw) + D(b − σw)] / 2 − b = (I − J)(μ − b).

The first is equivalent to y = Σ(w − y)/σ², which is linear in Σ, and in which pairs of different levels can be pooled:
Σ is fitted by least squares, as a symmetric matrix of low rank plus a multiple of the identity. The second gives the
mean, μ = b + (I + Σ/σ²)(even part − b).

For any data, not only Gaussian ones, the least-squares fit of D(x) to x ~ p_σ is Σ(Σ + σ²I)⁻¹ with the data's own Σ,
because D(x) = E[x₀ | x]. So w is drawn such that b ± σw are samples of N(μ, Σ + σ²I), as far as μ and Σ are known yet,
and all directions are excited at once. Steps along single directions, with which a Jacobian is usually measured, leave
the region that the network was trained on or see the roughness of its error there: at equal calls their error in the
leading directions is two to four times as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_REFITS = 6
# Pairs for each direction of the subspace that is searched for eigenvectors.
_PAIRS_PER_DIRECTION = 6


class Pairs(NamedTuple):
    """The responses to n pairs of opposite steps about a base, at one level.

    Attributes:
        sigma: the noise-to-signal ratio σ of the level.
        base: (D,) b.
        steps: (n, D) w.
        odd: (n, D) y.
        even: (n, D) the even part less b.
        prompts: index of the prompt of each pair.
    """

    sigma: float
    base: Tensor
    steps: Tensor
    odd: Tensor
    even: Tensor
    prompts: tuple[int, ...]

    def choose(self, rows: slice) -> Pairs:
        """Some of the pairs."""
        parts = (part[rows] for part in self[2:])
        return Pairs(self.sigma, self.base, *parts)  # type: ignore[arg-type]


class Covariance(NamedTuple):
    """U diag(λ) Uᵀ + s̄²(I − U Uᵀ): U (D, r), λ (r,) descending, s̄²."""

    vectors: Tensor
    values: Tensor
    residual: float

    def apply(self, rows: Tensor, gain: Tensor) -> Tensor:
        """(n, D) `rows` times f(Σ), given f(λ) and, last, f(s̄²)."""
        rest = gain[-1]
        return rest * rows + ((rows @ self.vectors) * (gain[:-1] - rest)) @ self.vectors.T

    @property
    def spectrum(self) -> Tensor:
        """(r + 1,) λ and s̄²."""
        return torch.cat([self.values, self.values.new_tensor([self.residual])])


def isotropic(dimension: int, variance: float) -> Covariance:
    """A multiple of the identity."""
    return Covariance(torch.zeros(dimension, 0), torch.zeros(0), variance)


def steps_of(noise: Tensor, covariance: Covariance, sigma: float) -> Tensor:
    """(n, D) w such that σw has the covariance Σ + σ²I, from white noise."""
    return covariance.apply(noise, (covariance.spectrum / sigma**2 + 1).sqrt())


# --- the fit ---


def fit_covariance(pairs: Sequence[Pairs], rank: int) -> Covariance:
    """Σ from all pairs.

    The eigenvectors are searched in the span of the leading singular vectors of the responses. The error of the network
    adds symmetric noise to the fit, whose eigenvalues lie between −e and e; a covariance has none below s̄², so the most
    negative excess over s̄² tells e. An excess l is kept if it is larger than e, as √(l² − e²): the shrinkage that is
    optimal in the Frobenius norm for a matrix of low rank in such noise (the semicircle law; Donoho, Gavish and
    Johnstone, arXiv:1311.0851, treat the case of sample covariances).
    """
    target = torch.cat([group.odd for group in pairs])
    given = torch.cat([(group.steps - group.odd) / group.sigma**2 for group in pairs])
    count, dimension = target.shape
    size = max(1, min(dimension, count // _PAIRS_PER_DIRECTION))
    residual = _ratio(given, target)
    vectors, excess = target.new_zeros(dimension, 0), target.new_zeros(0)
    for _ in range(_REFITS):
        left = target - residual * given
        vectors, excess = _eigenpairs(left, given, size)
        edge = max(-float(excess[-1]), 1e-6 * float(excess[0]), 0.0)
        kept = (excess > edge) & (torch.arange(len(excess)) < rank)
        vectors, excess = vectors[:, kept], (excess[kept] ** 2 - edge**2).sqrt()
        outside = [rows - (rows @ vectors) @ vectors.T for rows in (given, target)]
        residual = max(_ratio(*outside), 0.0) if vectors.shape[1] < dimension else residual
    # The excess is that over the residual of the round before, which has converged.
    return Covariance(vectors, excess + residual, residual)


def squared_response(pairs: Pairs) -> float:
    """An estimate of tr J² that the error of the network does not add to, from products of different pairs."""
    cross = (pairs.steps @ pairs.odd.T).double()  # wᵢᵀ J wⱼ
    products = cross * cross.T
    count = len(cross)
    return float(products.sum() - products.trace()) / (count * (count - 1))


def top_response(pairs: Pairs) -> float:
    """The largest eigenvalue of J, which is below 1 for any data."""
    size = max(1, min(pairs.odd.shape[1], len(pairs.odd) // _PAIRS_PER_DIRECTION))
    return float(_eigenpairs(pairs.odd, pairs.steps, size)[1][0])


def _ratio(given: Tensor, target: Tensor) -> float:
    square = float((given * given).sum(dtype=torch.float64))
    return float((given * target).sum(dtype=torch.float64)) / square if square else 0.0


def _eigenpairs(target: Tensor, given: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors (D, size) and eigenvalues, descending, of the symmetric A with `target` ≈ `given` A."""
    gram = (target @ target.T).double()
    values, left = torch.linalg.eigh(gram)
    left = left.flip(1)[:, :size] * values.flip(0)[:size].clamp(min=1e-30).rsqrt()
    basis = torch.linalg.qr(target.T @ left.to(target)).Q
    a, b = (given @ basis).double(), (target @ basis).double()
    # The normal equations of a symmetric A, S A + A S = C + Cᵀ, are diagonal in the eigenbasis of S.
    weight, turn = torch.linalg.eigh(a.T @ a)
    right = turn.T @ (a.T @ b + b.T @ a) @ turn
    sums = (weight[:, None] + weight[None]).clamp(min=1e-12 * float(weight[-1].clamp(min=1e-30)))
    found, rotation = torch.linalg.eigh(turn @ (right / sums) @ turn.T)
    return basis @ rotation.flip(1).to(basis), found.flip(0).to(basis)


def implied_means(pairs: Pairs, covariance: Covariance) -> Tensor:
    """(n, D) the mean that each pair implies."""
    return pairs.base + covariance.apply(pairs.even, covariance.spectrum / pairs.sigma**2 + 1)


def with_means(within: Covariance, pairs: Sequence[Pairs], rank: int) -> Covariance:
    """The covariance of all samples: that within prompts, and that of the prompts' means.

    What the pairs imply as means of their prompts has the error of the network besides. It is the same as that of the
    odd parts, whose covariance about their own fit is subtracted.
    """
    means, errors = [], []
    for group in pairs:
        gain = within.spectrum / group.sigma**2 + 1
        means.append(implied_means(group, within))
        errors.append(within.apply(group.sigma * (group.odd - _predicted(group, within)), gain))
    between, error = torch.cat(means), torch.cat(errors)
    between = between - between.mean(0)
    scale = (len(between) - 1) ** -0.5
    between, error = between * scale, error * scale
    left = torch.linalg.eigh((between @ between.T).double()).eigenvectors
    size = max(1, min(between.shape[1] - within.vectors.shape[1], len(between) // _PAIRS_PER_DIRECTION))
    leading = between.T @ left.flip(1)[:, :size].to(between)
    basis = torch.linalg.qr(torch.cat([within.vectors, leading], 1)).Q
    inside, noise = between @ basis, error @ basis
    core = basis.T @ within.apply(basis.T, within.spectrum).T + inside.T @ inside - noise.T @ noise
    found, turn = torch.linalg.eigh(core.double())
    found, turn = found.flip(0).to(between), turn.flip(1).to(between)
    # What is outside of the basis, and inside of it below the residual, is spread evenly.
    dimension, residual = len(basis), within.residual
    kept = found > max(residual, 1e-6 * float(found[0]))
    kept[rank:] = False
    outside = [rows.square().sum() - (rows @ basis).square().sum() for rows in (between, error)]
    rest = (
        float(outside[0] - outside[1]) + residual * (dimension - basis.shape[1]) + float(found[~kept].sum())
    )
    remaining = dimension - int(kept.sum())
    return Covariance(basis @ turn[:, kept], found[kept], max(rest / remaining, 0.0) if remaining else 0.0)


# --- agreement ---


def unexplained(pairs: Pairs, covariance: Covariance) -> float:
    """The share of the squared responses that the covariance, fitted to other pairs, does not predict."""
    left = pairs.odd - _predicted(pairs, covariance)
    return float(left.square().sum() / pairs.odd.square().sum().clamp(min=1e-30))


def _predicted(pairs: Pairs, covariance: Covariance) -> Tensor:
    spectrum = covariance.spectrum
    return covariance.apply(pairs.steps, spectrum / (spectrum + pairs.sigma**2))


def halves(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """Every other pair, and the rest."""
    return pairs.choose(slice(0, None, 2)), pairs.choose(slice(1, None, 2))


def relative_difference(one: Covariance, other: Covariance) -> float:
    """‖Σ₁ − Σ₂‖ / ‖Σ₁ + Σ₂‖: the relative standard error of the mean of two independent fits."""
    basis = torch.linalg.qr(torch.cat([one.vectors, other.vectors], 1)).Q
    inside = [basis.T @ c.apply(basis.T, c.spectrum).T for c in (one, other)]
    outside = len(basis) - basis.shape[1]
    norms = [
        float((inside[0] + sign * inside[1]).square().sum())
        + outside * (one.residual + sign * other.residual) ** 2
        for sign in (-1, 1)
    ]
    return (norms[0] / norms[1]) ** 0.5 if norms[1] else 0.0
