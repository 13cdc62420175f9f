"""Golden noise as blocks of a modular SDXL pipeline, against the blocks without and the classic pipeline."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, DDIMScheduler, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_ext import NPNetModel
from diffusers_ext.golden_noise.modular import GoldenNoiseStep, golden_noise_blocks
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = ["a aaa", "a bbb"]
BATCH = 4  # two prompts, two pictures each
CALL = {"prompt": PROMPTS, "height": 8, "width": 8, "num_inference_steps": 3, "output_type": "pt"}
PREPARE = "denoise.before_denoise.prepare_latents"


def network(trained: bool = True, **config: Any) -> NPNetModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        npnet = NPNetModel(**{"text_dim": 32, "width": 32, "depth": 1, **config}).eval()
        if trained:
            torch.nn.init.normal_(npnet.compact.out.weight, std=0.05)
    return npnet


@functools.cache
def stock() -> Any:
    return tiny.build("sdxl")


def modular(blocks: Any, npnet: NPNetModel | None = None, classic: Any = None) -> Any:
    """A pipeline of the blocks with the components of the tiny classic pipeline."""
    pipe = blocks.init_pipeline()
    given = {**(classic or stock()).components, "npnet": npnet}
    wanted = {name: given[name] for name in pipe.pretrained_component_names if given.get(name) is not None}
    pipe.update_components(**wanted, guider=ClassifierFreeGuidance(guidance_scale=5.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_blocks() -> Any:
    return StableDiffusionXLAutoBlocks().get_workflow("text2image")


def call(pipe: Any, output: str = "images", **changes: Any) -> Tensor:
    given = {"num_images_per_prompt": 2, "generator": tiny.generators(BATCH)}
    return pipe(output=output, **{**CALL, **given, **changes})


def start(pipe: Any, **changes: Any) -> Tensor:
    """What the denoising loop of the pipeline starts from."""
    blocks = pipe.blocks.sub_blocks
    last = list(blocks).index("denoise.denoise")
    early = SequentialPipelineBlocks.from_blocks_dict(dict(list(blocks.items())[:last]))
    return call(modular(early, getattr(pipe, "npnet", None), pipe), "latents", **changes)


def unit_noise() -> Tensor:
    """The noise that `call` draws."""
    return randn_tensor((BATCH, 4, 8, 8), generator=tiny.generators(BATCH), dtype=torch.float32)


def prompt_embeds() -> Tensor:
    return stock().encode_prompt(PROMPTS, num_images_per_prompt=2, do_classifier_free_guidance=False)[0]


def scale() -> float:
    # prepare_latents reads it after set_timesteps.
    scheduler = type(stock().scheduler).from_config(stock().scheduler.config)
    scheduler.set_timesteps(3)
    return float(scheduler.init_noise_sigma)


def test_the_scheduler_scales_its_noise() -> None:
    assert scale() > 10


def test_an_untrained_network_changes_nothing() -> None:
    golden = call(modular(golden_noise_blocks(), network(trained=False)))
    torch.testing.assert_close(golden, call(modular(plain_blocks())), atol=1e-5, rtol=0)


def test_the_start_is_the_networks_noise() -> None:
    npnet = network()
    pipe = modular(golden_noise_blocks(), npnet)
    with torch.no_grad():
        golden = npnet(unit_noise(), prompt_embeds()).sample
    assert (golden - unit_noise()).abs().mean() > 0.05
    torch.testing.assert_close(start(pipe) / scale(), golden, atol=1e-5, rtol=0)
    half = unit_noise().lerp(golden, 0.5)
    torch.testing.assert_close(start(pipe, golden_strength=0.5) / scale(), half, atol=1e-5, rtol=0)


@pytest.mark.parametrize("each", [1, 2])
def test_equals_the_classic_pipeline_with_golden_latents(each: int) -> None:
    npnet = network()
    given = {"num_images_per_prompt": each, "generator": tiny.generators(2 * each)}
    result = modular(golden_noise_blocks(), npnet)(
        **{**CALL, **given}, output=["images", "pooled_prompt_embeds"]
    )
    embeds, negative, pooled, negative_pooled = stock().encode_prompt(PROMPTS, num_images_per_prompt=each)
    noise = randn_tensor((2 * each, 4, 8, 8), generator=tiny.generators(2 * each))
    with torch.no_grad():
        latents = npnet(noise, embeds).sample
    # diffusers 0.42's input step repeats the pooled embeddings as 0 1 0 1, and all others as 0 0 1 1.
    if each == 1:
        assert torch.equal(result["pooled_prompt_embeds"], pooled)
    classic = stock()(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=result["pooled_prompt_embeds"],
        negative_pooled_prompt_embeds=negative_pooled,
        latents=latents,
        guidance_scale=5.0,
        **{key: CALL[key] for key in ("height", "width", "num_inference_steps", "output_type")},
    ).images
    torch.testing.assert_close(result["images"], classic, atol=1e-4, rtol=0)
    plain = call(modular(plain_blocks()), num_images_per_prompt=each, generator=tiny.generators(2 * each))
    assert (classic - plain).abs().amax((1, 2, 3)).min() > 1e-3


def test_strength_0_is_off() -> None:
    plain = call(modular(plain_blocks()))
    assert torch.equal(call(modular(golden_noise_blocks(), network()), golden_strength=0.0), plain)
    assert torch.equal(call(modular(golden_noise_blocks()), golden_strength=0), plain)


def test_latents_of_the_caller_are_left_alone() -> None:
    latents = unit_noise()
    pipe = modular(golden_noise_blocks(), network())
    assert torch.equal(call(pipe, latents=latents), call(modular(plain_blocks()), latents=latents))
    assert torch.equal(latents, unit_noise())
    # The next call of the same pipeline draws its noise again.
    assert not torch.equal(start(pipe), start(modular(plain_blocks())))


def test_the_step_inserted_by_hand() -> None:
    blocks = plain_blocks()
    blocks.sub_blocks.insert("golden_noise", GoldenNoiseStep(), list(blocks.sub_blocks).index(PREPARE) + 1)
    pipe, whole = modular(blocks, network()), modular(golden_noise_blocks(), network())
    assert torch.equal(call(pipe), call(whole))
    # Alone it has to be told whose the latents are.
    latents = unit_noise()
    assert torch.equal(start(pipe, latents=latents, latents_given=True), start(whole, latents=latents))
    assert torch.equal(start(pipe, latents=latents), start(whole))


def test_keeps_the_latents_dtype() -> None:
    classic = tiny.build("sdxl", dtype=torch.bfloat16)
    pipe = modular(golden_noise_blocks(), network(), classic)
    latents = start(pipe)
    assert latents.dtype == torch.bfloat16
    assert torch.isfinite(call(pipe).float()).all()
    # The network is float32 and its noise is rounded once only.
    noise = start(modular(plain_blocks(), classic=classic)).float() / scale()
    embeds = classic.encode_prompt(PROMPTS, num_images_per_prompt=2, do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        golden = pipe.npnet(noise, embeds.float()).sample
    torch.testing.assert_close(latents, (golden * scale()).bfloat16(), atol=0, rtol=2**-7)


def test_a_scheduler_that_does_not_scale() -> None:
    pipe = modular(golden_noise_blocks(), network())
    pipe.update_components(scheduler=DDIMScheduler.from_config(stock().scheduler.config))
    with torch.no_grad():
        golden = network()(unit_noise(), prompt_embeds()).sample
    torch.testing.assert_close(start(pipe), golden, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("npnet", "message"),
    [
        (None, "needs the component npnet"),
        (torch.nn.Identity(), "must be an NPNetModel, got Identity"),
        (network(text_dim=48), "width 48, got 32"),
    ],
)
def test_refuses_a_wrong_network(npnet: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(modular(golden_noise_blocks(), npnet))


def test_every_text_to_image_workflow() -> None:
    workflows = StableDiffusionXLAutoBlocks().available_workflows
    assert "text2image" in workflows
    for workflow in workflows:
        if not workflow.endswith("text2image"):
            with pytest.raises(ValueError, match="does not start from pure noise"):
                golden_noise_blocks(workflow)
            continue
        names = list(golden_noise_blocks(workflow).sub_blocks)
        place = names.index(PREPARE)
        assert names[place - 1 : place + 2] == ["given_latents", PREPARE, "golden_noise"]
    with pytest.raises(ValueError, match="text3image"):
        golden_noise_blocks("text3image")


def test_the_pipeline_documents_its_inputs() -> None:
    pipe = modular(golden_noise_blocks(), network())
    names = [parameter.name for parameter in pipe.blocks.inputs]
    assert "golden_strength" in names
    assert "latents_given" not in names
    assert "golden_strength" in pipe.doc
    assert "npnet" in pipe.component_names


def test_saved_and_loaded(tmp_path: Path) -> None:
    pipe = modular(golden_noise_blocks(), network())
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = golden_noise_blocks().init_pipeline(str(tmp_path))
    again.load_components()
    again.update_components(guider=ClassifierFreeGuidance(guidance_scale=5.0))
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.npnet, NPNetModel)
    assert torch.equal(call(again), call(pipe))


def test_components_of_a_classic_repository(tmp_path: Path) -> None:
    stock().save_pretrained(tmp_path / "sdxl")
    network().save_pretrained(tmp_path / "npnet")
    pipe = golden_noise_blocks().init_pipeline(str(tmp_path / "sdxl"))
    pipe.load_components()
    pipe.update_components(npnet=NPNetModel.from_pretrained(tmp_path / "npnet"))
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(start(pipe), start(modular(golden_noise_blocks(), network())))
    assert call(pipe).shape == (BATCH, 3, 8, 8)


def test_a_call_with_another_clip_skip_than_in_training_is_refused() -> None:
    pipe = modular(golden_noise_blocks(), network(prompt_options={"clip_skip": 1}))
    call(pipe, clip_skip=1)
    call(pipe, golden_strength=0.0)
    with pytest.raises(ValueError, match="clip_skip=1 there, None here"):
        call(pipe)
