"""Reading images, converting them to tensors and latents, and saving grids.

Image tensors are (n, C, h, w) float32. They are in [0, 1] for users and in [−1, 1] for models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .autoencoders import channels_of, encode_pixels, side_of, vae_of
from .families import denoiser_of

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


# --- one batch in memory ---


def as_tensor(images: Any, mode: str = "RGB") -> Tensor:
    """Converts a batch of images of one size to float32 (n, C, h, w) in [0, 1].

    Args:
        images: one or more PIL images, an array (n, h, w[, C]) of uint8 or of floats in [0, 1] as pipelines
            return it (`output_type="np"`), or a tensor (n, C, h, w) in [0, 1].
        mode: the PIL mode that PIL images are converted to: "L", "RGB" or "RGBA".

    Raises:
        ValueError: not a batch of images, images of different sizes, values outside [0, 1], or NaN.
    """
    if isinstance(images, Tensor):
        given, x = images, images.float().contiguous()
    else:
        given = images if isinstance(images, np.ndarray) else _stack(images, mode)
        x = torch.from_numpy(given.astype(np.float32) / (255 if given.dtype == np.uint8 else 1))
        x = (x[:, None] if x.ndim == 3 else x.movedim(-1, 1)).contiguous()
    if x.ndim != 4 or x.numel() == 0 or not torch.isfinite(x).all() or x.min() < 0 or x.max() > 1:
        span = f", values from {float(x.min()):.3g} to {float(x.max()):.3g}" if x.numel() else ""
        raise ValueError(
            "Expected images as (n, h, w[, channels]) in [0, 1] or uint8, or a tensor (n, channels, h, w) in [0, 1],"
            f" without NaN; got shape {tuple(given.shape)} of {given.dtype}{span}."
        )
    return x


def _stack(images: Any, mode: str) -> np.ndarray:
    images = [images] if isinstance(images, Image.Image) else list(images)
    if not all(isinstance(image, Image.Image) for image in images):
        kinds = ", ".join(sorted({type(image).__name__ for image in images}))
        raise ValueError(f"Expected PIL images, an array or a tensor, got a sequence of {kinds}.")
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        shown = ", ".join(f"{w} × {h}" for w, h in sizes[:3]) or "none"
        raise ValueError(f"Give one or more images of one size, got {shown}: resize them first.")
    return np.stack([np.asarray(_convert(image, mode, image.format)) for image in images])


def prepare_image(
    image: Image.Image,
    mode: str,
    size: int | tuple[int, int] | None = None,
    centering: tuple[float, float] = (0.5, 0.5),
) -> Image.Image:
    """Applies the EXIF orientation, converts to PIL's `mode`, then resizes and crops.

    Images with 16 bits are scaled to 8 bits, floats from [0, 1]. Transparent images are put on white, except for RGBA.

    Args:
        image: any PIL image.
        mode: "L", "RGB" or "RGBA".
        size: the side of a square, or (height, width); None keeps the size.
        centering: where to crop, from (0, 0), the upper left, to (1, 1), the lower right.

    Raises:
        ValueError: integers or floats of an unknown range.
    """
    image = _convert(ImageOps.exif_transpose(image), mode, image.format)
    if size is None:
        return image
    height, width = (size, size) if isinstance(size, int) else size
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=centering)


def _convert(image: Image.Image, mode: str, file_format: str | None) -> Image.Image:
    if image.mode[0] in "IF":
        image = _eight_bits(image, file_format)
    if mode != "RGBA" and image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


def _eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    # PIL's own conversion clips at 255.
    values = np.asarray(image)
    # PIL reads the 16 bits of PNG and PGM into 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        scaled = values / 65535
    elif image.mode == "F" and values.size and values.min() >= 0 and values.max() <= 1:
        scaled = values
    else:
        raise ValueError(
            f"{'float' if image.mode == 'F' else '32-bit integer'} image with values from {values.min():g} to"
            f" {values.max():g}, whose range is not known: save it with 8 or 16 bits, or as floats from 0 to 1"
        )
    grey = Image.fromarray((scaled * 255).round().astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # a grey value
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def save_grid(images: Tensor, columns: int, path: str | Path, scale: int = 2) -> None:
    """Saves images (n, C, h, w) in [0, 1] as one PNG, `columns` per row, enlarged by the factor `scale`."""
    columns = min(columns, len(images))
    whole_rows = images[: len(images) // columns * columns].split(columns)
    grid = torch.cat([torch.cat(list(row), 2) for row in whole_rows], 1)
    array = (grid.movedim(0, 2).numpy() * 255).round().astype(np.uint8)
    size = (array.shape[1] * scale, array.shape[0] * scale)
    Image.fromarray(array.squeeze()).resize(size).save(path)


def save_png(image: Image.Image, path: str | Path, texts: Mapping[str, Any]) -> None:
    """Saves an image with text chunks: texts as they are, any other value as JSON."""
    chunks = PngInfo()
    for name, value in texts.items():
        chunks.add_text(name, value if isinstance(value, str) else json.dumps(value))
    image.save(path, pnginfo=chunks)


def side_by_side(left: Sequence[Image.Image], right: Sequence[Image.Image]) -> Image.Image:
    """One image with a row for each pair of images of one size."""
    width, height = left[0].size
    page = Image.new("RGB", (2 * width, height * len(left)))
    for row, pair in enumerate(zip(left, right)):
        for column, image in enumerate(pair):
            page.paste(image, (column * width, row * height))
    return page


# --- latents ---


@torch.no_grad()
def encode_images(pipe: Any, images: Any) -> Tensor:
    """Encodes images to latents in the scale that the pipeline denoises, with the mean of the posterior.

    Args:
        pipe: a pipeline or an autoencoder. A pipeline without an autoencoder works on pixels; the result is then in
            [−1, 1].
        images: see `as_tensor`.

    Returns:
        (n, c, h', w'), not packed (Flux.2: (n, 4c, h'/2, w'/2), as its denoiser has them); (n, c, 1, h', w') for
        videos, of which an image is one frame. In the dtype of the denoiser and on the pipeline's device; in those
        of an autoencoder that is given alone.

    Raises:
        ValueError: an unsupported layout, range or number of channels, a size that is not a multiple of the
            downsampling factor, or a pipeline or an autoencoder that is not known.
    """
    vae = vae_of(pipe)
    alone = not isinstance(pipe, DiffusionPipeline)
    model = vae if alone else denoiser_of(pipe)
    side = side_of(pipe)
    channels = channels_of(pipe)
    x = as_tensor(images, _MODES.get(channels, "RGB"))
    if x.shape[1] != channels:
        raise ValueError(
            f"Expected images of {channels} channels, got {tuple(x.shape)} as (n, channels, h, w)."
        )
    check_sides(x, side)
    x = (2 * x - 1).to(vae.device if alone else pipe._execution_device)
    return (x if vae is None else encode_pixels(pipe, x)).to(model.dtype)


def check_sides(images: Tensor, side: int) -> None:
    """Raises a ValueError unless images (n, C, h, w) are multiples of `side` high and wide."""
    height, width = images.shape[2:]
    if height % side or width % side:
        raise ValueError(
            f"Images must be multiples of {side} high and wide, got {height} × {width}: resize or crop."
        )


# --- many images, read when needed ---


@dataclass(frozen=True)
class ImageSource:
    """A collection of images that are read when needed.

    Attributes:
        count: number of images.
        read: maps an index to a PIL image or a (C, H, W) float tensor in [−1, 1].
        name: maps an index to the name of the image in error messages.
        labels: one label per image, or None.
    """

    count: int
    read: Callable[[int], Any]
    name: Callable[[int], str]
    labels: list[str] | None = None


def open_images(
    source: Any, *, labels: str | Sequence[str] | None = None, image_column: str = "image"
) -> ImageSource:
    """Opens `source` as an `ImageSource`; see `diffusers_ext.encoded_images` for the supported sources.

    Raises:
        ValueError: no images, an unknown column, values in another range, or labels that do not match.
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, str | os.PathLike):
        images = _folder(Path(source))
    elif hasattr(source, "column_names"):
        return _dataset(source, labels, image_column)
    elif isinstance(source, Tensor):
        images = _tensor(source)
    elif isinstance(source, np.ndarray):
        images = _array(source)
    elif isinstance(source, Sequence):
        images = ImageSource(len(source), source.__getitem__, lambda i: f"image {i}")
    else:
        raise ValueError(
            "Images must be a folder, a datasets.Dataset, a tensor, an array or a list of PIL images, "
            f"got {type(source).__name__}."
        )
    if images.count == 0:
        raise ValueError("There are no images: the list or array is empty.")
    if isinstance(labels, str):
        raise ValueError(
            f"labels={labels!r} names a column, and only a datasets.Dataset has columns. Give one label for "
            "each image."
        )
    return _labelled(images, labels)


