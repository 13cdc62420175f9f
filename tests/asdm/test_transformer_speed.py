"""The benchmark of the transformers' cost: its layouts are the published ones, and a call is put together from its parts."""

from typing import Any

import numpy as np
import pytest

from benchmarks import transformer_speed
from benchmarks.transformer_layouts import LAYOUTS, blocks_of
from benchmarks.transformer_speed import FULL, GRI, QUICK, attention_macs, count, layout_of, whole_call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "billions"),
    # Of the released weights; Stable Diffusion's 2.47 count its table of positions, which is no parameter.
    [("Stable Diffusion 3.5 Medium", 2.243), ("Flux.1", 11.90), ("Qwen-Image", 20.43)],
)
def test_layouts_are_the_published_ones(name: str, billions: float) -> None:
    transformer = LAYOUTS[name].build()
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert len(blocks_of(transformer)) == sum(LAYOUTS[name].kinds.values())
    # Counted from one block of each kind.
    small = transformer_speed.Settings(sides=(8,))
    assert count(name, small)["parameters"] == sum(p.numel() for p in transformer.parameters())


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_attention_differs_between_the_counted_calls(name: str) -> None:
    found = count(name, QUICK)
    for side in QUICK.sides:
        saved = found[f"{side}/{FULL}"] - found[f"{side}/{GRI}"]
        macs = [attention_macs(name, side, QUICK, kind) for kind in layout_of(name, QUICK).kinds]
        numbers = layout_of(name, QUICK).kinds.values()
        assert saved == sum(n * (one[FULL] - one[GRI]) for n, one in zip(numbers, macs))


def test_a_call_is_its_blocks_by_tokens_and_its_attention_by_macs() -> None:
    name = "Flux.1"
    layout, kinds = layout_of(name, QUICK), {"double": 3, "single": 5}
    longer = (16**2 + layout.text) / (8**2 + layout.text)

    def macs(side: int, attention: str, kind: str) -> int:
        return attention_macs(name, side, QUICK, kind)[attention]

    # A machine that does a multiply-accumulate of the attention in a picosecond; half a second for the rest of a block.
    timed: dict[str, Any] = {
        f"attention/{side}": {
            of: np.array([1e-12 * attention_macs(name, side, QUICK)[of] * QUICK.heads / layout.heads])
            for of in (FULL, GRI)
        }
        for side in (8, 16)
    }
    timed["blocks"] = {
        f"{of}/{kind}": np.array([0.5 + 1e-12 * macs(8, of, kind)]) for of in (FULL, GRI) for kind in kinds
    } | {f"{of}/rest": np.array([0.25]) for of in (FULL, GRI)}
    found = whole_call(name, 16, kinds, QUICK, timed)
    for of in (FULL, GRI):
        expected = longer * (0.25 + 8 * 0.5) + 1e-12 * sum(n * macs(16, of, k) for k, n in kinds.items())
        assert found[of] == pytest.approx(expected)


def test_every_layout_has_a_place_for_pruned_depths() -> None:
    assert transformer_speed.DEPTHS.keys() == LAYOUTS.keys()
    assert all("original" in depths for depths in transformer_speed.DEPTHS.values())
