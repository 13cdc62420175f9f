"""Random transformers in the layouts of Stable Diffusion 3.5, Flux.1 and Qwen-Image, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """One published transformer.

    Attributes:
        make: makes it, with changes to its config.
        config: as published.
        kinds: number of blocks by kind, in the order in which they run.
        shallow: changes to the config that leave one block of each kind.
        heads, width: number and width of the heads.
        text: text tokens of a call; of Qwen-Image, which takes as many as a prompt has, a long one.
        image_attentions: for each kind, how many attentions a block has on the image alone.
    """

    make: Callable[..., Any]
    config: dict[str, Any]
    kinds: dict[str, int]
    shallow: dict[str, Any]
    heads: int
    width: int
    text: int
    image_attentions: dict[str, int]

    def build(self, device: str = "meta", **changes: Any) -> Any:
        """The transformer, without weights on the device "meta"."""
        with torch.device(device):
            return self.make(**{**self.config, **changes}).eval()

    def inputs(self, height: int, width: int, text: int | None = None, **like: Any) -> dict[str, Any]:
        """Random arguments of a call for one image of height × width tokens; `like` are a device and a dtype."""
        words = self.text if text is None else text
        found: dict[str, Any] = {
            "encoder_hidden_states": torch.randn(1, words, self.config["joint_attention_dim"], **like),
            "timestep": torch.tensor([0.5], **like),
        }
        if "pooled_projection_dim" in self.config:
            found["pooled_projections"] = torch.randn(1, self.config["pooled_projection_dim"], **like)
        channels = self.config["in_channels"]
        if self.make is SD3Transformer2DModel:
            found["timestep"] = 1000 * found["timestep"]
            return {**found, "hidden_states": torch.randn(1, channels, 2 * height, 2 * width, **like)}
        found["hidden_states"] = torch.randn(1, height * width, channels, **like)
        if self.make is QwenImageTransformer2DModel:
            return {**found, "img_shapes": [[(1, height, width)]]}
        # Positions are read, so they have values even where nothing else has.
        device = None if like.get("device") == "meta" else like.get("device")
        place = [torch.arange(size, device=device) for size in (1, height, width)]
        ids = torch.stack(torch.meshgrid(*place, indexing="ij"), -1).view(-1, 3)
        found |= {"img_ids": ids, "txt_ids": torch.zeros(words, 3, device=device)}
        return {**found, "guidance": torch.tensor([3.5], **like)}


LAYOUTS = {
    "Stable Diffusion 3.5 Medium": Layout(
        SD3Transformer2DModel,
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        {"dual": 13, "plain": 10, "last": 1},
        # A smaller table of positions, which costs nothing in a call.
        {"num_layers": 3, "dual_attention_layers": (0,), "pos_embed_max_size": 192},
        24,
        64,
        333,
        {"dual": 1, "plain": 0, "last": 0},
    ),
    "Flux.1": Layout(
        FluxTransformer2DModel,
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
        {"double": 19, "single": 38},
        {"num_layers": 1, "num_single_layers": 1},
        24,
        128,
        512,
        {"double": 0, "single": 0},
    ),
    "Qwen-Image": Layout(
        QwenImageTransformer2DModel,
        {
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
        {"double": 60},
        {"num_layers": 1},
        24,
        128,
        256,
        {"double": 0},
    ),
}


def smaller(layout: Layout, heads: int, **changes: Any) -> Layout:
    """The same layout with fewer heads, and so with a smaller width."""
    inner = heads * layout.width
    config = {**layout.config, "num_attention_heads": heads, "joint_attention_dim": inner, **changes}
    if "caption_projection_dim" in config:
        config["caption_projection_dim"] = inner
    if "pooled_projection_dim" in config:
        config["pooled_projection_dim"] = inner
    return Layout(
        layout.make,
        config,
        layout.kinds,
        layout.shallow,
        heads,
        layout.width,
        layout.text,
        layout.image_attentions,
    )


def blocks_of(transformer: Any) -> list[nn.Module]:
    """In the order in which they run."""
    return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]


@torch.no_grad()
def call(transformer: Any, inputs: dict[str, Any]) -> Tensor:
    """The prediction."""
    return transformer(**inputs).sample
