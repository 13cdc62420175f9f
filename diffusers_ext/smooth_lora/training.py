"""The training objective of a Smooth-LoRA: denoising loss plus step-wise variation loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from ..core.predictions import denoising_loss, weighted_mse
from ..core.schedules import first_order_scheduler, levels_at, noising_scheduler
from ..training.levels import loss_weights, noised, training_sigmas
from ..training.rows import Rows
from ..training.transformers import FLOWS, Flow, flow_of, flow_of_class
from .variation import StepwiseVariationLoss, double_differentiable

_UNETS = (StableDiffusionPipeline, StableDiffusionXLPipeline)


def check_class(kind: type) -> None:
    """Raises a ValueError if a Smooth-LoRA cannot be trained on this class of pipelines."""
    if not issubclass(kind, _UNETS) and flow_of_class(kind) is None:
        expected = ", ".join([*(unet.__name__ for unet in _UNETS), *FLOWS])
        raise ValueError(
            f"A Smooth-LoRA can be trained on {expected}, got {kind.__name__}: use the text-to-image pipeline of such a"
            " model."
        )


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError if a Smooth-LoRA cannot be trained on the pipeline.

    Training makes the call of the denoiser itself: that of a UNet with the noise schedule of DDPM and the conditioning of
    Stable Diffusion or SDXL, or that of a transformer of `training.transformers`. Its targets are those of a model that
    is not distilled.
    """
    check_class(type(pipe))
    if flow_of_class(type(pipe)):
        flow_of(pipe)
        training_sigmas(pipe.scheduler)
        return
    name = type(pipe).__name__
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise ValueError(
            f"The UNet of {name} is distilled to a few steps. Train on the model that it was distilled from."
        )
    if pipe.unet.config.encoder_hid_dim_type is not None:
        raise ValueError(f"{name} has an IP-Adapter, whose images training does not have: load it without.")
    first_order_scheduler(pipe.scheduler)  # refuses the schedulers of other distilled models
    noising_scheduler(pipe.scheduler)


@dataclass(frozen=True)
class SmoothLoraRows:
    """Rows of captioned images, and the directions in which the variation is measured."""

    read: Callable[[Rows], dict[str, Any]]

    def __call__(self, rows: Rows) -> dict[str, Any]:
        """What `read` returns, with a `direction` for its `noise`."""
        found = self.read(rows)
        return {**found, "direction": rows.normal(*found["noise"].shape[1:])}


class SmoothLoraObjective(nn.Module):
    """Denoising loss + λ · variation loss. With λ = 0 this is exactly the training of a plain LoRA.

    Args:
        denoiser: a UNet with trainable LoRA layers.
        scheduler: provides the noise schedule and `prediction_type`.
        variation: the regularizer. With None or a weight of 0 it is not computed.
        weight: λ; 1 in the paper.
        snr_gamma: γ of the min-SNR weights of the denoising loss (Hang et al. 2023, arXiv:2303.09556). None
            weights all timesteps equally.

    Raises:
        ValueError: the weight is negative, or scheduler and regularizer have different prediction types.
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
        _check(variation, weight, scheduler.config.prediction_type)
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
        """The loss of one batch, a scalar.

        Args:
            latents: (b, C, H, W) clean latents.
            noise, direction: (b, C, H, W) independent standard normal noise.
            timesteps: (b,) int64.
            prompt_embeds: (b, tokens, width).
            pooled_prompt_embeds, time_ids: (b, width) and (b, 6), SDXL only.
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


class FlowSmoothLoraObjective(nn.Module):
    """Flow-matching loss + λ · variation loss of a transformer. With λ = 0 this is the training of a plain LoRA.

    Args:
        transformer: with trainable LoRA layers.
        flow: how it is called.
        variation: the regularizer, for `flow_prediction`. With None or a weight of 0 it is not computed.
        weight: λ.
        scheme: weights of the noise levels, see `levels.loss_weights`.
        guidance: the scale that a transformer with embedded guidance is told.

    Raises:
        ValueError: the weight is negative, or the regularizer has another prediction type.
    """

    def __init__(
        self,
        transformer: nn.Module,
        flow: Flow,
        variation: StepwiseVariationLoss | None,
        weight: float = 1.0,
        scheme: str = "none",
        guidance: float | None = None,
    ) -> None:
        super().__init__()
        _check(variation, weight, "flow_prediction")
        self.denoiser, self.variation = transformer, variation if weight else None
        self.flow, self.weight, self.scheme, self.guidance = flow, weight, scheme, guidance

    def forward(
        self, latents: Tensor, noise: Tensor, sigmas: Tensor, direction: Tensor, **texts: Tensor
    ) -> Tensor:
        """The loss of one batch, a scalar.

        Args:
            latents: (b, C, H, W) clean latents.
            noise, direction: (b, C, H, W) independent standard normal noise.
            sigmas: (b,) float32 noise levels above 0, up to 1.
            texts: from `encode_captions`.
        """

        def denoise(sample: Tensor) -> Tensor:
            return self.flow.velocity(self.denoiser, sample, sigmas, self.guidance, **texts)

        def loss(output: Tensor) -> Tensor:
            return weighted_mse(output, noise - latents, loss_weights(self.scheme, sigmas))

        if self.variation is None:
            return loss(denoise(noised(latents, noise, sigmas)))
        twice = self.variation.estimator == "vjp"
        with double_differentiable(self.denoiser) if twice else contextlib.nullcontext():
            found = self.variation(denoise, latents, noise, 1 - sigmas, sigmas, sigmas, direction)
        return loss(found.output) + self.weight * found.loss


def _check(variation: StepwiseVariationLoss | None, weight: float, kind: str) -> None:
    if weight < 0:
        raise ValueError(f"The weight of the variation loss must be 0 or more, got {weight}.")
    if variation is not None and variation.prediction_type != kind:
        raise ValueError(
            f"The model's prediction_type is {kind}, that of the variation loss is {variation.prediction_type}."
        )
