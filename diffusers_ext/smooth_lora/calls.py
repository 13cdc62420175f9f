"""What interpolation, inversion and editing ask of a pipeline, and the arguments of its calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import ModularPipeline
from torch import Tensor

from ..core.families import check_starts_from_noise, check_steps, denoiser_of, family_of
from ..core.hooks import parameters_of
from ..core.pipeline import prompt_per_row

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
    check_steps(pipe)
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
