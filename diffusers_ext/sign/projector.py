"""A denoiser at a fixed noise level as a projector onto the data.

f(x) = D_θ(x; σ) is the clean prediction of a diffusion model whose time input is held at the level σ. Its
input x has the scale of the data, so σ · unit noise, noisy data and clean data are all valid inputs. The
level is far from the end of the schedule, where a clean prediction would divide by almost 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..core.predictions import clean_prediction
from ..core.schedules import levels_at, prediction_type
from .source import Source

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SIGMA = 1.5


def check_teacher(unet: Any, scheduler: Any) -> None:
    """Checks that a diffusion model can be turned into a projector.

    Raises:
        ValueError: the prediction type is unknown, the schedule has no `alphas_cumprod`, or the network has
            different numbers of input and output channels.
    """
    kind = prediction_type(scheduler)
    if kind not in PREDICTIONS:
        raise ValueError(
            f"The teacher's prediction_type must be one of {', '.join(PREDICTIONS)}, got {kind!r}."
        )
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod: expected a variance-preserving schedule, such"
            " as that of DDPMScheduler."
        )
    channels = unet.config.in_channels, unet.config.out_channels
    if channels[0] != channels[1]:
        raise ValueError(
            f"The teacher takes {channels[0]} channels and gives {channels[1]}: networks that also predict"
            " variances or take a mask are not supported."
        )


def noise_levels(scheduler: Any) -> Tensor:
    """√(1 − ᾱ)/√ᾱ of every timestep, float64: the noise level relative to unscaled data."""
    cumulative = scheduler.alphas_cumprod.double()
    return ((1 - cumulative) / cumulative).sqrt()


def nearest_timestep(scheduler: Any, sigma: float = SIGMA) -> int:
    """The timestep whose noise level √(1 − ᾱ)/√ᾱ is nearest to `sigma` in logarithm.

    Raises:
        ValueError: no level of the schedule is within 10% of `sigma`.
    """
    levels = noise_levels(scheduler)
    found = int((levels.log() - torch.tensor(sigma).double().log()).abs().argmin()) if sigma > 0 else 0
    if not 0.9 < float(levels[found]) / max(sigma, 1e-12) < 1.1:
        raise ValueError(
            f"sigma={sigma:g} is not a level of this schedule: its levels go from {float(levels[0]):.3g} to"
            f" {float(levels[-1]):.3g}."
        )
    return found


def falling_timesteps(timestep: int, num_inference_steps: int) -> list[int]:
    """Evenly spaced timesteps from `timestep` towards 0, excluding 0.

    Duplicates are removed, so there may be fewer than `num_inference_steps`.
    """
    steps = range(num_inference_steps)
    return list(dict.fromkeys(round(timestep * (1 - k / num_inference_steps)) for k in steps))


def denoise(unet: Any, scheduler: Any, sample: Tensor, timesteps: Tensor, **conditions: Any) -> Tensor:
    """The clean prediction D(x_t, t).

    Args:
        unet: called as `unet(sample, timesteps, **conditions).sample`.
        scheduler: provides ᾱ and the prediction type.
        sample: (b, C, H, W) α · clean + σ · noise.
        timesteps: (b,) int64.
        conditions: further arguments of the network, see `nested`.

    Returns:
        (b, C, H, W) in the dtype of `sample`.
    """
    a, s = levels_at(scheduler, timesteps, sample)
    output = unet(sample, timesteps, **nested(conditions)).sample.to(sample.dtype)
    # The levels are float32, the samples may be in half precision.
    return clean_prediction(output, sample, a, s, str(prediction_type(scheduler))).to(sample.dtype)


def nested(conditions: dict[str, Any]) -> dict[str, Any]:
    """Conditions as a UNet takes them: `text_embeds` and `time_ids`, of SDXL, in `added_cond_kwargs`."""
    names = ("text_embeds", "time_ids")
    added = {name: value for name, value in conditions.items() if name in names}
    given = {name: value for name, value in conditions.items() if name not in names}
    return {**given, "added_cond_kwargs": added} if added else given


class Constant:
    """A network with constant weights: gradients flow to its inputs only."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @property
    def config(self) -> Any:
        """That of the network."""
        return self.network.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = {name: value.detach() for name, value in self.network.state_dict(keep_vars=True).items()}
        return functional_call(self.network, state, args, kwargs)


