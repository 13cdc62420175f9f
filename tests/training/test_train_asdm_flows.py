"""The training of a pruned Stable Diffusion 3 as a user launches it, from a tiny random teacher and twelve pictures."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import T5Config, T5EncoderModel

import diffusers_ext as dx
from diffusers_ext.asdm import plan_search
from diffusers_ext.asdm.incubation import check_teacher
from diffusers_ext.asdm.networks import network_config
from tests import families
from tests.asdm.transformers import deep
from tests.training.launching import write_pictures
from tests.training.scripts import run

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CUTS = ("block:transformer_blocks.1", "block:transformer_blocks.3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("asdm-flows")
    pipe = deep("sd3")
    # Without T5, plain diffusers does not load the pipeline.
    config = T5Config(vocab_size=len(pipe.tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipe.register_modules(text_encoder_3=T5EncoderModel(config).eval(), tokenizer_3=pipe.tokenizer)
    pipe.save_pretrained(folder / "sd3")
    dx.PruningPlan(network_config(pipe.transformer), (CUTS,)).save(folder / "plan.json")
    write_pictures(folder / "pictures")
    return folder


def arguments(base: Path, output: Path, *extra: str) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(base / "sd3"), "--train_data_dir", str(base / "pictures")),
        *(
            "--output_dir",
            str(output),
            "--resolution",
            "8",
            "--train_batch_size",
            "2",
            "--lr_warmup_steps",
            "0",
        ),
        *("--learning_rate", "1e-3", "--plan", str(base / "plan.json"), "--max_sequence_length", "8"),
        *("--steps_per_stage", "2", "--checkpointing_steps", "1", *extra),
    ]


def test_search_measures_prompts_of_the_length_of_its_training(
    base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def recorded(*_: Any, **call: Any) -> Any:
        raise KeyError(call.get("max_sequence_length"))

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(plan_search, "record_calibration_inputs", recorded)
    options = {"train_data_dir": base / "pictures", "resolution": 8, "max_sequence_length": 8}
    with pytest.raises(KeyError, match="8"):
        plan_search.search_plans(
            str(base / "sd3"), tmp_path, 0.8, num_validation_images=4, num_candidates=4, **options
        )


def transformer(folder: Path) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)


def changed(one: Any, other: Any) -> set[str]:
    """The blocks, or other parts, whose weights differ."""
    theirs = dict(other.named_parameters())
    names = {name for name, value in one.named_parameters() if not torch.equal(value, theirs[name])}
    return {".".join(name.split(".")[:2]) for name in names}


def test_intervals_then_the_whole_student_to_a_stock_pipeline(base: Path, tmp_path: Path) -> None:
    run("train_asdm", arguments(base, tmp_path, "--interval_steps", "2"))
    teacher = transformer(base / "sd3" / "transformer")
    pruned = dx.prune_network(copy.deepcopy(teacher), dx.PruningPlan.load(base / "plan.json"))
    alone = transformer(tmp_path / "stage-1" / "intervals" / "transformer")
    assert changed(alone, pruned) == {"transformer_blocks.0", "transformer_blocks.1"}
    student = transformer(tmp_path / "stage-1" / "transformer")
    assert changed(student, alone) > {"transformer_blocks.0", "context_embedder.weight"}
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(pipe) is StableDiffusion3Pipeline
    assert pipe.transformer.config.num_layers == 2
    assert families.images(pipe.to(torch.float32), "sd3").isfinite().all()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "with a smaller transformer, pruned in one stage" in card
    assert "The transformer is a stock `SD3Transformer2DModel`" in card
    for name in ("task", "output", "feature", "semantic", "MACs"):
        assert f"| stage 1 {name} |" in card
    record = json.loads((tmp_path / "stage-1" / "transformer" / "stage.json").read_text())
    assert record["parameters"] == student.num_parameters() < teacher.num_parameters()
    # Of a run that is resumed, what is there is used.
    with pytest.raises(ValueError, match="contains stage-1 of an earlier run"):
        run("train_asdm", arguments(base, tmp_path, "--interval_steps", "2"))
    run(
        "train_asdm", arguments(base, tmp_path, "--interval_steps", "2", "--resume_from_checkpoint", "latest")
    )
    assert not changed(transformer(tmp_path / "stage-1" / "transformer"), student)


def test_what_flows_do_not_have_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--snr_gamma is for Stable Diffusion and SDXL"):
        run("train_asdm", arguments(base, tmp_path, "--snr_gamma", "5"))


@pytest.mark.parametrize("name", ["pixart", "auraflow", "chroma", "wan"])
def test_pipelines_whose_students_cannot_be_trained_are_refused_by_name(name: str) -> None:
    pipe = families.build(name)
    with pytest.raises(ValueError, match=type(pipe).__name__):
        check_teacher(pipe)
