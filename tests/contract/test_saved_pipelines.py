"""How a saved pipeline of each custom class is loaded again, as pipelines/README.md says."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.asdm.pipelines import ASDMStableDiffusionPipeline
from diffusers_ext.golden_noise import pipelines as golden
from diffusers_ext.recipes import pipelines as recipes
from diffusers_ext.smooth_lora import pipelines as smooth
from diffusers_ext.teleport import pipelines as teleport
from diffusers_ext.testbed.embedded import pipeline_dir
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


def _sign() -> Any:
    base = tiny.build("ddpm")
    return dx.SIGNPipeline(base.unet, base.scheduler, timestep=900)


MADE = {
    "asdm_sd": lambda: ASDMStableDiffusionPipeline.from_pipe(tiny.build("sd")),
    "golden_noise_sd": lambda: golden.GoldenNoiseStableDiffusionPipeline.from_pipe(
        tiny.build("sd"), npnet=tiny.npnet("sd")
    ),
    "golden_noise_sdxl": lambda: golden.GoldenNoiseStableDiffusionXLPipeline.from_pipe(tiny.build("sdxl")),
    "recipe": lambda: recipes.RecipeStableDiffusionPipeline.from_pipe(tiny.build("sd")),
    "recipe_sdxl": lambda: recipes.RecipeStableDiffusionXLPipeline.from_pipe(tiny.build("sdxl")),
    "sign": _sign,
    "smooth_diffusion_sd": lambda: smooth.SmoothDiffusionStableDiffusionPipeline.from_pipe(tiny.build("sd")),
    "smooth_diffusion_sdxl": lambda: smooth.SmoothDiffusionStableDiffusionXLPipeline.from_pipe(
        tiny.build("sdxl")
    ),
    "teleport_ddpm": lambda: teleport.TeleportDDPMPipeline.from_pipe(tiny.build("ddpm")),
    "teleport_sd": lambda: teleport.TeleportStableDiffusionPipeline.from_pipe(tiny.build("sd")),
    "teleport_sdxl": lambda: teleport.TeleportStableDiffusionXLPipeline.from_pipe(tiny.build("sdxl")),
}


def test_every_folder_is_here() -> None:
    folders = pipeline_dir("sign").parent.iterdir()
    assert set(MADE) == {folder.name for folder in folders if (folder / "pipeline.py").is_file()}


@pytest.mark.parametrize("name", list(MADE))
def test_a_saved_pipeline_is_loaded_by_its_class_or_its_folder(name: str, tmp_path: Path) -> None:
    pipe = MADE[name]()
    pipe.save_pretrained(tmp_path)
    absent = {key: None for key, value in pipe.components.items() if value is None}
    assert type(type(pipe).from_pretrained(tmp_path, **absent)) is type(pipe)
    with pytest.raises(AttributeError, match=type(pipe).__name__):
        DiffusionPipeline.from_pretrained(tmp_path, **absent)
    # With the folder's file inside, the saved pipeline needs no other folder, and its class loads it as before.
    shutil.copy(pipeline_dir(name) / "pipeline.py", tmp_path)
    for folder in (pipeline_dir(name), tmp_path):
        loaded = DiffusionPipeline.from_pretrained(
            tmp_path, custom_pipeline=str(folder), trust_remote_code=True, **absent
        )
        assert type(loaded) is type(pipe)
    assert type(type(pipe).from_pretrained(tmp_path, **absent)) is type(pipe)
