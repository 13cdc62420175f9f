"""The modules that a UNet keeps after a list of cuts, their new names, and the matching config.

This works on configs only, without tensors. A cut is a string. Paths in it are those of the *original* UNet:

    "layer.S"           one layer of the down block and one of the up block at resolution S (0 is the finest)
    "attention.down.S"  all attentions of the down block at resolution S; "attention.up.S" likewise
    "attention:PATH"    one attention, such as "attention:up_blocks.1.attentions.2"
    "mid.attention"     the attention of the mid block and its second layer, which diffusers ties to it
    "mid"               the mid block
    "stage.S"           the innermost resolution with its down, mid and up block
    "gri.S"             replaces self-attention with GRI attention at resolution S

"attention:PATH" and "gri.S" need an `ASDMUNet2DConditionModel`.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from diffusers import UNet2DConditionModel

from ..core.storage import digest

Config = dict[str, Any]

# Block types, each for a down and an up block.
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
MID_CROSS, MID_PLAIN = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"
_EXTRAS = ("removed_attentions", "gri_attention")
GRI_WINDOW, GRI_POOL = 8, 4

_CUT = re.compile(
    r"(layer|attention\.down|attention\.up|stage|gri)\.(\d+)|(mid\.attention|mid)|attention:(.+)"
)
# Keys with one value per resolution, from the finest, if they are lists.
_PER_STAGE = (
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
)
# The same, from the coarsest.
_REVERSED = ("up_block_types", "reverse_transformer_layers_per_block")


def architecture_config(config: Mapping[str, Any]) -> Config:
    """The config entries that determine a UNet's modules, in a normalized form.

    These are all arguments of `UNet2DConditionModel` except `sample_size`, and those of this package. The
    number of layers is a list, tuples are lists, and missing keys have their defaults. CLME-CondConv layers
    are omitted: they replace convolutions, and no cut depends on them.

    Raises:
        ValueError: the UNet has block types that are not supported.
    """
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    known = {name: p.default for name, p in parameters.items() if name not in ("self", "sample_size")}
    found = {name: config.get(name, default) for name, default in known.items()}
    found |= {name: config.get(name) or None for name in _EXTRAS}
    found = json.loads(json.dumps(found))
    if isinstance(found["layers_per_block"], int):
        found["layers_per_block"] = [found["layers_per_block"]] * len(found["block_out_channels"])
    unknown = {*found["down_block_types"], *found["up_block_types"]} - {*CROSS, *PLAIN}
    unknown |= {found["mid_block_type"]} - {MID_CROSS, MID_PLAIN, None}
    if unknown:
        raise ValueError(
            f"Pruning supports the blocks {', '.join((*CROSS, *PLAIN, MID_CROSS, MID_PLAIN))}; this UNet has"
            f" {', '.join(sorted(unknown))}."
        )
    return found


@dataclass
class _Stage:
    """One resolution: the original indices of its layers, and whether attentions follow them."""

    down: list[int]
    up: list[int]
    down_attention: bool
    up_attention: bool


class UNetShape:
    """The modules of a UNet after cuts.

    Args:
        config: config of the original UNet, a `UNet2DConditionModel` or an `ASDMUNet2DConditionModel`.

    Attributes:
        base: its `architecture_config`.

    Raises:
        ValueError: see `architecture_config`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.base = architecture_config(config)
        base = self.base
        count = len(base["block_out_channels"])
        self._count = count
        self._stages = [
            _Stage(
                list(range(layers)),
                list(range(layers + 1)),
                base["down_block_types"][s] == CROSS[0],
                base["up_block_types"][count - 1 - s] == CROSS[1],
            )
            for s, layers in enumerate(base["layers_per_block"])
        ]
        self._mid: str | None = base["mid_block_type"]
        self._removed: set[str] = set(base["removed_attentions"] or [])
        given = (base["gri_attention"] or {}).get("paths", [])
        self._gri = {a for a in self.attentions() if any(f"{a}.".startswith(f"{p}.") for p in given)}
        # Paths inside an attention are not extended to the whole attention.
        self._gri |= {p for p in given if any(p.startswith(f"{a}.") for a in self.attentions())}

    # --- modules ---

    @property
    def num_stages(self) -> int:
        """Number of resolutions."""
        return len(self._stages)

    @property
    def mid(self) -> str | None:
        """The type of the mid block, or None if there is none."""
        return self._mid

    def layers(self, stage: int) -> int:
        """Number of layers of the down block at a resolution; the up block has one more."""
        return len(self._stages[stage].down)

    def units(self) -> dict[str, str]:
        """{current path of a module: its path in the original UNet}, in the order in which they run.

        These are the modules that cuts can remove or renumber: resnets, attentions, down- and upsamplers. All
        other modules have the same path in both.
        """
        last, found = len(self._stages) - 1, {}
        for s, stage in enumerate(self._stages):
            now = old = f"down_blocks.{s}"
            found |= self._layers(now, old, stage.down, stage.down_attention)
            if s < last:
                found[f"{now}.downsamplers.0"] = f"{old}.downsamplers.0"
        if self._mid is not None:
            found |= self._layers("mid_block", "mid_block", [0], self._mid == MID_CROSS)
            if self._mid == MID_CROSS:
                found["mid_block.resnets.1"] = "mid_block.resnets.1"
        for s, stage in reversed(list(enumerate(self._stages))):
            now, old = f"up_blocks.{last - s}", f"up_blocks.{self._count - 1 - s}"
            found |= self._layers(now, old, stage.up, stage.up_attention)
            if s > 0:
                found[f"{now}.upsamplers.0"] = f"{old}.upsamplers.0"
        return found

    def _layers(self, now: str, old: str, kept: list[int], attention: bool) -> dict[str, str]:
        found = {}
        for index, original in enumerate(kept):
            found[f"{now}.resnets.{index}"] = f"{old}.resnets.{original}"
            path = f"{old}.attentions.{original}"
            if attention and path not in self._removed:
                found[f"{now}.attentions.{index}"] = path
        return found

    def blocks(self) -> dict[str, str]:
        """{current path of a block: its path in the original UNet}.

        Only blocks whose output has its original shape are included. After a "stage.S" cut, this excludes the
        innermost down block, which has lost its downsampler.
        """
        last = len(self._stages) - 1
        lost = len(self._stages) < self._count
        found = {f"down_blocks.{s}": f"down_blocks.{s}" for s in range(last + (not lost))}
        if self._mid is not None:
            found["mid_block"] = "mid_block"
        up = range(len(self._stages))
        return found | {f"up_blocks.{i}": f"up_blocks.{i + self._count - 1 - last}" for i in up}

    def attentions(self, stage: int | None = None) -> list[str]:
        """Original paths of the attentions left in the down and up blocks, of one resolution if given."""
        sides = ("down_blocks.", "up_blocks.")
        if stage is not None:
            sides = (f"down_blocks.{stage}.", f"up_blocks.{self._count - 1 - stage}.")
        return [old for old in self.units().values() if ".attentions." in old and old.startswith(sides)]

    def gri(self) -> list[str]:
        """Original paths under which self-attention is GRI attention, in the order in which they run."""
        kept = list(self.units().values())
        return [p for a in kept for p in sorted(self._gri) if f"{p}.".startswith(f"{a}.")]

    def identity(self) -> str:
        """Equal for two shapes only if they have the same modules."""
        return digest(self.config())

    def removed(self) -> dict[str, Fraction]:
        """{original path of a removed module: the share of its parameters and of its work that is removed}, all of it."""
        kept = set(self.units().values())
        return {path: Fraction(1) for path in UNetShape(self.base).units().values() if path not in kept}

    def fit(self, weights: dict[str, Any]) -> dict[str, Any]:
        """The weights for this shape, which are those of the modules that are left."""
        return weights

    def current(self, path: str) -> str | None:
        """The current path of an original module or of anything inside one, or None if it was removed."""
        for now, old in self.units().items():
            if f"{path}.".startswith(f"{old}."):
                return now + path[len(old) :]
        return None

    # --- cutting ---

    def cut(self, *cuts: str) -> UNetShape:
        """A copy with further cuts.

        Raises:
            ValueError: a cut is unknown or not possible.
        """
        found = copy.copy(self)
        found._stages = copy.deepcopy(self._stages)
        found._removed, found._gri = set(self._removed), set(self._gri)
        for name in cuts:
            found._apply(name)
        return found

    def _apply(self, name: str) -> None:
        match = _CUT.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            raise ValueError(
                f"Unknown cut {name!r}: expected layer.S, attention.down.S, attention.up.S, attention:PATH,"
                " mid.attention, mid, stage.S or gri.S, where S is a resolution (0 is the finest)."
            )
        kind, number, mid, path = match.groups()
        if path is not None:
            if path not in self.units().values() or ".attentions." not in path:
                raise ValueError(
                    f"Cut {name!r}: there is no such attention in what is left of the UNet, only:"
                    f" {', '.join(self._all_attentions()) or 'none'}."
                )
            self._removed.add(path)
        elif mid is not None:
            self._cut_mid(name)
        else:
            stage = int(number)
            if stage >= len(self._stages):
                raise ValueError(
                    f"Cut {name!r}: the UNet has the resolutions 0 to {len(self._stages) - 1} at this point."
                )
            {"layer": self._cut_layer, "stage": self._cut_stage, "gri": self._put_gri}.get(
                kind, self._cut_attentions
            )(name, stage)

    def _all_attentions(self) -> list[str]:
        return [old for old in self.units().values() if ".attentions." in old]

    def _cut_layer(self, name: str, stage: int) -> None:
        layers, channels = self._stages[stage], self.base["block_out_channels"]
        if not layers.down:
            raise ValueError(f"Cut {name!r}: resolution {stage} has no layers left in its down block.")
        if len(layers.down) == 1 and stage > 0 and channels[stage - 1] != channels[stage]:
            raise ValueError(
                f"Cut {name!r}: the last layer of down_blocks.{stage} maps {channels[stage - 1]} channels to"
                f" {channels[stage]} and cannot be removed. Remove other layers, or attentions."
            )
        # Three layers have input channels that fit nowhere else: the first layer of the down block, which
        # changes the number of channels, and the first and the last layer of the up block, which take the
        # output of the lower resolution and the skip connection from above. So the last layer of the down
        # block is removed, and with it the second layer of the up block. BK-SDM does the same (layer 2 of the
        # up block becomes layer 1 of the student). If the down block has no layers left, the first layer of
        # the up block takes the skip connection from above, which has the same width.
        layers.down.pop()
        layers.up.pop(1)

    def _cut_attentions(self, name: str, stage: int) -> None:
        down = name.startswith("attention.down")
        block = f"down_blocks.{stage}." if down else f"up_blocks.{self._count - 1 - stage}."
        if not any(path.startswith(block) for path in self.attentions(stage)):
            raise ValueError(f"Cut {name!r}: {block[:-1]} of the original UNet has no attention left.")
        setattr(self._stages[stage], "down_attention" if down else "up_attention", False)

    def _cut_mid(self, name: str) -> None:
        if self._mid is None:
            raise ValueError(f"Cut {name!r}: the UNet has no mid block left: omit this cut.")
        if name == "mid":
            self._mid = None
        elif self._mid == MID_PLAIN or "mid_block.attentions.0" in self._removed:
            raise ValueError(f"Cut {name!r}: the mid block has no attention left: omit this cut.")
        else:
            self._mid = MID_PLAIN

    def _cut_stage(self, name: str, stage: int) -> None:
        channels, last = self.base["block_out_channels"], len(self._stages) - 1
        if stage != last or last == 0:
            raise ValueError(
                f"Cut {name!r}: only the innermost of two or more resolutions can be removed, here"
                f" {f'stage.{last}' if last else 'none'}."
            )
        if channels[stage] != channels[stage - 1]:
            raise ValueError(
                f"Cut {name!r}: resolution {stage} has {channels[stage]} channels and the one above"
                f" {channels[stage - 1]}, so the up block above would not fit. Remove layers or attentions."
            )
        self._stages.pop()
        self._mid = None

    def _put_gri(self, name: str, stage: int) -> None:
        found = set(self.attentions(stage))
        if not found:
            raise ValueError(f"Cut {name!r}: resolution {stage} has no attention left.")
        if found <= self._gri:
            raise ValueError(f"Cut {name!r}: resolution {stage} has GRI attention already.")
        self._gri |= found

    # --- the config ---

    def config(self) -> Config:
        """`architecture_config` of the UNet after the cuts."""
        found, gone = copy.deepcopy(self.base), self._count - len(self._stages)
        for name in _PER_STAGE:
            if isinstance(found[name], list):
                found[name] = found[name][: len(self._stages)]
        for name in _REVERSED:
            if isinstance(found[name], list):
                found[name] = found[name][gone:]
        last = len(self._stages) - 1
        for s, stage in enumerate(self._stages):
            for key, index, attention, kept in (
                ("down_block_types", s, stage.down_attention, stage.down),
                ("up_block_types", last - s, stage.up_attention, stage.up),
            ):
                if not attention:
                    found[key][index] = PLAIN[key == "up_block_types"]
                _keep_depths(found, key, index, kept)
            found["layers_per_block"][s] = len(stage.down)
        found["mid_block_type"] = self._mid
        found["removed_attentions"] = self._removed_now() or None
        paths = [str(self.current(path)) for path in self.gri()]
        own = {"window": GRI_WINDOW, "pool": GRI_POOL} | (found["gri_attention"] or {})
        found["gri_attention"] = {**own, "paths": paths} if paths else None
        return found

    def _removed_now(self) -> list[str]:
        """Current paths of single removed attentions whose layer and block still exist."""
        whole = self.cut()
        whole._removed = set()
        return sorted(now for path in self._removed if (now := whole.current(path)) is not None)


def _keep_depths(config: Config, key: str, index: int, kept: Iterable[int]) -> None:
    """If transformers have one depth per layer, removes the depths of removed layers."""
    depths = "transformer_layers_per_block"
    depths = depths if key == "down_block_types" else f"reverse_{depths}"
    if isinstance(config[depths], list) and isinstance(config[depths][index], list):
        config[depths][index] = [config[depths][index][layer] for layer in kept]


def possible_cuts(config: Mapping[str, Any], stock_only: bool = False) -> list[str]:
    """All single cuts that a UNet allows; with `stock_only`, those whose result is a stock UNet."""
    shape = UNetShape(config)
    stages = range(shape.num_stages)
    tried = [f"layer.{s}" for s in stages]
    tried += [f"attention.{side}.{s}" for s in stages for side in ("down", "up")]
    tried += ["mid.attention", "mid", f"stage.{shape.num_stages - 1}"]
    if not stock_only:
        tried += [f"attention:{path}" for path in shape._all_attentions()]
        tried += [f"gri.{s}" for s in stages]
    return [name for name in tried if _allowed(shape, name)]


def _allowed(shape: UNetShape, *cuts: str) -> bool:
    try:
        shape.cut(*cuts)
    except ValueError:
        return False
    return True
