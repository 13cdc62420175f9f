"""The schedules of an inversion and of the redrawing after it: the same noise levels, up and down."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler


class FlowMatchEulerInverseScheduler(FlowMatchEulerDiscreteScheduler):
    """The Euler steps of `FlowMatchEulerDiscreteScheduler` in reverse, from the picture to the noise.

    Every step takes the model's prediction at the level that it goes to, as `DDIMInverseScheduler` does, so that the
    model is asked at the same levels in both directions.
    """

    # Pipelines read off the signature which arguments they may give.
    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As the base class's, from the lowest level up."""
        super().set_timesteps(*args, **kwargs)
        self.sigmas, self.timesteps = self.sigmas.flip(0), self.timesteps.flip(0)


def redrawing_scheduler(pipe: Any) -> Any:
    """The deterministic first-order scheduler that redraws what `inverse_scheduler` has inverted.

    Raises:
        ValueError: neither a noise schedule like Stable Diffusion's nor a flow.
    """
    config = pipe.scheduler.config
    if hasattr(pipe.scheduler, "alphas_cumprod"):
        return DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
    raise ValueError(
        f"Inversion follows DDIM's or a flow's steps backwards, and {type(pipe.scheduler).__name__} has no"
        " alphas_cumprod and is no FlowMatchEulerDiscreteScheduler: give the pipeline one of those kinds."
    )


def inverse_scheduler(pipe: Any) -> Any:
    """The scheduler whose steps lead from the picture to the noise.

    Raises:
        ValueError: see `redrawing_scheduler`.
    """
    forward = redrawing_scheduler(pipe)
    if isinstance(forward, DDIMScheduler):
        return DDIMInverseScheduler.from_config(forward.config)
    return FlowMatchEulerInverseScheduler.from_config(forward.config)
