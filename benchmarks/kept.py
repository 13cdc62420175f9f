"""Outcomes that an interrupted benchmark finds again: written whole, named after what they depend on."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def digest(files: Iterable[Path]) -> str:
    """SHA-256 of the files' bytes, one after the other."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()


def name_of(key: str, length: int) -> str:
    """A file name's stem for a description of a run."""
    return hashlib.sha256(key.encode()).hexdigest()[:length]


def write(path: Path, arrays: dict[str, Any]) -> None:
    """Writes an npz file, which is there whole or not at all."""
    partial = path.with_suffix(f".{os.getpid()}.npz")
    np.savez_compressed(partial, **arrays)
    os.replace(partial, path)