def _labelled(images: ImageSource, labels: Sequence[Any] | None) -> ImageSource:
    if labels is None:
        return images
    if len(labels) != images.count:
        raise ValueError(f"There are {images.count} images and {len(labels)} labels: give one for each.")
    return ImageSource(images.count, images.read, images.name, [str(label) for label in labels])


def _folder(folder: Path) -> ImageSource:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not files:
        raise ValueError(f"{folder} holds no images (looked for {', '.join(EXTENSIONS)}, subfolders too).")
    return ImageSource(len(files), lambda i: Image.open(files[i]), lambda i: str(files[i]))


def _dataset(source: Any, labels: str | Sequence[str] | None, image_column: str) -> ImageSource:
    columns = source.column_names
    if isinstance(columns, dict):
        raise ValueError(f"Choose one split of the data set, such as dataset[{next(iter(columns))!r}].")
    if not hasattr(source, "__len__"):
        raise ValueError("A streamed data set has no length: load it with streaming=False.")
    for column in (image_column, labels):
        if isinstance(column, str) and column not in columns:
            raise ValueError(f"The data set has no column {column!r}; its columns are {', '.join(columns)}.")
    if len(source) == 0:
        raise ValueError("There are no images: the data set is empty.")
    images = ImageSource(
        len(source), lambda i: source[i][image_column], lambda i: row_name(source, i, image_column)
    )
    if not isinstance(labels, str):
        return _labelled(images, labels)
    name = getattr(source.features[labels], "int2str", str)
    return _labelled(images, [name(label) for label in source[labels]])


