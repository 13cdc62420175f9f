"""Training scripts started as a user starts them, and killed as a machine kills them."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).parents[2]
PLAIN = [sys.executable]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
TWO_PROCESSES = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment() -> dict[str, str]:
    """For a run on CPU threads that can be compared bit for bit: the same number of them everywhere."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def launch(argv: Sequence[str], launcher: Sequence[str] = PLAIN, code: int = 0) -> str:
    """What a script prints that ends with `code`; of a failure what it says."""
    done = subprocess.run([*launcher, *argv], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr if code else done.stdout


def kill_after(
    argv: Sequence[str], ready: Callable[[], object], longest: float, launcher: Sequence[str] = PLAIN
) -> None:
    """Starts a run and kills all its processes at a random moment, at most `longest` seconds after `ready()`."""
    started = subprocess.Popen(
        [*launcher, *argv],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not ready() and started.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, longest))
    assert started.poll() is None, "the run ended by itself"
    assert kill_all(started) == -signal.SIGKILL


def kill_all(started: "subprocess.Popen[bytes]") -> int:
    """Kills a process and all that it has started; returns its exit code, which is its own if it ended before."""
    workers = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGKILL)
    code = started.wait()
    for worker in workers:
        worker.kill()
    psutil.wait_procs(workers)
    return code


def write_pictures(folder: Path) -> None:
    """An image folder of twelve random 12 × 10 pictures with captions."""
    folder.mkdir()
    lines, draw = [], np.random.default_rng(0)
    for i in range(12):
        picture = draw.integers(0, 256, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a {'abcdefghijkl'[i] * 3}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
