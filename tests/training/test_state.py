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
    TRAINERS,
    Scripts,
    dtypes_of,
    edit_json,
    scale_weights,
    scenes,
    scripts,  # noqa: F401
)

pytestmark = [pytest.mark.slow]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("model", ["half", "variant"])
@pytest.mark.parametrize("name", TRAINERS)
def test_pipelines_stored_in_half_precision(
    scripts: Scripts,  # noqa: F811
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
    if name == "npnet":
        pairs = tmp_path / "pairs"
        scripts.collect(pairs, *extra, model=model)
        extra += ["--train_data_dir", str(pairs)]
    record = scripts.train(name, tmp_path / "run", *extra, model=model)
    assert record["steps" if name != "asdm" else "stage 1 steps"] == 2
    half = torch.bfloat16 if precision == "bf16" else torch.float32
    # NPNet's objective has no frozen part, and the source of SIGN is in float32.
    frozen = {"npnet": set(), "sign": {half, torch.float32}}.get(name, {half})
    assert all(trained == {torch.float32} and others == frozen for trained, others in found)
    if name in ("asdm", "sign"):  # frozen parts that are published have not lost a bit
        file = "vae/diffusion_pytorch_model.safetensors"
        stored = load_file(scripts.folder / "half" / file)
        published = load_file(tmp_path / "run" / "model" / file)
        assert all(torch.equal(value, published[key]) for key, value in stored.items())


@pytest.fixture(scope="module")
def trained(scripts: Scripts) -> Path:  # noqa: F811
    """A finished run of every script."""
    for name in TRAINERS:
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
    "batch": (None, ("--train_batch_size", "2"), r"rows per step of all processes: 4 there, 2 now"),
    "precision": (None, ("--mixed_precision", "bf16"), r"mixed_precision: 'no' there, 'bf16' now|dtype"),
}


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("what", [*CHANGES, "captions"])
def test_a_run_is_not_resumed_with_something_else(
    scripts: Scripts,  # noqa: F811
    trained: Path,
    name: str,
    what: str,
) -> None:
    change, extra, message = CHANGES.get(what, (None, (), r"data\.(digest|pairs)"))
    model = scripts.changed(f"other-{what}", change) if change else None
    if what == "captions" and name == "npnet":
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


@pytest.mark.parametrize("name", ["smooth_lora", "sign", "npnet"])
def test_arguments_are_refused_before_a_model_is_loaded(
    scripts: Scripts,  # noqa: F811
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


@pytest.mark.parametrize("name", TRAINERS)
def test_a_moved_model_with_the_same_content_is_accepted(
    scripts: Scripts,  # noqa: F811
    trained: Path,
    name: str,
) -> None:
    moved = scripts.changed("moved", lambda folder: None)
    extra = ("--resume_from_checkpoint", "latest", "--checkpointing_steps", "7")
    scripts.train(name, trained / name, *extra, model=moved)


@pytest.mark.parametrize("name", ["smooth_lora", "sign", "npnet"])
def test_a_longer_run_is_accepted_and_recorded(
    scripts: Scripts,  # noqa: F811
    trained: Path,
    name: str,
    tmp_path: Path,
) -> None:
    run = tmp_path / name
    shutil.copytree(trained / name, run)
    more = ("--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    record = scripts.train(name, run, *more)
    assert record["images"] == 3 * 4
    assert record["resumptions"] == [{"step": 2, "max_train_steps": "2 → 3"}]
    card = (run / "model" / "README.md").read_text()
    assert "Resumed at step 2 with other arguments: max_train_steps 2 → 3." in card
    with pytest.raises(ValueError, match="more steps than --max_train_steps 2: give at least 3"):
        scripts.train(name, run, "--resume_from_checkpoint", "latest")


def test_noise_pairs_belong_to_a_scorer_and_a_data_type(scripts: Scripts, tmp_path: Path) -> None:  # noqa: F811
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


def test_scenes_are_not_resumed_with_another_autoencoder(scripts: Scripts, tmp_path: Path) -> None:  # noqa: F811
    from diffusers_ext.testbed import base_models

    vae = base_models.build_vae((8, 8, 8)).half()
    vae.save_pretrained(tmp_path / "vae")
    scenes(scripts, tmp_path / "run", tmp_path / "vae")
    first = load_file(tmp_path / "run" / "latents.safetensors")["latents"]
    vae.register_to_config(scaling_factor=2.0)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"vae\.config\.scaling_factor: 1\.0 there, 2\.0 now"):
        scenes(scripts, tmp_path / "run", tmp_path / "vae", "--resume_from_checkpoint", "latest")
    second = load_file(tmp_path / "run" / "latents.safetensors")["latents"]
    assert torch.allclose(second, 2 * first, rtol=1e-4, atol=1e-5)


def test_a_record_is_that_of_the_values(tmp_path: Path) -> None:
    pipe = tiny.build("sd", dtype=torch.float16)
    record = pipeline_record(pipe)
    assert pipeline_record(pipe.to(torch.float32)) == record
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert pipeline_record(loaded) == record == json.loads(json.dumps(record))
    loaded.scheduler = type(loaded.scheduler).from_config(loaded.scheduler.config, beta_end=0.02)
    assert pipeline_record(loaded)["scheduler"] != record["scheduler"]
