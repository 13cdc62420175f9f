"""The prompt's mean from its embeddings: the regression, what it costs a pipeline, and how it is taken off."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import diffusers_ext as dx
from diffusers_ext.core.features import features_of
from diffusers_ext.core.prompts import PromptEmbeds
from diffusers_ext.teleport.prompt_map import PromptMap
from diffusers_ext.teleport.prompts import prompt_features
from tests import families, tiny

PROMPTS = [a + b for a in "abcde" for b in ("", "f", "g", "h")]
SHAPE = (4, 8, 8)


def mapped(pipe: Any, guided: bool = True, **options: Any) -> dx.GaussianStats:
    """Within-prompt statistics with a prompt map, of data whose means are linear in the embeddings."""
    generator = torch.Generator().manual_seed(0)
    features = prompt_features(pipe, PROMPTS, **options)
    _, s, v = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    means = (features - features.mean(0)) @ (v[:2].T / s[0]) @ torch.randn(2, 256, generator=generator)
    noise = 0.1 * torch.randn(len(PROMPTS), 16, 256, generator=generator)
    samples = (means[:, None] + noise).reshape(-1, *SHAPE)
    names = [name for name in PROMPTS for _ in range(16)]
    stats = dx.fit_prompt_map(pipe, dx.GaussianStats.fit([(samples, names)], rank=4), **options)
    return stats if guided else dataclasses.replace(stats, unconditional=None)


def test_a_linear_relation_is_found_and_predicts_new_prompts():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, 6, generator=generator)
    weights = torch.randn(6, 10, generator=generator)
    means = features @ weights + 3
    counts = torch.randint(1, 9, (50,), generator=generator)
    found = PromptMap.fit(features[:40], means[:40], counts[:40])
    assert found.score > 0.999
    # The smallest ridge, 1e-9 of the largest variance, and float32 are what is left.
    torch.testing.assert_close(found(features[40:]), means[40:], atol=1e-4, rtol=1e-4)


def test_the_score_is_what_leaving_each_prompt_out_gives():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(30, 4, generator=generator).double()
    means = features @ torch.randn(4, 3, generator=generator).double()
    means = means + 0.3 * torch.randn(30, 3, generator=generator).double()
    found = PromptMap.fit(features, means, torch.ones(30))
    wrong = total = 0.0
    for i in range(30):
        rest = [j for j in range(30) if j != i]
        one = torch.cat([features[rest], torch.ones(29, 1).double()], 1)
        solution = torch.linalg.lstsq(one, means[rest]).solution
        predicted = torch.cat([features[i], torch.ones(1).double()]) @ solution
        wrong += float((means[i] - predicted).square().sum())
        total += float((means[i] - means.mean(0)).square().sum())
    # Nearly no ridge is best here; its small share and the fixed total are the difference.
    assert found.score == pytest.approx(1 - wrong / total, abs=0.01)


def test_prompts_with_more_samples_weigh_more():
    features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    means = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    light = PromptMap.fit(features, means, torch.tensor([10_000, 10_000, 10_000, 1]))
    torch.testing.assert_close(light(features[:3]), means[:3], atol=0.05, rtol=0)


def test_noise_is_refused():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 5, generator=generator)
    with pytest.raises(ValueError, match="do not predict each other's means"):
        PromptMap.fit(features, torch.randn(20, 9, generator=generator), torch.ones(20))
    with pytest.raises(ValueError, match="at least 3 prompts"):
        PromptMap.fit(features[:2], features[:2], torch.ones(2))


def test_embeddings_are_flattened_only_if_every_prompt_has_as_many_tokens():
    pipe = SimpleNamespace(tokenizer=SimpleNamespace(model_max_length=77), unet=tiny.unet())
    short, long = PromptEmbeds(torch.randn(2, 77, 768)), PromptEmbeds(torch.randn(2, 77, 2048))
    assert torch.equal(features_of(pipe, short), short.embeds.flatten(1))
    torch.testing.assert_close(features_of(pipe, long), long.embeds.mean(1))
    # CogView4 pads to the next multiple of 16; others tell their padding.
    some = PromptEmbeds(torch.randn(2, 16, 768))
    torch.testing.assert_close(features_of(pipe, some), some.embeds.mean(1))
    mask = torch.arange(77) < torch.tensor([[5], [77]])
    masked = PromptEmbeds(short.embeds * mask[..., None], mask)
    torch.testing.assert_close(features_of(pipe, masked)[0], short.embeds[0, :5].mean(0))
    torch.testing.assert_close(features_of(pipe, masked)[1], short.embeds[1].mean(0))


def test_stable_diffusion_3_has_the_tokens_of_clip_and_an_average_of_those_of_t5():
    pipe = tiny.build("sd3")
    few = PromptEmbeds(torch.randn(2, 77 + 5, 32))
    wanted = torch.cat([few.embeds[:, :77].flatten(1), few.embeds[:, 77:].mean(1)], 1)
    torch.testing.assert_close(features_of(pipe, few), wanted)
    # The zeros of a T5 that is left out have no length.
    texts = ["a red bag", "a blue boot"]
    features = [prompt_features(pipe, texts, max_sequence_length=n) for n in (1, 256)]
    torch.testing.assert_close(*features)


@pytest.mark.parametrize(
    ("name", "option", "fitted", "called"),
    [("sdxl", "clip_skip", None, 1), ("flux", "max_sequence_length", 16, 32), ("sd3", "clip_skip", 1, None)],
)
def test_calls_that_encode_in_another_way_are_refused(name, option, fitted, called, tmp_path):
    pipe = families.build(name)
    stats = mapped(pipe, **{option: fitted})
    stats.save_pretrained(tmp_path)
    stats = dx.GaussianStats.from_pretrained(tmp_path)
    dx.apply_teleport(pipe, stats, 0.6)
    families.images(pipe, name, guided=False, **{option: fitted})
    told = f"{option}={fitted} there, {called} here. Call the pipeline with {option}={fitted}"
    with pytest.raises(ValueError, match=told):
        families.images(pipe, name, guided=False, **{option: called})
    # SD3's T5 is left out here, so its length is free.
    if name == "sd3":
        families.images(pipe, name, guided=False, clip_skip=1, max_sequence_length=7)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_the_hook_gives_each_prompt_its_mean_and_leaves_without_a_trace(name: str):
    pipe = tiny.build(name)
    before, attributes = tiny.images(pipe, name), set(pipe.__dict__)
    stats = mapped(pipe, guided=name == "sd")
    dx.apply_teleport(pipe, stats, skip=0.5)
    with_it = tiny.images(pipe, name)
    assert not torch.equal(with_it, before)
    # By hand: the same means, set before the call.
    dx.remove_teleport(pipe)
    assert set(pipe.__dict__) == attributes
    assert torch.equal(tiny.images(pipe, name), before)
    dx.apply_teleport(pipe, dataclasses.replace(stats, prompt_map=None), skip=0.5)
    inputs = tiny.inputs(name)
    prompts = [inputs["prompt"]] if isinstance(inputs["prompt"], str) else inputs["prompt"]
    mean = stats.prompt_mean(prompt_features(pipe, prompts))
    pipe.scheduler.set_mean(mean, inputs["guidance_scale"] if stats.unconditional is not None else 1.0)
    torch.testing.assert_close(tiny.images(pipe, name), with_it, atol=1e-5, rtol=0)


def test_prompt_embeds_and_several_images_a_prompt_work():
    pipe = tiny.build("sd")
    dx.apply_teleport(pipe, mapped(pipe), skip=0.5)
    call = {"num_inference_steps": 4, "height": 8, "width": 8, "output_type": "pt", "guidance_scale": 3.0}
    embeds, empty = pipe.encode_prompt(["a", "b"], "cpu", 1, True, negative_prompt=["", ""])[:2]
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    by_text = pipe(["a", "b"], num_images_per_prompt=2, generator=generators, **call).images
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    # Negative embeddings given by hand may be anything, so guidance moves the mean towards their own.
    by_embeds = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=empty,
        num_images_per_prompt=2,
        generator=generators,
        **call,
    ).images
    assert by_text.shape == by_embeds.shape
    assert torch.isfinite(by_embeds).all()


def test_a_negative_prompt_moves_the_mean():
    pipe = tiny.build("sd")
    stats = mapped(pipe)
    dx.apply_teleport(pipe, stats, skip=0.5)
    call = {"num_inference_steps": 4, "height": 8, "width": 8, "output_type": "pt", "guidance_scale": 3.0}
    pipe("a", negative_prompt="b", generator=torch.Generator().manual_seed(0), **call)
    used, scale = pipe.scheduler._mean[0], pipe.scheduler._guidance_scale
    positive, negative = stats.prompt_mean(prompt_features(pipe, ["a", "b"]))
    torch.testing.assert_close(used, negative + 3 * (positive - negative), atol=1e-4, rtol=1e-4)
    assert scale == 1.0


def test_prompts_encoded_outside_of_a_call_change_nothing():
    pipe = tiny.build("sd")
    dx.apply_teleport(pipe, mapped(pipe), skip=0.5)
    plain = tiny.images(pipe, "sd")
    used = pipe.scheduler._mean.clone()
    pipe.encode_prompt("another", "cpu", 1, False)
    assert torch.equal(pipe.scheduler._mean, used)
    assert torch.equal(tiny.images(pipe, "sd"), plain)


def test_saved_and_loaded(tmp_path):
    stats = mapped(tiny.build("sd"))
    stats.save_pretrained(tmp_path)
    for loaded in (
        dx.GaussianStats.from_pretrained(tmp_path),
        dx.GaussianStats.from_arrays(stats.to_dict_of_arrays()),
    ):
        assert loaded.prompt_map is not None
        assert loaded.prompt_map.score == stats.prompt_map.score
        assert loaded.class_counts == stats.class_counts == (16,) * len(PROMPTS)
        for name in ("center", "components", "weights", "offset"):
            assert torch.equal(getattr(loaded.prompt_map, name), getattr(stats.prompt_map, name))


def test_a_loaded_pipeline_asks_for_its_hook(tmp_path):
    pipe = tiny.build("sd")
    dx.apply_teleport(pipe, mapped(pipe), skip=0.5)
    pipe.save_pretrained(tmp_path)
    loaded: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"dx\.apply_teleport\(pipe\) after loading"):
        tiny.images(loaded, "sd")
    dx.apply_teleport(loaded)
    torch.testing.assert_close(tiny.images(loaded, "sd"), tiny.images(pipe, "sd"), atol=1e-3, rtol=0)


def test_calibration_uses_the_map_and_both_gaussians():
    pipe = tiny.build("sd")
    stats = mapped(pipe)
    size = {"height": 8, "width": 8, "guidance_scale": 2.0}
    found = dx.calibrate_skip(pipe, stats, prompts=["a", "bf"], num_inference_steps=4, progress=False, **size)
    assert "encode_prompt" not in pipe.__dict__
    assert found.calibration["guidance_scale"] == 2.0
    sigma, excess, _ = found.calibration["excess_loss"][0]
    assert 10 < sigma < 15
    samples = stats.class_mean(["a", "bf"])
    given = dx.calibrate_skip(
        pipe, stats, prompts=["a", "bf"], samples=samples, num_inference_steps=4, progress=False, **size
    )
    # On samples that are the means themselves the Gaussian wins by far more than on a random model's.
    assert given.calibration["excess_loss"][0][1] < excess
    # Drawing samples took a fine run without guidance.
    assert found.calibration["calls"] - given.calibration["calls"] >= 50 - 20


def test_refusals():
    pipe = tiny.build("sd")
    stats = mapped(pipe)
    with pytest.raises(ValueError, match="class means"):
        dx.fit_prompt_map(pipe, tiny.gaussian(SHAPE))
    with pytest.raises(ValueError, match="features per prompt"):
        stats.prompt_mean(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="no prompt map"):
        tiny.gaussian(SHAPE).prompt_mean(torch.zeros(1, 5))
    other = tiny.gaussian((3, 8, 8))
    with pytest.raises(ValueError, match="fit it to these statistics"):
        dataclasses.replace(other, prompt_map=stats.prompt_map)
    ddpm = tiny.build("ddpm")
    scheduler = ddpm.scheduler
    with pytest.raises(ValueError, match="no encode_prompt"):
        dx.apply_teleport(ddpm, dataclasses.replace(stats), skip=0.5)
    assert ddpm.scheduler is scheduler
    with pytest.raises(ValueError, match="class_counts"):
        dataclasses.replace(stats, class_counts=(1,))
