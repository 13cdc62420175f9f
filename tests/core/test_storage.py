import json
import os

import pytest

from diffusers_ext.core.storage import whole_file, whole_folder, write_json


def write_and_stop(context, path, name):
    with context(path) as partial:
        (partial / name if name else partial).write_text("half")
        raise InterruptedError


def test_a_file_gets_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "row.json"
    with pytest.raises(InterruptedError):
        write_and_stop(whole_file, path, "")
    assert not list(tmp_path.iterdir())
    path.write_text("of before")
    with pytest.raises(InterruptedError):
        write_and_stop(whole_file, path, "")
    assert path.read_text() == "of before"
    with whole_file(path) as partial:
        assert str(os.getpid()) in partial.name
        partial.write_text("whole")
        assert path.read_text() == "of before"
    assert path.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["row.json"]


def test_json_makes_its_folder_and_what_is_no_json_leaves_what_there_was(tmp_path):
    path = tmp_path / "new" / "row.json"
    write_json(path, {"θ": [1, 2.5]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"θ": [1, 2.5]}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"set": {1}})
    assert json.loads(path.read_text(encoding="utf-8")) == {"θ": [1, 2.5]}


def test_a_folder_gets_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(InterruptedError):
        write_and_stop(whole_folder, tmp_path / "model", "weights")
    assert not (tmp_path / "model").exists()
    with whole_folder(tmp_path / "model") as folder:
        assert not list(folder.iterdir())
        (folder / "weights").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
