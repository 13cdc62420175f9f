"""`PruningPlan`: the cuts for one architecture, in stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.storage import digest, write_json
from .cost import Cost, CostTable
from .networks import Shape, fingerprint, network_config, network_name, shape_of
from .shape import Config


@dataclass(frozen=True)
class Prediction:
    """The predicted cost and loss of the network after a stage.

    Attributes:
        cost: exact for parameters and MACs; milliseconds are the sum of those of the parts.
        loss: sum of the losses of single cuts, which assumes that they add up. None if they were not
            measured.
    """

    cost: Cost
    loss: float | None = None


@dataclass(frozen=True)
class PruningPlan:
    """An ordered list of stages, each a list of cuts.

    `diffusers_ext.asdm.shape` lists the cuts of UNets, `diffusers_ext.asdm.transformers` those of transformers. A student
    is trained after every stage, and the next stage starts from it.

    Args:
        config: config of the network that the plan is for, as from `diffusers_ext.asdm.networks.network_config`. Only the
            entries that determine its modules are stored.
        stages: the cuts of every stage.
        predictions: predictions for the full network and after every stage, or empty.
        height, width, tokens: size of the latents and length of the prompt for which the MACs were counted,
            if there are predictions. None for transformers whose pipeline packs its latents.

    Raises:
        ValueError: a cut is unknown, not possible or was made before, or the number of predictions does not
            match the stages.
    """

    config: Config
    stages: tuple[tuple[str, ...], ...]
    predictions: tuple[Prediction, ...] = ()
    height: int | None = None
    width: int | None = None
    tokens: int | None = None
    _shapes: tuple[Shape, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "config", shape_of(self.config).base)
        if any(isinstance(stage, str) for stage in self.stages):
            raise ValueError(f"stages must be lists of cuts, such as [['mid'], …], got {self.stages!r}.")
        put(self, "stages", tuple(tuple(stage) for stage in self.stages))
        shapes: list[Shape] = [shape_of(self.config)]
        for number, stage in enumerate(self.stages, 1):
            try:
                shapes.append(shapes[-1].cut(*stage))
            except ValueError as error:
                raise ValueError(f"Stage {number} of the plan: {error}") from error
        put(self, "_shapes", tuple(shapes))
        if self.predictions and len(self.predictions) != len(shapes):
            raise ValueError(
                f"A plan of {len(self.stages)} stages has {len(shapes)} predictions, the first one for the"
                f" full network; got {len(self.predictions)}."
            )

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the architecture that the plan is for."""
        return fingerprint(self.config)

    @property
    def cuts(self) -> tuple[str, ...]:
        """All cuts in order."""
        return tuple(cut for stage in self.stages for cut in stage)

    def shape(self, num_stages: int | None = None) -> Shape:
        """The modules that remain after the first `num_stages` stages; None for all.

        Raises:
            ValueError: the plan has fewer stages.
        """
        num_stages = len(self.stages) if num_stages is None else num_stages
        if not 0 <= num_stages <= len(self.stages):
            raise ValueError(f"The plan has the stages 0 (no cuts) to {len(self.stages)}, got {num_stages}.")
        return self._shapes[num_stages]

    def check(self, network: Any, num_stages: int = 0) -> None:
        """Checks that a network has the architecture that this plan leaves after `num_stages`.

        Raises:
            ValueError: the network has another architecture. The message names the differences.
        """
        found, wanted = shape_of(network_config(network)).config(), self.shape(num_stages).config()
        if found == wanted:
            return
        kind = network_name(network)
        which = "the one it was made for" if num_stages == 0 else f"its student of stage {num_stages}"
        if found.get("_class_name") != wanted.get("_class_name"):
            expected, given = (
                entries.get("_class_name", "UNet2DConditionModel") for entries in (wanted, found)
            )
            raise ValueError(f"This plan is for a {expected}, got a {given}: make a plan for it.")
        different = [name for name in wanted if found[name] != wanted[name]]
        raise ValueError(
            f"This plan is for another {kind}: {which} has the fingerprint {digest(wanted)}, the given"
            f" {kind} has {digest(found)}. They differ in "
            + "; ".join(f"{name}: {wanted[name]!r} expected, {found[name]!r} given" for name in different[:3])
            + f". Make a plan for this {kind}, or set from_stage to the stage that it was pruned to."
        )

    def save(self, path: str | Path) -> None:
        """Writes the plan as a JSON file. The file is replaced atomically."""
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
        """Loads a plan that `save` has written.

        Raises:
            ValueError: the file is not a plan, or its config does not match its fingerprint.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            predictions = tuple(
                Prediction(Cost(p["parameters"], p["macs"], p["milliseconds"]), p["loss"])
                for p in found["predictions"]
            )
            size = {name: found[name] for name in ("height", "width", "tokens")}
            given, stages, written = found["config"], found["stages"], found["fingerprint"]
        except (IsADirectoryError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a pruning plan: expected a file of PruningPlan.save ({error})."
            ) from error
        plan = cls(given, stages, predictions, **size)
        if plan.fingerprint != written:
            raise ValueError(
                f"{path} has the fingerprint {written}, but its config has {plan.fingerprint}: it was"
                " changed by hand or by another version. Make the plan again."
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
        config: config of the network.
        stages: the cuts of every stage.
        costs: cost of the network and its parts.
        losses: predicted loss after each stage; None if unknown.

    Raises:
        ValueError: see `PruningPlan`.
    """
    bare = PruningPlan(dict(config), tuple(tuple(stage) for stage in stages))
    known: list[float | None] = [None] * (len(stages) + 1) if losses is None else [0.0, *losses]
    predictions = tuple(Prediction(costs.of_shape(bare.shape(k)), loss) for k, loss in enumerate(known))
    return PruningPlan(bare.config, bare.stages, predictions, costs.height, costs.width, costs.tokens)
