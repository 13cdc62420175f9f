"""A denoiser at one noise level as a projector onto the data.

f(x) = D_θ(x; σ): the clean prediction of a diffusion model's network with its time input held at the level σ, for an x in
units in which the data keep their scale (so that σ · unit noise, noisy and clean data can all be its input). The level
is far from the end of the schedule, where a clean prediction would divide by almost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.predictions import clean_prediction
from ..core.schedules import levels_at
from .source import MixtureSource

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SIGMA = 1.5


def check_teacher(unet: Any, scheduler: Any) -> None:
    """Refuses what cannot be turned into a projector.

    Raises:
        ValueError: an unknown prediction type, a schedule without `alphas_cumprod`, or a network whose output has not
            the channels of its input.
    """
    kind = scheduler.config.get("prediction_type")
    if kind not in PREDICTIONS:
        raise ValueError(
            f"The teacher's prediction_type must be one of {', '.join(PREDICTIONS)}, got {kind!r}."
        )
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod: expected the schedule of a variance preserving"
            " diffusion model, such as DDPMScheduler's."
        )
    channels = unet.config.in_channels, unet.config.out_channels
    if channels[0] != channels[1]:
        raise ValueError(
            f"The teacher takes {channels[0]} channels and gives {channels[1]}: a network that also predicts"
            " variances, or takes a mask, is not supported."
        )


def noise_levels(scheduler: Any) -> Tensor:
    """√(1 − ᾱ)/√ᾱ of every timestep, float64: the noise beside data that keep their scale."""
    cumulative = scheduler.alphas_cumprod.double()
    return ((1 - cumulative) / cumulative).sqrt()


def nearest_timestep(scheduler: Any, sigma: float = SIGMA) -> int:
    """The timestep whose noise level √(1 − ᾱ)/√ᾱ is nearest to `sigma` by ratio.

    Raises:
        ValueError: the schedule has no level within a tenth of it.
    """
    levels = noise_levels(scheduler)
    found = int((levels.log() - torch.tensor(sigma).double().log()).abs().argmin()) if sigma > 0 else 0
    if not 0.9 < float(levels[found]) / max(sigma, 1e-12) < 1.1:
        raise ValueError(
            f"sigma={sigma:g} is not a level of this schedule, whose levels are {float(levels[0]):.3g} to"
            f" {float(levels[-1]):.3g}."
        )
    return found


def falling_timesteps(timestep: int, num_inference_steps: int) -> list[int]:
    """Evenly from `timestep` down towards 0, which is not among them; no timestep twice, so fewer where there are few."""
    steps = range(num_inference_steps)
    return list(dict.fromkeys(round(timestep * (1 - k / num_inference_steps)) for k in steps))


def denoise(unet: Any, scheduler: Any, sample: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:
    """The clean prediction D(x_t, t).

    Args:
        unet: called as `unet(sample, timesteps, **conditions).sample`.
        scheduler: gives ᾱ and the prediction type.
        sample: (b, C, H, W), α · clean + σ · noise.
        timesteps: (b,) int64.
    """
    a, s = levels_at(scheduler, timesteps, sample)
    output = unet(sample, timesteps, **conditions).sample.to(sample.dtype)
    # The levels are float32, the samples may be half.
    return clean_prediction(output, sample, a, s, scheduler.config.prediction_type).to(sample.dtype)


class Projector(nn.Module):
    """f of one UNet at one timestep.

    Args:
        unet: a `UNet2DModel`, or a `UNet2DConditionModel` with its conditions given at every call.
        scheduler: the teacher's, for ᾱ and the prediction type.
        timestep: the one that the network is held at.
        source: what samples start from; None: sigma · unit noise.

    Raises:
        ValueError: what `check_teacher` refuses, or a timestep beyond the schedule.
    """

    def __init__(self, unet: Any, scheduler: Any, timestep: int, source: MixtureSource | None = None) -> None:
        super().__init__()
        check_teacher(unet, scheduler)
        if not 0 <= timestep < len(scheduler.alphas_cumprod):
            raise ValueError(
                f"timestep {timestep} is beyond the schedule's {len(scheduler.alphas_cumprod)} timesteps."
            )
        self.unet, self.scheduler, self.timestep = unet, scheduler, timestep
        self.source = source

    @property
    def sigma(self) -> float:
        """The noise level of the timestep, at which samples start."""
        return float(noise_levels(self.scheduler)[self.timestep])

    def start(self, noise: Tensor, sigma: float | None = None) -> Tensor:
        """z of unit noise (b, C, H, W) at the level `sigma`, by default the projector's own."""
        level = self.sigma if sigma is None else sigma
        return level * noise if self.source is None else self.source(noise, level)

    def forward(self, x: Tensor, **conditions: Any) -> Tensor:
        """f(x) for x (b, C, H, W): clean, noisy, or from `start`."""
        timesteps = torch.full((len(x),), self.timestep, device=x.device)
        alpha, _ = levels_at(self.scheduler, timesteps, x)
        return denoise(self.unet, self.scheduler, alpha.to(x.dtype) * x, timesteps, **conditions)

    def frozen(self, x: Tensor, **conditions: Any) -> Tensor:
        """The same with constant weights: gradients reach x alone."""
        state = {name: value.detach() for name, value in self.state_dict(keep_vars=True).items()}
        return functional_call(self, state, (x,), conditions)
