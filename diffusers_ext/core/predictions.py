"""Noise levels, conversions of a denoiser's output, and the training loss.

A *level* is a pair (a, s) of a noisy state x = a·x₀ + s·ε: (1, σ) for variance-exploding states, (√ᾱ, √(1−ᾱ))
for variance-preserving ones, (1−t, t) for flow matching. The functions take a and s as floats, or as tensors
that broadcast with the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.training_utils import compute_snr
from torch import Tensor

Level = tuple[float, float]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


# --- noise levels ---


def ve_level(sigma: float | Tensor) -> Level:
    """(1, σ): variance-exploding states x = x₀ + σε, as in Euler and Heun.

    Raises:
        ValueError: a negative or infinite σ.
    """
    return check_level((1.0, float(sigma)), "ve_level")


def vp_level(alpha_bar: float | Tensor) -> Level:
    """(√ᾱ, √(1−ᾱ)): variance-preserving states, as in DDIM and DPM++.

    Raises:
        ValueError: ᾱ outside [0, 1].
    """
    alpha_bar = float(alpha_bar)
    if not 0.0 <= alpha_bar <= 1.0:
        raise ValueError(f"vp_level: alpha_bar must lie in [0, 1], got {alpha_bar}.")
    return math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)


def flow_level(t: float | Tensor) -> Level:
    """(1−t, t): flow-matching states, where t = 1 is pure noise and t = 0 is data.

    Raises:
        ValueError: t outside [0, 1].
    """
    t = float(t)
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"flow_level: t must lie in [0, 1], got {t}.")
    return 1.0 - t, t


def check_level(level: Sequence[float], name: str = "level") -> Level:
    """Returns `level` as two floats; `name` is its name in error messages.

    Raises:
        ValueError: not a pair of finite numbers, a negative number, or two zeros.
    """
    if len(level) != 2:
        raise ValueError(f"{name} must be a pair (a, s), got {level!r}.")
    a, s = float(level[0]), float(level[1])
    if not (math.isfinite(a) and math.isfinite(s)) or a < 0 or s < 0 or a == s == 0:
        raise ValueError(
            f"{name} must be (a, s) with finite a >= 0 and s >= 0 that are not both zero, got ({a}, {s})."
        )
    return a, s


def noise_to_signal(level: Level) -> float:
    """The noise-to-signal ratio s/a, which is σ in variance-exploding units; infinite at a = 0 (zero SNR)."""
    a, s = level
    return s / a if a > 0 else math.inf


# --- predictions ---


def clean_prediction(output: Tensor, sample: Tensor, a: Any, s: Any, prediction_type: str) -> Tensor:
    """The clean sample x₀ that a denoiser's output implies.

    Args:
        output: (B, ...), the output of the denoiser.
        sample: (B, ...), its input, the noisy state a·x₀ + s·ε in the scheduler's scaling.
        a, s: the level of `sample`: floats, or tensors that broadcast with it.
        prediction_type: one of `PREDICTION_TYPES`. A velocity is that of the unit-variance state x/√(a² + s²)
            (Salimans and Ho, arXiv:2202.00512). A flow prediction is ε − x₀, at a + s = 1.

    Returns:
        (B, ...).

    Raises:
        ValueError: an unknown `prediction_type`.
    """
    if prediction_type == "epsilon":
        return (sample - s * output) / a
    if prediction_type == "v_prediction":
        square = a * a + s * s
        return (a * sample - s * square**0.5 * output) / square
    if prediction_type == "sample":
        return output
    if prediction_type == "flow_prediction":
        return sample - s * output
    raise _unknown(prediction_type)


def noise_prediction(output: Tensor, sample: Tensor, a: Any, s: Any, prediction_type: str) -> Tensor:
    """The noise ε that a denoiser's output implies. Arguments and errors are those of `clean_prediction`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        square = a * a + s * s
        return (a * square**0.5 * output + s * sample) / square
    if prediction_type == "sample":
        return (sample - a * output) / s
    if prediction_type == "flow_prediction":
        return sample + a * output
    raise _unknown(prediction_type)


def _unknown(prediction_type: Any) -> ValueError:
    return ValueError(
        f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}."
    )


# --- the training loss ---


def training_target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The training target of a denoiser at `timesteps` (B,): the noise, the clean sample or the velocity.

    Args:
        scheduler: a `DDPMScheduler` or `DDIMScheduler`. Its `prediction_type` selects the target.
        clean, noise: (B, ...).

    Raises:
        ValueError: another prediction type.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    raise ValueError(f"Unknown prediction_type {kind!r}: expected epsilon, v_prediction or sample.")


def min_snr_weights(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """(B,) weights of the squared errors at `timesteps`: min(SNR, γ), converted to the prediction's units.

    Hang et al. 2023, arXiv:2303.09556. min(SNR, γ) weights the error of the clean sample. The error of the
    noise is SNR times as large, and that of the velocity SNR + 1 times.
    """
    snr = compute_snr(scheduler, timesteps)
    units = {"epsilon": snr, "v_prediction": snr + 1}.get(scheduler.config.prediction_type, 1)
    return snr.clamp(max=gamma) / units


def weighted_mse(output: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over rows of `weights` (B,) times the row's mean squared error, in float32 or float64."""
    precise = torch.promote_types(output.dtype, torch.float32)  # squares of half-precision numbers overflow
    rows = (output.to(precise) - target.to(precise)).square().flatten(1).mean(1)
    return (rows if weights is None else weights * rows).mean()


def denoising_loss(
    scheduler: Any,
    output: Tensor,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    snr_gamma: float | None = None,
) -> Tensor:
    """The loss of a diffusion model's prediction: `weighted_mse` to `training_target`.

    Args:
        scheduler, clean, noise, timesteps: as for `training_target`.
        output: (B, ...), the prediction for a·clean + s·noise.
        snr_gamma: γ of `min_snr_weights`; None for equal weights.
    """
    weights = None if snr_gamma is None else min_snr_weights(scheduler, timesteps, snr_gamma)
    return weighted_mse(output, training_target(scheduler, clean, noise, timesteps), weights)
