"""The canonical call of every trained transformer is that of its pipeline: inputs, time, sign, layout, captions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    QwenImageImg2ImgPipeline,
)
from torch import Tensor, nn

from diffusers_ext.asdm.transformers import LISTS
from diffusers_ext.core.families import denoiser_of, guidance_of, to_grid
from diffusers_ext.core.hooks import add_hook
from diffusers_ext.core.pipeline import call_pipeline
from diffusers_ext.training.levels import SCHEMES, FlowLevels, loss_weights, training_sigmas
from diffusers_ext.training.models import freeze
from diffusers_ext.training.rows import rows_of_step
from diffusers_ext.training.sharding import blocks_of
from diffusers_ext.training.transformers import encode_captions, flow_of, without_padding
from tests import families, tiny

EMBEDDED = 2.5


def call_of(name: str, batch: int = 2) -> dict[str, Any]:
    """A call without guidance, but with the embedded scale, of prompts of different lengths, in the default template."""
    call = families.inputs(name, batch, steps=3, guided=False)
    for template in ("complex_human_instruction", "system_prompt"):
        call.pop(template, None)
    if guidance_of(families.build(name)).embedded:
        call["guidance_scale"] = EMBEDDED
    return {**call, "output_type": "latent", "generator": families.generators(batch)}


def steps_of(pipe: Any, call: dict[str, Any]) -> list[tuple[Tensor, Tensor, float]]:
    """What the scheduler was given in each step of a call: model output, noisy latents, and the time as a noise level."""
    found = []

    def keep(given: dict[str, Any], result: Any) -> Any:
        found.append(
            (given["model_output"].clone(), given["sample"].clone(), float(given["timestep"]) / 1000)
        )
        return result

    handle = add_hook(pipe.scheduler, "step", keep)
    call_pipeline(pipe, **call)
    handle.remove()
    # DPM-Solver, of Sana, tells whole numbers.
    assert all(abs(t - s) < 1e-3 for (*_, t), s in zip(found, pipe.scheduler.sigmas.tolist()))
    return found


@pytest.mark.parametrize("name", families.FLOWS)
@torch.no_grad()
def test_the_velocity_is_what_the_pipeline_gives_its_scheduler(name: str) -> None:
    pipe, call = families.build(name), call_of(name)
    flow, shape = flow_of(pipe), families.latent_shape(name)
    recorded = steps_of(pipe, call)
    texts = encode_captions(pipe, call["prompt"], call.get("max_sequence_length"))
    assert len({round(sigma, 3) for *_, sigma in recorded}) == 3
    for output, sample, sigma in recorded:
        x, expected = (to_grid(flow.family.layout, value, shape).float() for value in (sample, output))
        levels = torch.full((2,), sigma)
        found = flow.velocity(pipe.transformer, x, levels, EMBEDDED, **texts)
        # The time is embedded at 1000σ, where float32 has steps of 6e-5.
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        # Each of these would be heard.
        assert (
            flow.velocity(pipe.transformer, x, 0.8 * levels, EMBEDDED, **texts) - expected
        ).abs().max() > 1e-2
        if guidance_of(pipe).embedded:
            other = flow.velocity(pipe.transformer, x, levels, EMBEDDED + 1, **texts)
            assert (other - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", families.FLOWS)
@torch.no_grad()
def test_a_row_depends_on_no_other_row(name: str) -> None:
    pipe, call = families.build(name), call_of(name, 3)
    flow = flow_of(pipe)
    length = call.get("max_sequence_length")
    together = encode_captions(pipe, call["prompt"], length)
    x = torch.randn(3, *families.latent_shape(name), generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.2, 0.6, 0.95])
    batch = flow.velocity(pipe.transformer, x, levels, EMBEDDED, **without_padding(together))
    for i, prompt in enumerate(call["prompt"]):
        alone = encode_captions(pipe, [prompt], length)
        assert {key: value.shape[1:] for key, value in alone.items()} == {
            key: value.shape[1:] for key, value in together.items()
        }
        row = flow.velocity(
            pipe.transformer, x[i : i + 1], levels[i : i + 1], EMBEDDED, **without_padding(alone)
        )
        # Sums of other lengths in float32.
        torch.testing.assert_close(row[0], batch[i], atol=1e-4, rtol=1e-4)
    if flow.masked:
        assert together["prompt_mask"].shape == together["prompt_embeds"].shape[:2]
        assert not together["prompt_embeds"][~together["prompt_mask"]].any()
        assert without_padding(together)["prompt_mask"].any(0).all()


@pytest.mark.parametrize("name", families.TRANSFORMERS)
@torch.no_grad()
def test_a_frozen_transformer_in_half_precision_takes_inputs_in_float32(name: str) -> None:
    pipe, call = families.build(name), call_of(name)
    flow = flow_of(pipe)
    texts = encode_captions(pipe, call["prompt"], call.get("max_sequence_length"))
    x = torch.randn(2, *families.latent_shape(name), generator=torch.Generator().manual_seed(0))
    # Flux rounds 1000 times these to bfloat16, which has all three.
    given: Any = (x, torch.tensor([0.256, 0.768]), 2.0)
    exact = flow.velocity(pipe.transformer, *given, **texts)
    launch: Any = SimpleNamespace(mixed_precision="bf16", device="cpu")
    freeze(pipe.transformer, launch)
    # Without autocast, as in validations and for figures.
    found = flow.velocity(pipe.transformer, *given, **texts)
    assert found.dtype == torch.bfloat16
    # Eight bits, through a few layers; networks with weights as large as theirs enlarge the rounding.
    assert float((found - exact).norm() / exact.norm()) < 0.2


def test_numbers_of_positions_are_not_rounded() -> None:
    seen: list[Any] = []
    network: Any = nn.Linear(2, 2)
    network.dtype = torch.bfloat16
    launch: Any = SimpleNamespace(mixed_precision="bf16", device="cpu")
    freeze(network, launch)
    network.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    # As of Flux at 4112 pixels, and of SDXL.
    numbers: Any = {
        "img_ids": torch.tensor([[0.0, 257.0, 1.0]]),
        "added": {"time_ids": torch.tensor([[1023.0]])},
    }
    with pytest.raises(TypeError):
        network(torch.zeros(1, 2), timestep=torch.tensor([999.0]), **numbers)
    (given,) = seen
    assert given["timestep"].item() == 999
    assert given["img_ids"][0, 1] == 257
    assert given["added"]["time_ids"].item() == 1023


@pytest.mark.parametrize("name", ["sd", "pixart", "chroma", "auraflow", "wan", "dit", "modular-flux"])
def test_other_pipelines_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"has no transformer that can be trained\. Expected one of Stable"):
        flow_of(families.build(name))


def test_parts_that_are_missing_or_others_are_named() -> None:
    with pytest.raises(ValueError, match="FluxPipeline has no text_encoder, which training needs"):
        flow_of(tiny.build("flux"))
    pipe = families.build("qwen")
    editing = QwenImageImg2ImgPipeline(**pipe.components)
    with pytest.raises(ValueError, match="QwenImageImg2ImgPipeline has no transformer that can be trained"):
        flow_of(editing)
    pipe.register_modules(transformer=families.build("sd3").transformer)
    with pytest.raises(
        ValueError, match="is a SD3Transformer2DModel, expected a QwenImageTransformer2DModel"
    ):
        flow_of(pipe)
    dev = families.build("flux")
    width = dev.transformer.config.in_channels
    dev.transformer.register_to_config(in_channels=2 * width)
    with pytest.raises(ValueError, match="takes 8 channels, and the latents have 4: it has further inputs"):
        flow_of(dev)
    dev.transformer.register_to_config(in_channels=width)
    with pytest.raises(ValueError, match=r"takes a guidance scale as an input .* give guidance"):
        flow_of(dev).velocity(
            dev.transformer, torch.zeros(1, 4, 8, 8), torch.ones(1), **encode_captions(dev, ["a"], 16)
        )


# --- noise levels ---


def test_levels_are_those_of_the_training_schedule() -> None:
    plain = torch.arange(1000, 0, -1) / 1000
    shifted = 3 * plain / (1 + 2 * plain)
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    for scheduler, expected in (
        (FlowMatchEulerDiscreteScheduler(), plain),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), shifted),
        (solver, shifted),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), plain),
        # diffusers, too, uses no constant shift if the shift is dynamic.
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), plain),
    ):
        scheduler.set_timesteps(4, **({"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}))
        torch.testing.assert_close(training_sigmas(scheduler), expected, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="DDIMScheduler is not the scheduler of a flow"):
        training_sigmas(DDIMScheduler())
    with pytest.raises(ValueError, match="FlowMatchLCMScheduler belongs to a model that is distilled"):
        training_sigmas(FlowMatchLCMScheduler())
    with pytest.raises(ValueError, match="invert_sigmas=True runs from data to noise"):
        training_sigmas(FlowMatchEulerDiscreteScheduler(invert_sigmas=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_levels_are_drawn_and_weighted_by_the_scheme(scheme: str) -> None:
    levels = FlowLevels(training_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0)), scheme)
    drawn = torch.cat([levels(rows_of_step(0, step, 0, 500))["sigmas"] for step in range(4)]).double()
    # σ at the place u of the schedule from noise to image.
    place = (1 - torch.arange(0.5, 2000) / 2000).double()
    if scheme == "logit_normal":
        place = torch.special.ndtri(place).sigmoid()
    if scheme == "mode":
        place = 1 - place - 1.29 * ((torch.pi * place / 2).cos() ** 2 - 1 + place)
    left = 1 - place
    expected = (3 * left / (1 + 2 * left)).sort().values
    # Two thousand draws: the largest difference of the distributions is below 1.95/√2000 in 99.9% of all cases.
    distance = (
        torch.searchsorted(drawn.sort().values, expected) / 2000 - torch.arange(0.5, 2000) / 2000
    ).abs()
    assert distance.max() < 0.044
    weights = loss_weights(scheme, drawn)
    known = {"sigma_sqrt": drawn**-2, "cosmap": 2 / (torch.pi * (1 - 2 * drawn + 2 * drawn**2))}
    torch.testing.assert_close(weights.double(), known.get(scheme, torch.ones_like(drawn)), rtol=1e-5, atol=0)


def test_rows_draw_the_same_level_in_any_process() -> None:
    levels = FlowLevels(training_sigmas(FlowMatchEulerDiscreteScheduler()), "logit_normal")
    one = levels(rows_of_step(3, 5, 0, 4))["sigmas"]
    two = [levels(rows_of_step(3, 5, rank, 2))["sigmas"] for rank in (0, 1)]
    assert torch.equal(one, torch.cat(two))
    assert not torch.equal(one, levels(rows_of_step(3, 6, 0, 4))["sigmas"])


@pytest.mark.parametrize("name", [*families.FLOWS, "sd", "ddpm"])
def test_all_blocks_are_gathered_one_by_one(name: str) -> None:
    network = denoiser_of(families.build(name))
    lists = LISTS.get(type(network).__name__, ("down_blocks.0.resnets",))
    blocks = {type(part).__name__ for path in lists for part in network.get_submodule(path).children()}
    assert blocks <= set(blocks_of(nn.ModuleList([network])))
