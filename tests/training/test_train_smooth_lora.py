"""Training a Smooth-LoRA end to end, as a user launches it, on a tiny random pipeline and twelve pictures."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
)
from safetensors.torch import load_file

import diffusers_ext as dx
from diffusers_ext.smooth_lora.training import SmoothLoraObjective, check_pipeline
from diffusers_ext.smooth_lora.variation import StepwiseVariationLoss
from diffusers_ext.training.checkpoints import list_checkpoints
from diffusers_ext.training.lora import add_lora
from tests import families, tiny
from tests.training.launching import ACCELERATE, ROOT, TWO_PROCESSES, kill_after, launch, write_pictures

# One worker runs them all: they share the trained weights.
pytestmark = [pytest.mark.slow]

OTHERS = [n for n in families.NAMES if n not in ("sd", "sd2", "sdxl", "sd-ip-adapter", *families.FLOWS)]
SCRIPT = str(ROOT / "training" / "train_smooth_lora.py")


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("smooth")
    for name in ("sd", "sdxl"):
        tiny.build(name).save_pretrained(folder / name)
    write_pictures(folder / "pictures")
    return folder


def command(base: Path, output: Path, *extra: str) -> list[str]:
    return [
        SCRIPT,
        *("--pretrained_model_name_or_path", str(base / "sd"), "--train_data_dir", str(base / "pictures")),
        *("--output_dir", str(output), "--resolution", "8", "--rank", "2", "--max_train_steps", "8"),
        *("--train_batch_size", "4", "--learning_rate", "1e-2", "--lr_warmup_steps", "0", *extra),
    ]


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    validation = ["--validation_prompts", "a aaa", "a bbb", "--num_inference_steps", "2"]
    launch(command(base, base / "run", *validation), ACCELERATE)
    return base / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "pytorch_lora_weights.safetensors")


def test_it_leaves_a_lora_that_loads_and_a_card(trained: Path, base: Path) -> None:
    pipe = tiny.build("sd")
    plain = tiny.images(pipe, "sd")
    dx.apply_smooth_lora(pipe, trained / "model")
    assert not torch.equal(tiny.images(pipe, "sd"), plain)
    card = (trained / "model" / "README.md").read_text()
    assert "| ISTD |" in card
    assert "| mean adjacent distance |" in card
    assert str(base) not in card
    # The base's weights are not in the checkpoint.
    checkpoint = list_checkpoints(trained)[-1]
    state = load_file(checkpoint / "trained.safetensors")
    assert all("lora" in name or name == "variation.running_mean" for name in state)
    assert float(state["variation.running_mean"]) > 0
    assert not list(checkpoint.glob("model*"))


def test_a_killed_run_resumes_to_the_same_weights(trained: Path, base: Path, tmp_path: Path) -> None:
    argv = command(base, tmp_path, "--checkpointing_steps", "1")
    kill_after(argv, lambda: list_checkpoints(tmp_path), 0.3)
    launch(command(base, tmp_path, "--resume_from_checkpoint", "latest"))
    expected, resumed = weights(trained), weights(tmp_path)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    means = [
        load_file(list_checkpoints(p)[-1] / "trained.safetensors")["variation.running_mean"]
        for p in (trained, tmp_path)
    ]
    assert torch.equal(*means)


def test_two_processes_train_what_one_trains(trained: Path, base: Path, tmp_path: Path) -> None:
    launch(command(base, tmp_path, "--train_batch_size", "2"), TWO_PROCESSES)
    one, two = weights(trained), weights(tmp_path)
    size = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name)
    # Adam enlarges rounding where gradients are tiny; eight steps, stored with 11 bits.
    assert all(
        (value - two[name]).abs().max() < 0.05 * size for name, value in one.items() if "lora_B" in name
    )


@pytest.mark.parametrize(
    "extra", [("--estimator", "finite_difference", "--running_mean", "per_timestep"), ("--cache_latents",)]
)
def test_other_ways(extra: tuple[str, ...], trained: Path, base: Path, tmp_path: Path) -> None:
    launch(command(base, tmp_path, *extra))
    found = weights(tmp_path)
    # Encodings that are cached were made in other batches, which rounds differently.
    limit = 1e-3 * max(float(value.abs().max()) for value in found.values())
    same = all(float((value - found[name]).abs().max()) < limit for name, value in weights(trained).items())
    assert same == (extra == ("--cache_latents",))


def test_sdxl(base: Path, tmp_path: Path) -> None:
    launch(
        command(
            base, tmp_path, "--pretrained_model_name_or_path", str(base / "sdxl"), "--max_train_steps", "2"
        )
    )
    pipe = tiny.build("sdxl")
    plain = tiny.images(pipe, "sdxl")
    dx.apply_smooth_lora(pipe, tmp_path / "model")
    assert not torch.equal(tiny.images(pipe, "sdxl"), plain)


def batch() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    latents, noise, direction = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(3))
    times = torch.tensor([30, 400, 900])
    text = torch.randn(3, 5, 16, generator=draw)
    return {
        "latents": latents,
        "noise": noise,
        "timesteps": times,
        "direction": direction,
        "prompt_embeds": text,
    }


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_weight_zero_is_the_plain_loss_and_gradient(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    given, gradients = batch(), []
    unet = tiny.build("sd").unet
    add_lora(unet, 2)
    for weight in (0.0, 1.0):
        objective = SmoothLoraObjective(unet, scheduler, StepwiseVariationLoss(kind), weight)
        loss = objective(**given)
        if weight == 0:
            noisy = scheduler.add_noise(given["latents"], given["noise"], given["timesteps"])
            output = unet(noisy, given["timesteps"], given["prompt_embeds"]).sample
            latents, noise, times = given["latents"], given["noise"], given["timesteps"]
            target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, times)
            assert torch.allclose(loss, torch.nn.functional.mse_loss(output, target))
        unet.zero_grad()
        loss.backward()
        trained = {n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}
        assert trained
        assert all("lora" in name for name in trained)
        gradients.append(torch.cat([g.flatten() for g in trained.values()]))
    assert not torch.allclose(*gradients)


def test_refusals() -> None:
    unet = tiny.build("sd").unet
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        SmoothLoraObjective(unet, DDPMScheduler(), None, -1)
    with pytest.raises(
        ValueError, match="prediction_type is epsilon, that of the variation loss is v_prediction"
    ):
        SmoothLoraObjective(unet, DDPMScheduler(), StepwiseVariationLoss("v_prediction"))
    with pytest.raises(ValueError, match="rank must be 1 or more"):
        add_lora(unet, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sd", None),
        ("sd2", None),
        ("sdxl", None),
        ("sd-ip-adapter", "has an IP-Adapter"),
        *((other, None) for other in families.FLOWS),
        *((other, "can be trained on StableDiffusionPipeline, .*, got") for other in OTHERS),
    ],
)
def test_other_kinds_of_models_are_refused(name: str, message: str | None) -> None:
    with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_pipeline(families.build(name))


def test_distilled_models_are_refused() -> None:
    pipe = tiny.build("sd")
    pipe.scheduler = TCDScheduler()
    with pytest.raises(ValueError, match="TCDScheduler belongs to a model that is distilled"):
        check_pipeline(pipe)
    distilled = StableDiffusionPipeline(
        **{**tiny.build("sd").components, "unet": families.build("lcm").unet}, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="The UNet of StableDiffusionPipeline is distilled"):
        check_pipeline(distilled)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        check_pipeline(pipe)
