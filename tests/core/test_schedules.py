"""What is read off schedulers, against the schedulers' own steps."""

from typing import Any

import diffusers
import pytest
import torch

from diffusers_ext.core.predictions import PREDICTION_TYPES
from diffusers_ext.core.schedules import (
    SUPPORTED,
    first_order_scheduler,
    grid_levels,
    inverse_scheduler,
    levels_at,
    prediction_type,
    same_grid_deterministic,
    scaling,
    scheduler_class,
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


# PNDM repeats grid points, which tests/teleport/test_scheduler.py follows; the EDM schedulers' add_noise wants the
# preconditioned time.
@pytest.mark.parametrize("name", [n for n in SUPPORTED if "EDM" not in n and n != "PNDMScheduler"])
def test_grid_levels_are_those_that_the_scheduler_noises_to(name: str) -> None:
    scheduler = scheduler_class(name)(**({} if "FlowMatch" in name else SD))
    scheduler.set_timesteps(6)
    levels = grid_levels(scheduler)
    assert len(levels) == 6
    zeros, ones = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)

    def noised(clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> float:
        if "FlowMatch" in name:
            scheduler._step_index = None  # Heun's noises to the level it looked up first
            return float(scheduler.scale_noise(clean, t, noise).mean())
        return float(scheduler.add_noise(clean, noise, t if t.is_floating_point() else t.long()).mean())

    for index, (a, s) in enumerate(levels):
        t = scheduler.timesteps[index * scheduler.order][None]
        # The schedules are kept in float32.
        assert noised(zeros, ones, t) == pytest.approx(s, rel=1e-4)
        assert noised(ones, zeros, t) == pytest.approx(a, rel=1e-4)


def test_levels_of_timesteps_multiply_a_batch() -> None:
    scheduler = diffusers.DDPMScheduler(**SD)
    times, like = torch.tensor([0, 999]), torch.zeros(2, 3, 4, 4)
    a, s = levels_at(scheduler, times, like)
    assert a.shape == s.shape == (2, 1, 1, 1)
    assert torch.allclose(a**2 + s**2, torch.ones(2, 1, 1, 1))
    assert torch.allclose(a.flatten(), scheduler.alphas_cumprod[times].sqrt())


def test_first_order_counterparts() -> None:
    for name in ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        found = first_order_scheduler(getattr(diffusers, name)(**SD, prediction_type="v_prediction"))
        assert type(found) is diffusers.DDIMScheduler
        assert found.config.prediction_type == "v_prediction"
        assert found.config.beta_end == SD["beta_end"]
        assert not found.config.clip_sample
        assert type(inverse_scheduler(found)) is diffusers.DDIMInverseScheduler
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    found = first_order_scheduler(flow)
    assert (found.config.shift, found.config.stochastic_sampling) == (3.0, False)
    with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod and is not a flow"):
        first_order_scheduler(diffusers.EDMEulerScheduler())


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_solvers_of_a_flow_keep_its_levels(name: str) -> None:
    """Sana and Wan run such solvers: their counterpart is Euler with the same shift, not DDIM."""
    solver: Any = getattr(diffusers, name)(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    found = first_order_scheduler(solver)
    assert type(found) is diffusers.FlowMatchEulerDiscreteScheduler
    solver.set_timesteps(5)
    found.set_timesteps(5)
    # Both map t to 3t/(1 + 2t); their grids of t differ by the training steps' rounding at the ends.
    for t, level in zip(torch.linspace(1, 1 / 1000, 6)[:-1], grid_levels(solver)):
        assert level[1] == pytest.approx(3 * float(t) / (1 + 2 * float(t)), abs=2e-3)
    assert found.config.shift == 3.0


def test_the_inverse_goes_through_the_same_levels_upwards() -> None:
    forward: Any = first_order_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    inverse: Any = inverse_scheduler(forward)
    forward.set_timesteps(5)
    inverse.set_timesteps(5)
    assert torch.equal(inverse.sigmas, forward.sigmas.flip(0))
    assert torch.equal(inverse.timesteps, forward.timesteps.flip(0))
    x, velocity = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    for t in forward.timesteps:
        x = forward.step(velocity, t, x).prev_sample
    back = x
    for t in inverse.timesteps:
        back = inverse.step(velocity, t, back).prev_sample
    # A constant velocity is integrated exactly in either direction.
    assert torch.allclose(back, x + velocity, atol=1e-5)


def test_the_deterministic_solver_on_the_same_grid() -> None:
    for name, counterpart in (
        ("DDPMScheduler", "DDIMScheduler"),
        ("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
        ("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"),
    ):
        noisy = getattr(diffusers, name)(**SD)
        found = same_grid_deterministic(noisy)
        assert type(found).__name__ == counterpart
        noisy.set_timesteps(7)
        found.set_timesteps(7)
        assert [s for _, s in grid_levels(found)] == pytest.approx([s for _, s in grid_levels(noisy)])
    euler = diffusers.EulerDiscreteScheduler(**SD)
    assert same_grid_deterministic(euler) is euler


def test_prediction_types() -> None:
    assert prediction_type(diffusers.FlowMatchEulerDiscreteScheduler()) == "flow_prediction"
    assert prediction_type(diffusers.DDIMScheduler()) == "epsilon"
    assert prediction_type(diffusers.LCMScheduler(prediction_type="sample")) == "sample"
    assert {prediction_type(scheduler_class(n)()) for n in SUPPORTED} <= set(PREDICTION_TYPES)


def test_unknown_schedulers_are_refused() -> None:
    class Mine(diffusers.DDIMScheduler):
        pass

    for scheduler in (Mine(), diffusers.LCMScheduler()):
        with pytest.raises(ValueError, match=f"noise levels of {type(scheduler).__name__} are not known"):
            scaling(scheduler)
    with pytest.raises(ValueError, match="invert_sigmas=True is not supported"):
        scaling(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="'Mine' is not a supported scheduler"):
        scheduler_class("Mine")
