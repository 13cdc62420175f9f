"""Structural similarity of images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean structural similarity of every pair of images, (n,) in [−1, 1]; 1 for equal images.

    Wang et al., *Image Quality Assessment: From Error Visibility to Structural Similarity*, IEEE TIP 2004,
    equation 13, with its Gaussian window (11 × 11, standard deviation 1.5) and constants. Each channel is
    evaluated separately, with windows that lie inside the image.

    Args:
        a, b: (n, h, w, channels) in [0, 1], at least 11 high and wide.

    Raises:
        ValueError: different shapes, or images smaller than the window.
    """
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[1:3]) < _WINDOW:
        raise ValueError(
            f"Expected two equal shapes (n, h, w, channels) of at least {_WINDOW} × {_WINDOW}, got {a.shape} and"
            f" {b.shape}."
        )
    x, y = (torch.from_numpy(p.astype(np.float64)).movedim(-1, 1) for p in (a, b))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    both = _blur(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * both + _C2)
    return (top / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))).mean((1, 2, 3)).numpy()


def _blur(x: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    line = (weights / weights.sum()).expand(x.shape[1], 1, 1, -1)
    return F.conv2d(F.conv2d(x, line, groups=x.shape[1]), line.transpose(2, 3), groups=x.shape[1])
