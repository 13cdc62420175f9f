"""Training images and captions from a folder, the Hub or a function, and the latents and embeddings made from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from ..core.extras import SHORT_NAMES, load_function, require
from ..core.images import ImageSource, encode_images, open_images, prepare_image, read_image, row_name
from ..core.prompts import encode_prompts
from .arguments import positive_int
from .folders import load_image_folder
from .loop import Rows


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
    add(
        "--image_column",
        default="image",
        help="images of 8 or 16 bits, or floats from 0 to 1; transparent ones are put on white",
    )
    add(
        "--caption_column",
        default="text",
        help="texts, which may be empty, or lists of texts, of which each step draws one",
    )
    add(
        "--resolution",
        type=positive_int,
        default=None,
        help="resize and crop images to this square; default: unchanged, not 512 as in diffusers",
    )
    add("--max_train_samples", type=positive_int, default=None, help="use the first images only")


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that change how an image is read in every step, or that read it only once."""
    add = parser.add_argument
    add("--cache_latents", action="store_true", help="encode every image once, before training")
    add(
        "--center_crop",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="crop the centre to --resolution, the default, unlike in diffusers; --no-center_crop crops at random",
    )
    add("--random_flip", action="store_true", help="mirror every image with a probability of 1/2")


def require_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a usage error if the arguments select no data, or contradict each other."""
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("give --dataset_name or --train_data_dir")
    if not getattr(args, "cache_latents", False):
        return
    for name, changes in (("--no-center_crop", not args.center_crop), ("--random_flip", args.random_flip)):
        if changes:
            parser.error(f"{name} changes the images in every step: omit it, or --cache_latents")


def load_dataset(args: argparse.Namespace, captions: bool = True) -> Any:
    """Loads a `datasets.Dataset` with the columns that the arguments name.

    Args:
        args: as from `add_data_arguments`, with `seed` and `cache_dir`.
        captions: whether the caption column is required.

    Raises:
        ValueError: a column or a caption is missing, the folder has images that would not be used, or the
            function does not exist.
    """
    name = SHORT_NAMES.get(args.dataset_name, args.dataset_name)
    if name is not None and ":" in name:
        data = load_function(name, "data set")(args)
    elif name is not None:
        datasets: Any = require("datasets", "train")
        data = datasets.load_dataset(name, split="train", cache_dir=args.cache_dir)
    else:
        data = load_image_folder(args.train_data_dir, args.cache_dir)
    wanted = [args.image_column, args.caption_column] if captions else [args.image_column]
    missing = [column for column in wanted if column not in data.column_names]
    if missing:
        raise ValueError(
            f"The data has no column {' and no '.join(missing)}: it has {', '.join(data.column_names)}."
        )
    data = data.select(range(min(len(data), args.max_train_samples or len(data))))
    open_images(data, image_column=args.image_column)  # refuses an empty data set
    if captions:
        check_captions(args, data)
    return data


def check_captions(args: argparse.Namespace, data: Any) -> None:
    """Raises a ValueError that names the row of the first caption that is no text and no list of texts."""

    def is_caption(value: Any) -> bool:
        texts = value if isinstance(value, list) else [value]
        return bool(texts) and all(isinstance(text, str) for text in texts)

    found = [(i, value) for i, value in enumerate(data[args.caption_column]) if not is_caption(value)]
    if found:
        index, value = found[0]
        raise ValueError(
            f"{row_name(data, index, args.image_column)} has the caption {value!r} (1 of {len(found)} rows without a text):"
            f" expected a text, which may be empty, or a list of texts, in the column {args.caption_column}. Write the"
            " captions as texts, or remove these rows."
        )


class Captions:
    """The captions of a data set's rows. Of a row with several, each step draws one.

    Args:
        args: as from `add_data_arguments`.
        data: as from `load_dataset`.
    """

    def __init__(self, args: argparse.Namespace, data: Any) -> None:
        self.texts = [[v] if isinstance(v, str) else v for v in data[args.caption_column]]
        self._several = any(len(texts) > 1 for texts in self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, rows: Rows, index: Sequence[int]) -> list[str]:
        """One caption for each of the data set's rows `index`, which are the `rows` of a step."""
        # Data with one caption each draws nothing, so that it is trained on as it always was.
        draws = rows.uniform().tolist() if self._several else [0.0] * len(index)
        return [self.texts[i][int(u * len(self.texts[i]))] for i, u in zip(index, draws)]

    def numbered(self, number: int) -> str:
        """Caption `number`: those of all rows in turn; of a row with several, another one in every round."""
        row = self.texts[number % len(self.texts)]
        return row[number // len(self.texts) % len(row)]


def image_arrays(
    args: argparse.Namespace, images: ImageSource, index: Sequence[int], mode: str = "RGB"
) -> np.ndarray:
    """The images of some rows as (n, h, w, channels) in [0, 1], all of one size.

    Args:
        args: as from `add_data_arguments`.
        images: the images of the data set.
        index: the rows.
        mode: PIL's, `L` for grey.

    Raises:
        ValueError: images of different sizes, or an image that cannot be read.
    """
    return _stack([read_image(images, int(i), mode, args.resolution) for i in index], mode)


def _stack(images: Sequence[Any], mode: str) -> np.ndarray:
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
    """Latents of a data set's images by index, in float32, encoded on demand or all at once beforehand.

    Args:
        args: as from `add_data_arguments` and `add_augmentation_arguments`.
        pipe: Stable Diffusion or SDXL.
        data: as from `load_dataset`.

    Raises:
        ValueError: see `check_captioned_training`.
    """

    def __init__(self, args: argparse.Namespace, pipe: Any, data: Any) -> None:
        check_captioned_training(pipe)
        self.args, self.pipe = args, pipe
        self._images = open_images(data, image_column=args.image_column)
        self._cached: Tensor | None = None
        if args.cache_latents:
            lows = tqdm(range(0, len(data), 64), desc="encoding")
            self._cached = torch.cat([self(range(low, min(low + 64, len(data))))[0] for low in lows])

    def __call__(self, index: Sequence[int], rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """Latents (n, C, h, w) of n images, and where they were cropped at random (n, 2), see `encode_captions`.

        Args:
            index: n rows of the data set.
            rows: the rows of the step, which draw how the images are cropped and mirrored; None for neither.
        """
        if self._cached is not None:
            return self._cached[list(index)], torch.zeros(len(index), 2)
        images, corners = self._arrays(index, rows)
        return encode_images(self.pipe, images).float().cpu(), torch.tensor(corners)

    def _arrays(self, index: Sequence[int], rows: Rows | None) -> tuple[np.ndarray, list[tuple[int, int]]]:
        args, crops, flips = self.args, [(0.5, 0.5)] * len(index), [False] * len(index)
        side = None if args.center_crop or rows is None else args.resolution
        if rows is not None and side is not None:
            crops = rows.uniform(2).tolist()
        if rows is not None and args.random_flip:
            flips = (rows.uniform() < 0.5).tolist()
        images, corners = [], []
        for i, centering, flip in zip(index, crops, flips):
            image = read_image(self._images, int(i), "RGB")
            image = ImageOps.mirror(image) if flip else image
            corners.append(_corner(image.size, side, centering) if side else (0, 0))
            images.append(prepare_image(image, "RGB", args.resolution, centering))
        return _stack(images, "RGB"), corners


def _corner(size: tuple[int, int], side: int, centering: tuple[float, float]) -> tuple[int, int]:
    """How far from the top and from the left edge `prepare_image` crops, in pixels of the resized image."""
    left, top = ((length * side / min(size) - side) * at for length, at in zip(size, centering))
    return round(top), round(left)


def encode_captions(
    pipe: Any, captions: Sequence[str], height: int, width: int, corners: Tensor | None = None
) -> dict[str, Tensor]:
    """The conditioning of a UNet for captioned images, in float32.

    Args:
        pipe: Stable Diffusion or SDXL.
        captions: n texts.
        height, width: size of the images.
        corners: (n, 2), distance of every image from the upper and the left edge of the image that it was cropped from
            at random; None or 0 for other images.

    Returns:
        `prompt_embeds` (n, tokens, width), and for SDXL also `pooled_prompt_embeds` and `time_ids`.
    """
    encoded = encode_prompts(pipe, captions, guidance=False)
    found = {name: value.float() for name, value in encoded.items()}
    if "pooled_prompt_embeds" in found:
        size = torch.tensor([height, width], dtype=torch.float32).expand(len(captions), -1)
        corners = torch.zeros_like(size) if corners is None else corners.float()
        found["time_ids"] = torch.cat([size, corners, size], 1)
    return found
