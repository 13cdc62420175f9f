"""Pruned transformers: exactly the teacher without some blocks, in a stock class, at the predicted cost."""

import copy
import functools
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from torch import Tensor, nn

import diffusers_ext as dx
from diffusers_ext.asdm.block_scores import block_costs, similarity
from diffusers_ext.asdm.calibration import the_latents, with_rows
from diffusers_ext.asdm.cost import Cost
from diffusers_ext.asdm.networks import network_config, shape_of
from diffusers_ext.asdm.prune import teacher_blocks
from diffusers_ext.asdm.search import PruningProfile
from diffusers_ext.asdm.sensitivity import Sensitivity, predict
from diffusers_ext.asdm.streams import skipped_blocks
from diffusers_ext.asdm.transformers import LISTS, REFUSED, interval_of
from tests import families
from tests.asdm.transformers import DEPTH, NAMES, deep, recorded

pytestmark = pytest.mark.filterwarnings("ignore")

STOCK = """
import sys, torch, diffusers
kind = getattr(diffusers, sys.argv[1])
network = kind.from_pretrained(sys.argv[2]).eval()
given = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    found = network(**given["inputs"], return_dict=False)[0]
# Another process may sum a product in another order: rounding of float32, outputs of order 1.
torch.testing.assert_close(found, given["output"], rtol=1e-4, atol=1e-5)
assert "diffusers_ext" not in sys.modules
"""
# As of Stable Diffusion 3.5 medium: a second attention in the first blocks, and norms of queries and keys.
SD35 = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}


