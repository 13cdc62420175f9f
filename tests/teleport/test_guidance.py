"""The prompt map in guided calls of every kind, and which embeddings are whose."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core import features
from diffusers_ext.core.families import guidance_of
from diffusers_ext.teleport.prompt_map import PromptMap
from diffusers_ext.teleport.prompts import prompt_features
from tests import families
from tests.contract.probe import feature, mean_map, statistics


@pytest.fixture(autouse=True)
def _averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    # As those of all real encoders but Stable Diffusion 1's.
    monkeypatch.setattr(features, "LARGEST_FLAT", 0)


def mapped(name: str, **changes: Any) -> dx.GaussianStats:
    return dataclasses.replace(statistics(name), prompt_map=mean_map(name), **changes)


def applied(name: str, skip: float = 0.6, **changes: Any) -> Any:
    return dx.apply_teleport(families.build(name), mapped(name, **changes), skip)


def mean(name: str, text: str) -> Tensor:
    return mean_map(name)(feature(name, text)[None])[0].reshape(statistics(name).shape)


def used(pipe: Any) -> Tensor:
    """The mean of the first image."""
    return pipe.scheduler._mean[0]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


# --- which embeddings are whose ---


@pytest.mark.parametrize("name", ["flux", "flux2-klein", "kandinsky5", "chroma", "wan", "hunyuan-dit"])
def test_the_first_encoding_is_that_of_the_prompt(name: str) -> None:
    # Also if the pipeline encodes another time for the negative prompt or for another encoder.
    pipe = applied(name)
    call = {"negative_prompt": None} if name == "flux" else {}
    families.images(pipe, name, prompt=["b qq"], **call)
    close(used(pipe), mean(name, "b qq"))


@pytest.mark.parametrize("name", ["flux", "kandinsky5", "zimage", "pixart", "auraflow", "cogvideox", "sana"])
def test_a_negative_prompt_moves_the_mean_by_the_weight_of_guidance(name: str) -> None:
    pipe, family = applied(name), families.FAMILIES[name]
    families.images(pipe, name, negative_prompt=["z"])
    weight = family.guided[str(family.guidance)] + 1 - float(family.free_at or 0)
    positive, negative = mean(name, families.inputs(name)["prompt"][0]), mean(name, "z")
    close(used(pipe), negative + weight * (positive - negative))
    assert pipe.scheduler._guidance_scale == 1.0
    # And not the next call's, which is not guided.
    families.images(pipe, name, guided=False)
    close(used(pipe), positive)


@pytest.mark.parametrize(("name", "argument"), [("sdxl", "negative_prompt_2"), ("sd3", "negative_prompt_3")])
def test_negative_prompts_of_other_encoders_are_read(name: str, argument: str) -> None:
    pipe = applied(name)
    found: list[Any] = []
    real = pipe.encode_prompt

    def keep(*args: Any, **kwargs: Any) -> Any:
        found[:] = [real(*args, **kwargs)]
        return found[0]

    pipe.encode_prompt = keep
    families.images(pipe, name, **{argument: "z"})
    pipe.encode_prompt = real
    parts = [[e] if name == "sdxl" else e.split((77, e.shape[1] - 77), dim=1) for e in found[0][:2]]
    features = [torch.cat([part.float().mean(1) for part in of_one], 1) for of_one in parts]
    positive, negative = (mean_map(name)(feature)[0].reshape(4, 8, 8) for feature in features)
    close(used(pipe), negative + 5 * (positive - negative))


def test_the_empty_negative_prompt_has_the_unconditional_statistics() -> None:
    for name, call in (("flux", {"negative_prompt": [""]}), ("zimage", {}), ("pixart", {})):
        pipe = applied(name, unconditional=statistics(name))
        families.images(pipe, name, **call)
        close(used(pipe), mean(name, families.inputs(name)["prompt"][0]))
        family = families.FAMILIES[name]
        weight = family.guided[str(family.guidance)] + 1 - float(family.free_at or 0)
        assert pipe.scheduler._guidance_scale == weight


@pytest.mark.parametrize("name", ["qwen", "zimage", "pixart", "lumina2", "flux2", "sana"])
def test_an_image_does_not_depend_on_its_neighbour_s_prompt(name: str) -> None:
    pipe, means = applied(name), []
    for other in ("a", "bb ccc dddd eeeee"):
        families.images(pipe, name, 2, guided=False, prompt=["a qq", other])
        means.append(used(pipe).clone())
    close(means[0], means[1])
    close(means[0], mean(name, "a qq"))


def test_a_call_that_encodes_no_prompt_is_refused() -> None:
    pipe = applied("zimage")
    with torch.no_grad():
        encoded = families.build("zimage").encode_prompt(["a"], do_classifier_free_guidance=False)[0]
    families.images(pipe, "zimage", guided=False)
    with pytest.raises(ValueError, match="encoded no prompt in this call: give it a prompt"):
        families.images(pipe, "zimage", guided=False, prompt=None, prompt_embeds=encoded)


def test_the_map_is_fitted_to_the_embeddings_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, texts = families.build("sdxl"), ["a", "bb", "c d"]
    features = prompt_features(pipe, texts, clip_skip=1)
    assert (features - prompt_features(pipe, texts)).abs().max() > 1e-2
    # In use ...
    on = applied("sdxl")
    families.images(on, "sdxl", guided=False, prompt=["bb"], clip_skip=1)
    close(used(on), mean_map("sdxl")(features)[1].reshape(4, 8, 8))
    # ... and in fitting.
    fitted: list[Tensor] = []

    def keep(features: Tensor, *args: Any) -> None:
        fitted.append(features)
        raise ValueError("nothing to fit")

    monkeypatch.setattr(PromptMap, "fit", keep)
    names = [text for text in texts for _ in range(4)]
    stats = dx.GaussianStats.fit([(torch.randn(12, 4, 8, 8), names)], rank=2)
    with pytest.raises(ValueError, match="nothing to fit"):
        dx.fit_prompt_map(pipe, stats, clip_skip=1)
    close(fitted[0], features)


# --- guidance that the transport does not follow ---

ALTERED = {
    "sd": ({"guidance_rescale": 0.5}, "guidance_rescale=0.0"),
    "hunyuan-dit": ({"guidance_rescale": 0.5}, "guidance_rescale=0.0"),
    "zimage": ({"cfg_normalization": True}, "cfg_normalization=False"),
    "lumina2": ({}, "cfg_normalization=False"),
    "cogvideox": ({"use_dynamic_cfg": True}, "use_dynamic_cfg=False"),
    "wan22": ({"guidance_scale_2": 3.0}, "guidance_scale_2=None"),
    "qwen": ({}, "true_cfg_scale=1"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_rescaled_guidance_is_refused_by_name(name: str) -> None:
    call, advice = ALTERED[name]
    pipe = applied(name)
    kind = type(pipe).__name__
    with pytest.raises(ValueError, match=f"{kind} does not in this call.*use {advice}.*first_call"):
        families.images(pipe, name, **call)
    # The advice works, and so does the same call without guidance or with nothing to skip.
    if name != "qwen":
        argument = advice.split("=")[0]
        advised = {"guidance_rescale": 0.0, "guidance_scale_2": None}.get(argument, False)
        negative = families.images(pipe, name, negative_prompt=["z"], **{**call, argument: advised})
        assert negative.isfinite().all()
    assert families.images(pipe, name, guided=False).isfinite().all()
    off = applied(name, skip=0.0)
    assert torch.equal(
        families.images(off, name, **call), families.images(families.build(name), name, **call)
    )
    first = dx.apply_teleport(families.build(name), mapped(name), 0.6, mean_from="first_call")
    assert families.images(first, name, **call).isfinite().all()


@pytest.mark.parametrize(("name", "argument"), [("zimage", "cfg_truncation"), ("lumina2", "cfg_trunc_ratio")])
def test_guidance_at_some_steps_is_refused(name: str, argument: str) -> None:
    pipe = applied(name)
    call = {"cfg_normalization": False, "negative_prompt": ["z"]}
    assert families.images(pipe, name, **call, **{argument: 1.0}).isfinite().all()
    with pytest.raises(ValueError, match=f"{argument}=0.5 changes the guided output: use {argument}=1.0"):
        families.images(pipe, name, **call, **{argument: 0.5})


def test_an_altered_call_that_is_not_guided_is_not_refused() -> None:
    for name in ("sd", "zimage"):
        call = ALTERED[name][0]
        assert guidance_of(families.build(name)).altered(call) is not None
        pipe = applied(name)
        assert families.images(pipe, name, guided=False, **call).isfinite().all()
