"""UNets and transformers alike: what is left of them after cuts, their config, and how they are built from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..core.families import denoiser_of, uncompiled
from ..core.storage import digest
from .shape import UNetShape, possible_cuts
from .transformers import TransformerShape, check_class, is_transformer, possible_block_cuts
from .unet import build_unet, check_fits, check_not_cast, empty_unet, unet_config

Shape = UNetShape | TransformerShape


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The modules of the network with this config.

    Raises:
        ValueError: the network is not supported; see `UNetShape` and `TransformerShape`.
    """
    return TransformerShape(config) if is_transformer(config) else UNetShape(config)


def fingerprint(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that are equal for two networks only if they have the same modules.

    They do not say which blocks of a transformer were removed.
    """
    return digest(shape_of(config).config())


def single_cuts(config: Mapping[str, Any], stock_only: bool = False) -> list[str]:
    """All single cuts that a network allows; with `stock_only`, those whose result is a stock network."""
    return possible_block_cuts(config) if is_transformer(config) else possible_cuts(config, stock_only)


def network_config(network: Any) -> dict[str, Any]:
    """The arguments that a network was built with; those of a transformer with its `_class_name`.

    Raises:
        ValueError: it is neither a `UNet2DConditionModel` nor a transformer of a supported class; its weights are cast
            in every layer; or see `unet_config`.
    """
    kind = type(network)
    if isinstance(network, UNet2DConditionModel) or not isinstance(network, nn.Module):
        return unet_config(network)
    check_class(kind.__name__)
    if kind is not getattr(diffusers, kind.__name__):
        raise ValueError(f"Expected diffusers' own {kind.__name__}, got one of {kind.__module__}.")
    check_not_cast(network)
    names = kind._get_init_keys(kind) - {"self"}
    config: Any = network.config
    arguments = {name: value for name, value in config.items() if name in names}
    return {"_class_name": kind.__name__, **arguments}


def build_network(config: Mapping[str, Any], weights: dict[str, Tensor]) -> Any:
    """A network that uses the given tensors without copying them.

    Args:
        config: as from `network_config`.
        weights: the state dict. Of a transformer also its other buffers, such as embeddings of positions.

    Raises:
        ValueError: the names or shapes of the weights do not match the config.
    """
    if not is_transformer(config):
        return build_unet(dict(config), weights)
    # Not the meta device: tables of positions are computed here, and some are neither parameters nor buffers.
    with init_empty_weights(include_buffers=False):
        network = empty_network(config)
    buffers = dict(network.named_buffers())
    check_fits(weights, {**network.state_dict(), **buffers}, "transformer")
    saved = {name: weights[name] for name in network.state_dict()}
    network.load_state_dict(saved, strict=True, assign=True)
    for name in buffers.keys() - saved.keys():
        parent, _, own = name.rpartition(".")
        network.get_submodule(parent)._buffers[own] = weights[name]
    return network


def empty_network(config: Mapping[str, Any]) -> Any:
    """An untrained network on the default device.

    Args:
        config: as from `network_config`.
    """
    if not is_transformer(config):
        return empty_unet(dict(config))
    arguments = {name: value for name, value in config.items() if name != "_class_name"}
    return getattr(diffusers, config["_class_name"])(**arguments)


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a network, those that are not saved included."""
    return {**network.state_dict(), **dict(network.named_buffers())}


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError unless the pipeline has a network that can be pruned; see `prunable`."""
    prunable(pipe)


def prunable(pipe: Any) -> Any:
    """The UNet or transformer of a pipeline.

    Raises:
        ValueError: it cannot be pruned; or the pipeline has two transformers, or a ControlNet, whose outputs are added to
            blocks that may be removed.
    """
    network = uncompiled(denoiser_of(pipe))
    if isinstance(network, UNet2DConditionModel):
        pass
    elif isinstance(network, nn.Module):
        check_class(type(network).__name__, type(pipe).__name__)
    else:
        raise ValueError(
            f"{type(pipe).__name__} has no unet and no transformer, so there is nothing to prune."
        )
    if getattr(pipe, "controlnet", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} has a ControlNet, which a pruned {network_name(network)} does not fit: use the pipeline"
            " without it."
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} has two transformers for different noise levels, which are not measured apart: prune"
            " each with a plan of your own cuts."
        )
    return network


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network is in evaluation mode within the `with` block."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def network_name(network: Any) -> str:
    """ "UNet" or "transformer", for messages."""
    return "UNet" if isinstance(network, UNet2DConditionModel) else "transformer"
