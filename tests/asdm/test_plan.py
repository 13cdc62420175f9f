"""Plans: cuts that are refused, costs that are predicted, the search, presets, files, the command."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import diffusers_ext as dx
from diffusers_ext.asdm.calibration import noised_calibration_inputs
from diffusers_ext.asdm.cost import CostTable, cost_table, count_macs, example_inputs, measure_milliseconds
from diffusers_ext.asdm.networks import fingerprint
from diffusers_ext.asdm.plan import make_plan
from diffusers_ext.asdm.presets import PRESETS, preset_plan, preset_stages
from diffusers_ext.asdm.prune import cut_network, prune_network
from diffusers_ext.asdm.report import cuts_table, plan_table, profile_table, save_plot
from diffusers_ext.asdm.search import PruningProfile
from diffusers_ext.asdm.sensitivity import output_change, predict
from diffusers_ext.asdm.shape import UNetShape, possible_cuts
from diffusers_ext.asdm.unet import ASDMUNet2DConditionModel, empty_unet, unet_config
from tests import tiny
from tests.asdm.networks import SD15, SDXL, SMALL, network
from tests.test_cli import run as command

pytestmark = pytest.mark.filterwarnings("ignore")


def probes(unet: Any, count: int = 2) -> list[dict[str, Any]]:
    draw = torch.manual_seed(0)
    latents = torch.randn(2, 4, 16, 8, generator=draw)
    given: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 5, 12, generator=draw)}
    return noised_calibration_inputs(latents, (100, 700)[:count], tiny.build("sd").scheduler, **given)


@pytest.fixture(scope="module")
def analysis() -> PruningProfile:
    unet = network()
    return dx.profile_network(unet, probes(unet), repeats=1)


# --- cuts ---


@pytest.mark.parametrize(
    ("cuts", "text"),
    [
        (("layers.0",), "Unknown cut 'layers.0': expected layer.S,"),
        (("layer.3",), "Cut 'layer.3': the UNet has the resolutions 0 to 2"),
        (("layer.1",) * 2, "maps 8 channels to 16 and cannot be removed"),
        (("layer.0",) * 3, "resolution 0 has no layers left"),
        (("attention.down.2",), "down_blocks.2 of the original UNet has no attention"),
        (("attention.up.0", "attention.up.0"), "up_blocks.2 of the original UNet has no attention"),
        (("mid", "mid"), "the UNet has no mid block left: omit this cut"),
        (("mid", "mid.attention"), "the UNet has no mid block"),
        (("mid.attention", "mid.attention"), "the mid block has no attention left: omit this cut"),
        (("attention:mid_block.attentions.0", "mid.attention"), "the mid block has no attention"),
        (("stage.1",), "only the innermost of two or more resolutions can be removed, here stage.2"),
        (("stage.2", "stage.1"), "resolution 1 has 16 channels and the one above 8"),
        (("stage.2", "mid"), "the UNet has no mid block"),
        (("stage.2", "layer.2"), "the UNet has the resolutions 0 to 1"),
        (("gri.2",), "resolution 2 has no attention"),
        (("gri.0", "gri.0"), "resolution 0 has GRI attention already"),
        (("attention:up_blocks.0.attentions.0",), "there is no such attention in what is left"),
        (("layer.0", "attention:down_blocks.0.attentions.1"), "there is no such attention in what is left"),
        (("attention:down_blocks.0.resnets.0",), "there is no such attention"),
    ],
)
def test_refused_cuts(cuts: tuple[str, ...], text: str) -> None:
    with pytest.raises(ValueError, match="Stage 2 of the plan: .*" + re.escape(text)):
        dx.PruningPlan(SMALL, ((), cuts))


def test_refused_unets() -> None:
    with pytest.raises(ValueError, match="the UNet has no mid block left: omit this cut"):
        dx.PruningPlan({**SMALL, "mid_block_type": None}, (("mid",),))
    odd = {**SMALL, "down_block_types": ("AttnDownBlock2D",) * 3}
    with pytest.raises(ValueError, match="this UNet has AttnDownBlock2D"):
        dx.PruningPlan(odd, ())
    with pytest.raises(ValueError, match="stages must be lists of cuts"):
        dx.PruningPlan(SMALL, ("mid",))  # type: ignore[arg-type]
    whole = make_plan(SMALL, [], cost_table(network()))
    with pytest.raises(ValueError, match="has 2 predictions"):
        dx.PruningPlan(SMALL, (("mid",),), whole.predictions)


def test_fingerprints() -> None:
    unet = network()
    assert fingerprint(unet.config) == fingerprint({**SMALL, "layers_per_block": [2, 2, 2]})
    assert fingerprint(SMALL) == fingerprint({**SMALL, "sample_size": 99})
    assert fingerprint(SMALL) != fingerprint({**SMALL, "mid_block_type": None})
    assert fingerprint(SMALL) != fingerprint({**SMALL, "removed_attentions": ["down_blocks.0.attentions.0"]})


# --- costs ---


@pytest.fixture(scope="module")
def sd15() -> tuple[Any, CostTable]:
    with torch.device("meta"):
        unet = empty_unet(SD15)
    return unet, cost_table(unet)


@pytest.mark.parametrize(
    ("cuts", "parameters", "macs"),
    [
        ((), 859.5, 401.6),
        (("mid",), 762.5, 395.6),
        (("layer.3", "layer.3", "mid"), 601.9, 385.7),
        (("layer.0", "layer.3"), 768.5, 338.3),
        (("attention.down.0", "attention.up.0"), 846.8, 304.8),
        ("bk-base", 579.4, 261.5),
        ("bk-small", 482.3, 255.4),
        ("bk-tiny", 323.4, 242.8),
        ("incubation", None, None),
    ],
)
def test_stable_diffusion_by_millions_and_billions(sd15: Any, cuts: Any, parameters: Any, macs: Any) -> None:
    # The published sizes of BK-SDM, and measurements with other code (research notes).
    unet, costs = sd15
    stages = preset_stages(cuts, unet.config) if isinstance(cuts, str) else [cuts]
    plan = make_plan(unet.config, stages, costs)
    predicted = plan.predictions[-1].cost
    if parameters is not None:
        assert round(predicted.parameters / 1e6, 1) == parameters
        assert round(predicted.macs / 1e9, 1) == macs
    student = {**unet_config(unet), **plan.shape().config()}
    assert count_macs(student, 64, 64)[""] == predicted.macs
    with torch.device("meta"):
        assert empty_unet(student).num_parameters() == predicted.parameters


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, SDXL])
def test_predicted_costs_are_the_pruned_nets(config: dict[str, Any]) -> None:
    unet = network(config)
    costs = cost_table(unet, 16, 24, tokens=5)
    singles = [c for c in possible_cuts(unet.config) if not c.startswith("attention:up")]
    for cuts in [*((c,) for c in singles), ("layer.1", "gri.1", "attention:up_blocks.1.attentions.2", "mid")]:
        predicted = make_plan(unet.config, [cuts], costs).predictions[1].cost
        student = cut_network(unet, *cuts)
        assert count_macs(unet_config(student), 16, 24, tokens=5)[""] == predicted.macs, cuts
        assert student.num_parameters() == predicted.parameters, cuts
    # A student that has GRI attention and a removed attention is planned like any other.
    again = cost_table(student, 16, 24, tokens=5)
    smaller = cut_network(student, "layer.2", "attention.down.1")
    after = again.of_shape(UNetShape(student.config).cut("layer.2", "attention.down.1"))
    assert count_macs(unet_config(smaller), 16, 24, tokens=5)[""] == after.macs


def test_parts_add_up_and_times_are_measured() -> None:
    unet = network()
    costs = cost_table(unet, tokens=5, repeats=2, batch_size=2)
    units = UNetShape(unet.config).units()
    for block in ("down_blocks.0", "mid_block", "up_blocks.2"):
        inside = [costs.parts[u] for u in units if u.startswith(f"{block}.")]
        assert sum(c.macs for c in inside) == costs.parts[block].macs
        assert sum(c.parameters for c in inside) == costs.parts[block].parameters
        assert all(c.milliseconds is not None and c.milliseconds > 0 for c in inside)
    assert 0 < costs.parts["mid_block"].of("milliseconds") < costs.total.of("milliseconds")
    with pytest.raises(ValueError, match="repeats must be a whole number of 1 or more"):
        measure_milliseconds(unet, example_inputs(unet.config), [], 0)
    with pytest.raises(ValueError, match="Milliseconds were not measured"):
        cost_table(unet).total.of("milliseconds")
    with pytest.raises(ValueError, match="cost must be macs"):
        costs.total.of("flops")
    with pytest.raises(ValueError, match="both height and width of the latents"):
        cost_table(unet, height=8)
    with pytest.raises(ValueError, match="addition_embed_type='text'"):
        example_inputs({**SMALL, "addition_embed_type": "text"})


# --- the search ---


@pytest.mark.slow
def test_sensitivity_is_the_output_change(analysis: PruningProfile) -> None:
    unet = network()
    given = probes(unet)
    reference = predict(unet, given)
    assert output_change(unet, given, reference) == 0
    for cuts, loss in analysis.sensitivity.cuts.items():
        # Skipped or never built, an attention's output is the same to the last bit.
        assert output_change(cut_network(unet, *cuts), given, reference) == loss
    assert analysis.sensitivity.parts["down_blocks.1.resnets.0"] is None  # 8 to 16 channels
    assert analysis.sensitivity.parts["up_blocks.0"] is not None
    assert ("layer.0", "layer.0") in analysis.sensitivity.cuts


def test_a_score_in_place_of_probes() -> None:
    unet = network()
    calls: list[Any] = []

    def score(candidate: Any) -> float:
        calls.append(candidate)
        return -candidate.num_parameters() / 1000

    found = dx.profile_network(unet, [], repeats=0, score=score)
    assert found.sensitivity.cuts[("mid",)] == 0.0  # skipped in place: the same parameters
    less = unet.num_parameters() - cut_network(unet, "layer.1").num_parameters()
    assert found.sensitivity.cuts[("layer.1",)] == pytest.approx(less / 1000)
    assert calls[0] is unet


@pytest.mark.parametrize("by", ["macs", "parameters", "milliseconds"])
@pytest.mark.parametrize("stock_only", [True, False])
def test_the_plan_reaches_its_target(analysis: PruningProfile, by: str, stock_only: bool) -> None:
    unet = network()
    for target in (0.9, 0.6):
        plan = analysis.plan(target, by, 3, stock_only)
        assert plan.predictions[-1].cost.of(by) <= target * analysis.costs.total.of(by)
        assert 1 <= len(plan.stages) <= 3
        assert all(plan.stages)
        losses = [p.loss for p in plan.predictions]
        assert losses[0] == 0
        student = prune_network(unet, plan)
        assert student.num_parameters() == plan.predictions[-1].cost.parameters
        assert not (stock_only and isinstance(student, ASDMUNet2DConditionModel))


def test_the_plan_is_the_best_of_all(analysis: PruningProfile) -> None:
    shape, losses = UNetShape(analysis.config), analysis.sensitivity.cuts
    cuts = [*possible_cuts(analysis.config, stock_only=True), "layer.0", "layer.2"]
    sets = []
    for chosen in itertools.product((False, True), repeat=len(cuts)):
        taken = [c for c, yes in zip(cuts, chosen) if yes]
        try:
            cost = analysis.costs.of_shape(shape.cut(*taken)).macs
        except ValueError:
            continue
        groups = {tuple(c for c in taken if c == name) for name in taken}
        sets.append((sum(losses[g] for g in groups), cost))
    for target in (0.95, 0.8, 0.6, 0.4):
        best = min(loss for loss, cost in sets if cost <= target * analysis.costs.total.macs)
        assert analysis.plan(target, stock_only=True).predictions[-1].loss == pytest.approx(best)


def test_random_plans_reach_the_target_too(analysis: PruningProfile) -> None:
    found = {analysis.random_plan(0.7, seed=seed).cuts for seed in range(5)}
    assert len(found) == 5
    for cuts in found:
        plan = make_plan(analysis.config, [cuts], analysis.costs)
        assert 0.65 < plan.predictions[-1].cost.macs / analysis.costs.total.macs <= 0.7
    assert analysis.random_plan(0.7, seed=0) == analysis.random_plan(0.7, seed=0)


def test_targets_out_of_reach(analysis: PruningProfile) -> None:
    for wrong in (0.0, 1.0, 22):
        with pytest.raises(ValueError, match=r"target is the share of the cost that may remain"):
            analysis.plan(wrong)
    with pytest.raises(
        ValueError, match=r"leave 1.0% of its macs: they leave at least .* Set a target of 0\."
    ):
        analysis.plan(0.01)
    with pytest.raises(ValueError, match="or allow more than a stock UNet"):
        analysis.plan(0.01, stock_only=True)
    with pytest.raises(ValueError, match="No random cuts left"):
        analysis.random_plan(0.01)
    with pytest.raises(ValueError, match="num_stages must be a whole number of 1 or more"):
        analysis.plan(0.5, num_stages=0)
    with pytest.raises(ValueError, match="Expected inputs"):
        dx.plan_pruning(network(), [], 0.5)


@pytest.mark.slow
def test_plan_pruning_is_both_steps(analysis: PruningProfile) -> None:
    unet = network()
    plan = dx.plan_pruning(unet, probes(unet), 0.7, num_stages=2)
    assert plan.stages == analysis.plan(0.7, num_stages=2).stages


# --- presets and files ---


@pytest.mark.slow
def test_presets() -> None:
    small, sdxl, thin = network(), network(SDXL), tiny.unet()
    assert preset_plan("bk-base", small).stages == (("layer.0", "layer.1", "layer.2"),)
    assert preset_plan("bk-tiny", small).stages == (("layer.0", "layer.1", "stage.2"),)
    assert preset_plan("incubation", sdxl).stages == (
        ("layer.0", "layer.2"),
        ("layer.1", "mid.attention"),
        ("gri.1",),
    )
    assert preset_plan("bk-small", sdxl).stages == (("layer.0", "layer.1", "layer.2", "mid"),)
    with pytest.raises(
        ValueError, match="Presets of UNets are bk-base, bk-small, bk-tiny, incubation, got 'bk'"
    ):
        preset_plan("bk", small)
    with pytest.raises(ValueError, match="resolution 2 has 32 channels and the one above 16"):
        preset_plan("bk-tiny", sdxl)
    with pytest.raises(ValueError, match=r"this UNet has \[1, 1\] layers: plan it with plan_pruning"):
        preset_plan("bk-base", thin)
    with pytest.raises(ValueError, match="needs three or more resolutions"):
        preset_plan("incubation", thin)
    assert len(PRESETS) == 4


def test_files(analysis: PruningProfile, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = analysis.plan(0.7)
    plan.save(path)
    assert dx.PruningPlan.load(path) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    found = json.loads(path.read_text())
    found["config"]["norm_num_groups"] = 2
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="it was changed by hand or by another version"):
        dx.PruningPlan.load(path)
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"plan.json is not a pruning plan"):
            dx.PruningPlan.load(path)


def test_tables_and_plot(analysis: PruningProfile, tmp_path: Path) -> None:
    plan = analysis.plan(0.7)
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    for table in (
        profile_table(analysis),
        cuts_table(analysis),
        plan_table(plan),
        plan_table(dx.PruningPlan(SMALL, ())),
    ):
        console.print(table)
    text = console.export_text()
    for part in (
        "down_blocks.0.attentions.1",
        "mid_block",
        "layer.0 × 2",
        "gri.0",
        "full UNet",
        plan.cuts[0],
    ):
        assert part in text
    save_plot(analysis, tmp_path / "plot.png", plan)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


# --- the command, and probes of a pipeline ---


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    pipe = tiny.build("sd")
    pipe.save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a aaa\na bbb\n")
    asked = ("asdm", "plan", tmp_path / "sd", "--output", tmp_path / "plan.json")
    measured = ("--prompts", tmp_path / "prompts.txt", "--height", 8, "--width", 8, "--repeats", 1)
    measured += ("--timesteps", 2, "--num-inference-steps", 2)
    text = command(*asked, "--target", 0.8, *measured, "--plot", tmp_path / "plan.png", "--stages", 2)
    plan = dx.PruningPlan.load(tmp_path / "plan.json")
    assert plan.predictions[-1].cost.macs <= 0.8 * plan.predictions[0].cost.macs
    assert (plan.height, plan.width, plan.tokens) == (8, 8, 77)
    for part in ("Parts of the UNet", "Cuts, each made alone", "Pruning plan", "plan.json"):
        assert part in text
    assert (tmp_path / "plan.png").exists()
    pipe.unet = dx.prune_network(pipe.unet, plan)
    assert tiny.images(pipe, "sd", steps=1).shape == (1, 3, 8, 8)

    network().save_pretrained(tmp_path / "unet")
    text = command(
        "asdm", "plan", tmp_path / "unet", "--preset", "bk-base", "--output", tmp_path / "base.json"
    )
    assert "layer.0, layer.1, layer.2" in text
    assert dx.PruningPlan.load(tmp_path / "base.json").stages == (("layer.0", "layer.1", "layer.2"),)

    assert "needs --prompts" in command(*asked, "--target", 0.8, code=1)
    assert "Give either --target" in command(*asked, code=1)
    assert "need --target" in command(*asked, "--preset", "bk-base", "--plot", "x.png", code=1)
    assert "this UNet has [1, 1] layers" in command(*asked, "--preset", "bk-base", code=1)
    assert "leave at least" in command(*asked, "--target", 0.01, *measured, code=1)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_recorded_probes(name: str) -> None:
    pipe = tiny.build(name)
    call = {
        key: value for key, value in tiny.inputs(name, guided=False).items() if key in ("height", "width")
    }
    found = dx.record_calibration_inputs(
        pipe, ["a aaa", "a bbb"], num_inference_steps=6, num_timesteps=3, **call
    )
    assert len(found) == 3
    assert found[0]["timestep"] > found[1]["timestep"] > found[2]["timestep"]
    assert found[0]["sample"].shape == (4, 4, 8, 8)  # two pictures, with and without their prompts
    assert not pipe.unet._forward_pre_hooks
    plan = dx.plan_pruning(pipe.unet, found, 0.8)
    assert plan.predictions[-1].cost.macs <= 0.8 * plan.predictions[0].cost.macs
    with pytest.raises(ValueError, match="got 0 prompts and 4"):
        dx.record_calibration_inputs(pipe, [])
    with pytest.raises(ValueError, match="num_timesteps from 1 to num_inference_steps=20"):
        dx.record_calibration_inputs(pipe, ["a"], num_timesteps=30)
