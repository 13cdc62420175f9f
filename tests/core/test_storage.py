import json
import os

import pytest
import torch

from diffusers_ext.core.storage import (
    ShardStore,
    check_recipe,
    digest,
    read_tensors,
    require_finite,
    weights_digest,
    whole_file,
    whole_folder,
    write_json,
)


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


def test_digests_depend_on_the_content_alone():
    assert digest("a") == digest(b"a") != digest("b")
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    assert len(digest("a")) == 16


def test_weights_digests_notice_every_value_shape_and_name():
    first, same = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    same.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(same)
    with torch.no_grad():
        same.weight[1, 2] += 1e-3
    assert weights_digest(first) != weights_digest(same)
    assert weights_digest(first) != weights_digest(first, first)
    with torch.no_grad():
        same.weight.copy_(first.weight)
    assert weights_digest(first) == weights_digest(same)
    turned = torch.nn.Linear(2, 3, bias=False)
    turned.weight = torch.nn.Parameter(first.weight.reshape(3, 2))
    flat = torch.nn.Linear(3, 2, bias=False)
    flat.weight = first.weight
    assert weights_digest(turned) != weights_digest(flat)


def test_a_recipe_is_compared_key_by_key(tmp_path):
    path = tmp_path / "recipe.json"
    assert not check_recipe(path, {"seed": 0}, "delete it")
    write_json(path, {"seed": 0, "steps": (1, 2)})
    assert check_recipe(path, {"seed": 0, "steps": [1, 2]}, "delete it")
    with pytest.raises(
        ValueError,
        match=r"made with other settings \(new: None there, 1 now; seed: 0 there, 5 now\): delete it\.",
    ):
        check_recipe(path, {"seed": 5, "steps": [1, 2], "new": 1}, "delete it")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"recipe\.json is corrupted .*: delete it"):
        check_recipe(path, {}, "delete it")


def test_shards_are_whole_and_belong_to_one_recipe(tmp_path):
    store = ShardStore(tmp_path / "shards", {"seed": 0})
    store.write(2, {"x": torch.arange(3.0)}, {"note": "third"})
    store.write(0, {"x": torch.zeros(1)})
    (store.folder / "shard-000001.safetensors.9.partial").write_bytes(b"half")
    assert ShardStore.paths(store.folder) == [store.path(0), store.path(2)]
    tensors, metadata = read_tensors(store.path(2))
    assert tensors["x"].tolist() == [0.0, 1.0, 2.0]
    assert metadata == {"note": "third"}
    assert ShardStore.recipe_of(store.folder) == {"seed": 0}
    ShardStore(store.folder, {"seed": 0})
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        ShardStore(store.folder, {"seed": 1})
    store.path(0).write_bytes(store.path(0).read_bytes()[:-4])
    with pytest.raises(ValueError, match="is missing or corrupted"):
        read_tensors(store.path(0))
    with pytest.raises(ValueError, match=r"holds no shards: recipe\.json is missing"):
        ShardStore.recipe_of(tmp_path)


def test_values_that_are_not_finite_are_named(tmp_path):
    require_finite({"x": torch.ones(2), "index": torch.ones(2, dtype=torch.int64)}, tmp_path)
    with pytest.raises(ValueError, match="not finite in y"):
        require_finite({"x": torch.ones(2), "y": torch.tensor([1.0, float("nan")])}, tmp_path)
