"""Builds the pruned network of a plan, with the weights of the full one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .networks import build_network, network_config, tensors_of
from .plan import PruningPlan
from .unet import build_unet, unet_config


def prune_network(
    network: Any, plan: PruningPlan, *, num_stages: int | None = None, from_stage: int = 0
) -> Any:
    """The pruned UNet or transformer of a plan, with the weights of the given one, which is not changed.

    The result has the class of the given network and loads without this package. If single attentions of a UNet are
    removed, or there are GRI attention or CLME-CondConv layers, it is an `ASDMUNet2DConditionModel`.

    A pruned transformer computes exactly what the full one does without the removed blocks.

    ```python
    first = prune_network(unet, plan, num_stages=1)                  # train it, then
    second = prune_network(first, plan, from_stage=1, num_stages=2)  # start the next stage from it
    ```

    Args:
        network: the network that the plan is for, or its student after `from_stage`.
        plan: see `PruningPlan`.
        num_stages: make the cuts up to and including this stage; None for all.
        from_stage: the stage that `network` was pruned to; 0 for the full one.

    Raises:
        ValueError: the plan is for another network, the stages do not exist or are in the wrong order, or the
            weights do not match the config (for example because of a LoRA).
    """
    last = _checked(network, plan, from_stage, num_stages)
    found = _weights(network, plan, from_stage, last)
    weights = {name: value.detach().clone() for name, value in found.items()}
    return build_network(_config(network, plan, from_stage, last), weights).train(network.training)


def cut_network(network: Any, *cuts: str) -> Any:
    """A UNet or transformer after some cuts, for measurements.

    It shares its weights with the given one; use `prune_network` for training.

    Raises:
        ValueError: see `PruningPlan`.
    """
    plan = PruningPlan(network_config(network), (cuts,))
    weights = _weights(network, plan, 0, 1)
    return build_network(_config(network, plan, 0, 1), weights).train(network.training)


def unit_sources(plan: PruningPlan, from_stage: int = 0, num_stages: int | None = None) -> dict[str, str]:
    """{path of a module after `num_stages`: its path after `from_stage`}; see `UNetShape.units`.

    Raises:
        ValueError: the stages do not exist or are in the wrong order.
    """
    last = _stages(plan, from_stage, num_stages)
    before = {old: now for now, old in plan.shape(from_stage).units().items()}
    return {now: before[old] for now, old in plan.shape(last).units().items()}


def teacher_blocks(plan: PruningPlan, num_stages: int | None = None) -> dict[str, str]:
    """{block of the student: block of the full network with the target output}, for the feature loss.

    In UNets the names are the same, except after a "stage.S" cut, which changes the numbers of the up blocks. That cut
    also omits the down block that lost its downsampler, since its output has another size. In transformers, the target
    of a block is the output of the last of the removed blocks that follow it.
    """
    return plan.shape(num_stages).blocks()


def removed_convs(
    unet: Any, plan: PruningPlan, *, num_stages: int | None = None, from_stage: int = 0
) -> dict[str, list[str]]:
    """The removed convolutions that can become experts of kept ones (CLME-CondConv).

    The conv1 and conv2 of a removed layer are assigned to the same convolution of the nearest kept layer of
    the block (the earlier one if there are two) whose kernel has the same shape. This always exists for
    conv2, and for conv1 only if a layer has the same number of input channels. The layers of a block that was
    removed completely are not assigned.

    Args:
        unet, plan, num_stages, from_stage: see `prune_network`.

    Returns:
        {path in the student: paths in `unet`}, without convolutions that are CLME-CondConv layers already.

    Raises:
        ValueError: see `prune_network`.
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
    """A student with the removed convolutions as experts of the kept ones (CLME-CondConv).

    Args:
        student: the result of `prune_network` for `unet` and the same stages. It is not changed.
        unet, plan, num_stages, from_stage: see `prune_network`.

    Returns:
        An `ASDMUNet2DConditionModel` with the same output as the student and the layers of `removed_convs`,
        or a copy of the student if there are none.

    Raises:
        ValueError: see `prune_network`; also if the student belongs to other stages.
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
            f"from_stage={from_stage} must lie between 0 and num_stages={last}: cuts cannot be undone."
        )
    return last


def _checked(unet: Any, plan: PruningPlan, from_stage: int, num_stages: int | None) -> int:
    last = _stages(plan, from_stage, num_stages)
    plan.check(unet, from_stage)
    return last


def _config(network: Any, plan: PruningPlan, from_stage: int, last: int) -> dict[str, Any]:
    config = network_config(network)
    found = {**config, **plan.shape(last).config()}
    if not config.get("cond_convs"):
        return found
    before = plan.shape(from_stage)
    after = {old: now for now, old in unit_sources(plan, from_stage, last).items()}
    conds = {}
    for path, experts in config["cond_convs"].items():
        unit = next((u for u in before.units() if path.startswith(f"{u}.")), None)
        if unit is None or unit in after:
            conds[path if unit is None else after[unit] + path[len(unit) :]] = experts
    return {**found, "cond_convs": conds or None}


@torch.no_grad()
def _weights(network: Any, plan: PruningPlan, from_stage: int, last: int) -> dict[str, Tensor]:
    """The weights of the student, with the tensors of the network itself."""
    sources = unit_sources(plan, from_stage, last)
    units = set(plan.shape(from_stage).units())
    inside: dict[str, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}
    for name, value in tensors_of(network).items():
        unit = next((u for u in _heads(name) if u in units), None)
        if unit is None:
            found[name] = value
        else:
            inside.setdefault(unit, {})[name[len(unit) :]] = value
    for now, old in sources.items():
        found |= {now + tail: value for tail, value in inside.get(old, {}).items()}
    return plan.shape(last).fit(found)


def _heads(name: str) -> list[str]:
    # The path of a unit has two parts in a transformer, three in the mid block of a UNet, and four in its other blocks.
    parts = name.split(".")
    return [".".join(parts[:k]) for k in (2, 3, 4)]
