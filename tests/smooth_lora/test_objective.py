"""Smooth-LoRA's denoising loss, against what each kind of model is trained to predict."""

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from diffusers_ext.core.schedules import levels_at
from diffusers_ext.smooth_lora.training import SmoothLoraObjective


class Perfect(nn.Module):
    """Predicts what it is told, as a UNet does."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, sample: Tensor, timesteps: Tensor, **conditions: Any) -> Any:
        return diffusers.models.unets.unet_2d_condition.UNet2DConditionOutput(sample=self.output)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_perfect_model_of_any_kind_has_no_loss(kind: str, gamma: float | None) -> None:
    """A model that predicts the clean sample was trained on the noise once, where a perfect one has a loss of 2."""
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    clean, noise, times = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([100, 800])
    a, s = levels_at(scheduler, times, clean)
    outputs = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * clean}
    prompt = torch.zeros(2, 3, 5)

    def loss(output: Tensor) -> float:
        objective = SmoothLoraObjective(Perfect(output), scheduler, None, snr_gamma=gamma)
        return float(objective(clean, noise, times, noise, prompt))

    # Squared float32 rounding.
    assert loss(outputs[kind]) < 1e-11
    assert loss(outputs["epsilon" if kind == "sample" else "sample"]) > 0.01
