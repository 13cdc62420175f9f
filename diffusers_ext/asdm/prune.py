"""Makes the smaller UNet of a plan, each of its weights taken from where it stood in the whole one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .plan import PruningPlan
from .shape import UNetShape
from .unet import build_unet, unet_config


def prune_unet(
    unet: Any, plan: PruningPlan, *, num_stages: int | None = None, from_stage: int = 0
) -> UNet2DConditionModel:
    """The UNet that a plan leaves, with the weights of the given one; that one is left alone.

    The result is a stock `UNet2DConditionModel`, which loads without this package, unless single attentions are
    removed, or there are GRI attention or CLME-CondConv layers: then it is an `ASDMUNet2DConditionModel`.

    ```python
    first = prune_unet(unet, plan, num_stages=1)                  # train it, then
    second = prune_unet(first, plan, from_stage=1, num_stages=2)  # start the next one from it
    ```

    Args:
        unet: the UNet that the plan is for, or what it left after `from_stage`.
        plan: see `PruningPlan`.
        num_stages: make the cuts up to and with this stage; None for all.
        from_stage: the stage that `unet` has been pruned to already; 0: not at all.

    Raises:
        ValueError: a plan for another UNet, stages that the plan has not or in the wrong order, weights that are not
            the config's (a LoRA on the UNet).
    """
    last = _checked(unet, plan, from_stage, num_stages)
    weights = {name: value.detach().clone() for name, value in _weights(unet, plan, from_stage, last).items()}
    return build_unet(_config(unet, plan, from_stage, last), weights).train(unet.training)


def cut_unet(unet: Any, *cuts: str) -> UNet2DConditionModel:
    """A UNet after some cuts, to look at: it shares its weights with the given one. For a student, see `prune_unet`.

    Raises:
        ValueError: see `PruningPlan`.
    """
    plan = PruningPlan(unet_config(unet), (cuts,))
    weights = _weights(unet, plan, 0, 1)
    return build_unet(_config(unet, plan, 0, 1), weights).train(unet.training)


def unit_sources(plan: PruningPlan, from_stage: int = 0, num_stages: int | None = None) -> dict[str, str]:
    """{path of a module after `num_stages`: its path after `from_stage`}: see `UNetShape.units`.

    Raises:
        ValueError: stages that the plan has not, or in the wrong order.
    """
    last = _stages(plan, from_stage, num_stages)
    before = {old: now for now, old in plan.shape(from_stage).units().items()}
    return {now: before[old] for now, old in plan.shape(last).units().items()}


def teacher_blocks(plan: PruningPlan, num_stages: int | None = None) -> dict[str, str]:
    """{student's block: the whole UNet's block whose output it should give}, for the loss on features.

    The names are the same, except after a "stage.S" cut: the up blocks then count from a coarser one. That cut also
    leaves out the down block that lost its downsampler, whose output has another size.
    """
    return plan.shape(num_stages).blocks()


def removed_convs(
    unet: Any, plan: PruningPlan, *, num_stages: int | None = None, from_stage: int = 0
) -> dict[str, list[str]]:
    """Which removed convolutions could live on as experts of which kept one (CLME-CondConv).

    A removed layer's conv1 and conv2 go to the same convolution of the layer next to it in its block, the one before
    if there are two, whose kernel has the same shape: conv2 always finds one, conv1 only where the number of input
    channels is the same. The layers of a block that went as a whole have no heir.

    Args:
        unet, plan, num_stages, from_stage: see `prune_unet`.

    Returns:
        {path in the student: paths in `unet`}. Convolutions that are CLME-CondConv layers already neither give nor
        take.

    Raises:
        ValueError: see `prune_unet`.
    """
    last = _checked(unet, plan, from_stage, num_stages)
    kept = {old: now for now, old in unit_sources(plan, from_stage, last).items()}
    resnets = [path for path in plan.shape(from_stage).units() if ".resnets." in path]
    modules = dict(unet.named_modules())
    found: dict[str, list[str]] = {}
    for removed in resnets:
        if removed in kept:
            continue
        block, _, index = removed.rpartition(".")
        near = [path for path in resnets if path in kept and path.rpartition(".")[0] == block]
        near.sort(key=lambda path: (abs(int(path.rpartition(".")[2]) - int(index)), path))
        for name in ("conv1", "conv2"):
            source = modules[f"{removed}.{name}"]
            heir = next((p for p in near if _same_kind(source, modules[f"{p}.{name}"])), None)
            if heir is not None:
                found.setdefault(f"{kept[heir]}.{name}", []).append(f"{removed}.{name}")
    return found


def inherit_convs(
    student: Any, unet: Any, plan: PruningPlan, *, num_stages: int | None = None, from_stage: int = 0
) -> UNet2DConditionModel:
    """A student whose kept convolutions have the removed ones as experts: `removed_convs` as CLME-CondConv layers.

    Args:
        student: what `prune_unet` made of `unet`, with the same stages; left alone.
        unet, plan, num_stages, from_stage: see `prune_unet`.

    Returns:
        An `ASDMUNet2DConditionModel` that gives what the student gives, or a copy of the student if nothing fits.

    Raises:
        ValueError: see `prune_unet`; a student of other stages.
    """
    from .condconv import CLMECondConv2d

    pairs = removed_convs(unet, plan, num_stages=num_stages, from_stage=from_stage)
    plan.check(student, _stages(plan, from_stage, num_stages))
    config = unet_config(student)
    weights = {name: value.detach().clone() for name, value in student.state_dict().items()}
    conds = dict(config.get("cond_convs") or {})
    for path, sources in pairs.items():
        layer = CLMECondConv2d.from_convs(
            student.get_submodule(path), [unet.get_submodule(source) for source in sources]
        )
        weights = {name: value for name, value in weights.items() if not name.startswith(f"{path}.")}
        weights |= {f"{path}.{name}": value.detach() for name, value in layer.state_dict().items()}
        conds[path] = layer.num_experts
    return build_unet({**config, "cond_convs": conds or None}, weights).train(student.training)


def _same_kind(one: nn.Module, other: nn.Module) -> bool:
    plain = isinstance(one, nn.Conv2d) and isinstance(other, nn.Conv2d)
    return plain and one.weight.shape == other.weight.shape  # type: ignore[union-attr]


def _stages(plan: PruningPlan, from_stage: int, num_stages: int | None) -> int:
    last = len(plan.stages) if num_stages is None else num_stages
    plan.shape(last)
    if not 0 <= from_stage <= last:
        raise ValueError(
            f"from_stage={from_stage} must lie between 0 and num_stages={last}: cuts are not taken back."
        )
    return last


def _checked(unet: Any, plan: PruningPlan, from_stage: int, num_stages: int | None) -> int:
    last = _stages(plan, from_stage, num_stages)
    plan.check(unet, from_stage)
    return last


def _config(unet: Any, plan: PruningPlan, from_stage: int, last: int) -> dict[str, Any]:
    config = unet_config(unet)
    before: UNetShape = plan.shape(from_stage)
    after = {old: now for now, old in unit_sources(plan, from_stage, last).items()}
    conds = {}
    for path, experts in (config.get("cond_convs") or {}).items():
        unit = next((u for u in before.units() if path.startswith(f"{u}.")), None)
        if unit is None or unit in after:
            conds[path if unit is None else after[unit] + path[len(unit) :]] = experts
    return {**config, **plan.shape(last).config(), "cond_convs": conds or None}


@torch.no_grad()
def _weights(unet: Any, plan: PruningPlan, from_stage: int, last: int) -> dict[str, Tensor]:
    """The student's state dict, of the UNet's own tensors."""
    sources = unit_sources(plan, from_stage, last)
    units = set(plan.shape(from_stage).units())
    inside: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for name, value in unet.state_dict().items():
        # A unit's path has three parts and, in the mid block, two after its name.
        unit = next((u for u in _heads(name) if u in units), None)
        if unit is None:
            found[name] = value
        else:
            inside.setdefault(unit, {})[name[len(unit) :]] = value
    for now, old in sources.items():
        found |= {now + tail: value for tail, value in inside.get(old, {}).items()}
    return found


def _heads(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:k]) for k in (3, 4)]
