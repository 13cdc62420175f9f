"""Pictures to train on: a folder, a data set on the Hub, or the testbed's scenes."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from PIL import Image

from ..extras import require
from . import fashion_scenes


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which pictures, named as in diffusers' own scripts."""
    add = parser.add_argument
    add("--dataset_name", default=None, help="on the Hub, or one that this package draws")
    add(
        "--train_data_dir",
        default=None,
        help="an image folder; with a data set drawn here, Fashion-MNIST's files",
    )
    add("--image_column", default="image")
    add("--caption_column", default="text")
    add("--resolution", type=int, default=None, help="resize and crop to this square; default: as they are")
    add("--max_train_samples", type=int, default=None)


def require_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command with a usage error where the arguments of `add_data_arguments` name no data."""
    if args.dataset_name is None and args.train_data_dir is None:
        parser.error("give --dataset_name or --train_data_dir")


def load_dataset(args: argparse.Namespace, captions: bool = True) -> Any:
    """A `datasets.Dataset` with the columns that the arguments name.

    Args:
        args: as from `add_data_arguments`, and `seed`.
        captions: whether the caption column must be there.

    Raises:
        ValueError: a column is missing.
    """
    if args.dataset_name == "fashion-scenes":
        return fashion_scenes.make_dataset(
            args.train_data_dir, "train", args.max_train_samples or 20_000, args.seed
        )
    load: Any = require("datasets", "train").load_dataset
    data = load(args.dataset_name, split="train") if args.dataset_name else None
    data = data if data is not None else load("imagefolder", data_dir=args.train_data_dir, split="train")
    wanted = [args.image_column, args.caption_column] if captions else [args.image_column]
    missing = [column for column in wanted if column not in data.column_names]
    if missing:
        raise ValueError(
            f"The data has no column {' and no '.join(missing)}: it has {', '.join(data.column_names)}."
        )
    return data.select(range(min(len(data), args.max_train_samples or len(data))))


def pictures_of(args: argparse.Namespace, rows: list[dict[str, Any]], mode: str = "RGB") -> np.ndarray:
    """(n, h, w, channels) in [0, 1], all of one size; `mode` is PIL's, `L` for grey.

    Raises:
        ValueError: pictures of different sizes.
    """
    images = [row[args.image_column].convert(mode) for row in rows]
    if args.resolution is not None:
        images = [_square(image, args.resolution) for image in images]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise ValueError(
            f"Pictures of different sizes {sorted(sizes)[:3]}: give --resolution to make them one."
        )
    array = np.stack([np.asarray(image, dtype=np.float32) / 255 for image in images])
    return array[..., None] if mode == "L" else array


def _square(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    scale = size / min(width, height)
    image = image.resize(
        (max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.LANCZOS
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
