"""LoRA layers on a frozen denoiser: added, saved as diffusers loads them, and several on one copy of the weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .transformers import flow_of_class

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
# Of UNets; a flow has its own, see `transformers.Flow`.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(
    denoiser: Any, rank: int, adapter_name: str = "smooth", targets: tuple[str, ...] = TARGETS
) -> None:
    """Freezes a denoiser and adds LoRA layers to its linear layers whose names end with one of `targets`.

    The layers have scale 1 and do not change the output at initialization.

    Raises:
        ValueError: the rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be 1 or more, got {rank}.")
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    ends = tuple(f".{target}" for target in targets)
    # Not the ends themselves: PEFT would also match lists of layers, such as `attn.to_out`.
    layers = [
        name
        for name, part in denoiser.named_modules()
        if isinstance(part, nn.Linear) and f".{name}".endswith(ends)
    ]
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=layers)
    denoiser.add_adapter(config, adapter_name)


def shared_copy(network: Any) -> Any:
    """A copy of a frozen network with the same parameters and buffers, and modules of its own.

    LoRA layers that are added to the copy are not in `network`, and there is one copy of its weights in memory. What
    casts or moves one of them in place does so to both.
    """
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(value): value for value in tensors})


def lora_state(denoiser: Any, adapter_name: str = "smooth") -> dict[str, Tensor]:
    """The weights of an adapter (float32, on the CPU) under the names that diffusers loads, with scale 1.

    Every name starts with `unet.` or `transformer.`.
    """
    from peft.utils import get_peft_model_state_dict

    prefix = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
    rooted = denoiser.peft_config[adapter_name].use_rslora
    scales = {}
    for name, part in denoiser.named_modules():
        if adapter_name in getattr(part, "lora_alpha", {}):
            rank = part.r[adapter_name]
            scales[name] = part.lora_alpha[adapter_name] / (math.sqrt(rank) if rooted else rank)
    state: dict[str, Tensor] = {}
    for name, value in get_peft_model_state_dict(denoiser, adapter_name=adapter_name).items():
        scale = scales.get(name.removesuffix(".lora_B.weight"), 1.0)
        state[f"{prefix}.{name}"] = (scale * value.detach().to("cpu", torch.float32)).contiguous()
    return state


def save_lora(pipe: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Writes a LoRA into a folder, with the names and the scale that `pipe.load_lora_weights` expects.

    Args:
        pipe: a pipeline that loads it.
        state: from `lora_state`, in any data type.
        folder: exists.
    """
    if flow_of_class(type(pipe)) is None:
        save_file(state, folder / WEIGHT_NAME)
    else:
        layers = {key.removeprefix("transformer."): value for key, value in state.items()}
        pipe.save_lora_weights(folder, transformer_lora_layers=layers)
