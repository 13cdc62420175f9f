"""Published plans as presets, for UNets and for transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights

from .cost import cost_table
from .networks import empty_network, network_config, shape_of
from .plan import PruningPlan, make_plan
from .shape import UNetShape
from .transformers import TransformerShape, block_cut

PRESETS = ("bk-base", "bk-small", "bk-tiny", "incubation")
BLOCK_PRESETS = ("late", "flux-lite", "flux-mini", "ppcl")

# Of the 60 blocks of Qwen-Image: the intervals that PPCL's training script replaces with one block each.
_PPCL = (
    *((3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30)),
    *((42, 43), (45, 47), (48, 49), (52, 53), (54, 55), (56, 57)),
)
# Of the 38 blocks of Stable Diffusion 3.5 large: what HierarchicalPrune removes.
_LATE = ((25, 29), (31, 35))


def preset_stages(name: str, config: Mapping[str, Any]) -> list[list[str]]:
    """The cuts of a preset.

    For the UNets of Stable Diffusion 1.5 and 2, SDXL and similar ones:

    - "bk-base" removes one layer per resolution, "bk-small" also the mid block, and "bk-tiny" also the
      innermost resolution. These are the plans of BK-SDM (Kim et al., arXiv:2305.15798) for Stable
      Diffusion 1. BK-SDM prunes in one stage.
    - "incubation" is A-SDM as rebuilt here, in three stages. The first one removes a layer at the outermost
      and one at the innermost resolution. The second one removes a layer at the resolution next to the
      innermost, and the attention of the mid block. The third one adds GRI attention at the finest
      resolution with attention.

    For transformers, in one stage:

    - "late" removes a quarter of the longest list of blocks, late ones except the last and one in between. Of the 38 blocks
      of Stable Diffusion 3.5 large these are 25 to 29 and 31 to 35, the plan of HierarchicalPrune (arXiv:2508.04663); for
      other numbers of blocks the positions are scaled.
    - "flux-lite" leaves 8 double and all 38 single blocks of Flux.1, as many as FLUX.1-lite. Which ones that model removed is
      not published; here they are the double blocks 5 to 15.
    - "flux-mini" leaves every fourth block of Flux.1, 5 double and 10 single ones, as many as Flux-Mini, whose features are
      trained with the same mapping.
    - "ppcl" leaves the first block of each of the 13 intervals of Qwen-Image that PPCL (arXiv:2511.16156) replaces with one
      block, 35 blocks of 60. PPCL starts from the middle block of an interval.

    Raises:
        ValueError: the name is unknown, or the network does not allow the cuts.
    """
    shape = shape_of(config)
    known = PRESETS if isinstance(shape, UNetShape) else BLOCK_PRESETS
    if name not in known:
        kind = "UNets" if isinstance(shape, UNetShape) else "transformers"
        raise ValueError(f"Presets of {kind} are {', '.join(known)}, got {name!r}.")
    return _unet_stages(name, config) if isinstance(shape, UNetShape) else [_block_cuts(name, shape)]


def _unet_stages(name: str, config: Mapping[str, Any]) -> list[list[str]]:
    shape = UNetShape(config)
    inner = shape.num_stages - 1
    thick = [s for s in range(shape.num_stages) if shape.layers(s) > 1]
    if name == "incubation":
        chosen = [s for s in (0, inner, inner - 1) if s in thick]
        with_attention = [s for s in range(shape.num_stages) if shape.attentions(s)]
        if len(set(chosen)) < 3 or not with_attention or shape.mid is None:
            raise ValueError(
                f"The preset {name!r} needs three or more resolutions, two layers in the outermost and the"
                " two innermost ones, attention and a mid block: plan this UNet with plan_pruning."
            )
        stages = [[f"layer.{s}" for s in chosen[:2]], [f"layer.{chosen[2]}", "mid.attention"]]
        stages.append([f"gri.{with_attention[0]}"])
    else:
        if not thick:
            raise ValueError(
                f"The preset {name!r} removes a layer where there are two or more; this UNet has"
                f" {[shape.layers(s) for s in range(shape.num_stages)]} layers: plan it with plan_pruning."
            )
        tiny = name == "bk-tiny"
        stages = [[f"layer.{s}" for s in thick if not (tiny and s == inner)]]
        stages[0] += {"bk-base": [], "bk-small": ["mid"], "bk-tiny": [f"stage.{inner}"]}[name]
    shape.cut(*(cut for stage in stages for cut in stage))
    return stages


def _block_cuts(name: str, shape: TransformerShape) -> list[str]:
    lists, kind = shape.lists(), shape.base["_class_name"]
    if name == "late":
        longest = max(lists, key=lambda entry: lists[entry])
        count = lists[longest]
        if count < 8:
            raise ValueError(
                f"The preset 'late' needs 8 blocks or more, and {longest} has {count}: plan this transformer with"
                " plan_pruning."
            )
        ends = [(round(first * count / 38), round((last + 1) * count / 38) - 1) for first, last in _LATE]
        return [block_cut(longest, first, last) for first, last in ends]
    wanted = {"transformer_blocks": 60}
    if name != "ppcl":
        wanted = {"transformer_blocks": 19, "single_transformer_blocks": 38}
    model, owner = ("Qwen-Image", "QwenImage") if name == "ppcl" else ("Flux.1", "Flux")
    if lists != wanted or kind != f"{owner}Transformer2DModel":
        raise ValueError(
            f"The preset {name!r} is for the {' and '.join(map(str, wanted.values()))} blocks of {model}, and this is a"
            f" {kind} with {' and '.join(map(str, lists.values()))}: use 'late', or plan it with plan_pruning."
        )
    if name == "ppcl":
        return [block_cut("transformer_blocks", first + 1, last) for first, last in _PPCL]
    if name == "flux-lite":
        return [block_cut("transformer_blocks", 5, 15)]
    return [
        block_cut(entry, first + 1, min(first + 3, count - 1))
        for entry, count in lists.items()
        for first in range(0, count - 1, 4)
    ]


def preset_plan(
    name: str, network: Any, height: int | None = None, width: int | None = None, tokens: int = 77
) -> PruningPlan:
    """A preset as a plan for a network; for a UNet with MACs and parameters.

    Args:
        name: see `preset_stages`.
        network: the network that the plan is for. It can be on the meta device.
        height, width: size of the latents for which the MACs of a UNet are counted; default: `sample_size` of the
            config.
        tokens: length of the prompt, for the same.

    Raises:
        ValueError: see `preset_stages` and `cost_table`.
    """
    config = network_config(network)
    stages = preset_stages(name, config)
    if isinstance(shape_of(config), UNetShape):
        return make_plan(config, stages, cost_table(network, height, width, tokens))
    return PruningPlan(config, tuple(map(tuple, stages)))


def parameters_of(plan: PruningPlan) -> tuple[int, ...]:
    """The number of parameters before the first stage of a plan and after every stage; no weights are needed."""
    found = []
    for number in range(len(plan.stages) + 1):
        with init_empty_weights():
            network = empty_network(plan.shape(number).config())
        found.append(sum(parameter.numel() for parameter in network.parameters()))
    return tuple(found)
