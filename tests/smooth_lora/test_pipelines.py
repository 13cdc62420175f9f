"""The pipeline classes that interpolate, invert and edit, also as custom pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import diffusers_ext as dx
from diffusers_ext.smooth_lora.pipelines import (
    SmoothDiffusionStableDiffusionPipeline,
    SmoothDiffusionStableDiffusionXLPipeline,
)
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
CLASSES: dict[str, Any] = {
    "sd": SmoothDiffusionStableDiffusionPipeline,
    "sdxl": SmoothDiffusionStableDiffusionXLPipeline,
}
STEPS: dict[str, Any] = {"num_inference_steps": 3}
each = pytest.mark.parametrize("name", CLASSES)


def build(name: str) -> Any:
    pipe = CLASSES[name].from_pipe(tiny.build(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


@each
def test_the_custom_pipeline_of_the_readme(name: str, tmp_path: Path) -> None:
    tiny.build(name).save_pretrained(tmp_path)
    folder = str(ROOT / "pipelines" / f"smooth_diffusion_{name}")
    pipe = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is CLASSES[name]
    # Weights that lie elsewhere in memory may take another kernel.
    assert torch.allclose(tiny.images(pipe, name, 2), tiny.images(tiny.build(name), name, 2), atol=1e-3)


@each
def test_a_plain_call_is_the_parents_also_after_a_lora(name: str, tmp_path: Path) -> None:
    pipe, plain = build(name), tiny.images(tiny.build(name), name, 2)
    assert torch.equal(tiny.images(pipe, name, 2), plain)
    save_file(tiny.lora(name), tmp_path / "lora.safetensors")
    assert pipe.load_smooth_lora(tmp_path) is pipe
    assert not torch.equal(tiny.images(pipe, name, 2), plain)
    assert "adapter 'smooth' of rank 2" in str(dx.summary(pipe))
    pipe.unload_smooth_lora()
    assert torch.equal(tiny.images(pipe, name, 2), plain)


@each
def test_the_calls_are_the_packages_functions(name: str) -> None:
    pipe, prompts = build(name), ["a aaa", "a bbb"]
    arrays = pictures()
    latents = dx.encode_images(pipe, arrays.astype(np.float32) / 255)
    noise = dx.ddim_invert(pipe, latents, prompts, **STEPS)
    images = [Image.fromarray(array) for array in arrays]
    assert torch.equal(pipe.invert(images, prompts, **STEPS), noise)
    assert torch.allclose(pipe.invert(images[0], prompts[0], **STEPS), noise[:1], atol=1e-4)
    options: dict[str, Any] = {"latents": noise, "output_type": "pt", **STEPS}
    edited = pipe.edit(prompts, "a ccc", **options).images
    assert torch.equal(edited, dx.edit(pipe, prompts, "a ccc", **options).images)
    frames = pipe.interpolate(prompts, latents=noise, num_frames=3, progress=False, **STEPS)
    assert np.array_equal(
        frames, dx.interpolate(pipe, prompts, latents=noise, num_frames=3, progress=False, **STEPS)
    )


def test_null_text_inversion_of_a_picture() -> None:
    pipe = build("sd")
    image = Image.fromarray(pictures()[0])
    options: dict[str, Any] = {"num_inner_steps": 1, "progress": False, **STEPS}
    found = pipe.invert_null_text(image, "a aaa", **options)
    redrawn = pipe.reconstruct(found, output_type="pt").images
    assert torch.equal(redrawn, dx.reconstruct(pipe, found, output_type="pt").images)


def test_pictures_of_two_sizes_are_refused() -> None:
    images = [Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))]
    with pytest.raises(ValueError, match="one size, got 8 × 8, 16 × 8"):
        build("sd").invert(images, "a aaa")
    with pytest.raises(ValueError, match="one size, got none"):
        build("sd").invert([], "a aaa")
