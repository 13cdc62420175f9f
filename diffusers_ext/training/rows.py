"""The rows of a training step, their random numbers, and batches of them, which worker processes may read.

What a row draws depends only on the seed, the step and the number of the row in the batch of all processes. So a
resumed run continues exactly where it stopped, several processes train what one trains, and any process can read any
step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that one process works on, with one generator for each.

    Attributes:
        generators: one for each of n rows.
        step: the optimization step.
    """

    generators: tuple[np.random.Generator, ...]
    step: int = 0

    def __len__(self) -> int:
        return len(self.generators)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 (n, *shape)."""
        return self._stack([draw.standard_normal(shape, np.float32) for draw in self.generators])

    def uniform(self, *shape: int) -> Tensor:
        """Uniform float32 in [0, 1), (n, *shape)."""
        return self._stack([draw.random(shape, np.float32) for draw in self.generators])

    def integers(self, high: int) -> Tensor:
        """Uniform int64 in [0, high), (n,)."""
        return self._stack([draw.integers(high) for draw in self.generators])

    def indices(self, num_examples: int) -> Tensor:
        """Random examples, int64 (n,), with replacement, so that no epoch state has to be stored."""
        return self.integers(num_examples)

    @staticmethod
    def _stack(values: list[Any]) -> Tensor:
        return torch.from_numpy(np.stack(values))


def rows_of_step(seed: int, step: int, rank: int, batch_size: int, micro_steps: int = 1) -> Rows:
    """The rows that process `rank` works on in micro-step `step`; `batch_size` is per process.

    `micro_steps` micro-steps make one optimization step.
    """
    own = range(rank * batch_size, (rank + 1) * batch_size)
    # Not torch's generators: on the CPU they use 32 bits of a seed.
    return Rows(tuple(np.random.default_rng([seed, step, row]) for row in own), step // micro_steps)


class _MicroSteps(Dataset[Any]):
    """Item n is the batch of micro-step n of one process, or the error of reading it."""

    def __init__(self, read: Callable[[Rows], dict[str, Any]], seed: int, *own: int) -> None:
        self.read, self.seed, self.own = read, seed, own

    def __getitem__(self, number: int) -> Any:
        try:
            return self.read(rows_of_step(self.seed, number, *self.own))
        except ValueError as error:
            return error  # DataLoader would hide the message under the traceback of the worker


def _context() -> str | None:
    """How workers are started: not forked from this process.

    A forked worker inherits what is open here: the lock of the output folder, the memory of the GPU and the sockets of
    the process group, and keeps them for seconds after this process was killed. It also inherits the locks of the
    threads of torch, Arrow and the process group in whatever state they are.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(["diffusers_ext.training.data"])
    return "forkserver"


def _end_with_parent(number: int) -> None:
    """Ends worker `number` when the process that trains is gone, also if that was killed.

    torch's workers watch the process that forked them. That is the fork server, which lives as long as a worker does.
    """
    parent: Any = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def batches(
    accelerator: Accelerator,
    args: argparse.Namespace,
    read: Callable[[Rows], dict[str, Any]],
    encode: Callable[[dict[str, Any]], Batch] | None,
    first_step: int,
) -> Iterator[Batch]:
    """The batches of this process from optimization step `first_step` to the last, one for each micro-step.

    Args:
        accelerator, args: see `loop.train`.
        read, encode: see `loop.train`. With --dataloader_num_workers, `read` runs in other processes.
        first_step: where a resumed run continues.

    Raises:
        ValueError: of `read` or `encode`.
    """
    workers, micro = args.dataloader_num_workers, args.gradient_accumulation_steps
    loader = DataLoader(
        _MicroSteps(read, args.seed, accelerator.process_index, args.train_batch_size, micro),
        batch_size=None,
        sampler=range(first_step * micro, args.max_train_steps * micro),
        collate_fn=_unchanged,
        num_workers=workers,
        multiprocessing_context=_context() if workers else None,
        worker_init_fn=_end_with_parent,
        pin_memory=accelerator.device.type == "cuda",
        # It draws a number; without a generator of its own, from the global one.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        found = on_device(batch, accelerator.device)
        yield found if encode is None else encode(found)


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _unchanged(batch: Any) -> Any:
    return batch
