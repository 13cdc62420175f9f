"""Where GRI attention can be put: networks, their self-attentions, and the size of the image in each of their calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import (
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor

from ..core.families import uncompiled
from .gri_processors import (
    GRIAttnProcessor,
    GRIFluxAttnProcessor,
    GRIJointAttnProcessor,
    GRIQwenAttnProcessor,
)


class Place(NamedTuple):
    """A kind of module that knows the size of the image, and whose attentions can be GRI attention.

    Attributes:
        processor: of GRI attention.
        replaces: the processors that it can replace.
        argument: the argument of the module's `forward` that is a dict of arguments for all its attentions.
        size: (module, arguments of a call by name) → rows and columns of the image in tokens. It raises a ValueError
            if the tokens are not those of one image.
    """

    processor: type
    replaces: tuple[type, ...]
    argument: str
    size: Callable[[Any, Mapping[str, Any]], tuple[int, int]]


# --- the size of the image ---


def _of_features(module: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    return given["hidden_states"].shape[2], given["hidden_states"].shape[3]


def _of_patches(module: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    height, width = given["hidden_states"].shape[-2:]
    return height // module.config.patch_size, width // module.config.patch_size


def _of_ids(module: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    ids: Tensor = given["img_ids"] if given["img_ids"].ndim == 2 else given["img_ids"][0]
    width = int((ids[:, 1] == ids[0, 1]).sum())
    height = len(ids) // width
    rows, columns = (torch.arange(size, device=ids.device) for size in (height, width))
    expected = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1).to(ids.dtype)
    # With a second image in the sequence, as in Flux Kontext, windows would mix both.
    if height * width != len(ids) or not torch.equal(ids - ids[0], torch.nn.functional.pad(expected, (1, 0))):
        raise ValueError(
            f"GRI attention in {type(module).__name__} expected img_ids that number the rows and columns of one image,"
            f" got {len(ids)} others. More than one image in a sequence (Flux Kontext) is not supported: call"
            " remove_gri_attention."
        )
    return height, width


def _of_shapes(module: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    shapes = [shape if isinstance(shape, list) else [shape] for shape in given["img_shapes"]]
    (frames, height, width), *others = shapes[0]
    if others or frames != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"GRI attention in {type(module).__name__} expected img_shapes with one image of (1, rows, columns), the same"
            f" for the whole batch, got {given['img_shapes']}. More than one image in a sequence (editing, layers) is not"
            " supported: call remove_gri_attention."
        )
    return height, width


_PLACES: dict[type, Place] = {
    Transformer2DModel: Place(
        GRIAttnProcessor,
        (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor),
        "cross_attention_kwargs",
        _of_features,
    ),
    SD3Transformer2DModel: Place(
        GRIJointAttnProcessor, (JointAttnProcessor2_0,), "joint_attention_kwargs", _of_patches
    ),
    FluxTransformer2DModel: Place(
        GRIFluxAttnProcessor, (FluxAttnProcessor,), "joint_attention_kwargs", _of_ids
    ),
    QwenImageTransformer2DModel: Place(
        GRIQwenAttnProcessor, (QwenDoubleStreamAttnProcessor2_0,), "attention_kwargs", _of_shapes
    ),
}


def place_of(module: Any) -> Place:
    """The record of a `Transformer2DModel` in a UNet, or of a whole transformer."""
    return next(place for kind, place in _PLACES.items() if isinstance(module, kind))


def replaced_in(network: Any) -> tuple[type, ...]:
    """The processors that GRI attention can replace in a network."""
    if isinstance(network, UNet2DConditionModel):
        return _PLACES[Transformer2DModel].replaces
    return place_of(network).replaces


# --- networks and their attentions ---

_NETWORKS = (
    UNet2DConditionModel,
    SD3Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)


def found_network(given: Any) -> Any:
    """A network that can have GRI attention, or that of a pipeline, without the wrapper of `torch.compile`; or None."""
    parts = (uncompiled(part) for part in _parts(given))
    return next((part for part in parts if isinstance(part, _NETWORKS)), None)


def network_of(given: Any) -> Any:
    """As `found_network`.

    Raises:
        ValueError: there is none.
    """
    network = found_network(given)
    if network is None:
        parts = [type(uncompiled(part)).__name__ for part in _parts(given)]
        *known, last = (kind.__name__ for kind in _NETWORKS)
        linear = any(name.startswith("Sana") for name in parts)
        why = " Its self-attention is linear in the number of tokens already." if linear else ""
        raise ValueError(
            f"GRI attention needs a {', '.join(known)} or {last}, or a pipeline that has one, got"
            f" {' with '.join(parts)}.{why}"
        )
    return network


def _parts(given: Any) -> list[Any]:
    parts = [given, *(getattr(given, name, None) for name in ("unet", "transformer"))]
    return [part for part in parts if part is not None]


def self_attentions(network: Any) -> list[str]:
    """Names of the attentions with queries of image tokens and keys of image tokens."""
    names = ("attn1",) if isinstance(network, UNet2DConditionModel) else ("attn", "attn2")
    return [
        name
        for name, module in network.named_modules()
        if name.rpartition(".")[2] in names and hasattr(module, "processor")
    ]


def chosen_attentions(network: Any, paths: Sequence[str] | None) -> list[str]:
    """The self-attentions at or under `paths`.

    With None, they are all of a transformer, or those of a UNet at the highest resolution that has attention.

    Raises:
        ValueError: a path has none, or there are none at all.
    """
    found = self_attentions(network)
    if paths is not None:
        return _under(network, found, paths)
    return _highest(network, found) if isinstance(network, UNet2DConditionModel) else found


def _highest(unet: UNet2DConditionModel, found: list[str]) -> list[str]:
    levels = {}
    for name in found:
        side, index, *_ = name.split(".")
        if side == "down_blocks":
            levels[name] = int(index)
        elif side == "up_blocks":
            levels[name] = len(unet.up_blocks) - 1 - int(index)
    if not levels:
        raise ValueError(
            f"This {type(unet).__name__} has no attn1 in its down and up blocks for GRI attention to replace."
        )
    return [name for name, level in levels.items() if level == min(levels.values())]


def _under(network: Any, found: list[str], paths: Sequence[str]) -> list[str]:
    if isinstance(paths, str) or not paths:
        raise ValueError(f"paths must be a sequence of one or more module names, got {paths!r}.")
    for path in paths:
        if not any(f"{name}.".startswith(f"{path}.") for name in found):
            raise ValueError(
                f"There is no self-attention at or under {path!r}. The {type(network).__name__} has:"
                f" {', '.join(found) or 'none'}."
            )
    return [name for name in found if any(f"{name}.".startswith(f"{path}.") for path in paths)]


def by_place(network: Any, names: list[str]) -> dict[str, list[str]]:
    """{name of the module that knows the size of the image: names of its attentions inside it}.

    The module is a `Transformer2DModel` of a UNet, or a transformer itself, with the name "".

    Raises:
        ValueError: an attention of a UNet is not in a `Transformer2DModel` on images.
    """
    if not isinstance(network, UNet2DConditionModel):
        return {"": names}
    groups: dict[str, list[str]] = {}
    for name in names:
        parent = name.rpartition(".transformer_blocks.")[0]
        module = network.get_submodule(parent)
        if not parent or not isinstance(module, Transformer2DModel) or not module.is_input_continuous:
            raise ValueError(
                f"{name} is not in a Transformer2DModel on images, so its tokens do not form a grid."
            )
        groups.setdefault(parent, []).append(name[len(parent) + 1 :])
    return groups
