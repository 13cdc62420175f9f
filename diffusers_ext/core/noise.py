"""Spherical interpolation between noises. Unlike linear interpolation, it preserves their norm."""

from __future__ import annotations

import torch
from torch import Tensor

_PARALLEL = 0.9995


def slerp(a: Tensor, b: Tensor, eta: float | Tensor) -> Tensor:
    """Spherical interpolation: the point at the fraction `eta` of the arc from a to b.

    Args:
        a, b: (B, ...) noises; each row is one vector. Nearly parallel rows are interpolated linearly.
        eta: a fraction in [0, 1], or one per row, (B,).

    Returns:
        (B, ...) in a's dtype. Computed in float64; exactly a at 0 and exactly b at 1.

    Raises:
        ValueError: different shapes, a fraction outside [0, 1], or a row of zeros.
    """
    share = torch.as_tensor(eta, dtype=torch.float64, device=a.device)
    if a.shape != b.shape or a.ndim < 2 or share.ndim > 1 or (share.ndim == 1 and len(share) != len(a)):
        raise ValueError(
            f"Expected two batches of one shape and one eta or one per row, got {tuple(a.shape)},"
            f" {tuple(b.shape)} and {tuple(share.shape)}."
        )
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"eta must lie in [0, 1], got {eta}.")
    x, y = a.double().flatten(1), b.double().flatten(1)
    lengths = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
    if not all(bool((length > 0).all()) for length in lengths):
        raise ValueError("A row of zeros has no direction to interpolate from.")
    cosine = (x / lengths[0] * (y / lengths[1])).sum(1, keepdim=True).clamp(-1, 1)
    share = share.reshape(-1, 1).expand_as(cosine)
    angle = cosine.acos()
    straight = cosine.abs() > _PARALLEL
    sine = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / sine)
    second = torch.where(straight, share, (share * angle).sin() / sine)
    point = (first * x + second * y).reshape(a.shape).to(a.dtype)
    ends = share.reshape(-1, *[1] * (a.ndim - 1))
    return torch.where(ends == 0, a, torch.where(ends == 1, b, point))


def noise_path(ends: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
    """Noises at equal steps along the arc between two noises, and their fractions of the arc.

    Args:
        ends: (2, ...), the first and the last noise.
        num_frames: number of noises including both ends, 2 or more.

    Returns:
        (num_frames, ...) noises, and (num_frames,) float64 fractions from 0 to 1.
    """
    shares = torch.linspace(0, 1, num_frames, dtype=torch.float64, device=ends.device)
    first, last = (end[None].expand(num_frames, *end.shape) for end in ends)
    return slerp(first, last, shares), shares
