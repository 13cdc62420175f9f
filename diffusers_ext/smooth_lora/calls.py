"""What interpolation, inversion and editing ask of a pipeline, and the arguments of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModularPipeline
from torch import Tensor

from ..core.families import Layout, check_starts_from_noise, denoiser_of, family_of
from ..core.hooks import parameters_of
from ..core.pipeline import initial_noise, prompt_per_row

# --- the pipeline ---


def check_text_to_image(pipe: Any) -> None:
    """Raises a ValueError unless the pipeline makes images from prompts and from noise that is given as `latents=`."""
    name, parameters = type(pipe).__name__, parameters_of(pipe)
    if isinstance(pipe, ModularPipeline):
        raise ValueError(
            f"{name} is a Modular pipeline, whose calls are not known. Load the same model with DiffusionPipeline."
        )
    if "num_frames" in parameters:
        raise ValueError(f"{name} makes videos. Use a text-to-image pipeline.")
    missing = [what for what in ("prompt", "latents") if what not in parameters]
    if missing or not hasattr(pipe, "encode_prompt"):
        lacks = f"no argument {missing[0]}=" if missing else "no encode_prompt"
        raise ValueError(f"{name} has {lacks}. Use a text-to-image pipeline.")
    check_starts_from_noise(pipe)
    family_of(pipe)


def check_not_distilled(pipe: Any) -> None:
    """Raises a ValueError for a model that is known to be distilled to a few steps."""
    config = denoiser_of(pipe).config
    if pipe.config.get("is_distilled") or config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"The model of {type(pipe).__name__} is distilled to a few steps, so it has no path to invert or edit."
            " Load the model that it was distilled from."
        )


# --- arguments of its call ---


def refuse(function: str, call: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raises a ValueError if the call has one of the arguments that `reasons` is about.

    One image for each prompt is what the functions make, so that number is accepted.
    """
    for name, reason in reasons.items():
        one = name == "num_images_per_prompt" and call.get(name) == 1
        if call.get(name) is not None and not one:
            raise ValueError(f"{function} does not take {name}=: {reason}.")


def is_prompt(name: str) -> bool:
    """Whether the argument of this name is a text, such as `prompt_2` and `negative_prompt`."""
    return name.startswith(("prompt", "negative_prompt")) and not name.endswith(("_embeds", "_mask"))


def prompts_per_row(call: Mapping[str, Any], latents: Tensor) -> dict[str, Any]:
    """The call with every prompt as a list of one text for each row of `latents`.

    Some pipelines take no text beside a list of texts, others encode it for the first image only.

    Raises:
        ValueError: the number of texts is neither 1 nor the number of rows.
    """
    texts = {name: value for name, value in call.items() if is_prompt(name) and value is not None}
    return {**call, **{name: prompt_per_row(value, latents) for name, value in texts.items()}}


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
        pipe: a pipeline of `check_text_to_image`.
        latents: in the layout of `latents=`.
        call: the other arguments, with prompts or their embeddings.

    Raises:
        ValueError: packed latents without `height` and `width`, or latents that do not have the shape of the noise
            for an image of this size.
    """
    layout, call = latents_layout(pipe), {**call, "latents": latents}
    if layout == "patches":
        missing = [f"{name}=" for name in ("height", "width") if call.get(name) is None]
        if missing:
            raise ValueError(
                f"The latents of {type(pipe).__name__} are packed and do not tell the size of the image: give"
                f" {' and '.join(missing)}."
            )
    elif latents.ndim == (5 if layout == "channels last" else 4):
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
