"""What is encoded once, before training: rows of tensors in a folder of shards, read from the disk when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..core.storage import ShardStore, read_tensors, shard_path

SHARD = 256


class Shards:
    """Rows in a folder of shards. Only the rows that are used are read, and every process reads them itself.

    Args:
        folder: as from `encode_once`.
        count: number of rows.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Sequence[int]) -> dict[str, Tensor]:
        """{name: (n, ...)} of n rows.

        Raises:
            ValueError: a shard is missing or corrupted.
        """
        shards = [self._shards[i // SHARD] for i in index]
        return {
            name: torch.stack([shard[name][i % SHARD] for shard, i in zip(shards, index)])
            for name in shards[0]
        }

    @cached_property
    def _shards(self) -> list[dict[str, Tensor]]:
        paths = [shard_path(self.folder, number) for number in range(-(-self.count // SHARD))]
        # safetensors maps the files into memory and reads nothing yet.
        shards = [read_tensors(path)[0] for path in paths]
        _check_shapes(shards)
        return shards

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "count": self.count}


def encode_once(
    accelerator: Accelerator,
    folder: str | Path,
    recipe: Mapping[str, Any],
    count: int,
    encode: Callable[[Sequence[int]], Mapping[str, Tensor]],
    batch_size: int,
) -> Shards:
    """Encodes rows that are not yet in the folder, divided among the processes. An interrupted call resumes.

    Args:
        accelerator: the processes that share the work.
        folder: created if needed; no other run may write to it.
        recipe: everything that the rows depend on, see `ShardStore`.
        count: number of rows.
        encode: maps at most `batch_size` numbers of rows to their tensors {name: (n, ...)}.
        batch_size: rows that are encoded at once.

    Raises:
        ValueError: the folder has rows of another recipe, or rows of different shapes.
    """
    store = ShardStore(folder, recipe)
    mine = range(accelerator.process_index, -(-count // SHARD), accelerator.num_processes)
    missing = [number for number in mine if not store.path(number).is_file()]
    title = f"encoding {Path(folder).name}"
    for number in tqdm(missing, desc=title, disable=not accelerator.is_local_main_process):
        rows = range(number * SHARD, min((number + 1) * SHARD, count))
        with torch.no_grad():
            parts = [encode(rows[low : low + batch_size]) for low in range(0, len(rows), batch_size)]
        _check_shapes(parts)
        store.write(number, {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]})
    accelerator.wait_for_everyone()
    return Shards(store.folder, count)


def _check_shapes(parts: Sequence[Mapping[str, Tensor]]) -> None:
    shapes = {name: sorted({tuple(part[name].shape[1:]) for part in parts}) for name in parts[0]}
    if any(len(found) > 1 for found in shapes.values()):
        raise ValueError(f"Encodings of different shapes {shapes}: give --resolution to resize the images.")
