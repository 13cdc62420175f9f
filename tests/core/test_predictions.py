"""Levels, predictions and losses, against their definitions and diffusers' own schedulers."""

import math
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusers_ext.core.predictions import (
    PREDICTION_TYPES,
    clean_prediction,
    denoising_loss,
    min_snr_weights,
    noise_prediction,
    training_target,
    weighted_mse,
)
from diffusers_ext.core.schedules import levels_at


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(
        shape or (2, 4, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def output_of(kind: str, clean: Tensor, noise: Tensor, a: Any, s: Any) -> Tensor:
    """What a perfect denoiser predicts."""
    n = (a * a + s * s) ** 0.5
    perfect = {
        "epsilon": noise,
        "sample": clean,
        # Of the unit-variance state: v = α ε − σ x₀ with (α, σ) = (a, s)/n.
        "v_prediction": (a * noise - s * clean) / n,
        "flow_prediction": noise - clean,
    }
    return perfect[kind]


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@given(angle=st.floats(0.05, 1.5), size=st.floats(0.1, 20.0))
def test_a_perfect_prediction_gives_back_the_sample_and_the_noise(
    kind: str, angle: float, size: float
) -> None:
    clean, noise = draw(0), draw(1)
    a, s = size * math.cos(angle), size * math.sin(angle)
    if kind == "flow_prediction":
        a, s = a / (a + s), s / (a + s)
    x, output = a * clean + s * noise, output_of(kind, clean, noise, a, s)
    # float64 rounding, magnified by 1/a and 1/s up to some 200.
    assert torch.allclose(clean_prediction(output, x, a, s, kind), clean, atol=1e-9)
    assert torch.allclose(noise_prediction(output, x, a, s, kind), noise, atol=1e-9)


def test_levels_may_be_tensors_a_row() -> None:
    clean, noise = draw(0), draw(1)
    a, s = (torch.tensor(v, dtype=torch.float64).reshape(2, 1, 1, 1) for v in ([0.6, 0.8], [0.8, 0.6]))
    x = a * clean + s * noise
    rows = [clean_prediction(noise[i], x[i], float(a[i]), float(s[i]), "epsilon") for i in range(2)]
    assert torch.equal(clean_prediction(noise, x, a, s, "epsilon"), torch.stack(rows))


def test_an_unknown_prediction_is_named() -> None:
    for convert in (clean_prediction, noise_prediction):
        with pytest.raises(ValueError, match=r"prediction_type must be one of .* got 'score'"):
            convert(draw(0), draw(1), 0.6, 0.8, "score")


def scheduler(kind: str) -> Any:
    return diffusers.DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear", clip_sample=False)


TIMES = torch.tensor([10, 500])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_perfect_model_has_no_loss(kind: str, gamma: float | None) -> None:
    clean, noise, schedule = draw(0).float(), draw(1).float(), scheduler(kind)
    a, s = levels_at(schedule, TIMES, clean)
    output = output_of(kind, clean, noise, a, s)
    # float32 rounding of values up to 4, squared.
    assert float(denoising_loss(schedule, output, clean, noise, TIMES, gamma)) < 1e-11
    # diffusers' own scheduler takes the same step from it.
    x = schedule.add_noise(clean, noise, TIMES)
    for row, t in enumerate(TIMES.tolist()):
        step = schedule.step(output[row : row + 1], t, x[row : row + 1])
        assert torch.allclose(step.pred_original_sample, clean[row : row + 1], atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_the_same_error_of_the_clean_sample_alike(kind: str) -> None:
    """min(SNR, γ) times the clean sample's squared error, whatever the model predicts (Hang et al., section 3.4)."""
    clean, noise, schedule = draw(0), draw(1), scheduler(kind)
    a, s = (level.double() for level in levels_at(schedule, TIMES, clean))
    wrong = clean + 0.1 * draw(2)
    x = a * clean + s * noise
    output = output_of(kind, wrong, (x - a * wrong) / s, a, s)
    snr = compute_snr(schedule, TIMES)
    expected = (snr.clamp(max=5.0) * (wrong - clean).square().mean((1, 2, 3))).mean()
    found = denoising_loss(schedule, output, clean, noise, TIMES, 5.0)
    # The schedule's ᾱ are float32.
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_losses_of_half_precision_do_not_overflow() -> None:
    big = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert float(weighted_mse(big, -big)) == 600.0**2
    assert float(weighted_mse(big, -big, torch.tensor([0.5]))) == 600.0**2 / 2


def test_targets_of_other_kinds_are_refused() -> None:
    odd = scheduler("epsilon")
    odd.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="Unknown prediction_type 'score'"):
        training_target(odd, draw(0), draw(1), TIMES)
    assert min_snr_weights(scheduler("sample"), TIMES, 5.0).shape == (2,)
