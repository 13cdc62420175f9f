"""SIGN of UNets and flows with prompts, whole or as a LoRA, from the script to a pipeline that generates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.asdm.training import make_student
from diffusers_ext.core.families import denoiser_of
from diffusers_ext.training.checkpoints import list_checkpoints
from tests import tiny
from tests.teleport.test_prompt_map import mapped
from tests.training.launching import TWO_PROCESSES, kill_after, launch
from tests.training.scripts import Scripts, arguments, path_of, run, steps

# One worker runs them all: they share the models.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["a aaa", "a bbb"]


def part(pipe: Any) -> str:
    return "transformer" if getattr(pipe, "transformer", None) is not None else "unet"


def generated(sign: Any) -> torch.Tensor:
    sign.set_progress_bar_config(disable=True)
    return sign(PROMPTS, generator=tiny.generators(2), output_type="pt", num_inference_steps=2).images


@pytest.fixture(scope="module")
def models(base: Path) -> Path:
    tiny.build("sdxl").save_pretrained(base / "sdxl")
    return base


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_all_weights(name: str, models: Path, scripts: Scripts, tmp_path: Path) -> None:
    record = scripts.train("train_sign", tmp_path, model=name)
    assert record["motion"] > 0
    sign = dx.SIGNPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    images = generated(sign)
    assert images.shape == (2, 3, 8, 8)
    assert torch.isfinite(images).all()
    teacher = DiffusionPipeline.from_pretrained(models / name)
    assert type(denoiser_of(sign)) is type(denoiser_of(teacher))
    changed = denoiser_of(sign).state_dict()
    assert any(
        not torch.equal(v.half(), changed[k].half()) for k, v in denoiser_of(teacher).state_dict().items()
    )


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_lora(name: str, models: Path, scripts: Scripts, tmp_path: Path) -> None:
    scripts.train("train_sign", tmp_path, "--rank", "2", "--gradient_checkpointing", model=name)
    folder = tmp_path / "model"
    names = set(load_file(folder / "pytorch_lora_weights.safetensors"))
    assert {key.split(".")[0] for key in names} == {"transformer" if name == "sd3" else "unet"}
    assert not (folder / part(tiny.build(name))).exists()
    teacher: Any = DiffusionPipeline.from_pretrained(models / name)
    before = {key: value.clone() for key, value in denoiser_of(teacher).state_dict().items()}
    sign = dx.load_sign_lora(teacher, folder)
    assert isinstance(sign.source, dx.MixtureSource)
    images = generated(sign)
    assert torch.isfinite(images).all()
    teacher.unload_lora_weights()
    assert all(torch.equal(v, before[k]) for k, v in denoiser_of(teacher).state_dict().items())
    assert not torch.equal(generated(sign), images)
    # The same file by diffusers alone.
    teacher.load_lora_weights(folder)
    assert torch.equal(generated(sign), images)
    other: Any = DiffusionPipeline.from_pretrained(models / ("sd3" if name == "sd" else "sd"))
    with pytest.raises(ValueError, match="load the pipeline that was distilled"):
        dx.load_sign_lora(other, folder)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_means_of_prompts_are_saved(
    rank: int | None, models: Path, scripts: Scripts, tmp_path: Path
) -> None:
    stats = mapped(DiffusionPipeline.from_pretrained(models / "sd"))
    stats.save_pretrained(tmp_path / "gaussian")
    extra = ["--gaussian", str(tmp_path / "gaussian"), *(["--rank", str(rank)] if rank else [])]
    scripts.train("train_sign", tmp_path / "run", *extra)
    folder = tmp_path / "run" / "model"
    pipe: Any = DiffusionPipeline.from_pretrained(models / "sd")
    sign = dx.load_sign_lora(pipe, folder) if rank else dx.SIGNPipeline.from_pretrained(folder)
    assert isinstance(sign.source, dx.PromptSource)
    noise = torch.randn(2, 4, 8, 8)
    found: list[torch.Tensor] = []
    handle = sign.unet.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    sign(PROMPTS, latents=noise, output_type="latent")
    handle.remove()
    embeds = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    mean = stats.prompt_mean(embeds.flatten(1))
    alpha = float(pipe.scheduler.alphas_cumprod[sign.config.timestep]) ** 0.5
    # N(μ, C) carried from white noise to the level σ is μ + (C + σ²)^½ ε.
    start = stats.transport(noise, (0.0, 1.0), (1.0, sign.sigma), mean)
    # The source is stored in float16.
    assert torch.allclose(found[0], alpha * start, atol=5e-3)


def test_a_pruned_network_learns_from_the_whole_one(models: Path, scripts: Scripts, tmp_path: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(models / "sd3")
    plan = dx.PruningPlan.load(models / "plan-sd3.json")
    pipe.transformer = make_student(pipe.transformer, plan, 1)
    pipe.save_pretrained(tmp_path / "small")
    scripts.train("train_sign", tmp_path / "run", "--projector", str(tmp_path / "small"), model="sd3")
    sign = dx.SIGNPipeline.from_pretrained(tmp_path / "run" / "model")
    assert sign.transformer.config.num_layers == pipe.transformer.config.num_layers < 3
    assert torch.isfinite(generated(sign)).all()
    with pytest.raises(ValueError, match="differ in class StableDiffusion3Pipeline there"):
        scripts.train("train_sign", tmp_path / "other", "--projector", str(tmp_path / "small"), model="sd")


RUNS = {"sd": ["--rank", "2"], "sd3": []}


def command(name: str, base: Path, output: Path, *extra: str) -> list[str]:
    few = [*steps("train_sign", 6), "--use_ema", "--train_batch_size", "4", "--checkpointing_steps", "1"]
    return [
        path_of("train_sign"),
        *arguments("train_sign", base, output, model=name),
        *RUNS[name],
        *few,
        *extra,
    ]


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(output)[-1] / "trained.safetensors")


@pytest.mark.parametrize("name", RUNS)
def test_resumed_and_in_two_processes(name: str, models: Path, tmp_path: Path) -> None:
    launch(command(name, models, tmp_path / "whole"))
    whole = trained(tmp_path / "whole")
    assert {key.split(".")[0] for key in whole} == {"projector", "fake"}
    if name == "sd":
        assert all("lora" in key or "position_ids" in key for key in whole)
    argv = command(name, models, tmp_path / "killed")
    kill_after(argv, lambda: list_checkpoints(tmp_path / "killed"), 0.3)
    launch([*argv, "--resume_from_checkpoint", "latest"])
    assert all(torch.equal(value, trained(tmp_path / "killed")[key]) for key, value in whole.items())
    launch(command(name, models, tmp_path / "two", "--train_batch_size", "2"), TWO_PROCESSES)
    two = trained(tmp_path / "two")
    # Adam moves a weight by up to the learning rate a step, also where a gradient is only rounding: nearly all of f's
    # differ by less than a tenth of what 6 steps of 1e-4 can move, and of the fake score's, of 1e-3.
    for network, rate in (("projector", 1e-4), ("fake", 1e-3)):
        keys = [key for key in whole if key.startswith(network)]
        apart = torch.cat([(whole[key] - two[key]).abs().flatten().float() for key in keys])
        assert apart.max() <= 12 * rate
        assert apart.quantile(0.95) < 0.6 * rate


def test_refusals(models: Path, scripts: Scripts, tmp_path: Path) -> None:
    argv = [*arguments("train_sign", models, tmp_path), *steps("train_sign", 1)]
    for extra, message in (
        (["--source", "prompts"], "--source prompts needs the statistics"),
        (["--fake_first_steps", "1"], None),
        (["--dmd_weight", "0", "--sid_alpha", "1.2"], None),
    ):
        if message is None:
            with pytest.raises(SystemExit):
                run("train_sign", [*argv, *extra])
        else:
            with pytest.raises(ValueError, match=message):
                run("train_sign", [*argv, *extra])
    assert json.loads((models / "sd" / "model_index.json").read_text())
