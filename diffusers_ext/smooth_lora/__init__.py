"""Smooth-LoRA: a LoRA that makes the latent space smooth, and what that is for: interpolation, inversion, editing.

Guo et al., *Smooth Diffusion: Crafting Smooth Latent Spaces in Diffusion Models*, CVPR 2024, arXiv:2312.04410. On and
off: `apply_smooth_lora`, `remove_smooth_lora`.
"""

from ..core.methods import register

__getattr__, __dir__ = register(
    __name__,
    __file__,
    title="Smooth-LoRA",
    describe="apply:describe",
    commands="commands:add_commands",
)
