"""The contract on the included models with the included weights: the UNet's and the flow-matching transformer's."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import diffusers_ext as dx
from benchmarks.flow_runs import call_options
from diffusers_ext.testbed.embedded import card_dir

pytestmark = pytest.mark.slow

MODELS = {"UNet": "fashion-scenes", "flow": "fashion-flow"}
PROMPTS = ["a red bag left of a blue boot", "a white dress", "a green coat"]


def _teleport(pipe: Any, model: str) -> Any:
    stats = dx.GaussianStats.from_pretrained(card_dir(model) / "gaussian")
    # "auto" skips nothing of the flow.
    return dx.apply_teleport(pipe, stats, skip=0.34)


def _golden_noise(pipe: Any, model: str) -> Any:
    return dx.apply_golden_noise(
        pipe, dx.NPNetModel.from_pretrained(card_dir(f"npnet-{model}"), torch_dtype=torch.float32)
    )


def _smooth_lora(pipe: Any, model: str) -> Any:
    return dx.apply_smooth_lora(pipe, card_dir(f"smooth-lora-{model}"))


def _gri(pipe: Any, model: str) -> Any:
    return dx.apply_gri_attention(pipe, window=4, pool=2)


Change = Callable[..., Any]
METHODS: dict[str, tuple[Change, Change]] = {
    "teleport": (_teleport, dx.remove_teleport),
    "golden noise": (_golden_noise, dx.remove_golden_noise),
    "smooth-lora": (_smooth_lora, dx.remove_smooth_lora),
    "gri": (_gri, dx.remove_gri_attention),
}
each = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def load(model: str) -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(card_dir(model), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, rows: slice = slice(None), **options: Any) -> Tensor:
    given = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))][rows]
    call = {"num_inference_steps": 6, "guidance_scale": 2.0, **call_options(pipe), **options}
    return pipe(PROMPTS[rows], height=32, width=64, generator=given, output_type="pt", **call).images


@each
@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_images_row_by_row_and_its_removal_restores_them(method: str, model: str) -> None:
    pipe = load(model)
    plain, scheduler = images(pipe), pipe.scheduler
    on, off = METHODS[method]
    on(pipe, model)
    changed = images(pipe)
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, plain)
    assert torch.equal(images(pipe), changed)
    for row in range(len(PROMPTS)):
        # Sums in another order, through six steps and a decoder.
        assert torch.allclose(images(pipe, slice(row, row + 1)), changed[row : row + 1], atol=1e-3)
    assert not torch.equal(images(pipe, guidance_scale=1.0), changed)
    off(pipe)
    assert torch.equal(images(pipe), plain)
    assert pipe.scheduler is scheduler
    assert "nothing added" in str(dx.summary(pipe))


@each
def test_all_methods_come_off_in_any_order(model: str) -> None:
    pipe = load(model)
    plain, found = images(pipe), []
    for order in itertools.islice(itertools.permutations(METHODS), 0, None, 7):
        for method in order:
            METHODS[method][0](pipe, model)
        found.append(images(pipe))
        for method in reversed(order[::2] + order[1::2]):
            METHODS[method][1](pipe)
        assert torch.equal(images(pipe), plain), order
    assert all(torch.equal(some, found[0]) for some in found)


@each
def test_with_teleport_it_is_saved_and_loaded(model: str, tmp_path: Any) -> None:
    pipe = _teleport(load(model), model)
    pipe.save_pretrained(tmp_path)
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images(dx.apply_teleport(loaded)), images(pipe))


@pytest.mark.parametrize("model", [*MODELS.values(), "asdm-fashion-scenes", "asdm-fashion-flow"])
def test_plain_diffusers_generates_with_it(model: str) -> None:
    whole = card_dir(model.removeprefix("asdm-"))
    code = f"""
import sys, torch, diffusers
parts = {{}}
if {model!r}.startswith("asdm"):
    name = "transformer" if "flow" in {model!r} else "unet"
    kind = diffusers.SD3Transformer2DModel if name == "transformer" else diffusers.UNet2DConditionModel
    parts[name] = kind.from_pretrained({str(card_dir(model))!r}, subfolder=name, torch_dtype=torch.float32)
pipe = diffusers.DiffusionPipeline.from_pretrained({str(whole)!r}, torch_dtype=torch.float32, **parts)
image = pipe("a red bag left of a blue boot", height=32, width=64, num_inference_steps=4, output_type="np").images[0]
assert image.shape == (32, 64, 3) and image.std() > 0.05, image.std()
assert not [name for name in sys.modules if name.startswith("diffusers_ext")]
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
