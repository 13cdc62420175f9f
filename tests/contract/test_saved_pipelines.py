"""How a saved pipeline of each custom class is loaded again, as pipelines/README.md says."""

import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.asdm.pipelines import ASDMStableDiffusionPipeline
from diffusers_ext.core.shipped import shipped
from diffusers_ext.golden_noise import pipelines as golden
from diffusers_ext.recipes import pipelines as recipes
from diffusers_ext.smooth_lora import pipelines as smooth
from diffusers_ext.teleport import pipelines as teleport
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
    assert set(MADE) == set(shipped("pipelines"))


@pytest.mark.parametrize("name", list(MADE))
def test_a_saved_pipeline_is_loaded_by_its_class_and_by_diffusers(name: str, tmp_path: Path) -> None:
    pipe = MADE[name]()
    pipe.save_pretrained(tmp_path)
    absent = {key: None for key, value in pipe.components.items() if value is None}
    code = tmp_path / "pipeline.py"
    assert code.read_text() == Path(dx.pipeline_path(name), "pipeline.py").read_text()
    for folder in (None, dx.pipeline_path(name)):
        options = {} if folder is None else {"custom_pipeline": folder}
        with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
            DiffusionPipeline.from_pretrained(tmp_path, **options, **absent)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True, **options, **absent)
        assert type(loaded) is type(pipe)
    # The class itself runs no code of the folder.
    files = list(tmp_path.rglob("*.py"))
    assert len(files) == 1 + (name == "golden_noise_sd")  # of which NPNet is a component of this package
    for file in files:
        file.write_text("raise AssertionError")
    assert type(type(pipe).from_pretrained(tmp_path, **absent)) is type(pipe)


@pytest.mark.parametrize("name", list(MADE))
def test_without_the_package_the_file_says_what_is_missing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = Path(dx.pipeline_path(name), "pipeline.py").read_text()
    scope: dict[str, Any] = {}
    exec(code, scope)
    kind = scope["Pipeline"]
    monkeypatch.setitem(sys.modules, kind.__module__, None)
    with pytest.raises(
        ImportError, match=rf"{kind.__name__} is a class of the package diffusers-ext, which is not"
    ):
        exec(code, {})


class Own(dx.SIGNPipeline):
    """A user's class, which no other process can be expected to have."""


def test_a_subclass_elsewhere_is_saved_as_by_diffusers(tmp_path: Path) -> None:
    base = tiny.build("ddpm")
    Own(base.unet, base.scheduler, timestep=900).save_pretrained(tmp_path)
    assert not (tmp_path / "pipeline.py").exists()
    assert Own.load_config(tmp_path)["_class_name"] == "Own"
    assert type(Own.from_pretrained(tmp_path)) is Own
