"""`ASDMUNet2DConditionModel`: pruned UNets that the config of diffusers cannot describe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import peft, unet_loader_utils
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn


class SkippedAttention(nn.Module):
    """Replaces a removed attention: returns its input in the format of a `Transformer2DModel`."""

    def forward(
        self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Returns (b, channels, height, width) unchanged."""
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


def _with_parameters_of_the_parent(init: Callable[..., None]) -> Callable[..., None]:
    """Shows the parameters behind *args and **config, by which diffusers filters and documents configs."""
    parent = inspect.signature(UNet2DConditionModel.__init__)
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
    shown = parent.replace(parameters=[*parent.parameters.values(), *own])
    init.__signature__ = shown  # type: ignore[attr-defined]
    return init


class ASDMUNet2DConditionModel(UNet2DConditionModel):
    """A `UNet2DConditionModel` with removed attentions, GRI attention or CLME-CondConv layers.

    A-SDM (arXiv:2312.15516) as rebuilt here. The changes are part of the config, so `save_pretrained` and
    `from_pretrained` keep them. A pipeline can load the class once `diffusers_ext` is imported. Stock
    checkpoints can be loaded too. `from_pipe` of the pipelines of this package takes such a UNet over; a stock
    pipeline class compares exact classes and needs it by name: `from_pipe(pipe, unet=pipe.unet)`.

    Args:
        removed_attentions: paths of removed attentions, such as "down_blocks.0.attentions.1".
        gri_attention: {"paths": modules whose self-attention is GRI attention, "window": 8, "pool": 4};
            `apply_gri_attention` and `remove_gri_attention` update it.
        cond_convs: {path of a convolution: number of experts}; `add_cond_convs` and `fold_cond_convs` update
            it.
        args, config: the arguments of `UNet2DConditionModel`.

    Raises:
        ValueError: a path does not exist or has a module of the wrong kind, or the settings of a layer are
            invalid.
    """

    # The kernels of all experts are used together, outside of any submodule.
    _no_split_modules = [*UNet2DConditionModel._no_split_modules, "CLMECondConv2d"]  # noqa: RUF012

    @_with_parameters_of_the_parent
    def __init__(
        self,
        *args: Any,
        removed_attentions: list[str] | None = None,
        gri_attention: dict[str, Any] | None = None,
        cond_convs: dict[str, int] | None = None,
        **config: Any,
    ) -> None:
        # Imported here, so that GRI attention and pruning can be imported separately.
        from .apply import apply_gri_attention
        from .condconv import CLMECondConv2d

        super().__init__(*args, **config)
        for path in removed_attentions or []:
            parent = path.rpartition(".")[0]
            if not parent.endswith(".attentions"):
                raise ValueError(
                    f"removed_attentions: expected paths like 'down_blocks.0.attentions.1', got {path!r}."
                )
            self._replace(path, "removed_attentions", nn.Module, lambda _: SkippedAttention())
        for path, experts in (cond_convs or {}).items():
            self._replace(path, "cond_convs", nn.Conv2d, lambda conv, n=experts: CLMECondConv2d.like(conv, n))
        if gri_attention is not None:
            apply_gri_attention(self, **gri_attention)
        # The parent registers its own arguments only.
        self.register_to_config(
            removed_attentions=removed_attentions, gri_attention=gri_attention, cond_convs=cond_convs
        )

    def _replace(self, path: str, argument: str, kind: type, make: Any) -> None:
        found = dict(self.named_modules()).get(path)
        if not isinstance(found, kind):
            what = "nothing" if found is None else f"a {type(found).__name__}"
            raise ValueError(f"{argument}: expected a {kind.__name__} at {path!r}, found {what}.")
        parent, _, name = path.rpartition(".")
        setattr(self.get_submodule(parent), name, make(found))


def _expanded_scales(unet: ASDMUNet2DConditionModel, weight_scales: list[Any]) -> list[Any]:
    """Scales of a LoRA by block, as diffusers expands them for a UNet, of which it looks up the class by name."""
    # A removed attention has no weights, which diffusers takes for a layer that does not exist.
    names = dict.fromkeys(name for name, _ in unet.named_modules())
    seen: Any = SimpleNamespace(
        down_blocks=unet.down_blocks, up_blocks=unet.up_blocks, config=unet.config, state_dict=lambda: names
    )
    return unet_loader_utils._maybe_expand_lora_scales(seen, weight_scales)


peft._SET_ADAPTER_SCALE_FN_MAPPING[ASDMUNet2DConditionModel.__name__] = _expanded_scales  # type: ignore[assignment]


def build_unet(config: dict[str, Any], weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """A UNet that uses the given tensors without copying them; a stock UNet if its config allows it.

    Args:
        config: arguments of `ASDMUNet2DConditionModel`.
        weights: the state dict.

    Raises:
        ValueError: the names or shapes of the weights do not match the config.
    """
    with torch.device("meta"):
        unet = empty_unet(config)
    check_fits(weights, unet.state_dict(), "UNet")
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet


def check_fits(weights: dict[str, Tensor], wanted: dict[str, Tensor], kind: str) -> None:
    """Raises a ValueError unless the weights have the names and shapes of the `wanted` ones of a UNet or transformer."""
    wrong = sorted({*wanted} ^ {*weights}) or [n for n in wanted if wanted[n].shape != weights[n].shape]
    if wrong:
        raise ValueError(
            f"These weights do not fit the config of the {kind}: {', '.join(wrong[:4])} ({len(wrong)} in all)."
            f" A {kind} with a LoRA or with fused projections cannot be pruned: fuse or unload the LoRA first."
        )


def check_not_cast(network: nn.Module) -> None:
    """Raises a ValueError if weights are stored in eight bits and cast in every layer."""
    kind = "UNet" if isinstance(network, UNet2DConditionModel) else "transformer"
    stored = {
        value.dtype
        for value in network.parameters()
        if value.is_floating_point() and value.dtype.itemsize < 2
    }
    if stored:
        raise ValueError(
            f"The weights of the {kind} are stored as {', '.join(map(str, sorted(stored, key=str)))} and cast in every"
            f" layer (enable_layerwise_casting), and the pruned {kind} would not cast them: prune before casting."
        )


def empty_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """An untrained UNet on the default device; a stock UNet if its config allows it."""
    own = ("removed_attentions", "gri_attention", "cond_convs")
    stock = {name: value for name, value in config.items() if name not in own}
    if any(config.get(name) for name in own):
        return ASDMUNet2DConditionModel(**stock, **{name: config.get(name) or None for name in own})
    return UNet2DConditionModel(**stock)


def unet_config(unet: Any) -> dict[str, Any]:
    """The arguments that a UNet was built with: its config without the private entries of diffusers.

    Raises:
        ValueError: it is not a `UNet2DConditionModel`, or has GRI attention that is not in its config.
    """
    from .apply import gri_attention_of

    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"Pruning needs a UNet2DConditionModel or a transformer, got {type(unet).__name__}: give the .unet or"
            " .transformer of a pipeline, before torch.compile."
        )
    check_not_cast(unet)
    config: dict[str, Any] = dict(unet.config)
    if gri_attention_of(unet) is not None and not config.get("gri_attention"):
        raise ValueError(
            "This UNet has GRI attention that is not in its config: call remove_gri_attention first, and"
            " add it to the plan with a gri.S cut."
        )
    names = ASDMUNet2DConditionModel._get_init_keys(ASDMUNet2DConditionModel) - {"self"}
    return {name: value for name, value in config.items() if name in names}
