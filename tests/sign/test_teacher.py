"""Which pipelines SIGN distills, and that it encodes prompts as they do."""

from typing import Any

import diffusers
import pytest
import torch

import diffusers_ext as dx
from diffusers_ext.sign.conditions import Texts
from diffusers_ext.sign.teacher import check_pipeline, untrained_projector
from tests import families, tiny

pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED = {
    "sd-controlnet": "has controlnet",
    "sd-ip-adapter": "takes embeddings of images, as with an IP-Adapter",
    "lcm": "takes a guidance scale as an input, as in LCM",
    "ldm": "LDMTextToImagePipeline has bert, vqvae",
    "sdxl-img2img": "starts from an image",
    "pixart": "PixArtSigmaPipeline has transformer",
}


@pytest.mark.parametrize("name", families.NAMES)
def test_a_teacher_is_a_flow_or_one_unet_with_at_most_one_text_encoder(name: str) -> None:
    pipe = families.build(name)
    if name in families.FLOWS:
        check_pipeline(pipe)
        return
    if name in ("sd", "sd2", "sd-pag", "ddpm", "sdxl"):
        check_pipeline(pipe)
        assert isinstance(untrained_projector(pipe), dx.SIGNPipeline)
        return
    for refuses in (check_pipeline, untrained_projector):
        with pytest.raises(ValueError, match=REFUSED.get(name, "expected a pipeline with one UNet")):
            refuses(pipe)


def test_other_teachers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="is a projector already"):
        check_pipeline(untrained_projector(tiny.build("ddpm")))
    classes = tiny.build("ddpm")
    classes.unet = diffusers.UNet2DModel.from_config(classes.unet.config, num_class_embeds=3)
    with pytest.raises(ValueError, match="The UNet of DDPMPipeline takes class labels"):
        check_pipeline(classes)
    without: Any = diffusers.DDPMPipeline(tiny.unet(), tiny.build("ddpm").scheduler)
    with pytest.raises(ValueError, match="has no text encoder, and its UNet takes a prompt"):
        check_pipeline(without)
    lost = tiny.build("sd")
    lost.vae = None
    with pytest.raises(ValueError, match="has no vae"):
        check_pipeline(lost)


@pytest.mark.parametrize("masks", [False, True])
def test_prompts_are_encoded_as_the_teacher_encodes_them(masks: bool) -> None:
    pipe, prompts = tiny.build("sd"), ["a aaa", "a"]
    pipe.text_encoder.config.use_attention_mask = masks
    expected, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    projector = untrained_projector(pipe)
    assert torch.equal(
        Texts(pipe, projector, torch.device("cpu")).conditions(prompts)["encoder_hidden_states"], expected
    )
    assert torch.equal(projector._conditions(prompts, 2)["encoder_hidden_states"], expected)
    pipe.text_encoder.config.use_attention_mask = not masks
    other, _ = pipe.encode_prompt(prompts, "cpu", 1, False)
    assert not torch.allclose(other, expected, atol=1e-4)


def test_latents_of_a_projector_are_those_of_its_teacher() -> None:
    pipe = tiny.build("sd")
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dx.encode_images(untrained_projector(pipe), images), dx.encode_images(pipe, images))
