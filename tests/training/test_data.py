"""What a training script's batches are made of."""

import argparse
from typing import Any

import pytest
import torch

from diffusers_ext.core.images import encode_images
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.training.data import TrainingLatents, encode_captions, image_arrays
from tests import tiny


@pytest.mark.parametrize("cache_latents", [True, False])
def test_latents_by_number(cache_latents: bool) -> None:
    pipe = tiny.build("sd")
    data: Any = fashion_scenes.make_dataset(fashion_scenes.SAMPLE_DIR, "test", 70, seed=0)
    args = argparse.Namespace(image_column="image", resolution=None, cache_latents=cache_latents)
    encoded = TrainingLatents(args, pipe, data)
    index = [66, 2, 2]
    expected = encode_images(pipe, image_arrays(args, [data[i] for i in index]))
    assert torch.allclose(encoded(index), expected, atol=1e-5)


def test_captions_as_the_unet_takes_them() -> None:
    plain = encode_captions(tiny.build("sd"), ["a aaa", ""], 32, 64)
    assert plain.keys() == {"prompt_embeds"}
    found = encode_captions(tiny.build("sdxl"), ["a aaa", ""], 32, 64)
    assert found.keys() == {"prompt_embeds", "pooled_prompt_embeds", "time_ids"}
    assert found["time_ids"].tolist() == [[32, 64, 0, 0, 32, 64]] * 2
    assert len(found["prompt_embeds"]) == len(found["pooled_prompt_embeds"]) == 2
