"""The arguments of a `SIGNPipeline`: checked, and turned into what its steps need."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.autoencoders import side_of
from ..core.checks import check_counts
from ..core.images import as_tensor, encode_images
from .flows import TIMES

# The noise level of the second step, as a share of that of the first one.
REFINEMENT = 0.125
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def step_levels(pipe: Any, num_inference_steps: int, sigmas: Sequence[float] | None) -> list[float]:
    """The decreasing noise levels of the steps of a call, see `SIGNPipeline.__call__`.

    Raises:
        ValueError: the number of steps is below 1, or `sigmas` are not decreasing levels of 0 or more.
    """
    if sigmas is None:
        check_counts(num_inference_steps=num_inference_steps)
        count, time = num_inference_steps, pipe.config["timestep"]
        if pipe.time_conditional:
            times = [time * (1 - k / count) for k in range(count)]
            return [time / (TIMES - time) for time in times]
        highest, rest = pipe.sigma, count - 1
        return [highest, *(highest * REFINEMENT * (1 - k / rest) for k in range(rest))]
    levels = [float(sigma) for sigma in sigmas]
    falling = all(a > b for a, b in pairwise(levels))
    if not levels or not falling or min(levels) < 0:
        raise ValueError(f"sigmas must be decreasing noise levels of 0 or more, got {levels}.")
    return levels


def latent_size(pipe: Any, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """Height and width of the latents of images.

    Args:
        pipe: a `SIGNPipeline`. With a UNet or a source it has one size. Other flows have a default or none.
        height, width: of the images, in pixels. None for those of the projector.

    Raises:
        ValueError: only one of them, none where there is no default, or a size that the projector does not have.
    """
    side = side_of(pipe.stock_pipeline) if pipe.flow else pipe.vae_scale_factor
    own: Any = pipe.config["sample_size"] if pipe.flow else pipe.unet.config.sample_size
    if pipe.flow and pipe.source is not None:
        own = pipe.source.config.shape[1:]
    own = (own, own) if isinstance(own, int) else own
    if height is None and width is None and own is not None:
        return tuple(own)
    if not height or not width or height % side or width % side:
        raise ValueError(
            f"Expected a height and a width in pixels, both multiples of {side}, got {height} and {width}."
        )
    found, factor = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor), pipe.vae_scale_factor
    if own is None or (pipe.flow and pipe.source is None):
        return found
    if found != tuple(own):
        raise ValueError(
            f"Expected images {own[1] * factor} wide and {own[0] * factor} high, got {width} × {height}: resize or crop"
            " them."
        )
    return found


def edit_mask(pipe: Any, mask_image: Any, like: Tensor) -> Tensor:
    """(1 or n, 1, H, W): 1 where a latent is to be generated, if any of its pixels is.

    Args:
        pipe: a `SIGNPipeline`.
        mask_image: see `SIGNPipeline.edit`.
        like: (n, C, H, W) latents.

    Raises:
        ValueError: a mask of another size, range or number.
    """
    if mask_image is None:
        return torch.ones_like(like[:, :1])
    if isinstance(mask_image, np.ndarray) and mask_image.ndim == 2:
        mask_image = mask_image[None, ..., None]
    mask = as_tensor(mask_image, "L")
    size = tuple(n * pipe.vae_scale_factor for n in like.shape[2:])
    if tuple(mask.shape[1:]) != (1, *size) or len(mask) not in (1, len(like)):
        raise ValueError(
            f"Expected a mask {size[1]} wide and {size[0]} high, one for all images or one per image, got"
            f" {tuple(mask.shape)}."
        )
    mask = torch.nn.functional.max_pool2d(mask, pipe.vae_scale_factor)
    return mask.to(like.device, like.dtype)


def check_output_type(output_type: str) -> None:
    """Raises a ValueError for an unknown one, which the image processor of diffusers takes for "np"."""
    if output_type not in _OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(_OUTPUT_TYPES)}, got {output_type!r}.")


def check_strength(strength: float) -> None:
    """Raises a ValueError unless the strength is in [0, 1]."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}.")


def encode_data(pipe: Any, image: Any) -> Tensor:
    """(n, C, H, W) in the space of the network of a `SIGNPipeline`, in the data type of its autoencoder.

    Raises:
        ValueError: see `encode_images`, or images of another size than that of the projector.
    """
    # The class of a flow's pipeline tells which statistics of the autoencoder are used.
    x = encode_images(pipe.stock_pipeline if pipe.flow else pipe, image)
    latent_size(pipe, *(n * pipe.vae_scale_factor for n in x.shape[2:]))
    return x
