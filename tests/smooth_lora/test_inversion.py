"""Inversion on the embedded text-to-image model: real pictures, real prompts, few steps."""

import contextlib
import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DiffusionPipeline

from diffusers_ext.core.images import encode_images
from diffusers_ext.core.prompts import encode_prompts
from diffusers_ext.core.schedules import inverse_scheduler
from diffusers_ext.smooth_lora import inversion
from diffusers_ext.smooth_lora.inversion import ddim_invert
from diffusers_ext.smooth_lora.null_text import null_text_invert, reconstruct
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.embedded import card_dir
from tests import families, tiny

STEPS = 10


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"))
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, list[str]]:
    pictures, prompts = fashion_scenes.scene_arrays(fashion_scenes.SAMPLE_DIR, "test", 3, seed=0)
    return pictures.astype(np.float32) / 255, prompts


@pytest.fixture(scope="module")
def latents(pipe: Any, scenes: Any) -> torch.Tensor:
    return encode_images(pipe, scenes[0])


def redraw(pipe: Any, noise: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    scheduler = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(scheduler.config)
    call: dict[str, Any] = {"height": 32, "width": 64, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    result = pipe(prompts, latents=noise, output_type="latent", **call).images
    pipe.scheduler = scheduler
    return result


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().mean())


def test_pictures_and_latents_go_together(pipe: Any, scenes: Any, latents: torch.Tensor) -> None:
    assert latents.shape == (3, 4, 8, 16)
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    picture = torch.from_numpy(scenes[0]).movedim(-1, 1)
    assert error(decoded, picture) < 0.01  # the autoencoder's own error
    assert torch.equal(encode_images(pipe, picture), latents)


def test_ddim_inversion_is_the_inverse_schedulers_run(pipe: Any, scenes: Any, latents: torch.Tensor) -> None:
    before = pipe.scheduler
    noise = ddim_invert(pipe, latents, scenes[1], num_inference_steps=STEPS)
    assert pipe.scheduler is before
    scheduler: Any = DDIMInverseScheduler.from_config(before.config, clip_sample=False)
    scheduler.set_timesteps(STEPS)
    text, x = encode_prompts(pipe, scenes[1])["prompt_embeds"], latents
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t, text).sample, t, x).prev_sample
    assert torch.allclose(noise, x, atol=1e-3)
    again = redraw(pipe, noise, scenes[1])
    other = redraw(pipe, torch.randn_like(noise), scenes[1])
    assert error(again, latents) < 0.25 * error(other, latents)


@pytest.mark.slow
def test_null_text_inversion_redraws_under_guidance(pipe: Any, scenes: Any, latents: torch.Tensor) -> None:
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "progress": False}
    found = null_text_invert(pipe, latents, scenes[1], **options)
    kept = null_text_invert(pipe, latents, scenes[1], num_inner_steps=0, **options)
    assert found.null_embeds.shape == (STEPS, 3, *kept.prompt_embeds.shape[1:])
    assert torch.equal(kept.null_embeds[0], kept.null_embeds[-1])
    errors = []
    for inverted in (found, kept):
        redrawn = reconstruct(pipe, inverted, output_type="latent").images
        # The optimisation's last state is what the pipeline arrives at.
        assert error(redrawn, latents) == pytest.approx(float(inverted.losses[-1]), rel=1e-2)
        errors.append(error(redrawn, latents))
    assert errors[0] < 0.5 * errors[1]
    assert not found.null_embeds.requires_grad
    assert all(p.grad is None for p in pipe.unet.parameters())


# How the networks are told the time: 1000σ, σ, or 1 − σ of a flow; or the timestep.
TIMES: dict[str, Any] = {
    **dict.fromkeys(("sd", "sd2", "pixart", "hunyuan-dit"), None),
    **dict.fromkeys(("sd3", "sana", "kandinsky5"), lambda t: t / 1000),
    **dict.fromkeys(("flux", "flux2", "flux2-klein", "qwen", "auraflow", "chroma"), lambda t: t),
    **dict.fromkeys(("zimage", "lumina2"), lambda t: 1 - t),
    "cogview4": "of the schedule",  # it is told the time before the shift
}
SPREAD = 0.5  # the standard deviation of the Gaussian data


