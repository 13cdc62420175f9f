"""What a pipeline does within one call, read off it without a word about its class: prompts, noise, a model output."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import packing
from .pipeline_hooks import add_hook, quiet


class _LatentsReady(Exception):
    """Ends a call of the pipeline that was only made for its noise."""


def initial_noise(pipe: Any, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The noise that `pipe(**call)` would start from, with unit variance, and the arguments that it was drawn by."""
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(given: dict[str, Any], prepared: Any) -> Any:
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        found.append((latents / noise_scale(pipe), given))
        raise _LatentsReady

    handle = add_hook(pipe, "prepare_latents", stop)
    try:
        pipe(**call, output_type="latent")
    except _LatentsReady:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipe).__name__} has made pictures without drawing noise by prepare_latents.")


def noise_scale(pipe: Any) -> float:
    """The factor between unit noise, which `latents=` takes, and what `pipe.prepare_latents` returns."""
    # Flow pipelines don't multiply, even where a scheduler has the attribute. A subclass may only wrap the method.
    methods = [vars(c)["prepare_latents"] for c in type(pipe).__mro__ if "prepare_latents" in vars(c)]
    scales = any("init_noise_sigma" in inspect.unwrap(method).__code__.co_names for method in methods)
    return float(pipe.scheduler.init_noise_sigma) if scales else 1.0


def unpacked_shape(pipe: Any, packed: Tensor, given: dict[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of latents packed to (B, H/2 · W/2, 4C), from the call's picture size."""
    step = 2 * pipe.vae_scale_factor
    shape = (packed.shape[2] // 4, 2 * (int(given["height"]) // step), 2 * (int(given["width"]) // step))
    if not packing.is_packed(packed.shape[1:], shape):
        raise ValueError(
            f"{type(pipe).__name__} keeps its latents as {tuple(packed.shape[1:])}, which is not {shape} packed"
            " in 2 × 2 patches: this layout is not known here."
        )
    return shape


class _Called(Exception):
    """Ends a pipeline's call that was only made for one model output."""


def model_output(pipe: Any, latents: Tensor, call: dict[str, Any]) -> Tensor:
    """What `pipe`'s denoiser says of `latents` at the first timestep of a call, guidance done, float32."""
    found: list[Tensor] = []

    def read(given: dict[str, Any], result: Any) -> Any:
        found.append(given["model_output"].float())
        raise _Called

    handle = add_hook(pipe.scheduler, "step", read)
    try:
        with quiet(pipe):
            pipe(**call, latents=latents, output_type="latent")
    except _Called:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipe).__name__} has not called its scheduler's step.")


# What a call takes for each part of what encode_prompt returns, by their number.
_ENCODED = {
    2: ("prompt_embeds", "negative_prompt_embeds"),
    3: ("prompt_embeds", "pooled_prompt_embeds"),
    4: (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str], guidance: bool = True) -> dict[str, Tensor]:
    """Prompts as keyword arguments of the pipeline's call, a row each: SD, SDXL, SD3, Flux and their kin.

    Args:
        pipe: the pipeline.
        prompts: texts.
        guidance: encode the empty negative prompt too, which calls with guidance need.

    Raises:
        ValueError: `encode_prompt` returns something else than those pipelines' do.
    """
    given: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1}
    given["do_classifier_free_guidance"] = guidance
    names = inspect.signature(pipe.encode_prompt).parameters
    options = {name: value for name, value in given.items() if name in names}
    encoded = pipe.encode_prompt(prompt=list(prompts), device=pipe._execution_device, **options)
    if not isinstance(encoded, tuple | list) or len(encoded) not in _ENCODED:
        raise ValueError(f"{type(pipe).__name__}.encode_prompt returns a layout that is not known here.")
    return {name: value for name, value in zip(_ENCODED[len(encoded)], encoded) if value is not None}
