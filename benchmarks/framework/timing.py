"""Times in turns, and peaks of memory."""

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm


def take_turns(
    work: Mapping[str, Callable[[], Any]],
    repetitions: int,
    warmup: int,
    device: torch.device,
    title: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Seconds of every call (repetitions,), by name.

    Each round calls every function once, in a new order, so that a change of the machine's speed meets them all.

    Args:
        work: functions by name.
        repetitions: rounds that count.
        warmup: rounds before them.
        device: waited for.
        title: of the progress bar, which also tells how long it will take.
        clock: `time.process_time` for seconds of the CPU.
    """
    order = np.random.default_rng(0)
    names = list(work)
    found: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=(warmup + repetitions) * len(names), desc=title, dynamic_ncols=True) as bar:
        for number in range(warmup + repetitions):
            for index in order.permutation(len(names)):
                wait(device)
                start = clock()
                work[names[index]]()
                wait(device)
                if number >= warmup:
                    found[names[index]].append(clock() - start)
                bar.update()
    return {name: np.array(values) for name, values in found.items()}


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """GiB: the most that PyTorch had allocated on a GPU, or the highest resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def device_name(device: torch.device) -> str:
    """For the line below a table."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {threads} thread{'s' * (threads > 1)}"


def multiply_adds(function: Callable[[], Any]) -> float:
    """Of a call's matrix products and convolutions; the counter counts two operations for each."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2
