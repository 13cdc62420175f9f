"""The blocks that a transformer keeps after a list of cuts, their new names, and the matching config.

As `shape`, for transformers: this works on configs only. A cut removes one block or an interval of them, and its
numbers are those of the *original* transformer:

    "block:LIST.I"    block I of a list of blocks, such as "block:transformer_blocks.7"
    "block:LIST.I-J"  the blocks I to J, both included, such as "block:single_transformer_blocks.3-6"

The result of every cut is a stock class with a stock config. One block stays in every list.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import diffusers
import torch
from torch import Tensor

Config = dict[str, Any]

# {class: {list of blocks, in the order in which they run: the entry of the config with their number}}. Only lists whose
# blocks can be dropped one by one are here: the two refiners of Z-Image and Lumina 2 share one entry.
_ONE = {"transformer_blocks": "num_layers"}
_TWO = {**_ONE, "single_transformer_blocks": "num_single_layers"}
LISTS: dict[str, dict[str, str]] = {
    "SD3Transformer2DModel": _ONE,
    "FluxTransformer2DModel": _TWO,
    "Flux2Transformer2DModel": _TWO,
    "QwenImageTransformer2DModel": _ONE,
    "ZImageTransformer2DModel": {"layers": "n_layers"},
    "SanaTransformer2DModel": _ONE,
    "PixArtTransformer2DModel": _ONE,
    "Lumina2Transformer2DModel": {"layers": "num_layers"},
    "AuraFlowTransformer2DModel": {
        "joint_transformer_blocks": "num_mmdit_layers",
        "single_transformer_blocks": "num_single_dit_layers",
    },
    "CogView4Transformer2DModel": _ONE,
    "DiTTransformer2DModel": _ONE,
    "Kandinsky5Transformer3DModel": {"visual_transformer_blocks": "num_visual_blocks"},
    "WanTransformer3DModel": {"blocks": "num_layers"},
    "LTXVideoTransformer3DModel": _ONE,
    "CogVideoXTransformer3DModel": _ONE,
}
REFUSED = {
    "ChromaTransformer2DModel": "it finds the modulation of a block by its number, so a removed block would give all"
    " later ones that of another block",
    "HunyuanDiT2DModel": "every block of its first half has a skip connection to one of the second half",
}
# Blocks that cannot be removed, with the reason.
_NEEDED = {
    (
        "DiTTransformer2DModel",
        "transformer_blocks.0",
    ): "its embedding of the time is also used after the blocks"
}
# Entries of a config with numbers of blocks, and their list.
_NUMBERS = {"dual_attention_layers": "transformer_blocks"}
_SD3 = "SD3Transformer2DModel"

_CUT = re.compile(r"block:(\w+)\.(\d+)(?:-(\d+))?")


def is_transformer(config: Mapping[str, Any]) -> bool:
    """Whether a config with its `_class_name` is that of a transformer of this module, supported or refused.

    Raises:
        ValueError: the config has a number of blocks, but not the name of a known class.
    """
    name = config.get("_class_name")
    if name in LISTS or name in REFUSED:
        return True
    if any(entry in config for entry in _ENTRIES):
        raise ValueError(
            f"This config has the _class_name {name!r} and is not that of a UNet: expected one of {', '.join(LISTS)}, as"
            " from diffusers_ext.asdm.networks.network_config(pipe.transformer)."
        )
    return False


_ENTRIES = {entry for lists in LISTS.values() for entry in lists.values()}


def check_class(name: str, owner: str | None = None) -> None:
    """Raises a ValueError unless a network of class `name` can be pruned; `owner` is its pipeline, for the message."""
    whose = f"The {name} of {owner}" if owner else f"A {name}"
    if name in REFUSED:
        raise ValueError(f"{whose} cannot be pruned: {REFUSED[name]}.")
    if name not in LISTS:
        raise ValueError(
            f"{whose} cannot be pruned, since its blocks are not known. Give the .unet or .transformer of a pipeline, before"
            f" torch.compile. Known are UNet2DConditionModel, {', '.join(LISTS)}."
        )


def transformer_architecture(config: Mapping[str, Any]) -> Config:
    """The entries of a transformer's config that determine its modules, and its `_class_name`.

    These are all arguments of its class except `sample_size`. Tuples are lists, missing keys have their defaults.

    Raises:
        ValueError: see `check_class`.
    """
    name = str(config.get("_class_name"))
    check_class(name)
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    known = {key: p.default for key, p in parameters.items() if key not in ("self", "sample_size")}
    found = {"_class_name": name} | {key: config.get(key, default) for key, default in known.items()}
    return json.loads(json.dumps(found))


class TransformerShape:
    """The blocks of a transformer after cuts. Its methods are those of `UNetShape`.

    Args:
        config: config of the original transformer, with its `_class_name`.

    Attributes:
        base: its `transformer_architecture`.

    Raises:
        ValueError: see `transformer_architecture`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.base = transformer_architecture(config)
        self._kept = {name: list(range(self.base[entry])) for name, entry in self._lists.items()}

    @property
    def _lists(self) -> dict[str, str]:
        return LISTS[self.base["_class_name"]]

    # --- modules ---

    def lists(self) -> dict[str, int]:
        """{list of blocks: their number in the original transformer}, without empty lists."""
        return {name: self.base[entry] for name, entry in self._lists.items() if self.base[entry]}

    def units(self) -> dict[str, str]:
        """{current path of a block: its path in the original transformer}, in the order in which they run."""
        return {
            f"{name}.{now}": f"{name}.{old}"
            for name, kept in self._kept.items()
            for now, old in enumerate(kept)
        }

    def intervals(self) -> dict[str, tuple[str, str]]:
        """{current path of a block: the first and the last original block that it stands for}.

        These are the block itself and the removed ones after it, and for the first one of a list also those before it.
        """
        found = {}
        for name, kept in self._kept.items():
            ends = [*(k - 1 for k in kept[1:]), self.base[self._lists[name]] - 1]
            for now, (old, end) in enumerate(zip(kept, ends)):
                found[f"{name}.{now}"] = f"{name}.{old if now else 0}", f"{name}.{end}"
        return found

    def blocks(self) -> dict[str, str]:
        """{current path of a block: the original block whose output it should have}: the last of its interval."""
        return {now: last for now, (_, last) in self.intervals().items()}

    def identity(self) -> str:
        """Equal for two shapes of one transformer only if they keep the same blocks, which the config does not tell."""
        return " ".join(self.units().values())

    def gri(self) -> list[str]:
        """Nothing: no cut of a transformer adds GRI attention."""
        return []

    def removed(self) -> dict[str, Fraction]:
        """{original path of a removed module: the share of its parameters and of its work that is removed}."""
        kept = set(self.units().values())
        found = {path: Fraction(1) for path in TransformerShape(self.base).units() if path not in kept}
        return found | self._lost_by_the_last()

    def _lost_by_the_last(self) -> dict[str, Fraction]:
        kept = self._kept.get("transformer_blocks", [])
        if self.base["_class_name"] != _SD3 or kept[-1] == self.base["num_layers"] - 1:
            return {}
        last = f"transformer_blocks.{kept[-1]}"
        whole = dict.fromkeys((f"{last}.ff_context", f"{last}.attn.to_add_out"), Fraction(1))
        return whole | {f"{last}.norm1_context": Fraction(2, 3)}

    # --- cutting ---

    def cut(self, *cuts: str) -> TransformerShape:
        """A copy with further cuts.

        Raises:
            ValueError: a cut is unknown or not possible.
        """
        found = copy.copy(self)
        found._kept = {name: list(kept) for name, kept in self._kept.items()}
        for name in cuts:
            for path in found._paths(name):
                found._remove(name, path)
        return found

    def _paths(self, name: str) -> Iterator[tuple[str, int]]:
        match = _CUT.fullmatch(name) if isinstance(name, str) else None
        if match is None or match[1] not in self.lists():
            raise ValueError(
                f"Unknown cut {name!r}: expected block:LIST.I or block:LIST.I-J, where LIST is"
                f" {' or '.join(self.lists())}, and I and J are numbers of blocks of the original network."
            )
        first, last = int(match[2]), int(match[3] or match[2])
        if not first <= last < self.lists()[match[1]]:
            raise ValueError(
                f"Cut {name!r}: {match[1]} of the original network has the blocks 0 to {self.lists()[match[1]] - 1}."
            )
        for number in range(first, last + 1):
            yield match[1], number

    def _remove(self, name: str, path: tuple[str, int]) -> None:
        kept, block = self._kept[path[0]], f"{path[0]}.{path[1]}"
        reason = _NEEDED.get((self.base["_class_name"], block))
        if reason is not None:
            raise ValueError(f"Cut {name!r}: {block} cannot be removed, since {reason}.")
        if path[1] not in kept:
            raise ValueError(f"Cut {name!r}: {block} is removed already: omit this cut.")
        if len(kept) == 1:
            raise ValueError(f"Cut {name!r}: {block} is the only block left in {path[0]}: keep one.")
        kept.remove(path[1])

    # --- the config and the weights ---

    def config(self) -> Config:
        """`transformer_architecture` of the transformer after the cuts."""
        found = copy.deepcopy(self.base)
        for name, entry in self._lists.items():
            found[entry] = len(self._kept[name])
        for entry, name in _NUMBERS.items():
            if found.get(entry):
                found[entry] = [now for now, old in enumerate(self._kept[name]) if old in self.base[entry]]
        return found

    def fit(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights for this shape, where a block has other modules in its new place.

        The last block of Stable Diffusion 3 does not compute new text states. Its text is normalized with a scale and
        a shift, in this order, where the other blocks have a shift, a scale and four more values.
        """
        if self.base["_class_name"] != _SD3:
            return weights
        last = f"transformer_blocks.{len(self._kept['transformer_blocks']) - 1}"
        gone = (f"{last}.ff_context.", f"{last}.attn.to_add_out.")
        found = {name: value for name, value in weights.items() if not name.startswith(gone)}
        if len(found) < len(weights):
            for name in (f"{last}.norm1_context.linear.weight", f"{last}.norm1_context.linear.bias"):
                shift, scale = found[name].chunk(6)[:2]
                found[name] = torch.cat([scale, shift])
        return found


def possible_block_cuts(config: Mapping[str, Any]) -> list[str]:
    """All cuts of a single block that a transformer allows."""
    shape = TransformerShape(config)
    names = [f"block:{path}" for path in shape.units()]
    return [name for name in names if _allowed(shape, name)]


def possible_interval_cuts(config: Mapping[str, Any]) -> list[str]:
    """All cuts of one block or of an interval of blocks that a transformer allows."""
    shape = TransformerShape(config)
    found = []
    for name, count in shape.lists().items():
        for first in range(count):
            for last in range(first, count):
                cut = block_cut(name, first, last)
                if _allowed(shape, cut):
                    found.append(cut)
    return found


def block_cut(name: str, first: int, last: int) -> str:
    """The cut of the blocks `first` to `last` of a list."""
    return f"block:{name}.{first}" if first == last else f"block:{name}.{first}-{last}"


def interval_of(cut: str) -> tuple[str, int, int]:
    """The list, the first and the last block of a cut of `block_cut`."""
    match = _CUT.fullmatch(cut)
    assert match is not None, cut
    return match[1], int(match[2]), int(match[3] or match[2])


def _allowed(shape: TransformerShape, cut: str) -> bool:
    try:
        shape.cut(cut)
    except ValueError:
        return False
    return True
