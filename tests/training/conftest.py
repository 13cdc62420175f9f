"""What the tests of the training scripts share."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.scripts import Scripts, prepare


@pytest.fixture(autouse=True)
def _alone(monkeypatch: Any) -> None:
    """Runs inside the test's process are on the CPU, and the scripts have no arguments of pytest."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["test"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Iterator[Path]:
    """A folder with what `scripts.arguments` needs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(sys, "argv", ["test"])
        yield prepare(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def scripts(base: Path) -> Scripts:
    """Short runs of the scripts."""
    return Scripts(base)
