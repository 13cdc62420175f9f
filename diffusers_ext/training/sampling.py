"""Images by the pipeline whose network is trained: their guidance, and the arguments of a call."""

from __future__ import annotations

import argparse
from typing import Any

from diffusers import FluxTransformer2DModel

from ..core.families import denoiser_of, guidance_of, uncompiled
from ..core.hooks import parameters_of
from ..core.latents import image_size
from .transformers import flow_of_class

GUIDANCE_HELP = (
    "for images; 1 is off on every model. Models with an embedded scale (Flux.1 dev, Flux.2) are also trained at it."
    " Default: 7.5 for Stable Diffusion and SDXL, 3.5 for embedded scales, 1 for Flux.1 schnell, else 4"
)


def default_guidance(pipe: Any) -> float:
    """The default of `--guidance_scale`, see `GUIDANCE_HELP`.

    Other models that are distilled to work without guidance cannot be recognised.
    """
    if flow_of_class(type(pipe)) is None:
        return 7.5
    if guidance_of(pipe).embedded:
        return 3.5
    # Its pipeline has true_cfg_scale, which it was not trained for.
    return 1.0 if isinstance(uncompiled(denoiser_of(pipe)), FluxTransformer2DModel) else 4.0


def image_call(pipe: Any, args: argparse.Namespace, height: int, width: int) -> dict[str, Any]:
    """Arguments of a call for images like those of the training, without prompts and without the number of steps.

    Args:
        pipe: Stable Diffusion, SDXL, or one of `transformers.FLOWS`.
        args: `guidance_scale`: the scale that the network is given as an input, where it takes one, otherwise w of
            u + w(c − u), whatever the pipeline calls it; no effect on a pipeline without guidance. `max_sequence_length`,
            if there is one.
        height, width: size of the latents in the grid layout.
    """
    guidance = guidance_of(pipe)
    call: dict[str, Any] = {**image_size(pipe, height, width), **guidance.call(1.0)}
    if guidance.embedded:
        call[guidance.embedded] = args.guidance_scale
    elif guidance.argument:
        call |= guidance.call(args.guidance_scale)
    if getattr(args, "max_sequence_length", None) is not None:
        call["max_sequence_length"] = args.max_sequence_length
    if "use_resolution_binning" in parameters_of(pipe):
        call["use_resolution_binning"] = False  # it replaces the size
    return call
