"""Sampling, projecting and editing with tiny untrained projectors: pixel, latent, with prompts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

import diffusers_ext as dx
from diffusers_ext.sign.inputs import step_levels
from diffusers_ext.sign.projector import nearest_timestep
from diffusers_ext.sign.source import MixtureSource
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
each = pytest.mark.parametrize("name", ["ddpm", "sd"])


def build(name: str, source: bool = True) -> Any:
    base = tiny.build(name)
    parts = {key: base.components.get(key) for key in ("vae", "text_encoder", "tokenizer")}
    if source:
        draw = torch.Generator().manual_seed(9)
        parts["source"] = MixtureSource.fit(torch.randn(20, *tiny.LATENT_SHAPES[name], generator=draw), 5)
    return dx.SIGNPipeline(base.unet, base.scheduler, **parts, timestep=nearest_timestep(base.scheduler))


def texts(name: str, count: int) -> dict[str, Any]:
    return {"prompt": [f"a {'abc'[i] * 3}" for i in range(count)]} if name == "sd" else {"batch_size": count}


def one(name: str, i: int) -> dict[str, Any]:
    return {"prompt": f"a {'abc'[i] * 3}"} if name == "sd" else {}


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_further_steps_refine_from_an_eighth_of_the_level_down() -> None:
    pipe = build("ddpm")
    found = {n: [level / pipe.sigma for level in step_levels(pipe, n, None)] for n in (1, 2, 4)}
    assert found == {
        1: [1],
        2: pytest.approx([1, 1 / 8]),
        4: pytest.approx([1, 1 / 8, 1 / 12, 1 / 24]),
    }


@each
@pytest.mark.parametrize("source", [False, True])
def test_one_step_is_one_projection_of_the_source(name: str, source: bool) -> None:
    pipe = build(name, source)
    noise = torch.randn(2, *tiny.LATENT_SHAPES[name], generator=torch.Generator().manual_seed(5))
    found = pipe(**texts(name, 2), latents=noise, output_type="latent").images
    conditions = pipe._conditions(texts(name, 2).get("prompt"), 2)

    def start(noise: torch.Tensor) -> torch.Tensor:
        return pipe.source(noise, pipe.sigma) if source else pipe.sigma * noise

    with torch.no_grad():
        assert torch.equal(found, pipe.projector(start(noise), **conditions))
        two = pipe(
            **texts(name, 2), generator=torch.Generator().manual_seed(5), sigmas=[pipe.sigma, 1.0],
            output_type="latent",
        ).images  # fmt: skip
        draw = torch.Generator().manual_seed(5)
        first, second = (torch.randn(noise.shape, generator=draw) for _ in range(2))
        by_hand = pipe.projector(pipe.projector(start(first), **conditions) + second, **conditions)
    assert torch.equal(two, by_hand)


@each
@pytest.mark.parametrize("steps", [1, 3])
def test_a_batch_with_a_generator_each_is_one_by_one(name: str, steps: int) -> None:
    pipe = build(name)
    call: dict[str, Any] = {"num_inference_steps": steps, "output_type": "pt"}
    together = pipe(**texts(name, 3), generator=tiny.generators(3), **call).images
    alone = [pipe(**one(name, i), generator=g, **call).images for i, g in enumerate(tiny.generators(3))]
    # Another batch size may take another kernel.
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


@each
def test_saved_and_loaded_also_as_custom_pipeline(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    call: dict[str, Any] = {**texts(name, 2), "num_inference_steps": 2, "output_type": "pt"}
    expected = pipe(**call, generator=tiny.generators(2)).images
    pipe.save_pretrained(tmp_path)
    loaded = dx.SIGNPipeline.from_pretrained(tmp_path)
    custom: Any = DiffusionPipeline.from_pretrained(
        tmp_path, custom_pipeline=str(ROOT / "pipelines" / "sign"), trust_remote_code=True
    )
    for other in (loaded, custom):
        assert type(other) is dx.SIGNPipeline
        # Weights that lie elsewhere in memory may take another kernel.
        assert torch.allclose(other(**call, generator=tiny.generators(2)).images, expected, atol=1e-4)
    assert "projector" in str(dx.summary(pipe))


def test_a_diffusion_model_is_no_projector(tmp_path: Path) -> None:
    tiny.build("ddpm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="time-conditional diffusion model, not a projector"):
        dx.SIGNPipeline.from_pretrained(tmp_path)


@each
def test_projecting(name: str) -> None:
    pipe, prompt = build(name), one(name, 0)
    given = pictures()
    found = pipe.project(given, **prompt, output_type="latent").images
    with torch.no_grad():
        once = pipe.projector(pipe._encode(given), **pipe._conditions(prompt.get("prompt"), 2))
        assert torch.equal(found, once)
        twice = pipe.projector(once, **pipe._conditions(prompt.get("prompt"), 2))
    assert torch.equal(pipe.project(given, **prompt, num_projections=2, output_type="latent").images, twice)
    noised = [
        pipe.project(given, **prompt, strength=0.5, generator=tiny.generators(2), output_type="pt").images
        for _ in range(2)
    ]
    assert torch.equal(*noised)
    # The same picture in every accepted form.
    array = (given.movedim(1, -1).numpy() * 255).round().astype(np.uint8)
    pils = [Image.fromarray(a) for a in array]
    forms = [
        array,
        pils,
        array.astype(np.float32) / 255,
        torch.from_numpy(array).movedim(-1, 1).float() / 255,
    ]
    results = [pipe.project(form, **prompt, output_type="pt").images for form in forms]
    assert all(torch.equal(results[0], other) for other in results[1:])
    images = pipe.project(pils[0], **prompt).images
    assert len(images) == 1
    assert isinstance(images[0], Image.Image)


def test_an_edit_keeps_what_the_mask_leaves() -> None:
    pipe, given = build("ddpm"), pictures()
    mask = np.zeros((8, 8), dtype=np.float32)
    mask[:, 4:] = 1
    for strength in (0.4, 1.0):
        found = pipe.edit(
            given, mask, strength=strength, generator=tiny.generators(2), output_type="pt"
        ).images
        assert torch.allclose(found[..., :4], given[..., :4], atol=1e-6)
        assert not torch.allclose(found[..., 4:], given[..., 4:], atol=1e-2)
    # At full strength what was under the mask does not matter, below it does.
    changed = given.clone()
    changed[..., 4:] = 0
    for strength, same in ((1.0, True), (0.4, False)):
        a, b = (
            pipe.edit(x, mask, strength=strength, generator=tiny.generators(2), output_type="pt").images
            for x in (given, changed)
        )
        assert torch.equal(a, b) == same
    whole = pipe.edit(
        given, strength=0.5, num_inference_steps=1, generator=tiny.generators(2), output_type="pt"
    )
    projected = pipe.project(given, strength=0.5, generator=tiny.generators(2), output_type="pt")
    assert torch.equal(whole.images, projected.images)


def test_a_network_put_in_later_is_the_one_that_projects() -> None:
    pipe, given = build("ddpm"), pictures()
    before = pipe.project(given, output_type="pt").images
    pipe.unet = tiny.build("ddpm", seed=1).unet
    assert not torch.allclose(pipe.project(given, output_type="pt").images, before)


def test_half_precision() -> None:
    pipe = build("ddpm").to(torch.bfloat16)
    images = pipe(batch_size=2, num_inference_steps=2, generator=tiny.generators(2), output_type="pt").images
    assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(num_inference_steps=0), "num_inference_steps must be a whole number of 1 or more, got 0"),
        (lambda p: p(sigmas=[1.0, 2.0]), "decreasing noise levels"),
        (lambda p: p(latents=torch.zeros(1, 3, 4, 4)), r"Expected latents \(1, 3, 8, 8\), got \(1, 3, 4, 4\)"),
        (lambda p: p("a aaa"), "takes no prompt"),
        (lambda p: p.project(pictures(), strength=1.5), r"strength must be in \[0, 1\], got 1.5"),
        (lambda p: p.edit(pictures(), strength=-0.1), r"strength must be in \[0, 1\], got -0.1"),
        (lambda p: p.project(pictures(), num_projections=0), "num_projections must be a whole number of 1 or more"),
        (lambda p: p.project(torch.rand(1, 3, 16, 16)), "8 wide and 8 high"),
        (lambda p: p.project(torch.rand(1, 1, 8, 8)), "Expected images of 3 channels"),
        (lambda p: p.project(2 * pictures()), r"in \[0, 1\].* values from .* to 2"),
        (lambda p: p.project([]), "one or more images of one size, got none"),
        (lambda p: p.edit(pictures(), np.zeros((4, 4))), "Expected a mask 8 wide and 8 high"),
        (lambda p: p.edit(pictures(), np.full((8, 8), 2.0)), r"in \[0, 1\] or uint8.* values from 2 to 2"),
    ],
)  # fmt: skip
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(build("ddpm"))


def test_prompts_are_asked_for_where_there_are_some() -> None:
    pipe = build("sd")
    with pytest.raises(ValueError, match="This projector needs a prompt"):
        pipe()
    with pytest.raises(ValueError, match="one for each of the 2 images, got 3"):
        pipe.project(pictures(), ["a", "b", "c"])
    assert len(pipe(["a a", "b b"], batch_size=2).images) == 4


class Subclass(UNet2DConditionModel):
    """Stands for the UNets of other packages."""


@each
@pytest.mark.parametrize("make", ["from_pipe", "parameters", "timestep"])
def test_a_second_pipeline_of_the_same_components(name: str, make: str) -> None:
    pipe = build(name)
    if make == "from_pipe":
        other = dx.SIGNPipeline.from_pipe(pipe)
    elif make == "parameters":
        other = dx.SIGNPipeline(**pipe.components, **pipe.parameters)
    else:
        other = dx.SIGNPipeline(**pipe.components, timestep=pipe.config.timestep)
    assert other.components == pipe.components
    assert other.config.timestep == pipe.config.timestep
    call = {**texts(name, 2), "num_inference_steps": 2, "output_type": "pt"}
    first, second = (p(**call, generator=tiny.generators(2)).images for p in (pipe, other))
    assert torch.equal(first, second)


def test_a_component_of_a_subclass_is_taken_over() -> None:
    pipe = build("sd")
    pipe.unet = Subclass.from_config(pipe.unet.config)
    assert dx.SIGNPipeline.from_pipe(pipe).unet is pipe.unet


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"constant `timestep`, got None.*SIGNPipeline.from_pipe\(pipe\)"):
        dx.SIGNPipeline(**build("sd").components)
    with pytest.raises(ValueError, match="time-conditional diffusion model, not a projector"):
        dx.SIGNPipeline.from_pipe(tiny.build("ddpm"))
    with pytest.raises(ValueError, match=r"for source: .*Use SIGNPipeline.from_pipe\(pipe\) instead"):
        DiffusionPipeline.from_pipe(
            build("ddpm"), custom_pipeline=str(ROOT / "pipelines/sign"), trust_remote_code=True
        )
