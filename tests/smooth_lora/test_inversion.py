"""Inversion on the embedded text-to-image model: real pictures, real prompts, few steps."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DiffusionPipeline

from diffusers_ext.core import families
from diffusers_ext.core.images import encode_images
from diffusers_ext.core.prompts import encode_prompts
from diffusers_ext.smooth_lora.inversion import ddim_invert
from diffusers_ext.smooth_lora.null_text import null_text_invert, reconstruct
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.embedded import card_dir
from tests import tiny

STEPS = 10


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, list[str]]:
    pictures, prompts = fashion_scenes.scene_arrays(fashion_scenes.SAMPLE_DIR, "test", 3, seed=0)
    return pictures.astype(np.float32) / 255, prompts


@pytest.fixture(scope="module")
def latents(pipe: Any, scenes: Any) -> torch.Tensor:
    return encode_images(pipe, scenes[0])


def redraw(pipe: Any, noise: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    scheduler = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(scheduler.config)
    call: dict[str, Any] = {"height": 32, "width": 64, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    result = pipe(prompts, latents=noise, output_type="latent", **call).images
    pipe.scheduler = scheduler
    return result


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean())


def test_pictures_and_latents_go_together(pipe: Any, scenes: Any, latents: torch.Tensor) -> None:
    assert latents.shape == (3, 4, 8, 16)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    picture = torch.from_numpy(scenes[0]).movedim(-1, 1)
    assert error(decoded, picture) < 0.01  # the autoencoder's own error
    assert torch.equal(encode_images(pipe, picture), latents)


def test_ddim_inversion_is_the_inverse_schedulers_run(pipe: Any, scenes: Any, latents: torch.Tensor) -> None:
    before = pipe.scheduler
    noise = ddim_invert(pipe, latents, scenes[1], num_inference_steps=STEPS)
    assert pipe.scheduler is before
    scheduler: Any = DDIMInverseScheduler.from_config(before.config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    text, x = encode_prompts(pipe, scenes[1])["prompt_embeds"], latents
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t, text).sample, t, x).prev_sample
    assert torch.allclose(noise, x, atol=1e-3)
    again = redraw(pipe, noise, scenes[1])
    other = redraw(pipe, torch.randn_like(noise), scenes[1])
    assert error(again, latents) < 0.25 * error(other, latents)


def test_null_text_inversion_redraws_under_guidance(pipe: Any, scenes: Any, latents: torch.Tensor) -> None:
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "progress": False}
    found = null_text_invert(pipe, latents, scenes[1], **options)
    kept = null_text_invert(pipe, latents, scenes[1], num_inner_steps=0, **options)
    assert found.null_embeds.shape == (STEPS, 3, *kept.prompt_embeds.shape[1:])
    assert torch.equal(kept.null_embeds[0], kept.null_embeds[-1])
    errors = []
    for inversion in (found, kept):
        redrawn = reconstruct(pipe, inversion, output_type="latent").images
        # The optimisation's last state is what the pipeline arrives at.
        assert error(redrawn, latents) == pytest.approx(float(inversion.losses[-1]), rel=1e-2)
        errors.append(error(redrawn, latents))
    assert errors[0] < 0.5 * errors[1]
    assert not found.null_embeds.requires_grad
    assert all(p.grad is None for p in pipe.unet.parameters())


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_flow_is_inverted_by_its_own_steps(name: str) -> None:
    pipe = tiny.build(name)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = tiny.inputs(name, 2, guided=False)
    if name == "sd3":
        call = {"prompt": options["prompt"]}
    else:
        call = {"prompt": None, **tiny.flux_prompt(2, guided=False)}
    before = pipe.scheduler
    noise = ddim_invert(pipe, latents, num_inference_steps=200, **call)
    assert pipe.scheduler is before
    size = {
        "height": 8,
        "width": 8,
        "num_inference_steps": 200,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }
    again = pipe(**call, **size, latents=noise).images
    wanted = families.pack(latents) if name == "flux" else latents
    other = pipe(**call, **size, latents=noise.flip(0)).images
    # Euler's error falls with the step; the way there and back is of the order of one step.
    assert error(again, wanted) < 1e-3 * error(other, wanted)


def test_refusals(pipe: Any, scenes: Any, latents: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 latents need 1 or 3 prompts, got 2"):
        ddim_invert(pipe, latents, scenes[1][:2])
    with pytest.raises(ValueError, match=r"Expected latents \(B, 4, H, W\)"):
        ddim_invert(pipe, latents[:, :3], scenes[1])
    with pytest.raises(ValueError, match="image of width 64, got 32"):
        ddim_invert(pipe, latents, scenes[1], width=32)
    other = tiny.build("sd")
    other.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod"):
        ddim_invert(other, latents, scenes[1])
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline does not have"):
        null_text_invert(tiny.build("sdxl"), latents, scenes[1])
    with pytest.raises(ValueError, match=r"optimizes in float32, the pipeline is torch\.float16"):
        null_text_invert(tiny.build("sd", dtype=torch.float16), latents, scenes[1])
    with pytest.raises(ValueError, match="learning_rate above 0"):
        null_text_invert(pipe, latents, scenes[1], learning_rate=0.0)
    for wrong in (scenes[0][0], 2 * scenes[0], scenes[0][..., :2], np.full((1, 8, 8, 3), np.nan, np.float32)):
        with pytest.raises(ValueError, match="Expected images"):
            encode_images(pipe, wrong)
    with pytest.raises(ValueError, match="multiples of 4 high and wide, got 32 × 63"):
        encode_images(pipe, scenes[0][:, :, :63])
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
