"""Outcomes that an interrupted benchmark finds again: written whole, named after what they depend on."""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_ext.core.storage import whole_file


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
    # Into an open file, as numpy gives a path of its own the ending .npz.
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)


def place(cache_dir: Path, kind: str, settings: tuple[Any, ...], files: Iterable[Path]) -> Path:
    """Where a measurement of a kind is kept that depends on settings and on files' bytes."""
    key = f"{kind}|{settings}|{digest(files)}"
    return cache_dir / f"{kind}-{name_of(key, 16)}.npz"


def measure(path: Path, measurement: Callable[..., dict[str, Any]], *arguments: Any) -> Path:
    """Makes a measurement on one thread and writes it, unless it is there."""
    if not path.is_file():
        torch.set_num_threads(1)
        write(path, measurement(*arguments))
    return path


def side_by_side(
    function: Callable[..., Any], calls: Iterable[tuple[Any, ...]], workers: int, title: str
) -> None:
    """Calls a function in `workers` processes, with a progress bar; the first error ends it."""
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(function, *arguments) for arguments in calls]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc=title):
            job.result()
