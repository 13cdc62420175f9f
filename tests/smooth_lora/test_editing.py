"""Editing by a change of the prompt on the way."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)

from diffusers_ext.core.pipeline import initial_noise
from diffusers_ext.core.prompts import encode_prompts
from diffusers_ext.smooth_lora.editing import edit
from tests import families, tiny

STEPS = 5
CALL: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "pt"}
FLUX: dict[str, Any] = {"height": 8, "width": 8, "max_sequence_length": 16}
SOURCE, TARGET = ["a aaa", "a bbb"], ["a ccc", "a ddd"]
each = pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(name: str, prompts: list[str], guidance_scale: float) -> torch.Tensor:
    pipe = tiny.build(name)
    kind = FlowMatchEulerDiscreteScheduler if name == "sd3" else DDIMScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, clip_sample=False)
    return pipe(prompts, latents=noise(), height=8, width=8, guidance_scale=guidance_scale, **CALL).images


@each
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_no_strength_redraws_and_full_strength_draws_the_target(name: str, guidance_scale: float) -> None:
    pipe = tiny.build(name)
    before = pipe.scheduler
    options = {"latents": noise(), "guidance_scale": guidance_scale, **CALL}
    kept, new = (edit(pipe, SOURCE, TARGET, strength=s, **options).images for s in (0.0, 1.0))
    assert pipe.scheduler is before
    # Embeddings given directly: rounding.
    assert torch.allclose(kept, drawn(name, SOURCE, guidance_scale), atol=1e-4)
    assert torch.allclose(new, drawn(name, TARGET, guidance_scale), atol=1e-4)
    half = edit(pipe, SOURCE, TARGET, strength=0.6, **options).images
    assert min((half - other).abs().max() for other in (kept, new)) > 3e-4  # more than rounding


def test_unconditional_embeddings_of_every_step_are_used() -> None:
    pipe = tiny.build("sd")
    empty = encode_prompts(pipe, SOURCE)["negative_prompt_embeds"]
    options = {"latents": noise(), "guidance_scale": 4.0, "strength": 0.6, **CALL}
    plain = edit(pipe, SOURCE, TARGET, **options).images
    same = edit(pipe, SOURCE, TARGET, null_embeds=empty.expand(STEPS, *empty.shape), **options).images
    assert torch.equal(same, plain)
    others = empty.expand(STEPS, *empty.shape).clone()
    others[-1] += 1  # the last step alone
    assert not torch.equal(edit(pipe, SOURCE, TARGET, null_embeds=others, **options).images, plain)


def test_the_steps_are_those_of_the_schedule() -> None:
    """With `sigmas=`, their number is not `num_inference_steps`."""
    pipe = families.build("flux")
    sigmas = [1.0, 0.8, 0.6, 0.3]
    latents = initial_noise(pipe, {**FLUX, "prompt": SOURCE, "generator": tiny.generators(2)})
    options = {"latents": latents, "sigmas": sigmas, "output_type": "pt", **FLUX}
    kept, half, new = (
        edit(pipe, SOURCE, TARGET, strength=strength, **options).images for strength in (0.0, 0.5, 1.0)
    )
    assert torch.equal(kept, pipe(SOURCE, **options).images)
    assert torch.equal(new, pipe(TARGET, **options).images)
    assert min(float((half - other).abs().max()) for other in (kept, new)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [lambda net: torch.compile(net, backend="eager"), "in place"])
def test_a_compiled_network(compiled: Any) -> None:
    pipe, plain = tiny.build("sd"), tiny.build("sd")
    if compiled == "in place":
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = compiled(pipe.unet)
    options = {"latents": noise(), "strength": 0.6, **CALL}
    wanted = edit(plain, SOURCE, TARGET, **options).images
    assert torch.equal(edit(pipe, SOURCE, TARGET, **options).images, wanted)
    assert torch.equal(edit(pipe, SOURCE, TARGET, **options).images, wanted)


def test_another_pipeline_uses_the_same_network_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.build("sd")
    other: Any = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = EulerDiscreteScheduler()
    other.set_progress_bar_config(disable=True)
    call = {"prompt": SOURCE, "latents": noise(), "height": 8, "width": 8, **CALL}
    wanted = other(**call).images
    wanted_edit = edit(pipe, SOURCE, TARGET, latents=noise(), strength=0.6, **CALL).images
    found = []
    step = DDIMScheduler.step

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        with ThreadPoolExecutor(1) as threads:
            found.append(threads.submit(lambda: other(**call).images).result())
        return step(*args, **kwargs)

    monkeypatch.setattr(DDIMScheduler, "step", interrupted)
    edited = edit(pipe, SOURCE, TARGET, latents=noise(), strength=0.6, **CALL).images
    assert torch.equal(edited, wanted_edit)
    assert len(found) == 7  # two steps, and all five of the second call
    assert all(torch.equal(images, wanted) for images in found)


def test_packed_noise_needs_the_size_of_its_image() -> None:
    pipe = families.build("flux")
    latents = torch.randn(2, 32, 16)  # of 8 × 16, of 16 × 8, or of 4 × 32 pixels
    short = {key: value for key, value in FLUX.items() if key not in ("height", "width")}
    with pytest.raises(ValueError, match=r"are packed .* give height= and width="):
        edit(pipe, SOURCE, TARGET, latents=latents, **short)
    with pytest.raises(ValueError, match=r"are packed .* give width="):
        edit(pipe, SOURCE, TARGET, latents=latents, height=8, **short)
    with pytest.raises(
        ValueError, match=r"of 8 × 8 pixels from latents of shape \(2, 16, 16\), got \(2, 32, 16\)"
    ):
        edit(pipe, SOURCE, TARGET, latents=latents, **FLUX)
    shapes = [
        edit(pipe, SOURCE, TARGET, latents=latents, **short, height=h, width=w, output_type="pt").images.shape
        for h, w in ((8, 16), (16, 8))
    ]
    assert shapes == [(2, 3, 8, 16), (2, 3, 16, 8)]


def test_refusals() -> None:
    pipe = tiny.build("sd")
    plain = tiny.images(pipe, "sd", 2)
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got 1.2"):
        edit(pipe, SOURCE, TARGET, latents=noise(), strength=1.2)
    with pytest.raises(ValueError, match="one for each of the 2 rows of the latents, got 3"):
        edit(pipe, ["a", "b", "c"], TARGET, latents=noise())
    with pytest.raises(ValueError, match="made for 3 steps with guidance, got num_inference_steps 5"):
        edit(pipe, SOURCE, TARGET, latents=noise(), null_embeds=torch.zeros(3, 2, 77, 16), **CALL)
    for name, value in {
        "num_images_per_prompt": 2,
        "callback_on_step_end": lambda *_: {},
        "prompt_embeds": torch.zeros(2, 77, 16),
    }.items():
        with pytest.raises(ValueError, match=f"edit does not take {name}="):
            edit(pipe, SOURCE, TARGET, latents=noise(), **{name: value})
    with pytest.raises(ValueError, match="edit does not take prompt_2="):
        edit(tiny.build("sdxl"), SOURCE, TARGET, latents=noise(), prompt_2="a")
    with pytest.raises(ValueError, match="image of height 8, got 16"):
        edit(pipe, SOURCE, TARGET, latents=noise(), height=16)
    with pytest.raises(ValueError, match=r"latents of shape \(2, 4, 8, 8\), got \(2, 3, 8, 8\)"):
        edit(pipe, SOURCE, TARGET, latents=noise()[:, :3])
    with pytest.raises(ValueError, match="first 2 steps of StableDiffusionPipeline come out differently"):
        edit(pipe, SOURCE, TARGET, latents=noise(), eta=1.0, strength=0.6, **CALL)
    distilled = tiny.build("sd")
    distilled.scheduler = LCMScheduler()
    with pytest.raises(ValueError, match="LCMScheduler belongs to a model that is distilled"):
        edit(distilled, SOURCE, TARGET, latents=noise())
    assert torch.equal(tiny.images(pipe, "sd", 2), plain)


def test_options_of_the_pipeline() -> None:
    pipe = tiny.build("sdxl")
    options = {"latents": noise(), "strength": 0.6, **CALL}
    plain = edit(pipe, SOURCE, TARGET, **options).images
    assert torch.equal(edit(pipe, SOURCE, TARGET, return_dict=False, **options)[0], plain)
    for change in ({"negative_prompt": "a zzz"}, {"clip_skip": 1}, {"guidance_scale": 2.0}):
        assert not torch.equal(edit(pipe, SOURCE, TARGET, **change, **options).images, plain)
    arrays = edit(pipe, SOURCE, TARGET, **{**options, "output_type": "np"}).images
    assert torch.equal(torch.from_numpy(arrays).movedim(-1, 1), plain)


@pytest.mark.parametrize("name", ["flux", "sd3", "zimage", "qwen"])
def test_one_negative_prompt_is_that_of_every_image(name: str) -> None:
    pipe = families.build(name)
    call = families.inputs(name, 2, steps=2) | {"negative_prompt": ["zz", "zz"]}
    target = [f"{text} b" for text in call["prompt"]]
    latents = initial_noise(pipe, {**_without(call, "output_type"), "generator": tiny.generators(2)})
    options = {**_without(call, "prompt"), "latents": latents, "strength": 0.5}
    each = edit(pipe, call["prompt"], target, **options).images
    assert torch.equal(edit(pipe, call["prompt"], target, **options | {"negative_prompt": "zz"}).images, each)
    assert not torch.equal(
        edit(pipe, call["prompt"], target, **options | {"negative_prompt": "y"}).images, each
    )
    with pytest.raises(ValueError, match="one for each of the 2 rows of the latents, got 3"):
        edit(pipe, call["prompt"], target, **options | {"negative_prompt": ["a", "b", "c"]})


def _without(call: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in call.items() if key != name}