@functools.cache
def made(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """A deep transformer of a family, and the inputs that it gets in a guided call."""
    pipe = deep("sd3", **SD35) if name == "sd35" else deep(name)
    return pipe.transformer, recorded(pipe, "sd3" if name == "sd35" else name)


def plan(network: Any, *stages: tuple[str, ...]) -> dx.PruningPlan:
    return dx.PruningPlan(network_config(network), stages)


def cuts(network: Any, numbers: list[int]) -> tuple[str, ...]:
    """Cuts of the blocks with these numbers in every list."""
    return tuple(f"block:{name}.{i}" for name in LISTS[type(network).__name__] for i in numbers)


def without(network: Any, names: tuple[str, ...]) -> Any:
    """A copy of the network that runs only the other blocks, which is the teacher that skips these."""
    found = copy.deepcopy(network)
    gone = [interval_of(cut) for cut in names]
    for name in LISTS[type(network).__name__]:
        numbers = {i for which, first, last in gone if which == name for i in range(first, last + 1)}
        blocks = (block for i, block in enumerate(getattr(found, name)) if i not in numbers)
        setattr(found, name, nn.ModuleList(blocks))
    return found


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# --- surgery ---


@pytest.mark.parametrize("numbers", [[1], [2, 3], [1, 2]], ids=str)
@pytest.mark.parametrize("name", [*NAMES, "sd35"])
def test_a_pruned_transformer_is_the_teacher_without_these_blocks(name: str, numbers: list[int]) -> None:
    network, inputs = made(name)
    names = cuts(network, numbers)
    student = dx.prune_network(network, plan(network, names))
    wanted = predict(without(network, names), inputs)
    assert equal(predict(student, inputs), wanted)
    assert not equal(predict(network, inputs), wanted)
    with skipped_blocks(network, [cut.removeprefix("block:") for cut in names]):
        assert equal(predict(network, inputs), wanted)
    assert type(student) is type(network)
    assert [len(getattr(student, entry)) for entry in LISTS[type(network).__name__]] == [
        DEPTH - len(numbers)
    ] * len(LISTS[type(network).__name__])
    next(iter(student.parameters())).data.zero_()
    assert equal(predict(without(network, names), inputs), wanted)  # its own weights


def test_the_first_block_can_be_removed_too() -> None:
    for name in ("sd35", "flux"):
        network, inputs = made(name)
        student = dx.prune_network(network, plan(network, cuts(network, [0])))
        assert equal(predict(student, inputs), predict(without(network, cuts(network, [0])), inputs))


def test_the_dual_attentions_of_stable_diffusion_3_5_are_renumbered() -> None:
    network, _ = made("sd35")
    student = dx.prune_network(network, plan(network, ("block:transformer_blocks.0",)))
    assert list(student.config.dual_attention_layers) == [0]
    assert [block.attn2 is not None for block in student.transformer_blocks] == [True, False, False]


@pytest.mark.parametrize("name", ["sd35", "flux"])
def test_stages_one_by_one_equal_all_at_once(name: str) -> None:
    network, inputs = made(name)
    whole = plan(network, ("block:transformer_blocks.3",), ("block:transformer_blocks.0-1",))
    student = network
    for stage in range(2):
        student = dx.prune_network(student, whole, from_stage=stage, num_stages=stage + 1)
        direct = dx.prune_network(network, whole, num_stages=stage + 1)
        assert network_config(student) == network_config(direct)
        assert equal(predict(student, inputs), predict(direct, inputs))


@pytest.mark.parametrize("name", [*NAMES, "sd35"])
def test_it_saves_and_loads_as_a_stock_class(name: str, tmp_path: Path) -> None:
    network, inputs = made(name)
    student = dx.prune_network(network, plan(network, cuts(network, [1, 3])))
    student.save_pretrained(tmp_path)
    loaded = getattr(diffusers, type(network).__name__).from_pretrained(tmp_path).eval()
    assert equal(predict(loaded, inputs), predict(student, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd35", "flux"])
def test_it_runs_in_a_process_that_never_imports_this_package(name: str, tmp_path: Path) -> None:
    network, inputs = made(name)
    student = dx.prune_network(network, plan(network, cuts(network, [1, 3])))
    student.save_pretrained(tmp_path / "transformer")
    given = {key: value for key, value in inputs[0].items() if isinstance(value, Tensor)}
    torch.save({"inputs": given, "output": predict(student, [given])[0]}, tmp_path / "given.pt")
    arguments = [type(network).__name__, str(tmp_path / "transformer"), str(tmp_path / "given.pt")]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, cwd=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtypes_of_the_teacher_are_kept(dtype: torch.dtype) -> None:
    network = copy.deepcopy(made("sd35")[0]).to(dtype)
    student = dx.prune_network(network, plan(network, ("block:transformer_blocks.3",)))
    assert {value.dtype for value in student.parameters()} == {dtype}
    # The table of positions too, which is a buffer.
    assert student.pos_embed.pos_embed.dtype == network.pos_embed.pos_embed.dtype


def test_a_block_stands_for_the_removed_ones_after_it() -> None:
    network, _ = made("flux")
    shape = plan(
        network,
        ("block:transformer_blocks.0", "block:transformer_blocks.2", "block:single_transformer_blocks.1-3"),
    ).shape()
    assert shape.intervals() == {
        "transformer_blocks.0": ("transformer_blocks.0", "transformer_blocks.2"),
        "transformer_blocks.1": ("transformer_blocks.3", "transformer_blocks.3"),
        "single_transformer_blocks.0": ("single_transformer_blocks.0", "single_transformer_blocks.3"),
    }
    assert teacher_blocks(plan(network, ("block:transformer_blocks.1",)))["transformer_blocks.0"] == (
        "transformer_blocks.1"
    )


# --- refusals ---


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (("block:layers.0",), "Unknown cut 'block:layers.0': expected block:LIST.I or block:LIST.I-J"),
        (("mid",), "Unknown cut 'mid'"),
        (("block:transformer_blocks.4",), "has the blocks 0 to 3"),
        (("block:transformer_blocks.2-1",), "has the blocks 0 to 3"),
        (("block:transformer_blocks.1",) * 2, "transformer_blocks.1 is removed already: omit this cut"),
        (("block:transformer_blocks.0-3",), "is the only block left in transformer_blocks: keep one"),
    ],
)
def test_wrong_cuts_are_refused(wrong: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        plan(made("flux")[0], wrong)


def test_the_first_block_of_a_dit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transformer_blocks\.0 cannot be removed, since its embedding of"):
        plan(made("dit")[0], ("block:transformer_blocks.0",))


@pytest.mark.parametrize("name", families.NAMES)
def test_a_pipeline_that_cannot_be_pruned_is_refused_by_name(name: str) -> None:
    pipe = families.build(name)
    known = name in NAMES or families.FAMILIES[name].denoisers == ("unet",)
    if name == "modular-flux" or (known and name not in ("ddpm", "sd-controlnet")) or name.startswith("flux"):
        assert dx.support(pipe).refusals["A-SDM"] is None
    else:
        with pytest.raises(ValueError, match=type(pipe).__name__):
            dx.record_calibration_inputs(pipe, ["a"], num_timesteps=1, num_inference_steps=1)


@pytest.mark.parametrize("name", ["chroma", "hunyuan-dit"])
def test_transformers_without_an_exact_cut_are_refused_with_the_reason(name: str) -> None:
    network = families.build(name).transformer
    with pytest.raises(ValueError, match=re.escape(REFUSED[type(network).__name__])):
        network_config(network)


def test_a_config_without_the_name_of_its_class_is_refused() -> None:
    with pytest.raises(ValueError, match="_class_name None and is not that of a UNet"):
        dx.PruningPlan(dict(made("sd3")[0].config), ())


def test_other_networks_and_changed_ones_are_refused() -> None:
    network, flux = made("sd3")[0], made("flux")[0]
    cut = plan(network, ("block:transformer_blocks.1",))
    with pytest.raises(ValueError, match="for a SD3Transformer2DModel, got a FluxTransformer2DModel"):
        dx.prune_network(flux, cut)
    with pytest.raises(ValueError, match="for a SD3Transformer2DModel, got a UNet2DConditionModel"):
        dx.prune_network(families.build("sd").unet, cut)
    with pytest.raises(ValueError, match=r"another transformer.*num_layers: 4 expected, 1 given"):
        dx.prune_network(families.build("sd3").transformer, cut)
    adapted = copy.deepcopy(network)
    adapted.add_adapter(peft.LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="A transformer with a LoRA or with fused projections cannot be"):
        dx.prune_network(adapted, cut)
    cast = copy.deepcopy(network)
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ValueError, match=r"pruned transformer would not cast them: prune before casting"):
        dx.prune_network(cast, cut)
    own = type("SD3Transformer2DModel", (diffusers.SD3Transformer2DModel,), {})(num_layers=1)
    with pytest.raises(ValueError, match=r"Expected diffusers' own SD3Transformer2DModel, got one of tests"):
        network_config(own)


# --- costs ---


@pytest.mark.parametrize("name", [*NAMES, "sd35"])
def test_predicted_costs_are_those_of_the_pruned_network(name: str) -> None:
    network, inputs = made(name)
    costs = block_costs(network, inputs[0])
    for names in (cuts(network, [1]), cuts(network, [2, 3])):
        student = dx.prune_network(network, plan(network, names))
        found = costs.of_shape(shape_of(network_config(network)).cut(*names))
        real = block_costs(student, inputs[0]).total
        assert found.parameters == real.parameters == student.num_parameters() < network.num_parameters()
        # Divided by the rows, in whole numbers, for every part.
        assert abs(found.macs - real.macs) <= len(costs.parts)
        assert real.macs < costs.total.macs


def test_macs_are_those_of_the_matrix_products() -> None:
    network, inputs = made("flux")
    width, rows = 32, len(inputs[0]["hidden_states"])
    image, text = inputs[0]["hidden_states"].shape[1], inputs[0]["encoder_hidden_states"].shape[1]
    tokens = image + text
    # Queries, keys, values, out and feed-forward of both streams; attention; six modulations of each stream.
    double = 12 * width**2 * tokens + 2 * tokens**2 * width + 12 * width**2
    costs = block_costs(network, inputs[0])
    assert rows == 2
    assert costs.parts["transformer_blocks.1"].macs == double


def test_times_of_blocks_with_the_same_work_are_equal() -> None:
    network, inputs = made("sd3")
    parts = block_costs(network, inputs[0], repeats=1).parts
    times = [parts[f"transformer_blocks.{i}"].milliseconds for i in range(DEPTH)]
    assert times[0] == times[1] == times[2] != times[3]


@pytest.mark.parametrize("name", ["flux", "flux2", "zimage", "pixart"])
def test_rows_of_a_call(name: str) -> None:
    network, inputs = made(name)
    one, wanted = with_rows(inputs[0], 1), predict(network, inputs[:1])[0]
    # Attention over another number of rows sums in another order: outputs of order 1.
    torch.testing.assert_close(predict(network, [one])[0], wanted[:1], rtol=0, atol=1e-5)
    assert len(the_latents(with_rows(inputs[0], 3))) == 3
    assert len(predict(network, [with_rows(inputs[0], 5)])[0]) == 5


# --- the search ---


@functools.cache
def profile(criterion: str) -> PruningProfile:
    network, inputs = made("flux")
    return dx.profile_network(network, inputs, repeats=0, criterion=criterion)


def test_the_loss_of_a_cut_is_the_change_of_the_output() -> None:
    network, inputs = made("flux")
    wanted = predict(network, inputs)
    for criterion in ("drop", "contiguous"):
        losses = profile(criterion).sensitivity.cuts
        for cut in ["block:single_transformer_blocks.2", "block:transformer_blocks.1-3"]:
            if "-" in cut and criterion == "drop":
                assert (cut,) not in losses
                continue
            found = predict(without(network, (cut,)), inputs)
            rows = [
                ((one - other).flatten(1).square().sum(1) / other.flatten(1).square().sum(1)).mean()
                for one, other in zip(found, wanted)
            ]
            assert losses[(cut,)] == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)


