"""The noise levels that a flow is trained at, drawn as diffusers' training scripts draw them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor

from ..core.schedules import first_order_scheduler, prediction_type
from .arguments import positive_int
from .rows import Rows
from .transformers import Flow

SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
# Of diffusers' training scripts: mean and standard deviation of logit_normal, and the scale of mode.
_DENSITY: dict[str, Any] = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}


def add_flow_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of training a flow-matching transformer, with the names of diffusers' scripts."""
    parser.add_argument(
        "--weighting_scheme",
        choices=SCHEMES,
        default=None,
        help="of flow-matching models: how noise levels are drawn (none, sigma_sqrt, cosmap: uniform; logit_normal; mode)"
        " and weighted (sigma_sqrt, cosmap). Default: that of diffusers' script for the model, logit_normal for Stable"
        " Diffusion 3 and none for all others",
    )
    parser.add_argument(
        "--max_sequence_length",
        type=positive_int,
        default=None,
        help="of flow-matching models: tokens of a caption, as in the call of the pipeline; default: that of the pipeline",
    )


def check_flow_arguments(args: argparse.Namespace, flow: Flow | None) -> None:
    """Raises a ValueError if an argument has no meaning for the model.

    Args:
        args: with those of `add_flow_arguments`, and `snr_gamma` where there is one.
        flow: the model's; None for Stable Diffusion and SDXL.
    """
    if flow is not None and getattr(args, "snr_gamma", None) is not None:
        raise ValueError(
            "--snr_gamma is for Stable Diffusion and SDXL, and the model is a flow: use --weighting_scheme."
        )
    for name in ("weighting_scheme", "max_sequence_length"):
        if flow is None and getattr(args, name, None) is not None:
            raise ValueError(f"--{name} is for flow-matching models, got Stable Diffusion or SDXL: omit it.")


@dataclass(frozen=True)
class FlowLevels:
    """Draws noise levels of a flow; a `draw` of `CaptionedRows`.

    Attributes:
        sigmas: (N,) float32, the training schedule from noise to image, see `training_sigmas`.
        scheme: one of `SCHEMES`.
    """

    sigmas: Tensor
    scheme: str

    def __call__(self, rows: Rows) -> dict[str, Tensor]:
        """`sigmas` (n,) float32."""
        # From a seed that the row draws: diffusers' function takes torch's generators.
        seeds = rows.integers(2**63 - 1).tolist()
        places = torch.cat(
            [
                compute_density_for_timestep_sampling(
                    self.scheme, 1, **_DENSITY, generator=torch.Generator().manual_seed(seed)
                )
                for seed in seeds
            ]
        )
        # 1 itself by rounding, at the ends of logit_normal.
        index = (places * len(self.sigmas)).long().clamp(0, len(self.sigmas) - 1)
        return {"sigmas": self.sigmas[index]}


def noised(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The noisy states x_σ = (1 − σ)x₀ + σε, in the dtype of the latents.

    Args:
        latents, noise: (B, C, H, W) x₀ and ε.
        sigmas: (B,) noise levels σ in [0, 1].
    """
    return torch.lerp(latents, noise, sigmas[:, None, None, None].to(latents))


def loss_weights(scheme: str, sigmas: Tensor) -> Tensor:
    """(B,) weights of the squared errors of the velocity at noise levels (B,).

    They are 1, or 1/σ² (sigma_sqrt), or 2/(π(1 − 2σ + 2σ²)) (cosmap; Esser et al., arXiv:2403.03206, section 3.1).
    """
    return compute_loss_weighting_for_sd3(scheme, sigmas)


def training_sigmas(scheduler: Any) -> Tensor:
    """The noise levels (N,) float32 that a model with this scheduler is trained at, from 1 down.

    These are σ = i/N, moved by the scheduler's constant shift s to sσ/(1 + (s − 1)σ). A shift that depends on the size of
    the image (`use_dynamic_shifting`) is one of sampling, and the training levels stay unshifted, as in diffusers' scripts.

    Args:
        scheduler: of a flow: FlowMatchEuler, FlowMatchHeun, or a solver with `use_flow_sigmas`.

    Raises:
        ValueError: another scheduler, one of a distilled model, or one that runs from data to noise.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if prediction_type(scheduler) != "flow_prediction":
        raise ValueError(
            f"{name} is not the scheduler of a flow: expected FlowMatchEulerDiscreteScheduler or a solver with"
            " use_flow_sigmas. Load the pipeline with the scheduler that its model was trained with."
        )
    first_order_scheduler(scheduler)  # refuses those of distilled models
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} with invert_sigmas=True runs from data to noise, which is not supported.")
    flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler)
    shift = scheduler.shift if flow else config.get("flow_shift") or 1.0
    fresh: Any = FlowMatchEulerDiscreteScheduler(
        config.num_train_timesteps, shift, use_dynamic_shifting=bool(config.get("use_dynamic_shifting"))
    )
    return fresh.sigmas
