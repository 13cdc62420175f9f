"""Images in training are those of the training: their size, their guidance and their number of tokens, on every model."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusers_ext.asdm.calibration import the_latents
from diffusers_ext.asdm.incubation import Incubation
from diffusers_ext.core.families import from_grid
from diffusers_ext.training.sampling import default_guidance, image_call
from diffusers_ext.training.transformers import flow_of
from tests import families, tiny

PROMPTS = ["a", "a red bag"]
# Tokens that each tiny model can take, and the default scale.
TOKENS = {"qwen": 256, "lumina2": 32}
DEFAULTS = {"flux": 3.5, "flux2": 3.5, "flux-schnell": 1.0}


@pytest.mark.parametrize("name", families.FLOWS)
def test_validation_images_of_flows(name: str, tmp_path: Path) -> None:
    pipe = families.build(name)
    flow, shape = flow_of(pipe), families.latent_shape(name)
    options = {"max_sequence_length": TOKENS.get(name, 16), "num_inference_steps": 1}
    args: Any = SimpleNamespace(**options, validation_prompts=PROMPTS)
    args.guidance_scale = default_guidance(pipe)
    assert args.guidance_scale == DEFAULTS.get(name, 4.0)
    calls: list[Any] = []
    names = list(inspect.signature(type(pipe.transformer).forward).parameters)[1:]
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, given: calls.append({**dict(zip(names, args)), **given}), with_kwargs=True
    )
    given: Any = dict.fromkeys(("plan", "steps", "weights", "accelerator", "made_of"))
    run = Incubation(args, pipe, batches=SimpleNamespace(size=shape[1:]), **given)
    run._draw(pipe.transformer, tmp_path / "images.png")
    assert (tmp_path / "images.png").is_file()
    # The teacher and the student, each called once for both prompts, or twice as much with guidance.
    rows = sum(len(the_latents(call)) for call in calls)
    assert rows == (4 if args.guidance_scale in (1.0, 3.5) else 8)
    for call in calls:
        latents, text = the_latents(call), call.get("encoder_hidden_states")
        if name != "zimage":
            assert latents.shape[1:] == from_grid(flow.family.layout, torch.zeros(1, *shape)).shape[1:]
            # Stable Diffusion 3 has the tokens of CLIP before.
            assert text.shape[1] <= args.max_sequence_length + (77 if name == "sd3" else 0)
        else:
            assert latents.shape[-2:] == shape[1:]
        if call.get("guidance") is not None:
            assert call["guidance"][0] == 3.5


def test_calls_of_unets_are_as_before() -> None:
    pipe = tiny.build("sdxl")
    assert default_guidance(pipe) == 7.5
    args: Any = SimpleNamespace(guidance_scale=2.0)
    factor = pipe.vae_scale_factor
    expected = {"guidance_scale": 2.0, "height": 8 * factor, "width": 4 * factor}
    assert image_call(pipe, args, 8, 4) == expected
