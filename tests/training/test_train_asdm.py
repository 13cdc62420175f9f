"""Progressive incubation end to end, as a user launches it, from a tiny random teacher and twelve pictures."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.asdm.prune import teacher_blocks
from diffusers_ext.asdm.training import StageObjective, check_run, load_student, make_student, stage_steps
from diffusers_ext.asdm.unet import ASDMUNet2DConditionModel
from diffusers_ext.training.checkpoints import list_checkpoints
from tests import tiny
from tests.asdm.networks import SDXL, SMALL, network
from tests.training.launching import ACCELERATE, ROOT, TWO_PROCESSES, kill_after, launch, write_pictures

# One worker runs them all: they share the trained weights.
pytestmark = [pytest.mark.slow]

SCRIPT = str(ROOT / "training" / "train_asdm.py")
PLAN = (("layer.0", "layer.2"), ("layer.1", "mid.attention"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("asdm")
    pipe = tiny.build("sd")
    pipe.unet = network(SMALL, seed=3, cross_attention_dim=16, sample_size=8)
    pipe.save_pretrained(folder / "sd")
    plan = dx.PruningPlan(dict(pipe.unet.config), PLAN)
    plan.save(folder / "plan.json")
    dx.PruningPlan(plan.config, (("layer.0",), ("layer.1",))).save(folder / "other-plan.json")
    pipe = tiny.build("sdxl")
    small = {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 6 * 8 + 16, "sample_size": 8}
    pipe.unet = network(SDXL, **small)
    pipe.save_pretrained(folder / "sdxl")
    tiny.build("ddpm").save_pretrained(folder / "ddpm")
    write_pictures(folder / "pictures")
    return folder


def command(
    base: Path, output: Path, *extra: str, plan: str | None = "plan.json", model: str = "sd"
) -> list[str]:
    return [
        SCRIPT,
        *("--pretrained_model_name_or_path", str(base / model), "--train_data_dir", str(base / "pictures")),
        *("--output_dir", str(output), "--resolution", "8", "--train_batch_size", "4", "--use_ema"),
        *("--learning_rate", "1e-3", "--lr_warmup_steps", "0", "--steps_per_stage", "3", "5"),
        *(("--plan", str(base / plan)) if plan else ()),
        *extra,
    ]


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    extra = ("--validation_prompts", "a aaa", "a bbb", "a ccc", "--num_inference_steps", "2")
    launch(command(base, base / "run", *extra), ACCELERATE)
    return base / "run"


def weights(run: Path, folder: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / folder / "unet" / "diffusion_pytorch_model.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_it_leaves_a_pipeline_that_loads_and_a_card(trained: Path, base: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(trained / "model")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.unet, ASDMUNet2DConditionModel)
    assert pipe.unet.config["cond_convs"]
    assert tiny.images(pipe, "sd", steps=2).isfinite().all()
    assert {value.dtype for value in weights(trained).values()} == {torch.float16}
    plan = dx.PruningPlan.load(trained / "model" / "plan.json")
    assert plan.stages == PLAN
    plan.check(pipe.unet, 2)
    card = (trained / "model" / "README.md").read_text()
    assert "import diffusers_ext" in card
    assert "pruned in 2 stages" in card
    assert "Seed 0, 8 steps, 32 images" in card
    for stage in (1, 2):
        for name in ("steps", "loss", "task", "output", "feature", "semantic", "parameters", "MACs"):
            assert f"| stage {stage} {name} |" in card
    assert "| teacher MACs |" in card
    assert "nan" not in card.split("## Results")[1]
    assert str(base) not in card


def test_every_stage_leaves_its_student_checkpoint_and_pictures(trained: Path) -> None:
    plan = dx.PruningPlan.load(trained / "plan.json")
    for stage, steps in ((1, 3), (2, 5)):
        folder = trained / f"stage-{stage}"
        student = load_student(folder / "unet")
        plan.check(student, stage)
        assert Image.open(folder / f"validation-{steps}.png").size == (8 * 3 * 2, 8 * 2 * 2)
        assert [p.name for p in list_checkpoints(folder)] == [f"checkpoint-{steps}"]
        # Of the networks, only the student is in the checkpoint.
        state = load_file(list_checkpoints(folder)[0] / "trained.safetensors")
        assert all(name.startswith("distill.student.") for name in state)
        record = json.loads((folder / "unet" / "stage.json").read_text())
        assert record["parameters"] == student.num_parameters()
    assert not torch.equal(
        weights(trained, "stage-1")["conv_in.weight"], weights(trained, "stage-2")["conv_in.weight"]
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_run_resumes_to_the_same_weights(
    trained: Path, base: Path, tmp_path: Path, stage: int
) -> None:
    argv = command(base, tmp_path, "--checkpointing_steps", "1")
    kill_after(argv, lambda: list_checkpoints(tmp_path / f"stage-{stage}"), 0.1)
    finished = (tmp_path / "stage-1" / "unet" / "stage.json").is_file()
    assert finished or stage == 1
    untouched = (tmp_path / "stage-1" / "unet" / "stage.json").stat().st_mtime_ns if finished else None
    launch(command(base, tmp_path, "--resume_from_checkpoint", "latest"))
    assert_equal(weights(tmp_path, "stage-1"), weights(trained, "stage-1"))
    assert_equal(weights(tmp_path, "stage-2"), weights(trained, "stage-2"))
    assert_equal(weights(tmp_path), weights(trained))
    if untouched is not None:
        assert (tmp_path / "stage-1" / "unet" / "stage.json").stat().st_mtime_ns == untouched


def test_two_processes_train_what_one_trains(trained: Path, base: Path, tmp_path: Path) -> None:
    launch(command(base, tmp_path, "--train_batch_size", "2"), TWO_PROCESSES)
    for folder, steps in (("stage-1", 3), ("stage-2", 8)):
        one, two = weights(trained, folder), weights(tmp_path, folder)
        # As of train_sign: Adam moves every weight by up to the learning rate a step, also where a gradient
        # is only rounding. Nearly all must differ by less than one tenth, and none by more than they can have
        # moved.
        difference = torch.cat([(value - two[name]).abs().flatten() for name, value in one.items()])
        assert difference.max() < 2 * steps * 1e-3
        assert difference.quantile(0.95) < steps * 1e-4


def test_controls_leave_a_stock_unet(base: Path, tmp_path: Path) -> None:
    extra = ("--one_shot", "--no_cond_convs", "--from_scratch", "--gradient_checkpointing", "--cache_latents")
    launch(command(base, tmp_path, *extra, "--steps_per_stage", "2", "--snr_gamma", "5"))
    record = json.loads((tmp_path / "stage-1" / "unet" / "stage.json").read_text())
    assert record["steps"] == 4
    assert not (tmp_path / "stage-2").exists()
    stock = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    assert json.loads((tmp_path / "model" / "unet" / "config.json").read_text())["_class_name"] == (
        "UNet2DConditionModel"
    )
    teacher = UNet2DConditionModel.from_pretrained(base / "sd" / "unet")
    # 4 steps of 1e-3 from a random start do not come near.
    assert (stock.conv_in.weight - teacher.conv_in.weight).abs().max() > 0.1
    card = (tmp_path / "model" / "README.md").read_text()
    assert "plain diffusers loads it" in card
    assert "from random weights" in card


def test_sdxl_with_a_preset(base: Path, tmp_path: Path) -> None:
    extra = ("--preset", "bk-small", "--steps_per_stage", "2", "--mixed_precision", "bf16")
    drawn = ("--validation_prompts", "a aaa", "--num_inference_steps", "2")
    launch(command(base, tmp_path, *extra, *drawn, plan=None, model="sdxl"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.mid_block is None
    assert tiny.images(pipe, "sdxl", steps=2).isfinite().all()
    assert Image.open(tmp_path / "stage-1" / "validation-2.png").size == (8 * 2, 8 * 2 * 2)


def test_gri_attention_is_trained_and_saved(base: Path, tmp_path: Path) -> None:
    launch(command(base, tmp_path, "--preset", "incubation", "--steps_per_stage", "1", plan=None))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipe.unet.config["gri_attention"]


def test_features_alone_without_a_resolution_in_two_processes(base: Path, tmp_path: Path) -> None:
    extra = ("--preset", "bk-tiny", "--task_weight", "0", "--output_weight", "0", "--steps_per_stage", "2")
    launch(command(base, tmp_path, *extra, plan=None), TWO_PROCESSES)
    assert len(load_student(tmp_path / "stage-1" / "unet").config["block_out_channels"]) == 2
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| stage 1 feature |" in card
    assert "| stage 1 task |" not in card


def test_blocks_are_compared_with_those_they_come_from() -> None:
    teacher = network(SMALL)
    plan = dx.preset_plan("bk-tiny", teacher)
    student = make_student(teacher, plan, 1)
    scheduler: Any = tiny.diffusers.DDPMScheduler()
    objective = StageObjective(student, teacher, teacher_blocks(plan, 1), scheduler)
    torch.manual_seed(0)
    batch = {"latents": torch.randn(2, 4, 16, 8), "noise": torch.randn(2, 4, 16, 8)}
    batch |= {"timesteps": torch.tensor([5, 500]), "prompt_embeds": torch.randn(2, 7, 12)}
    found = objective.losses(**batch)
    assert set(found) == {"task", "output", "feature", "semantic"}
    assert torch.stack(list(found.values())).isfinite().all()
    compared, whole = objective.distill.blocks, objective.distill.teacher
    assert whole.get_submodule(compared["up_blocks.0"]) is teacher.up_blocks[1]
    assert whole.get_submodule(compared["down_blocks.0"]) is teacher.down_blocks[0]
    assert torch.equal(
        objective(**batch), found["task"] + found["output"] + found["feature"] + 0.1 * found["semantic"]
    )


def refused(argv: list[str], capsys: Any, monkeypatch: Any) -> str:
    """What the script says of wrong arguments, without a process of its own."""
    found = runpy.run_path(SCRIPT)
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        found["parse_args"]()
    return capsys.readouterr().err


def test_arguments_that_are_refused(base: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for extra, message in {
        ("--max_train_steps", "3"): "use --steps_per_stage",
        ("--resume_from_checkpoint", "checkpoint-2"): "must be 'latest'",
        ("--proportion_empty_prompts", "1.5"): "expected a number from 0 to 1, got 1.5",
        ("--preset", "bk-base"): "not allowed with argument --plan",
    }.items():
        assert message in refused(command(base, tmp_path, *extra), capsys, monkeypatch)
    neither = command(base, tmp_path, plan=None)
    wanted = "one of the arguments --plan --preset is required"
    assert wanted in refused(neither, capsys, monkeypatch)


def test_steps_per_stage() -> None:
    assert stage_steps([5], 3) == [5, 5, 5]
    assert stage_steps([1, 2], 2) == [1, 2]
    assert stage_steps([5], 3, one_shot=True) == [15]
    assert stage_steps([1, 2], 2, one_shot=True) == [3]
    with pytest.raises(ValueError, match="one for each of the plan's 2, each 1 or more; got 3: 1 2 3"):
        stage_steps([1, 2, 3], 2)
    with pytest.raises(ValueError, match="got 1: 0"):
        stage_steps([0], 2)
    with pytest.raises(ValueError, match="The plan has no stages"):
        stage_steps([1], 0)


def test_models_that_are_refused(base: Path, tmp_path: Path) -> None:
    assert "This plan is for another UNet" in launch(command(base, tmp_path, model="sdxl"), code=1)
    assert "expected Stable Diffusion or SDXL" in launch(command(base, tmp_path, model="ddpm"), code=1)
    few = command(base, tmp_path, "--steps_per_stage", "1", "2", "3")
    assert "--steps_per_stage takes one number for all stages" in launch(few, code=1)


def test_a_run_is_not_mixed_with_another(base: Path, trained: Path) -> None:
    before = (trained / "incubation.json").read_bytes()
    other = command(base, trained, "--resume_from_checkpoint", "latest", plan="other-plan.json")
    assert "made with other settings" in launch(other, code=1)
    recipe = json.loads(before)
    check_run(trained, recipe, resumed=True)
    with pytest.raises(ValueError, match="contains stage-2 of an earlier run"):
        check_run(trained, recipe, resumed=False)
    changed = {**recipe, "arguments": {**recipe["arguments"], "no_cond_convs": True, "seed": 1}}
    with pytest.raises(
        ValueError,
        match=r"other settings \(arguments.no_cond_convs: False there, True now; arguments.seed: 0 there, 1 now\)",
    ):
        check_run(trained, changed, resumed=True)
    check_run(trained / "stage-1", changed, resumed=False)
    assert (trained / "incubation.json").read_bytes() == before
