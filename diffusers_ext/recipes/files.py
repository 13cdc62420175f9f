"""The files of a recipe: `recipe.json`, and a folder of weights for each method."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ..core.methods import Part, Room
from ..core.storage import digest, write_json

FILE = "recipe.json"
# A number that changes when an older version could misread the file.
FORMAT = 1
_KEYS = ("base", "call", "figures", "methods", "files")


def write_recipe(
    folder: Path, methods: Mapping[str, Part], content: dict[str, Any], rooms: Mapping[str, Room]
) -> None:
    """Writes the weights, and `recipe.json` last, with their digests: an interrupted save is noticed when loading.

    Raises:
        ValueError: content that is not JSON.
    """
    try:
        json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"call and figures must hold finite values of JSON only: {error}.") from error
    folder.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    files: dict[str, str] = {}
    for key, part in methods.items():
        entries[key] = {"options": part.options, "source": part.source}
        # In a folder of its own, to know which files it has written.
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            rooms[key].part_module().save(part, Path(partial))
            for path in sorted(Path(partial).iterdir()):
                (folder / key).mkdir(exist_ok=True)
                files[f"{key}/{path.name}"] = digest(path.read_bytes())
                os.replace(path, folder / key / path.name)
    head = {"format": FORMAT, "diffusers_ext": version()}
    write_json(folder / FILE, {**head, **content, "methods": entries, "files": files})


def read_recipe(
    source: str | os.PathLike[str], hub: dict[str, Any], rooms: Mapping[str, Room]
) -> tuple[dict[str, Part], dict[str, Any]]:
    """The methods with their weights, and the content of `recipe.json`.

    Raises:
        OSError: a file is missing, or the repository cannot be reached.
        ValueError: see `Recipe.from_pretrained`.
    """
    folder = _find(source, hub)
    content = _content(folder / FILE, rooms)
    _check_files(folder, content["files"])
    methods = {}
    for key, entry in content["methods"].items():
        try:
            part = Part(entry["options"], None, entry["source"])
            methods[key] = rooms[key].part_module().load(folder / key, part)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / FILE} has no valid {key}: {error!r}. Save it again.") from error
    return methods, content


def _find(source: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"], **hub))
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"{str(source)!r} is not a local directory, and no recipe of that name could be downloaded from the Hub:"
            f" {error}"
        ) from error


def _content(path: Path, rooms: Mapping[str, Room]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise OSError(f"No file {path}, as Recipe.save_pretrained writes it: is this a recipe?") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Save or download it again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise ValueError(f"{path} is no recipe of diffusers-ext: it has no format.")
    writer = content.get("diffusers_ext", "an unknown version")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {content['format']}, written by diffusers-ext {writer}, and this version, {version()},"
            f" reads format {FORMAT}: install a version that reads it, or save the recipe again with this one."
        )
    missing = [key for key in _KEYS if not isinstance(content.get(key), dict)]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Save it with Recipe.save_pretrained.")
    for key, entry in content["methods"].items():
        if key not in rooms:
            raise ValueError(
                f"{path} has the method {key}, written by diffusers-ext {writer}, which this version, {version()}, does"
                f" not know: it knows {', '.join(rooms)}. Install the newer version."
            )
        wanted, options = rooms[key].part_module().OPTIONS, entry.get("options", {})
        if set(options) != set(wanted):
            raise ValueError(
                f"{path} has {key} with the options {', '.join(options) or 'none'}, written by diffusers-ext {writer},"
                f" and this version, {version()}, expects {', '.join(wanted)}: install the version that wrote it."
            )
    return content


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    for name, wanted in files.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"{folder / FILE} names the file {name}, which is outside of the folder.")
        if not path.is_file():
            raise OSError(f"No file {path}, which {FILE} names: save or download the recipe again.")
        if digest(path.read_bytes()) != wanted:
            raise ValueError(
                f"{path} is not the file that {FILE} describes (its digest differs): one is damaged or from another save."
                " Save or download both again."
            )


def version() -> str:
    """The version of this package."""
    return import_module(__name__.partition(".")[0]).__version__
