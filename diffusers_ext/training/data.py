"""Training images from a folder, the Hub or a function, and the latents and embeddings made from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..core.extras import SHORT_NAMES, load_function, require
from ..core.images import encode_images, prepare_image
from ..core.prompts import encode_prompts


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that select the images, named as in diffusers' own scripts."""
    add = parser.add_argument
    add(
        "--dataset_name",
        default=None,
        help="data set on the Hub, or package.module:function (or FILE.py:FUNCTION) that takes the arguments"
        " and returns a datasets.Dataset",
    )
    add(
        "--train_data_dir",
        default=None,
        help="image folder, or the folder that the function of --dataset_name reads",
    )
    add("--image_column", default="image")
    add("--caption_column", default="text")
    add(
        "--resolution",
        type=int,
        default=None,
        help="resize and crop images to this square; default: unchanged",
    )
    add("--max_train_samples", type=int, default=None)


def require_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a usage error if the arguments of `add_data_arguments` select no data."""
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("give --dataset_name or --train_data_dir")


def load_dataset(args: argparse.Namespace, captions: bool = True) -> Any:
    """Loads a `datasets.Dataset` with the columns that the arguments name.

    Args:
        args: as from `add_data_arguments`, and `seed`.
        captions: whether the caption column is required.

    Raises:
        ValueError: a column is missing, or the function does not exist.
    """
    name = SHORT_NAMES.get(args.dataset_name, args.dataset_name)
    if name is not None and ":" in name:
        data = load_function(name, "data set")(args)
    else:
        load: Any = require("datasets", "train").load_dataset
        folder = {"path": "imagefolder", "data_dir": args.train_data_dir}
        data = load(**({"path": name} if name else folder), split="train")
    wanted = [args.image_column, args.caption_column] if captions else [args.image_column]
    missing = [column for column in wanted if column not in data.column_names]
    if missing:
        raise ValueError(
            f"The data has no column {' and no '.join(missing)}: it has {', '.join(data.column_names)}."
        )
    return data.select(range(min(len(data), args.max_train_samples or len(data))))


def image_arrays(args: argparse.Namespace, rows: list[dict[str, Any]], mode: str = "RGB") -> np.ndarray:
    """Images of the rows as (n, h, w, channels) in [0, 1], all of one size; `mode` is PIL's, `L` for grey.

    Raises:
        ValueError: images of different sizes.
    """
    images = [prepare_image(row[args.image_column], mode, args.resolution) for row in rows]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(f"Images of different sizes {sorted(sizes)[:3]}: give --resolution to resize them.")
    array = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
    return array[..., None] if mode == "L" else array


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

    That is Stable Diffusion or SDXL: `encode_captions` has all inputs of their UNets.
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


class TrainingLatents:
    """Latents of a data set's images by index, encoded on demand or all at once beforehand.

    Args:
        args: as from `add_data_arguments`, and `cache_latents`.
        pipe: Stable Diffusion or SDXL.
        data: as from `load_dataset`.

    Raises:
        ValueError: see `check_captioned_training`.
    """

    def __init__(self, args: argparse.Namespace, pipe: Any, data: Any) -> None:
        check_captioned_training(pipe)
        self.args, self.pipe, self.data = args, pipe, data
        self._cached: Tensor | None = None
        if args.cache_latents:
            lows = tqdm(range(0, len(data), 64), desc="encoding")
            self._cached = torch.cat([self(range(low, min(low + 64, len(data)))) for low in lows])

    def __call__(self, index: Sequence[int]) -> Tensor:
        """(len(index), C, h, w), on the CPU."""
        if self._cached is not None:
            return self._cached[list(index)]
        images = image_arrays(self.args, [self.data[int(i)] for i in index])
        return encode_images(self.pipe, images).cpu()


def encode_captions(pipe: Any, captions: Sequence[str], height: int, width: int) -> dict[str, Tensor]:
    """The conditioning of a UNet for captioned images.

    Args:
        pipe: Stable Diffusion or SDXL.
        captions: n texts.
        height, width: size of the images, which are not cropped.

    Returns:
        `prompt_embeds` (n, tokens, width), and for SDXL also `pooled_prompt_embeds` and `time_ids`.
    """
    found = encode_prompts(pipe, captions, guidance=False)
    if "pooled_prompt_embeds" in found:
        size = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        found["time_ids"] = size.expand(len(captions), -1)
    return found
