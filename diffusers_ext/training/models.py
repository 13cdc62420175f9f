"""Pipelines whose parts are frozen in training, in the data type of the accelerator."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from ..core.records import pipeline_record
from .arguments import load_pipeline

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The data type of frozen networks: that of mixed precision, or float32 without."""
    return _DTYPES.get(accelerator.mixed_precision, torch.float32)


def load_frozen(
    args: argparse.Namespace, accelerator: Accelerator, trained: Collection[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """Loads a pipeline, in whatever data type it is stored, and freezes its networks.

    Args:
        args: see `add_model_arguments`.
        accelerator: selects the device and the data type.
        trained: names of parts that training starts from. They stay in float32.

    Returns:
        The pipeline, and its record as it is stored.
    """
    pipe: Any = load_pipeline(args, dtype=torch.float32)
    record = pipeline_record(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval().to(accelerator.device)
            if name not in trained:
                freeze(part, accelerator)
    pipe.set_progress_bar_config(disable=True)
    return pipe, record


def freeze(network: nn.Module, accelerator: Accelerator) -> None:
    """Freezes a network and casts it. Its inputs are cast as well, so that it can be called with float32."""
    dtype = frozen_dtype(accelerator)
    network.requires_grad_(False).eval().to(accelerator.device, dtype)
    if dtype != torch.float32:
        network.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def _cast_inputs(network: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _cast(args, network.dtype), _cast(kwargs, network.dtype)


# Numbers of positions and sizes of images. Networks embed them in float32, and 257 is no bfloat16.
_NUMBERS = ("img_ids", "txt_ids", "time_ids")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        # Latents and embeddings, pooled ones too, but not timesteps, which are embedded in float32: 999 is no bfloat16.
        return value.to(dtype) if value.ndim > 1 and value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: part if name in _NUMBERS else _cast(part, dtype) for name, part in value.items()}
    # Z-Image takes lists of latents and of embeddings.
    return type(value)(_cast(part, dtype) for part in value) if type(value) in (tuple, list) else value


def as_stored(pipe: Any, args: argparse.Namespace, accelerator: Accelerator, trained: Collection[str]) -> Any:
    """`pipe` for publishing: on the CPU, and with its frozen networks as they are stored, not cast.

    Args:
        pipe: from `load_frozen`, or one with the same parts.
        args, accelerator: see `load_frozen`.
        trained: names of the parts to keep.
    """
    if frozen_dtype(accelerator) != torch.float32:
        for name, part in load_pipeline(args, dtype=torch.float32).components.items():
            if isinstance(part, nn.Module) and name in pipe.components and name not in trained:
                pipe.register_modules(**{name: part})
    return pipe.to("cpu")


def save_memory(args: argparse.Namespace, model: nn.Module) -> None:
    """Enables what `--gradient_checkpointing` and `--enable_xformers_memory_efficient_attention` ask for.

    Checkpointing is for the networks of diffusers with trained parameters, xFormers for all networks with attention.

    Raises:
        ValueError: a trained network does not support checkpointing, or no network has attention to replace.
    """
    networks: list[Any] = [part for part in model.modules() if isinstance(part, ModelMixin)]
    for network in networks if args.gradient_checkpointing else []:
        if any(parameter.requires_grad for parameter in network.parameters()):
            network.enable_gradient_checkpointing(_checkpointed)  # refuses by name
    if not args.enable_xformers_memory_efficient_attention:
        return
    name = "set_use_memory_efficient_attention_xformers"
    if not any(hasattr(part, name) for network in networks for part in list(network.modules())[1:]):
        names = ", ".join(sorted({type(network).__name__ for network in networks}))
        raise ValueError(
            f"--enable_xformers_memory_efficient_attention: {names} has no attention that xFormers can replace. Omit"
            " the option."
        )
    for network in networks:
        network.enable_xformers_memory_efficient_attention()


def _checkpointed(module: nn.Module, *args: Any) -> Any:
    state: dict[str, Any] = dict(module.named_parameters())
    # In a `functional_call`, which has ended when the backward pass calls the module again.
    constant = not all(isinstance(value, nn.Parameter) for value in state.values())
    backends = [backend for backend, enabled in _BACKENDS.items() if enabled()]

    def call(*args: Any) -> Any:
        with sdpa_kernel(backends):  # again the same attention
            return functional_call(module, state, args) if constant else module(*args)

    return checkpoint(call, *args, use_reentrant=False)  # the other variant has no second derivatives


_BACKENDS = {
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
}
