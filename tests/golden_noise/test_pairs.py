"""The collector: what it stores, resuming, sharing the work, filtering, and broken files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusers_ext as dx
from diffusers_ext.core.storage import ShardStore
from diffusers_ext.golden_noise.pairs import (
    NoisePairs,
    PairSettings,
    collect_pairs,
    read_summary,
)
from tests import families, tiny

PROMPTS = ["a aaa", "a bbb", "a ccc"]
SETTINGS = PairSettings(
    num_inference_steps=4, guidance_scale=4.0, sampling_steps=2, sampling_guidance_scale=1.0
)
OPTIONS: dict[str, Any] = {"batch_size": 2, "height": 8, "width": 8, "progress": False}


def collect(
    folder: Path, pipe: Any = None, count: int = 5, settings: PairSettings = SETTINGS, **options: Any
) -> Any:
    return collect_pairs(pipe or tiny.build("sd"), PROMPTS, count, folder, settings, **{**OPTIONS, **options})


def contents(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def same(a: Path, b: Path) -> bool:
    one, two = contents(a), contents(b)
    return one.keys() == two.keys() and all(
        torch.equal(value, two[name][key]) for name, part in one.items() for key, value in part.items()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("pairs")
    assert collect(path) == collect(path)
    return path


def test_pairs_are_re_denoised_noise_with_their_prompts(folder: Path) -> None:
    pairs = NoisePairs.load(folder)
    assert pairs.prompts == ["a aaa", "a bbb", "a ccc", "a aaa", "a bbb"]
    assert pairs.index.tolist() == [0, 1, 2, 3, 4]
    assert len(list(folder.glob("*.safetensors"))) == 3
    assert len({tuple(x.flatten().tolist()) for x in pairs.noise}) == 5
    call: dict[str, Any] = {"prompt": pairs.prompts[:2], "height": 8, "width": 8}
    expected = dx.redenoise(
        tiny.build("sd"), pairs.noise[:2].float(), num_inference_steps=4, guidance_scale=4.0, **call
    )
    # Stored with 11 bits; values up to 4.
    assert torch.allclose(pairs.golden[:2].float(), expected, atol=2e-3)
    assert abs(float(pairs.noise.float().std()) - 1) < 0.05


# Pipelines with other layouts of the latents are in test_families.py.
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_other_pipelines(name: str, tmp_path: Path) -> None:
    pipe = tiny.build(name)
    collect(tmp_path, pipe, count=2)
    pairs = NoisePairs.load(tmp_path)
    assert pairs.noise.shape == (2, *tiny.LATENT_SHAPES[name])
    assert not torch.equal(pairs.noise, pairs.golden)


def test_the_arguments_of_the_call_are_recorded(tmp_path: Path) -> None:
    collect(tmp_path / "one", tiny.build("sdxl"), count=2, clip_skip=1)
    collect(tmp_path / "other", tiny.build("sdxl"), count=2)
    assert ShardStore.recipe_of(tmp_path / "one")["call"] == {"clip_skip": 1, "height": 8, "width": 8}
    one, other = (NoisePairs.load(tmp_path / name) for name in ("one", "other"))
    assert torch.equal(one.noise, other.noise)
    assert not torch.allclose(one.golden, other.golden, atol=1e-3)
    with pytest.raises(ValueError, match=r"guidance_scale is set by the settings of the pairs, got .*=3\.0"):
        collect(tmp_path / "third", guidance_scale=3.0)
    with pytest.raises(ValueError, match="sigmas is a Tensor, which the recipe of the pairs cannot hold"):
        collect(tmp_path / "third", sigmas=torch.ones(2))


def test_pairs_belong_to_a_text_encoder(tmp_path: Path) -> None:
    collect(tmp_path, count=2)
    pipe = tiny.build("sd")
    pipe.text_encoder = tiny.build("sd", seed=1).text_encoder
    with pytest.raises(ValueError, match="model"):
        collect(tmp_path, pipe, count=2)


def test_pipelines_that_golden_noise_does_not_work_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes videos"):
        collect(tmp_path, families.build("wan"))
    assert not list(tmp_path.iterdir())


def shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.safetensors"


def test_two_processes_make_what_one_makes(folder: Path, tmp_path: Path) -> None:
    for rank in (1, 0):
        collect(tmp_path, rank=rank, world=2)
    assert same(folder, tmp_path)


def test_a_lost_shard_is_made_again_and_the_others_are_not(folder: Path, tmp_path: Path) -> None:
    collect(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    lost = shard(tmp_path, 1)
    lost.unlink()
    (tmp_path / "shard-000001.99.partial").write_bytes(b"half")
    assert collect(tmp_path).tried == 5
    assert same(folder, tmp_path)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path != lost)


def test_a_part_of_the_pairs_is_used_with_a_warning(folder: Path, tmp_path: Path, caplog: Any) -> None:
    whole = NoisePairs.load(folder)
    assert not caplog.records
    collect(tmp_path)
    shard(tmp_path, 0).unlink()
    part = NoisePairs.load(tmp_path)
    assert 0 < len(part) < len(whole)
    assert "shards: the collector has not finished" in caplog.text


def test_a_scorer_filters_with_a_margin(tmp_path: Path) -> None:
    seen: list[Any] = []

    def scorer(images: np.ndarray, prompts: Any) -> np.ndarray:
        seen.append((images.shape, prompts))
        # The first call of a batch is for the random noise.
        return np.array([0.0, 0.0]) if len(seen) % 2 else np.array([0.3, 0.6])

    settings = PairSettings(**{**vars(SETTINGS), "margin": 0.5})
    counts = collect(tmp_path, count=4, settings=settings, scorer=scorer, scorer_name="ours")
    assert (counts.kept, counts.tried) == (2, 4)
    assert seen[0] == ((2, 8, 8, 3), ["a aaa", "a bbb"])
    pairs = NoisePairs.load(tmp_path)
    assert pairs.index.tolist() == [1, 3]
    assert pairs.prompts == ["a bbb", "a aaa"]
    assert torch.allclose(load_file(shard(tmp_path, 0))["scores"], torch.tensor([[0.0, 0.6]]))
    assert collect(tmp_path, count=4, settings=settings, scorer=scorer, scorer_name="ours") == counts
    assert len(seen) == 4


def test_nothing_kept_is_remembered_and_said(tmp_path: Path) -> None:
    def never(images: np.ndarray, prompts: Any) -> np.ndarray:
        return np.zeros(len(prompts))

    assert collect(tmp_path, count=2, scorer=never, scorer_name="never").kept == 0
    assert read_summary(shard(tmp_path, 0)).tried == 2
    with pytest.raises(ValueError, match=r"holds no pairs: .* lower its --margin"):
        NoisePairs.load(tmp_path)


@pytest.mark.parametrize(
    ("result", "message"),
    [([1.0, float("nan")], r"not finite \['a bbb'\]"), ([1.0], "returned 1 scores for 2 images")],
)
def test_a_scorer_that_fails_stops_the_batch(result: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        collect(tmp_path, count=2, scorer=lambda images, prompts: np.array(result))
    assert not list(tmp_path.glob("*.safetensors"))


def test_other_settings_or_models_do_not_mix(folder: Path, tmp_path: Path) -> None:
    collect(tmp_path, count=1)
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        collect(tmp_path, count=1, seed=1)
    with pytest.raises(ValueError, match=r"settings\.guidance_scale: 4\.0 there, 5\.5 now"):
        collect(tmp_path, count=1, settings=PairSettings(num_inference_steps=4))
    with pytest.raises(ValueError, match=r"made with other settings .model\.text_encoder\.weights:"):
        collect(tmp_path, tiny.build("sd", seed=1), count=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "num_pairs and batch_size of 1 or more"),
        ({"batch_size": 0}, "num_pairs and batch_size"),
    ],
)
def test_wrong_counts(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        collect(tmp_path, **options)
    with pytest.raises(ValueError, match="Give prompts"):
        collect_pairs(tiny.build("sd"), [], 1, tmp_path, SETTINGS)


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No noise pairs: .* recipe\.json is missing"):
        NoisePairs.load(tmp_path)
    collect(tmp_path, count=2)
    path = shard(tmp_path, 0)
    whole = path.read_bytes()
    for broken in (b"", whole[:100], whole[:-10]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"shard-000000\.safetensors is missing or corrupted"):
            NoisePairs.load(tmp_path)
        with pytest.raises(ValueError, match="delete it and create it again"):
            collect(tmp_path, count=2)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a shard of noise pairs: it holds x"):
        NoisePairs.load(tmp_path)
    tensors = {"noise": torch.zeros(1, 4, 8, 8), "golden": torch.zeros(1, 4, 8, 8), "index": torch.zeros(1)}
    names = {"prompts": json.dumps(["a"]), "tried": "1"}
    save_file({**tensors, "golden": torch.zeros(1, 4, 8, 9)}, path, names)
    with pytest.raises(ValueError, match="does not hold pairs"):
        NoisePairs.load(tmp_path)
    save_file({**tensors, "golden": torch.full((1, 4, 8, 8), float("nan"))}, path, names)
    with pytest.raises(ValueError, match="values that are not finite"):
        NoisePairs.load(tmp_path)
    save_file(tensors, path, names)
    save_file(
        {**tensors, "noise": torch.zeros(1, 4, 4, 4), "golden": torch.zeros(1, 4, 4, 4)},
        shard(tmp_path, 1),
        names,
    )
    with pytest.raises(ValueError, match="pairs of different shapes"):
        NoisePairs.load(tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match="corrupted"):
        NoisePairs.load(tmp_path)
    with pytest.raises(ValueError, match="corrupted"):
        ShardStore(tmp_path, {})
