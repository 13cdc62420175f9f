"""Pictures from a folder, a `datasets.Dataset`, an array or a list, as batches in the scale [−1, 1]."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Pictures:
    """Pictures that are read when they are needed.

    Attributes:
        count: how many there are.
        read: index → PIL image, or (C, H, W) float tensor in [−1, 1].
        name: index → what error messages call that picture.
        labels: one name for each picture, or None.
    """

    count: int
    read: Callable[[int], Any]
    name: Callable[[int], str]
    labels: list[str] | None = None


def open_pictures(
    source: Any, *, labels: str | Sequence[str] | None = None, image_column: str = "image"
) -> Pictures:
    """`source` as `Pictures`; what it may be is told by `diffusers_ext.teleport.sources.encoded_images`.

    Raises:
        ValueError: nothing there, an unknown column, values of another scale, or labels that do not match.
    """
    if isinstance(source, Pictures):
        return source
    if isinstance(source, str | os.PathLike):
        pictures = _folder(Path(source))
    elif hasattr(source, "column_names"):
        return _dataset(source, labels, image_column)
    elif isinstance(source, Tensor):
        pictures = _tensor(source)
    elif isinstance(source, np.ndarray):
        pictures = _array(source)
    elif isinstance(source, Sequence):
        pictures = Pictures(len(source), source.__getitem__, lambda i: f"picture {i}")
    else:
        raise ValueError(
            "Pictures must be a folder, a datasets.Dataset, a tensor, an array or a list of PIL images, "
            f"got {type(source).__name__}."
        )
    if pictures.count == 0:
        raise ValueError("There are no pictures: the list or array is empty.")
    if isinstance(labels, str):
        raise ValueError(
            f"labels={labels!r} names a column, and only a datasets.Dataset has columns. Give one label for "
            "each picture."
        )
    return _labelled(pictures, labels)


def _labelled(pictures: Pictures, labels: Sequence[Any] | None) -> Pictures:
    if labels is None:
        return pictures
    if len(labels) != pictures.count:
        raise ValueError(f"There are {pictures.count} pictures and {len(labels)} labels: give one for each.")
    return Pictures(pictures.count, pictures.read, pictures.name, [str(label) for label in labels])


def _folder(folder: Path) -> Pictures:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of pictures.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"{folder} holds no pictures (looked for {', '.join(EXTENSIONS)}, subfolders too).")
    return Pictures(len(files), lambda i: Image.open(files[i]), lambda i: str(files[i]))


def _dataset(source: Any, labels: str | Sequence[str] | None, image_column: str) -> Pictures:
    columns = source.column_names
    if isinstance(columns, dict):
        raise ValueError(f"Choose one split of the data set, such as dataset[{next(iter(columns))!r}].")
    if not hasattr(source, "__len__"):
        raise ValueError("A streamed data set has no length: load it with streaming=False.")
    for column in (image_column, labels):
        if isinstance(column, str) and column not in columns:
            raise ValueError(f"The data set has no column {column!r}; its columns are {', '.join(columns)}.")
    if len(source) == 0:
        raise ValueError("There are no pictures: the data set is empty.")
    pictures = Pictures(len(source), lambda i: source[i][image_column], lambda i: f"row {i} of the data set")
    if not isinstance(labels, str):
        return _labelled(pictures, labels)
    name = getattr(source.features[labels], "int2str", str)
    return _labelled(pictures, [name(label) for label in source[labels]])


def _tensor(values: Tensor) -> Pictures:
    if not values.is_floating_point() or values.ndim != 4:
        raise ValueError(
            "A tensor of pictures must be (N, C, H, W), float in [-1, 1], got "
            f"{tuple(values.shape)} {values.dtype}. Pass bytes as a uint8 array (N, H, W, C)."
        )
    low, high = (float(values.min()), float(values.max())) if values.numel() else (-1.0, 1.0)
    if not (-1.01 <= low < 0 and high <= 1.01):
        raise ValueError(
            f"A float tensor of pictures must be in [-1, 1]; these values span [{low:g}, {high:g}]. "
            "Bring [0, 1] to that scale with 2 * x - 1."
        )
    return Pictures(len(values), lambda i: values[i].float(), lambda i: f"picture {i}")


def _array(values: np.ndarray) -> Pictures:
    if np.issubdtype(values.dtype, np.floating):
        return _tensor(torch.from_numpy(values))
    if values.dtype != np.uint8 or values.ndim not in (3, 4):
        raise ValueError(
            "An array of pictures must be uint8 (N, H, W, C) or (N, H, W), or float (N, C, H, W) in "
            f"[-1, 1]; got {values.shape} {values.dtype}."
        )
    if values.ndim == 4 and values.shape[-1] == 1:
        values = values[..., 0]
    return Pictures(len(values), lambda i: Image.fromarray(values[i]), lambda i: f"picture {i}")


def picture_batches(
    pictures: Pictures, batch_size: int, channels: int, resolution: int | tuple[int, int] | None
) -> Iterator[tuple[Tensor, list[str] | None]]:
    """Batches ((b, C, H, W) float32 in [−1, 1], b labels or None), in order; the last may be smaller.

    Raises:
        ValueError: a picture that cannot be read, named, or pictures of different sizes in one batch.
    """
    for start in range(0, pictures.count, batch_size):
        indices = range(start, min(start + batch_size, pictures.count))
        rows = [_load(pictures, i, channels, resolution) for i in indices]
        for i, row in zip(indices, rows):
            if row.shape != rows[0].shape:
                raise ValueError(
                    f"{pictures.name(i)} is {row.shape[1]}×{row.shape[2]}, {pictures.name(start)} "
                    f"{rows[0].shape[1]}×{rows[0].shape[2]}: pass resolution= to bring all to one size."
                )
        yield torch.stack(rows), pictures.labels and pictures.labels[start : start + len(rows)]


def _load(pictures: Pictures, index: int, channels: int, resolution: int | tuple[int, int] | None) -> Tensor:
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    try:
        picture = pictures.read(index)
        if isinstance(picture, Image.Image):
            return _to_tensor(picture, channels, size)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{pictures.name(index)} cannot be read as a picture: {error}") from error
    if not isinstance(picture, Tensor):
        raise ValueError(f"{pictures.name(index)} is no picture but a {type(picture).__name__}.")
    if size is not None and tuple(picture.shape[1:]) != tuple(size):
        raise ValueError(
            f"{pictures.name(index)} is a {tuple(picture.shape[1:])} tensor: resolution= resizes pictures "
            "and uint8 arrays only."
        )
    if picture.shape[0] != channels:
        raise ValueError(f"{pictures.name(index)} has {picture.shape[0]} channels, the model {channels}.")
    return picture


def _to_tensor(picture: Image.Image, channels: int, size: tuple[int, int] | None) -> Tensor:
    """(C, H, W) float32 in [−1, 1]: upright, resized and centre-cropped to `size` = (height, width)."""
    if channels not in _MODES:
        raise ValueError(f"The model takes {channels} channels: pass a float tensor (N, {channels}, H, W).")
    picture = ImageOps.exif_transpose(picture).convert(_MODES[channels])
    if size is not None:
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, channels)
    return values.permute(2, 0, 1).float() / 127.5 - 1.0