class Projector(nn.Module):
    """The projector f: one UNet at one timestep.

    Args:
        unet: a `UNet2DModel`, or a `UNet2DConditionModel` whose conditions are passed with every call.
        scheduler: the scheduler of the teacher, for ᾱ and the prediction type.
        timestep: the constant time input of the network.
        source: maps noise to the inputs that samples start from. With None, they start from sigma · unit
            noise.

    Raises:
        ValueError: see `check_teacher`; also if the timestep is outside the schedule.
    """

    def __init__(self, unet: Any, scheduler: Any, timestep: int, source: Source | None = None) -> None:
        super().__init__()
        check_teacher(unet, scheduler)
        if not 0 <= timestep < len(scheduler.alphas_cumprod):
            raise ValueError(
                f"timestep {timestep} is outside the schedule of {len(scheduler.alphas_cumprod)} timesteps."
            )
        self.unet, self.scheduler, self.timestep = unet, scheduler, timestep
        self.source = source

    @property
    def network(self) -> Any:
        """The network that is trained."""
        return self.unet

    @property
    def sigma(self) -> float:
        """The noise level of the timestep, at which samples start."""
        return float(noise_levels(self.scheduler)[self.timestep])

    @property
    def num_times(self) -> int:
        """Number of timesteps of the schedule."""
        return len(self.scheduler.alphas_cumprod)

    def time_at(self, level: float) -> float:
        """The last timestep whose noise level relative to unscaled data is at most `level`."""
        return max(int((noise_levels(self.scheduler) <= level).sum()) - 1, 0)

    def times(self, values: Tensor) -> Tensor:
        """Timesteps (b,) float as the network takes them: whole numbers, int64."""
        return values.round().long()

    def levels(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(α, σ) of noisy data α · x + σ · ε at timesteps (b,), shaped to multiply `like`."""
        return levels_at(self.scheduler, times, like)

    def denoise(self, network: Any, noisy: Tensor, times: Tensor, **conditions: Any) -> Tensor:
        """The clean prediction of a network of this kind: of the projector's own, the teacher or the fake score.

        Args:
            network: called as the projector's own.
            noisy: (b, C, H, W) α · x + σ · ε.
            times: (b,), from `times`.
            conditions: prompt arguments of the network.
        """
        return denoise(network, self.scheduler, noisy, times, **conditions)

    def start(self, noise: Tensor, sigma: float | None = None, mean: Tensor | None = None) -> Tensor:
        """Maps unit-variance noise (b, C, H, W) to the input z at the level `sigma`.

        The default level is that of the projector. `mean` is that of the prompts, see `PromptSource`.
        """
        level = self.sigma if sigma is None else sigma
        if self.source is None:
            return level * noise
        return self.source(noise, level) if mean is None else self.source(noise, level, mean)

    def forward(self, x: Tensor, **conditions: Any) -> Tensor:
        """f(x) for an input x (b, C, H, W): clean data, noisy data or the output of `start`."""
        return self._project(self.network, x, **conditions)

    def frozen(self, x: Tensor, **conditions: Any) -> Tensor:
        """f(x) with constant weights: gradients flow to x only."""
        return self._project(Constant(self.network), x, **conditions)

    def _project(self, network: Any, x: Tensor, **conditions: Any) -> Tensor:
        timesteps = torch.full((len(x),), self.timestep, device=x.device)
        alpha, _ = self.levels(timesteps, x)
        return self.denoise(network, alpha.to(x.dtype) * x, timesteps, **conditions)
