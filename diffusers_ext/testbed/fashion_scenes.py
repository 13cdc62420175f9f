"""Fashion Scenes: captioned images composed from real Fashion-MNIST garments.

A scene is a 32 × 64 RGB image of one garment, centred ("a red bag"), or of two side by side ("a red bag left
of a blue boot"). The prompts are compositional, so a small model can get a prompt wrong, and every word of a
prompt can be checked (`diffusers_ext.testbed.grader`). A tenth of the two-garment prompts is held out:
training scenes never contain those combinations.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import argparse

    import datasets

Split = Literal["train", "test"]

# `shirt` and `pullover` are left out: a small classifier confuses them with t-shirt and coat, and the errors
# of the grader would then mask the measured differences.
_SOURCE_LABELS = {
    0: "t-shirt",
    1: "trouser",
    3: "dress",
    4: "coat",
    5: "sandal",
    7: "sneaker",
    8: "bag",
    9: "boot",
}
ITEMS: tuple[str, ...] = tuple(_SOURCE_LABELS.values())
COLORS: dict[str, tuple[float, float, float]] = {
    "white": (1.0, 1.0, 1.0),
    "red": (1.0, 0.15, 0.15),
    "green": (0.2, 1.0, 0.2),
    "blue": (0.25, 0.35, 1.0),
    "yellow": (1.0, 0.95, 0.2),
    "purple": (0.75, 0.25, 1.0),
    "cyan": (0.2, 1.0, 1.0),
    "orange": (1.0, 0.55, 0.1),
}
HEIGHT, WIDTH, SIZE = 32, 64, 32
SINGLE_SHARE = 0.25
HUB_DATASET = "zalando-datasets/fashion_mnist"
SAMPLE_DIR = Path(__file__).parent / "fashion_mnist_sample"

_PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
_FILES = {"train": "train", "test": "t10k"}
_CAPTION = re.compile(r"a (\S+) (\S+)(?: left of a (\S+) (\S+))?")


@dataclass(frozen=True)
class Garment:
    """A garment of a prompt: a colour of `COLORS` and an item of `ITEMS`."""

    color: str
    item: str


Scene = tuple[Garment, ...]


def caption(scene: Scene) -> str:
    """The prompt of a scene of one or two garments; the article is always "a"."""
    return " left of ".join(f"a {g.color} {g.item}" for g in scene)


def parse_caption(text: str) -> Scene:
    """The scene that a prompt describes.

    Raises:
        ValueError: `text` is not of the form "a COLOR ITEM[ left of a COLOR ITEM]" with known words.
    """
    match = _CAPTION.fullmatch(text)
    words = [w for w in match.groups() if w] if match else []
    scene = tuple(Garment(c, i) for c, i in zip(words[::2], words[1::2]))
    if not scene or any(g.color not in COLORS or g.item not in ITEMS for g in scene):
        raise ValueError(
            f"Not a Fashion Scenes prompt: {text!r}. Expected 'a COLOR ITEM' or 'a COLOR ITEM left of a COLOR"
            f" ITEM' with a colour of {', '.join(COLORS)} and an item of {', '.join(ITEMS)}."
        )
    return scene


@lru_cache(maxsize=1)
def _pairs() -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    garments = [Garment(c, i) for c in COLORS for i in ITEMS]
    pairs = [(left, right) for left in garments for right in garments]
    order = np.random.default_rng(0).permutation(len(pairs))
    held_out = {int(i) for i in order[: round(len(pairs) / 10)]}
    return (
        tuple(p for n, p in enumerate(pairs) if n not in held_out),
        tuple(p for n, p in enumerate(pairs) if n in held_out),
    )


def scenes(split: Split) -> tuple[Scene, ...]:
    """The distinct two-garment scenes of a split: 3,686 to train on, 410 held out."""
    return _pairs()[0 if split == "train" else 1]


def single_scenes() -> tuple[Scene, ...]:
    """The 64 one-garment scenes; they belong to both splits."""
    return tuple((Garment(c, i),) for c in COLORS for i in ITEMS)


def _read_idx(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist. Expected the four Fashion-MNIST idx files (train-images-idx3-ubyte.gz,"
            " train-labels-idx1-ubyte.gz and the two t10k files) in that folder; Debian's package"
            " dataset-fashion-mnist installs them."
        )
    with gzip.open(path) as handle:
        data = handle.read()
    rank = data[3] if len(data) > 3 else 0
    shape = (
        np.frombuffer(data, ">i4", count=rank, offset=4) if len(data) >= 4 + 4 * rank else np.zeros(0, int)
    )
    body = np.frombuffer(data, np.uint8, offset=min(len(data), 4 + 4 * rank))
    if data[:3] != b"\x00\x00\x08" or body.size != int(np.prod(shape)):
        raise ValueError(f"{path} is not a valid idx file of unsigned bytes: download it again.")
    return body.reshape([int(n) for n in shape])


def _hub_arrays(split: Split) -> tuple[np.ndarray, np.ndarray]:
    import datasets

    table = datasets.load_dataset(HUB_DATASET, split=split)
    return np.stack([np.asarray(image) for image in table["image"]]), np.asarray(table["label"])


def load_garments(data_dir: str | Path | None, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The garments of one Fashion-MNIST split, padded to 32 × 32.

    Args:
        data_dir: folder with the four idx `.gz` files, or `None` for the Hub's copy (needs a network).
        split: `"train"` (60,000 images, before two classes are left out) or `"test"` (10,000).

    Returns:
        uint8 images (n, 32, 32) and int64 indices into `ITEMS` (n,).

    Raises:
        ValueError: a file is missing, corrupted or of another kind.
    """
    if data_dir is None:
        images, labels = _hub_arrays(split)
    else:
        stem = _FILES[split]
        images = _read_idx(Path(data_dir) / f"{stem}-images-idx3-ubyte.gz")
        labels = _read_idx(Path(data_dir) / f"{stem}-labels-idx1-ubyte.gz")
    to_item = np.full(10, -1)
    for index, label in enumerate(_SOURCE_LABELS):
        to_item[label] = index
    items = to_item[labels]
    keep = items >= 0
    return np.pad(images[keep], ((0, 0), (2, 2), (2, 2))), items[keep]


