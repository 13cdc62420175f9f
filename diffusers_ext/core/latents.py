"""Latents that are given to a pipeline: their layout, and the size of the image that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .checks import check_latents
from .families import Layout, family_of
from .hooks import parameters_of
from .pipeline import initial_noise


def latents_layout(pipe: Any) -> Layout:
    """The layout of the call's `latents=`."""
    family = family_of(pipe)
    return "grid" if family.unpacked else family.layout


def image_size(pipe: Any, height: int, width: int) -> dict[str, int]:
    """`height` and `width` in pixels of the image for latents of this size in the grid layout."""
    factor = getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial
    # With a token for each position, the latents are those of the autoencoder in 2 × 2 patches.
    each = 2 * factor if family_of(pipe).layout == "positions" else factor
    return {"height": each * height, "width": each * width}


def with_size(call: Mapping[str, Any], size: Mapping[str, int]) -> dict[str, Any]:
    """The call with this size.

    Raises:
        ValueError: it has another one.
    """
    for name, value in size.items():
        if call.get(name) not in (None, value):
            raise ValueError(f"The latents belong to an image of {name} {value}, got {call[name]}.")
    return {**call, **size}


def starting_from(pipe: Any, latents: Tensor, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with these latents and the size of their image.

    Args:
        pipe: a pipeline that starts from noise.
        latents: in the layout of `latents=`.
        call: the other arguments, with prompts or their embeddings.

    Raises:
        ValueError: no tensor, packed latents without `height` and `width`, or latents that do not have the shape of
            the noise for an image of this size.
    """
    if latents_layout(pipe) == "patches":
        missing = [f"{name}=" for name in ("height", "width") if call.get(name) is None]
        if missing:
            raise ValueError(
                f"The latents of {type(pipe).__name__} are packed and do not tell the size of the image: give"
                f" {' and '.join(missing)}."
            )
    return with_latents(pipe, latents, call)


def with_latents(pipe: Any, latents: Tensor, call: Mapping[str, Any]) -> dict[str, Any]:
    """As `starting_from`, but packed latents without `height` and `width` are those of the pipeline's default size."""
    check_latents(latents)
    layout, call = latents_layout(pipe), {**call, "latents": latents}
    if layout != "patches" and latents.ndim == (5 if layout == "channels last" else 4):
        sizes = latents.shape[2:4] if layout == "channels last" else latents.shape[-2:]
        call = with_size(call, image_size(pipe, *sizes))
    if "use_resolution_binning" in parameters_of(pipe):
        call.setdefault("use_resolution_binning", False)  # it replaces the size
    _check_shape(pipe, call)
    return call


# They have no effect on the noise, or would act twice.
_AFTER_NOISE = (
    "latents",
    "output_type",
    "return_dict",
    "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)


def _check_shape(pipe: Any, call: Mapping[str, Any]) -> None:
    others = {name: value for name, value in call.items() if name not in _AFTER_NOISE}
    # A generator of its own, because the call may use the given or the global one.
    expected = tuple(initial_noise(pipe, {**others, "generator": torch.Generator()}).shape)
    found = tuple(call["latents"].shape)
    if found == expected:
        return
    sizes = [call.get(name) for name in ("height", "width")]
    shown = "its default size" if None in sizes else f"{sizes[0]} × {sizes[1]} pixels"
    raise ValueError(
        f"{type(pipe).__name__} makes {expected[0]} image(s) of {shown} from latents of shape {expected}, got {found}."
    )
