"""What the pages of the flow share with those of the UNet, and their choice of blocks, on random weights."""

from pathlib import Path

import pytest
import torch

import diffusers_ext as dx
from benchmarks import asdm_flow, asdm_runs, flow_runs, smooth_lora
from benchmarks.framework.bench import Bench
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    place = tmp_path_factory.mktemp("flow")
    return Bench(place, place, SAMPLE_DIR, workers=0, quick=True)


@pytest.fixture(scope="module")
def folder(bench: Bench) -> Path:
    return flow_runs.model_folder(bench, layers=3)


def test_card_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_runs, "has_card", lambda name: False)
    with pytest.raises(
        ValueError, match=r"npnet-fashion-flow does not exist\. Train it \(the script\).*--quick"
    ):
        flow_runs.included("npnet-fashion-flow", "the script")


def test_measurements_of_the_unet_keep_their_arguments(folder: Path) -> None:
    # What is kept is found by its arguments: those of the UNet are as they were before there was a flow.
    unet = smooth_lora.UNET
    assert unet.sampled(None, 100) == (None, 100)
    assert unet.sampled(None, 100, 3.0) == (None, 100, 3.0)
    flow = smooth_lora.Subject("flow", "Euler", (), (), (folder,))
    assert flow.sampled(None, 100) == (None, 100, smooth_lora.GUIDANCE, folder)


def test_calls_of_a_flow_are_short(folder: Path) -> None:
    assert flow_runs.call_options(asdm_runs.load()) == {}
    pipe = asdm_runs.load(folder, folder)
    assert flow_runs.call_options(pipe) == {"max_sequence_length": 2}
    inputs = asdm_runs.inputs_of(pipe, 3)
    # As many tokens as the tokenizer has, and two of T5.
    assert inputs["encoder_hidden_states"].shape[:2] == (3, pipe.tokenizer.model_max_length + 2)
    assert len(inputs["hidden_states"]) == 3
    assert torch.isfinite(pipe.transformer(**inputs)[0]).all()


def test_plan_tells_the_blocks_that_it_removes(bench: Bench, folder: Path) -> None:
    # Without the last block, the new last one also loses parts: they are no blocks.
    for removed in ((1,), (2,), (0, 2)):
        path = asdm_flow.write_plan(bench, folder, removed)
        assert asdm_flow.removed_by(dx.PruningPlan.load(path)) == removed
    pruned = asdm_flow.untrained(bench, folder, path)
    assert asdm_runs.load(pruned, folder).transformer.config.num_layers == 1


def test_criteria_choose_as_many_blocks_as_asked(folder: Path) -> None:
    found = asdm_flow.choices(folder, 2)
    assert set(found) == {"change of the output", "similarity", "interval"}
    assert all(len(set(blocks)) == 2 for blocks in found.values())
    first, last = found["interval"]
    assert last == first + 1
    labelled = asdm_flow.label((0, 1), {"interval": (0, 1), "similarity": (1, 2)}, (0, 1))
    assert labelled == "without 0, 1 (the included plan; interval)"


def test_interval_is_the_one_that_changes_the_output_least(folder: Path) -> None:
    pipe = asdm_runs.load(folder, folder)
    probes = asdm_runs.probes_of(pipe, 8)
    network = pipe.transformer
    whole = asdm_runs.predict(network, probes)

    def change(first: int) -> float:
        cut = asdm_runs.cut_network(network, f"block:transformer_blocks.{first}-{first + 1}")
        return asdm_runs.output_change(cut, probes, whole)

    best = min(range(2), key=change)
    assert asdm_flow.choices(folder, 2)["interval"] == [best, best + 1]


@pytest.mark.slow
def test_student_draws_the_same_in_a_process_without_this_package(bench: Bench, folder: Path) -> None:
    pruned = asdm_flow.untrained(bench, folder, asdm_flow.write_plan(bench, folder, (1,)))
    assert asdm_flow.plain_process(pruned, folder)["difference"] < 1e-5
