"""Every case is refused with the message that the page shows."""

from pathlib import Path
from typing import Any

import pytest

from tests.bad_input import cases, commands, table

ROWS = [line for line in table.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("code", [code for codes in cases.SECTIONS.values() for code in codes])
def test_functions(code: str) -> None:
    message = cases.message_of(code)
    # No error of torch, and none by chance, such as "list index out of range".
    assert message.split(":")[0] in ("ValueError", "FileNotFoundError", "OSError")
    assert table.row(code, message) in ROWS, "python -m tests.bad_input.table --write"


@pytest.mark.parametrize(("script", "text"), commands.ARGUMENTS)
def test_arguments_of_the_scripts(script: str, text: str) -> None:
    shown = table.row(commands.command(script, text), commands.usage_error(script, text))
    assert shown in ROWS, "python -m tests.bad_input.table --write"


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return commands.prepare(tmp_path_factory.mktemp("base"))


@pytest.mark.slow
@pytest.mark.parametrize("case", commands.DATA)
def test_data_of_the_scripts(case: str, base: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert table.row(case, commands.data_error(case, base), code=False) in ROWS


def test_the_page_shows_no_other_cases() -> None:
    count = sum(map(len, cases.SECTIONS.values())) + len(commands.ARGUMENTS) + len(commands.DATA)
    heads = 2 * (len(cases.SECTIONS) + 2)
    assert len(ROWS) == count + heads
    assert count >= 100
