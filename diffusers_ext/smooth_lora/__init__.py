"""Smooth-LoRA: a LoRA for a smooth latent space, with interpolation, inversion and editing.

Guo et al., *Smooth Diffusion: Crafting Smooth Latent Spaces in Diffusion Models*, CVPR 2024,
arXiv:2312.04410. `apply_smooth_lora` adds the method to a pipeline, `remove_smooth_lora` removes it.
"""

from ..core.methods import register

__getattr__, __dir__ = register(
    __name__,
    __file__,
    title="Smooth-LoRA",
    describe="apply:describe",
    commands="commands:add_commands",
    checks={
        "Smooth-LoRA": "apply:check_pipeline",
        "interpolation": "interpolation:check_pipeline",
        "inversion": "inversion:check_pipeline",
        "editing": "editing:check_pipeline",
        "null-text inversion": "null_text:check_pipeline",
    },
    recipe="recipe",
    options="commands:apply_options",
)
