"""A transformer whose time is held: with any time, it gives the output that it gave at one time.

A flow's time t enters through an embedder W₂ act(W₁ φ(t) + b₁) + b₂ alone. With W₁ = 0 and the bias b₁ + W₁ φ(t*), it
gives the embedding of t* for every t. The transformer keeps its class and its config. What is embedded besides the
time, such as pooled text or a guidance scale, is not changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.pipeline import Stop

# How the names of the first layers of time embedders end.
_LAYERS = ("timestep_embedder.linear_1", "t_embedder.mlp.0")


def time_layer(transformer: nn.Module) -> nn.Linear:
    """The first layer of a transformer's time embedder.

    Raises:
        ValueError: there is not exactly one, or it is no plain linear layer.
    """
    found = {name: part for name, part in transformer.named_modules() if name.endswith(_LAYERS)}
    if len(found) != 1:
        raise ValueError(
            f"Expected one time embedder in {type(transformer).__name__}, whose first layer is called"
            f" {' or '.join(_LAYERS)}, got {', '.join(found) or 'none'}: its time cannot be held."
        )
    name, layer = next(iter(found.items()))
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"{name} of {type(transformer).__name__} is a {type(layer).__name__}, expected a Linear: fuse and unload its"
            " LoRA, and load weights that are not quantized."
        )
    return layer


def time_features(transformer: nn.Module, call: Callable[[], Any]) -> Tensor:
    """φ(t), (width,): what the time embedder is given in a call of the transformer, which ends there.

    Args:
        transformer: see `time_layer`.
        call: calls the transformer for one image at time t.

    Raises:
        ValueError: the call uses no time, or more than one.
    """
    seen: list[Tensor] = []

    def stop(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(given[0].detach())
        raise Stop

    handle = time_layer(transformer).register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            call()
    except Stop:
        pass
    finally:
        handle.remove()
    rows = seen[0] if seen else torch.empty(0, 0)
    if len(rows) != 1:
        raise ValueError(
            f"{type(transformer).__name__} embeds {len(rows)} times for one image, expected 1: its time cannot be held."
        )
    return rows[0]


@torch.no_grad()
def hold_time(transformer: nn.Module, features: Tensor) -> None:
    """Holds the time of a transformer, in place. Holding it again at the same time changes nothing.

    Its outputs differ from those at t* by rounding, of the bias in the data type of the layer: hold it in float32.

    Args:
        transformer: see `time_layer`.
        features: φ(t*), from `time_features`.

    Raises:
        ValueError: the layer has no bias, as in Flux.2.
    """
    layer = time_layer(transformer)
    if layer.bias is None:
        raise ValueError(
            f"The time embedder of {type(transformer).__name__} has no bias, so its time cannot be held in the weights:"
            " call it at the time t*."
        )
    # In float64, so that the sum adds no rounding of its own.
    layer.bias.add_((layer.weight.double() @ features.double()).to(layer.bias))
    layer.weight.zero_()