def draw_scenes(split: Split, num_scenes: int, seed: int) -> list[Scene]:
    """`num_scenes` random scenes of a split, a quarter of them single; the same seed gives the same list."""
    rng = np.random.default_rng([seed, 1])
    singles, pairs = single_scenes(), scenes(split)
    return [
        singles[rng.integers(len(singles))]
        if rng.random() < SINGLE_SHARE
        else pairs[rng.integers(len(pairs))]
        for _ in range(num_scenes)
    ]


def render(
    scene_list: Sequence[Scene], garments: np.ndarray, items: np.ndarray, seed: int
) -> Iterator[np.ndarray]:
    """Renders scenes as uint8 images (32, 64, 3), with random garments of the wanted items.

    Args:
        scene_list: the scenes.
        garments: uint8 (n, 32, 32), as from `load_garments`.
        items: indices into `ITEMS` (n,).
        seed: seed of the choice of garments.
    """
    rng = np.random.default_rng([seed, 2])
    by_item = [np.flatnonzero(items == i) for i in range(len(ITEMS))]
    palette = dict(zip(COLORS, _PALETTE))
    for scene in scene_list:
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        starts = [(WIDTH - SIZE) // 2] if len(scene) == 1 else [0, SIZE]
        for start, garment in zip(starts, scene):
            choices = by_item[ITEMS.index(garment.item)]
            grey = garments[choices[rng.integers(len(choices))]].astype(np.float32)
            image[:, start : start + SIZE] = np.rint(grey[..., None] * palette[garment.color])
        yield image


def scene_arrays(
    data_dir: str | Path | None, split: Split, num_scenes: int, seed: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Scenes as one uint8 array (n, 32, 64, 3), and their captions.

    The split selects both the garments (Fashion-MNIST's train or test images) and the combinations.
    """
    return compose(split, *load_garments(data_dir, split), num_scenes, seed)


def compose(
    split: Split, garments: np.ndarray, items: np.ndarray, num_scenes: int, seed: int
) -> tuple[np.ndarray, list[str]]:
    """`scene_arrays` of a split's combinations, from given garments (n, 32, 32) and their items (n,)."""
    drawn = draw_scenes(split, num_scenes, seed)
    return np.stack(list(render(drawn, garments, items, seed))), [caption(s) for s in drawn]


def make_dataset(
    data_dir: str | Path | None, split: Split, num_scenes: int, seed: int = 0
) -> datasets.Dataset:
    """A `datasets.Dataset` with the columns `image` (PIL, 64 × 32 RGB) and `text`."""
    import datasets
    from PIL import Image

    garments, items = load_garments(data_dir, split)
    drawn = draw_scenes(split, num_scenes, seed)

    def rows() -> Iterator[dict[str, Any]]:
        for scene, image in zip(drawn, render(drawn, garments, items, seed)):
            yield {"image": Image.fromarray(image), "text": caption(scene)}

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_list(list(rows()), features=features)


def training_prompts(count: int, seed: int) -> list[str]:
    """Captions of `count` training scenes, for `--prompts fashion-prompts`."""
    return [caption(scene) for scene in draw_scenes("train", count, seed)]


def scenes_dataset(args: argparse.Namespace) -> datasets.Dataset:
    """Training scenes for `--dataset_name fashion-scenes`: `max_train_samples` of them (default 20,000).

    Args:
        args: `train_data_dir` (folder with Fashion-MNIST's files), `max_train_samples` and `seed`.
    """
    return make_dataset(args.train_data_dir, "train", args.max_train_samples or 20_000, args.seed)


def garments_dataset(args: argparse.Namespace) -> datasets.Dataset:
    """Training garments, 32 × 32 and grey, for `--dataset_name fashion-mnist`, without captions.

    Args:
        args: `train_data_dir` (folder with Fashion-MNIST's files) and `max_train_samples`.
    """
    import datasets
    from PIL import Image

    images = load_garments(args.train_data_dir, "train")[0][: args.max_train_samples]
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_list(
        [{"image": Image.fromarray(image)} for image in images], features=features
    )
