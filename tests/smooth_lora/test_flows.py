"""The objective on flow-matching transformers, held to pipelines and to the maths, for every family that is trained."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch import Tensor, nn

from diffusers_ext.core.families import guidance_of
from diffusers_ext.core.pipeline import given_latents, model_output
from diffusers_ext.smooth_lora.training import FlowSmoothLoraObjective, check_class, check_pipeline
from diffusers_ext.smooth_lora.variation import StepwiseVariationLoss, double_differentiable
from diffusers_ext.training.lora import add_lora
from diffusers_ext.training.transformers import encode_captions, flow_of
from tests import families

TEMPLATES = ("complex_human_instruction", "system_prompt")
EMBEDDED = 2.5


def call_of(name: str) -> dict[str, Any]:
    call = families.inputs(name, 2, steps=2, guided=False)
    if guidance_of(families.build(name)).embedded:
        call["guidance_scale"] = EMBEDDED
    return {key: value for key, value in call.items() if key not in TEMPLATES}


def trainable(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, list[nn.Parameter]]:
    """A pipeline with LoRA layers that act, and their parameters."""
    pipe = families.build(name, dtype=dtype)
    add_lora(pipe.transformer, 2, targets=flow_of(pipe).targets)
    added = [p for p in pipe.transformer.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(0)
    for parameter in added:
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=draw, dtype=dtype)
    return pipe, added


def batch_of(pipe: Any, name: str) -> dict[str, Tensor]:
    draw, call = torch.Generator().manual_seed(1), call_of(name)
    shape = (2, *families.latent_shape(name))
    drawn = {key: torch.randn(shape, generator=draw) for key in ("latents", "noise", "direction")}
    return {**drawn, **encode_captions(pipe, call["prompt"], call.get("max_sequence_length"))}


def objective_of(
    pipe: Any, variation: StepwiseVariationLoss | None, weight: float, scheme: str = "none"
) -> Any:
    return FlowSmoothLoraObjective(pipe.transformer, flow_of(pipe), variation, weight, scheme, EMBEDDED)


@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_the_loss_is_that_of_what_the_pipeline_predicts(name: str) -> None:
    pipe, _ = trainable(name)
    batch = batch_of(pipe, name)
    # The first step of a call starts from noise alone, at σ = 1; DPM-Solver, of Sana, tells the time 999.
    sigmas = torch.full((2,), 0.999 if name == "sana" else 1.0)
    start = torch.lerp(batch["latents"], batch["noise"], sigmas[:, None, None, None])
    with torch.no_grad():
        predicted = model_output(pipe, given_latents(pipe, start), call_of(name))
        layout = flow_of(pipe).family.layout
        if layout == "patches":
            predicted = from_patches(predicted, name)
        expected = (predicted - (batch["noise"] - batch["latents"])).square().mean()
        plain = objective_of(pipe, None, 0.0)(sigmas=sigmas, **batch)
        variation = StepwiseVariationLoss("flow_prediction", rate=0.5)
        smooth = objective_of(pipe, variation, 3.0)(sigmas=sigmas, **batch)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=0)
    # Of the variation, (v − a)² with a half of the mean, since the first mean is 0.
    noise = batch["noise"].clone().requires_grad_()
    texts = {key: value for key, value in batch.items() if "prompt" in key}
    levels = sigmas[:, None, None, None]
    x = (1 - levels) * batch["latents"] + levels * noise
    with double_differentiable(pipe.transformer):
        clean = x - levels * flow_of(pipe).velocity(pipe.transformer, x, sigmas, EMBEDDED, **texts)
        delta = levels * batch["direction"] / batch["direction"][0].numel() ** 0.5
        (gradient,) = torch.autograd.grad((clean * delta).sum(), noise)
    values = gradient.flatten(1).norm(dim=1)
    penalty = (values - values.mean() / 2).square().mean()
    torch.testing.assert_close(smooth, plain + 3 * penalty, rtol=1e-4, atol=0)
    assert penalty > 1e-3 * plain


def from_patches(x: Tensor, name: str) -> Tensor:
    """2 × 2 patches → (B, C, H, W), written apart from the package."""
    channels, height, width = families.latent_shape(name)
    rows = [
        [x[:, i * width // 2 + j].view(-1, channels, 2, 2) for j in range(width // 2)]
        for i in range(height // 2)
    ]
    return torch.cat([torch.cat(row, dim=3) for row in rows], dim=2)


@pytest.mark.parametrize("name", families.TRANSFORMERS)
def test_the_second_derivatives_are_those_of_the_loss(name: str) -> None:
    pipe, added = trainable(name, torch.float64)
    draw = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    batch = {key: normal(2, *families.latent_shape(name)) for key in ("latents", "noise", "direction")}
    flow, config = flow_of(pipe), pipe.transformer.config
    names = ("joint_attention_dim", "cap_feat_dim", "caption_channels")
    batch["prompt_embeds"] = normal(2, 5, next(config[key] for key in names if key in config))
    if flow.masked:
        batch["prompt_mask"] = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    if "pooled_projection_dim" in config:
        batch["pooled_prompt_embeds"] = normal(2, config.pooled_projection_dim)
    variation = StepwiseVariationLoss("flow_prediction", rate=0.5).double().eval()
    objective = objective_of(pipe, variation, 1.0, "cosmap")
    sigmas = torch.tensor([0.3, 0.9])
    objective(sigmas=sigmas, **batch).backward()
    assert all(p.grad is None for p in pipe.transformer.parameters() if not p.requires_grad)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in added]
    slope = float(torch.cat([g.flatten() for g in gradients]).norm())
    losses = []
    for size in (1e-3, -2e-3):
        with torch.no_grad():
            for parameter, gradient in zip(added, gradients):
                parameter += size * gradient / slope
        losses.append(float(objective(sigmas=sigmas, **batch)))
    # Along the gradient. Some layers compute in float32 whatever their weights are, which rounds by 1e-6.
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-2)
    assert slope > 0.01


# The linear layers of one block of each kind, as diffusers' scripts choose them.
LAYERS = {
    # The only block of the tiny model is its last one, which has no output for the text.
    "sd3": ("attn.", ["add_k_proj", "add_q_proj", "add_v_proj", "to_k", "to_out.0", "to_q", "to_v"]),
    "flux": (
        "",
        [
            *(f"attn.add_{part}_proj" for part in "kqv"),
            *("attn.to_add_out", "attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        ],
    ),
    "flux2": ("attn.", ["to_k", "to_out.0", "to_q", "to_v"]),
    "qwen": ("attn.", ["to_k", "to_out.0", "to_q", "to_v"]),
    "zimage": ("attention.", ["to_k", "to_out.0", "to_q", "to_v"]),
    "sana": ("attn1.", ["to_k", "to_q", "to_v"]),
    "lumina2": ("attn.", ["to_k", "to_out.0", "to_q", "to_v"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_of_upstream_get_a_lora(name: str) -> None:
    pipe, _ = trainable(name)
    found = {key.rpartition(".lora_")[0] for key, p in pipe.transformer.named_parameters() if p.requires_grad}
    prefix, layers = LAYERS[name]
    block = "layers.0." if name in ("zimage", "lumina2") else "transformer_blocks.0."
    own = sorted(key.removeprefix(block + prefix) for key in found if key.startswith(block + prefix))
    assert own == sorted(layers)
    if name == "flux2":
        single = {
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            "single_transformer_blocks.0.attn.to_out",
        }
        assert {key for key in found if key.startswith("single")} == single


def test_the_mean_per_timestep_has_bins_over_sigma() -> None:
    pipe, _ = trainable("sd3")
    variation = StepwiseVariationLoss("flow_prediction", mean="per_timestep", num_bins=10)
    objective = objective_of(pipe, variation, 1.0)
    objective(sigmas=torch.tensor([0.34, 1.0]), **batch_of(pipe, "sd3"))
    assert variation.running_mean.nonzero().flatten().tolist() == [3, 9]


def test_other_attention_backends_have_no_second_derivative() -> None:
    pipe, _ = trainable("flux")
    batch = {**batch_of(pipe, "flux"), "sigmas": torch.tensor([0.3, 0.9])}
    exact, differences = (
        objective_of(pipe, StepwiseVariationLoss("flow_prediction", estimator), 1.0)
        for estimator in ("vjp", "finite_difference")
    )
    message = r'backend _native_flash, .*: use set_attention_backend\("native"\) .* or estimator="finite_difference"'
    pipe.transformer.set_attention_backend("_native_flash")
    with pytest.raises(ValueError, match=message):
        exact(**batch)
    differences(**batch)
    pipe.transformer.reset_attention_backend()
    with attention_backend(AttentionBackendName("_native_flash")), pytest.raises(ValueError, match=message):
        exact(**batch)
    pipe.transformer.set_attention_backend("native")
    exact(**batch).backward()


def test_refusals() -> None:
    pipe = families.build("sd3")
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        objective_of(pipe, None, -1)
    with pytest.raises(
        ValueError, match="prediction_type is flow_prediction, that of the variation loss is epsilon"
    ):
        objective_of(pipe, StepwiseVariationLoss("epsilon"), 1.0)
    with pytest.raises(
        ValueError, match=r"can be trained on StableDiffusionPipeline, .*Lumina2Pipeline, got Chroma"
    ):
        check_class(type(families.build("chroma")))
    pipe.scheduler = families.build("sd").scheduler
    with pytest.raises(ValueError, match="EulerDiscreteScheduler is not the scheduler of a flow"):
        check_pipeline(pipe)
