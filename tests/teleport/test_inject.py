"""Teleportation on whole pipelines, beyond what the shared contract asks."""

import copy
from typing import Any

import diffusers
import pytest
import torch

import diffusers_ext as dx
from diffusers_ext.teleport.apply import hook_count
from tests import tiny

LATENTS = {name: tiny.gaussian(tiny.LATENT_SHAPES[name], rank=6) for name in tiny.NAMES}


def wrapped(name: str, skip: float = 0.4, **options: Any) -> Any:
    """The plain assignment, without `apply_teleport`."""
    pipe = tiny.build(name)
    pipe.scheduler = dx.TeleportScheduler.from_scheduler(pipe.scheduler, LATENTS[name], skip, **options)
    return pipe


@pytest.mark.parametrize("name", tiny.NAMES)
def test_off_is_bit_equal_in_every_pipeline(name: str) -> None:
    plain = tiny.images(tiny.build(name), name, 2)
    assert torch.equal(tiny.images(wrapped(name, 0.0), name, 2), plain)
    assert torch.equal(tiny.images(wrapped(name, 0.13, mean_from="first_call"), name, 2), plain)
    assert torch.equal(tiny.images(dx.apply_teleport(tiny.build(name), LATENTS[name], 0.0), name, 2), plain)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_assignment_equals_apply_or_is_refused(name: str) -> None:
    applied = tiny.build(name)
    assert dx.apply_teleport(applied, LATENTS[name], 0.4) is applied
    pipe = wrapped(name)
    if name in ("sd", "sdxl"):
        assert hook_count(applied) == 0
        assert torch.equal(tiny.images(pipe, name, 2), tiny.images(applied, name, 2))
    else:
        assert hook_count(applied) == 1
        with pytest.raises(ValueError, match="apply_teleport"):
            tiny.images(pipe, name)
        dx.apply_teleport(pipe)
        assert torch.equal(tiny.images(pipe, name, 2), tiny.images(applied, name, 2))
    calls = len(applied.scheduler.timesteps)
    assert calls == tiny.inputs(name)["num_inference_steps"] - applied.scheduler.num_skipped_steps


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_model_is_shown_what_the_scheduler_steps_from(name: str) -> None:
    pipe = dx.apply_teleport(tiny.build(name), LATENTS[name], 0.4)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    seen: list[Any] = []
    stepped: list[Any] = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    inner, real = pipe.scheduler.inner, pipe.scheduler.inner.step

    def step(output: Any, t: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        stepped.append(sample)
        return real(output, t, sample, *args, **kwargs)

    inner.step = step
    tiny.images(pipe, name, 2)
    shown = seen[0]
    if name in ("sd", "sdxl"):  # Euler scales what it shows
        shown = shown * (float(inner.sigmas[pipe.scheduler.num_skipped_steps]) ** 2 + 1) ** 0.5
    assert torch.allclose(shown[:2], stepped[0], atol=1e-4)
    assert torch.equal(shown[:2], shown[-2:])


def test_ddim_pipeline_needs_the_hook_too() -> None:
    base = tiny.build("ddpm")
    pipe = diffusers.DDIMPipeline(base.unet, diffusers.DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    plain = tiny.images(pipe, "ddpm", 2)
    dx.apply_teleport(pipe, LATENTS["ddpm"], 0.4)
    assert not torch.equal(tiny.images(pipe, "ddpm", 2), plain)
    assert torch.equal(tiny.images(dx.remove_teleport(pipe), "ddpm", 2), plain)


@pytest.mark.parametrize(
    "make",
    [
        diffusers.DDIMScheduler,
        diffusers.PNDMScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.LMSDiscreteScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_stable_diffusion_with_other_schedulers(make: Any) -> None:
    pipe = tiny.build("sd")
    pipe.scheduler = make.from_config(pipe.scheduler.config)
    plain = tiny.images(pipe, "sd", 2)
    dx.apply_teleport(pipe, LATENTS["sd"], 0.4)
    assert not torch.equal(tiny.images(pipe, "sd", 2), plain)
    assert torch.equal(tiny.images(dx.remove_teleport(pipe), "sd", 2), plain)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd", diffusers.StableDiffusionImg2ImgPipeline),
        ("sd", diffusers.StableDiffusionInpaintPipeline),
        ("sd3", diffusers.StableDiffusion3Img2ImgPipeline),
    ],
)
@pytest.mark.parametrize("mean_from", ["stats", "first_call"])
def test_image_to_image_is_refused_by_apply(name: str, kind: Any, mean_from: str) -> None:
    more = {"requires_safety_checker": False} if name == "sd" else {}
    pipe = kind(**tiny.build(name).components, **more)
    scheduler, attributes = pipe.scheduler, set(vars(pipe))
    with pytest.raises(ValueError, match=f"{kind.__name__} starts from an image.*text-to-image"):
        dx.apply_teleport(pipe, LATENTS[name], 0.4, mean_from=mean_from)
    assert pipe.scheduler is scheduler
    assert set(vars(pipe)) == attributes


def test_image_to_image_with_a_scheduler_set_by_hand_is_refused_in_the_call() -> None:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **tiny.build("sd").components, requires_safety_checker=False
    )
    pipe.scheduler = dx.TeleportScheduler.from_scheduler(pipe.scheduler, LATENTS["sd"], 0.4)
    inputs = {key: value for key, value in tiny.inputs("sd").items() if key not in ("height", "width")}
    with pytest.raises(ValueError, match="pure noise"):
        pipe(**inputs, image=torch.rand(1, 3, 8, 8), strength=0.5)


def test_prompt_means_in_a_pipeline() -> None:
    pipe = dx.apply_teleport(tiny.build("sd"), LATENTS["sd"], 0.4)
    usual = tiny.images(pipe, "sd", 2)
    means = LATENTS["sd"].mean + torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    pipe.scheduler.set_mean(means)
    told = tiny.images(pipe, "sd", 2)
    assert torch.allclose(told[0], usual[0], atol=1e-5)
    assert not torch.allclose(told[1], usual[1], atol=1e-2)


def test_a_deep_copied_pipeline() -> None:
    pipe = wrapped("sd")
    expected = tiny.images(pipe, "sd")
    assert torch.equal(tiny.images(copy.deepcopy(pipe), "sd"), expected)


def test_replacing_the_scheduler_by_hand() -> None:
    pipe = tiny.build("sd3")
    original, plain = pipe.scheduler, tiny.images(pipe, "sd3")
    dx.apply_teleport(pipe, LATENTS["sd3"], 0.4)
    changed = tiny.images(pipe, "sd3")
    pipe.scheduler = original
    assert torch.equal(tiny.images(pipe, "sd3"), plain)
    dx.apply_teleport(pipe, LATENTS["sd3"], 0.4)
    assert hook_count(pipe) == 1
    assert torch.equal(tiny.images(pipe, "sd3"), changed)


def test_what_apply_refuses() -> None:
    pipe = tiny.build("sd3")
    with pytest.raises(ValueError, match="needs stats"):
        dx.apply_teleport(pipe)
    with pytest.raises(ValueError, match="skip must be"):
        dx.apply_teleport(pipe, LATENTS["sd3"], 1.5)
    assert hook_count(pipe) == 0
    assert "nothing added" in str(dx.summary(pipe))


def test_the_summary_tells_what_is_on() -> None:
    pipe = dx.apply_teleport(tiny.build("flux"), LATENTS["flux"], 0.4)
    tiny.images(pipe, "flux")
    report = str(dx.summary(pipe))
    for part in (
        "FluxPipeline",
        "FlowMatchEulerDiscreteScheduler",
        "skip=0.4",
        "rank 6",
        "1 hook",
        "skipped 3",
    ):
        assert part in report
