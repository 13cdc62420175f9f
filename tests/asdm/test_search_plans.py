"""The search for a plan on a tiny pipeline and twelve pictures: the files, the table, kills, what is refused."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffusers_ext as dx
from diffusers_ext.asdm import students
from diffusers_ext.asdm.plan_search import search_plans
from diffusers_ext.asdm.students import row_losses
from tests import tiny
from tests.asdm.networks import SMALL, network
from tests.asdm.times import fake_times
from tests.test_cli import run
from tests.training.launching import kill_after, launch, write_pictures

# One worker runs them all: they share the search.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RUNGS = {"steps": 2, "rungs": 2, "num_candidates": 3}
# One step of training, one of the sampling run that cuts are measured on.
FEW = {
    "num_validation_images": 4,
    "num_inference_steps": 1,
    "repeats": 1,
    "train_batch_size": 2,
    "resolution": 8,
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["test"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("search")
    pipe = tiny.build("sd")
    pipe.unet = network(SMALL, seed=3, cross_attention_dim=16, sample_size=8, layers_per_block=1)
    pipe.save_pretrained(folder / "sd")
    write_pictures(folder / "pictures")
    return folder


def command(base: Path, output: Path, **changes: Any) -> list[str]:
    options = {
        **RUNGS,
        **FEW,
        "target": 0.8,
        "train_data_dir": base / "pictures",
        "output_dir": output,
        **changes,
    }
    named = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    return ["asdm", "search", str(base / "sd"), *named]


def result_of(folder: Path) -> dict[str, Any]:
    names = ["plan.json", "search.json", "candidates.json"]
    names += [str(path.relative_to(folder)) for path in sorted(folder.glob("candidates/*/rung-*.json"))]
    return {name: json.loads((folder / name).read_text()) for name in names}


@pytest.fixture(scope="module")
def searched(base: Path) -> tuple[Path, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["test"])
        # As the processes of `launch` have it: other numbers of threads round differently.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        fake_times(patch)
        text = run(*command(base, base / "run"))
        torch.set_num_threads(threads)
    return base / "run", text


def test_it_writes_the_plan_and_a_table(searched: tuple[Path, str], base: Path) -> None:
    folder, text = searched
    found = json.loads((folder / "search.json").read_text())
    assert found["control"] == "plan-01"
    assert found["steps of rungs"] == [2, 4]
    assert sorted(c["name"] for c in found["candidates"]) == ["plan-01", "plan-02", "plan-03"]
    last = [c["losses"][-1] for c in found["candidates"] if len(c["losses"]) == 2]
    assert last == sorted(last)
    plan = dx.PruningPlan.load(folder / "plan.json")
    assert [list(stage) for stage in plan.stages] == found["candidates"][0]["stages"]
    plan.check(network(SMALL, cross_attention_dim=16, layers_per_block=1))
    for part in (
        "plan-01 (control)",
        "time, 8 rows",
        "time, 1 row",
        "loss, 2 steps",
        "loss, 4 steps",
        "rank",
    ):
        assert part in text
    assert "Written to" in text
    assert str(base) not in (folder / "recipe.json").read_text()


def test_what_is_kept_of_the_students(searched: tuple[Path, str]) -> None:
    folder, _ = searched
    found = result_of(folder)
    for name in ("plan-01", "plan-02", "plan-03"):
        first = found[f"candidates/{name}/rung-1.json"]
        assert first["loss"] == pytest.approx(np.mean(first["rows"]))
        assert len(first["rows"]) == 4
        there = (folder / "candidates" / name / "rung-2.json").exists()
        assert there == (folder / "candidates" / name / "checkpoint-4").exists()
        assert not (folder / "candidates" / name / "checkpoint-2").exists()
    # Images once each, with other noise for the comparison.
    last = found["candidates/plan-01/rung-2.json"]
    assert len(last["comparison rows"]) == 4
    assert last["comparison rows"] != last["rows"]


def test_a_rung_continues_the_one_before(searched: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    """The student of the second rung is the one that trains for as many steps at once."""
    for name in ("recipe.json", "candidates.json"):
        shutil.copy(searched[0] / name, tmp_path / name)
    for path in searched[0].glob("candidates/*/plan.json"):
        (tmp_path / "candidates" / path.parent.name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "candidates" / path.parent.name)
    (tmp_path / "recipe.json").unlink()
    torch.set_num_threads(1)
    at_once = search_plans(
        str(base / "sd"), tmp_path, 0.8, num_candidates=3, halving=dx.Halving(4, 1),
        **FEW, train_data_dir=str(base / "pictures"),
    )  # fmt: skip
    steps = json.loads((searched[0] / "candidates" / "plan-01" / "rung-2.json").read_text())
    assert at_once.rungs[0].losses["plan-01"] == steps["loss"]


class Killed(BaseException):
    """As SIGKILL, nothing catches it."""


# Three results of the first rung, and one or two of the second.
@pytest.mark.parametrize("moment", range(1, 5))
def test_a_search_killed_at_any_result_resumes_to_the_same_files(
    searched: tuple[Path, str], base: Path, tmp_path: Path, moment: int, monkeypatch: Any
) -> None:
    torch.set_num_threads(1)
    fake_times(monkeypatch)
    write, count = students.write_json, iter(range(1, 100))

    def killed(path: Path, content: Any) -> None:
        if next(count) == moment:
            raise Killed
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(students, "write_json", killed)
        with pytest.raises(Killed):
            run(*command(base, tmp_path))
    assert not (tmp_path / "search.json").exists()
    run(*command(base, tmp_path))
    assert result_of(tmp_path) == result_of(searched[0])


def test_a_killed_process_resumes_to_the_same_files(
    searched: tuple[Path, str], base: Path, tmp_path: Path
) -> None:
    # With the same candidates: without, their times would be measured, which differ from run to run.
    shutil.copytree(
        searched[0],
        tmp_path / "run",
        ignore=shutil.ignore_patterns("rung-*", "checkpoint-*", "search.json", ".lock"),
    )
    (tmp_path / "run" / "plan.json").unlink()
    argv = ["-m", "diffusers_ext", *command(base, tmp_path / "run")]
    kill_after(argv, lambda: list(tmp_path.glob("run/candidates/plan-02/checkpoint-*")), 0.3)
    launch(argv)
    assert result_of(tmp_path / "run") == result_of(searched[0])


def test_a_search_is_not_mixed_with_another(searched: tuple[Path, str], base: Path) -> None:
    text = run(*command(base, searched[0], target=0.7), code=1)
    assert "made with other settings (search.target: 0.8 there, 0.7 now)" in text
    text = run(*command(base, searched[0], seed=1), code=1)
    assert "arguments.seed: 0 there, 1 now" in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target": 1.5}, "target is the share of the cost that may remain, between 0 and 1, got 1.5"),
        ({"num_candidates": 1}, "need 2 candidates or more, got 1"),
        ({"num_validation_images": 12}, "There are 12 images, of which 12 are for validation"),
        ({"learning_rate": 0}, "expected a number above 0, got 0.0"),
        ({"mixed_precision": "fp8"}, "invalid choice: 'fp8'"),
        ({"optimizer": "sgd"}, "--optimizer: invalid choice: 'sgd'"),
        ({"weighting_scheme": "some"}, "--weighting_scheme: invalid choice: 'some'"),
        ({"weighting_scheme": "none"}, "--weighting_scheme is for flow-matching models"),
        ({"max_sequence_length": 4}, "--max_sequence_length is for flow-matching models"),
        ({"target": 0.01}, "No plan leaves 1.0% of the time for 8 and 1 rows"),
    ],
)
def test_what_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], text: str, monkeypatch: Any
) -> None:
    fake_times(monkeypatch)
    assert text in run(*command(base, tmp_path, **changes), code=1)


def test_losses_of_rows() -> None:
    one, other = torch.zeros(3, 2, 2), torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    assert row_losses([one[:2], one[2:]], [other[:2], other[2:]]).tolist() == [0, 1, 4]
