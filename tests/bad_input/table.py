"""The tables of `docs/errors.md`, made by running every case.

python -m tests.bad_input.table          # prints them
python -m tests.bad_input.table --write  # puts them into the page
"""

import os
import re
import sys
import tempfile
from pathlib import Path

from tests.bad_input import cases, commands

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
_BETWEEN = re.compile(r"(<!-- errors -->\n).*?(<!-- /errors -->)", re.DOTALL)


def row(case: str, message: str, code: bool = True) -> str:
    """A row of a table."""
    shown = f"`{case}`" if code else case
    # Names in angle brackets are no HTML, and a vertical bar is no column.
    safe = message.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
    return f"| {shown.replace('|', chr(92) + '|')} | {safe} |"


def tables() -> str:
    """All tables, in Markdown."""
    lines = []
    for title, codes in cases.SECTIONS.items():
        lines += _head(title) + [row(code, cases.message_of(code)) for code in codes]
    lines += _head("Arguments of the training scripts")
    lines += [row(commands.command(*each), commands.usage_error(*each)) for each in commands.ARGUMENTS]
    lines += _head("Data of the training scripts")
    with tempfile.TemporaryDirectory() as folder:
        base = commands.prepare(Path(folder))
        lines += [row(case, commands.data_error(case, base), code=False) for case in commands.DATA]
    return "\n".join(lines) + "\n\n"


def _head(title: str) -> list[str]:
    return ["", f"## {title}", "", "| Call | Error |", "| --- | --- |"]


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "true"
    write = "--write" in sys.argv  # the scripts have arguments of their own
    made = tables()
    if write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(_BETWEEN.sub(lambda match: match[1] + made + match[2], text), encoding="utf-8")
    print(made)
