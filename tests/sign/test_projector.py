"""The clean prediction and the projector made of it, against a denoiser that is known exactly."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusers_ext.core.schedules import levels_at
from diffusers_ext.sign.projector import Projector, check_teacher, denoise, nearest_timestep
from tests import tiny


class GaussianUNet(torch.nn.Module):
    """The exact denoiser of elementwise N(mean, std²) data, in any parametrisation."""

    def __init__(self, scheduler: Any, mean: float, std: float) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.mean, self.std = (torch.nn.Parameter(torch.tensor(x)) for x in (mean, std))
        self.config = SimpleNamespace(in_channels=1, out_channels=1)

    def clean(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        a, s = levels_at(self.scheduler, timesteps, sample)
        gain = a * self.std**2 / (a**2 * self.std**2 + s**2)
        return self.mean + gain * (sample - a * self.mean)

    def forward(self, sample: Tensor, timesteps: Tensor) -> Any:
        a, s = levels_at(self.scheduler, timesteps, sample)
        clean = self.clean(sample, timesteps)
        noise = (sample - a * clean) / s
        kinds = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}
        return SimpleNamespace(sample=kinds[self.scheduler.config.prediction_type])


KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_prediction_of_every_parametrisation(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    unet = GaussianUNet(scheduler, 0.3, 0.6)
    sample, times = torch.randn(4, 1, 3, 3), torch.tensor([5, 200, 440, 900])
    found = denoise(unet, scheduler, sample, times)
    # Float32, and epsilon divides by α = 0.02 at timestep 900.
    assert torch.allclose(found, unet.clean(sample, times), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projector_is_the_denoiser_at_its_level(kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    projector = Projector(GaussianUNet(scheduler, 0.3, 0.6), scheduler, nearest_timestep(scheduler))
    assert projector.sigma == pytest.approx(1.5, rel=0.01)
    x = torch.randn(5, 1, 3, 3)
    gain = 0.36 / (0.36 + projector.sigma**2)
    assert torch.allclose(projector(x), 0.3 + gain * (x - 0.3), atol=1e-5)


def test_frozen_weights_pass_gradients_to_the_input_alone() -> None:
    pipe = tiny.build("ddpm")
    projector = Projector(pipe.unet, pipe.scheduler, 440)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    output = projector.frozen(x)
    assert torch.equal(output, projector(x))
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in projector.parameters())


def test_refusals() -> None:
    pipe = tiny.build("ddpm")
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(
        ValueError,
        match="prediction_type must be one of epsilon, v_prediction, sample, got 'flow_prediction'",
    ):
        check_teacher(pipe.unet, flow)
    with pytest.raises(ValueError, match="EDMEulerScheduler has no alphas_cumprod"):
        check_teacher(pipe.unet, EDMEulerScheduler(prediction_type="epsilon"))
    unknown = DDPMScheduler(prediction_type="score")
    with pytest.raises(ValueError, match="got 'score'"):
        Projector(pipe.unet, unknown, 440)
    with pytest.raises(ValueError, match="timestep 1000 is outside the schedule of 1000"):
        Projector(pipe.unet, pipe.scheduler, 1000)
    learned = SimpleNamespace(config=SimpleNamespace(in_channels=3, out_channels=6))
    with pytest.raises(ValueError, match="takes 3 channels and gives 6"):
        check_teacher(learned, pipe.scheduler)
    for sigma in (0.0, -1.0, 500.0):
        with pytest.raises(ValueError, match="is not a level of this schedule"):
            nearest_timestep(pipe.scheduler, sigma)
