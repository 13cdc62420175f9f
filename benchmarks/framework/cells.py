"""Cells: measurements that are made once, written whole, and found again by what they depend on."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_ext.core.storage import digest, whole_file

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cell:
    """One measurement: a function of a benchmark's module, and its arguments.

    Attributes:
        function: returns arrays or numbers by name. A module's own, as it may run in another process.
        arguments: hashable. A `Path` counts by the content it leads to, everything else by its `repr`.
        reads: further files and folders whose content the result depends on.
        alone: whether it runs by itself after the others, in a process of its own, as times and peaks of memory must.
    """

    function: Callable[..., Mapping[str, Any]]
    arguments: tuple[Any, ...] = ()
    reads: tuple[Path, ...] = ()
    alone: bool = False

    def path(self, folder: Path) -> Path:
        """Where it is kept: under everything that it depends on but the code."""
        name = f"{self.function.__module__.rpartition('.')[2]}-{self.function.__name__}"
        given = [content(value) if isinstance(value, Path) else repr(value) for value in self.arguments]
        return folder / f"{name}-{digest([name, given, [content(path) for path in self.reads]])}.npz"


@lru_cache(maxsize=256)
def content(path: Path) -> str:
    """Digest of the weights, configs and data at a path, wherever it lies.

    Model cards, plots and the times that a training took change nothing, so only these kinds of files count.

    Raises:
        ValueError: there are none.
    """
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if _counts(file)]
    if not files:
        raise ValueError(
            f"{path} has no weights, configs or data: give a trained model or Fashion-MNIST's files."
        )
    return digest([[str(file.relative_to(path)), digest(file.read_bytes())] for file in files])


def _counts(file: Path) -> bool:
    kinds = (".safetensors", ".json", "-ubyte", "-ubyte.gz")
    return file.is_file() and file.name.endswith(kinds) and file.name != "training.json"


def run(cells: Iterable[Cell], folder: Path, workers: int) -> dict[Cell, Arrays]:
    """Makes the measurements that are missing.

    Args:
        cells: of which the first are made first.
        folder: where they are kept.
        workers: processes of one thread each; 0: everything in this one.

    Returns:
        The arrays of every cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {cell: cell.path(folder) for cell in cells}
    missing = [cell for cell, path in paths.items() if not path.is_file()]
    for alone in (False, True):
        chosen = [cell for cell in missing if cell.alone == alone]
        if chosen:
            _make_all(chosen, paths, 1 if alone and workers else workers, alone)
    return {cell: load(path) for cell, path in paths.items()}


def load(path: Path) -> Arrays:
    """The arrays of a cell."""
    with np.load(path) as file:
        return dict(file.items())


def _make_all(cells: list[Cell], paths: Mapping[Cell, Path], workers: int, alone: bool) -> None:
    with _pool(workers, alone) as pool, tqdm(total=len(cells), desc="timed alone" * alone or "cells") as bar:
        if pool is None:
            for cell in cells:
                _make(cell, paths[cell])
                bar.update()
            return
        jobs: list[Future[None]] = [pool.submit(_make, cell, paths[cell]) for cell in cells]
        try:
            for job in as_completed(jobs):
                job.result()
                bar.update()
        except BaseException:
            # What is not begun would still be made before the error is seen.
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _pool(workers: int, alone: bool) -> Iterator[Executor | None]:
    if not workers:
        yield None
        return
    # Not forked: this process may have computed with threads, which a fork does not survive; and a process's peak of memory
    # begins at the peak of the one that it is forked from, here a small server.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, max_tasks_per_child=1 if alone else None) as pool:
        yield pool


def _make(cell: Cell, path: Path) -> None:
    threads = torch.get_num_threads()
    if not cell.alone:
        torch.set_num_threads(1)
    try:
        found = cell.function(*cell.arguments)
    finally:
        torch.set_num_threads(threads)
    # Into an open file, as numpy gives a path of its own the ending .npz.
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(file, **found)  # type: ignore[arg-type]
