"""What a training script's batches are made of."""

import argparse
from typing import Any

import diffusers
import pytest
import torch

from diffusers_ext.core.images import encode_images
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.training.data import (
    TrainingLatents,
    check_captioned_training,
    encode_captions,
    image_arrays,
)
from tests import families, tiny


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


REFUSED = {
    "sd-controlnet": "has controlnet: expected Stable Diffusion or SDXL",
    "sd-ip-adapter": "takes embeddings of images, as with an IP-Adapter",
    "lcm": "takes a guidance scale as an input, as in LCM",
    "sd3": "StableDiffusion3Pipeline has no unet",
    "ldm": "LDMTextToImagePipeline has no vae, text_encoder",
    "ddpm": "DDPMPipeline has no vae, text_encoder",
}


@pytest.mark.parametrize("name", families.NAMES)
def test_only_unets_whose_inputs_are_known_are_trained_on_captions(name: str) -> None:
    pipe = families.build(name)
    if name in ("sd", "sd2", "sdxl", "sdxl-img2img", "sd-pag"):
        check_captioned_training(pipe)
        return
    with pytest.raises(ValueError, match=REFUSED.get(name, "has no unet|has guider")):
        check_captioned_training(pipe)
    args = argparse.Namespace(image_column="image", resolution=None, cache_latents=False)
    with pytest.raises(ValueError, match="expected Stable Diffusion or SDXL"):
        TrainingLatents(args, pipe, [])


def test_inputs_of_other_unets_are_named() -> None:
    inpainting = tiny.build("sd")
    inpainting.unet = diffusers.UNet2DConditionModel.from_config(inpainting.unet.config, in_channels=9)
    with pytest.raises(ValueError, match="has a UNet with 9 channels for latents with 4"):
        check_captioned_training(inpainting)
    classes = tiny.build("sd")
    classes.unet = tiny.unet(num_class_embeds=3)
    with pytest.raises(ValueError, match="The UNet of StableDiffusionPipeline takes class labels"):
        check_captioned_training(classes)
    # Kolors' projection of the embeddings is no further input.
    projected = tiny.build("sd")
    width = projected.unet.config.cross_attention_dim
    projected.unet = tiny.unet(encoder_hid_dim_type="text_proj", encoder_hid_dim=width)
    check_captioned_training(projected)
