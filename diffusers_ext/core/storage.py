"""Files that are whole or not there, digests, and folders that remember what made them.

A killed run never leaves half a file under its final name, and what was made by something else is never taken for
one's own: a folder keeps one *recipe*, everything that its content depends on.
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

# --- whole files ---


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to, which gets the name `path` once the block has ended well, and is gone if it has not.

    Several processes may write the same file: each has a neighbour of its own, the last one's stays.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Writes `content` as JSON, whole or not at all; the folder is made if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder to write into, which gets the name `folder` only once everything is in it."""
    partial = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


# --- digests ---


def digest(content: bytes | str | Any) -> str:
    """Sixteen hexadecimal digits of SHA-256: of bytes, of a text, or of anything else as JSON with sorted keys."""
    if not isinstance(content, bytes):
        text = content if isinstance(content, str) else json.dumps(content, sort_keys=True, default=repr)
        content = text.encode()
    return hashlib.sha256(content).hexdigest()[:16]


def weights_digest(*modules: nn.Module) -> str:
    """`digest` of the names, shapes and values of all weights and buffers, in float32."""
    found = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            found.update(f"{name}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()[:16]


# --- recipes ---


def check_recipe(path: str | Path, recipe: Mapping[str, Any], advice: str) -> bool:
    """Compares a recipe file with what would make the same content now.

    Args:
        path: of the JSON file.
        recipe: JSON-serialisable.
        advice: the end of the error message: what to do.

    Returns:
        Whether the file is there.

    Raises:
        ValueError: it is not whole, or it says otherwise; the message names what differs.
    """
    path, wanted = Path(path), json.loads(json.dumps(recipe))
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not whole ({error}): {advice}.") from error
    differ = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if differ:
        shown = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in differ)
        raise ValueError(f"The content of {path.parent} was made otherwise ({shown}): {advice}.")
    return True


class ShardStore:
    """A folder of safetensors shards with one recipe; a killed collection goes on where it stopped.

    Args:
        folder: created if need be.
        recipe: what the shards depend on, JSON-serialisable.

    Raises:
        ValueError: the folder's shards were made by another recipe; the message names what differs.
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
            ValueError: there is none, or it is not whole.
        """
        path = Path(folder) / cls.RECIPE
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder} holds no shards: {path.name} is missing or not whole ({error})."
            ) from error

    @staticmethod
    def paths(folder: str | Path) -> list[Path]:
        """The whole shards of a folder in order."""
        return sorted(Path(folder).glob("shard-*.safetensors"))

    def path(self, number: int) -> Path:
        """Where shard `number` is, or will be."""
        return self.folder / f"shard-{number:06d}.safetensors"

    def write(
        self, number: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes a shard, whole or not at all."""
        write_tensors(self.path(number), tensors, metadata)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, whole or not at all."""
    content = {name: value.contiguous() for name, value in tensors.items()}
    with whole_file(path) as partial:
        save_file(content, partial, dict(metadata or {}))


def open_tensors(path: Path) -> Any:
    """A safetensors file, as from `safe_open`.

    Raises:
        ValueError: it is missing or not whole.
    """
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): delete it and make it again."
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ValueError: it is missing or not whole.
    """
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """ValueError where a tensor of a file holds NaN or infinite values."""
    bad = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if bad:
        raise ValueError(
            f"{path} holds values that are not finite in {', '.join(bad)}: delete it and make it again."
        )
