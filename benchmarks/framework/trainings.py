"""Trained controls: runs of the training scripts, whose output folders are their cache."""

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusers_ext.core.storage import digest

from .cells import content

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Training:
    """A run of a script of `training/`.

    Attributes:
        script: its name without the ending.
        arguments: all but `--output_dir`. A `Path` counts by the content it leads to. "{cache}" in a text is the folder of
            all trainings, for what several of them share.
    """

    script: str
    arguments: tuple[str | Path, ...]

    def folder(self, cache: Path) -> Path:
        """Its output folder."""
        given = [content(value) if isinstance(value, Path) else value for value in self.arguments]
        return cache / f"{self.script}-{digest(given)}"

    def command(self, cache: Path) -> list[str]:
        """What is run. A run that was interrupted goes on from its last checkpoint."""
        folder = self.folder(cache)
        script = str(ROOT / "training" / f"{self.script}.py")
        given = [str(value).replace("{cache}", str(cache)) for value in self.arguments]
        resumed = ["--resume_from_checkpoint", "latest"] if any(folder.glob("checkpoint-*")) else []
        return [sys.executable, script, *given, "--output_dir", str(folder), *resumed]


def train(trainings: Mapping[str, Training], cache: Path, workers: int) -> dict[str, Path]:
    """Runs what is not finished, `workers` at a time, and returns the folders of the models by name.

    Raises:
        RuntimeError: a run failed.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        # Equal runs under several names are one.
        for _ in pool.map(lambda training: _run(training, cache), dict.fromkeys(trainings.values())):
            pass
    return {name: training.folder(cache) / "model" for name, training in trainings.items()}


def _run(training: Training, cache: Path) -> None:
    folder = training.folder(cache)
    # The script puts it there whole at its end.
    if (folder / "model").is_dir():
        return
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    log = folder.with_suffix(".log")
    print(f"training: {training.script}, its output in {log}", flush=True)
    with open(log, "ab") as output:
        code = subprocess.run(
            training.command(cache), env=environment, stdout=output, stderr=output, check=False
        ).returncode
    if code:
        end = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{training.script} ended with code {code}; the end of {log}:\n{end}")
