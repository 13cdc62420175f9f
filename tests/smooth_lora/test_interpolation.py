"""Interpolation between noises and prompts, on tiny pipelines."""

from typing import Any

import numpy as np
import pytest
import torch

from diffusers_ext.core.noise import slerp
from diffusers_ext.core.pipeline import call_pipeline, initial_noise
from diffusers_ext.core.prompts import encode_prompts
from diffusers_ext.smooth_lora.interpolation import between, interpolate
from tests import families, tiny

CALL: dict[str, Any] = {"height": 8, "width": 8, "num_inference_steps": 2}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_the_ends_are_the_pipelines_own_pictures(name: str) -> None:
    pipe, prompts = tiny.build(name), ["a aaa", "a bbb"]
    frames = interpolate(
        pipe, prompts, generator=tiny.generators(2), num_frames=4, batch_size=3, progress=False, **CALL
    )
    assert frames.shape == (4, 8, 8, 3)
    own = pipe(prompts, generator=tiny.generators(2), output_type="np", **CALL).images
    # Batches of other sizes: rounding.
    assert np.allclose(frames[[0, -1]], own, atol=1e-3)
    assert np.abs(np.diff(frames, axis=0)).reshape(3, -1).max(1).min() > 1e-3


def test_given_noises_and_one_prompt() -> None:
    pipe = tiny.build("sd")
    noises = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = interpolate(pipe, "a aaa", latents=noises, num_frames=3, progress=False, **CALL)
    middle = pipe("a aaa", latents=slerp(noises[:1], noises[1:], 0.5), output_type="np", **CALL).images
    assert np.allclose(frames[1], middle[0], atol=1e-3)


def test_prompts_move_in_a_straight_line() -> None:
    pipe = tiny.build("sd")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    frames = interpolate(
        pipe, ["a aaa", "a bbb"], latents=noise.repeat(2, 1, 1, 1), num_frames=3, progress=False, **CALL
    )
    encoded = encode_prompts(pipe, ["a aaa", "a bbb"])
    half = {name: value.mean(0, keepdim=True) for name, value in encoded.items()}
    middle = pipe(**half, latents=noise, output_type="np", **CALL).images
    assert np.allclose(frames[1], middle[0], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ["a", "b", "c"]}, "one or two prompts"),
        ({"prompt": []}, "one or two prompts"),
        ({"num_frames": 1}, "num_frames must be 2 or more"),
        ({"latents": torch.zeros(3, 4, 8, 8)}, "noises of the two ends"),
        ({"generator": tiny.generators(3)}, "two generators"),
        ({"generator": torch.Generator()}, "two generators, one for the noise of each end; got 1"),
        ({"latents": torch.zeros(2, 4, 8, 7)}, "image of width 7, got 8"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"latents of shape \(2, 4, 8, 8\), got \(2, 3, 8, 8\)"),
        ({"negative_prompt": ["a", "b", "c"]}, "one or two texts as negative_prompt="),
        ({"num_images_per_prompt": 2}, "interpolate does not take num_images_per_prompt=: every frame"),
        ({"output_type": "pil"}, "interpolate does not take output_type="),
        ({"return_dict": False}, "interpolate does not take return_dict="),
        (
            {"prompt_embeds": torch.zeros(2, 77, 16)},
            "interpolate does not take prompt_embeds=: give the prompts",
        ),
    ],
)
def test_refusals(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interpolate(tiny.build("sd"), **{"prompt": "a aaa", **CALL, **options})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sd", {"negative_prompt": "zzz"}),
        ("sd", {"negative_prompt": ["zzz", "y"]}),
        ("sdxl", {"clip_skip": 1}),
        ("sdxl", {"prompt_2": ["b", "c"], "negative_prompt_2": "d"}),
        ("sd3", {"prompt_3": "b", "max_sequence_length": 32}),
        ("flux", {"negative_prompt": ["zzz", "y"], "true_cfg_scale": 3.0, "prompt_2": "b"}),
        ("flux", {"max_sequence_length": 8}),
        ("zimage", {"negative_prompt": "zzz", "max_sequence_length": 8}),
        ("sana", {"complex_human_instruction": ["Say:"]}),
        ("pixart", {"negative_prompt": "zzz"}),
    ],
)
def test_options_act_on_the_encodings_of_the_ends(name: str, options: Any) -> None:
    pipe, prompts = families.build(name), ["a aaa", "a bbbbbb"]
    common = {**families.inputs(name, 2, steps=2), "prompt": prompts}
    del common["output_type"]
    plain = {key: value for key, value in common.items() if key != "prompt"}
    latents = initial_noise(pipe, {**common, "generator": tiny.generators(2)})
    texts = {key: [v] * 2 if isinstance(v, str) else v for key, v in options.items()}
    # Z-Image changes its lists.
    own = call_pipeline(pipe, **{**common, **texts, "latents": latents, "output_type": "np"}).images
    frames = interpolate(pipe, prompts, latents=latents, num_frames=2, progress=False, **{**plain, **options})
    assert np.array_equal(frames, own)
    others = interpolate(pipe, prompts, latents=latents, num_frames=2, progress=False, **plain)
    assert not np.array_equal(others, frames)


def test_encodings_between_two_prompts() -> None:
    shares = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    embeds, pooled = torch.randn(2, 3, 4), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    ids = torch.zeros(3, 3)
    found = between((embeds, pooled, mask, mask.float(), mask.bool(), ids, None, []), shares)
    line, line_of_pooled, *masks, same, none, empty = found
    assert torch.equal(line[[0, 2]], embeds)
    assert torch.allclose(line[1], 0.75 * embeds[0] + 0.25 * embeds[1])
    assert torch.allclose(line_of_pooled[:, 0], 1 - shares.float())  # no mask, although of zeros and ones
    for value, kind in zip(masks, (torch.int64, torch.float32, torch.bool)):
        assert value.dtype == kind
        assert value.int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert same is ids
    assert none is None
    assert empty == []
    first, last = torch.randn(2, 4), torch.randn(3, 4)
    rows = between([first, last], shares)
    assert torch.equal(rows[0], first)
    assert torch.equal(rows[2], last)
    assert torch.allclose(rows[1][:2], 0.75 * first + 0.25 * last[:2])
    assert torch.allclose(rows[1][2], 0.25 * last[2])
    for unknown in (
        torch.tensor([0, 2, 5]),
        torch.randn(4, 3, 5),
        torch.tensor([[0, 1], [0, 2]]),
        ["a", "b"],
    ):
        with pytest.raises(ValueError, match="it is not known what belongs between them"):
            between(unknown, shares)


def test_a_controlnet_has_one_picture_for_all_frames() -> None:
    pipe = families.build("sd-controlnet")
    call = {key: v for key, v in families.inputs("sd-controlnet", 2, steps=2).items() if key != "output_type"}
    prompts, pictures = call.pop("prompt"), call.pop("image")
    options = {"generator": tiny.generators(2), "num_frames": 2, "progress": False, **call}
    for several in (pictures, list(pictures)):
        with pytest.raises(ValueError, match="All frames have the same image=: give one"):
            interpolate(pipe, prompts, image=several, **options)
    assert interpolate(pipe, prompts, image=pictures[:1], **options).shape == (2, 8, 8, 3)
