"""Noise pairs and NPNet on Stable Diffusion 3 and Flux.1, with the scripts: pooled vectors and packed latents."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.core.storage import ShardStore
from diffusers_ext.golden_noise.pairs import NoisePairs
from diffusers_ext.training.checkpoints import list_checkpoints
from tests import families
from tests.training.launching import TWO_PROCESSES, kill_after, launch
from tests.training.scripts import arguments, flux, path_of, run, steps

# One worker runs them all: they share the models and the pairs.
pytestmark = [pytest.mark.slow]

GAPS = {"sd3": "cfg", "flux": "guidance"}
COLLECT, TRAIN = "collect_noise_pairs", "train_npnet"


@pytest.fixture(scope="module", params=GAPS)
def model(request: Any, base: Path) -> str:
    if request.param == "flux" and not (base / "flux").exists():
        flux().save_pretrained(base / "flux")
    return request.param


def collect(base: Path, model: str, output: Path, *extra: str) -> list[str]:
    short = ["--call_arguments", '{"max_sequence_length": 16}']
    return [*arguments(f"{COLLECT} {model}", base, output), *short, *extra]


@pytest.fixture(scope="module")
def pairs(base: Path, model: str) -> Path:
    folder = base / f"pairs {model}"
    run(COLLECT, collect(base, model, folder))
    return folder


def train(base: Path, model: str, pairs: Path, output: Path, *extra: str) -> list[str]:
    own = ["--train_data_dir", str(pairs), "--learning_rate", "3e-3", "--train_batch_size", "4"]
    return [*arguments(f"{TRAIN} {model}", base, output), *steps(TRAIN, 4), *own, *extra]


@pytest.fixture(scope="module")
def trained(base: Path, model: str, pairs: Path) -> Path:
    run(TRAIN, train(base, model, pairs, base / f"npnet {model}"))
    return base / f"npnet {model}"


def contents(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{file.name}.{name}": value for file in files for name, value in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    a, b = contents(one), contents(other)
    assert a
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_pairs_are_unpacked_and_hold_the_gap_of_the_model(model: str, pairs: Path) -> None:
    held = NoisePairs.load(pairs)
    assert held.noise.shape == held.golden.shape == (26, 4, 8, 8)
    assert not torch.equal(held.noise, held.golden)
    assert ShardStore.recipe_of(pairs)["settings"]["gap"] == GAPS[model]


def test_a_killed_collector_and_two_collect_what_one_collects(
    model: str, base: Path, pairs: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    script = path_of(COLLECT)
    kill_after([script, *collect(base, model, one)], lambda: list(one.glob("*.safetensors")), 0.05)
    assert 0 < len(list(one.glob("*.safetensors"))) < 13
    run(COLLECT, collect(base, model, one))
    launch([script, *collect(base, model, two)], TWO_PROCESSES)
    assert_same(pairs, one)
    assert_same(pairs, two)


def test_the_network_takes_pooled_vectors_and_the_pipeline_takes_the_network(
    model: str, base: Path, trained: Path
) -> None:
    npnet: Any = dx.NPNetModel.from_pretrained(trained / "model", torch_dtype=torch.float32)
    pipe = DiffusionPipeline.from_pretrained(base / model)
    pipe.set_progress_bar_config(disable=True)
    assert npnet.config.pooled_dim == pipe.transformer.config.pooled_projection_dim
    assert npnet.config.prompt_options["max_sequence_length"] == 16
    call = {"max_sequence_length": 16}
    plain = families.images(pipe, model, 2, **call)
    dx.apply_golden_noise(pipe, npnet)
    assert not torch.equal(families.images(pipe, model, 2, **call), plain)
    dx.remove_golden_noise(pipe)
    assert torch.equal(families.images(pipe, model, 2, **call), plain)
    record = json.loads((trained / "model" / "training.json").read_text())
    assert record["relative error"] > 0


def test_a_killed_training_resumes_to_the_same_weights(
    model: str, base: Path, pairs: Path, trained: Path, tmp_path: Path
) -> None:
    argv = train(base, model, pairs, tmp_path, "--checkpointing_steps", "1")
    kill_after([path_of(TRAIN), *argv], lambda: list_checkpoints(tmp_path), 0.1)
    run(TRAIN, [*argv, "--resume_from_checkpoint", "latest"])
    assert_same(trained / "model", tmp_path / "model")


def test_two_processes_train_what_one_trains(
    model: str, base: Path, pairs: Path, trained: Path, tmp_path: Path
) -> None:
    launch([path_of(TRAIN), *train(base, model, pairs, tmp_path, "--train_batch_size", "2")], TWO_PROCESSES)
    one, two = contents(trained / "model"), contents(tmp_path / "model")
    # Gradients summed in another order, which Adam enlarges where they are tiny: four steps of 3e-3, stored with 11
    # bits.
    assert all((value.float() - two[name].float()).abs().mean() < 1e-3 for name, value in one.items())
