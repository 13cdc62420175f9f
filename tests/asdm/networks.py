"""Small UNets for the tests of pruning: random, with two layers at every resolution, and tagged."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffusers_ext.asdm.cost import example_inputs

SMALL: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "sample_size": (16, 8),
    "in_channels": 4,
    "out_channels": 4,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
SDXL: dict[str, Any] = {
    **SMALL,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 32),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
}
# Stable Diffusion 1.5: diffusers' defaults but for the width of the prompt.
SD15: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}


def network(config: dict[str, Any] = SMALL, seed: int = 0, **changes: Any) -> Any:
    """A random UNet in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DConditionModel(**{**config, **changes}).eval()


def tagged(unet: Any) -> Any:
    """Fills every parameter with a number of its own."""
    with torch.no_grad():
        for number, parameter in enumerate(unet.parameters(), 1):
            parameter.fill_(number)
    return unet


def run(unet: Any, batch_size: int = 2) -> Tensor:
    """The output for fixed inputs."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        return unet(**example_inputs(unet.config, batch_size, tokens=5)).sample
