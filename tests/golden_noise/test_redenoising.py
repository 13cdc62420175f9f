"""Re-denoising: the closed formula for noise, v and flow predictions, against diffusers' own steps."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler

import diffusers_ext as dx
from diffusers_ext.core.pipeline import model_output
from diffusers_ext.core.schedules import first_order_scheduler, grid_levels
from diffusers_ext.golden_noise.redenoising import displacement_factor, level_below, move
from tests import tiny

SD: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


def ddim(steps: int, **config: Any) -> DDIMScheduler:
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, **config)
    scheduler.set_timesteps(steps)
    return scheduler


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("steps", "factor"), [(10, 0.385), (50, 0.110)])
def test_the_factor_on_stable_diffusions_schedule(steps: int, factor: float) -> None:
    top, below = grid_levels(ddim(steps))[:2]
    assert displacement_factor(top, below) == pytest.approx(factor, abs=5e-4)
    x, guided, plain = draw(0), draw(1), draw(2)
    lower = move(guided, x, top, below, "epsilon")
    back = move(plain, lower, below, top, "epsilon")
    # The formula and the two steps are the same numbers in another order: float32 rounding of values up to ~50.
    assert torch.allclose(back - x, displacement_factor(top, below) * (plain - guided), atol=1e-4)
    assert torch.allclose(move(guided, lower, below, top, "epsilon"), x, atol=1e-4)


@pytest.mark.parametrize("steps", [4, 10, 50])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_step_down_is_ddims_and_the_step_up_is_its_inverse_schedulers(kind: str, steps: int) -> None:
    scheduler = ddim(steps, prediction_type=kind)
    top, below = grid_levels(scheduler)[:2]
    x, output = draw(0), draw(1)
    expected = scheduler.step(output, int(scheduler.timesteps[0]), x).prev_sample
    lower = move(output, x, top, below, kind)
    assert torch.allclose(lower, expected, atol=1e-4)
    inverse: Any = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(steps)
    other = draw(2)
    expected = inverse.step(other, int(scheduler.timesteps[0]), lower).prev_sample
    assert torch.allclose(move(other, lower, below, top, kind), expected, atol=1e-4)


def test_a_flow_moves_by_the_difference_of_velocities() -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    top, below = grid_levels(scheduler)[:2]
    assert top == (0.0, 1.0)
    x, guided, plain = draw(0), draw(1), draw(2)
    lower = move(guided, x, top, below, "flow_prediction")
    assert torch.allclose(lower, scheduler.step(guided, scheduler.timesteps[0], x).prev_sample, atol=1e-5)
    back = move(plain, lower, below, top, "flow_prediction")
    assert torch.allclose(back - x, (top[1] - below[1]) * (plain - guided), atol=1e-5)


@pytest.mark.parametrize("top", [(0.0, 1.0), (0.1, 0.9)])
def test_the_level_below_on_a_flow(top: tuple[float, float]) -> None:
    a, s = level_below(top, 0.3, flow=True)
    assert (a, s) == pytest.approx((top[0] + 0.3, top[1] - 0.3))


@pytest.mark.parametrize("jump", [0.01, 0.4])
def test_the_level_below_on_stable_diffusions_schedule(jump: float) -> None:
    top = grid_levels(ddim(10))[0]
    a, s = level_below(top, jump, flow=False)
    assert a * a + s * s == pytest.approx(1)
    assert top[1] / sum(top) - s / (a + s) == pytest.approx(jump)


def test_the_jump_to_the_next_level_is_the_step_of_the_schedule() -> None:
    pipe, noise = tiny.build("sd"), draw(4)
    call: dict[str, Any] = {"prompt": ["a aaa", "a bbb"], "height": 8, "width": 8, "num_inference_steps": 10}
    scheduler = first_order_scheduler(pipe.scheduler)
    scheduler.set_timesteps(10)
    top, below = (s / (a + s) for a, s in grid_levels(scheduler)[:2])
    expected, found = dx.redenoise(pipe, noise, **call), dx.redenoise(pipe, noise, jump=top - below, **call)
    # Noise of the top level divided by a small alpha and back.
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(found, noise, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jump": 0.0}, "jump must be above 0, got 0.0"),
        ({"jump": 0.99}, r"jump must be above 0 and below 0\.9\d+, .* got 0.99"),
        ({"jump": float("nan")}, "jump must be a finite number"),
        ({"jump": 0.1, "legacy_inversion": True}, "got jump=0.1 as well. Use num_inference_steps"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number"),
    ],
)
def test_lengths_that_cannot_be_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.redenoise(tiny.build("sd"), draw(4), prompt=["a", "b"], height=8, width=8, **options)


# Other pipelines are in test_families.py.
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("legacy", [False, True])
def test_on_pipelines_it_is_the_formula(name: str, legacy: bool) -> None:
    pipe = tiny.build(name)
    call = {
        k: v
        for k, v in tiny.inputs(name, 2).items()
        if k not in ("output_type", "guidance_scale", "num_inference_steps")
    }
    noise = draw(3)
    original = pipe.scheduler
    made = dx.redenoise(
        pipe, noise, num_inference_steps=6, guidance_scale=4.0, legacy_inversion=legacy, **call
    )
    assert pipe.scheduler is original
    assert not {"step"} & vars(original).keys()
    pipe.scheduler = scheduler = first_order_scheduler(original)
    options = {**call, "num_inference_steps": 6}
    guided = model_output(pipe, noise, {**options, "guidance_scale": 4.0})
    levels = grid_levels(scheduler)[:3]
    kind = "flow_prediction" if name == "sd3" else "epsilon"
    lower = move(guided, noise, levels[0], levels[1], kind)
    back = model_output(pipe, lower, {**options, "guidance_scale": 1.0})
    if legacy:
        expected = move(back, lower, levels[2], levels[1], kind)
    elif kind == "epsilon":
        expected = noise + displacement_factor(levels[0], levels[1]) * (back - guided)
    else:
        expected = noise + (levels[0][1] - levels[1][1]) * (back - guided)
    # Noise of the top level divided by a small alpha and back.
    assert torch.allclose(made, expected, atol=1e-3)
    assert not torch.allclose(made, noise, atol=1e-3)


def test_equal_guidance_returns_nearly_to_the_noise_and_rounds_add_up() -> None:
    pipe, noise = tiny.build("sd"), draw(4)
    call: dict[str, Any] = {"prompt": ["a aaa", "a bbb"], "height": 8, "width": 8, "num_inference_steps": 50}

    def change(**options: Any) -> float:
        return float((dx.redenoise(pipe, noise, **call, **options) - noise).norm() / noise.norm())

    # Not exactly: the second call is made on another sample. Guidance moves it much further.
    same = change(guidance_scale=1.0)
    assert change(guidance_scale=20.0) > 5 * same
    once, twice = change(guidance_scale=20.0), change(guidance_scale=20.0, num_rounds=2)
    assert 1.5 * once < twice < 2.5 * once


def test_refusals() -> None:
    pipe, noise = tiny.build("sd"), draw(4)
    call: dict[str, Any] = {"prompt": ["a aaa", "a bbb"], "height": 8, "width": 8}
    with pytest.raises(ValueError, match="num_rounds must be a whole number of 1 or more, got 0"):
        dx.redenoise(pipe, noise, num_rounds=0, **call)
    with pytest.raises(ValueError, match="num_inference_steps of at least 2, got 1"):
        dx.redenoise(pipe, noise, num_inference_steps=1, **call)
    with pytest.raises(ValueError, match="at least 3, got 2"):
        dx.redenoise(pipe, noise, num_inference_steps=2, legacy_inversion=True, **call)
    with torch.no_grad():
        pipe.unet.conv_out.bias += float("nan")
    with pytest.raises(ValueError, match="not finite"):
        dx.redenoise(pipe, noise, **call)
    assert isinstance(pipe.scheduler, diffusers.EulerDiscreteScheduler)
    with pytest.raises(ValueError, match="no alphas_cumprod and is not a flow"):
        first_order_scheduler(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="DDPMPipeline has no prepare_latents"):
        dx.redenoise(tiny.build("ddpm"), noise)
