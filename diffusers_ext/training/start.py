"""The start of a run: what `accelerate launch` decides, the number of steps, and the lock of the output folder."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from accelerate import Accelerator
from filelock import FileLock, Timeout

from ..core.extras import require
from .arguments import PRECISIONS
from .sharding import settle_sharding


def settle_with_launch(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Sets the arguments that are not given to what `accelerate launch` decided.

    Raises:
        ValueError: they contradict each other, or ask for what the scripts or the machine cannot do.
    """
    settle_precision(args, accelerator)
    settle_sharding(args, accelerator)
    # Accelerate would train in float32 without a word.
    if args.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("Mixed precision fp16 needs a GPU. On the CPU, pass --mixed_precision no or bf16.")
    if args.enable_xformers_memory_efficient_attention:
        require("xformers", "xformers")
        if accelerator.device.type != "cuda":
            raise ValueError(
                "--enable_xformers_memory_efficient_attention needs a GPU: omit it. PyTorch's own attention is"
                " memory-efficient too."
            )
    given, steps = args.gradient_accumulation_steps, accelerator.gradient_accumulation_steps
    # Accelerate prefers the environment to its own argument.
    if steps < 1 or given not in (None, steps):
        raise ValueError(
            f"`accelerate launch` asks for {steps} gradient accumulation steps"
            f" (ACCELERATE_GRADIENT_ACCUMULATION_STEPS), and --gradient_accumulation_steps is {given or 'not given'}:"
            " omit one of them, or give both the same number of 1 or more."
        )
    args.gradient_accumulation_steps = steps


def settle_precision(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Sets `mixed_precision`, unless it is given, to that of `accelerate launch`."""
    if accelerator.mixed_precision not in PRECISIONS:
        raise ValueError(
            f"`accelerate launch` asks for mixed precision {accelerator.mixed_precision}, expected one of"
            f" {', '.join(PRECISIONS)}: pass --mixed_precision."
        )
    args.mixed_precision = accelerator.mixed_precision


_LOCKS: list[FileLock] = []  # held until the process ends, also if it is killed


def lock_folder(folder: str | Path, argument: str = "--output_dir") -> FileLock:
    """Creates a folder and keeps other runs out of it as long as this process lives, or until the lock is released.

    Args:
        folder: created if needed.
        argument: that selects the folder, for the error message.

    Raises:
        ValueError: another run holds it.
    """
    os.makedirs(folder, exist_ok=True)
    lock = FileLock(Path(folder).resolve() / ".lock", is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"Another run is writing to {folder}: wait until it has ended, or choose another {argument}."
        ) from None
    _LOCKS.append(lock)
    return lock


def images_per_step(args: argparse.Namespace, accelerator: Accelerator) -> int:
    """How many images one optimization step of all processes is computed from."""
    return args.gradient_accumulation_steps * args.train_batch_size * accelerator.num_processes


def set_train_steps(args: argparse.Namespace, accelerator: Accelerator, num_examples: int) -> None:
    """Sets `max_train_steps`, unless it is given, from the epochs and the size of the data."""
    if args.max_train_steps is None and args.num_train_epochs is not None:
        steps_per_epoch = math.ceil(num_examples / images_per_step(args, accelerator))
        args.max_train_steps = args.num_train_epochs * steps_per_epoch
    elif args.max_train_steps is None:
        args.max_train_steps = 1000
