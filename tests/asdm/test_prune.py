"""Pruned UNets: which weight comes from where, what they load in, what their convolutions inherit."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel

import diffusers_ext as dx
from diffusers_ext.asdm.prune import cut_network, inherit_convs, prune_network, removed_convs, teacher_blocks
from diffusers_ext.asdm.unet import ASDMUNet2DConditionModel
from tests.asdm.networks import SDXL, SMALL, network, run, tagged

STOCK = """
import sys, torch
from diffusers import UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained(sys.argv[1]).eval()
given = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    # Another process may sum a convolution in another order: rounding of float32, some twenty layers deep,
    # outputs of order 1.
    torch.testing.assert_close(unet(**given["inputs"]).sample, given["output"], rtol=1e-4, atol=1e-5)
assert "diffusers_ext" not in sys.modules
"""


def plan(unet: Any, *stages: tuple[str, ...]) -> dx.PruningPlan:
    return dx.PruningPlan(dict(unet.config), stages)


def sources(student: Any, teacher: Any) -> dict[str, str]:
    """Of every parameter of a student of a tagged teacher, where it comes from, by its value."""
    names = {float(value.detach().flatten()[0]): name for name, value in teacher.named_parameters()}
    found = {name: names[float(value.detach().flatten()[0])] for name, value in student.named_parameters()}
    whole = dict(teacher.named_parameters())
    for name, value in student.named_parameters():
        assert torch.equal(value, whole[found[name]])
    return found


def moved(found: dict[str, str]) -> dict[str, str]:
    """The modules, three names deep, whose weights come from elsewhere."""

    def pairs(name: str) -> str:
        return ".".join(name.split(".")[:4])

    return {pairs(now): pairs(old) for now, old in found.items() if now != old}


@pytest.mark.parametrize("config", [SMALL, SDXL])
def test_nothing_removed_is_bit_equal(config: dict[str, Any]) -> None:
    unet = network(config)
    copy = prune_network(unet, plan(unet))
    assert type(copy) is UNet2DConditionModel
    assert torch.equal(run(copy), run(unet))
    next(iter(copy.parameters())).data.zero_()
    assert not torch.equal(run(copy), run(unet))  # its own weights


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [
        (("layer.1",), {"up_blocks.1.resnets.1": 2, "up_blocks.1.attentions.1": 2}),
        (("layer.2",), {"up_blocks.0.resnets.1": 2}),
        (("layer.2", "layer.2"), {}),
        (("layer.0", "layer.0"), {}),
        (("attention.down.0", "attention.up.1", "mid.attention"), {}),
        (("mid", "attention.up.0"), {}),
        (("gri.0", "attention:down_blocks.1.attentions.0"), {}),
        (("layer.1", "attention:up_blocks.1.attentions.2"), {"up_blocks.1.resnets.1": 2}),
    ],
)
def test_every_weight_is_where_it_should_be(cuts: tuple[str, ...], expected: dict[str, int]) -> None:
    teacher = tagged(network())
    student = prune_network(teacher, plan(teacher, cuts))
    wanted = {now: f"{now.rpartition('.')[0]}.{index}" for now, index in expected.items()}
    assert moved(sources(student, teacher)) == wanted


def test_a_removed_stage_shifts_the_up_blocks() -> None:
    teacher = tagged(network())
    student = prune_network(teacher, plan(teacher, ("stage.2", "layer.1")))
    found = moved(sources(student, teacher))
    assert len(student.down_blocks) == 2
    assert student.mid_block is None
    assert found["up_blocks.0.resnets.0"] == "up_blocks.1.resnets.0"
    assert found["up_blocks.0.resnets.1"] == "up_blocks.1.resnets.2"
    assert found["up_blocks.1.attentions.2"] == "up_blocks.2.attentions.2"
    assert run(student).isnan().any() or run(student).shape == (2, 4, 16, 8)
    assert teacher_blocks(plan(teacher, ("stage.2",))) == {
        "down_blocks.0": "down_blocks.0",
        "up_blocks.0": "up_blocks.1",
        "up_blocks.1": "up_blocks.2",
    }
    assert "mid_block" not in teacher_blocks(plan(teacher, ("mid",)))


def _make_identity(unet: Any, resnet: str) -> None:
    """The layer, and the attention after it, pass on what comes from the layer before."""
    module = unet.get_submodule(resnet)
    torch.nn.init.zeros_(module.conv2.weight)
    torch.nn.init.zeros_(module.conv2.bias)
    if module.conv_shortcut is not None:
        torch.nn.init.zeros_(module.conv_shortcut.bias)
        torch.nn.init.dirac_(module.conv_shortcut.weight)
    attention = dict(unet.named_modules()).get(resnet.replace("resnets", "attentions"))
    if attention is not None:
        torch.nn.init.zeros_(attention.proj_out.weight)
        torch.nn.init.zeros_(attention.proj_out.bias)


@pytest.mark.parametrize(
    ("cuts", "idle"),
    [
        (("layer.0",), ("down_blocks.0.resnets.1", "up_blocks.2.resnets.1")),
        (("layer.1",), ("down_blocks.1.resnets.1", "up_blocks.1.resnets.1")),
        (("layer.2",), ("down_blocks.2.resnets.1", "up_blocks.0.resnets.1")),
        (
            ("layer.0",) * 2,
            tuple(
                f"{b}.resnets.{i}" for b, i in zip(["down_blocks.0"] * 2 + ["up_blocks.2"] * 2, (0, 1, 1, 2))
            ),
        ),
        (("mid.attention",), ("mid_block.resnets.1",)),
    ],
)
def test_layers_that_do_nothing_are_not_missed(cuts: tuple[str, ...], idle: tuple[str, ...]) -> None:
    # The skips too: each is taken by the layer that took it, or its equal, in the whole UNet.
    teacher = network()
    for path in idle:
        _make_identity(teacher, path)
    if "mid.attention" in cuts:
        _make_identity(teacher, "mid_block.resnets.0")  # for its attention's sake
    student = prune_network(teacher, plan(teacher, cuts))
    # Identities by convolution with 0 and 1 are exact.
    torch.testing.assert_close(run(student), run(teacher), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [SMALL, SDXL])
def test_stages_one_by_one_equal_all_at_once(config: dict[str, Any]) -> None:
    teacher = network(config)
    whole = plan(
        teacher,
        ("layer.1", "layer.0"),
        ("mid.attention", "attention:up_blocks.1.attentions.2"),
        ("gri.1", "layer.2", "mid"),
    )
    student = teacher
    for stage in range(3):
        student = prune_network(student, whole, from_stage=stage, num_stages=stage + 1)
        direct = prune_network(teacher, whole, num_stages=stage + 1)
        assert dict(student.config) == dict(direct.config)
        assert torch.equal(run(student), run(direct))
    assert isinstance(student, ASDMUNet2DConditionModel)
    assert student.config["removed_attentions"] == ["up_blocks.1.attentions.1"]  # it moved up by one
    assert student.config["gri_attention"]["paths"] == [
        "down_blocks.1.attentions.0",
        "up_blocks.1.attentions.0",
    ]


def test_a_teacher_with_gri_attention_on_whole_blocks() -> None:
    gri = {"paths": ["down_blocks.0", "up_blocks.2.attentions.2"]}
    teacher = ASDMUNet2DConditionModel(**SMALL, gri_attention=gri).eval()
    cuts = plan(teacher, ("layer.0",), ("gri.1",))
    first = prune_network(teacher, cuts, num_stages=1)
    second = prune_network(first, cuts, from_stage=1)
    assert torch.equal(run(second), run(prune_network(teacher, cuts)))
    assert first.config["gri_attention"]["paths"] == [
        "down_blocks.0.attentions.0",
        "up_blocks.2.attentions.1",
    ]


@pytest.mark.slow
def test_stock_students_load_without_this_package(tmp_path: Path) -> None:
    from diffusers_ext.asdm.cost import example_inputs

    teacher = network()
    cuts = ("attention.down.0", "layer.1", "layer.0", "layer.0", "mid.attention", "attention.up.1")
    student = prune_network(teacher, plan(teacher, cuts))
    student.save_pretrained(tmp_path / "student")
    inputs = example_inputs(student.config, 1, tokens=5)
    with torch.no_grad():
        torch.save({"inputs": inputs, "output": student(**inputs).sample}, tmp_path / "given.pt")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "student"), str(tmp_path / "given.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_students_keep_dtype_and_mode_and_train() -> None:
    teacher = network().to(torch.bfloat16).train()
    student = prune_network(teacher, plan(teacher, ("layer.1", "gri.0")))
    assert student.dtype == torch.bfloat16
    assert student.training
    assert all(p.requires_grad for p in student.parameters())
    assert cut_network(teacher, "mid").conv_in.weight.data_ptr() == teacher.conv_in.weight.data_ptr()


def test_transformers_of_a_depth_each(tmp_path: Path) -> None:
    depths = {
        "transformer_layers_per_block": ((1, 2), (2, 1), 1),
        "reverse_transformer_layers_per_block": (1, (1, 2, 3), (3, 2, 1)),
    }
    teacher = tagged(network(**depths))
    student = prune_network(teacher, plan(teacher, ("layer.0", "layer.1")))
    assert student.config["reverse_transformer_layers_per_block"] == [1, [1, 3], [3, 1]]
    assert student.config["transformer_layers_per_block"] == [[1], [2], 1]
    sources(student, teacher)


# --- CLME-CondConv ---


def test_removed_convs() -> None:
    teacher = network()
    cuts = plan(teacher, ("layer.1", "mid.attention"))
    assert removed_convs(teacher, cuts) == {
        "down_blocks.1.resnets.0.conv2": ["down_blocks.1.resnets.1.conv2"],
        "mid_block.resnets.0.conv1": ["mid_block.resnets.1.conv1"],
        "mid_block.resnets.0.conv2": ["mid_block.resnets.1.conv2"],
        # conv1 of up layer 1 takes 16 + 16 channels, as layer 0's, and layer 2's 16 + 8.
        "up_blocks.1.resnets.0.conv1": ["up_blocks.1.resnets.1.conv1"],
        "up_blocks.1.resnets.0.conv2": ["up_blocks.1.resnets.1.conv2"],
    }
    assert removed_convs(teacher, plan(teacher, ("mid",))) == {}
    twice = plan(teacher, ("layer.2",), ("layer.2",))
    assert removed_convs(teacher, twice)["up_blocks.0.resnets.0.conv2"] == [
        "up_blocks.0.resnets.1.conv2",
        "up_blocks.0.resnets.2.conv2",
    ]
    first = prune_network(teacher, twice, num_stages=1)
    assert removed_convs(first, twice, from_stage=1)["up_blocks.0.resnets.0.conv2"] == [
        "up_blocks.0.resnets.1.conv2"
    ]


def test_inherited_convs_change_nothing_at_first_and_stay(tmp_path: Path) -> None:
    teacher = network()
    cuts = plan(teacher, ("layer.1",), ("layer.0",))
    student = prune_network(teacher, cuts, num_stages=1)
    rich = inherit_convs(student, teacher, cuts, num_stages=1)
    assert isinstance(rich, ASDMUNet2DConditionModel)
    assert rich.config["cond_convs"]["up_blocks.1.resnets.0.conv2"] == 2
    assert torch.equal(run(rich), run(student))
    layer = rich.get_submodule("up_blocks.1.resnets.0.conv2")
    removed = teacher.get_submodule("up_blocks.1.resnets.1.conv2")
    assert torch.equal(layer.weight[1], removed.weight)  # type: ignore[index]
    rich.save_pretrained(tmp_path)
    assert torch.equal(run(ASDMUNet2DConditionModel.from_pretrained(tmp_path).eval()), run(rich))
    # The next stage keeps the layers, and adds its own.
    second = prune_network(rich, cuts, from_stage=1)
    assert second.config["cond_convs"] == rich.config["cond_convs"]
    richer = inherit_convs(second, rich, cuts, from_stage=1)
    assert set(richer.config["cond_convs"]) > set(rich.config["cond_convs"])
    assert torch.equal(run(richer), run(second))


# --- refusals ---


def test_errors() -> None:
    teacher, other = network(), network(block_out_channels=(8, 16, 32))
    cuts = plan(teacher, ("layer.1",), ("mid",))

    def refused(text: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(text)):
            prune_network(*args, **kwargs)

    refused("This plan is for another UNet: the one it was made for has the fingerprint", other, cuts)
    refused("block_out_channels: [8, 16, 16] expected, [8, 16, 32] given", other, cuts)
    refused("its student of stage 1", teacher, cuts, from_stage=1)
    refused("The plan has the stages 0 (no cuts) to 2, got 3", teacher, cuts, num_stages=3)
    refused("from_stage=2 must lie between 0 and num_stages=1", teacher, cuts, from_stage=2, num_stages=1)
    refused("A Linear cannot be pruned, since its blocks are not known", torch.nn.Linear(1, 1), cuts)
    refused(
        "Give the .unet or .transformer of a pipeline, before torch.compile",
        torch.compile(teacher),
        cuts,
    )
    cast = network()
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    refused("stored as torch.float8_e4m3fn and cast in every layer", cast, cuts)
    dx.apply_gri_attention(teacher)
    refused("call remove_gri_attention first", teacher, cuts)
    dx.remove_gri_attention(teacher)
    with pytest.raises(ValueError, match="This plan is for another UNet: its student of stage 1"):
        inherit_convs(teacher, teacher, cuts, num_stages=1)


def test_a_unet_with_a_lora_is_refused() -> None:
    teacher = network()
    teacher.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="fuse or unload the LoRA first"):
        prune_network(teacher, plan(teacher, ("mid",)))