def test_similarity_is_one_less_the_cosine_of_what_enters_and_leaves() -> None:
    network, inputs = made("flux")
    inside: dict[str, Any] = {}
    block = network.transformer_blocks[1]
    handle = block.register_forward_hook(
        lambda *given: inside.update(given=given[2], out=given[3]), with_kwargs=True
    )
    with torch.no_grad():
        network(**inputs[0])
    handle.remove()
    text, image = inside["out"]
    pairs = ((image, inside["given"]["hidden_states"]), (text, inside["given"]["encoder_hidden_states"]))
    cosines = [nn.functional.cosine_similarity(one, other, dim=-1).mean() for one, other in pairs]
    found = similarity(network, inputs[:1])
    assert found["transformer_blocks.1"] == pytest.approx(1 - float(sum(cosines)) / 2, abs=1e-6)
    assert {
        cut[0].removeprefix("block:"): loss for cut, loss in profile("similarity").sensitivity.cuts.items()
    } == (pytest.approx(similarity(network, inputs), abs=1e-9))


def test_a_plan_is_the_best_of_all_sets_of_cuts() -> None:
    found = profile("drop")
    losses, total = found.sensitivity.cuts, found.costs.total.macs
    names = [cut for (cut,) in losses]
    best = (float("inf"), ())
    for choice in range(2 ** len(names)):
        chosen = tuple(cut for i, cut in enumerate(names) if choice >> i & 1)
        if all(sum(cut.startswith(f"block:{entry}.") for cut in chosen) < DEPTH for entry in LISTS[KIND]):
            left = found.costs.of_shape(shape_of(found.config).cut(*chosen)).macs
            if left <= 0.6 * total:
                best = min(best, (sum(losses[cut,] for cut in chosen), chosen))
    plan = found.plan(0.6)
    assert plan.predictions[-1].loss == pytest.approx(best[0])
    assert plan.predictions[-1].cost.macs <= 0.6 * total


