"""Stable Diffusion and SDXL pipelines with methods for interpolation, inversion and editing.

The folders `pipelines/smooth_diffusion_*` import these classes for `custom_pipeline=`:

    pipe = DiffusionPipeline.from_pretrained(
        base, custom_pipeline=dx.pipeline_path("smooth_diffusion_sd"), trust_remote_code=True
    )
    pipe.load_smooth_lora("path/or/repo")
    frames = pipe.interpolate(["a red bag", "a blue boot"], num_frames=24)
    noise = pipe.invert(image, "a red bag")
    edited = pipe.edit("a red bag", "a blue bag", latents=noise).images[0]

A call of the pipeline gives the same result as its base class, bit for bit. The package has every method as a
function too, for any other pipeline.

What `save_pretrained` and `push_to_hub` write holds `pipeline.py`, which imports the class from here:
`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads it, and so does
`SmoothDiffusionStableDiffusionPipeline.from_pretrained`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from ..core.classes import CustomPipelineMixin
from ..core.images import encode_images
from .apply import apply_smooth_lora, remove_smooth_lora
from .editing import edit
from .interpolation import interpolate
from .inversion import ddim_invert
from .null_text import NullTextInversion, null_text_invert, reconstruct


class SmoothDiffusionMixin(CustomPipelineMixin):
    """Methods for loading a Smooth-LoRA, interpolation, inversion and editing."""

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
        """The noise of images, for `latents=`; see `diffusers_ext.ddim_invert`.

        Args:
            image: one or more images, or an array (n, h, w, 3) in [0, 1].
            prompt: description of the images.
            kwargs: arguments of `ddim_invert`.
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
        """Images whose prompt changes during sampling; see `diffusers_ext.edit`."""
        return edit(self, prompt, target_prompt, latents=latents, **kwargs)


class SmoothDiffusionStableDiffusionPipeline(SmoothDiffusionMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with interpolation, inversion and editing."""

    def invert_null_text(
        self,
        image: PIL.Image.Image | Sequence[PIL.Image.Image] | np.ndarray | Tensor,
        prompt: str | Sequence[str],
        **kwargs: Any,
    ) -> NullTextInversion:
        """Noise and unconditional embeddings of images; see `diffusers_ext.null_text_invert`."""
        return null_text_invert(self, encode_images(self, image), prompt, **kwargs)

    def reconstruct(self, inversion: NullTextInversion, **kwargs: Any) -> Any:
        """Generates the images of `invert_null_text` again; see `diffusers_ext.reconstruct`."""
        return reconstruct(self, inversion, **kwargs)


class SmoothDiffusionStableDiffusionXLPipeline(SmoothDiffusionMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with interpolation, inversion and editing."""
