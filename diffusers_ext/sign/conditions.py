"""What a denoiser is told besides its noisy input and the level: prompts, as the teacher's own call encodes them.

Conditions are one flat dictionary of tensors with a row for each image: of a UNet `encoder_hidden_states` and, of SDXL,
`text_embeds` and `time_ids`; of a flow the fields of `training.transformers.Texts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from ..core.features import features_of
from ..core.prompts import PromptEmbeds, encode_prompts
from ..training.captioned import time_ids
from ..training.transformers import encode_captions, flow_of_class, without_padding
from .source import PromptSource

# Of embeddings that are kept in memory; more texts are encoded again.
MOST_KEPT = 2**28
# The names of the conditions that `SIGNPipeline.encode_prompt` returns, of a flow.
FLOW_CONDITIONS = ("prompt_embeds", "prompt_mask", "pooled_prompt_embeds")
# Of a UNet; with the empty prompt's, which are None where a projector is called.
UNET_CONDITIONS = ("encoder_hidden_states", "", "text_embeds", "")


def takes_sizes(unet: Any) -> bool:
    """Whether a UNet is told pooled embeddings and the size of the image, as that of SDXL."""
    return unet.config.get("addition_embed_type") == "text_time"


def sdxl_of(pipe: Any) -> Any:
    """The pipeline that encodes the prompts of a `SIGNPipeline` with the UNet of SDXL."""
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    parts: dict[str, Any] = {name: getattr(pipe, name) for name in names}
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


@torch.no_grad()
def encode_texts(
    stock: Any, texts: Sequence[str], max_sequence_length: int | None = None, negative: bool = False
) -> dict[str, Tensor]:
    """The conditions of n texts, with all of their padding and without sizes.

    Args:
        stock: the teacher's pipeline, or one that encodes as it does.
        texts: the texts.
        max_sequence_length: of a flow, see `encode_captions`.
        negative: the texts are those of the unconditional prediction. SDXL has zeros instead of the empty text.
    """
    if flow_of_class(type(stock)):
        return encode_captions(stock, texts, max_sequence_length)
    zeros = negative and getattr(stock.config, "force_zeros_for_empty_prompt", False) and not any(texts)
    found = encode_prompts(stock, texts, guidance=False)
    names = {"prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "text_embeds"}
    return {names[name]: torch.zeros_like(v) if zeros else v for name, v in found.items()}


def with_sizes(unet: Any, conditions: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """The conditions of images of this size in pixels, not cropped. Those of other UNets than SDXL's are unchanged."""
    if "text_embeds" not in conditions or not takes_sizes(unet):
        return conditions
    corners = conditions["text_embeds"].new_zeros(len(conditions["text_embeds"]), 2)
    return {**conditions, "time_ids": time_ids(height, width, corners)}


def conditions_for(
    pipe: Any, prompt: str | Sequence[str] | None, count: int, height: int, width: int
) -> dict[str, Tensor]:
    """The conditions of `count` images of a `SIGNPipeline`, in the data type of its network.

    Args:
        pipe: the pipeline.
        prompt: one prompt for all images, or several, each for as many consecutive images; None without prompts.
        count: number of images.
        height, width: of the images in pixels, for SDXL.

    Raises:
        ValueError: a prompt is missing or not supported, or the numbers do not match.
    """
    if pipe.text_encoder is None:
        if prompt is not None:
            raise ValueError("This projector has no text encoder, so it takes no prompt.")
        return {}
    if prompt is None:
        raise ValueError('This projector needs a prompt: give one, or "" for none.')
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts or count % len(texts):
        raise ValueError(f"Give one prompt, or one for each of the {count} images, got {len(texts)}.")
    # By the pipeline's own method, which others may replace for a call.
    encoded = pipe.encode_prompt(texts, num_images_per_prompt=count // len(texts))
    names = UNET_CONDITIONS if pipe.flow is None else FLOW_CONDITIONS
    found = {name: value for name, value in zip(names, encoded) if value is not None}
    found = found if pipe.flow is None else without_padding(found)
    dtype = pipe.network.dtype
    found = {name: v.to(dtype) if v.is_floating_point() else v for name, v in found.items()}
    return found if pipe.flow else with_sizes(pipe.unet, found, height, width)


def start_means(pipe: Any, conditions: dict[str, Tensor]) -> Tensor | None:
    """The means (n, C, H, W) of the prompts, where samples start; None unless the source is a `PromptSource`.

    Args:
        pipe: a `SIGNPipeline`.
        conditions: of n images.
    """
    if not isinstance(pipe.source, PromptSource):
        return None
    embeds = conditions.get("encoder_hidden_states", conditions.get("prompt_embeds"))
    assert embeds is not None  # such a source is refused for a projector without prompts
    return pipe.source.means(features_of(pipe, PromptEmbeds(embeds, conditions.get("prompt_mask"))))


class Texts:
    """Encodes the prompts of a training. A prompt is encoded once, while there is room for its embeddings.

    Args:
        stock, max_sequence_length: see `encode_texts`.
        pipe: the `SIGNPipeline`, for its source and size.
        device: of the results.
    """

    def __init__(
        self, stock: Any, pipe: Any, device: torch.device, max_sequence_length: int | None = None
    ) -> None:
        self.stock, self.pipe, self.device = stock, pipe, device
        self.max_sequence_length = max_sequence_length
        self.known: dict[tuple[str, bool], dict[str, Tensor]] = {}
        self.size: tuple[int, int] | None = None  # of the images, in pixels
        self._kept = 0

    def conditions(self, prompts: Sequence[str], negative: bool = False) -> dict[str, Tensor]:
        """The conditions of n prompts, float32."""
        new = sorted({prompt for prompt in prompts if (prompt, negative) not in self.known})
        fresh: dict[str, dict[str, Tensor]] = {}
        if new:
            found = encode_texts(self.stock, new, self.max_sequence_length, negative)
            found = {n: (v.float() if v.is_floating_point() else v).cpu() for n, v in found.items()}
            fresh = {p: {name: value[i] for name, value in found.items()} for i, p in enumerate(new)}
        rows = [fresh[p] if p in fresh else self.known[p, negative] for p in prompts]
        for prompt, row in fresh.items():
            self._kept += sum(value.numel() for value in row.values())
            if self._kept < MOST_KEPT:
                self.known[prompt, negative] = row
        stacked = {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}
        stacked = without_padding(stacked)
        return with_sizes(self.pipe.network, stacked, *self.size) if self.size else stacked

    def batch(self, prompts: Sequence[str], guided: bool) -> dict[str, Tensor]:
        """The prompt arguments of the objective; with guidance, those of the empty prompt too."""
        found = self.conditions(prompts)
        mean = start_means(self.pipe, found)
        given = dict(found) if mean is None else {**found, "start_mean": mean}
        if guided:
            empty = self.conditions([""] * len(prompts), negative=True)
            given |= {f"negative_{name}": value for name, value in empty.items()}
        return given
