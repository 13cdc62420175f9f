"""A UNet's config in one spelling, so that two configs of the same modules are equal."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel

Config = dict[str, Any]

# Of a down and of an up block.
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
MID_CROSS, MID_PLAIN = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"
_EXTRAS = ("removed_attentions", "gri_attention")


def architecture_config(config: Mapping[str, Any]) -> Config:
    """What fixes a UNet's modules, in one spelling: every argument of diffusers' class but `sample_size`, and ours.

    The number of layers is a list, tuples are lists, and a missing key has its default. CLME-CondConv layers are left
    out: they replace convolutions, and no cut depends on them.

    Raises:
        ValueError: block types that the cuts don't know.
    """
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    known = {name: p.default for name, p in parameters.items() if name not in ("self", "sample_size")}
    found = {name: config.get(name, default) for name, default in known.items()}
    found |= {name: config.get(name) or None for name in _EXTRAS}
    found = json.loads(json.dumps(found))
    if isinstance(found["layers_per_block"], int):
        found["layers_per_block"] = [found["layers_per_block"]] * len(found["block_out_channels"])
    unknown = {*found["down_block_types"], *found["up_block_types"]} - {*CROSS, *PLAIN}
    unknown |= {found["mid_block_type"]} - {MID_CROSS, MID_PLAIN, None}
    if unknown:
        raise ValueError(
            f"Pruning knows the blocks {', '.join((*CROSS, *PLAIN, MID_CROSS, MID_PLAIN))}; this UNet has"
            f" {', '.join(sorted(unknown))}."
        )
    return found
