"""Golden noise on whole pipelines, beyond what the shared contract asks."""

from typing import Any

import diffusers
import pytest
import torch

import diffusers_ext as dx
from tests import families, tiny
from tests.contract.probe import noise_network

NAMES = ("sd", "sdxl", "sd3", "flux")


def call_of(name: str, batch: int = 2) -> dict[str, Any]:
    call = {k: v for k, v in tiny.inputs(name, batch).items() if k != "output_type"}
    return {**call, "generator": tiny.generators(batch)}


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_network_and_strength_zero_are_bit_equal(name: str) -> None:
    plain = tiny.images(tiny.build(name), name, 2)
    untrained = dx.apply_golden_noise(tiny.build(name), tiny.npnet(name, trained=False))
    assert torch.equal(tiny.images(untrained, name, 2), plain)
    off = dx.apply_golden_noise(tiny.build(name), tiny.npnet(name), strength=0)
    assert torch.equal(tiny.images(off, name, 2), plain)


@pytest.mark.parametrize("name", NAMES)
def test_golden_latents_are_the_noise_that_the_hooked_pipeline_starts_from(name: str) -> None:
    pipe, npnet = tiny.build(name), tiny.npnet(name)
    plain = tiny.images(pipe, name, 2)
    latents = dx.golden_latents(pipe, npnet, **call_of(name))
    assert not {"encode_prompt", "prepare_latents", "check_inputs"} & vars(pipe).keys()
    assert torch.equal(tiny.images(pipe, name, 2), plain)
    given = tiny.images(pipe, name, 2, latents=latents)
    dx.apply_golden_noise(pipe, npnet)
    # Divided by init_noise_sigma and multiplied again.
    assert torch.allclose(tiny.images(pipe, name, 2), given, atol=1e-4)
    assert torch.equal(tiny.images(pipe, name, 2, latents=latents), given)


def test_the_formula_by_hand_with_a_scaling_scheduler() -> None:
    pipe, npnet = tiny.build("sd"), tiny.npnet("sd")
    call = call_of("sd")
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in tiny.generators(2)])
    embeds = pipe.encode_prompt(call["prompt"], "cpu", 1, False)[0]
    expected = npnet(noise, embeds).sample
    assert float(pipe.scheduler.init_noise_sigma) > 1.5
    # Unit noise times and divided by init_noise_sigma.
    assert torch.allclose(dx.golden_latents(pipe, npnet, **call), expected, atol=1e-5)
    half = dx.golden_latents(pipe, npnet, **{**call_of("sd"), "strength": 0.5})
    assert torch.allclose(half, (noise + expected) / 2, atol=1e-5)


def test_flux_is_unpacked_for_the_network() -> None:
    pipe, npnet = tiny.build("flux"), tiny.npnet("flux")
    call = call_of("flux")
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in tiny.generators(2)])
    expected = npnet(noise, call["prompt_embeds"]).sample
    latents = dx.golden_latents(pipe, npnet, **call)
    assert torch.equal(latents, pipe._pack_latents(expected, 2, 4, 8, 8))


def test_images_of_one_prompt_and_embeddings_given_directly() -> None:
    pipe, npnet = tiny.build("sd"), tiny.npnet("sd")
    dx.apply_golden_noise(pipe, npnet)
    four = tiny.images(pipe, "sd", 2, num_images_per_prompt=2, generator=tiny.generators(4))
    call = tiny.inputs("sd", 2)
    prompts = [call["prompt"][0]] * 2 + [call["prompt"][1]] * 2
    repeated = tiny.images(pipe, "sd", 4, prompt=prompts)
    assert torch.equal(four, repeated)
    encoded = pipe.encode_prompt(call["prompt"], "cpu", 1, True)
    direct = {"prompt": None, "prompt_embeds": encoded[0], "negative_prompt_embeds": encoded[1]}
    assert torch.equal(tiny.images(pipe, "sd", 2, **direct), tiny.images(pipe, "sd", 2))


def test_a_negative_prompt_does_not_move_the_noise() -> None:
    for name, key in (("sd", "negative_prompt"), ("sd3", "negative_prompt")):
        pipe, npnet = tiny.build(name), tiny.npnet(name)
        call = {**call_of(name), key: ["a zzz", "a yyy"]}
        assert torch.equal(
            dx.golden_latents(pipe, npnet, **call), dx.golden_latents(pipe, npnet, **call_of(name))
        )
    pipe, npnet = tiny.build("flux"), tiny.npnet("flux")
    guided, free = ({**call_of("flux"), **tiny.flux_prompt(2, guided)} for guided in (True, False))
    free = {k: v for k, v in free.items() if "negative" not in k and k != "true_cfg_scale"}
    assert torch.equal(dx.golden_latents(pipe, npnet, **guided), dx.golden_latents(pipe, npnet, **free))


