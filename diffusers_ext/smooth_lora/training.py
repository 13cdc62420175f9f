"""The objective of a Smooth-LoRA: a diffusion model's own loss plus the step-wise variation loss, on LoRA layers only."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from ..core.predictions import denoising_loss
from ..core.schedules import levels_at
from .variation import StepwiseVariationLoss, double_differentiable

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(denoiser: Any, rank: int, adapter_name: str = "smooth") -> None:
    """Freezes a denoiser and gives its attention layers LoRA matrices that start at no change, scale 1.

    Raises:
        ValueError: a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}.")
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(TARGETS))
    denoiser.add_adapter(config, adapter_name)


class SmoothLoraObjective(nn.Module):
    """Denoising loss + λ · variation loss; λ = 0 is exactly the training of a plain LoRA.

    Args:
        denoiser: a UNet with trainable LoRA layers.
        scheduler: gives the noise schedule and `prediction_type`.
        variation: the regulariser; None, or a weight of 0, leaves it out and its cost with it.
        weight: λ; 1 in the paper.
        snr_gamma: min-SNR weights of the denoising loss (Hang et al. 2023); None for equal ones.

    Raises:
        ValueError: a negative weight, or a prediction type that the scheduler and the regulariser don't share.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        variation: StepwiseVariationLoss | None,
        weight: float = 1.0,
        snr_gamma: float | None = None,
    ) -> None:
        super().__init__()
        kind = scheduler.config.prediction_type
        if weight < 0:
            raise ValueError(f"The weight of the variation loss must be 0 or more, got {weight}.")
        if variation is not None and variation.prediction_type != kind:
            raise ValueError(
                f"The scheduler's prediction_type is {kind}, the variation loss's {variation.prediction_type}."
            )
        self.denoiser, self.variation = denoiser, variation if weight else None
        self.scheduler, self.weight, self.snr_gamma = scheduler, weight, snr_gamma

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        direction: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of one batch.

        Args:
            latents, noise, direction: (b, C, H, W): clean, and two standard normal draws.
            timesteps: (b,) int64.
            prompt_embeds: (b, tokens, width).
            pooled_prompt_embeds, time_ids: SDXL's (b, width) and (b, 6).
        """
        conditions: dict[str, Any] = {"encoder_hidden_states": prompt_embeds}
        if pooled_prompt_embeds is not None:
            conditions["added_cond_kwargs"] = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids}

        def denoise(sample: Tensor) -> Tensor:
            return self.denoiser(sample, timesteps, **conditions).sample

        if self.variation is None:
            return self._denoising_loss(
                denoise(self.scheduler.add_noise(latents, noise, timesteps)), latents, noise, timesteps
            )
        alpha, sigma = levels_at(self.scheduler, timesteps, latents)
        twice = self.variation.estimator == "vjp"
        with double_differentiable(self.denoiser) if twice else contextlib.nullcontext():
            found = self.variation(
                denoise,
                latents,
                noise,
                alpha,
                sigma,
                timesteps / self.scheduler.config.num_train_timesteps,
                direction,
            )
        return self._denoising_loss(found.output, latents, noise, timesteps) + self.weight * found.loss

    def _denoising_loss(self, output: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return denoising_loss(self.scheduler, output, latents, noise, timesteps, self.snr_gamma)
