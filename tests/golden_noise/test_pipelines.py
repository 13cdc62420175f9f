"""The pipeline classes with an optional network, also as custom pipelines and after saving."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.golden_noise.pipelines import (
    GoldenNoiseStableDiffusionPipeline,
    GoldenNoiseStableDiffusionXLPipeline,
)
from tests import tiny
from tests.teleport.test_prompt_map import mapped

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
CLASSES: dict[str, Any] = {
    "sd": GoldenNoiseStableDiffusionPipeline,
    "sdxl": GoldenNoiseStableDiffusionXLPipeline,
}
each = pytest.mark.parametrize("name", CLASSES)


def build(name: str, npnet: Any = None) -> Any:
    pipe = CLASSES[name].from_pipe(tiny.build(name), npnet=npnet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@each
def test_without_a_network_it_is_the_parent(name: str) -> None:
    stock = tiny.build(name)
    plain = tiny.images(stock, name, 2)
    assert torch.equal(tiny.images(build(name), name, 2), plain)
    assert torch.equal(tiny.images(build(name, tiny.npnet(name)), name, 2, golden_strength=0), plain)
    assert torch.equal(tiny.images(build(name, tiny.npnet(name, trained=False)), name, 2), plain)
    assert "nothing added" in str(dx.summary(build(name)))


@each
def test_with_one_it_is_what_apply_makes(name: str) -> None:
    npnet = tiny.npnet(name)
    pipe = build(name, npnet)
    expected = tiny.images(dx.apply_golden_noise(tiny.build(name), npnet), name, 2)
    assert torch.equal(tiny.images(pipe, name, 2), expected)
    assert "a component of the pipeline" in str(dx.summary(pipe))
    half = dx.apply_golden_noise(tiny.build(name), npnet, strength=0.5)
    assert torch.equal(tiny.images(pipe, name, 2, golden_strength=0.5), tiny.images(half, name, 2))
    assert torch.equal(tiny.images(pipe, name, 2), expected)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    stock = tiny.images(tiny.build(name), name, 2, latents=latents)
    assert torch.equal(tiny.images(pipe, name, 2, latents=latents), stock)
    pipe.npnet = None
    assert torch.equal(tiny.images(pipe, name, 2), tiny.images(tiny.build(name), name, 2))


@each
def test_positional_calls_and_the_signature(name: str) -> None:
    pipe, stock = build(name, tiny.npnet(name)), tiny.build(name)
    own, parent = (inspect.signature(p.__call__).parameters for p in (pipe, stock))
    assert set(own) - set(parent) == {"golden_strength"}
    assert "golden_strength" in type(pipe).__call__.__doc__
    call = tiny.inputs(name, 1)
    prompt = call.pop("prompt")
    named = pipe(prompt=prompt, **call, generator=tiny.generators(1)).images
    assert torch.equal(pipe(prompt, **call, generator=tiny.generators(1)).images, named)


@each
def test_saved_and_loaded_with_its_network(name: str, tmp_path: Path) -> None:
    pipe = build(name, tiny.npnet(name))
    expected = tiny.images(pipe, name, 2)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["npnet"] == ["diffusers_ext", "NPNetModel"]
    folder = str(ROOT / "pipelines" / f"golden_noise_{name}")
    for loaded in (
        CLASSES[name].from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=folder, trust_remote_code=True),
    ):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is CLASSES[name]
        # Weights that lie elsewhere in memory may take another kernel.
        assert torch.allclose(tiny.images(loaded, name, 2), expected, atol=1e-3)
    without = build(name)
    without.save_pretrained(tmp_path / "without")
    loaded = CLASSES[name].from_pretrained(tmp_path / "without")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.npnet is None
    assert torch.allclose(tiny.images(loaded, name), tiny.images(tiny.build(name), name), atol=1e-3)


@pytest.mark.slow
@each
def test_the_custom_pipeline_line_of_the_readme(name: str, tmp_path: Path) -> None:
    tiny.build(name).save_pretrained(tmp_path / "base")
    npnet = tiny.npnet(name)
    npnet.save_pretrained(tmp_path / "npnet")
    code = (
        "import sys, diffusers_ext as dx\n"
        "from diffusers import DiffusionPipeline\n"
        "base, folder, weights = sys.argv[1:]\n"
        "npnet = dx.NPNetModel.from_pretrained(weights)\n"
        "options = dict(custom_pipeline=folder, npnet=npnet, trust_remote_code=True)\n"
        "pipe = DiffusionPipeline.from_pretrained(base, **options)\n"
        "print(type(pipe).__name__, type(pipe.npnet).__name__)"
    )
    arguments = [tmp_path / "base", ROOT / "pipelines" / f"golden_noise_{name}", tmp_path / "npnet"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith(f"{CLASSES[name].__name__} NPNetModel"), done.stderr


@each
def test_half_precision_casts_the_network_along(name: str) -> None:
    exact = tiny.images(build(name, tiny.npnet(name)), name, 2)
    half = build(name, tiny.npnet(name)).to(torch.float16)
    assert half.npnet.dtype == torch.float16
    images = tiny.images(half, name, 2)
    assert torch.isfinite(images).all()
    assert float((images - exact).abs().mean()) < 0.02


def test_an_interrupted_call_leaves_no_state(monkeypatch: Any) -> None:
    pipe = build("sd", tiny.npnet("sd"))
    expected = tiny.images(pipe, "sd")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipe.unet, "forward", fail)
        with pytest.raises(KeyboardInterrupt):
            tiny.images(pipe, "sd")
    assert pipe._golden is None
    assert torch.equal(tiny.images(pipe, "sd"), expected)


def test_it_stacks_with_teleportation() -> None:
    pipe = build("sd", tiny.npnet("sd"))
    alone = tiny.images(pipe, "sd", 2)
    dx.apply_teleport(pipe, tiny.gaussian((4, 8, 8), rank=6), skip=0.4)
    assert not torch.equal(tiny.images(pipe, "sd", 2), alone)
    dx.remove_teleport(pipe)
    assert torch.equal(tiny.images(pipe, "sd", 2), alone)


@pytest.mark.gpu
def test_cpu_offload() -> None:
    pipe = build("sd", tiny.npnet("sd"))
    expected = tiny.images(pipe, "sd", 2)
    pipe.enable_model_cpu_offload()
    # Another device computes in another order.
    assert torch.allclose(tiny.images(pipe, "sd", 2).cpu(), expected, atol=1e-2)
    plain = tiny.build("sd")
    plain.enable_model_cpu_offload()
    dx.apply_golden_noise(plain, tiny.npnet("sd"))
    assert torch.allclose(tiny.images(plain, "sd", 2).cpu(), expected, atol=1e-2)


@each
def test_hooks_of_other_methods_see_the_arguments(name: str) -> None:
    """Without a network the class is its base, also for methods that read the arguments of its methods."""
    stock, pipe = tiny.build(name), build(name)
    for method in ("encode_prompt", "prepare_latents", "check_inputs"):
        given = [inspect.signature(getattr(one, method)).parameters for one in (stock, pipe)]
        assert list(given[0]) == list(given[1])
    stats = mapped(stock)
    for one in (stock, pipe):
        dx.apply_teleport(one, stats, skip=0.5)
    call = {"negative_prompt": ["b"], "guidance_scale": 7.0}
    expected = tiny.images(stock, name, **call)
    assert torch.equal(tiny.images(pipe, name, **call), expected)
    assert not torch.equal(tiny.images(pipe, name, guidance_scale=7.0), expected)
    for one in (stock, pipe):
        dx.apply_golden_noise(dx.remove_teleport(one), tiny.npnet(name))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = tiny.images(tiny.build(name), name, latents=latents)
    assert torch.equal(tiny.images(pipe, name, latents=latents), plain)
    assert torch.equal(tiny.images(pipe, name), tiny.images(stock, name))
