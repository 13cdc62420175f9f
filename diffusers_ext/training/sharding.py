"""Training of a model whose parameters, gradients and optimizer states are divided among the processes (FSDP2).

Only a copy of the model is sharded. The model itself waits on the CPU and takes over the whole weights for validations
and at the end, so that what is called and saved is never a shard.
"""

from __future__ import annotations

import argparse
import copy
import os
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    disable_fsdp_ram_efficient_loading,
)
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from .checkpoints import changed_by_training, check_names

# Of UNets without text, for which diffusers names no blocks.
_BLOCKS = ["ResnetBlock2D"]
_PREFIX = "`accelerate launch` asks for "


def settle_sharding(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Prepares FSDP2, if `accelerate launch` asks for it, before anything is loaded.

    Raises:
        ValueError: it asks for another way of sharding, or for what the scripts do not do with FSDP2.
    """
    kind, state = accelerator.distributed_type, cast(Any, accelerator.state)
    # Accelerate leaves out all of these on CPUs without a word.
    asked = {name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if _true(f"ACCELERATE_USE_{name}")}
    for other in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        if kind is other or other.value in asked:
            raise ValueError(
                f"{_PREFIX}{other.value}, with which the training scripts were not tested: launch with --use_fsdp"
                " --fsdp_version 2, which shards the same, or with --multi_gpu."
            )
    if kind is not DistributedType.FSDP and not (kind is DistributedType.MULTI_CPU and "FSDP" in asked):
        return
    plugin: Any = state.fsdp_plugin if kind is DistributedType.FSDP else FullyShardedDataParallelPlugin()
    optimizer = getattr(args, "optimizer", None)
    for wrong, what, advice in (
        (plugin.fsdp_version != 2, f"fsdp_version {plugin.fsdp_version}", "pass --fsdp_version 2"),
        (accelerator.mixed_precision == "fp16", "mixed precision fp16 with FSDP", "use bf16"),
        (state.dynamo_plugin.backend != DynamoBackend.NO, "FSDP with torch.compile", "omit one of them"),
        (
            plugin.activation_checkpointing,
            "activation checkpointing of FSDP",
            "use the script's --gradient_checkpointing",
        ),
        (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "parameters on the CPU (fsdp_offload_params)",
            "omit it",
        ),
        (
            optimizer in ("muon", "drop_muon"),
            f"FSDP, and --optimizer {optimizer} needs whole matrices",
            "use --optimizer adamw, or --multi_gpu",
        ),
        (
            getattr(args, "use_8bit_adam", False),
            "FSDP, with which --use_8bit_adam was not tested",
            "omit one of them",
        ),
    ):
        if wrong:
            raise ValueError(f"{_PREFIX}{what}: {advice}.")
    # Its policy would cast the images and the loss as well, which autocast does not.
    plugin.mixed_precision_policy = None
    # Otherwise transformers loads empty text encoders in all processes but the first.
    plugin.cpu_ram_efficient_loading = False
    disable_fsdp_ram_efficient_loading()
    shared: Any = PartialState()  # from which Accelerate's other states take the type
    shared.distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin


def refuse_shards(accelerator: Accelerator, reason: str, advice: str = "launch with --multi_gpu") -> None:
    """Raises a ValueError if the model is to be sharded, which a method cannot be trained with."""
    if is_sharded(accelerator):
        raise ValueError(f"{_PREFIX}FSDP, and {reason}: {advice}.")


def _true(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes share one copy of the model's parameters."""
    return accelerator.distributed_type is DistributedType.FSDP


def to_shard(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """What to train for `model`: with FSDP a copy, which `accelerator.prepare` shards, else `model` itself."""
    if not is_sharded(accelerator):
        return model
    shards: Any = copy.deepcopy(model.cpu())
    shards._no_split_modules = blocks_of(model)
    return shards


def blocks_of(model: nn.Module) -> list[str]:
    """The classes of the blocks with most weights, which are gathered one by one with TRANSFORMER_BASED_WRAP."""
    networks = [part for part in model.modules() if isinstance(part, ModelMixin)]
    named: set[str] = set().union(*(part._no_split_modules or _BLOCKS for part in networks))
    return sorted(named & {type(part).__name__ for part in model.modules()})


def take_whole(model: nn.Module, shards: nn.Module, ema: EMAModel | None = None) -> None:
    """Copies the trained weights and the buffers of `shards` into `model`; all processes call it.

    Args:
        model, shards: see `to_shard`. Nothing is done if they are the same.
        ema: take its weights instead of those of `shards`.
    """
    if model is shards:
        return
    trained = [p for p in shards.parameters() if p.requires_grad]
    values = trained if ema is None else ema.shadow_params
    own = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for mine, value in zip(own, values, strict=True):
            mine.copy_(_whole(value))
        for mine, value in zip(model.buffers(), shards.buffers(), strict=True):
            mine.copy_(value)


class ShardedState:
    """What training changes of a sharded model, in whole tensors, for `accelerator.save_state`.

    A checkpoint therefore does not depend on the number of processes, and has no frozen weights.

    Args:
        accelerator: it no longer saves the model and the optimizer itself.
        shards, optimizer: from `accelerator.prepare`.
        ema: of the parameters of `shards`.
    """

    def __init__(
        self, accelerator: Accelerator, shards: nn.Module, optimizer: Any, ema: EMAModel | None
    ) -> None:
        accelerator._models.clear()
        accelerator._optimizers.clear()
        self._keep = accelerator.is_main_process
        self._shards, self._optimizer, self._ema = shards, optimizer, ema

    def state_dict(self) -> dict[str, Any]:
        """The state; all processes call it, and only the first gets the tensors."""
        state = {"model": changed_by_training(self._shards), "optimizer": self._optimizer.state_dict()}
        if self._ema is not None:
            state["ema"] = self._ema.state_dict()
        return tree_map(self._gathered, state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a result of `state_dict`.

        Raises:
            ValueError: it is that of another network.
        """
        own = changed_by_training(self._shards)
        check_names(own, state["model"])
        trained = [p for p in self._shards.parameters() if p.requires_grad]
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(_like(value, state["model"][name]))
        optimizer = dict(state["optimizer"])
        optimizer["state"] = {
            index: {name: _like(trained[index], value) for name, value in entries.items()}
            for index, entries in optimizer["state"].items()
        }
        self._optimizer.load_state_dict(optimizer)
        if self._ema is not None:
            shadow = [
                _like(p, value) for p, value in zip(trained, state["ema"]["shadow_params"], strict=True)
            ]
            self._ema.load_state_dict({**state["ema"], "shadow_params": shadow})

    def _gathered(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        whole = _whole(value.detach())
        return whole.cpu() if self._keep else None


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(parameter: Tensor, value: Any) -> Any:
    """`value` in the shards of `parameter`, if it has its shape; a number of steps has not."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
