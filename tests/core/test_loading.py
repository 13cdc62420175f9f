"""The import hook, on a module in the place of diffusers' table; tests/contract/test_hub.py has the real one."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
import threading
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_ext as dx
from diffusers_ext.core import loading

TABLE = "library_of_the_tests.table"
BASES = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
REGISTERED = {"library": {}, "ours": BASES}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module that stands for diffusers' table, and no finders but Python's own."""
    path = tmp_path / "library_of_the_tests" / "table.py"
    path.parent.mkdir()
    (path.parent / "__init__.py").touch()
    path.write_text("LOADABLE_CLASSES = {'library': {}}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(loading, "TABLE", TABLE)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, loading._Finder)])
    # A file that is written anew within a second would be run as it was before.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("library_of_the_tests", TABLE):
        # Restores their absence at the end.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    return path


def load() -> Any:
    return importlib.import_module(TABLE)


@pytest.mark.parametrize("module", ["diffusers_ext", "diffusers_ext.cli"])
def test_importing_the_package_imports_neither_torch_nor_diffusers(module: str) -> None:
    code = f"import sys, {module}\nprint(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_is_in_the_table_of_diffusers() -> None:
    assert set(LOADABLE_CLASSES["diffusers_ext"]) == {"SchedulerMixin", "ModelMixin"}
    for base, methods in LOADABLE_CLASSES["diffusers_ext"].items():
        assert methods == LOADABLE_CLASSES["diffusers"][base]
        assert all(hasattr(getattr(dx, base), method) for method in methods)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("before", [True, False])
def test_registered_before_or_after_the_table_is_there(before: bool) -> None:
    if not before:
        load()
    loading.register_components("ours", BASES)
    assert (TABLE in sys.modules) != before
    assert load().LOADABLE_CLASSES == REGISTERED


@pytest.mark.usefixtures("library")
def test_a_second_call_changes_nothing() -> None:
    loading.register_components("ours", BASES)
    finders = list(sys.meta_path)
    loading.register_components("ours", BASES)
    assert sys.meta_path == finders
    loading.register_components("theirs", {})
    assert load().LOADABLE_CLASSES == {**REGISTERED, "theirs": {}}


def test_looking_for_the_module_does_not_run_it(library: Path) -> None:
    loading.register_components("ours", BASES)
    spec: Any = importlib.util.find_spec(TABLE)
    assert TABLE not in sys.modules
    assert spec.origin == str(library)
    assert spec.loader.get_source(TABLE) == library.read_text()
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.LOADABLE_CLASSES == REGISTERED
    assert load().LOADABLE_CLASSES == REGISTERED


def test_the_module_is_as_it_would_be_without_the_hook(library: Path) -> None:
    loading.register_components("ours", BASES)
    module = load()
    assert type(module.__loader__) is type(module.__spec__.loader) is SourceFileLoader
    assert inspect.getsource(module) == library.read_text()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("before", [True, False])
def test_registered_again_after_a_reload(before: bool) -> None:
    if not before:
        load()
    loading.register_components("ours", BASES)
    assert importlib.reload(load()).LOADABLE_CLASSES == REGISTERED
    del sys.modules[TABLE]
    assert load().LOADABLE_CLASSES == REGISTERED


def test_a_module_that_fails_fails_as_ever_and_may_be_tried_again(library: Path) -> None:
    loading.register_components("ours", BASES)
    text = library.read_text()
    library.write_text("raise RuntimeError('its own')\n")
    with pytest.raises(RuntimeError, match="its own"):
        load()
    assert TABLE not in sys.modules
    library.unlink()
    with pytest.raises(ModuleNotFoundError, match=TABLE):
        load()
    library.write_text(text)
    importlib.invalidate_caches()
    assert load().LOADABLE_CLASSES == REGISTERED


def test_a_library_without_the_table_is_imported_all_the_same(library: Path) -> None:
    library.write_text("")
    loading.register_components("ours", BASES)
    assert not hasattr(load(), "LOADABLE_CLASSES")


@pytest.mark.parametrize("registers_first", [True, False])
def test_threads(library: Path, registers_first: bool) -> None:
    # The module says when it has begun, and goes on when it is told to.
    running, go_on = threading.Event(), threading.Event()
    package: Any = importlib.import_module("library_of_the_tests")
    package.wait = lambda: (running.set(), go_on.wait(10))
    library.write_text("import library_of_the_tests\nlibrary_of_the_tests.wait()\n" + library.read_text())
    if registers_first:
        loading.register_components("ours", BASES)
    found: list[Any] = []
    importers = [threading.Thread(target=lambda: found.append(load().LOADABLE_CLASSES)) for _ in range(4)]
    for thread in importers:
        thread.start()
    assert running.wait(10)
    registering = threading.Thread(target=loading.register_components, args=("ours", BASES))
    registering.start()
    registering.join(0.05)
    assert registering.is_alive()  # waits for the module to be there
    go_on.set()
    for thread in (*importers, registering):
        thread.join(10)
    assert found == 4 * [REGISTERED]
