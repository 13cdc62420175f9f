"""Spherical interpolation between noises: its midpoint has the length of its ends, that of a straight line does not."""

from __future__ import annotations

import torch
from torch import Tensor

_PARALLEL = 0.9995


def slerp(a: Tensor, b: Tensor, eta: float | Tensor) -> Tensor:
    """The point at share `eta` of the arc from a to b.

    Args:
        a, b: (B, ...) noises; each row is one vector. Nearly parallel rows are interpolated in a straight line.
        eta: a share in [0, 1], or (B,) of them.

    Returns:
        (B, ...) in a's dtype; computed in float64, and exactly a at 0 and b at 1.

    Raises:
        ValueError: shapes that differ, a share outside [0, 1], or a row of zeros.
    """
    share = torch.as_tensor(eta, dtype=torch.float64, device=a.device)
    if a.shape != b.shape or a.ndim < 2 or share.ndim > 1 or (share.ndim == 1 and len(share) != len(a)):
        raise ValueError(
            f"Expected two batches of one shape and one share or one a row, got {tuple(a.shape)},"
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
    """Noises at equal steps of the arc between two, and their shares.

    Args:
        ends: (2, ...) the first and the last noise.
        num_frames: noises, 2 or more, both ends included.

    Returns:
        (num_frames, ...) and (num_frames,) float64 from 0 to 1.
    """
    shares = torch.linspace(0, 1, num_frames, dtype=torch.float64, device=ends.device)
    first, last = (end[None].expand(num_frames, *end.shape) for end in ends)
    return slerp(first, last, shares), shares
