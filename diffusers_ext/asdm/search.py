"""`plan_pruning`: from what a UNet's parts cost and what they are good for, the cuts that lose least for a speed-up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .calibration import CalibrationInput
from .cost import CostTable, cost_table
from .plan import PruningPlan, make_plan
from .sensitivity import Score, Sensitivity, measure_sensitivity
from .shape import Config, UNetShape, architecture_config, possible_cuts
from .unet import unet_config

Cuts = tuple[str, ...]


@dataclass(frozen=True)
class _Option:
    """Some cuts together: their loss, and what they save of the measure."""

    loss: float
    saved: float
    cuts: Cuts


@dataclass(frozen=True)
class PruningProfile:
    """What a UNet's parts and the cuts that it allows cost and are worth.

    Attributes:
        config: the UNet's `architecture_config`.
        costs: of its parts.
        sensitivity: of its parts and cuts.
    """

    config: Config
    costs: CostTable
    sensitivity: Sensitivity

    def plan(
        self, target: float, by: str = "macs", num_stages: int = 3, stock_only: bool = False
    ) -> PruningPlan:
        """The cuts whose losses sum to the least among all that leave no more than `target` of the cost.

        The search is exact under two assumptions: losses of cuts add up, and so do costs, which is exact for MACs
        and an approximation for milliseconds. Two layers of one resolution are measured together.

        Args:
            target: the share of the cost that may be left, between 0 and 1; 0.78 saves 22%.
            by: "macs", "milliseconds" or "parameters".
            num_stages: how many stages to divide the cuts into, so that each saves about as much; fewer if there
                are fewer cuts. The least loss for what it saves comes first, GRI attention last.
            stock_only: only cuts after which it is still a stock `UNet2DConditionModel`.

        Raises:
            ValueError: a target that is no share or cannot be reached, a cost that was not measured, no stages.
        """
        _check_target(target)
        if num_stages < 1:
            raise ValueError(f"num_stages must be 1 or more, got {num_stages}.")
        total = self.costs.total.of(by)
        found = self._front(by, stock_only)
        enough = [option for option in found if option.saved >= (1 - target) * total * (1 - 1e-12)]
        if not enough:
            best = 1 - max(option.saved for option in found) / total
            raise ValueError(
                f"No cuts that this UNet allows leave {target:.1%} of its {by}: they leave at least {best:.1%}."
                f" Give a target of {np.ceil(1000 * best) / 1000:g} or more"
                f"{', or allow more than a stock UNet' if stock_only else ''}."
            )
        chosen = min(enough, key=lambda option: (option.loss, -option.saved))
        return self._staged(chosen.cuts, by, num_stages)

    def random_plan(
        self, target: float, by: str = "macs", seed: int = 0, stock_only: bool = False
    ) -> PruningPlan:
        """A control: one stage of cuts drawn at random until no more than `target` of the cost is left.

        The first of 200 draws that leaves at most 3% of the cost less than the target, so that no comparison is lost by
        cutting more; or else the closest. Always the closest would be the same few plans for every seed.

        Raises:
            ValueError: see `plan`; also if no draw reaches the target.
        """
        _check_target(target)
        total, draw = self.costs.total.of(by), random.Random(seed)
        allowed = self._allowed(by, stock_only)
        # As often as there are layers; a draw that finds none left goes on with the next cut.
        allowed += [c for c in allowed if c.startswith("layer.")] * (max(self.config["layers_per_block"]) - 1)
        found: list[tuple[float, Cuts]] = []
        for _ in range(200):
            shape, cuts = UNetShape(self.config), ()
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
            raise ValueError(f"No random cuts left {target:.1%} of the {by}: give a larger target.")
        return make_plan(self.config, [min(found)[1]], self.costs)

    def _allowed(self, by: str, stock_only: bool) -> list[str]:
        """Single cuts that save something."""
        cuts = possible_cuts(self.config, stock_only)
        return [c for c in cuts if (c,) in self.sensitivity.cuts and self._saved((c,), by) > 0]

    def _front(self, by: str, stock_only: bool) -> list[_Option]:
        """All sets of cuts that no other set beats in both loss and cost."""
        shape, last = UNetShape(self.config), len(self.config["layers_per_block"]) - 1
        allowed = self._allowed(by, stock_only)
        fronts = []
        for s in range(shape.num_stages):
            fronts.append(_pareto(self._options(_of_stage(shape, allowed, s), by)))
        middle = ("mid.attention", "mid", "attention:mid_block.attentions.0")
        fronts.append(_pareto(self._options([c for c in allowed if c in middle], by)))
        # The innermost resolution and the mid block may also go as one, which is a cut of its own.
        inner = _cross(fronts.pop(), fronts.pop())
        whole = f"stage.{last}"
        if whole in allowed:
            inner = _pareto([*inner, *self._options([whole], by)])
        for front in fronts:
            inner = _cross(inner, front)
        return inner

    def _options(self, names: list[str], by: str) -> list[_Option]:
        """Every set of cuts of one part of the UNet."""
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
            found.append(_Option(loss, total - self.costs.of_shape(after).of(by), cuts))
        return found

    def _staged(self, cuts: Cuts, by: str, num_stages: int) -> PruningPlan:
        """Orders the cuts and divides them."""
        steps = []
        for name in dict.fromkeys(cuts):
            for times in range(1, cuts.count(name) + 1):
                group = (name,) * times
                loss = self.sensitivity.cuts[group] - (self.sensitivity.cuts[group[1:]] if times > 1 else 0.0)
                alone = self._saved(group, by) - self._saved(group[1:], by)
                steps.append((name.startswith("gri."), loss / max(alone, 1e-30), name, loss))
        # Stable, and the layers of one resolution are the same cut, so their order does not matter.
        steps.sort(key=lambda step: step[:2])
        order, whole = tuple(step[2] for step in steps), self._saved(cuts, by)
        stages: list[list[str]] = [[] for _ in range(num_stages)]
        losses = [0.0] * num_stages
        for index, (_, _, name, loss) in enumerate(steps):
            # A cut belongs to the stage in which the middle of its saving falls.
            middle = (self._saved(order[:index], by) + self._saved(order[: index + 1], by)) / 2
            stage = min(int(num_stages * middle / whole), num_stages - 1)
            stages[stage].append(name)
            losses[stage] += loss
        kept = [k for k in range(num_stages) if stages[k]]
        sums = list(itertools.accumulate(losses[k] for k in kept))
        return make_plan(self.config, [stages[k] for k in kept], self.costs, sums)

    def _saved(self, cuts: Sequence[str], by: str) -> float:
        shape = UNetShape(self.config).cut(*cuts)
        return self.costs.total.of(by) - self.costs.of_shape(shape).of(by)


def _check_target(target: float) -> None:
    if not 0 < target < 1:
        raise ValueError(f"target is the share of the cost that may be left, between 0 and 1, got {target}.")


def _emptied(after: UNetShape, cut: str) -> bool:
    """Whether a single attention was its block's last one: attention.down.S and .up.S say that in a stock config."""
    if not cut.startswith("attention:") or "mid_block" in cut:
        return False
    block = ".".join(cut.removeprefix("attention:").split(".")[:2])
    return not any(path.startswith(f"{block}.") for path in after.attentions())


