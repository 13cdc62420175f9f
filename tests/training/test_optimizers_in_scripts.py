"""Every training script with Muon and Drop-Muon: resumed runs, and two processes."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusers_ext.training import loop
from tests.training.launching import ROOT, TWO_PROCESSES, launch
from tests.training.scripts import TRAINED, arguments, run, steps

pytestmark = [pytest.mark.slow]

STEPS = 4


def command(name: str, base: Path, output: Path, *extra: str) -> list[str]:
    keep = ["--checkpointing_steps", "1", "--checkpoints_total_limit", "0"]
    # SIGN's second network has another learning rate, which Muon does not.
    own = {"train_npnet": ["--depth", "3"], "train_sign": ["--fake_learning_rate", "1e-4"]}.get(name, [])
    return [
        *arguments(name, base, output),
        *steps(name, STEPS),
        *keep,
        *own,
        "--train_batch_size",
        "4",
        *extra,
    ]


def weights(output: Path) -> list[dict[str, Tensor]]:
    """The trained weights after every step."""
    found = []
    for step in range(1, STEPS + 1):
        (file,) = output.rglob(f"checkpoint-{step}/*.safetensors")
        found.append(load_file(file))
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.fixture(scope="module")
def whole(base: Path) -> Any:
    """An uninterrupted run of a script with an optimizer, made when it is first asked for."""

    def of(name: str, optimizer: str) -> Path:
        output = base / "runs" / optimizer / name
        if not output.exists():
            run(name, command(name, base, output, "--optimizer", optimizer))
        return output

    return of


@pytest.mark.parametrize("optimizer", ["muon", "drop_muon"])
@pytest.mark.parametrize("name", TRAINED)
def test_an_interrupted_run_resumes_to_the_same_weights(
    base: Path, whole: Any, name: str, optimizer: str, tmp_path: Path, monkeypatch: Any
) -> None:
    argv = command(name, base, tmp_path, "--optimizer", optimizer)
    step = loop._optimization_step

    def stop(*given: Any) -> Any:
        if len(list(tmp_path.rglob("checkpoint-*"))) == 2:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(loop, "_optimization_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(name, argv)
    monkeypatch.setattr(loop, "_optimization_step", step)
    run(name, [*argv, "--resume_from_checkpoint", "latest"])
    for one, other in zip(weights(whole(name, optimizer)), weights(tmp_path)):
        assert not changed(one, other)


@pytest.mark.parametrize("name", TRAINED)
def test_drop_muon_drops_layers_in_all_scripts(whole: Any, name: str) -> None:
    every, some = weights(whole(name, "muon")), weights(whole(name, "drop_muon"))
    moved = [changed(a, b) for a, b in itertools.pairwise(some)]
    assert all(moved)
    # Some draws drop nothing; the stages of A-SDM have seeds of their own.
    assert any(len(step) < len(changed(every[0], every[1])) for step in moved)


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_train_what_one_trains(base: Path, whole: Any, name: str, tmp_path: Path) -> None:
    argv = command(name, base, tmp_path, "--optimizer", "drop_muon", "--train_batch_size", "2")
    launch([str(ROOT / "training" / f"{name}.py"), *argv], TWO_PROCESSES)
    one, two = weights(whole(name, "drop_muon")), weights(tmp_path)
    for step in range(STEPS - 1):
        assert changed(one[step], one[step + 1]) == changed(two[step], two[step + 1]), f"step {step}"
    # The gradients are summed in another order, and both optimizers divide by their size: a bias before a
    # normalisation has nothing but rounding to follow. Other layers or rows give about 1.
    distance, moved = (length(one[-1], other) for other in (two[-1], one[0]))
    assert distance < 0.2 * moved


def length(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return sum(float((value - other[name]).square().sum()) for name, value in one.items()) ** 0.5