def row_name(source: Any, index: int, image_column: str) -> str:
    """What error messages call a row of a `datasets.Dataset`: its file, if it has one, and its number."""
    name, feature = f"row {index} of the data set", source.features.get(image_column)
    if not hasattr(feature, "decode_example"):
        return name
    # Not decoded, since this is the name of an image that may be damaged.
    stored = source.cast_column(image_column, type(feature)(decode=False))[index][image_column]
    return f"{stored['path']} ({name})" if stored and stored["path"] else name


def _tensor(values: Tensor) -> ImageSource:
    if not values.is_floating_point() or values.ndim != 4:
        raise ValueError(
            "A tensor of images must be (N, C, H, W), float in [-1, 1], got "
            f"{tuple(values.shape)} {values.dtype}. Pass bytes as a uint8 array (N, H, W, C)."
        )
    low, high = (float(values.min()), float(values.max())) if values.numel() else (-1.0, 1.0)
    if not (-1.01 <= low < 0 and high <= 1.01):
        raise ValueError(
            f"A float tensor of images must be in [-1, 1]; these values span [{low:g}, {high:g}]. "
            "Convert from [0, 1] with 2 * x - 1."
        )
    return ImageSource(len(values), lambda i: values[i].float(), lambda i: f"image {i}")


def _array(values: np.ndarray) -> ImageSource:
    if np.issubdtype(values.dtype, np.floating):
        return _tensor(torch.from_numpy(values))
    if values.dtype != np.uint8 or values.ndim not in (3, 4):
        raise ValueError(
            "An array of images must be uint8 (N, H, W, C) or (N, H, W), or float (N, C, H, W) in "
            f"[-1, 1]; got {values.shape} {values.dtype}."
        )
    if values.ndim == 4 and values.shape[-1] == 1:
        values = values[..., 0]
    return ImageSource(len(values), lambda i: Image.fromarray(values[i]), lambda i: f"image {i}")


def image_batches(
    images: ImageSource, batch_size: int, channels: int, resolution: int | tuple[int, int] | None
) -> Iterator[tuple[Tensor, list[str] | None]]:
    """Yields batches ((b, C, H, W) float32 in [−1, 1], b labels or None) in order; the last may be smaller.

    Raises:
        ValueError: an image that cannot be read (the message names it), or images of different sizes in one
            batch.
    """
    for start in range(0, images.count, batch_size):
        indices = range(start, min(start + batch_size, images.count))
        rows = [_load(images, i, channels, resolution) for i in indices]
        for i, row in zip(indices, rows):
            if row.shape != rows[0].shape:
                raise ValueError(
                    f"{images.name(i)} is {row.shape[1]}×{row.shape[2]}, {images.name(start)} "
                    f"{rows[0].shape[1]}×{rows[0].shape[2]}: pass resolution= to resize all to one size."
                )
        yield torch.stack(rows), images.labels and images.labels[start : start + len(rows)]


def read_image(
    images: ImageSource,
    index: int,
    mode: str,
    size: int | tuple[int, int] | None = None,
    centering: tuple[float, float] = (0.5, 0.5),
) -> Any:
    """One image, prepared by `prepare_image` if it is a PIL image, else as it is.

    Raises:
        ValueError: the image cannot be read; the message names it.
    """
    try:
        image = images.read(index)
        return prepare_image(image, mode, size, centering) if isinstance(image, Image.Image) else image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{images.name(index)} cannot be read as an image: {error}") from error


def _load(images: ImageSource, index: int, channels: int, resolution: int | tuple[int, int] | None) -> Tensor:
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    image = read_image(images, index, _MODES.get(channels, "RGB"), size)
    if isinstance(image, Image.Image):
        return _to_tensor(image, channels)
    if not isinstance(image, Tensor):
        raise ValueError(f"{images.name(index)} is not an image but a {type(image).__name__}.")
    if size is not None and tuple(image.shape[1:]) != tuple(size):
        raise ValueError(
            f"{images.name(index)} is a {tuple(image.shape[1:])} tensor: resolution= resizes images "
            "and uint8 arrays only."
        )
    if image.shape[0] != channels:
        raise ValueError(
            f"{images.name(index)} has {image.shape[0]} channels, but the model takes {channels}."
        )
    return image


def _to_tensor(image: Image.Image, channels: int) -> Tensor:
    """(C, H, W) float32 in [−1, 1] of a prepared image."""
    if channels not in _MODES:
        raise ValueError(f"The model takes {channels} channels: pass a float tensor (N, {channels}, H, W).")
    values = torch.from_numpy(np.array(image)).reshape(image.height, image.width, channels)
    return values.permute(2, 0, 1).float() / 127.5 - 1.0
