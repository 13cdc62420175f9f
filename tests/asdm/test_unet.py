"""The subclass: what its config says, what it loads in, what it refuses."""

import copy
import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

import diffusers_ext as dx
from diffusers_ext.asdm.condconv import add_cond_convs, fold_cond_convs
from diffusers_ext.asdm.cost import example_inputs
from diffusers_ext.asdm.gri_processors import GRIAttnProcessor
from diffusers_ext.asdm.prune import prune_network
from diffusers_ext.asdm.sensitivity import skipped
from diffusers_ext.asdm.unet import ASDMUNet2DConditionModel, SkippedAttention
from tests import tiny
from tests.asdm.networks import SDXL, SMALL, network, run

pytestmark = pytest.mark.filterwarnings("ignore")

OWN: dict[str, Any] = {
    "removed_attentions": ["down_blocks.1.attentions.1", "mid_block.attentions.0"],
    "gri_attention": {"paths": ["down_blocks.0", "up_blocks.2.attentions.1"], "window": 4, "pool": 2},
    "cond_convs": {"up_blocks.1.resnets.0.conv2": 3},
}


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        {**SDXL, "down_block_types": SMALL["down_block_types"], "up_block_types": SMALL["up_block_types"]},
    ],
)
def test_round_trip(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = ASDMUNet2DConditionModel(**config, **OWN).eval()
    with torch.no_grad():
        unet.get_submodule("up_blocks.1.resnets.0.conv2").weight.normal_(std=0.1)  # type: ignore[union-attr]
    unet.save_pretrained(tmp_path)
    again = ASDMUNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert isinstance(again.get_submodule("mid_block.attentions.0"), SkippedAttention)
    found = {name for name, p in again.attn_processors.items() if isinstance(p, GRIAttnProcessor)}
    assert {name.split(".transformer")[0] for name in found} == {
        "down_blocks.0.attentions.0",
        "down_blocks.0.attentions.1",
        "up_blocks.2.attentions.1",
    }
    for name, value in OWN.items():
        assert again.config[name] == value
    # The parent's config survives.
    assert list(again.config["block_out_channels"]) == list(config["block_out_channels"])
    assert torch.equal(run(again), run(unet))
    assert ASDMUNet2DConditionModel.from_config(again.config).state_dict().keys() == unet.state_dict().keys()


def test_the_config_follows_what_is_put_on_and_taken_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = ASDMUNet2DConditionModel(**SMALL, **OWN).eval()
    with torch.no_grad():
        unet.get_submodule("up_blocks.1.resnets.0.conv2").weight.normal_(std=0.1)  # type: ignore[union-attr]
    dx.remove_gri_attention(unet)
    assert fold_cond_convs(unet) == ["up_blocks.1.resnets.0.conv2"]
    assert unet.config["gri_attention"] is None
    assert unet.config["cond_convs"] is None
    unet.save_pretrained(tmp_path / "taken off")
    again = ASDMUNet2DConditionModel.from_pretrained(tmp_path / "taken off").eval()
    assert not any(isinstance(p, GRIAttnProcessor) for p in again.attn_processors.values())
    assert torch.equal(run(again), run(unet))
    dx.apply_gri_attention(unet, ["down_blocks.0"], window=4, pool=2)
    conv = unet.get_submodule("up_blocks.1.resnets.0.conv2")
    assert isinstance(conv, torch.nn.Conv2d)
    assert add_cond_convs(unet, {"up_blocks.1.resnets.0.conv2": [conv]}) == unet.config["cond_convs"]
    unet.save_pretrained(tmp_path / "put on")
    again = ASDMUNet2DConditionModel.from_pretrained(tmp_path / "put on").eval()
    assert torch.equal(run(again), run(unet))
    assert not torch.equal(run(unet), run(dx.remove_gri_attention(again)))


def test_without_its_own_keys_it_is_the_stock_unet(tmp_path: Path) -> None:
    stock = network()
    stock.save_pretrained(tmp_path)
    unet = ASDMUNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert torch.equal(run(unet), run(stock))


def test_a_removed_attention_is_a_skipped_one() -> None:
    teacher = network()
    path = "up_blocks.1.attentions.1"
    student = prune_network(teacher, dx.PruningPlan(dict(teacher.config), ((f"attention:{path}",),)))
    with skipped(teacher, [path]):
        assert torch.equal(run(student), run(teacher))
    assert not torch.equal(run(student), run(teacher))
    student.train().enable_gradient_checkpointing()
    given = torch.randn(1, 4, 16, 8, requires_grad=True)
    student(given, 5, torch.randn(1, 5, 12)).sample.sum().backward()
    assert given.grad is not None


def test_gri_attention_of_a_student_is_the_applied_one() -> None:
    teacher = network()
    student = prune_network(teacher, dx.PruningPlan(dict(teacher.config), (("gri.0",),)))
    dx.apply_gri_attention(teacher)  # at the finest resolution that has attention
    assert torch.equal(run(student), run(teacher))


def test_in_a_pipeline(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    plan = dx.PruningPlan(dict(pipe.unet.config), (("attention:up_blocks.1.attentions.1", "gri.0"),))
    pipe.unet = dx.prune_network(pipe.unet, plan)
    before = tiny.images(pipe, "sd", steps=2)
    pipe.save_pretrained(tmp_path)
    assert '"diffusers_ext"' in (tmp_path / "model_index.json").read_text()
    for kind in (StableDiffusionPipeline, DiffusionPipeline):
        again = kind.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert isinstance(again.unet, ASDMUNet2DConditionModel)
        assert torch.equal(tiny.images(again, "sd", steps=2), before)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"removed_attentions": ["down_blocks.9.attentions.0"]},
            "removed_attentions: expected a Module at 'down_blocks.9.attentions.0', found nothing",
        ),
        ({"removed_attentions": ["down_blocks.0.resnets.0"]}, "removed_attentions: expected paths like"),
        ({"cond_convs": {"conv_norm_out": 2}}, "expected a Conv2d at 'conv_norm_out', found a GroupNorm"),
        ({"cond_convs": {"conv_in": 0}}, "num_experts"),
        ({"gri_attention": {"paths": ["mid"]}}, "There is no self-attention at or under 'mid'"),
    ],
)
def test_errors(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ASDMUNet2DConditionModel(**SMALL, **given)
    assert isinstance(ASDMUNet2DConditionModel(**SMALL), UNet2DConditionModel)


def test_the_signature_is_that_of_the_parent_and_its_own() -> None:
    parent, own = (
        inspect.signature(kind.__init__).parameters
        for kind in (UNet2DConditionModel, ASDMUNet2DConditionModel)
    )
    assert list(own) == [*parent, *OWN]
    assert all(own[name] == parent[name] for name in parent)
    assert ASDMUNet2DConditionModel._get_init_keys(ASDMUNet2DConditionModel) == set(own)
    # What is shown works: positional arguments too.
    rest = {key: value for key, value in SMALL.items() if key not in ("sample_size", "in_channels")}
    unet = ASDMUNet2DConditionModel(SMALL["sample_size"], SMALL["in_channels"], **rest, **OWN)
    assert unet.config["in_channels"] == SMALL["in_channels"]
    with pytest.raises(TypeError, match="elsewhere"):
        ASDMUNet2DConditionModel(**SMALL, elsewhere=1)


def test_gradient_checkpointing_and_device_maps() -> None:
    assert "CLMECondConv2d" in ASDMUNet2DConditionModel._no_split_modules
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        unet = ASDMUNet2DConditionModel(**SMALL, **OWN)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        torch.manual_seed(1)
        unet(**example_inputs(unet.config, 2, tokens=5)).sample.square().mean().backward()
        found.append({name: p.grad for name, p in unet.named_parameters()})
    assert all(a is found[1][name] is None or torch.equal(a, found[1][name]) for name, a in found[0].items())


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting(storage: torch.dtype) -> None:
    torch.manual_seed(0)
    unet = ASDMUNet2DConditionModel(**SMALL, **OWN).eval()
    exact = run(unet)
    unet.enable_layerwise_casting(storage_dtype=storage)
    assert (run(unet) - exact).abs().mean() < 0.1 * exact.abs().mean()


@pytest.mark.parametrize(
    "scales",
    [{"down": 0.5}, {"down": {"block_1": [0.5, 2.0]}, "up": 0.0}, {"mid": 0.0, "up": {"block_2": 3.0}}],
)
@pytest.mark.parametrize("removed", [False, True])
def test_scales_of_a_lora_by_block(removed: bool, scales: dict[str, Any]) -> None:
    own = OWN if removed else {"gri_attention": OWN["gri_attention"]}
    torch.manual_seed(0)
    unet = ASDMUNet2DConditionModel(**SMALL, **own).eval()
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    unet.add_adapter(config, "random")
    reference = copy.deepcopy(unet)
    unet.set_adapters(["random"], [scales])
    # The scale of every layer by hand.
    for name, layer in reference.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            part, index, _, position = (name.replace("mid_block", "mid_blocks.0").split("."))[:4]
            scale: Any = scales.get(part.removesuffix("_blocks"), 1.0)
            scale = scale.get(f"block_{index}", 1.0) if isinstance(scale, dict) else scale
            layer.set_scale("random", scale[int(position)] if isinstance(scale, list) else scale)
    assert torch.allclose(run(unet), run(reference), atol=1e-6)
    with pytest.raises(ValueError, match=r"Expected 2 scales for down\.block_1, got 3"):
        unet.set_adapters(["random"], [{"down": {"block_1": [1.0, 1.0, 1.0]}}])
