"""Distilling a projector end to end, as a user launches it, from a tiny random teacher and twelve pictures."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.sign.teacher import untrained_projector
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR
from diffusers_ext.testbed.runs import load_reference, run_garments
from diffusers_ext.training.checkpoints import list_checkpoints
from tests import tiny
from tests.training.launching import ACCELERATE, ROOT, TWO_PROCESSES, kill_after, launch, write_pictures
from tests.training.scripts import run

# One worker runs them all: they share the trained weights.
pytestmark = [pytest.mark.slow]

SCRIPT = str(ROOT / "training" / "train_sign.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("sign")
    for name in ("ddpm", "sd", "sdxl"):
        tiny.build(name).save_pretrained(folder / name)
    write_pictures(folder / "pictures")
    return folder


def command(base: Path, output: Path, *extra: str, teacher: str = "ddpm") -> list[str]:
    """A run with every loss and every phase."""
    return [
        SCRIPT,
        *("--pretrained_model_name_or_path", str(base / teacher), "--train_data_dir", str(base / "pictures")),
        *("--output_dir", str(output), "--resolution", "8", "--max_train_steps", "8", "--warmup_steps", "2"),
        *("--train_batch_size", "4", "--use_ema", "--num_pairs", "16", "--num_inference_steps", "2"),
        *("--reg_weight", "0.5", "--flow_weight", "1", "--renoised_share", "0.5"),
        *("--fake_first_steps", "1", "--fake_updates", "2"),
        *("--source_rank", "2", "--source_components", "3"),
        *("--pairs_dir", str(base / f"pairs-{teacher}"), *extra),
    ]


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    launch(command(base, base / "run"), ACCELERATE)
    return base / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def test_it_leaves_a_projector_that_loads_and_a_card(trained: Path, base: Path) -> None:
    sign = dx.SIGNPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    images = sign(batch_size=2, num_inference_steps=2, generator=tiny.generators(2), output_type="pt").images
    assert images.shape == (2, 3, 8, 8)
    before = tiny.build("ddpm").unet.half().state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in weights(trained).items())
    card = (trained / "model" / "README.md").read_text()
    for figure in ("idempotence", "motion", "variance", "reconstruction"):
        assert f"| {figure} |" in card
    assert str(base) not in card
    assert Image.open(trained / "validation-8.png").size == (8 * 12 * 2, 8 * 6 * 2)
    # The frozen teacher is not in the checkpoint: the recipe has its digest.
    state = load_file(list_checkpoints(trained)[-1] / "trained.safetensors")
    assert {name.split(".")[0] for name in state} == {"projector", "fake"}


def test_a_projector_is_where_another_recipe_starts(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    few = ("--projector", str(trained / "model"), "--max_train_steps", "4", "--learning_rate", "1e-12")
    run("train_sign", command(base, tmp_path / "on", *few)[1:])
    before, after = weights(trained), weights(tmp_path / "on")
    # Steps of 1e-12 are lost in the rounding of float16.
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    with pytest.raises(ValueError, match=r"noise level 1\.\d+ there, 3\.0 here"):
        run("train_sign", command(base, tmp_path / "other", *few, "--sigma", "3")[1:])
    with pytest.raises(ValueError, match="differ in class UNet2DModel there, UNet2DConditionModel here"):
        run("train_sign", command(base, tmp_path / "sd", *few, teacher="sd")[1:])


def test_a_killed_run_resumes_to_the_same_weights(trained: Path, base: Path, tmp_path: Path) -> None:
    argv = command(base, tmp_path, "--checkpointing_steps", "1")
    kill_after(argv, lambda: list_checkpoints(tmp_path), 0.3)
    launch(command(base, tmp_path, "--resume_from_checkpoint", "latest"))
    expected, resumed = weights(trained), weights(tmp_path)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_two_processes_train_what_one_trains(trained: Path, base: Path, tmp_path: Path) -> None:
    launch(command(base, tmp_path, "--train_batch_size", "2"), TWO_PROCESSES)
    one, two = weights(trained), weights(tmp_path)
    # Adam moves every weight by up to the learning rate a step, also where a gradient is only rounding: of the 8 steps
    # of 1e-4 nearly all weights must differ by less than one tenth, and none by more than they can have moved. Beside
    # that, the weights are stored in float16, with a spacing of up to 1e-3 of their size.
    difference = torch.cat(
        [(value.float() - two[name].float()).abs().flatten() for name, value in one.items()]
    )
    assert difference.max() < 2e-3
    assert difference.quantile(0.95) < 2e-4


def test_a_teacher_with_prompts(base: Path, tmp_path: Path) -> None:
    extra = ("--guidance_scale", "3", "--denoise_weight", "0.5", "--tight_weight", "0.1")
    launch(command(base, tmp_path, *extra, teacher="sd"))
    sign = dx.SIGNPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert sign(["a aaa", "a bbb"], output_type="pt").images.shape == (2, 3, 8, 8)


def test_scores_alone_need_no_pairs(base: Path, tmp_path: Path) -> None:
    launch(
        command(
            base, tmp_path, "--warmup_steps", "0", "--reg_weight", "0", "--flow_weight", "0",
            "--pairs_dir", str(tmp_path / "pairs"), "--source", "white",
        )
    )  # fmt: skip
    assert not (tmp_path / "pairs").exists()
    assert dx.SIGNPipeline.from_pretrained(tmp_path / "model").source is None


def test_refusals(base: Path, trained: Path, tmp_path: Path) -> None:
    other = command(base, tmp_path, "--num_inference_steps", "3")
    assert "made with other settings" in launch(other, code=1)
    assert "expected an even number of 2 or more, got 3" in launch(
        command(base, tmp_path, "--train_batch_size", "3"), code=2
    )
    few = command(base, tmp_path, "--source_rank", "64")
    assert "12 samples of 192 elements allow a source of" in launch(few, code=1)
    assert "got 3 of rank 64" in launch(few, code=1)
    same = command(base, tmp_path, "--resolution", "16")
    assert "Expected images 8 wide and 8 high" in launch(same, code=1)


def test_scores_alone_bring_samples_nearer_to_the_data(tmp_path: Path, monkeypatch: Any) -> None:
    """The embedded pixel model: 80 steps of 32 images, a few minutes on one core."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    model = card_dir("fashion-ddpm")
    argv = ["--pretrained_model_name_or_path", str(model), "--dataset_name", "fashion-mnist"]
    argv += ["--train_data_dir", str(SAMPLE_DIR), "--output_dir", str(tmp_path), "--source_components", "8"]
    argv += ["--max_train_steps", "80", "--train_batch_size", "32", "--rec_weight", "0", "--idem_weight", "0"]
    run("train_sign", [*argv, "--source_rank", "8", "--use_ema", "--ema_decay", "0.98"])
    sign: Any = dx.SIGNPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    teacher: Any = DDPMPipeline.from_pretrained(model, dtype=torch.float32)
    untrained = untrained_projector(teacher)
    untrained.register_modules(source=sign.source)
    found = []
    for pipe in (untrained, sign):
        pipe.set_progress_bar_config(disable=True)
        features = run_garments(pipe, 512, seed=5, num_inference_steps=1).features
        found.append(frechet_distance(FeatureStats.of(features), load_reference("garments-test")))
    # .7 before and .2 to .4 after, over seeds; with the learning rate of the teacher it is above 4.
    assert found[1] < 0.75 * found[0]
