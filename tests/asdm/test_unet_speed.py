"""The benchmark of the UNets' cost: its variants are what they are called, and it writes its page."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import unet_speed, unet_speed_runs
from benchmarks.framework.bench import Bench
from diffusers_ext.asdm.apply import gri_attention_of
from diffusers_ext.asdm.condconv import CLMECondConv2d
from diffusers_ext.asdm.cost import count_macs, example_inputs
from diffusers_ext.asdm.unet import unet_config

CPU = torch.device("cpu")


@pytest.fixture
def runs() -> Any:
    return unet_speed_runs


@pytest.fixture
def original(runs: Any) -> Any:
    torch.manual_seed(0)
    return runs.materialise(runs.on_meta(runs.shape_config("sd15", 16, 64)), CPU)


@pytest.fixture
def inputs(original: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    return example_inputs(original.config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "name", "millions", "billions"),
    [
        ("sd15", "original", 859.5, 401.6),
        ("sd15", "BK-SDM Base", 579.4, 261.5),
        ("sd15", "BK-SDM Small", 482.3, 255.4),
        ("sd15", "BK-SDM Tiny", 323.4, 242.8),
        ("sd15", "pruned + GRI + CondConv, folded", 552.8, 267.7),
        ("sdxl", "original", 2567.5, 3380.6),
    ],
)
def test_shapes_are_the_published_ones(
    runs: Any, shape: str, name: str, millions: float, billions: float
) -> None:
    parameters, macs = runs.count(runs.VARIANTS[name], runs.shape_config(shape))
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)
    assert macs / 1e9 == pytest.approx(billions, abs=0.05)


@pytest.mark.slow
def test_macs_are_those_that_plans_count(runs: Any) -> None:
    config = runs.shape_config("sd15", 32, 64)
    for name in ("original", "pruned + GRI"):
        unet = runs.make(runs.VARIANTS[name], runs.on_meta(config))
        assert runs.count(runs.VARIANTS[name], config)[1] == count_macs(unet_config(unet), 32, 32)[""]


@torch.no_grad()
def test_variants_have_the_parts_they_name_and_the_original_s_weights(
    runs: Any, original: Any, inputs: dict[str, Any]
) -> None:
    before = original(**inputs).sample
    whole = {p.data_ptr() for p in original.parameters()}
    for name, variant in runs.VARIANTS.items():
        if variant.library is not None:
            continue
        unet = runs.make(variant, original)
        layers = [m for m in unet.modules() if isinstance(m, CLMECondConv2d)]
        assert bool(layers) == (variant.experts and not variant.folded), name
        assert all(layer.routing.weight.any() for layer in layers), name
        assert (gri_attention_of(unet) is not None) == variant.gri, name
        own = sum(p.numel() for p in unet.parameters() if p.data_ptr() not in whole)
        assert bool(own) == variant.experts, name
        assert runs.Runner(variant, unet, inputs)().isfinite().all(), name
    assert torch.equal(original(**inputs).sample, before)


@torch.no_grad()
def test_deep_cache_reuses_what_is_deep(
    runs: Any, original: Any, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("DeepCache")
    # Neighbours in float32: the helper tells the calls of a cycle by their timestep, and so the input hardly changes.
    monkeypatch.setattr(runs, "TIMESTEPS", (500.0, 500 + 2.0**-15, 500 + 2.0**-14))
    variant = runs.VARIANTS["DeepCache, interval 3"]
    run = runs.Runner(variant, runs.make(variant, original), inputs)
    whole = original(inputs["sample"], run.timesteps[-1], **run.rest).sample
    torch.testing.assert_close(run(), whole, rtol=1e-4, atol=1e-4)
    calls: list[str] = []
    for path, module in run.unet.named_modules():
        if path.rpartition(".")[2] in ("conv1", "conv_in", "conv_out"):
            module.register_forward_pre_hook(lambda *_, path=path: calls.append(path))
    for number, timestep in enumerate(run.timesteps):
        calls.clear()
        run.unet(run.sample, timestep, **run.rest)
        if number:
            assert calls == ["conv_in", "up_blocks.3.resnets.2.conv1", "conv_out"]
        else:
            assert len(calls) == 24


@torch.no_grad()
def test_deep_cache_compiles_in_parts(runs: Any, original: Any, inputs: dict[str, Any]) -> None:
    pytest.importorskip("DeepCache")
    variant = runs.VARIANTS["DeepCache, interval 3"]
    run = runs.Runner(variant, runs.make(variant, original), inputs)
    eager = dict(run.wrapped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: lambda *a, **k: function(*a, **k))
        other = run.compiled()
    changed = [key for key in eager if other.wrapped[key] is not eager[key]]
    assert ("mid", "mid_block", 0, 0) in changed
    assert "unet_forward" not in changed
    assert run.wrapped == eager
    assert torch.equal(other(), run())


@torch.no_grad()
@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_tome_merges_at_the_finest_attention_only(runs: Any, shape: str) -> None:
    pytest.importorskip("tomesd")
    config = runs.shape_config(shape, 32, 64)
    unet = runs.make(runs.VARIANTS["ToMe, ratio 0.5"], runs.on_meta(config))
    run = runs.Runner(runs.VARIANTS["ToMe, ratio 0.5"], unet, example_inputs(unet.config, device="meta"))
    tokens: dict[str, int] = {}
    for path, module in unet.named_modules():
        if path.endswith("attn1"):
            module.register_forward_pre_hook(
                lambda _, args, path=path: tokens.__setitem__(path, args[0].shape[1])
            )
    run()
    finest = "down_blocks.0" if shape == "sd15" else "down_blocks.1"
    side = 32 if shape == "sd15" else 16
    merged = {path: n for path, n in tokens.items() if path.startswith(finest)}
    assert set(merged.values()) == {side**2 // 2}
    assert tokens["mid_block.attentions.0.transformer_blocks.0.attn1"] == (16 if shape == "sd15" else 64)


def test_what_is_left_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("original", "BK-SDM Tiny", "ToMe, ratio 0.5")
    monkeypatch.setitem(sys.modules, "tomesd", None)
    found = unet_speed.count_all(replace(unet_speed.QUICK, variants=few), "sdxl")
    assert list(found.costs) == ["original"]
    assert any("BK-SDM Tiny is left out" in note for note in found.notes)
    assert any("ToMe" in note and "diffusers-ext[bench]" in note for note in found.notes)


@pytest.mark.slow
def test_page_says_what_was_measured(tmp_path: Path) -> None:
    unet_speed.main(Bench(tmp_path, tmp_path, tmp_path, workers=0, quick=True))
    page = (tmp_path / "unet_speed.md").read_text()
    for said in (
        *unet_speed.QUICK.variants,
        "1 × 4 × 16 × 16",
        "float32",
        torch.__version__,
        "GRI against flash SDPA",
    ):
        assert said in page
    assert (tmp_path / "unet_speed.png").stat().st_size > 10_000
    assert torch.is_grad_enabled()
