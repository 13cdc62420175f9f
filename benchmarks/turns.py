"""Functions timed in turns, so that a change of the machine's speed meets them all."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm


def take_turns(
    work: Mapping[str, Callable[[], Any]], repetitions: int, warmup: int, device: torch.device, title: str
) -> dict[str, np.ndarray]:
    """Seconds of every call (repetitions,), by name.

    Each round calls every function once, in a new order, so that a change of the machine's speed meets them all.

    Args:
        work: functions by name.
        repetitions: rounds that count.
        warmup: rounds before them.
        device: waited for.
        title: of the progress bar, which also tells how long it will take.
    """
    order = np.random.default_rng(0)
    names = list(work)
    found: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(warmup + repetitions) * len(names), desc=title, dynamic_ncols=True) as bar:
        for number in range(warmup + repetitions):
            for index in order.permutation(len(names)):
                seconds = _seconds(work[names[index]], device)
                if number >= warmup:
                    found[names[index]].append(seconds)
                bar.update()
    return {name: np.array(values) for name, values in found.items()}


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
