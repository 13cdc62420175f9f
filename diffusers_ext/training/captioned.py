"""Batches of captioned images, encoded in every step or only once: for UNets of Stable Diffusion and SDXL, and for flows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..core.autoencoders import downsampling_of, encode_pixels, side_of
from ..core.images import check_sides
from ..core.prompts import encode_prompts
from ..core.storage import digest
from .data import Captions, TrainingImages
from .encodings import Shards, encode_once
from .levels import FlowLevels, training_sigmas
from .models import frozen_dtype
from .rows import Batch, Rows
from .transformers import encode_captions, flow_of, flow_of_class, without_padding

# Entries in the config of a UNet for inputs besides the image, the timestep and the embeddings of one encoder.
_INPUTS = {
    "time_cond_proj_dim": "a guidance scale as an input, as in LCM",
    "addition_embed_type": "additional embeddings, as in SDXL",
    "encoder_hid_dim_type": "embeddings of images, as with an IP-Adapter",
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
}


def other_inputs(unet: Any) -> dict[str, str]:
    """{entry in the config: its meaning} for every input of a UNet besides image, timestep and prompt embeddings."""
    found = {name: getattr(unet.config, name, None) for name in _INPUTS}
    found |= {"encoder_hid_dim_type": None} if found["encoder_hid_dim_type"] == "text_proj" else {}
    return {name: _INPUTS[name] for name, value in found.items() if value is not None}


_PARTS = {"unet", "scheduler", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
_PARTS |= {"safety_checker", "feature_extractor", "image_encoder"}


def check_captioned_training(pipe: Any) -> None:
    """Raises a ValueError unless the UNet of the pipeline can be trained on captioned images.

    That is Stable Diffusion or SDXL: `CaptionedBatches` has all inputs of their UNets.
    """
    expected = "expected Stable Diffusion or SDXL for text-to-image"
    there = {name for name, part in getattr(pipe, "components", {}).items() if part is not None}
    missing = [name for name in ("unet", "vae", "text_encoder") if name not in there]
    if missing:
        raise ValueError(f"{type(pipe).__name__} has no {', '.join(missing)}: {expected}.")
    extra = sorted(there - _PARTS)
    if extra:
        raise ValueError(f"{type(pipe).__name__} has {', '.join(extra)}: {expected}.")
    config = pipe.unet.config
    if config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError(
            f"{type(pipe).__name__} has a UNet with {config.in_channels} channels for latents with"
            f" {pipe.vae.config.latent_channels}: {expected}."
        )
    inputs = other_inputs(pipe.unet)
    if config.get("addition_embed_type") == "text_time":
        del inputs["addition_embed_type"]
    if inputs:
        what = next(iter(inputs.values()))
        raise ValueError(f"The UNet of {type(pipe).__name__} takes {what}: {expected}.")


@dataclass(frozen=True)
class Timesteps:
    """Draws timesteps below `count`; a `draw` of `CaptionedRows`."""

    count: int

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """`timesteps` (n,) int64."""
        return {"timesteps": rows.integers(self.count)}


@dataclass(frozen=True)
class CaptionedRows:
    """Reads captioned images, or their encodings if they are cached.

    Attributes:
        images: the images, or shards of `latents`.
        captions: the captions.
        embeds: shards of the embeddings of all texts, if they are cached.
        numbers: {text: its row in `embeds`}.
        channels, side: channels of the latents, and pixels of an image side for each of their elements.
        draw: draws the noise levels.
        proportion_empty_prompts: share of captions to drop.
    """

    images: TrainingImages | Shards
    captions: Captions
    embeds: Shards | None
    numbers: Mapping[str, int]
    channels: int
    side: int
    draw: Callable[[Rows], dict[str, Tensor]]
    proportion_empty_prompts: float = 0.0

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """`images` or `latents`, `captions` or embeddings, `corners` for the conditions of SDXL, `noise` and what `draw` draws."""
        index = rows.indices(len(self.captions)).tolist()
        if isinstance(self.images, Shards):
            found: dict[str, Any] = {**self.images[index], "corners": torch.zeros(len(index), 2)}
            shape = found["latents"].shape[1:]
        else:
            images, corners = self.images.read(index, rows)
            found = {"images": images, "corners": corners}
            shape = self.channels, *(length // self.side for length in images.shape[2:])
        captions = self.captions.draw(rows, index)
        if self.proportion_empty_prompts:
            empty = (rows.uniform() < self.proportion_empty_prompts).tolist()
            captions = ["" if drop else caption for caption, drop in zip(captions, empty)]
        if self.embeds is None:
            found["captions"] = captions
        else:
            found |= self.embeds[[self.numbers[caption] for caption in captions]]
        return {**found, "noise": rows.normal(*shape), **self.draw(rows)}


class CaptionedBatches:
    """The two halves of a batch: `read` is for workers, `encode` for the process that has the pipeline.

    Args:
        args: as from `add_data_arguments`, `add_augmentation_arguments` and `add_training_arguments`. With
            `cache_latents`, images and captions are encoded here and stored in OUTPUT_DIR/encodings. For a flow, those of
            `add_flow_arguments` too.
        accelerator: of the run.
        pipe: Stable Diffusion, SDXL, or one of `transformers.FLOWS`.
        data: as from `load_dataset`.
        made_of: records of the pipeline as it is stored, `model`, and of the images and captions, `data`.
        proportion_empty_prompts: share of captions to drop.

    Attributes:
        read: makes what `encode` takes.
        size: height and width of the first image's latents.

    Raises:
        ValueError: see `check_captioned_training`, `flow_of` and `encode_once`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        pipe: Any,
        data: Any,
        made_of: Mapping[str, Any],
        proportion_empty_prompts: float = 0.0,
    ) -> None:
        flow = flow_of(pipe) if flow_of_class(type(pipe)) else None
        if flow is None:
            check_captioned_training(pipe)
            draw: Any = Timesteps(pipe.scheduler.config.num_train_timesteps)
            channels = pipe.unet.config.in_channels
        else:
            scheme = args.weighting_scheme or flow.weighting_scheme
            draw = FlowLevels(training_sigmas(pipe.scheduler), scheme)
            channels = flow.channels(pipe.transformer)
        self.pipe, self.flow = pipe, flow
        self.max_sequence_length: int | None = getattr(args, "max_sequence_length", None)
        images, captions = TrainingImages(args, data), Captions(args, data)
        side = downsampling_of(pipe)
        latents: TrainingImages | Shards = images
        embeds, numbers = None, {}
        if args.cache_latents:
            latents = self._latents(args, accelerator, images, made_of)
            texts = sorted({text for row in captions.texts for text in row} | {""})
            numbers = {text: number for number, text in enumerate(texts)}
            embeds = self._embeds(args, accelerator, texts, made_of)
        height, width = (length // side for length in images.read([0])[0].shape[2:])
        self.size: tuple[int, int] = height, width
        self.read = CaptionedRows(
            latents,
            captions,
            embeds,
            numbers,
            channels,
            side,
            draw,
            proportion_empty_prompts,
        )

    def encode(self, found: dict[str, Any]) -> Batch:
        """Latents, noise, noise levels and conditions of the denoiser, in float32 and on the device of the pipeline.

        Args:
            found: what `read` returned, with its tensors on the device.

        Returns:
            `latents`, `noise`, what else is in `found`, and the conditions: of a UNet `prompt_embeds` (n, tokens, width), for
                SDXL also `pooled_prompt_embeds` and `time_ids`; of a flow the fields of `transformers.Texts`.
        """
        batch = {
            name: value for name, value in found.items() if name not in ("images", "captions", "corners")
        }
        if "images" in found:
            batch["latents"] = _encode(self.pipe, found["images"])
        height, width = (length * self.read.side for length in batch["latents"].shape[2:])
        if "captions" in found:
            batch |= self._encode_texts(found["captions"])
        batch |= {name: value.float() for name, value in batch.items() if name.endswith("embeds")}
        if self.flow is not None:
            return without_padding(batch)
        if "pooled_prompt_embeds" in batch:
            batch["time_ids"] = time_ids(height, width, found["corners"])
        return batch

    def _encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if self.flow is None:
            return encode_prompts(self.pipe, texts, guidance=False)
        return encode_captions(self.pipe, texts, self.max_sequence_length)

    def _latents(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        images: TrainingImages,
        made_of: Mapping[str, Any],
    ) -> Shards:
        def encode(rows: Sequence[int]) -> dict[str, Tensor]:
            return {"latents": _encode(self.pipe, images.read(rows)[0].to(accelerator.device))}

        recipe = _recipe(accelerator, made_of, "vae") | {
            "data": made_of["data"],
            "resolution": args.resolution,
        }
        folder = Path(args.output_dir) / "encodings" / "latents"
        return encode_once(accelerator, folder, recipe, len(images), encode, args.train_batch_size)

    def _embeds(
        self, args: argparse.Namespace, accelerator: Accelerator, texts: list[str], made_of: Mapping[str, Any]
    ) -> Shards:
        def encode(rows: Sequence[int]) -> dict[str, Tensor]:
            return self._encode_texts([texts[i] for i in rows])

        recipe = _recipe(accelerator, made_of, "text_encoder", "tokenizer") | {"texts": digest(texts)}
        if self.flow is not None:
            recipe["max_sequence_length"] = self.max_sequence_length
        folder = Path(args.output_dir) / "encodings" / "captions"
        return encode_once(accelerator, folder, recipe, len(texts), encode, args.train_batch_size)


def _encode(pipe: Any, images: Tensor) -> Tensor:
    """Latents in float32, whatever the type of the UNet, of images uint8 (n, 3, h, w)."""
    check_sides(images, side_of(pipe))
    return encode_pixels(pipe, images / 127.5 - 1)


def _recipe(accelerator: Accelerator, made_of: Mapping[str, Any], *parts: str) -> dict[str, Any]:
    """What encodings by these parts of a pipeline depend on, besides images and texts."""
    used = {
        name: record
        for name, record in made_of["model"].items()
        if name in ("class", "settings") or name.startswith(parts)
    }
    return {"model": used, "dtype": str(frozen_dtype(accelerator))}


def time_ids(height: int, width: int, corners: Tensor) -> Tensor:
    """The sizes that SDXL is conditioned on, (n, 6) float32.

    Args:
        height, width: size of the images.
        corners: (n, 2), distance of every image from the upper and the left edge of the image that it was cropped from
            at random; 0 for other images.
    """
    size = torch.tensor([height, width], dtype=torch.float32, device=corners.device).expand(len(corners), -1)
    return torch.cat([size, corners.float(), size], 1)
