"""`PruningPlan`: which cuts to make in which order, for one architecture; and the plans that others published."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.storage import write_json
from .cost import Cost, CostTable, cost_table
from .shape import Config, UNetShape, architecture_config, fingerprint
from .unet import unet_config

PRESETS = ("bk-base", "bk-small", "bk-tiny", "incubation")


@dataclass(frozen=True)
class Prediction:
    """What a plan expects of the UNet after a stage.

    Attributes:
        cost: parameters and MACs to the last one, milliseconds as the sum of parts.
        loss: sum of the cuts' losses, each measured alone; that they add up is an assumption. None: not measured.
    """

    cost: Cost
    loss: float | None = None


@dataclass(frozen=True)
class PruningPlan:
    """An ordered list of stages, each a list of cuts; see `diffusers_ext.asdm.shape` for their names.

    A student is trained after each stage, and the next one starts from it.

    Args:
        config: of the UNet that the plan is for; kept as its `architecture_config`.
        stages: cuts by stage.
        predictions: of the whole UNet and after every stage, or none.
        height, width, tokens: latents and prompt that the MACs were counted for, where there are predictions.

    Raises:
        ValueError: a stage that takes away what is not there (any more) or cannot go, or as many predictions as don't
            fit the stages.
    """

    config: Config
    stages: tuple[tuple[str, ...], ...]
    predictions: tuple[Prediction, ...] = ()
    height: int | None = None
    width: int | None = None
    tokens: int | None = None
    _shapes: tuple[UNetShape, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "config", architecture_config(self.config))
        if any(isinstance(stage, str) for stage in self.stages):
            raise ValueError(f"stages must be lists of cuts, got {self.stages!r}: write [['mid'], …].")
        put(self, "stages", tuple(tuple(stage) for stage in self.stages))
        shapes = [UNetShape(self.config)]
        for number, stage in enumerate(self.stages, 1):
            try:
                shapes.append(shapes[-1].cut(*stage))
            except ValueError as error:
                raise ValueError(f"Stage {number} of the plan: {error}") from error
        put(self, "_shapes", tuple(shapes))
        if self.predictions and len(self.predictions) != len(shapes):
            raise ValueError(
                f"A plan of {len(self.stages)} stages has {len(shapes)} predictions, the whole UNet's first; got"
                f" {len(self.predictions)}."
            )

    @property
    def fingerprint(self) -> str:
        """Of the architecture that the plan is for."""
        return fingerprint(self.config)

    @property
    def cuts(self) -> tuple[str, ...]:
        """All cuts in order."""
        return tuple(cut for stage in self.stages for cut in stage)

    def shape(self, num_stages: int | None = None) -> UNetShape:
        """What is left after the first `num_stages`; None for all.

        Raises:
            ValueError: more stages than there are.
        """
        num_stages = len(self.stages) if num_stages is None else num_stages
        if not 0 <= num_stages <= len(self.stages):
            raise ValueError(
                f"The plan has the stages 0 (nothing cut) to {len(self.stages)}, got {num_stages}."
            )
        return self._shapes[num_stages]

    def check(self, unet: Any, num_stages: int = 0) -> None:
        """Refuses a UNet that is not what this plan leaves after `num_stages`.

        Raises:
            ValueError: another UNet.
        """
        found, wanted = UNetShape(unet_config(unet)).config(), self.shape(num_stages).config()
        if found == wanted:
            return
        different = [name for name in wanted if found[name] != wanted[name]]
        which = "the one it was made for" if num_stages == 0 else f"its student of stage {num_stages}"
        raise ValueError(
            f"This plan is for another UNet: {which} has the fingerprint {fingerprint(wanted)}, the given one"
            f" {fingerprint(found)}. They differ in "
            + "; ".join(f"{name}: {wanted[name]!r} expected, {found[name]!r} given" for name in different[:3])
            + ". Make a plan for this UNet, or give the from_stage that it has been pruned to."
        )

    def save(self, path: str | Path) -> None:
        """Writes it as JSON, whole or not at all."""
        found = {
            "format": "diffusers-ext pruning plan 1",
            "fingerprint": self.fingerprint,
            "stages": self.stages,
            "predictions": [{**vars(p.cost), "loss": p.loss} for p in self.predictions],
            "height": self.height,
            "width": self.width,
            "tokens": self.tokens,
            "config": self.config,
        }
        write_json(path, found)

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Reads what `save` wrote.

        Raises:
            ValueError: another file, or one that was changed so that its config is not that of its fingerprint.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            predictions = tuple(
                Prediction(Cost(p["parameters"], p["macs"], p["milliseconds"]), p["loss"])
                for p in found["predictions"]
            )
            size = {name: found[name] for name in ("height", "width", "tokens")}
            given, stages, written = found["config"], found["stages"], found["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no pruning plan: expected what PruningPlan.save writes ({error})."
            ) from error
        plan = cls(given, stages, predictions, **size)
        if plan.fingerprint != written:
            raise ValueError(
                f"{path} names the fingerprint {written}, but its config has {plan.fingerprint}: it was changed by hand"
                " or by another version. Make the plan again."
            )
        return plan


def make_plan(
    config: Mapping[str, Any],
    stages: Sequence[Sequence[str]],
    costs: CostTable,
    losses: Sequence[float] | None = None,
) -> PruningPlan:
    """A plan with predictions.

    Args:
        config: of the UNet.
        stages: cuts by stage.
        costs: of the UNet.
        losses: predicted after each stage; None: not known.

    Raises:
        ValueError: see `PruningPlan`.
    """
    bare = PruningPlan(dict(config), tuple(tuple(stage) for stage in stages))
    known: list[float | None] = [None] * (len(stages) + 1) if losses is None else [0.0, *losses]
    predictions = tuple(Prediction(costs.of_shape(bare.shape(k)), loss) for k, loss in enumerate(known))
    return PruningPlan(bare.config, bare.stages, predictions, costs.height, costs.width, costs.tokens)


def preset_stages(name: str, config: Mapping[str, Any]) -> list[list[str]]:
    """The cuts of a published or rebuilt plan, for Stable Diffusion 1.5 and 2, SDXL, and UNets of their kind.

    - "bk-base": a layer less at every resolution; "bk-small": no mid block either; "bk-tiny": nor the innermost
      resolution. BK-SDM (Kim et al., arXiv:2305.15798), which prunes in one go, for Stable Diffusion 1.
    - "incubation": A-SDM as rebuilt here, in three stages: a layer of the outermost and of the innermost resolution;
      one of the resolution next to it, and the mid block's attention; GRI attention at the finest that has attention.

    Raises:
        ValueError: another name, or a UNet that does not allow it.
    """
    shape = UNetShape(config)
    inner = shape.num_stages - 1
    if name not in PRESETS:
        raise ValueError(f"Presets are {', '.join(PRESETS)}, got {name!r}.")
    thick = [s for s in range(shape.num_stages) if shape.layers(s) > 1]
    if name == "incubation":
        chosen = [s for s in (0, inner, inner - 1) if s in thick]
        with_attention = [s for s in range(shape.num_stages) if shape.attentions(s)]
        if len(set(chosen)) < 3 or not with_attention or shape.mid is None:
            raise ValueError(
                f"The preset {name!r} needs three or more resolutions, two layers in the outermost and the two"
                " innermost, attention and a mid block: plan this UNet with plan_pruning."
            )
        stages = [[f"layer.{s}" for s in chosen[:2]], [f"layer.{chosen[2]}", "mid.attention"]]
        stages.append([f"gri.{with_attention[0]}"])
    else:
        if not thick:
            raise ValueError(
                f"The preset {name!r} takes a layer from resolutions that have two; this UNet's have"
                f" {[shape.layers(s) for s in range(shape.num_stages)]}: plan it with plan_pruning."
            )
        tiny = name == "bk-tiny"
        stages = [[f"layer.{s}" for s in thick if not (tiny and s == inner)]]
        stages[0] += {"bk-base": [], "bk-small": ["mid"], "bk-tiny": [f"stage.{inner}"]}[name]
    shape.cut(*(cut for stage in stages for cut in stage))
    return stages


def preset_plan(
    name: str, unet: Any, height: int | None = None, width: int | None = None, tokens: int = 77
) -> PruningPlan:
    """`preset_stages` as a plan for a UNet, with its MACs and parameters.

    Args:
        name: one of `PRESETS`.
        unet: for which; on the meta device if need be.
        height, width: of the latents that the MACs are counted for; default: the config's `sample_size`.
        tokens: of the prompt.

    Raises:
        ValueError: see `preset_stages` and `cost_table`.
    """
    config = unet_config(unet)
    stages = preset_stages(name, config)
    return make_plan(config, stages, cost_table(unet, height, width, tokens))
