"""Checks of arguments that many functions have."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def check_counts(**values: Any) -> None:
    """Raises a ValueError unless every value is a whole number of 1 or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}.")


def check_finite(**values: Any) -> None:
    """Raises a ValueError unless every value is a finite number."""
    for name, value in values.items():
        if not isinstance(value, Real) or not math.isfinite(float(value)):
            raise ValueError(f"{name} must be a finite number, got {value!r}.")


def check_latents(latents: Any, name: str = "latents") -> None:
    """Raises a ValueError unless the argument is a tensor of floating-point numbers."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        found = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"{name} must be a tensor of floating-point numbers, got {found}. dx.encode_images(pipe, images) makes the"
            " latents of images."
        )
