"""The custom pipeline: it loads pruned UNets in a process that has imported nothing but diffusers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

import diffusers_ext as dx
from diffusers_ext.asdm.apply import gri_attention_of
from diffusers_ext.asdm.pipelines import ASDMStableDiffusionPipeline
from diffusers_ext.asdm.unet import ASDMUNet2DConditionModel
from diffusers_ext.golden_noise.pipelines import GoldenNoiseStableDiffusionPipeline
from diffusers_ext.smooth_lora.pipelines import SmoothDiffusionStableDiffusionPipeline
from diffusers_ext.teleport.pipelines import TeleportStableDiffusionPipeline
from tests import families, tiny
from tests.training.launching import environment

pytestmark = pytest.mark.filterwarnings("ignore")

FOLDER = dx.pipeline_path("asdm_sd")
LOADS = """
import sys, torch
from diffusers import DiffusionPipeline
assert "diffusers_ext" not in sys.modules
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[2], trust_remote_code=True)
print(type(pipe).__name__, type(pipe.unet).__name__)
"""


def pruned() -> Any:
    pipe = tiny.build("sd")
    plan = dx.PruningPlan(dict(pipe.unet.config), (("attention:up_blocks.1.attentions.1", "gri.0"),))
    pipe.unet = dx.prune_network(pipe.unet, plan)
    return pipe


def load(path: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(path, custom_pipeline=FOLDER, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_a_process_without_the_package_loads_a_pruned_unet(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    argv = [sys.executable, "-c", LOADS, str(tmp_path), FOLDER]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["ASDMStableDiffusionPipeline", "ASDMUNet2DConditionModel"]


def test_saved_and_loaded_it_draws_the_same(tmp_path: Path) -> None:
    pipe = pruned()
    before = tiny.images(pipe, "sd", steps=2)
    pipe.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    assert isinstance(again, ASDMStableDiffusionPipeline)
    assert isinstance(again.unet, ASDMUNet2DConditionModel)
    assert torch.equal(tiny.images(again, "sd", steps=2), before)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(tiny.images(load(tmp_path / "twice"), "sd", steps=2), before)


def test_of_a_stock_model_it_is_the_base_class(tmp_path: Path) -> None:
    plain = tiny.build("sd")
    plain.save_pretrained(tmp_path)
    pipe = load(tmp_path)
    before = tiny.images(plain, "sd", steps=2)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert torch.equal(tiny.images(pipe, "sd", steps=2), before)
    assert pipe.apply_gri_attention(window=2, pool=2) is pipe
    assert gri_attention_of(pipe) is not None
    assert not torch.equal(tiny.images(pipe, "sd", steps=2), before)
    assert pipe.remove_gri_attention() is pipe
    assert torch.equal(tiny.images(pipe, "sd", steps=2), before)


OURS = [
    ASDMStableDiffusionPipeline,
    GoldenNoiseStableDiffusionPipeline,
    SmoothDiffusionStableDiffusionPipeline,
    TeleportStableDiffusionPipeline,
]


@pytest.mark.parametrize("kind", OURS)
def test_from_pipe_takes_a_pruned_unet_over(kind: Any) -> None:
    pipe = pruned()
    expected = tiny.images(pipe, "sd", steps=2)
    made = kind.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    assert type(made) is kind
    assert made.unet is pipe.unet
    assert torch.equal(tiny.images(made, "sd", steps=2), expected)
    assert kind.from_pipe(made).unet is pipe.unet
    # What is not a UNet is still refused.
    pipe.unet = tiny.build("ddpm").unet
    with pytest.raises(ValueError, match="unet"):
        kind.from_pipe(pipe)


def test_from_pipe_with_the_folder_and_of_stock_classes() -> None:
    made = ASDMStableDiffusionPipeline.from_pipe(pruned())
    again = DiffusionPipeline.from_pipe(made, custom_pipeline=FOLDER, trust_remote_code=True)
    assert again.unet is made.unet
    assert again.image_encoder is None
    # diffusers compares exact classes, and says what to do.
    with pytest.raises(ValueError, match=r"expected .*unet"):
        StableDiffusionImg2ImgPipeline.from_pipe(made)
    assert StableDiffusionImg2ImgPipeline.from_pipe(made, unet=made.unet).unet is made.unet
    assert AutoPipelineForImage2Image.from_pipe(pruned()).unet.config.removed_attentions


def test_a_controlnet_is_refused_for_calibration() -> None:
    pipe = families.build("sd-controlnet")
    with pytest.raises(ValueError, match="has a ControlNet, which a pruned UNet does not fit"):
        dx.record_calibration_inputs(pipe, ["a"], image=torch.rand(1, 3, 8, 8))
