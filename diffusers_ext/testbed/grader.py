"""The automatic grader of Fashion Scenes, which checks whether an image shows every word of its prompt.

A small classifier recognises the item from the crop's channel maximum. The colour is the palette colour
nearest to the crop's mean colour. The last hidden layer of the classifier gives the features of the distances.
All functions take this grader or the second one, `judge.GarmentJudge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.images import as_tensor
from .embedded import card_dir
from .fashion_scenes import COLORS, HEIGHT, ITEMS, SIZE, WIDTH, Split, parse_caption
from .judge import PALETTE, GarmentJudge

if TYPE_CHECKING:
    from ..training.rows import Rows


class GarmentClassifier(ModelMixin, ConfigMixin):
    """A three-block convolutional classifier of 32 × 32 grey garments.

    Args:
        channels: width of each block; the last is the number of features.
        num_items: number of classes, in the order of `ITEMS`.

    Attributes:
        trained_on, unseen: the split of Fashion-MNIST that the embedded grader was trained on, and the other one.
    """

    trained_on: Split = "train"
    unseen: Split = "test"

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (32, 64, 64), num_items: int = len(ITEMS)) -> None:
        super().__init__()
        blocks, previous = [], 1
        for width in channels:
            blocks += [
                nn.Conv2d(previous, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            previous = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(previous, num_items)

    def features(self, grey: Tensor) -> Tensor:
        """Features (n, channels[-1]) of grey images (n, 1, 32, 32) in [0, 1]."""
        return self.blocks(grey * 2 - 1).mean((2, 3))

    def forward(self, grey: Tensor) -> Tensor:
        """Item logits (n, num_items) of grey images (n, 1, 32, 32) in [0, 1]."""
        return self.head(self.features(grey))

    @staticmethod
    def colors(crops: Tensor) -> Tensor:
        """Colours of crops, see `color_indices`."""
        return color_indices(crops)


Grader = GarmentClassifier | GarmentJudge


def _scene_tensor(pictures: np.ndarray | Tensor) -> Tensor:
    x = as_tensor(pictures)
    if x.shape[1:] != (3, HEIGHT, WIDTH):
        raise ValueError(f"Expected scenes of {HEIGHT} × {WIDTH} RGB, got {tuple(x.shape[1:])} (C, H, W).")
    return x


def color_indices(crops: Tensor) -> Tensor:
    """Indices into `COLORS` (n,) of the palette colour nearest to each crop (n, 3, h, w) in [0, 1].

    The mean colour is weighted by brightness, so that the black background does not count, and scaled so that
    its largest channel is 1, like in the palette.
    """
    weight = crops.amax(1, keepdim=True)
    mean = (crops * weight).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1e-6)
    mean = mean / mean.amax(1, keepdim=True).clamp_min(1e-6)
    return torch.cdist(mean, PALETTE.to(mean)).argmin(1)


@torch.no_grad()
def grade(
    classifier: Grader,
    pictures: np.ndarray | Tensor,
    prompts: Sequence[str],
    batch_size: int = 512,
) -> dict[str, np.ndarray]:
    """Checks which words of the prompts the images show.

    Args:
        classifier: a trained grader.
        pictures: images (n, 32, 64, 3) uint8 or float in [0, 1], or a (n, 3, 32, 64) tensor.
        prompts: n captions of Fashion Scenes.
        batch_size: crops per call of the classifier.

    Returns:
        Boolean arrays (n,): `item` and `color` (every item, every colour is correct) and `aligned` (both).

    Raises:
        ValueError: different numbers of images and prompts, an image of another size, or a prompt that is not
            a Fashion Scenes caption.
    """
    crop, owner, want_item, want_color = _crops(pictures, prompts)
    logits = torch.cat([classifier(c.amax(1, keepdim=True)) for c in crop.split(batch_size)])
    item_right = (logits.argmax(1) == want_item).numpy()
    color_right = (classifier.colors(crop) == want_color).numpy()
    item, color = np.ones(len(prompts), bool), np.ones(len(prompts), bool)
    np.logical_and.at(item, owner, item_right)
    np.logical_and.at(color, owner, color_right)
    return {"item": item, "color": color, "aligned": item & color}


@torch.no_grad()
def confidence(classifier: Grader, pictures: np.ndarray | Tensor, prompts: Sequence[str]) -> np.ndarray:
    """The classifier's probability of a prompt's items, float64 (n,) in [0, 1]; 0 if a colour is wrong.

    In a scene with two items, the less probable one counts. Arguments and errors are those of `grade`.
    """
    crop, owner, want_item, want_color = _crops(pictures, prompts)
    likely = classifier(crop.amax(1, keepdim=True)).softmax(1)[torch.arange(len(crop)), want_item]
    sure = (likely * (classifier.colors(crop) == want_color)).double().numpy()
    least = np.ones(len(prompts))
    np.minimum.at(least, owner, sure)
    return least


def _crops(pictures: np.ndarray | Tensor, prompts: Sequence[str]) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Every garment's crop (m, 3, 32, 32), the index of its scene, and the expected item and colour."""
    x = _scene_tensor(pictures)
    if len(x) != len(prompts):
        raise ValueError(f"{len(x)} images but {len(prompts)} prompts: give one prompt for each image.")
    owner, crops, want_item, want_color = [], [], [], []
    colors = list(COLORS)
    for n, prompt in enumerate(prompts):
        scene = parse_caption(prompt)
        starts = [(WIDTH - SIZE) // 2] if len(scene) == 1 else [0, SIZE]
        for start, garment in zip(starts, scene):
            owner.append(n)
            crops.append(x[n, :, :, start : start + SIZE])
            want_item.append(ITEMS.index(garment.item))
            want_color.append(colors.index(garment.color))
    return torch.stack(crops), owner, torch.tensor(want_item), torch.tensor(want_color)


@torch.no_grad()
def scene_features(classifier: Grader, pictures: np.ndarray | Tensor, batch_size: int = 512) -> np.ndarray:
    """Features of scenes for distances between samples, float64 (n, 2 · (d + 3)) for d features of a garment.

    For the left and the right half: the classifier's features of the channel maximum, and the mean colour,
    which the grey classifier does not use, times 4 to bring it to the scale of the other features.
    """
    x = _scene_tensor(pictures)
    halves = torch.cat([x[..., :SIZE], x[..., SIZE:]])
    grey = halves.amax(1, keepdim=True)
    hidden = torch.cat([classifier.features(g) for g in grey.split(batch_size)])
    both = torch.cat([hidden, 4 * halves.mean((2, 3))], 1)
    left, right = both.chunk(2)
    return torch.cat([left, right], 1).double().numpy()


@torch.no_grad()
def garment_features(classifier: Grader, pictures: np.ndarray | Tensor, batch_size: int = 512) -> np.ndarray:
    """Features of 32 × 32 grey garments for distances between samples, float64 (n, d)."""
    x = as_tensor(pictures)
    if x.shape[1:] != (1, SIZE, SIZE):
        raise ValueError(f"Expected grey garments of {SIZE} × {SIZE}, got {tuple(x.shape[1:])} (C, H, W).")
    return torch.cat([classifier.features(g) for g in x.split(batch_size)]).double().numpy()


def augment(grey: Tensor, draw: Rows) -> Tensor:
    """Augments (n, 1, 32, 32) in [0, 1] to resemble generated images: shifted, blurred, dimmed and noisy."""
    n = len(grey)
    shift = torch.stack([draw.integers(5) - 2, draw.integers(5) - 2], 1)
    rows = (torch.arange(SIZE)[None] + shift[:, :1]).clamp(0, SIZE - 1)
    cols = (torch.arange(SIZE)[None] + shift[:, 1:]).clamp(0, SIZE - 1)
    x = grey[torch.arange(n)[:, None, None], 0, rows[:, :, None], cols[:, None, :]][:, None]
    blur = draw.uniform(1, 1, 1) * 0.7
    x = (1 - blur) * x + blur * F.avg_pool2d(x, 3, 1, 1)
    x = x * (0.7 + 0.3 * draw.uniform(1, 1, 1))
    noise = 0.05 * draw.uniform(1, 1, 1) * draw.normal(1, SIZE, SIZE)
    return (x + noise).clamp(0, 1)


def read_grader(folder: str | Path) -> Grader:
    """A grader of either kind from its folder, in float32.

    Raises:
        ValueError: the folder holds no grader.
    """
    name = GarmentClassifier.load_config(folder).get("_class_name")
    for kind in (GarmentClassifier, GarmentJudge):
        if kind.__name__ == name:
            return kind.from_pretrained(folder, torch_dtype=torch.float32).eval()  # type: ignore[return-value]
    raise ValueError(
        f"{folder} holds a {name}, expected GarmentClassifier or GarmentJudge: give a folder that"
        " training/train_base.py --model grader or --model judge has written."
    )


@lru_cache(maxsize=1)
def load_grader() -> GarmentClassifier:
    """The embedded grader, in float32."""
    folder = card_dir("fashion-grader")
    return GarmentClassifier.from_pretrained(folder, torch_dtype=torch.float32).eval()  # type: ignore[return-value]


def score(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """The scorer of `--scorer fashion-grader`: `confidence` of the embedded grader."""
    return confidence(load_grader(), images, prompts)
