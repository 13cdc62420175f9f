"""A Smooth-LoRA of every flow-matching transformer, trained for two steps as the script does it; of SD3 in all ways."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.training.checkpoints import list_checkpoints
from tests import families
from tests.training.launching import TWO_PROCESSES, launch
from tests.training.scripts import ON_FLOWS, arguments, path_of, run, steps

# One worker runs them all: they share the models.
pytestmark = [pytest.mark.slow]

SD3 = ON_FLOWS[0]
# Pixels of the pictures that each tiny model can take.
SIDES = {"flux": 8, "flux2": 8, "flux2-klein": 8, "qwen": 16, "zimage": 8, "sana": 32, "lumina2": 64}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "pytorch_lora_weights.safetensors")


def loading(monkeypatch: Any, pipe: Any) -> None:
    """Lets the script load a pipeline from memory: the tokenizers of the tiny ones cannot be loaded from files."""
    monkeypatch.setattr(
        DiffusionPipeline, "load_config", lambda *_, **__: {"_class_name": type(pipe).__name__}
    )
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pipe)


@pytest.mark.parametrize("name", SIDES)
def test_only_the_lora_is_trained_and_the_saved_one_loads(
    name: str, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pipe = families.build(name)
    loading(monkeypatch, pipe)
    argv = arguments("train_smooth_lora", base, tmp_path, model=name)
    argv += ["--resolution", str(SIDES[name]), "--learning_rate", "1e-2", *steps("train_smooth_lora", 2)]
    run("train_smooth_lora", [*argv, "--max_sequence_length", "32"])
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["weighting_scheme"] == "none"
    assert record["estimator"] == "vjp"
    assert 0 < record["loss"] < 1e3
    assert record["ISTD"] > 0
    fresh = families.build(name)
    frozen = {key.replace(".base_layer", ""): value for key, value in pipe.transformer.state_dict().items()}
    assert all(torch.equal(value, frozen[key]) for key, value in fresh.transformer.state_dict().items())
    plain = families.images(fresh, name)
    fresh.load_lora_weights(tmp_path / "model")
    loaded = families.images(fresh, name)
    assert not torch.equal(loaded, plain)
    other = families.build(name)
    dx.apply_smooth_lora(other, tmp_path / "model")
    assert torch.equal(families.images(other, name), loaded)
    dx.remove_smooth_lora(other)
    assert torch.equal(families.images(other, name), plain)


@pytest.fixture(scope="module")
def alone(base: Path) -> Path:
    """Four steps of four rows."""
    run(SD3, four_steps(base, base / "alone"))
    return base / "alone"


def four_steps(base: Path, output: Path, *extra: str) -> list[str]:
    rate = ["--learning_rate", "1e-2", "--train_batch_size", "4"]
    return [*arguments(SD3, base, output), *steps(SD3, 4), *rate, *extra]


def test_sd3_leaves_a_lora_for_the_stock_pipeline(alone: Path, base: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(base / "sd3")
    pipe.set_progress_bar_config(disable=True)
    plain = families.images(pipe, "sd3")
    pipe.load_lora_weights(alone / "model")
    assert not torch.equal(families.images(pipe, "sd3"), plain)
    record = json.loads((alone / "model" / "training.json").read_text())
    assert record["weighting_scheme"] == "logit_normal"
    assert record["guidance_scale"] == 4.0


def test_two_processes_train_what_one_trains(alone: Path, base: Path, tmp_path: Path) -> None:
    launch([path_of(SD3), *four_steps(base, tmp_path, "--train_batch_size", "2")], TWO_PROCESSES)
    one, two = weights(alone), weights(tmp_path)
    size = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name)
    # Adam enlarges rounding where gradients are tiny; four steps, stored with 11 bits.
    assert all(
        (value - two[name]).abs().max() < 0.05 * size for name, value in one.items() if "lora_B" in name
    )


@pytest.mark.parametrize(
    ("extra", "same"),
    [
        (("--cache_latents",), True),
        (("--gradient_checkpointing",), True),
        (("--estimator", "finite_difference", "--running_mean", "per_timestep"), False),
        (("--weighting_scheme", "none"), False),
        (("--variation_weight", "0"), False),
    ],
)
def test_ways_to_train_sd3(
    extra: tuple[str, ...], same: bool, alone: Path, base: Path, tmp_path: Path
) -> None:
    run(SD3, four_steps(base, tmp_path, *extra))
    expected, found = weights(alone), weights(tmp_path)
    # Encodings that are cached were made in other batches, which rounds differently.
    limit = 1e-3 * max(float(value.abs().max()) for value in expected.values())
    assert same == all(float((value - found[name]).abs().max()) < limit for name, value in expected.items())


def test_encodings_with_another_number_of_tokens_are_refused(base: Path, tmp_path: Path) -> None:
    argv = [*arguments(SD3, base, tmp_path), *steps(SD3, 1), "--cache_latents"]
    run(SD3, [*argv, "--max_sequence_length", "8"])
    for checkpoint in list_checkpoints(tmp_path):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="max_sequence_length"):
        run(SD3, [*argv, "--max_sequence_length", "9"])


def test_the_embedded_guidance_is_that_of_training(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def argv(*extra: str) -> list[str]:
        own = [
            "--checkpointing_steps",
            "1",
            "--resume_from_checkpoint",
            "latest",
            "--max_sequence_length",
            "8",
        ]
        return [*arguments("train_smooth_lora", base, tmp_path, model="flux"), *own, *extra]

    loading(monkeypatch, families.build("flux"))
    run("train_smooth_lora", argv("--max_train_steps", "1"))
    assert json.loads((tmp_path / "model" / "training.json").read_text())["guidance_scale"] == 3.5
    loading(monkeypatch, families.build("flux"))
    with pytest.raises(ValueError, match="embedded guidance"):
        run("train_smooth_lora", argv("--max_train_steps", "2", "--guidance_scale", "2"))


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        ("ChromaPipeline", (), r"can be trained on .*, got ChromaPipeline"),
        ("StableDiffusionInpaintPipeline", (), r"can be trained on .*, got StableDiffusionInpaintPipeline"),
        ("FluxFillPipeline", (), r"can be trained on .*, got FluxFillPipeline"),
        ("FluxPipeline", ("--snr_gamma", "5"), "--snr_gamma is for .*: use --weighting_scheme"),
        ("StableDiffusionPipeline", ("--weighting_scheme", "none"), "--weighting_scheme is for flow"),
        ("StableDiffusionPipeline", ("--max_sequence_length", "8"), "--max_sequence_length is for flow"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is_loaded(
    kind: str, extra: tuple[str, ...], message: str, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "stored").mkdir()
    (tmp_path / "stored" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    argv = arguments("train_smooth_lora", base, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        run("train_smooth_lora", [*argv, "--pretrained_model_name_or_path", str(tmp_path / "stored"), *extra])