def answer_as_gaussian(name: str, pipe: Any) -> None:
    """Replaces the network's output with the exact prediction for independent normal data of this spread."""
    network = families.denoisers(pipe, name)[0]

    def exact(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        given = {**dict(zip(inspect.signature(type(module).forward).parameters, (None, *args))), **kwargs}
        x = next(given[key] for key in ("sample", "hidden_states", "x") if key in given)
        t = float(torch.as_tensor(next(given[key] for key in ("timestep", "t") if key in given)).flatten()[0])
        sign = -1 if name in ("zimage", "lumina2") else 1
        if TIMES[name] is None:
            a2 = float(pipe.scheduler.alphas_cumprod[int(t)])
            mean = a2**0.5 * SPREAD**2 / (a2 * SPREAD**2 + 1 - a2)  # E[x₀] = mean · x
            factor = (1 - a2**0.5 * mean) / (1 - a2) ** 0.5  # E[ε] = factor · x
            if pipe.scheduler.config.prediction_type == "v_prediction":
                factor = a2**0.5 * factor - (1 - a2) ** 0.5 * mean
        else:
            sigma = TIMES[name](t) if callable(TIMES[name]) else _level(pipe.scheduler, t)
            factor = (sigma - (1 - sigma) * SPREAD**2) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
        return _like(output, x, sign * factor)

    network.register_forward_hook(exact, with_kwargs=True)


def _level(inverse: Any, t: float) -> float:
    """The level that the step at this time goes to."""
    return float(inverse.sigmas[inverse.timesteps.tolist().index(t) + 1])


def _like(output: Any, x: Any, factor: float) -> Any:
    if isinstance(x, list):
        return ([factor * row for row in x],)
    made = output[0]
    value = factor * x
    if made.shape[1] == 2 * value.shape[1]:  # the network learned a variance
        value = torch.cat([value, torch.zeros_like(value)], 1)
    assert made.shape == value.shape
    return (value,) if isinstance(output, tuple) else type(output)(sample=value)


@pytest.mark.parametrize("name", TIMES)
def test_normal_data_are_inverted_to_their_own_shape_of_unit_variance(name: str) -> None:
    """The closed form: the probability-flow path of x₀ is x₀ times the spread of all noisy states."""
    pipe = families.build(name)
    answer_as_gaussian(name, pipe)
    channels, height, width = (4, 8, 8) if name == "kandinsky5" else families.latent_shape(name)
    latents = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    call = {key: v for key, v in families.FAMILIES[name].call.items() if key not in ("height", "width")}
    noise = ddim_invert(pipe, latents, "a", num_inference_steps=100, **call)
    grid = latents.unsqueeze(2).movedim(1, -1) if name == "kandinsky5" else latents
    if name in ("flux", "qwen", "chroma"):
        grid = _packed(latents)
    scale = 1 / SPREAD
    if TIMES[name] is None:
        scheduler = inverse_scheduler(pipe.scheduler)
        scheduler.set_timesteps(100)
        start, end = (
            (a2 * SPREAD**2 + 1 - a2) ** 0.5
            for a2 in (
                float(scheduler.initial_alpha_cumprod),
                float(scheduler.alphas_cumprod[int(scheduler.timesteps[-1])]),
            )
        )
        scale = end / start
    assert noise.shape == grid.shape
    # One hundred steps of first order, which Kandinsky's shift of 7 makes large at the end.
    assert torch.allclose(noise, scale * grid, rtol=0.1 if name == "kandinsky5" else 0.03, atol=1e-4)


def _packed(latents: torch.Tensor) -> torch.Tensor:
    """Token (i, j) holds the 2 × 2 patch at (2i, 2j), channel by channel."""
    _, _, height, width = latents.shape
    tokens = [
        latents[:, :, i : i + 2, j : j + 2].flatten(1)
        for i in range(0, height, 2)
        for j in range(0, width, 2)
    ]
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("name", ["sana", "cogview4", "flux", "flux2", "kandinsky5", "pixart", "zimage"])
def test_the_size_of_the_image_follows_from_the_latents(name: str) -> None:
    pipe = families.build(name)
    if name == "kandinsky5":
        pipe.resolutions = [(64, 64), (128, 64)]  # width and height
    channels, height, width = (4, 8, 8) if name == "kandinsky5" else families.latent_shape(name)
    wide = torch.zeros(1, channels, height, 2 * width)
    call = {key: v for key, v in families.FAMILIES[name].call.items() if key not in ("height", "width")}
    options = {"num_inference_steps": 2, **call}
    noise = ddim_invert(pipe, wide, "a", **options)
    one = families.inputs(name)
    size = {"height": one["height"], "width": 2 * one["width"]}
    images = pipe(prompt="a", latents=noise, **options, **size, output_type="pt", return_dict=False)[0]
    assert images.shape[-2:] == (size["height"], size["width"])
    with pytest.raises(ValueError, match=f"image of width {size['width']}, got {one['width']}"):
        ddim_invert(pipe, wide, "a", **options, width=one["width"])
    if name not in ("sana", "flux2"):
        with pytest.raises(ValueError, match="multiples of 2, got"):
            ddim_invert(pipe, wide[..., 1:], "a", **options)
    if name == "kandinsky5":
        pipe.resolutions = [(64, 64)]
        with pytest.raises(ValueError, match=r"of 64 × 128 pixels from latents of shape"):
            ddim_invert(pipe, wide, "a", **options)


@pytest.mark.parametrize("name", families.NAMES)
def test_guidance_is_off_unless_it_is_asked_for(name: str) -> None:
    pipe = families.build(name)
    with contextlib.suppress(ValueError):
        inversion.check_pipeline(pipe)
        latents = torch.zeros(1, *families.latent_shape(name)) + 0.1
        latents = torch.full((1, 4, 8, 8), 0.1) if name == "kandinsky5" else latents
        family = families.FAMILIES[name]
        call = {key: v for key, v in family.call.items() if key not in ("height", "width", "pag_scale")}
        call |= family.rows(range(1), False) if family.rows else {}
        rows = []
        network = families.denoisers(pipe, name)[0]
        network.register_forward_hook(lambda module, args, output: rows.append(_rows(output)))
        ddim_invert(pipe, latents, "a", num_inference_steps=2, **call)
        assert rows == [1, 1]


def _rows(output: Any) -> int:
    return len(output[0])


@pytest.mark.parametrize("name", ["sd", "sd3", "sana", "zimage", "lumina2"])
def test_the_scale_is_the_weight_of_the_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = families.build(name)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {key: v for key, v in families.FAMILIES[name].call.items() if key not in ("height", "width")}
    options |= {"cfg_normalization": False} if name == "lumina2" else {}
    outputs, guided = [], []
    kind = type(inverse_scheduler(pipe.scheduler))
    step = kind.step

    def note(scheduler: Any, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        guided.append(output)
        return step(scheduler, output, *args, **kwargs)

    monkeypatch.setattr(kind, "step", note)
    network = families.denoisers(pipe, name)[0]
    network.register_forward_hook(lambda module, args, output: outputs.append(output))
    ddim_invert(pipe, latents, "a", guidance_scale=3.0, num_inference_steps=2, **options)
    # In one call or two; Z-Image and Lumina 2 have the prompt's first and change the sign.
    rows = [row for output in outputs for row in output[0]][:2]
    free, conditional = rows[::-1] if name in ("zimage", "lumina2") else rows
    wanted = free + 3 * (conditional - free)
    wanted = -wanted if name in ("zimage", "lumina2") else wanted
    assert torch.allclose(guided[0].squeeze(), wanted.squeeze(), atol=1e-4)


def test_refusals(pipe: Any, scenes: Any, latents: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one for each of the 3 rows of the latents, got 2"):
        ddim_invert(pipe, latents, scenes[1][:2])
    with pytest.raises(
        ValueError, match=r"of 32 × 64 pixels from latents of shape \(3, 4, 8, 16\), got \(3, 3, 8"
    ):
        ddim_invert(pipe, latents[:, :3], scenes[1])
    with pytest.raises(ValueError, match=r"Expected latents \(B, C, H, W\), got \(4, 8, 16\)"):
        ddim_invert(pipe, latents[0], "a")
    for name in ("num_images_per_prompt", "output_type", "return_dict"):
        with pytest.raises(ValueError, match=f"ddim_invert does not take {name}="):
            ddim_invert(pipe, latents, scenes[1], **{name: 2})
    with pytest.raises(ValueError, match="image of width 64, got 32"):
        ddim_invert(pipe, latents, scenes[1], width=32)
    other = tiny.build("sd")
    other.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod"):
        ddim_invert(other, latents, scenes[1])
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline does not have\. Load"):
        null_text_invert(tiny.build("sdxl"), latents, scenes[1])
    with pytest.raises(ValueError, match=r"optimizes in float32, and .* has weights of torch\.float16"):
        null_text_invert(tiny.build("sd", dtype=torch.float16), latents, scenes[1])
    cast = tiny.build("sd")
    cast.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"has weights of torch\.float8_e4m3fn: load it in float32"):
        null_text_invert(cast, latents, scenes[1])
    with pytest.raises(ValueError, match="learning_rate above 0"):
        null_text_invert(pipe, latents, scenes[1], learning_rate=0.0)
    for wrong in (scenes[0][0], 2 * scenes[0], scenes[0][..., :2], np.full((1, 8, 8, 3), np.nan, np.float32)):
        with pytest.raises(ValueError, match="Expected images"):
            encode_images(pipe, wrong)
    with pytest.raises(ValueError, match="multiples of 4 high and wide, got 32 × 63"):
        encode_images(pipe, scenes[0][:, :, :63])
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
