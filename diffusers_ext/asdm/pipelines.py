"""A Stable Diffusion pipeline for pruned UNets of either class.

The folder `pipelines/asdm_sd` imports the class for `custom_pipeline=`:

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline=dx.pipeline_path("asdm_sd"), trust_remote_code=True
    )

Importing this module registers `ASDMUNet2DConditionModel` with diffusers.

What `save_pretrained` and `push_to_hub` write holds `pipeline.py`, which imports the class from here:
`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads it, and so does
`ASDMStableDiffusionPipeline.from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import StableDiffusionPipeline

from ..core.classes import CustomPipelineMixin
from .apply import apply_gri_attention, remove_gri_attention
from .unet import ASDMUNet2DConditionModel

__all__ = ["ASDMStableDiffusionPipeline", "ASDMUNet2DConditionModel"]


class ASDMStableDiffusionPipeline(CustomPipelineMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that loads pruned UNets and can add GRI attention to any UNet.

    A call of the pipeline is that of the base class.
    """

    def apply_gri_attention(self, paths: Sequence[str] | None = None, window: int = 8, pool: int = 4):
        """See `diffusers_ext.apply_gri_attention`; returns the pipeline."""
        return apply_gri_attention(self, paths, window, pool)

    def remove_gri_attention(self):
        """See `diffusers_ext.remove_gri_attention`; returns the pipeline."""
        return remove_gri_attention(self)
