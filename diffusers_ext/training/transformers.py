"""Transformers of flow-matching pipelines in training: what they are called with, in one form for all families.

A noisy state is x_σ = (1 − σ)x₀ + σε with σ from 0 (image) to 1 (noise), and the velocity is v = ε − x₀, so that
x₀ = x_σ − σv (Lipman et al., arXiv:2210.02747; Esser et al., arXiv:2403.03206). Pipelines differ in the layout of the
latents, in how they tell the time, in the sign of v, and in what they give their transformer besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.autoencoders import latent_channels_of, vae_of
from ..core.families import FAMILIES, Family, from_grid, known_class, to_grid
from ..core.prompts import embeddings_of, encoded_prompts, prompt_options

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


@dataclass(frozen=True)
class Texts:
    """What captions are encoded to; the names of its fields are those of `encode_captions`.

    Attributes:
        prompt_embeds: (B, tokens, width).
        prompt_mask: (B, tokens) bool, False at padding; None if the transformer attends to all tokens.
        pooled_prompt_embeds: (B, width), SD3 and Flux.1 only.
    """

    prompt_embeds: Tensor
    prompt_mask: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None


@dataclass(frozen=True)
class Inputs:
    """What a call of a transformer is made of.

    Attributes:
        latents: (B, ...) noisy latents in the loop layout, see `Family`.
        shape: (C, H, W) of one of them in the grid layout.
        sigmas: (B,) noise levels.
        texts: the captions.
        guidance: (B,) scales; None for a transformer without `guidance_embeds` in its config.
        time_scale: `timestep_scale` in the config of the transformer, or 1.
    """

    latents: Tensor
    shape: tuple[int, ...]
    sigmas: Tensor
    texts: Texts
    guidance: Tensor | None = None
    time_scale: float = 1.0

    def grid(self, *sizes: int) -> Tensor:
        """Positions in a grid, (product of sizes, number of sizes), on the device of the latents."""
        return torch.cartesian_prod(*(torch.arange(size, device=self.latents.device) for size in sizes))


@dataclass(frozen=True)
class Flow:
    """How the transformer of one class of pipelines is called and trained.

    Attributes:
        transformer: its class.
        arguments: the keyword arguments of its forward.
        targets: ends of the names of the linear layers that get a LoRA, those of diffusers' training scripts.
        weighting_scheme: the default of diffusers' training script, see `levels`.
        masked: it does not attend to the padding of captions.
    """

    transformer: str
    arguments: Callable[[Inputs], dict[str, Any]]
    targets: tuple[str, ...] = _ATTENTION
    weighting_scheme: str = "none"
    masked: bool = False

    @property
    def family(self) -> Family:
        """Layout of the latents, and direction of the time."""
        return FAMILIES[self.transformer]

    def channels(self, transformer: Any) -> int:
        """Channels of the latents in the grid layout."""
        return transformer.config.in_channels // (4 if self.family.layout == "patches" else 1)

    def velocity(
        self,
        transformer: Any,
        latents: Tensor,
        sigmas: Tensor,
        guidance: float | None = None,
        **texts: Tensor,
    ) -> Tensor:
        """The velocity that a transformer predicts.

        Args:
            transformer: of this class, or one with the same inputs, such as a pruned one.
            latents: (B, C, H, W) noisy latents in the grid layout and the scale of `encode_pixels`, float.
            sigmas: (B,) float32 noise levels in [0, 1].
            guidance: the scale that a transformer with `guidance_embeds` in its config is told; others do not use it.
            texts: from `encode_captions`, for B captions.

        Returns:
            (B, C, H, W), an estimate of ε − x₀.

        Raises:
            ValueError: a transformer with `guidance_embeds`, and no `guidance`.
        """
        scale, config = None, transformer.config
        if config.get("guidance_embeds"):
            if guidance is None:
                raise ValueError(
                    f"{type(transformer).__name__} takes a guidance scale as an input (guidance_embeds), got none:"
                    " give guidance."
                )
            scale = torch.full_like(sigmas, guidance)
        layout, shape = self.family.layout, tuple(latents.shape[1:])
        given = Inputs(
            from_grid(layout, latents),
            shape,
            sigmas,
            Texts(**texts),
            scale,
            config.get("timestep_scale") or 1.0,
        )
        output = transformer(**self.arguments(given), return_dict=False)[0]
        if isinstance(output, list):
            output = torch.stack(output).squeeze(2)
        output = to_grid(layout, output, shape)
        return -output if self.family.reversed_time else output


# --- what each transformer is called with ---


def _sd3(given: Inputs) -> dict[str, Any]:
    return {
        "hidden_states": given.latents,
        "timestep": 1000 * given.sigmas,
        "encoder_hidden_states": given.texts.prompt_embeds,
        "pooled_projections": given.texts.pooled_prompt_embeds,
    }


def _flux(given: Inputs) -> dict[str, Any]:
    _, height, width = given.shape
    return {
        "hidden_states": given.latents,
        "timestep": given.sigmas,
        "guidance": given.guidance,
        "encoder_hidden_states": given.texts.prompt_embeds,
        "pooled_projections": given.texts.pooled_prompt_embeds,
        "img_ids": given.grid(1, height // 2, width // 2).float(),
        "txt_ids": torch.zeros(given.texts.prompt_embeds.shape[1], 3, device=given.latents.device),
    }


def _flux2(given: Inputs) -> dict[str, Any]:
    _, height, width = given.shape
    return {
        "hidden_states": given.latents,
        "timestep": given.sigmas,
        "guidance": given.guidance,
        "encoder_hidden_states": given.texts.prompt_embeds,
        "img_ids": given.grid(1, height, width, 1),
        "txt_ids": given.grid(1, 1, 1, given.texts.prompt_embeds.shape[1]),
    }


def _qwen(given: Inputs) -> dict[str, Any]:
    _, height, width = given.shape
    return {
        "hidden_states": given.latents,
        "timestep": given.sigmas,
        "guidance": given.guidance,
        "encoder_hidden_states": given.texts.prompt_embeds,
        "encoder_hidden_states_mask": given.texts.prompt_mask,
        "img_shapes": [[(1, height // 2, width // 2)]] * len(given.latents),
    }


def _zimage(given: Inputs) -> dict[str, Any]:
    assert given.texts.prompt_mask is not None
    captions = zip(given.texts.prompt_embeds, given.texts.prompt_mask)
    return {
        "x": list(given.latents.unsqueeze(2)),
        "t": 1 - given.sigmas,
        "cap_feats": [embeds[mask] for embeds, mask in captions],
    }


def _sana(given: Inputs) -> dict[str, Any]:
    return {
        "hidden_states": given.latents,
        "timestep": 1000 * given.time_scale * given.sigmas,
        "encoder_hidden_states": given.texts.prompt_embeds,
        "encoder_attention_mask": given.texts.prompt_mask,
    }


def _lumina2(given: Inputs) -> dict[str, Any]:
    return {**_sana(given), "timestep": 1 - given.sigmas}


_FLUX2 = Flow("Flux2Transformer2DModel", _flux2, (*_ATTENTION, "to_qkv_mlp_proj", "attn.to_out"))

# By the class of the pipeline: those for editing, control and inpainting give the same transformers other inputs.
FLOWS: dict[str, Flow] = {
    "StableDiffusion3Pipeline": Flow("SD3Transformer2DModel", _sd3, (*_ATTENTION, *_JOINT), "logit_normal"),
    "FluxPipeline": Flow("FluxTransformer2DModel", _flux, (*_ATTENTION, *_JOINT, *_FEED_FORWARD)),
    "Flux2Pipeline": _FLUX2,
    "Flux2KleinPipeline": _FLUX2,
    "QwenImagePipeline": Flow("QwenImageTransformer2DModel", _qwen, masked=True),
    "ZImagePipeline": Flow("ZImageTransformer2DModel", _zimage, masked=True),
    "SanaPipeline": Flow("SanaTransformer2DModel", _sana, _ATTENTION[:3], masked=True),
    "Lumina2Pipeline": Flow("Lumina2Transformer2DModel", _lumina2, masked=True),
}


def flow_of_class(kind: type) -> Flow | None:
    """The record of a class of pipelines, which its subclasses have too; None if there is none."""
    name = known_class(kind, FLOWS)
    return None if name is None else FLOWS[name]


def flow_of(pipe: Any) -> Flow:
    """The record of a pipeline.

    Raises:
        ValueError: its transformer cannot be trained, or it lacks a part that training needs.
    """
    flow, name = flow_of_class(type(pipe)), type(pipe).__name__
    if flow is None:
        raise ValueError(
            f"{name} has no transformer that can be trained. Expected one of {', '.join(FLOWS)}."
        )
    kind = type(pipe.transformer)
    if known_class(kind, (flow.transformer,)) is None:
        raise ValueError(f"The transformer of {name} is a {kind.__name__}, expected a {flow.transformer}.")
    missing = [part for part in ("vae", "text_encoder") if getattr(pipe, part, None) is None]
    if missing:
        raise ValueError(
            f"{name} has no {' and no '.join(missing)}, which training needs: load the whole pipeline."
        )
    found, expected = flow.channels(pipe.transformer), latent_channels_of(vae_of(pipe))
    if found != expected:
        raise ValueError(
            f"The transformer of {name} takes {found} channels, and the latents have {expected}: it has further inputs, as"
            " for inpainting or control, which training does not have."
        )
    return flow


# --- captions ---


@torch.no_grad()
def encode_captions(
    pipe: Any, captions: Sequence[str], max_sequence_length: int | None = None
) -> dict[str, Tensor]:
    """Encodes captions as the pipeline's own call encodes its prompts, with rows that do not depend on each other.

    Args:
        pipe: one of `FLOWS`.
        captions: n texts.
        max_sequence_length: of the pipeline's call; None for its default.

    Returns:
        The fields of `Texts` that are not None, with as many tokens for all captions. `prompt_embeds` is 0 where
        `prompt_mask` is False.

    Raises:
        ValueError: see `flow_of`.
    """
    flow = flow_of(pipe)
    given = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    options = prompt_options(pipe, given)
    found = embeddings_of(pipe, encoded_prompts(pipe, captions, guidance=False, **options))[0]
    embeds, mask = found.embeds, found.mask
    if flow.masked:
        # Some pad to the longest caption, and return no mask if all are of one length.
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask
        missing = options["max_sequence_length"] - embeds.shape[1]
        embeds, mask = F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))
    texts = {"prompt_embeds": embeds, "prompt_mask": mask, "pooled_prompt_embeds": found.pooled}
    return {name: value for name, value in texts.items() if value is not None}


def without_padding(texts: dict[str, Any]) -> dict[str, Any]:
    """The texts of a batch without the last tokens that are padding in all rows."""
    mask = texts.get("prompt_mask")
    if mask is None:
        return texts
    count = int(mask.any(0).nonzero().max()) + 1
    return {**texts, "prompt_embeds": texts["prompt_embeds"][:, :count], "prompt_mask": mask[:, :count]}
