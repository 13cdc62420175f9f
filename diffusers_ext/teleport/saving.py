"""The files of `GaussianStats`: a folder of safetensors and JSON, or a numpy archive next to a scheduler."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor

from ..core.storage import whole_file, write_json

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "gaussian_stats.safetensors"
# Not .safetensors, which would make diffusers treat the repository as one without safetensors weights.
ARCHIVE_NAME = "teleport_stats.npz"

Saved = tuple[dict[str, Tensor], dict[str, Any]]


# --- a folder ---


def write_folder(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: dict[str, Any]
) -> None:
    """Writes `config.json` and `gaussian_stats.safetensors`.

    Each file is written atomically. The config is written last and contains the digest of the weights, so
    that an interrupted save is detected when loading.
    """
    directory = Path(folder)
    directory.mkdir(parents=True, exist_ok=True)
    weights = safetensors.torch.save({n: t.cpu().clone() for n, t in tensors.items()})
    with whole_file(directory / WEIGHTS_NAME) as partial:
        partial.write_bytes(weights)
    write_json(directory / CONFIG_NAME, {**config, "sha256": hashlib.sha256(weights).hexdigest()})


def find_folder(
    source: str | os.PathLike[str], subfolder: str | None, hub_kwargs: dict[str, Any]
) -> tuple[Path, Path]:
    """Paths of the two files, in a local directory or downloaded from the Hub.

    Raises:
        OSError: the repository cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        folder = folder / (subfolder or "")
        return folder / CONFIG_NAME, folder / WEIGHTS_NAME
    try:
        config, weights = (
            Path(hf_hub_download(str(source), name, subfolder=subfolder, **hub_kwargs))
            for name in (CONFIG_NAME, WEIGHTS_NAME)
        )
    except (OSError, HFValidationError) as error:
        raise OSError(
            f"{str(source)!r} is not a local directory, and its {CONFIG_NAME} and {WEIGHTS_NAME} could not be"
            f" downloaded from the Hub: {error}"
        ) from error
    return config, weights


def read_folder(config_path: Path, weights_path: Path) -> Saved:
    """Tensors and config of the two files.

    Raises:
        OSError: a file is missing.
        ValueError: a file is damaged, or the two are not from one save.
    """
    config, weights = _read(config_path), _read(weights_path)
    values = parse_config(config.decode(errors="replace"), str(config_path))
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise ValueError(
            f"{weights_path} ({len(weights)} bytes) is damaged or not a safetensors file: {error}. "
            "Save or download it again."
        ) from error
    if values.pop("sha256", None) != hashlib.sha256(weights).hexdigest():
        raise ValueError(
            f"{weights_path} is not the file that {config_path} describes (sha256 differs): one is "
            "damaged or from another save. Save or download both again."
        )
    return tensors, values


# --- arrays, and an archive of them ---


def to_arrays(tensors: Mapping[str, Tensor], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All content as numpy arrays, bit-exact and safe for `np.savez` (`config` is a JSON string)."""
    return {**{name: t.cpu().numpy() for name, t in tensors.items()}, "config": np.array(json.dumps(config))}


def from_arrays(arrays: Mapping[str, np.ndarray], source: str) -> Saved:
    """The inverse of `to_arrays`; ValueError for arrays in another layout."""
    if "config" not in arrays:
        raise ValueError(
            f"{source}: no entry 'config'. Expected the result of GaussianStats.to_dict_of_arrays."
        )
    config = parse_config(str(arrays["config"]), source)
    return {n: torch.from_numpy(np.array(arrays[n])) for n in arrays if n != "config"}, config


def write_archive(folder: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `teleport_stats.npz`, atomically."""
    # An open file, because np.savez appends .npz to a path.
    with whole_file(os.path.join(folder, ARCHIVE_NAME)) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def find_archive(source: str, subfolder: str | None, hub_kwargs: dict[str, Any]) -> str:
    """Path of the archive next to the scheduler's config, in a local folder or downloaded from the Hub.

    Raises:
        ValueError: a local folder has no archive.
    """
    if not os.path.isdir(source):
        return hf_hub_download(source, ARCHIVE_NAME, subfolder=subfolder, **hub_kwargs)
    for folder in (os.path.join(source, subfolder or ""), source):
        path = os.path.join(folder, ARCHIVE_NAME)
        if os.path.isfile(path):
            return path
    raise ValueError(f"{source}: no {ARCHIVE_NAME} next to the scheduler's config; save the pipeline again.")


def read_archive(path: str) -> dict[str, np.ndarray]:
    """The arrays of an archive; ValueError if it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            # Archives of version 0.1 contain numpy's option as an array.
            return {name: file[name] for name in file.files if name != "allow_pickle"}
    except (zipfile.BadZipFile, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); save the scheduler again.") from error


def parse_config(text: str, source: str) -> dict[str, Any]:
    """The config of `GaussianStats` in a JSON text; ValueError if it is invalid or of another class."""
    keys = {"_class_name", "shape", "rank", "residual", "num_samples", "class_names", "unconditional"}
    keys.add("calibration")
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{source}: the configuration is not valid JSON ({error}). Save it again."
        ) from error
    if not isinstance(config, dict) or config.get("_class_name") != "GaussianStats":
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{source} describes {found!r}, expected 'GaussianStats': is this the right folder?")
    if not keys <= set(config):
        raise ValueError(
            f"{source} lacks {sorted(keys - set(config))}. Save it with GaussianStats.save_pretrained."
        )
    return config


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise OSError(
            f"No file {path}: expected {CONFIG_NAME} and {WEIGHTS_NAME} there, as written by "
            "GaussianStats.save_pretrained."
        ) from error
