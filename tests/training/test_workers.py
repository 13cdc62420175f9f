"""Workers that read ahead: the same weights with any number of them, after a kill, and in two processes."""

import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext.training.checkpoints import list_checkpoints
from tests.training.launching import (
    PLAIN,
    ROOT,
    TWO_PROCESSES,
    environment,
    kill_after,
    launch,
    write_pictures,
)
from tests.training.scripts import (
    CAPTIONED,
    ON_FLOWS,
    TRAINED,
    Scripts,
    arguments,
    checkpoints_of,
    path_of,
    run,
    steps,
)

# One worker runs them all: they share the models and the trained weights.
# Every test starts processes that import everything, some of them several times.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COUNTS = ("1", "2")


def augmented(script: str) -> list[str]:
    """What makes the workers draw random numbers of their own."""
    return ["--random_flip", "--no-center_crop"] if script.split()[0] in CAPTIONED else []


def command(scripts: Scripts, script: str, output: Path, *extra: str, count: int = 6) -> list[str]:
    """A run of some steps with two accumulation steps each."""
    argv = [*arguments(script, scripts.folder, output), *steps(script, count), *augmented(script)]
    return [*argv, "--gradient_accumulation_steps", "2", *extra]


def weights(output: Path) -> dict[str, torch.Tensor]:
    files = sorted((output / "model").rglob("*.safetensors"))
    return {f"{file.stem} {name}": value for file in files for name, value in load_file(file).items()}


def assert_equal(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.fixture(scope="module")
def alone(scripts: Scripts) -> Any:
    """A function that gives the folder of a script's run without workers."""

    def folder_of(script: str) -> Path:
        output = scripts.folder / "alone" / script
        if not output.exists():
            run(script, command(scripts, script, output))
        return output

    return folder_of


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("script", [*TRAINED, *ON_FLOWS])
def test_workers_change_nothing(
    scripts: Scripts, alone: Any, script: str, count: str, tmp_path: Path
) -> None:
    run(script, command(scripts, script, tmp_path, "--dataloader_num_workers", count))
    assert_equal(alone(script), tmp_path)


def test_no_worker_outlives_a_killed_run(scripts: Scripts, tmp_path: Path) -> None:
    path = str(ROOT / "training" / "train_base.py")
    argv = [path, *command(scripts, "train_base", tmp_path, "--dataloader_num_workers", "2")]
    argv += ["--checkpointing_steps", "1", "--max_train_steps", "10000"]
    output = (tmp_path / "log").open("wb")
    started = subprocess.Popen([*PLAIN, *argv], env=environment(), stdout=output, stderr=output)
    while not list_checkpoints(tmp_path) and started.poll() is None:
        time.sleep(0.1)
    children = psutil.Process(started.pid).children(recursive=True)
    assert len(children) >= 3  # two workers and their server
    started.kill()
    started.wait()
    _, left = psutil.wait_procs(children, timeout=60)
    assert not left


@pytest.mark.parametrize("script", [*TRAINED, *ON_FLOWS])
def test_a_killed_run_with_workers_resumes_at_once_to_the_same_weights(
    scripts: Scripts, alone: Any, script: str, tmp_path: Path
) -> None:
    path, workers = path_of(script), ("--dataloader_num_workers", "2")
    argv = [path, *command(scripts, script, tmp_path, *workers, "--checkpointing_steps", "1")]
    kill_after(argv, lambda: checkpoints_of(script, tmp_path), 0.3)
    # At once: no worker that outlives the killed process for some seconds holds its lock.
    more = ("--resume_from_checkpoint", "latest", "--dataloader_num_workers", "1")
    launch([path, *command(scripts, script, tmp_path, *more)])
    assert_equal(alone(script), tmp_path)


@pytest.mark.parametrize("script", CAPTIONED)
def test_two_processes_with_workers(scripts: Scripts, script: str, tmp_path: Path) -> None:
    path = path_of(script)
    for count in ("0", "1"):
        argv = command(scripts, script, tmp_path / count, "--dataloader_num_workers", count, count=3)
        launch([path, *argv], TWO_PROCESSES)
    assert_equal(tmp_path / "0", tmp_path / "1")


# SIGN reads all images at the start.
@pytest.mark.parametrize("script", ["train_smooth_lora", "train_asdm"])
def test_a_damaged_image_is_named_as_without_workers(scripts: Scripts, script: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "own")
    argv = arguments(script, scripts.folder, tmp_path / "run", tmp_path / "own")
    argv += [*steps(script, 40), "--dataloader_num_workers", "1", *augmented(script)]
    path = tmp_path / "own" / "7.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(
        ValueError, match=r"^[^\n]*own/7\.png \(row 7 of the data set\) cannot be read as an image: "
    ):
        run(script, argv)