def test_refusals_leave_nothing_behind() -> None:
    pipe, npnet = tiny.build("sd"), tiny.npnet("sd")
    wrong: Any = "path/to/npnet"
    with pytest.raises(ValueError, match="npnet must be an NPNetModel, got str"):
        dx.apply_golden_noise(pipe, wrong)
    compiled: Any = torch.compile(npnet)
    with pytest.raises(ValueError, match=r"call npnet\.compile\(\) instead"):
        dx.apply_golden_noise(pipe, compiled)
    with pytest.raises(ValueError, match="DDPMPipeline has no encode_prompt"):
        dx.apply_golden_noise(tiny.build("ddpm"), npnet)
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="starts from an image"):
        dx.apply_golden_noise(image_to_image, npnet)
    dx.apply_golden_noise(pipe, npnet)
    with pytest.raises(ValueError, match="cannot be applied twice"):
        dx.golden_latents(pipe, npnet, **call_of("sd"))
    dx.remove_golden_noise(pipe)
    dx.remove_golden_noise(pipe)
    other = dx.apply_golden_noise(pipe, tiny.npnet("sdxl"))
    with pytest.raises(ValueError, match="width 32, got 16"):
        tiny.images(other, "sd")
    dx.remove_golden_noise(pipe)
    with torch.no_grad():
        npnet.compact.out.bias += float("inf")
    with pytest.raises(ValueError, match="values that are not finite"):
        dx.golden_latents(pipe, npnet, **call_of("sd"))
    assert not {"encode_prompt", "prepare_latents", "check_inputs"} & vars(pipe).keys()


@pytest.mark.parametrize("interrupted", [False, True])
def test_nothing_of_a_call_is_kept(interrupted: bool, monkeypatch: Any) -> None:
    pipe = dx.apply_golden_noise(tiny.build("sd"), tiny.npnet("sd"))
    expected = tiny.images(pipe, "sd", 2)
    reader = vars(pipe)["_golden_noise"].reader
    if interrupted:
        with monkeypatch.context() as patch:
            patch.setattr(pipe.unet, "forward", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tiny.images(pipe, "sd", prompt=["zzz"])
    assert reader.prompt is reader._call is None
    assert reader.arguments == {}
    assert torch.equal(tiny.images(pipe, "sd", 2), expected)


def test_methods_called_outside_of_a_call_are_refused() -> None:
    pipe = dx.apply_golden_noise(tiny.build("sd"), tiny.npnet("sd"))
    tiny.images(pipe, "sd")
    pipe.encode_prompt(["a"], "cpu", 1, False)
    drawn = (1, 4, 8, 8, torch.float32, "cpu", torch.Generator())
    with pytest.raises(ValueError, match="drew its noise before it encoded a prompt"):
        pipe.prepare_latents(*drawn)
    assert torch.equal(pipe.prepare_latents(*drawn, torch.ones(1, 4, 8, 8)).std(), torch.tensor(0.0))


@pytest.mark.parametrize("trained", [{"clip_skip": 1}, {"clip_skip": None}])
def test_calls_that_encode_prompts_otherwise_than_training_are_refused(trained: dict[str, Any]) -> None:
    npnet = tiny.npnet("sdxl")
    npnet.register_to_config(prompt_options=trained)
    pipe = dx.apply_golden_noise(tiny.build("sdxl"), npnet)
    other = {"clip_skip": None if trained["clip_skip"] else 1}
    tiny.images(pipe, "sdxl", **trained)
    tiny.images(pipe, "sdxl", **other, latents=torch.zeros(1, 4, 8, 8))
    shown = f"clip_skip={trained['clip_skip']} there, {other['clip_skip']} here"
    with pytest.raises(ValueError, match=f"{shown}. Call the pipeline with clip_skip={trained['clip_skip']}"):
        tiny.images(pipe, "sdxl", **other)
    dx.remove_golden_noise(pipe)
    with pytest.raises(ValueError, match=shown):
        dx.golden_latents(pipe, npnet, **call_of("sdxl"), **other)


def test_options_that_are_tuples_come_back_from_a_config(tmp_path: Any) -> None:
    network: Any = noise_network("flux2-klein")
    network = dx.NPNetModel(**{**network.config, "prompt_options": {"text_encoder_out_layers": (9, 18, 27)}})
    network.save_pretrained(tmp_path)
    network = dx.NPNetModel.from_pretrained(tmp_path)
    pipe = dx.apply_golden_noise(families.build("flux2-klein"), network)
    families.images(pipe, "flux2-klein")
    with pytest.raises(ValueError, match=r"text_encoder_out_layers=\[9, 18, 27\] there, \[9, 18, 26\] here"):
        families.images(pipe, "flux2-klein", text_encoder_out_layers=(9, 18, 26))


def test_a_network_in_half_precision_with_a_full_pipeline() -> None:
    pipe = tiny.build("sd")
    exact = dx.golden_latents(pipe, tiny.npnet("sd"), **call_of("sd"))
    half = dx.golden_latents(pipe, tiny.npnet("sd").half(), **call_of("sd"))
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.02  # the residual has three digits
