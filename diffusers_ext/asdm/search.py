"""`plan_pruning`: finds the cuts with the smallest loss for a given cost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.checks import check_counts
from .block_scores import block_costs
from .calibration import CalibrationInput
from .cost import CostTable, check_measure, cost_table
from .fronts import Cuts, Option, block_front, cross, pareto
from .networks import Shape, network_config, shape_of, single_cuts
from .plan import PruningPlan, make_plan
from .sensitivity import Score, Sensitivity, measure_sensitivity
from .shape import Config, UNetShape


@dataclass(frozen=True)
class PruningProfile:
    """The cost of a network's parts, and the loss without them.

    The loss of a cut is the change of the output, or for transformers by one of three criteria: "drop", the change of the
    output without a block; "similarity", 1 − cosine of the states that enter and leave a block; "contiguous", the change
    of the output without an interval of blocks. Intervals are measured as a whole, so only the losses of different
    intervals are added.

    Attributes:
        config: entries of the config that determine the network's modules, as in a `PruningPlan`.
        costs: cost of its parts.
        sensitivity: loss without its parts, and loss of its cuts.
    """

    config: Config
    costs: CostTable
    sensitivity: Sensitivity

    def plan(
        self, target: float, by: str = "macs", num_stages: int = 3, stock_only: bool = False
    ) -> PruningPlan:
        """The cuts with the smallest sum of losses that leave at most `target` of the cost.

        The search is exact if the losses and the costs of cuts add up. For MACs and parameters they do; for
        milliseconds it is an approximation. Several layers of one resolution are measured together.

        Args:
            target: share of the cost that may remain, between 0 and 1; 0.78 saves 22%.
            by: "macs", "milliseconds" or "parameters".
            num_stages: number of stages with about the same savings, or fewer if there are fewer cuts. Cuts
                with the smallest loss per saving come first, GRI attention comes last.
            stock_only: use only cuts whose result is a stock `UNet2DConditionModel`; transformers always are.

        Raises:
            ValueError: the target is out of range or cannot be reached, the cost was not measured, or
                `num_stages` is below 1.
        """
        check_goal(target, by, num_stages)
        total = self.costs.total.of(by)
        found = self.front(by, stock_only)
        enough = [option for option in found if option.saved >= (1 - target) * total * (1 - 1e-12)]
        if not enough:
            best = 1 - max(option.saved for option in found) / total
            raise ValueError(
                f"No cuts that this {self.kind} allows leave {target:.1%} of its {by}: they leave at least"
                f" {best:.1%}. Set a target of {np.ceil(1000 * best) / 1000:g} or more"
                f"{', or allow more than a stock UNet' if stock_only and self.kind == 'UNet' else ''}."
            )
        chosen = min(enough, key=lambda option: (option.loss, -option.saved))
        return self.staged(chosen.cuts, by, num_stages)

    def random_plan(
        self, target: float, by: str = "macs", seed: int = 0, stock_only: bool = False
    ) -> PruningPlan:
        """A control: one stage of random cuts that leaves at most `target` of the cost.

        Of 200 random draws, this is the first one that leaves no more than 3 points less than the target, so
        that the control is not at a disadvantage. If there is none, it is the first one within 3 points of the
        closest. Always using the closest one would give the same few plans for all seeds.

        Raises:
            ValueError: see `plan`; also if no draw reaches the target.
        """
        check_goal(target, by)
        total, draw = self.costs.total.of(by), random.Random(seed)
        allowed = self._allowed(by, stock_only)
        # Once per layer. If no layer is left, the loop below continues with the next cut.
        if self.kind == "UNet":
            allowed += [c for c in allowed if c.startswith("layer.")] * (
                max(self.config["layers_per_block"]) - 1
            )
        found: list[tuple[float, Cuts]] = []
        for _ in range(200):
            shape, cuts = self._shape, ()
            for name in draw.sample(allowed, len(allowed)):
                try:
                    shape = shape.cut(name)
                except ValueError:
                    continue
                cuts = (*cuts, name)
                left = self.costs.of_shape(shape).of(by) / total
                if left <= target:
                    found.append((target - left, cuts))
                    break
            if found and found[-1][0] <= 0.03:
                return make_plan(self.config, [found[-1][1]], self.costs)
        if not found:
            raise ValueError(f"No random cuts left {target:.1%} of the {by}: set a larger target.")
        near = min(short for short, _ in found) + 0.03
        return make_plan(self.config, [next(cuts for short, cuts in found if short <= near)], self.costs)

    @property
    def _shape(self) -> Shape:
        return shape_of(self.config)

    @property
    def kind(self) -> str:
        """ "UNet" or "transformer"."""
        return "UNet" if isinstance(self._shape, UNetShape) else "transformer"

    def _allowed(self, by: str, stock_only: bool) -> list[str]:
        """The single cuts that save some cost."""
        cuts = single_cuts(self.config, stock_only)
        return [c for c in cuts if (c,) in self.sensitivity.cuts and self._saved((c,), by) > 0]

    def front(self, by: str, stock_only: bool) -> list[Option]:
        """The sets of cuts for which no other set has a smaller loss and saves as much, sorted by loss.

        Args:
            by, stock_only: see `plan`.
        """
        shape = self._shape
        if not isinstance(shape, UNetShape):
            losses = self.sensitivity.cuts
            cuts = [cut for (cut,) in losses]
            # Rounded, so that equal savings are equal: otherwise nearly all sets of cuts would be on the front.
            saved = {cut: round(self._saved((cut,), by), 9) for cut in cuts}
            return block_front(cuts, shape.lists(), lambda cut: losses[cut,], saved.__getitem__)
        last = len(self.config["layers_per_block"]) - 1
        allowed = self._allowed(by, stock_only)
        fronts = []
        for s in range(shape.num_stages):
            fronts.append(pareto(self._options(_of_stage(shape, allowed, s), by)))
        middle = ("mid.attention", "mid", "attention:mid_block.attentions.0")
        fronts.append(pareto(self._options([c for c in allowed if c in middle], by)))
        # The innermost resolution and the mid block can also be removed together, by a cut of their own.
        inner = cross(fronts.pop(), fronts.pop())
        whole = f"stage.{last}"
        if whole in allowed:
            inner = pareto([*inner, *self._options([whole], by)])
        for front in fronts:
            inner = cross(inner, front)
        return inner

    def _options(self, names: list[str], by: str) -> list[Option]:
        """All sets of cuts of one part of the UNet."""
        shape, total, found = UNetShape(self.config), self.costs.total.of(by), []
        layers = [c for c in names if c.startswith("layer.")]
        depths: list[Cuts] = [()]
        depths += [group for group in self.sensitivity.cuts if group[0] in layers]
        others = [[(), (c,)] for c in names if c not in layers]
        for parts in itertools.product(depths, *others):
            cuts = tuple(itertools.chain.from_iterable(parts))
            try:
                after = shape.cut(*cuts)
            except ValueError:
                continue
            if any(_emptied(after, cut) for cut in cuts):
                continue
            loss = sum(self.sensitivity.cuts[part] for part in parts if part)
            found.append(Option(loss, total - self.costs.of_shape(after).of(by), cuts))
        return found

    def staged(self, cuts: Cuts, by: str, num_stages: int) -> PruningPlan:
        """A plan of these cuts, ordered and divided into stages; see `plan` for the arguments."""
        steps = []
        for name in dict.fromkeys(cuts):
            for times in range(1, cuts.count(name) + 1):
                group = (name,) * times
                loss = self.sensitivity.cuts[group] - (self.sensitivity.cuts[group[1:]] if times > 1 else 0.0)
                alone = self._saved(group, by) - self._saved(group[1:], by)
                steps.append((name.startswith("gri."), loss / max(alone, 1e-30), name, loss))
        # The sort is stable. The layers of one resolution have the same cut, so their order does not matter.
        steps.sort(key=lambda step: step[:2])
        order, whole = tuple(step[2] for step in steps), self._saved(cuts, by)
        stages: list[list[str]] = [[] for _ in range(num_stages)]
        losses = [0.0] * num_stages
        for index, (_, _, name, loss) in enumerate(steps):
            # A cut belongs to the stage that contains the midpoint of its savings.
            middle = (self._saved(order[:index], by) + self._saved(order[: index + 1], by)) / 2
            stage = min(int(num_stages * middle / whole), num_stages - 1)
            stages[stage].append(name)
            losses[stage] += loss
        kept = [k for k in range(num_stages) if stages[k]]
        sums = list(itertools.accumulate(losses[k] for k in kept))
        return make_plan(self.config, [stages[k] for k in kept], self.costs, sums)

    def _saved(self, cuts: Sequence[str], by: str) -> float:
        shape = self._shape.cut(*cuts)
        return self.costs.total.of(by) - self.costs.of_shape(shape).of(by)


def check_goal(target: float, by: str, num_stages: int = 1) -> None:
    """Raises a ValueError unless this is a goal that `PruningProfile.plan` takes."""
    check_counts(num_stages=num_stages)
    check_measure(by)
    if not 0 < target < 1:
        raise ValueError(f"target is the share of the cost that may remain, between 0 and 1, got {target}.")


def _emptied(after: UNetShape, cut: str) -> bool:
    """Whether a cut removed the last attention of its block.

    attention.down.S and attention.up.S remove it with a stock config.
    """
    if not cut.startswith("attention:") or "mid_block" in cut:
        return False
    block = ".".join(cut.removeprefix("attention:").split(".")[:2])
    return not any(path.startswith(f"{block}.") for path in after.attentions())


def _of_stage(shape: UNetShape, cuts: Sequence[str], stage: int) -> list[str]:
    """The cuts at one resolution, without the removal of the whole resolution."""
    whole = {f"{kind}.{stage}" for kind in ("layer", "attention.down", "attention.up", "gri")}
    single = {f"attention:{path}" for path in shape.attentions(stage)}
    return [cut for cut in cuts if cut in whole | single]


def profile_network(
    network: Any,
    inputs: Sequence[CalibrationInput],
    *,
    height: int | None = None,
    width: int | None = None,
    repeats: int = 10,
    score: Score | None = None,
    criterion: str = "drop",
    progress: bool = False,
) -> PruningProfile:
    """Measures cost and sensitivity of all blocks, layers, attentions and cuts of a network.

    Args:
        network: a stock UNet, an `ASDMUNet2DConditionModel` or a transformer, with weights, on its target device.
        inputs: calibration inputs, see `record_calibration_inputs` and `noised_calibration_inputs`. The cost of a
            transformer is that of a call with the first one.
        height, width: size of the latents for the costs of a UNet; default: that of the inputs, or `sample_size` of the
            config.
        repeats: number of time measurements, with the batch size of the inputs; 0: none.
        score: see `measure_sensitivity`.
        criterion: of the cuts of a transformer: "drop", "similarity" or "contiguous", see `PruningProfile`.
        progress: show a progress bar.

    Raises:
        ValueError: there are neither inputs nor a score, a transformer has no inputs or is given another size, the
            criterion is unknown or not possible, or the network cannot be pruned.
    """
    shape = shape_of(network_config(network))
    if not isinstance(shape, UNetShape):
        if not inputs or height is not None or width is not None:
            raise ValueError(
                "The cost of a transformer is measured in a call of its pipeline: give the inputs of"
                " record_calibration_inputs, with the height and width for the pipeline."
            )
        sensitivity = measure_sensitivity(network, inputs, score, progress, criterion)
        return PruningProfile(shape.base, block_costs(network, inputs[0], repeats), sensitivity)
    sensitivity = measure_sensitivity(network, inputs, score, progress, criterion)
    batch, tokens = 1, 77
    if inputs:
        first = inputs[0]
        batch, tokens = len(first["sample"]), first["encoder_hidden_states"].shape[1]
        if height is None and width is None:
            height, width = first["sample"].shape[2:]
    costs = cost_table(network, height, width, tokens, repeats, batch)
    return PruningProfile(shape.base, costs, sensitivity)


def plan_pruning(
    network: Any,
    inputs: Sequence[CalibrationInput],
    target: float,
    *,
    by: str = "macs",
    num_stages: int = 3,
    stock_only: bool = False,
    score: Score | None = None,
    criterion: str = "drop",
) -> PruningPlan:
    """The plan that reaches a target cost with the smallest predicted loss.

    A-SDM (arXiv:2312.15516) as rebuilt here; how the paper chooses its blocks is not public.

    ```python
    plan = plan_pruning(pipe.unet, record_calibration_inputs(pipe, prompts), 0.78)
    student = prune_network(pipe.unet, plan, num_stages=1)
    ```

    Args:
        network, inputs, score, criterion: see `profile_network`, which also returns the measurements.
        target, by, num_stages, stock_only: see `PruningProfile.plan`.

    Raises:
        ValueError: see `profile_network` and `PruningProfile.plan`.
    """
    check_goal(target, by, num_stages)  # before the measurements, which take long
    repeats = 10 if by == "milliseconds" else 0
    profile = profile_network(network, inputs, repeats=repeats, score=score, criterion=criterion)
    return profile.plan(target, by, num_stages, stock_only)
