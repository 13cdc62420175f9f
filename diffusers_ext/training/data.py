"""Training images and captions from a folder, the Hub or a function."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from ..core.extras import SHORT_NAMES, load_function, require
from ..core.images import open_images, prepare_image, read_image, row_name
from .arguments import positive_int
from .folders import load_image_folder
from .rows import Rows


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


def add_augmentation_arguments(parser: argparse.ArgumentParser, cache: bool = True) -> None:
    """Adds the arguments that change how an image is read in every step, and with `cache` the one that excludes them."""
    add = parser.add_argument
    if cache:
        add(
            "--cache_latents",
            action="store_true",
            help="encode every image and every caption once, before training, and store them in OUTPUT_DIR/encodings",
        )
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


class TrainingImages:
    """The images of a data set, cropped and mirrored as the arguments say.

    Args:
        args: as from `add_data_arguments` and `add_augmentation_arguments`.
        data: as from `load_dataset`.
        mode: PIL's, `L` for grey.
    """

    def __init__(self, args: argparse.Namespace, data: Any, mode: str = "RGB") -> None:
        self.data, self.mode, self.column, self.resolution = data, mode, args.image_column, args.resolution
        self.random_crop, self.random_flip = not args.center_crop, args.random_flip

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: Sequence[int], rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """n images, uint8 (n, C, h, w), and where they were cropped at random, (n, 2), see `captioned.time_ids`.

        Args:
            index: n rows of the data set.
            rows: the rows of the step, which draw how the images are cropped and mirrored; None for neither.

        Raises:
            ValueError: images of different sizes, or an image that cannot be read.
        """
        source = open_images(self.data, image_column=self.column)
        crops, flips = [(0.5, 0.5)] * len(index), [False] * len(index)
        side = self.resolution if self.random_crop and rows is not None else None
        if rows is not None and side is not None:
            crops = rows.uniform(2).tolist()
        if rows is not None and self.random_flip:
            flips = (rows.uniform() < 0.5).tolist()
        images, corners = [], []
        for i, centering, flip in zip(index, crops, flips):
            image = read_image(source, int(i), self.mode)
            image = ImageOps.mirror(image) if flip else image
            corners.append(_corner(image.size, side, centering) if side else (0, 0))
            images.append(prepare_image(image, self.mode, self.resolution, centering))
        sizes = {image.size for image in images}
        if len(sizes) > 1:
            raise ValueError(
                f"Images of different sizes {sorted(sizes)[:3]}: give --resolution to resize them."
            )
        array = np.stack([np.asarray(image) for image in images])
        pixels = torch.from_numpy(array[..., None] if self.mode == "L" else array)
        return pixels.movedim(-1, 1).contiguous(), torch.tensor(corners)


def _corner(size: tuple[int, int], side: int, centering: tuple[float, float]) -> tuple[int, int]:
    """How far from the top and from the left edge `prepare_image` crops, in pixels of the resized image."""
    left, top = ((length * side / min(size) - side) * at for length, at in zip(size, centering))
    return round(top), round(left)
