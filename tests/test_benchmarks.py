"""The benchmarks take hours in full. Here each is run small, so that no page can rot, and what they share is tested."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import NAMES, __main__
from benchmarks.framework import cells, statistics, trainings
from benchmarks.framework.cells import Cell
from benchmarks.framework.samples import Samples
from benchmarks.framework.tables import Measure, Row, comparison
from benchmarks.framework.trainings import Training
from diffusers_ext.metrics.comparison import Estimate

ROOT = Path(__file__).parents[1]
QUICK = ("coverage", "teleport_flow", "training_memory")
# Files of the pages that other commands make.
OTHERS = {"demo.png", "asdm_plan.png", "CHANGELOG.md"}


# The longest train controls: two minutes of one core.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_quick_run_writes_every_file(name: str, tmp_path: Path) -> None:
    __main__.main([name, "--quick", "--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "kept")])
    for file in __main__.module(name).WRITES:
        assert (tmp_path / file).stat().st_size > 100, file
        if file.endswith(".md"):
            lines = (tmp_path / file).read_text().splitlines()
            assert sum(line.startswith("| ") for line in lines) >= 3, "the table is empty"


def test_every_result_of_the_pages_has_a_benchmark() -> None:
    written = {file for name in NAMES for file in __main__.module(name).WRITES}
    shown, named = set(), set()
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "model_cards").glob("*/README.md")]:
        text = page.read_text(encoding="utf-8")
        shown |= set(re.findall(r'--8<-- "(\w+\.md)"', text)) | set(re.findall(r"results/(\w+\.png)", text))
        named |= set(re.findall(r"python -m benchmarks (\w+)", text))
        assert not re.search(r"benchmarks/\w+\.py", text), f"{page} names a script"
    assert shown - written <= OTHERS
    assert named <= set(NAMES)
    assert {file for file in written if file.endswith(".md")} <= shown


def test_unknown_name_is_refused_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["golden"])
    said = capsys.readouterr().err
    assert "invalid choice: 'golden'" in said
    assert all(name in said for name in NAMES)


def test_list_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert all(len(line.split()) > 3 for line in lines)


def count_calls(log: Path, value: int, fail: bool = False) -> dict[str, Any]:
    """A measurement that tells that it was made."""
    with open(log, "a") as file:
        file.write(f"{value}\n")
    if fail:
        raise RuntimeError("interrupted")
    return {"value": value}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_run_goes_on_where_it_stopped(workers: int, tmp_path: Path) -> None:
    log, kept = tmp_path / "calls.json", tmp_path / "kept"
    log.touch()
    whole = [Cell(count_calls, (log, n)) for n in range(3)]
    # The log's content is no dependency here: its digest is made once.
    cells.run(whole[:2], kept, workers)
    with pytest.raises(RuntimeError, match="interrupted"):
        cells.run([Cell(count_calls, (log, 5, True))], kept, workers)
    found = cells.run(whole, kept, workers)
    assert [int(found[cell]["value"]) for cell in whole] == [0, 1, 2]
    assert sorted(log.read_text().split()) == ["0", "1", "2", "5"]
    assert not list(kept.glob("*.partial"))


def test_cell_is_kept_by_content_not_by_place(tmp_path: Path) -> None:
    for name, weights in (("a", b"1"), ("moved", b"1"), ("other", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "training.json").write_text(name)
    one, moved, other = (Cell(count_calls, (tmp_path / n, 1)) for n in ("a", "moved", "other"))
    assert one.path(tmp_path) == moved.path(tmp_path)
    assert one.path(tmp_path) != other.path(tmp_path)
    assert one.path(tmp_path) != Cell(count_calls, (tmp_path / "a", 2)).path(tmp_path)
    read = Cell(count_calls, (3,), (tmp_path / "a",))
    assert read.path(tmp_path) != Cell(count_calls, (3,), (tmp_path / "other",)).path(tmp_path)


def test_place_without_content_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights, configs or data: give a trained model"):
        Cell(count_calls, (tmp_path,)).path(tmp_path)


def test_training_goes_on_and_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Sequence[str]] = []

    def start(command: list[str], **_: Any) -> Any:
        calls.append(command)
        folder = Path(command[command.index("--output_dir") + 1])
        (folder / ("model" if len(calls) > 1 else "checkpoint-1")).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0 if len(calls) > 1 else 1)

    monkeypatch.setattr(trainings.subprocess, "run", start)
    run = Training("train_base", ("--model", "ddpm", "--shared", "{cache}/pairs"))
    with pytest.raises(RuntimeError, match="train_base ended with code 1"):
        trainings.train({"one": run}, tmp_path, 1)
    # The same run under two names is one.
    found = trainings.train({"one": run, "two": run}, tmp_path, 1)
    trainings.train({"one": run}, tmp_path, 1)
    assert len(calls) == 2
    assert "--resume_from_checkpoint" not in calls[0]
    assert calls[1][-2:] == ["--resume_from_checkpoint", "latest"]
    assert f"{tmp_path}/pairs" in calls[1]
    assert found["one"] == found["two"] == run.folder(tmp_path) / "model"


def test_holm_decides_what_is_bold() -> None:
    # The last one alone is below .05, but not below .05/3, its level among five.
    estimates = [Estimate(z, z - 1.96, z + 1.96, p) for z, p in ((3.0, 0.0027), (2.5, 0.0124), (2.0, 0.0455))]
    nulls = [Estimate(0.1, -1.86, 2.06, 0.92)] * 2
    measure = Measure("x", lambda ours: ours, lambda ours, control: ours, digits=1)
    rows = [Row((str(n),), e, e) for n, e in enumerate([*nulls, *estimates])] + [Row(("control",), nulls[0])]
    table = comparison(["row"], rows, [measure], "the other's")
    assert table.splitlines()[0] == "| row | x | less the other's |"
    assert re.findall(r"\*\*(\S+) ", table) == ["3.0", "2.5"]
    assert "for the 5 differences" in table


def test_statistics_resample_prompts_together() -> None:
    # Ten prompts of twenty equal images: with images taken for independent, the interval would be five times too narrow.
    right = np.repeat(np.arange(10) % 2 == 0, 20)
    prompts = np.repeat(np.arange(10), 20)
    found = statistics.Statistics("scenes", 2000).mean(right, prompts)
    # The standard deviation of ten prompts is .527, and 2.262 is the quantile of Student's t with nine degrees of freedom.
    assert found.high - found.low == pytest.approx(2 * 2.262 * 0.527 / 10**0.5, rel=0.01)


def test_diversity_is_within_a_prompt() -> None:
    prompts = np.array(["a", "b", "a", "b"])
    near = np.array([[0.0], [100.0], [1.0], [103.0]])
    samples = [
        Samples({"features grader": x, "aligned grader": np.ones(4, bool), "prompts": prompts}, x)
        for x in (near, 2 * near)
    ]
    assert statistics.pairs_of(prompts)[0].tolist() == [0, 1]
    found = statistics.Statistics("scenes", 10).diversity_change(samples[1], samples[0], "grader")
    # Every distance is twice the control's.
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))
