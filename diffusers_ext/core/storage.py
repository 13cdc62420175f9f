"""Atomic file writes, digests, and folders that record how their content was made.

An interrupted run leaves no incomplete file under a final name. A folder stores a *recipe*, everything that
its content depends on, so content that was made with other settings is not reused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# --- atomic writes ---


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path, which is renamed to `path` if the block succeeds and deleted if it fails.

    Several processes may write the same file. Each has a temporary path of its own, and the last one to
    finish replaces the others.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as JSON, atomically; creates the folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields a new temporary folder, which replaces `folder` if the block succeeds."""
    partial = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


# --- digests ---


def digest(content: bytes | str | Any) -> str:
    """The first 16 hexadecimal digits of SHA-256.

    Args:
        content: bytes, a text, or any other value, which is serialised as JSON with sorted keys.
    """
    if not isinstance(content, bytes):
        text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=repr)
        content = text.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def tensors_digest(*groups: Mapping[str, Tensor]) -> str:
    """`digest` of the names, shapes and values of tensors, in float32, so that a wider type changes nothing."""
    found = hashlib.sha256()
    for tensors in groups:
        for name, value in sorted(tensors.items()):
            found.update(f"{name}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()[:16]


def weights_digest(*modules: nn.Module) -> str:
    """`tensors_digest` of all parameters and buffers."""
    return tensors_digest(*(module.state_dict() for module in modules))


# --- recipes ---


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted name: (value found, value wanted)} of all values in which two recipes differ; None if missing."""
    found, wanted = (json.loads(json.dumps(recipe)) for recipe in (found, wanted))
    differ: dict[str, tuple[Any, Any]] = {}
    for key in sorted(found.keys() | wanted.keys()):
        one, other = found.get(key), wanted.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            differ |= {f"{key}.{name}": values for name, values in differences(one, other).items()}
        elif one != other:
            differ[key] = one, other
    return differ


def show_differences(differ: Mapping[str, tuple[Any, Any]]) -> str:
    """`differences` for an error message: the first few, and the number of the others."""
    shown = [f"{key}: {_short(there)} there, {_short(now)} now" for key, (there, now) in differ.items()]
    more = [f"and {len(shown) - 8} more"] if len(shown) > 8 else []
    return "; ".join(shown[:8] + more)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]} ..."


def check_recipe(path: str | Path, recipe: Mapping[str, Any], advice: str) -> bool:
    """Compares the recipe in a file with the current one.

    Args:
        path: the JSON file.
        recipe: the current recipe, JSON-serialisable.
        advice: the end of the error message, which says what to do.

    Returns:
        Whether the file exists.

    Raises:
        ValueError: the file is corrupted, or its recipe differs; the message names the differences.
    """
    path = Path(path)
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is corrupted ({error}): {advice}.") from error
    differ = differences(found, recipe)
    if differ:
        shown = show_differences(differ)
        raise ValueError(f"The content of {path.parent} was made with other settings ({shown}): {advice}.")
    return True


def shard_path(folder: Path, number: int) -> Path:
    """The path of shard `number` of a folder."""
    return folder / f"shard-{number:06d}.safetensors"


class ShardStore:
    """A folder of safetensors shards with one recipe. An interrupted collection can be resumed.

    Args:
        folder: created if needed.
        recipe: everything that the shards depend on, JSON-serialisable.

    Raises:
        ValueError: the shards in the folder were made with another recipe; the message names the differences.
    """

    RECIPE = "recipe.json"

    def __init__(self, folder: str | Path, recipe: Mapping[str, Any]) -> None:
        self.folder, self.recipe = Path(folder), recipe
        if not check_recipe(self.folder / self.RECIPE, recipe, "choose another folder, or delete it"):
            write_json(self.folder / self.RECIPE, recipe)

    @classmethod
    def recipe_of(cls, folder: str | Path) -> dict[str, Any]:
        """The recipe of a folder of shards.

        Raises:
            ValueError: the recipe is missing or corrupted.
        """
        path = Path(folder) / cls.RECIPE
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder} holds no shards: {path.name} is missing or corrupted ({error})."
            ) from error

    @staticmethod
    def paths(folder: str | Path) -> list[Path]:
        """The complete shards of a folder, in order."""
        return sorted(Path(folder).glob("shard-*.safetensors"))

    def path(self, number: int) -> Path:
        """The path of shard `number`, whether or not it exists."""
        return shard_path(self.folder, number)

    def write(
        self, number: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes a shard, atomically."""
        write_tensors(self.path(number), tensors, metadata)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, atomically."""
    content = {name: value.contiguous() for name, value in tensors.items()}
    with whole_file(path) as partial:
        save_file(content, partial, dict(metadata or {}))


def open_tensors(path: Path) -> Any:
    """Opens a safetensors file with `safe_open`.

    Raises:
        ValueError: the file is missing or corrupted.
    """
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is missing or corrupted ({error}): delete it and create it again."
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: the file is missing or corrupted.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises a ValueError if a tensor of the file contains NaN or infinite values."""
    bad = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if bad:
        raise ValueError(
            f"{path} contains values that are not finite in {', '.join(bad)}: delete it and create it again."
        )
