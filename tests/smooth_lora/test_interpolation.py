"""Interpolation between noises and prompts, on tiny pipelines."""

from typing import Any

import numpy as np
import pytest
import torch

from diffusers_ext.core.noise import slerp
from diffusers_ext.core.prompts import encode_prompts
from diffusers_ext.smooth_lora.interpolation import interpolate
from tests import tiny

CALL: dict[str, Any] = {"height": 8, "width": 8, "num_inference_steps": 2}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_the_ends_are_the_pipelines_own_pictures(name: str) -> None:
    pipe, prompts = tiny.build(name), ["a aaa", "a bbb"]
    frames = interpolate(
        pipe, prompts, generator=tiny.generators(2), num_frames=4, batch_size=3, progress=False, **CALL
    )
    assert frames.shape == (4, 8, 8, 3)
    own = pipe(prompts, generator=tiny.generators(2), output_type="np", **CALL).images
    # Embeddings given directly, in batches of other sizes: rounding.
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
    ],
)
def test_refusals(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interpolate(tiny.build("sd"), **{"prompt": "a aaa", **CALL, **options})
