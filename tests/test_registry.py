"""What the package exports, and that names of the last version still work."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import diffusers_ext as dx
from diffusers_ext import deprecated, registry
from tests import tiny

ROOT = Path(dx.__file__).parent


def test_every_exported_name_is_there_and_documented() -> None:
    for name, room in registry.exports().items():
        found = getattr(dx, name)
        assert name in dir(dx)
        assert inspect.getdoc(found), name
        assert getattr(importlib.import_module(room.package), name) is found
    assert dx.summary is registry.summary
    with pytest.raises(AttributeError, match="module 'diffusers_ext' has no attribute 'nothing'"):
        dx.nothing  # noqa: B018


def test_no_name_is_exported_twice() -> None:
    names = [name for room in registry.ROOMS for name in room.names]
    assert len(names) == len(set(names))


def test_no_module_has_the_name_of_an_export() -> None:
    """Importing such a module would put it in the place of the export."""
    for room in registry.ROOMS:
        folder = ROOT.parent / room.package.replace(".", "/")
        assert not {path.stem for path in folder.glob("*.py")} & set(room.names), room.package


def test_a_method_is_one_line_of_the_registry() -> None:
    """Nothing else outside of its room names it: not the exports, not the command line, not the summary."""
    rooms = {room.package.rpartition(".")[2] for room in registry.methods()}
    assert {"teleport", "golden_noise", "smooth_lora", "sign", "asdm"} <= rooms
    for path in (*ROOT.glob("*.py"), *(ROOT / "core").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module
        }
        assert not rooms & imported or path.name == "registry.py", path.name


@pytest.mark.parametrize("old", deprecated.RENAMED)
def test_old_names_work_and_say_the_new_one(old: str) -> None:
    new = deprecated.RENAMED[old]
    with pytest.warns(FutureWarning, match=f"{old} is now called {new}") as caught:
        assert getattr(dx, old) is getattr(dx, new)
    assert caught[0].filename == __file__


def test_loras_keep_diffusers_own_verbs() -> None:
    assert dx.load_smooth_lora is dx.apply_smooth_lora
    assert dx.unload_smooth_lora is dx.remove_smooth_lora


def test_a_summary_of_a_plain_pipeline() -> None:
    pipe = tiny.build("sd")
    assert str(dx.summary(pipe)) == "StableDiffusionPipeline\n  nothing added"
