"""A `DDPMPipeline` that every solver can drive, also from a projector's source."""

from typing import Any

import torch
from diffusers import DDPMPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext.core.schedules import levels_at
from diffusers_ext.sign.projector import Projector, falling_timesteps


class PixelPipeline(DDPMPipeline):
    """`DDPMPipeline` for every solver: the stock one neither scales the model's input nor spares `step` a generator.

    With a `projector` (and a solver that takes timesteps) the flow starts at that projector's level from its source; in
    no steps the source's own image without noise is what comes out.
    """

    projector: Projector | None = None

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self, batch_size: int, generator: Any, num_inference_steps: int, output_type: str = "np"
    ) -> ImagePipelineOutput:
        """Images (n, h, w, 1) in [0, 1]; the noise is drawn as the stock pipeline draws it."""
        config = self.unet.config
        noise = randn_tensor(
            (batch_size, config.in_channels, config.sample_size, config.sample_size), generator=generator
        )
        timesteps: Any = ()
        if self.projector is None:
            self.scheduler.set_timesteps(num_inference_steps)
            x, timesteps = noise * self.scheduler.init_noise_sigma, self.scheduler.timesteps
        elif num_inference_steps == 0:
            x = self.projector.start(noise, 0.0)
        else:
            level = self.projector.timestep
            self.scheduler.set_timesteps(timesteps=falling_timesteps(level, num_inference_steps))
            alpha, _ = levels_at(self.scheduler, torch.full((batch_size,), level), noise)
            x, timesteps = alpha * self.projector.start(noise), self.scheduler.timesteps
        for t in timesteps:
            output = self.unet(self.scheduler.scale_model_input(x, t), t).sample
            x = self.scheduler.step(output, t, x).prev_sample
        return ImagePipelineOutput((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())  # type: ignore
