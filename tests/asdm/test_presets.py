"""Published plans for transformers, at the sizes of the released models and without weights."""

from typing import Any

import pytest
import torch

from diffusers_ext.asdm.plan import PruningPlan
from diffusers_ext.asdm.presets import BLOCK_PRESETS, parameters_of, preset_plan, preset_stages
from diffusers_ext.asdm.transformers import interval_of
from tests import families

_SD35: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
SD35_MEDIUM = _SD35 | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
SD35_LARGE = _SD35 | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
FLUX = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
FLUX2 = {"_class_name": "Flux2Transformer2DModel"}
QWEN = {"_class_name": "QwenImageTransformer2DModel", "guidance_embeds": False}


def plan(name: str, config: dict[str, Any]) -> PruningPlan:
    return PruningPlan(config, tuple(map(tuple, preset_stages(name, config))))


@pytest.mark.parametrize(
    ("config", "cuts"),
    [
        (SD35_LARGE, ["block:transformer_blocks.25-29", "block:transformer_blocks.31-35"]),
        (SD35_MEDIUM, ["block:transformer_blocks.16-18", "block:transformer_blocks.20-22"]),
        (FLUX2, ["block:single_transformer_blocks.32-37", "block:single_transformer_blocks.39-44"]),
        (QWEN, ["block:transformer_blocks.39-46", "block:transformer_blocks.49-56"]),
    ],
)
def test_late_blocks_are_at_the_same_shares_of_the_depth(config: dict[str, Any], cuts: list[str]) -> None:
    assert preset_stages("late", config) == [cuts]


@pytest.mark.parametrize(
    ("name", "config", "kept"),
    [
        ("flux-lite", FLUX, [*range(5), 16, 17, 18]),
        ("flux-mini", FLUX, [0, 4, 8, 12, 16]),
        # The first of the 13 intervals, and every block outside of them.
        (
            "ppcl",
            QWEN,
            [
                0,
                1,
                2,
                3,
                5,
                8,
                11,
                13,
                14,
                15,
                25,
                28,
                29,
                *range(31, 43),
                44,
                45,
                48,
                50,
                51,
                52,
                54,
                56,
                58,
                59,
            ],
        ),
    ],
)
def test_the_blocks_that_are_left(name: str, config: dict[str, Any], kept: list[int]) -> None:
    units = plan(name, config).shape().units().values()
    found = [path for path in units if path.startswith("transformer_blocks.")]
    assert found == [f"transformer_blocks.{number}" for number in kept]


# In billions, rounded; the models of the table's names are published as 12, 8 and 3.2.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config", "before", "after"),
    [
        ("flux-lite", FLUX, 11.9, 8.16),
        ("flux-mini", FLUX, 11.9, 3.18),
        ("ppcl", QWEN, 20.4, 11.9),
        ("late", SD35_LARGE, 8.06, 5.92),
        ("late", SD35_MEDIUM, 2.24, 1.73),
        ("late", FLUX2, 32.2, 26.3),
    ],
)
def test_parameters_before_and_after(name: str, config: dict[str, Any], before: float, after: float) -> None:
    found = parameters_of(plan(name, config))
    assert [value / 1e9 for value in found] == pytest.approx([before, after], rel=5e-3)


def test_a_preset_as_a_plan_of_a_network() -> None:
    with torch.device("meta"):
        network = families.diffusers.FluxTransformer2DModel(
            num_attention_heads=1, attention_head_dim=8, axes_dims_rope=(4, 2, 2), joint_attention_dim=8
        )
    found = preset_plan("flux-lite", network)
    assert found.stages == (("block:transformer_blocks.5-15",),)
    before, after = parameters_of(found)
    assert before == network.num_parameters() > after


@pytest.mark.parametrize(
    ("name", "config", "text"),
    [
        ("bk-base", QWEN, "Presets of transformers are late, flux-lite, flux-mini, ppcl, got 'bk-base'"),
        (
            "ppcl",
            FLUX,
            "for the 60 blocks of Qwen-Image, and this is a FluxTransformer2DModel with 19 and 38",
        ),
        ("flux-mini", FLUX2, "for the 19 and 38 blocks of Flux.1, and this is a Flux2Transformer2DModel"),
        ("late", FLUX | {"num_layers": 4, "num_single_layers": 4}, "needs 8 blocks or more"),
    ],
)
def test_presets_of_other_networks_are_refused(name: str, config: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        preset_stages(name, config)


def test_all_presets_are_tested() -> None:
    assert set(BLOCK_PRESETS) == {"late", "flux-lite", "flux-mini", "ppcl"}
    assert interval_of("block:transformer_blocks.5-15") == ("transformer_blocks", 5, 15)
