"""What else projectors are used with: paths between prompts, Smooth-LoRAs, pruned networks; and what is refused on them."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core.noise import noise_path
from diffusers_ext.sign.teacher import untrained_projector
from tests import families, tiny
from tests.sign.test_pipelines import build as with_source
from tests.sign.test_pipelines import pictures

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["a aaa", "b bbb"]
FOLDER = Path(__file__).parents[2] / "pipelines" / "sign"


@cache
def projector(name: str) -> Any:
    """Of a family or of a tiny pipeline; no test may change it."""
    base = tiny.build(name) if name in ("sd", "sdxl") else families.build(name)
    more: dict[str, Any] = {} if name in ("sd", "sdxl") else {"max_sequence_length": 16}
    sign = untrained_projector(base, **more)
    sign.set_progress_bar_config(disable=True)
    return sign


def noises(sign: Any, side: int = 8) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    pixels = {"height": side * sign.vae_scale_factor, "width": side * sign.vae_scale_factor}
    return (
        sign.prepare_latents(2, **pixels, generator=draw)
        if sign.flow
        else sign.prepare_latents(2, generator=draw)
    )


# A mask of padding, pooled vectors, packed latents, and none of them.
@pytest.mark.parametrize("name", ["sd", "sdxl", "flux", "qwen", "sd3"])
def test_a_path_is_the_projector_between_noises_and_encodings(name: str) -> None:
    sign = projector(name)
    latents = noises(sign)
    frames = torch.from_numpy(dx.interpolate(sign, PROMPTS, latents=latents, num_frames=3, progress=False))
    size = {} if sign.flow is None else dict.fromkeys(("height", "width"), 8 * sign.vae_scale_factor)
    ends = sign(PROMPTS, latents=latents, output_type="pt", **size).images
    # The frames are in a batch of another size.
    assert torch.allclose(frames[[0, 2]].movedim(-1, 1), ends, atol=1e-5)
    encoded = sign.encode_prompt(PROMPTS)
    middle = [
        None if v is None else v.any(0)[None] if v.dtype == torch.bool else v.mean(0)[None] for v in encoded
    ]
    path, _ = noise_path(latents, 3)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(sign, "encode_prompt", lambda *_, **__: tuple(middle))
        conditions = sign._conditions("anything", 1)
    with torch.no_grad():
        x = sign.projector(sign.projector.start(path[1:2]), **conditions)
    expected = sign._output(x, "pt", True).images
    assert torch.allclose(frames[1:2].movedim(-1, 1), expected, atol=1e-5)
    assert not torch.allclose(expected, ends[:1], atol=1e-3)


def test_a_smooth_lora_changes_the_path_and_leaves_no_trace(tmp_path: Path) -> None:
    sign = with_source("sd")
    call: dict[str, Any] = {"latents": noises(sign), "num_frames": 3, "progress": False}
    plain = dx.interpolate(sign, PROMPTS, **call)
    save_file(tiny.lora("sd"), tmp_path / "lora.safetensors")
    dx.apply_smooth_lora(sign, tmp_path)
    changed = dx.interpolate(sign, PROMPTS, **call)
    assert abs(changed - plain).max() > 1e-3
    dx.remove_smooth_lora(sign)
    assert (dx.interpolate(sign, PROMPTS, **call) == plain).all()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_prompts_are_encoded_as_by_the_teacher(name: str) -> None:
    sign = projector(name)
    given: dict[str, Any] = {"do_classifier_free_guidance": False}
    if name == "sdxl":
        embeds, _, pooled, _ = tiny.build("sdxl").encode_prompt(PROMPTS, **given)
        found = sign.encode_prompt(PROMPTS, num_images_per_prompt=2)
        own = found[0][::2], found[2][::2]
    else:
        stock = sign.stock_pipeline
        embeds, _, pooled, _ = stock.encode_prompt(PROMPTS, None, None, max_sequence_length=16, **given)
        own = sign.encode_prompt(PROMPTS)[::2]
    assert torch.equal(own[0], embeds)
    assert torch.equal(own[1], pooled)
    with pytest.raises(ValueError, match="do_classifier_free_guidance must be False"):
        sign.encode_prompt(PROMPTS, do_classifier_free_guidance=True)


def test_an_edit_has_a_prompt_for_each_image() -> None:
    sign = projector("sd")
    call: dict[str, Any] = {"strength": 0.5, "num_inference_steps": 2, "output_type": "pt"}
    both = sign.edit(pictures(), None, PROMPTS, generator=tiny.generators(2), **call).images
    alone = [
        sign.edit(pictures()[i : i + 1], None, prompt, generator=generator, **call).images
        for i, (prompt, generator) in enumerate(zip(PROMPTS, tiny.generators(2)))
    ]
    assert torch.allclose(both, torch.cat(alone), atol=1e-4)
    other = sign.edit(pictures(), None, PROMPTS[::-1], generator=tiny.generators(2), **call).images
    assert not torch.allclose(both, other, atol=1e-4)


def _student() -> Any:
    base = tiny.build("sd")
    inputs = dx.PruningPlan(dict(base.unet.config), (("mid.attention",),))
    return untrained_projector(type(base)(**{**base.components, "unet": dx.prune_network(base.unet, inputs)}))


@pytest.mark.parametrize("make", [_student, lambda: projector("sd3")], ids=["pruned student", "flow"])
def test_saved_projectors_load_as_custom_pipelines(make: Any, tmp_path: Path) -> None:
    sign = make()
    size = {} if sign.flow is None else {"height": 8, "width": 8}
    call: dict[str, Any] = {**size, "num_inference_steps": 2, "output_type": "pt"}
    expected = sign(PROMPTS, generator=tiny.generators(2), **call).images
    sign.save_pretrained(tmp_path)
    options: dict[str, Any] = {"custom_pipeline": str(FOLDER), "trust_remote_code": True}
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path, **options)
    assert type(loaded) is dx.SIGNPipeline
    # Weights that lie elsewhere in memory may take another kernel.
    assert torch.allclose(loaded(PROMPTS, generator=tiny.generators(2), **call).images, expected, atol=1e-4)


@pytest.mark.parametrize(
    "use",
    [
        lambda sign: dx.apply_teleport(sign, tiny.gaussian(tiny.LATENT_SHAPES["sd"])),
        lambda sign: dx.apply_golden_noise(sign, tiny.npnet("sd")),
        lambda sign: dx.redenoise(sign, noises(sign), prompt=PROMPTS),
        lambda sign: dx.ddim_invert(sign, noises(sign), PROMPTS),
        lambda sign: dx.edit(sign, "a aaa", "b bbb", latents=noises(sign)),
    ],
    ids=["teleportation", "golden noise", "re-denoising", "inversion", "editing"],
)
def test_what_needs_the_steps_of_a_scheduler_is_refused(use: Any) -> None:
    with pytest.raises(ValueError, match="SIGNPipeline is a projector and takes no steps of its scheduler"):
        use(projector("sd"))
