"""`ASDMUNet2DConditionModel`: what a pruned UNet needs that diffusers' own config cannot say."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn


class SkippedAttention(nn.Module):
    """Stands where an attention was removed: returns its input as a `Transformer2DModel` returns its output."""

    def forward(
        self, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """(b, channels, height, width) as given."""
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)


class ASDMUNet2DConditionModel(UNet2DConditionModel):
    """A `UNet2DConditionModel` with single attentions removed, GRI attention or CLME-CondConv layers.

    A-SDM (arXiv:2312.15516) as rebuilt here. The three live in the config, so that `save_pretrained` and
    `from_pretrained` keep them, in a pipeline too, where `diffusers_ext` is imported. Stock checkpoints load as well.

    Args:
        removed_attentions: paths of attentions that are not there, as "down_blocks.0.attentions.1".
        gri_attention: {"paths": modules whose self-attention is GRI attention, "window": 8, "pool": 4};
            `apply_gri_attention` and `remove_gri_attention` change it.
        cond_convs: {path of a convolution: number of experts}; `add_cond_convs` and `fold_cond_convs` change it.
        config: every argument of `UNet2DConditionModel`, by name.

    Raises:
        ValueError: a path that is not there or of the wrong kind, and what the layers themselves refuse.
    """

    def __init__(
        self,
        *,
        removed_attentions: list[str] | None = None,
        gri_attention: dict[str, Any] | None = None,
        cond_convs: dict[str, int] | None = None,
        **config: Any,
    ) -> None:
        # Lazily, so that each half of the method imports without the other.
        from .apply import apply_gri_attention
        from .condconv import CLMECondConv2d

        super().__init__(**config)
        for path in removed_attentions or []:
            parent = path.rpartition(".")[0]
            if not parent.endswith(".attentions"):
                raise ValueError(
                    f"removed_attentions: {path!r} is no attention's path, as 'down_blocks.0.attentions.1' is."
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
            what = "nothing is" if found is None else f"a {type(found).__name__} is"
            raise ValueError(f"{argument}: {what} at {path!r} of this UNet, expected a {kind.__name__}.")
        parent, _, name = path.rpartition(".")
        setattr(self.get_submodule(parent), name, make(found))

    @staticmethod
    def _get_init_keys(input_class: Any) -> set[str]:
        # from_config drops every key that is not in the signature, and **config stands for the parent's.
        keys = UNet2DConditionModel._get_init_keys(input_class)
        if "config" in keys:
            keys = (keys - {"config"}) | UNet2DConditionModel._get_init_keys(UNet2DConditionModel)
        return keys


def build_unet(config: dict[str, Any], weights: dict[str, Tensor]) -> UNet2DConditionModel:
    """A UNet that holds the given tensors themselves, not copies: stock where its config can say it.

    Args:
        config: arguments of `ASDMUNet2DConditionModel`.
        weights: its state dict.

    Raises:
        ValueError: the weights are not exactly those that the config asks for.
    """
    with torch.device("meta"):
        unet = empty_unet(config)
    found = unet.state_dict()
    wrong = sorted({*found} ^ {*weights}) or [n for n in found if found[n].shape != weights[n].shape]
    if wrong:
        raise ValueError(
            f"These weights don't fit the UNet's config: {', '.join(wrong[:4])} and {len(wrong)} in all. A UNet with a"
            " LoRA on it or with fused projections cannot be pruned: fuse or unload the LoRA first."
        )
    unet.load_state_dict(weights, strict=True, assign=True)
    return unet


def empty_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """An untrained UNet of that config, on the default device: stock where its config can say it."""
    own = ("removed_attentions", "gri_attention", "cond_convs")
    stock = {name: value for name, value in config.items() if name not in own}
    if any(config.get(name) for name in own):
        return ASDMUNet2DConditionModel(**stock, **{name: config.get(name) or None for name in own})
    return UNet2DConditionModel(**stock)


def unet_config(unet: Any) -> dict[str, Any]:
    """The arguments that built a UNet: its config without diffusers' private notes.

    Raises:
        ValueError: no `UNet2DConditionModel`, or GRI attention that was put on but is not in the config.
    """
    from .apply import gri_attention_of

    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"Pruning needs a UNet2DConditionModel, got {type(unet).__name__}: of a pipeline, give its .unet."
        )
    config: dict[str, Any] = dict(unet.config)
    if gri_attention_of(unet) is not None and not config.get("gri_attention"):
        raise ValueError(
            "apply_gri_attention was called on this UNet, which its config does not say: call remove_gri_attention"
            " first, and put it in the plan with a gri.S cut."
        )
    names = ASDMUNet2DConditionModel._get_init_keys(ASDMUNet2DConditionModel) - {"self"}
    return {name: value for name, value in config.items() if name in names}
