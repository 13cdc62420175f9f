"""Stable Diffusion with a pruned UNet, whichever class that has.

The folder `pipelines/asdm_sd` imports the class, so it is what `custom_pipeline=` gives:

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/asdm_sd", trust_remote_code=True
    )

To import this module is enough for diffusers to know `ASDMUNet2DConditionModel`.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import StableDiffusionPipeline

from .apply import apply_gri_attention, remove_gri_attention
from .unet import ASDMUNet2DConditionModel

__all__ = ["ASDMStableDiffusionPipeline", "ASDMUNet2DConditionModel"]


class ASDMStableDiffusionPipeline(StableDiffusionPipeline):
    """`StableDiffusionPipeline` that loads pruned UNets, and puts GRI attention on any; a call is its base class's."""

    def apply_gri_attention(self, paths: Sequence[str] | None = None, window: int = 8, pool: int = 4):
        """See `diffusers_ext.apply_gri_attention`; returns the pipeline."""
        return apply_gri_attention(self, paths, window, pool)

    def remove_gri_attention(self):
        """See `diffusers_ext.remove_gri_attention`; returns the pipeline."""
        return remove_gri_attention(self)
