"""The facts about families, against what their pipelines do."""

import copy
import functools
from typing import Any, get_args

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_ext.core.autoencoders import decode_latents, vae_of
from diffusers_ext.core.families import (
    Guidance,
    Layout,
    check_starts_from_noise,
    denoiser_of,
    denoisers_of,
    family_of,
    from_grid,
    guidance_of,
    loop_shape,
    to_grid,
)
from diffusers_ext.core.hooks import add_hook
from diffusers_ext.core.pipeline import (
    Stop,
    final_latents,
    given_latents,
    initial_noise,
    model_output,
    running_call,
)
from tests import families, tiny

pytestmark = pytest.mark.filterwarnings("ignore")

PIPELINES = [name for name in families.NAMES if not families.FAMILIES[name].modular]


def call_of(name: str, batch: int = 1, guided: bool = True, **changes: Any) -> dict[str, Any]:
    """A call without `output_type`."""
    call = {**families.inputs(name, batch, guided=guided), "generator": families.generators(batch), **changes}
    return {key: value for key, value in call.items() if key != "output_type"}


# --- layouts ---


@st.composite
def grids(draw: Any) -> tuple[Layout, Tensor]:
    layout = draw(st.sampled_from(get_args(Layout)))
    channels, frames, height, width = (draw(st.integers(1, 4)) for _ in range(4))
    even = 2 if layout == "patches" else 1
    video = draw(st.booleans()) and layout != "patches"
    # A video of one frame would be an image.
    sizes = (
        (frames + 1, height, width) if video or layout == "frames first" else (even * height, even * width)
    )
    shape = (draw(st.integers(1, 3)), channels, *sizes)
    return layout, torch.arange(float(torch.Size(shape).numel())).reshape(shape)


@given(grids())
@settings(max_examples=200, deadline=None)
def test_layouts_are_there_and_back(case: tuple[Layout, Tensor]) -> None:
    layout, x = case
    loop = from_grid(layout, x)
    assert loop.shape == (len(x), *loop_shape(layout, tuple(x.shape[1:])))
    assert torch.equal(to_grid(layout, loop, tuple(x.shape[1:])), x)
    # A view or a permutation: no value is lost.
    assert torch.equal(loop.flatten().sort().values, x.flatten())


def test_layouts_are_those_of_diffusers() -> None:
    image, video = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 3, 6, 8)
    flux = diffusers.FluxPipeline._pack_latents(image, 2, 4, 6, 8)
    assert torch.equal(from_grid("patches", image), flux)
    assert torch.equal(from_grid("positions", image), diffusers.Flux2Pipeline._pack_latents(image))
    assert torch.equal(from_grid("positions", video), diffusers.LTXPipeline._pack_latents(video))


def test_latents_of_another_size_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"latents have shape \(16, 16\).* of shape \(4, 8, 10\) has \(20, 16\)"
    ):
        to_grid("patches", torch.zeros(1, 16, 16), (4, 8, 10))
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\).* of shape \(4, 8, 4\)"):
        to_grid("grid", torch.zeros(1, 4, 8, 8), (4, 8, 4))


SIZED = [name for name in PIPELINES if "width" in families.FAMILIES[name].call]


