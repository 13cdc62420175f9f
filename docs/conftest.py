"""The code blocks of these pages run as tests: `pytest --markdown-docs --markdown-docs-syntax=superfences docs README.md`.

Each block runs in an empty folder that shows the repository's model cards and pipelines, so that nothing is written
into the checkout.
"""

from pathlib import Path

import pytest

collect_ignore = ["hooks.py"]  # needs MkDocs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _in_a_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model_cards", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
