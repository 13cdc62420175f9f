"""The benchmarks take hours and run by hand. That everything they import is there is seen here."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

FILES = sorted(Path(__file__).parents[1].glob("benchmarks/*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_benchmark_finds_its_imports(path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    before = set(sys.modules)
    runpy.run_path(str(path), run_name="imported")
    for name in set(sys.modules) - before:
        if (path.parent / f"{name}.py").is_file():
            del sys.modules[name]  # their names are too common to be left there