@pytest.mark.parametrize("name", SIZED)
def test_wide_images_keep_their_height_and_width(name: str) -> None:
    pipe = families.build(name)
    width = 2 * families.FAMILIES[name].call["width"]
    if name == "kandinsky5":
        pipe.resolutions = [(width, width // 2)]
    if name == "sd-controlnet":
        wide = {"width": width, "image": torch.rand(2, 3, width // 2, width)}
    else:
        wide = {"width": width}
    with torch.no_grad():
        latents = final_latents(pipe, call_of(name, 2, **wide))
    images = families.images(pipe, name, 2, **wide)
    shown = (decode_latents(pipe, latents) / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(shown.movedim(1, 2) if shown.ndim == 5 else shown, images, atol=1e-4)
    assert images.shape[-1] == 2 * images.shape[-2]
    assert latents.shape[-1] == 2 * latents.shape[-2]


# --- the call's latents ---

FROM_NOISE = [n for n in PIPELINES if n not in ("sdxl-img2img", "dit", "ldm", "ddpm")]


@pytest.mark.parametrize("name", FROM_NOISE)
def test_latents_in_the_grid_layout_are_given_to_a_call(name: str) -> None:
    pipe, call = families.build(name), call_of(name, 2)
    family = family_of(pipe)
    with torch.no_grad():
        final = final_latents(pipe, call)
        grid = torch.randn(final.shape, generator=torch.Generator().manual_seed(3))
        latents = given_latents(pipe, grid)
        # A call takes them and starts from them.
        assert torch.allclose(initial_noise(pipe, {**call, "latents": latents.clone()}), latents, atol=1e-6)
        output = model_output(pipe, latents, call)
    assert output.shape == latents.shape
    assert latents.shape[1:] == (
        final.shape[1:] if family.unpacked else loop_shape(family.layout, tuple(final.shape[1:]))
    )


@pytest.mark.parametrize("name", ["sdxl-img2img", "dit", "ldm", "ddpm", "modular-sdxl"])
def test_pipelines_without_noise_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"has no prepare_latents|starts from an image"):
        check_starts_from_noise(families.build(name))


# --- guidance ---


def first_output(pipe: Any, call: dict[str, Any]) -> Tensor:
    """What the scheduler is given first, without rows that a pipeline adds for guidance."""
    found = []

    def read(given: dict[str, Any], result: Any) -> Any:
        found.append(given["model_output"].float())
        raise Stop

    handle = add_hook(pipe.scheduler, "step", read)
    try:
        with torch.no_grad(), pytest.raises(Stop):
            pipe(**call)
    finally:
        handle.remove()
    return found[0][:1]


# Prompt and negative prompt of one length, so that padding has no part in it.
TEXT, NEGATIVE = "a aaa", "b bbb"
GUIDED = [name for name in PIPELINES if families.FAMILIES[name].free_at is not None and name != "ddpm"]


def plain_call(name: str, text: str, present: bool = True) -> dict[str, Any]:
    """A call of one image without arguments of guidance; the prompt is absent for `present=False`."""
    family = families.FAMILIES[name]
    call = call_of(name, guided=False)
    call = {key: value for key, value in call.items() if key not in {**family.guided, **family.unguided}}
    call = {**call, "prompt": [text]} if family.prompted else call
    if name == "sd-pag":
        call["pag_scale"] = 0.0
    if name == "lumina2":
        call["cfg_normalization"] = False
    if name == "sd-ip-adapter" and not present:
        call["ip_adapter_image_embeds"] = [0 * part for part in call["ip_adapter_image_embeds"]]
    if name == "dit" and not present:
        call["class_labels"] = [1000]  # no class
    return call


@pytest.mark.parametrize("name", GUIDED)
def test_the_weight_of_guidance_is_that_of_the_outputs(name: str) -> None:
    """The output is u + w(c − u), where c and u are those of calls without guidance."""
    pipe = families.build(name)
    guidance = guidance_of(pipe)
    takes_negative = name not in ("flux2-klein", "ldm", "dit")
    outputs = {}
    for w in (1.0, 2.0, 4.0):
        call = {**plain_call(name, TEXT), **guidance.call(w)}
        if takes_negative and w > 1:
            call["negative_prompt"] = [NEGATIVE]
        if name == "sd-ip-adapter" and w > 1:
            call |= families._image_embeds(range(1), True)
        assert guidance.weight(call) == pytest.approx(w)
        outputs[w] = first_output(pipe, call)
    without = plain_call(name, NEGATIVE if takes_negative else "", present=False)
    if name == "lumina2":  # its negative prompts have no system prompt
        embeds, mask = pipe._get_gemma_prompt_embeds([NEGATIVE], max_sequence_length=32)
        without |= {"prompt": None, "prompt_embeds": embeds, "prompt_attention_mask": mask}
    u, c = first_output(pipe, {**without, **guidance.call(1.0)}), outputs[1.0]
    assert not torch.allclose(u, c, atol=1e-3)
    for w in (2.0, 4.0):
        expected = u + w * (c - u)
        if name == "qwen":  # every token gets the norm that it has without guidance
            expected = expected * c.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True)
        assert torch.allclose(outputs[w], expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", GUIDED)
def test_a_weight_of_one_gives_the_unguided_images(name: str) -> None:
    pipe = families.build(name)
    guidance, rows = guidance_of(pipe), []
    family = families.FAMILIES[name]
    own = {key: value for key, value in call_of(name, 2, guided=False).items() if key not in family.unguided}
    handle = denoiser_of(pipe).register_forward_hook(lambda module, args, output: rows.append(1))
    with torch.no_grad():
        unguided = families.images(pipe, name, 2, guided=False)
        counts = [len(rows)]
        result: Any = pipe(
            **{**own, "generator": families.generators(2), **guidance.call(1.0), "output_type": "pt"}
        )
        counts.append(len(rows) - counts[0])
    handle.remove()
    assert torch.equal(torch.as_tensor(getattr(result, family.output)).float(), unguided)
    assert counts[0] == counts[1]
    assert guidance.weight(families.inputs(name, guided=False)) == 1.0
    scale = next(v for v in family.guided.values() if isinstance(v, float))
    assert guidance.weight(families.inputs(name)) == pytest.approx(scale + 1 - float(family.free_at or 0))


@pytest.mark.parametrize("name", ["flux", "flux-schnell", "qwen"])
def test_true_guidance_has_a_negative_prompt_for_every_prompt(name: str) -> None:
    pipe = families.build(name)
    call = {k: v for k, v in call_of(name, 2, guided=False).items() if k != "generator"}
    weighted = guidance_of(pipe).call(3.0)
    found = [
        pipe(**{**call, **given, "generator": families.generators(2), "output_type": "pt"}).images
        for given in (weighted, {**weighted, "negative_prompt": [" ", " "]})
    ]
    assert torch.allclose(*found, atol=1e-5)


def test_guidance_that_is_an_input_of_the_network() -> None:
    found = {
        name: guidance_of(families.build(name)) for name in ("lcm", "flux", "flux2", "flux-schnell", "ddpm")
    }
    assert {name: g.embedded for name, g in found.items()} == {
        "lcm": "guidance_scale",
        "flux": "guidance_scale",
        "flux2": "guidance_scale",
        "flux-schnell": None,
        "ddpm": None,
    }
    assert found["lcm"].argument is found["flux2"].argument is found["ddpm"].argument is None
    assert found["lcm"].call(1.0) == {}
    with pytest.raises(ValueError, match=r"has no classifier-free guidance, got a scale of 7\.5"):
        found["lcm"].call(7.5)
    distilled = families.build("flux2-klein")
    distilled.register_to_config(is_distilled=True)
    assert guidance_of(distilled).argument is None


def test_guidance_that_is_off_without_a_negative_prompt() -> None:
    guidance = guidance_of(families.build("flux"))
    assert guidance == Guidance("true_cfg_scale", 1.0, True, "guidance_scale")
    assert guidance.weight({"true_cfg_scale": 4.0, "negative_prompt": None}) == 1.0
    assert guidance.weight({"true_cfg_scale": 4.0, "negative_prompt": "z"}) == 4.0
    assert guidance.weight({"true_cfg_scale": 4.0, "negative_prompt_embeds": torch.zeros(1)}) == 4.0
    assert guidance.weight({"guidance_scale": 4.0}) == 1.0
    assert guidance.call(4.0) == {"true_cfg_scale": 4.0, "negative_prompt": " "}


# --- which denoiser ---


class Another(torch.nn.Module):
    """A denoiser that nobody knows."""


class Own(diffusers.FluxTransformer2DModel):
    """Someone's own class."""


def test_an_unknown_denoiser_is_refused_by_name() -> None:
    pipe = families.build("sd3")
    pipe.transformer = Another()
    with pytest.raises(
        ValueError, match=r"StableDiffusion3Pipeline has a Another, of which the layout.*FAMILIES\["
    ):
        family_of(pipe)
    pipe.transformer = None
    with pytest.raises(ValueError, match="has no unet and no transformer"):
        family_of(pipe)


def test_subclasses_and_compiled_denoisers_are_those_of_their_family() -> None:
    pipe = families.build("flux")
    expected = family_of(pipe)
    config = {**pipe.transformer.config}
    pipe.transformer = torch.compile(pipe.transformer)
    assert family_of(pipe) is expected
    pipe.transformer = Own.from_config(config)
    assert family_of(pipe) is expected
    assert len(denoisers_of(families.build("wan22"))) == 2
    assert len(denoisers_of(families.build("wan"))) == 1


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_has_a_record_and_an_autoencoder(name: str) -> None:
    pipe = families.build(name)
    assert family_of(copy.deepcopy(pipe)) is family_of(pipe)
    assert (vae_of(pipe) is None) == (name == "ddpm")


# --- the call that is running ---


def test_a_running_call_is_the_innermost_of_this_pipeline() -> None:
    pipe, other = tiny.build("sd"), tiny.build("sd", seed=1)
    seen = []

    def look(who: Any, given: dict[str, Any], result: Any) -> Any:
        call = running_call(who)
        assert call is not None
        seen.append((call, call.arguments["guidance_scale"], call.arguments["negative_prompt"]))
        if who is pipe and len(seen) == 1:
            other(**call_of("sd", guidance_scale=2.0))
            assert running_call(other) is None
            assert running_call(pipe) == call
        return result

    for who in (pipe, other):
        add_hook(who, "encode_prompt", functools.partial(look, who))
    pipe(**call_of("sd", guidance_scale=3.0, negative_prompt=["z"]))
    pipe(**call_of("sd", guidance_scale=4.0))
    # A positional argument and a default are arguments too.
    pipe("a", 8, 8, 2)
    scales = [scale for _, scale, _ in seen]
    assert scales == [3.0, 2.0, 4.0, 7.5]
    assert [negative for _, _, negative in seen] == [["z"], None, None, None]
    calls = [call for call, _, _ in seen]
    assert all(a != b for i, a in enumerate(calls) for b in calls[:i])
    assert running_call(pipe) is None
