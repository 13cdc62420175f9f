"""The second grader of Fashion Scenes, which no training, scorer or choice of settings uses.

It differs from the first one in everything that could make both err alike: the network mixes patches, it was trained
on Fashion-MNIST's test images, which neither the base models nor the first grader have seen, and every pixel votes
for the colour. A gain that only the first grader sees is a gain for that grader.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from .embedded import card_dir
from .fashion_scenes import COLORS, ITEMS, Split

if TYPE_CHECKING:
    from ..training.rows import Rows

PALETTE = torch.tensor(list(COLORS.values()))


class _MixerLayer(nn.Module):
    """Mixes positions, with a shortcut, then channels."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.positions = nn.Sequential(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width),
            nn.GELU(),
            nn.BatchNorm2d(width),
        )
        self.channels = nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, width, h, w) → the same shape."""
        return self.channels(x + self.positions(x))


class GarmentJudge(ModelMixin, ConfigMixin):
    """A classifier of 32 × 32 grey garments that mixes patches: ConvMixer (Trockman and Kolter 2022, figure 2).

    Args:
        width: channels of all layers.
        depth: number of layers.
        patch: side of the patches that the image is cut into.
        kernel: side of the depthwise convolutions, odd.
        num_features: size of `features`.
        num_items: number of classes, in the order of `ITEMS`.

    Attributes:
        trained_on, unseen: as for `GarmentClassifier`.
    """

    trained_on: Split = "test"
    unseen: Split = "train"

    @register_to_config
    def __init__(
        self,
        width: int = 64,
        depth: int = 8,
        patch: int = 4,
        kernel: int = 5,
        num_features: int = 64,
        num_items: int = len(ITEMS),
    ) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            nn.Conv2d(1, width, patch, stride=patch), nn.GELU(), nn.BatchNorm2d(width)
        )
        self.layers = nn.Sequential(*[_MixerLayer(width, kernel) for _ in range(depth)])
        self.neck = nn.Linear(width, num_features)
        self.head = nn.Linear(num_features, num_items)

    def features(self, grey: Tensor) -> Tensor:
        """Features (n, num_features) of grey images (n, 1, 32, 32) in [0, 1]."""
        # Depthwise convolutions are several times as fast in this layout.
        x = self.patches(grey * 2 - 1).contiguous(memory_format=torch.channels_last)
        return F.gelu(self.neck(self.layers(x).mean((2, 3))))

    def forward(self, grey: Tensor) -> Tensor:
        """Item logits (n, num_items) of grey images (n, 1, 32, 32) in [0, 1]."""
        return self.head(self.features(grey))

    @staticmethod
    def colors(crops: Tensor) -> Tensor:
        """Colours of crops, see `majority_colors`."""
        return majority_colors(crops)


def majority_colors(crops: Tensor) -> Tensor:
    """Indices into `COLORS` (n,) of the colour that most of each crop (n, 3, h, w) in [0, 1] has.

    Every pixel votes, with its brightness as weight, for the palette colour with the smallest angle to its own in RGB.
    So a garment of two colours has the one that covers more of it, where the first grader takes their mean.
    """
    cosines = torch.einsum("kc,nchw->nkhw", F.normalize(PALETTE.to(crops), dim=1), crops)
    votes = F.one_hot(cosines.argmax(1), len(PALETTE)) * crops.amax(1)[..., None]
    return votes.sum((1, 2)).argmax(1)


def warp(grey: Tensor, draw: Rows) -> Tensor:
    """(n, 1, 32, 32) turned by up to 10°, scaled by 0.85 to 1.15, and half of them mirrored."""
    angle = (2 * draw.uniform() - 1) * math.pi / 18
    size = 0.85 + 0.3 * draw.uniform()
    side = 1 - 2.0 * draw.integers(2)
    cos, sin, zero = angle.cos() / size, angle.sin() / size, torch.zeros(len(grey))
    matrix = torch.stack(
        [torch.stack([side * cos, -sin, zero], 1), torch.stack([side * sin, cos, zero], 1)], 1
    )
    grid = F.affine_grid(matrix, list(grey.shape), align_corners=False)
    return F.grid_sample(grey, grid, align_corners=False)


@lru_cache(maxsize=1)
def load_judge() -> GarmentJudge:
    """The embedded judge, in float32."""
    folder = card_dir("fashion-judge")
    return GarmentJudge.from_pretrained(folder, torch_dtype=torch.float32).eval()  # type: ignore[return-value]
