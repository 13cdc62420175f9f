"""Stable Diffusion and SDXL pipelines that interpolate, invert and edit.

The folders `pipelines/smooth_diffusion_*` import these classes, so they are what `custom_pipeline=` gives:

    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline="pipelines/smooth_diffusion_sd", trust_remote_code=True
    )
    pipe.load_smooth_lora("path/or/repo")
    frames = pipe.interpolate(["a red bag", "a blue boot"], num_frames=24)
    noise = pipe.invert(picture, "a red bag")
    edited = pipe.edit("a red bag", "a blue bag", latents=noise).images[0]

A call of the pipeline itself is its base class's, bit by bit. Every method here is also a function of the package, for
any other pipeline.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from ..core.images import encode_images
from .apply import apply_smooth_lora, remove_smooth_lora
from .editing import edit
from .interpolation import interpolate
from .inversion import ddim_invert
from .null_text import NullTextInversion, null_text_invert, reconstruct


class SmoothDiffusionMixin:
    """The methods that a smooth latent space is for."""

    def load_smooth_lora(
        self, path_or_repo: str | os.PathLike[str], adapter_name: str = "smooth", **kwargs: Any
    ):
        """See `diffusers_ext.apply_smooth_lora`."""
        return apply_smooth_lora(self, path_or_repo, adapter_name, **kwargs)

    def unload_smooth_lora(self, adapter_name: str = "smooth"):
        """See `diffusers_ext.remove_smooth_lora`."""
        return remove_smooth_lora(self, adapter_name)

    def interpolate(self, prompt: str | Sequence[str], **kwargs: Any) -> np.ndarray:
        """Frames between two noises and two prompts; see `diffusers_ext.interpolate`."""
        return interpolate(self, prompt, **kwargs)

    def invert(
        self,
        image: PIL.Image.Image | Sequence[PIL.Image.Image] | np.ndarray | Tensor,
        prompt: str | Sequence[str] = "",
        **kwargs: Any,
    ) -> Tensor:
        """The noise of pictures, for `latents=`; see `diffusers_ext.ddim_invert`.

        Args:
            image: one or more pictures, or an array (n, h, w, 3) in [0, 1].
            prompt: what they show.
            kwargs: of `ddim_invert`.
        """
        return ddim_invert(self, encode_images(self, image), prompt, **kwargs)

    def edit(
        self,
        prompt: str | Sequence[str],
        target_prompt: str | Sequence[str],
        *,
        latents: Tensor,
        **kwargs: Any,
    ):
        """Pictures with another prompt from some step on; see `diffusers_ext.edit`."""
        return edit(self, prompt, target_prompt, latents=latents, **kwargs)


class SmoothDiffusionStableDiffusionPipeline(SmoothDiffusionMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that interpolates, inverts and edits."""

    def invert_null_text(
        self,
        image: PIL.Image.Image | Sequence[PIL.Image.Image] | np.ndarray | Tensor,
        prompt: str | Sequence[str],
        **kwargs: Any,
    ) -> NullTextInversion:
        """Noise and unconditional embeddings of pictures; see `diffusers_ext.null_text_invert`."""
        return null_text_invert(self, encode_images(self, image), prompt, **kwargs)

    def reconstruct(self, inversion: NullTextInversion, **kwargs: Any) -> Any:
        """Redraws what `invert_null_text` has inverted."""
        return reconstruct(self, inversion, **kwargs)


class SmoothDiffusionStableDiffusionXLPipeline(SmoothDiffusionMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that interpolates, inverts and edits."""
