"""Projectors of flows: the time held in the weights, one step of the teacher's own pipeline, and images with prompts."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import diffusers_ext as dx
from diffusers_ext.core.pipeline import final_latents, given_latents
from diffusers_ext.sign.figures import figures_of_images, projector_figures
from diffusers_ext.sign.flows import flow_sigma, unshifted
from diffusers_ext.sign.held_time import hold_time, time_features, time_layer
from diffusers_ext.sign.inputs import step_levels
from diffusers_ext.sign.source import MixtureSource
from diffusers_ext.sign.teacher import untrained_projector
from tests import families, tiny
from tests.training.scripts import stable_diffusion_3

pytestmark = pytest.mark.filterwarnings("ignore")

each = pytest.mark.parametrize("name", families.TRANSFORMERS)
PROMPTS = ["a aaa", "a bbbbbbb"]
SIDES = {"height": 8, "width": 8}


@cache
def teacher(name: str) -> Any:
    """Of a family; no test may change it."""
    return families.build(name)


def length(name: str) -> int:
    return families.FAMILIES[name].call.get("max_sequence_length", 16)


@cache
def projector(name: str) -> Any:
    return untrained_projector(teacher(name), max_sequence_length=length(name))


def noise(name: str, count: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.randn(count, *families.latent_shape(name), generator=draw)


def sd3(**options: Any) -> Any:
    sign = untrained_projector(tiny.build("sd3"), max_sequence_length=4, **options)
    sign.set_progress_bar_config(disable=True)
    return sign


def source() -> MixtureSource:
    return MixtureSource.fit(torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(9)), 5)


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def close(found: Tensor, expected: Tensor, share: float = 1e-5) -> bool:
    """Float32 rounding through a few layers is about 1e-6 of the largest value."""
    return float((found - expected).abs().max()) <= share * float(expected.abs().max())


# --- the time, held ---


@each
def test_a_held_network_gives_the_output_of_one_time(name: str) -> None:
    sign, pipe = projector(name), teacher(name)
    assert type(sign.transformer) is type(pipe.transformer)
    assert sign.transformer.config == pipe.transformer.config
    texts, x = sign._conditions(PROMPTS, 2), noise(name)

    def velocity(transformer: Any, sigma: float) -> Tensor:
        sigmas = torch.full((2,), sigma)
        with torch.no_grad():
            return sign.flow.velocity(transformer, x, sigmas, sign.config.guidance, **texts)

    expected = velocity(pipe.transformer, 0.6)
    if name == "flux2":  # its embedder has no bias
        assert sign.transformer is pipe.transformer
        with pytest.raises(ValueError, match="Flux2Transformer2DModel has no bias"):
            hold_time(pipe.transformer, torch.ones(1))
        return
    assert sign.transformer is not pipe.transformer
    for sigma in (0.05, 0.6, 0.97):
        assert close(velocity(sign.transformer, sigma), expected)
        assert close(velocity(pipe.transformer, sigma), expected, 1e-3) == (sigma == 0.6)


def test_what_else_is_embedded_is_not_held() -> None:
    sign = projector("flux")
    texts, x, sigmas = sign._conditions(PROMPTS, 2), noise("flux"), torch.full((2,), 0.6)
    other = {**texts, "pooled_prompt_embeds": texts["pooled_prompt_embeds"].flip(0)}
    with torch.no_grad():
        before = sign.flow.velocity(sign.transformer, x, sigmas, 3.5, **texts)
        assert not close(sign.flow.velocity(sign.transformer, x, sigmas, 3.5, **other), before, 1e-3)
        assert not close(sign.flow.velocity(sign.transformer, x, sigmas, 1.0, **texts), before, 1e-3)


def test_holding_twice_is_holding_once() -> None:
    sign = projector("sd3")
    again = untrained_projector(sign.stock_pipeline, max_sequence_length=length("sd3"))
    state = sign.transformer.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.transformer.state_dict().items())


# --- the projector ---


def test_it_is_the_clean_prediction_at_its_level() -> None:
    pipe, sign = tiny.build("sd3"), sd3()
    assert sign.sigma == pytest.approx(1.5)
    assert sign.config.timestep == pytest.approx(600)
    found = sign(PROMPTS, latents=noise("sd3"), output_type="latent", **SIDES).images
    embeds, _, pooled, _ = pipe.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=4
    )
    x = 0.4 * (1.5 * noise("sd3"))
    with torch.no_grad():
        v = pipe.transformer(x, embeds, pooled, torch.tensor([600.0, 600.0]), return_dict=False)[0]
    assert close(found, x - 0.6 * v)


@each
def test_one_step_of_the_teachers_pipeline_is_the_projector(name: str) -> None:
    sign, family = projector(name), families.FAMILIES[name]
    sides = {side: n * sign.vae_scale_factor for side, n in zip(("height", "width"), family.latents[1:])}
    found = sign(PROMPTS, latents=noise(name), output_type="latent", **sides).images
    stock = sign.stock_pipeline
    stock.set_progress_bar_config(disable=True)
    assert type(stock) is type(teacher(name))
    call = {**families.inputs(name, 2, steps=1, guided=False), "prompt": PROMPTS, **sides, "sigmas": [0.6]}
    for argument in ("complex_human_instruction", "system_prompt"):  # the projector has their defaults
        call.pop(argument, None)
    if sign.config.guidance is not None:
        call["guidance_scale"] = sign.config.guidance
    call["max_sequence_length"] = length(name)
    call["latents"] = given_latents(stock, 0.4 * (1.5 * noise(name)))
    assert close(found, final_latents(stock, call))


@pytest.mark.parametrize("with_source", [False, True])
def test_steps_of_a_time_conditional_projector_are_those_of_the_stock_pipeline(with_source: bool) -> None:
    sign = sd3(held=False)
    if with_source:
        sign.register_modules(source=source())
    assert step_levels(sign, 2, None) == pytest.approx([1.5, 0.3 / 0.7])
    start = 0.4 * sign.projector.start(noise("sd3"))
    # Both draw the noise of the second step from PyTorch's global random numbers.
    torch.manual_seed(3)
    found = sign(PROMPTS, 1, 2, latents=noise("sd3"), output_type="latent", **SIDES).images
    torch.manual_seed(3)
    stock = sign.stock_pipeline
    stock.set_progress_bar_config(disable=True)
    made = stock(
        PROMPTS, sigmas=[0.6, 0.3], num_inference_steps=2, guidance_scale=1, latents=start, max_sequence_length=4,
        output_type="latent", **SIDES,
    ).images  # fmt: skip
    assert close(found, made)
    held = sd3()
    torch.manual_seed(3)
    other = held(PROMPTS, 1, 2, latents=noise("sd3"), output_type="latent", **SIDES).images
    assert not close(other, made, 1e-2)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.3])
def test_a_shifted_scheduler_is_asked_for_another_level(shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[unshifted(0.6, shift)])
    assert float(scheduler.sigmas[0]) == pytest.approx(0.6, rel=1e-6)


# --- saved ---

_FRESH = """
import sys, torch
from diffusers import DiffusionPipeline
call = torch.load(sys.argv[1] + "/call.pt", weights_only=True)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1] + "/stock")
made = pipe(sigmas=[0.6], guidance_scale=1, num_inference_steps=1, output_type="latent", **call).images
assert not any(name.startswith("diffusers_ext") for name in sys.modules)
torch.save(made, sys.argv[1] + "/made.pt")
"""


@pytest.mark.slow
def test_the_stock_pipeline_loads_without_this_package(tmp_path: Path) -> None:
    sign = untrained_projector(stable_diffusion_3(), max_sequence_length=4)
    sign.register_modules(source=source())
    expected = sign(PROMPTS, latents=noise("sd3"), output_type="latent").images
    sign.save_pretrained(tmp_path / "sign")
    sign.stock_pipeline.save_pretrained(tmp_path / "stock")
    loaded = dx.SIGNPipeline.from_pretrained(tmp_path / "sign")
    assert loaded.config.teacher == "StableDiffusion3Pipeline"
    assert loaded.config.held
    assert close(loaded(PROMPTS, latents=noise("sd3"), output_type="latent").images, expected)
    start = 0.4 * sign.projector.start(noise("sd3"))
    torch.save({"prompt": PROMPTS, "latents": start, "max_sequence_length": 4, **SIDES}, tmp_path / "call.pt")
    subprocess.run([sys.executable, "-c", _FRESH, str(tmp_path)], check=True, cwd=tmp_path)
    assert close(torch.load(tmp_path / "made.pt", weights_only=True), expected)


def test_a_second_pipeline_of_the_same_components() -> None:
    sign = sd3(held=False)
    other = dx.SIGNPipeline.from_pipe(sign)
    assert other.time_conditional
    call = {"num_inference_steps": 2, "output_type": "latent", **SIDES}
    first, second = (p(PROMPTS, generator=tiny.generators(2), **call).images for p in (sign, other))
    assert torch.equal(first, second)


# --- images and prompts ---


def test_projecting_and_editing_through_the_autoencoder() -> None:
    sign, pipe = sd3(), tiny.build("sd3")
    known = dx.encode_images(pipe, pictures())
    texts = sign._conditions(PROMPTS, 2)
    with torch.no_grad():
        expected = sign.projector(known, **texts)
    assert torch.equal(sign.project(pictures(), PROMPTS, output_type="latent").images, expected)
    decoded = sign.project(pictures(), PROMPTS, output_type="pt").images
    by_hand = pipe.vae.decode(expected / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    assert close(decoded, (by_hand / 2 + 0.5).clamp(0, 1))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    edited = sign.edit(pictures(), mask, PROMPTS, output_type="latent", generator=tiny.generators(2)).images
    assert torch.equal(edited[..., :4], known[..., :4])
    assert not close(edited[..., 4:], known[..., 4:], 1e-2)
    prompt = sign.edit(pictures(), mask, "z", output_type="latent", generator=tiny.generators(2)).images
    assert not close(prompt, edited, 1e-3)


def test_figures_of_a_conditional_projector() -> None:
    sign, draw = sd3(), torch.Generator().manual_seed(1)
    found = figures_of_images(sign, pictures(), PROMPTS, draw)
    data = dx.encode_images(tiny.build("sd3"), pictures())
    texts = sign._conditions(PROMPTS, 2)
    z = torch.randn(data.shape, generator=torch.Generator().manual_seed(1))
    assert found == projector_figures(sign.projector, z, data, **texts)
    assert found != figures_of_images(sign, pictures(), "z", torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="needs two or more images, got 1"):
        figures_of_images(sign, pictures(1), "z")


@pytest.mark.parametrize("held", [True, False])
def test_a_batch_with_a_generator_each_is_one_by_one(held: bool) -> None:
    sign = sd3(held=held)
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", **SIDES}
    together = sign(PROMPTS, generator=tiny.generators(2), **call).images
    alone = [sign(p, generator=g, **call).images for p, g in zip(PROMPTS, tiny.generators(2))]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)  # another batch size may take another kernel


def test_a_flow_makes_images_of_other_sizes() -> None:
    sign = sd3()
    assert sign("a", output_type="pt").images.shape == (1, 3, 8, 8)
    assert sign("a", output_type="pt", height=4, width=8).images.shape == (1, 3, 4, 8)
    sign.register_modules(source=source())
    with pytest.raises(ValueError, match="Expected images 8 wide and 8 high, got 8 × 4"):
        sign("a", height=4, width=8)


def test_half_precision() -> None:
    images = sd3().to(torch.bfloat16)("a aaa", num_inference_steps=2, output_type="pt").images
    assert torch.isfinite(images).all()


# --- refusals ---


def _with(**changes: Any) -> Any:
    pipe = tiny.build("sd3")
    pipe.register_modules(**changes)
    return pipe


def _lora_on_time() -> Any:
    pipe = tiny.build("sd3")
    layer = time_layer(pipe.transformer)
    pipe.transformer.time_text_embed.timestep_embedder.linear_1 = nn.Bilinear(1, 1, layer.out_features)
    return pipe


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: untrained_projector(_with(text_encoder=None)), "has no text_encoder"),
        (lambda: untrained_projector(_with(image_encoder=tiny.text_encoder())), "has image_encoder, which a projector"),
        (lambda: untrained_projector(_with(scheduler=tiny.build("sd").scheduler)), "'epsilon', expected 'flow_prediction'"),
        (lambda: untrained_projector(_lora_on_time()), "linear_1 of SD3Transformer2DModel is a Bilinear"),
        (lambda: untrained_projector(tiny.build("sd3"), sigma=0.0), "finite noise level above 0, got 0"),
        (lambda: flow_sigma(float("inf")), "finite noise level above 0, got inf"),
        (lambda: untrained_projector(tiny.build("sd"), held=False), "are for flows, got StableDiffusionPipeline"),
        (lambda: untrained_projector(sd3()), "is a projector already"),
        (lambda: time_layer(tiny.build("ddpm").unet), "Expected one time embedder in UNet2DModel"),
        (lambda: projector("flux")("a", height=7, width=8), "both multiples of 2, got 7 and 8"),
        (lambda: sd3()("a", height=8), "got 8 and None"),
        (lambda: sd3().project(pictures()), "needs a prompt"),
        (lambda: untrained_projector(tiny.build("ddpm")).stock_pipeline, "The projector has a UNet"),
        (lambda: dx.SIGNPipeline(**{**sd3().components, "transformer": None}, timestep=600), "got none"),
        (lambda: dx.SIGNPipeline(**sd3().components, timestep=600), "must be one of StableDiffusion3Pipeline, .*got teacher=None"),
        (lambda: dx.SIGNPipeline(**sd3().components, teacher="StableDiffusion3Pipeline", timestep=1000), "above 0 and below 1000"),
    ],
)  # fmt: skip
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_network_of_two_times_is_not_held() -> None:
    transformer = tiny.build("sd3").transformer
    layer = time_layer(transformer)
    with pytest.raises(ValueError, match="embeds 2 times for one image"):
        time_features(transformer, lambda: layer(torch.zeros(2, layer.in_features)))
    with pytest.raises(ValueError, match="embeds 0 times"):
        time_features(transformer, lambda: None)
    assert not layer._forward_pre_hooks
