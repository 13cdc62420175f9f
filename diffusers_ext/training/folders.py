"""Image folders: every image of the folder is trained on, or the folder is refused."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

from ..core.extras import require
from ..core.images import EXTENSIONS
from ..core.text import read_text

# Names of folders that `datasets` takes for splits.
_OTHER_SPLITS = "validation|valid|val|dev|test|testing|eval|evaluation"
_SPLIT = re.compile(rf"(?:.*[-._ 0-9])?(?:(train|training)|(?:{_OTHER_SPLITS}))(?:[-._ 0-9].*)?")


def load_image_folder(folder: str, cache_dir: str | None = None) -> Any:
    """The training split of an image folder as a `datasets.Dataset`.

    That is the folder `train`, if there is one, or all images. File names do not matter.

    Raises:
        ValueError: no such folder, no images, images that would not be trained on, lines of metadata without an image,
            or metadata that cannot be read.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        raise ValueError(f"--train_data_dir {folder} is not a folder.")
    files = [path for path in root.rglob("*") if not _hidden(path.relative_to(root))]
    images = sorted(path for path in files if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not images:
        raise ValueError(f"--train_data_dir {folder} holds no images (looked for {', '.join(EXTENSIONS)}).")
    parts = _training_parts(root, images)
    for path in files:
        if path.name in ("metadata.jsonl", "metadata.csv") and _inside(path, parts):
            read_text(path)  # names the file and the place if it is not UTF-8
    # Explicit patterns, since `datasets` takes names like test_1.png for another split.
    patterns = [f"{glob.escape(str(part))}/**" for part in parts]
    datasets: Any = require("datasets", "train")
    try:
        data = datasets.load_dataset(
            "imagefolder", data_files={"train": patterns}, split="train", cache_dir=cache_dir
        )
    except Exception as error:
        raise ValueError(f"The image folder {folder} cannot be loaded: {error.__cause__ or error}") from error
    _check_all_used(data, [path for path in images if _inside(path, parts)])
    return data


def _hidden(path: PurePath) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _inside(path: Path, folders: Iterable[Path]) -> bool:
    return any(folder in path.parents for folder in folders)


def _training_parts(root: Path, images: list[Path]) -> list[Path]:
    """The folders of the training split, or only `root` if its folders are no splits."""
    # {name of the split: {its folder: its first image}}
    found: dict[str, dict[Path, Path]] = {}
    for path in images:
        split, part = _split_of(root, path)
        found.setdefault(split, {}).setdefault(part, path)
    if found.keys() <= {"", "train"} and len(found) == 1:
        return [root]
    if "" in found or "train" not in found:
        examples = {name or "no split": next(iter(parts.values())) for name, parts in found.items()}
        shown = ", ".join(f"{path.relative_to(root)} ({name})" for name, path in sorted(examples.items()))
        raise ValueError(
            f"It is not clear which images of {root} are for training: {shown}. Move all of them into a folder train,"
            " or rename the folders that are called like a split of the data."
        )
    return list(found["train"])


def _split_of(root: Path, path: Path) -> tuple[str, Path]:
    part = root
    for name in path.relative_to(root).parts[:-1]:
        part /= name
        match = _SPLIT.fullmatch(name)
        if match:
            return "train" if match[1] else "another split", part
    return "", root


def _check_all_used(data: Any, images: list[Path]) -> None:
    """Raises a ValueError unless the data has exactly these images, besides those of archives."""
    used: set[str] = set()
    for column, feature in data.features.items():
        if hasattr(feature, "decode_example"):
            stored = data.select_columns(column).cast_column(column, type(feature)(decode=False))
            used |= {os.path.normpath(row[column]["path"]) for row in stored if row[column]}
    left = [path for path in images if str(path) not in used]
    if left:
        raise ValueError(
            f"{left[0]} has no line in the metadata and would not be trained on (1 of {len(left)} images): add lines with"
            " their file_name, or move the images out of the folder."
        )
    missing = sorted(
        p for p in used - {str(path) for path in images} if not os.path.exists(p) and "::" not in p
    )
    if missing:
        raise ValueError(
            f"{missing[0]} of the metadata does not exist (1 of {len(missing)} files): add the files, or remove their"
            " lines."
        )
