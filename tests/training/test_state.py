"""What training scripts load and resume: data types, recipes, and runs that are continued with a change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ext.core.records import pipeline_record
from diffusers_ext.training import loop
from tests import tiny
from tests.training.scripts import (
    FROM_PIPELINE,
    Scripts,
    arguments,
    dtypes_of,
    edit_json,
    run,
    scale_weights,
    scenes,
)

pytestmark = [pytest.mark.slow]

# Those of which every stage has its number of steps are left out.
ONE_RUN = [name for name in FROM_PIPELINE if name != "train_asdm"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("model", ["half", "variant"])
@pytest.mark.parametrize("name", FROM_PIPELINE)
def test_pipelines_stored_in_half_precision(
    scripts: Scripts,
    name: str,
    model: str,
    precision: str,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    found, step = [], loop._optimization_step

    def spy(accelerator: Any, args: Any, wrapped: Any, *rest: Any) -> Any:
        found.append(dtypes_of(wrapped))
        return step(accelerator, args, wrapped, *rest)

    monkeypatch.setattr(loop, "_optimization_step", spy)
    extra = ["--mixed_precision", precision, *(("--variant", "fp16") if model == "variant" else ())]
    if name == "train_npnet":
        pairs = tmp_path / "pairs"
        scripts.collect(pairs, *extra, model=model)
        extra += ["--train_data_dir", str(pairs)]
    record = scripts.train(name, tmp_path / "run", *extra, model=model)
    assert record["steps" if name != "train_asdm" else "stage 1 steps"] == 2
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    # NPNet's objective has no frozen part, and the source of SIGN is in float32.
    frozen = {"train_npnet": set(), "train_sign": {half, torch.float32}}.get(name, {half})
    assert all(trained == {torch.float32} and others == frozen for trained, others in found)
    if name in ("train_asdm", "train_sign"):  # frozen parts that are published have not lost a bit
        file = "vae/diffusion_pytorch_model.safetensors"
        stored = load_file(scripts.folder / "half" / file)
        published = load_file(tmp_path / "run" / "model" / file)
        assert all(torch.equal(value, published[key]) for key, value in stored.items())


@pytest.fixture(scope="module")
def trained(scripts: Scripts) -> Path:
    """A finished run of every script."""
    for name in FROM_PIPELINE:
        scripts.train(name, scripts.folder / "runs" / name)
    return scripts.folder / "runs"


def other_captions(folder: Path) -> None:
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text().replace("a aaa", "a zzz"))


# {what is changed: (its change, arguments, message)}; the model is changed unless there are arguments.
CHANGES: dict[str, tuple[Callable[[Path], None] | None, tuple[str, ...], str]] = {
    "weights": (scale_weights("unet"), (), r"unet\.weights: '\w+' there, '\w+' now"),
    "text": (scale_weights("text_encoder"), (), r"text_encoder\.weights"),
    "prediction": (
        edit_json("scheduler/scheduler_config.json", prediction_type="sample"),
        (),
        r"scheduler\.config\.prediction_type: 'epsilon' there, 'sample' now",
    ),
    "scaling": (
        edit_json("vae/config.json", scaling_factor=0.5),
        (),
        r"vae\.config\.scaling_factor: 0\.18215 there, 0\.5 now",
    ),
    "rate": (None, ("--learning_rate", "0.5"), r"learning_rate: 0\.001 there, 0\.5 now"),
    "batch": (None, ("--train_batch_size", "4"), r"rows per step of all processes: 2 there, 4 now"),
    "accumulation": (
        None,
        ("--gradient_accumulation_steps", "2"),
        r"arguments\.gradient_accumulation_steps: 1 there, 2 now",
    ),
    "adam": (None, ("--adam_beta1", "0.5"), r"adam_beta1: 0\.9 there, 0\.5 now"),
    "optimizer": (None, ("--optimizer", "muon"), r"arguments\.optimizer: 'adamw' there, 'muon' now"),
    "scaled rate": (None, ("--scale_lr",), r"scale_lr: False there, True now"),
    "precision": (None, ("--mixed_precision", "bf16"), r"mixed_precision: 'no' there, 'bf16' now|dtype"),
}


@pytest.mark.parametrize("name", FROM_PIPELINE)
@pytest.mark.parametrize("what", [*CHANGES, "captions"])
def test_a_run_is_not_resumed_with_something_else(
    scripts: Scripts,
    trained: Path,
    name: str,
    what: str,
) -> None:
    change, extra, message = CHANGES.get(what, (None, (), r"data\.(digest|pairs)"))
    model = scripts.changed(f"other-{what}", change) if change else "sd"
    if what == "captions" and name == "train_npnet":
        other = scripts.folder / "other-pairs"
        if not other.exists():
            scripts.collect(other, "--seed", "1")
        extra = ("--train_data_dir", str(other))
    elif what == "captions":
        other = scripts.folder / "other-pictures"
        if not other.exists():
            shutil.copytree(scripts.folder / "pictures", other)
            other_captions(other)
        extra = ("--train_data_dir", str(other))
    before = (trained / name / "model" / "training.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        scripts.train(name, trained / name, "--resume_from_checkpoint", "latest", *extra, model=model)
    assert (trained / name / "model" / "training.json").read_bytes() == before


@pytest.mark.parametrize("name", ONE_RUN)
def test_arguments_are_refused_before_a_model_is_loaded(
    scripts: Scripts,
    trained: Path,
    name: str,
) -> None:
    for extra, message in {
        (): "holds checkpoint-2 of an earlier run",
        ("--resume_from_checkpoint", "checkpoint-1"): "not a complete checkpoint",
        ("--resume_from_checkpoint", "latest", "--seed", "5"): r"arguments\.seed: 0 there, 5 now",
        ("--resume_from_checkpoint", "latest", "--max_train_steps", "1"): "give at least 2",
    }.items():
        with pytest.raises(ValueError, match=message):
            scripts.train(name, trained / name, *extra, model="no-such-model")


@pytest.mark.parametrize("name", FROM_PIPELINE)
def test_a_moved_model_with_the_same_content_is_accepted(
    scripts: Scripts,
    trained: Path,
    name: str,
) -> None:
    moved = scripts.changed("moved", lambda folder: None)
    extra = ["--resume_from_checkpoint", "latest", "--checkpointing_steps", "7", "--cache_dir", str(trained)]
    # What the first run took from the defaults of `accelerate launch`.
    extra += ["--mixed_precision", "no", "--gradient_accumulation_steps", "1"]
    scripts.train(name, trained / name, *extra, model=moved)


@pytest.mark.parametrize("name", ONE_RUN)
def test_a_longer_run_is_accepted_and_recorded(
    scripts: Scripts,
    trained: Path,
    name: str,
    tmp_path: Path,
) -> None:
    output = tmp_path / name
    shutil.copytree(trained / name, output)
    more = ("--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    record = scripts.train(name, output, *more)
    assert record["images"] == 3 * 2
    assert record["resumptions"] == [{"step": 2, "max_train_steps": "2 → 3"}]
    card = (output / "model" / "README.md").read_text()
    assert "Resumed at step 2 with other arguments: max_train_steps 2 → 3." in card
    with pytest.raises(ValueError, match="more steps than --max_train_steps 2: give at least 3"):
        scripts.train(name, output, "--resume_from_checkpoint", "latest")


@pytest.mark.parametrize("name", ONE_RUN)
def test_a_run_is_continued_for_epochs(scripts: Scripts, trained: Path, name: str, tmp_path: Path) -> None:
    output = tmp_path / name
    shutil.copytree(trained / name, output)
    argv = [*arguments(name, scripts.folder, output), "--resume_from_checkpoint", "latest"]
    run(name, [*argv, "--num_train_epochs", "1"])
    record = json.loads((output / "model" / "training.json").read_text())
    assert record["steps"] > 2
    found = {"step": 2, "max_train_steps": f"2 → {record['steps']}", "num_train_epochs": "None → 1"}
    assert record["resumptions"] == [found]


def test_noise_pairs_belong_to_a_scorer_and_a_data_type(scripts: Scripts, tmp_path: Path) -> None:
    code = "def score(images, prompts):\n    return images.mean((1, 2, 3)) * {}\n"
    (tmp_path / "mine.py").write_text(code.format(1))
    extra = ("--scorer", f"{tmp_path / 'mine.py'}:score", "--num_pairs", "8")
    scripts.collect(tmp_path / "pairs", *extra)
    (tmp_path / "mine.py").write_text(code.format(2))
    with pytest.raises(ValueError, match=r"scorer\.code: '\w+' there, '\w+' now"):
        scripts.collect(tmp_path / "pairs", *extra)
    (tmp_path / "mine.py").write_text(code.format(1))
    with pytest.raises(ValueError, match=r"dtype: 'torch.float32' there, 'torch.bfloat16' now"):
        scripts.collect(tmp_path / "pairs", *extra, "--mixed_precision", "bf16")


@pytest.mark.usefixtures("scripts")
def test_scenes_are_not_resumed_with_another_autoencoder(tmp_path: Path) -> None:
    from diffusers_ext.testbed import base_models

    vae = base_models.build_vae((8, 8, 8)).half()
    vae.save_pretrained(tmp_path / "vae")
    scenes(tmp_path / "run", tmp_path / "vae")
    vae.register_to_config(scaling_factor=2.0)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"vae\.config\.scaling_factor: 1\.0 there, 2\.0 now"):
        scenes(tmp_path / "run", tmp_path / "vae", "--resume_from_checkpoint", "latest")


def test_a_record_is_that_of_the_values(tmp_path: Path) -> None:
    pipe = tiny.build("sd", dtype=torch.float16)
    record = pipeline_record(pipe)
    assert pipeline_record(pipe.to(torch.float32)) == record
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert pipeline_record(loaded) == record == json.loads(json.dumps(record))
    loaded.scheduler = type(loaded.scheduler).from_config(loaded.scheduler.config, beta_end=0.02)
    assert pipeline_record(loaded)["scheduler"] != record["scheduler"]