def _of_stage(shape: UNetShape, cuts: Sequence[str], stage: int) -> list[str]:
    """Cuts at one resolution, but not all of it."""
    whole = {f"{kind}.{stage}" for kind in ("layer", "attention.down", "attention.up", "gri")}
    single = {f"attention:{path}" for path in shape.attentions(stage)}
    return [cut for cut in cuts if cut in whole | single]


def _pareto(options: Sequence[_Option]) -> list[_Option]:
    """Those that no other beats in both, the least loss first."""
    found: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.loss, -o.saved, len(o.cuts))):
        if not found or option.saved > found[-1].saved:
            found.append(option)
    return found


def _cross(one: list[_Option], other: list[_Option]) -> list[_Option]:
    """The best of all pairs; they concern different parts, so that losses and savings add up."""
    loss = np.add.outer([o.loss for o in one], [o.loss for o in other]).ravel()
    saved = np.add.outer([o.saved for o in one], [o.saved for o in other]).ravel()
    order = np.lexsort((-saved, loss))
    best = np.maximum.accumulate(saved[order])
    keep = order[np.concatenate([[True], best[1:] > best[:-1]])]
    pairs = [divmod(int(index), len(other)) for index in keep]
    return [
        _Option(float(loss[i]), float(saved[i]), one[a].cuts + other[b].cuts)
        for i, (a, b) in zip(keep, pairs)
    ]


def profile_unet(
    unet: Any,
    inputs: Sequence[CalibrationInput],
    *,
    height: int | None = None,
    width: int | None = None,
    repeats: int = 10,
    score: Score | None = None,
    progress: bool = False,
) -> PruningProfile:
    """Cost and sensitivity of every block, layer, attention and cut of a UNet.

    Args:
        unet: a stock UNet or an `ASDMUNet2DConditionModel`, with weights, where it is to run.
        inputs: what its sensitivity is measured on: see `record_calibration_inputs` and `noised_calibration_inputs`.
        height, width: of the latents that costs are for; default: the inputs', or the config's `sample_size`.
        repeats: how often to measure milliseconds, with the inputs' batch size; 0: not at all.
        score: see `measure_sensitivity`.
        progress: show a bar.

    Raises:
        ValueError: neither inputs nor score, or a UNet that cannot be pruned.
    """
    config = unet_config(unet)
    batch, tokens = 1, 77
    if inputs:
        first = inputs[0]
        batch, tokens = len(first["sample"]), first["encoder_hidden_states"].shape[1]
        if height is None and width is None:
            height, width = first["sample"].shape[2:]
    sensitivity = measure_sensitivity(unet, inputs, score, progress)
    costs = cost_table(unet, height, width, tokens, repeats, batch)
    return PruningProfile(architecture_config(config), costs, sensitivity)


def plan_pruning(
    unet: Any,
    inputs: Sequence[CalibrationInput],
    target: float,
    *,
    by: str = "macs",
    num_stages: int = 3,
    stock_only: bool = False,
    score: Score | None = None,
) -> PruningPlan:
    """The plan that reaches a wanted speed-up at the least predicted loss.

    A-SDM (arXiv:2312.15516) as rebuilt here: how the paper chooses its blocks is not public.

    ```python
    plan = plan_pruning(pipe.unet, record_calibration_inputs(pipe, prompts), 0.78)
    student = prune_unet(pipe.unet, plan, num_stages=1)
    ```

    Args:
        unet, inputs, score: see `profile_unet`, which has the figures behind the plan.
        target, by, num_stages, stock_only: see `PruningProfile.plan`.

    Raises:
        ValueError: see these two.
    """
    repeats = 10 if by == "milliseconds" else 0
    profile = profile_unet(unet, inputs, repeats=repeats, score=score)
    return profile.plan(target, by, num_stages, stock_only)
