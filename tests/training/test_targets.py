"""Networks that predict the noise, the velocity or the clean sample are trained on the right target everywhere."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

import diffusers_ext as dx
from diffusers_ext.asdm.distill import DistillObjective, DistillWeights
from diffusers_ext.core.schedules import levels_at, noising_scheduler
from diffusers_ext.sign.pairs import teacher_flow
from diffusers_ext.sign.projector import check_teacher, denoise
from diffusers_ext.smooth_lora.training import SmoothLoraObjective
from diffusers_ext.smooth_lora.variation import StepwiseVariationLoss
from diffusers_ext.testbed.base_models import NoiseObjective
from tests import tiny

# Euler has another name for `sample`.
KINDS = {
    "epsilon": DDPMScheduler(prediction_type="epsilon"),
    "v_prediction": DDIMScheduler(prediction_type="v_prediction"),
    "sample": DDIMScheduler(prediction_type="sample"),
    "original_sample": EulerDiscreteScheduler(prediction_type="original_sample"),
}


def predicted(kind: str, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean}.get(kind, clean)


class Oracle(nn.Module):
    """Knows the clean samples, and predicts exactly what its kind of network should."""

    def __init__(self, kind: str, scheduler: Any, clean: Tensor) -> None:
        super().__init__()
        self.kind, self.scheduler, self.clean = kind, scheduler, clean
        self.config = SimpleNamespace(in_channels=4, out_channels=4)
        self.down_blocks = self.up_blocks = ()

    def forward(self, sample: Tensor, timesteps: Any, *args: Any, **conditions: Any) -> Any:
        steps = torch.as_tensor(timesteps).long().expand(len(sample))
        alpha, sigma = levels_at(self.scheduler, steps, sample)
        noise = (sample - alpha * self.clean) / sigma
        return SimpleNamespace(sample=predicted(self.kind, self.clean, noise, alpha, sigma))


@pytest.fixture(params=KINDS)
def kind(request: Any) -> str:
    return request.param


@pytest.fixture
def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    latents, noise, direction = (torch.randn(3, 4, 8, 8, generator=draw) for _ in range(3))
    return {
        "latents": latents,
        "noise": noise,
        "direction": direction,
        "timesteps": torch.tensor([100, 400, 900]),
        "prompt_embeds": torch.zeros(3, 1, 16),
    }


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_right_prediction_has_no_loss(kind: str, batch: dict[str, Tensor], gamma: float | None) -> None:
    """And the wrong ones have."""
    scheduler: Any = noising_scheduler(KINDS[kind])

    def losses(of: str) -> list[float]:
        oracle, teacher = (Oracle(of, scheduler, batch["latents"]) for _ in range(2))
        plain = [batch[name] for name in ("latents", "noise", "timesteps")]
        variation = StepwiseVariationLoss(scheduler.config.prediction_type, "finite_difference")
        only = DistillWeights(task=1, output=0, feature=0, semantic=0)
        return [
            float(SmoothLoraObjective(oracle, scheduler, None, 0.0, gamma)(**batch)),
            float(SmoothLoraObjective(oracle, scheduler, variation, 1.0, gamma)(**batch)),
            float(DistillObjective(oracle, teacher, scheduler, only, gamma)(*plain)),
            float(NoiseObjective(oracle, scheduler, None, gamma)(*plain)),
        ]

    assert max(losses(kind)) < 1e-5
    same = {"sample", "original_sample"}
    for other in KINDS.keys() - (same if kind in same else {kind}):
        assert min(losses(other)) > 1e-3


def test_sign_reads_the_prediction(kind: str, batch: dict[str, Tensor]) -> None:
    scheduler, clean = KINDS[kind], batch["latents"]
    oracle = Oracle(kind, scheduler, clean)
    check_teacher(oracle, scheduler)
    noisy = noising_scheduler(scheduler).add_noise(clean, batch["noise"], batch["timesteps"])  # type: ignore[arg-type]
    # Rounding of float32, divided by the α of timestep 900.
    assert torch.allclose(denoise(oracle, scheduler, noisy, batch["timesteps"]), clean, atol=1e-3)
    assert torch.allclose(teacher_flow(oracle, scheduler, batch["noise"], 5), clean, atol=1e-3)


def implied(kind: str, output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise."""
    if kind == "epsilon":
        return (sample - sigma * output) / alpha, output
    if kind == "v_prediction":
        return alpha * sample - sigma * output, alpha * output + sigma * sample
    return output, (sample - alpha * output) / sigma


def test_noise_pairs_read_the_prediction(kind: str, batch: dict[str, Tensor]) -> None:
    """One step down with the guided prediction and one step up, with a network whose output is known."""
    pipe, answer, noise = tiny.build("sd"), batch["latents"], batch["noise"]
    pipe.scheduler = type(KINDS[kind])(beta_end=0.012, prediction_type=kind)

    def known(network: Any, args: Any, output: Any) -> Any:
        blank = [torch.zeros_like(answer)] if len(args[0]) == 6 else []
        return (torch.cat([*blank, answer]),)

    pipe.unet.register_forward_hook(known)
    call: dict[str, Any] = {"prompt": ["a aaa", "a bbb", "a ccc"], "height": 8, "width": 8}
    found = dx.redenoise(pipe, noise, num_inference_steps=10, guidance_scale=3.0, **call)
    alphas = pipe.scheduler.alphas_cumprod[[900, 800]]
    (top, below), (top_noise, below_noise) = alphas.sqrt(), (1 - alphas).sqrt()
    clean, rest = implied(kind, 3 * answer, noise, top, top_noise)
    lower = below * clean + below_noise * rest
    clean, rest = implied(kind, answer, lower, below, below_noise)
    assert torch.allclose(found, top * clean + top_noise * rest, atol=1e-4)