KIND = "FluxTransformer2DModel"


def test_intervals_are_measured_as_a_whole_and_do_not_touch() -> None:
    found = profile("contiguous")
    for target in (0.8, 0.6, 0.5):
        plan = found.plan(target, num_stages=1)
        taken = sorted(interval_of(cut) for cut in plan.cuts)
        assert all(one[0] != other[0] or one[2] + 1 < other[1] for one, other in itertools.pairwise(taken)), (
            plan.cuts
        )
        assert plan.predictions[-1].loss == pytest.approx(
            sum(found.sensitivity.cuts[cut,] for cut in plan.cuts)
        )


def test_of_many_blocks_the_best_set_is_found_in_a_short_time() -> None:
    # As many as Flux.1 has. The best set of n equal blocks has the n smallest losses.
    config = {"_class_name": KIND, "num_layers": 19, "num_single_layers": 38}
    names = list(shape_of(config).units())
    draw = torch.Generator().manual_seed(0)
    losses = dict(zip(names, torch.rand(len(names), generator=draw, dtype=torch.float64).tolist()))
    parts = {name: Cost(36 if name.startswith("transformer") else 15, 1, 0.1) for name in names}
    costs = dx.asdm.cost.CostTable(Cost(19 * 36 + 38 * 15, 57, 5.7), parts, {}, None, None, None)
    found = PruningProfile(
        shape_of(config).base,
        costs,
        Sensitivity(dict(losses), {(f"block:{n}",): v for n, v in losses.items()}),
    )
    plan = found.plan(0.5, by="macs")  # every block is one
    assert len(plan.cuts) == 29
    assert plan.predictions[-1].loss == pytest.approx(sum(sorted(losses.values())[:29]))
    assert found.plan(0.5, by="milliseconds").predictions[-1].loss == pytest.approx(plan.predictions[-1].loss)


def test_random_plans_are_of_single_blocks() -> None:
    found = [profile("contiguous").random_plan(0.6, seed=seed) for seed in range(8)]
    # No plan of equal blocks is within 3 points of the target.
    assert len({plan.shape().identity() for plan in found}) > 5
    assert {len(plan.cuts) for plan in found} == {4}
    for plan in found:
        assert all("-" not in cut for cut in plan.cuts)
        assert plan.predictions[-1].cost.macs <= 0.6 * plan.predictions[0].cost.macs


def test_plans_are_saved_and_loaded(tmp_path: Path) -> None:
    plan = profile("contiguous").plan(0.6, num_stages=2)
    plan.save(tmp_path / "plan.json")
    assert dx.PruningPlan.load(tmp_path / "plan.json") == plan


def test_wrong_criteria_and_missing_inputs_are_refused() -> None:
    network, inputs = made("sd3")
    with pytest.raises(ValueError, match="criterion must be drop, similarity, contiguous, got 'cka'"):
        dx.profile_network(network, inputs, criterion="cka")
    unet = families.build("sd").unet
    with pytest.raises(ValueError, match="criterion='similarity' is for the blocks of transformers"):
        dx.profile_network(unet, [{}], criterion="similarity")
    with pytest.raises(ValueError, match="cost of a transformer is measured in a call of its pipeline"):
        dx.profile_network(network, [], score=lambda network: 0.0)
    with pytest.raises(ValueError, match="with the height and width for the pipeline"):
        dx.profile_network(network, inputs, height=8, width=8)
