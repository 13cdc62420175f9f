"""`apply_gri_attention` and `remove_gri_attention` for a whole UNet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from diffusers import Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from ..core.families import uncompiled
from .gri_attention import GRIAttnProcessor, GRIGrid

_REPLACEABLE = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor)
_UNDOES: dict[type, str] = {
    FusedAttnProcessor2_0: "unet.unfuse_qkv_projections",
    SlicedAttnProcessor: "pipe.disable_attention_slicing",
}


class _GridHook:
    """Passes the image size to the GRI processors of one `Transformer2DModel`.

    The size is passed as a keyword argument and not stored, so that gradient checkpointing, which repeats the
    inner calls later, uses the right size. Window and pool are passed too, because loading an IP-Adapter
    replaces the processors with new ones of the same class and default settings.

    Args:
        window: side of a window in tokens.
        pool: side of a pooled cell in tokens.
        originals: {name of an attention inside the transformer: its replaced processor}.
    """

    def __init__(self, window: int, pool: int, originals: dict[str, Any]) -> None:
        self.window, self.pool, self.originals = window, pool, originals
        self.handles: list[Any] = []

    def __call__(
        self, module: Transformer2DModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name in self.originals:
            found: Any = module.get_submodule(name).processor
            if not isinstance(found, GRIAttnProcessor):
                raise ValueError(
                    f"{name} had GRI attention, but now has a {type(found).__name__} (set for example by"
                    " enable_xformers..., enable_attention_slicing, disable_attention_slicing,"
                    " fuse_qkv_projections or set_attn_processor). Call remove_gri_attention, to which"
                    " apply_gri_attention can follow. For xFormers, use unet.set_attention_backend('xformers')."
                )
        hidden_states = args[0] if args else kwargs["hidden_states"]
        grid = GRIGrid(hidden_states.shape[2], hidden_states.shape[3], self.window, self.pool)
        # The sixth argument of Transformer2DModel.forward; UNet blocks pass it by name.
        given = args[5] if len(args) > 5 else kwargs.get("cross_attention_kwargs")
        own = {**(given or {}), "gri_grid": grid}
        if len(args) > 5:
            return (*args[:5], own, *args[6:]), kwargs
        return args, {**kwargs, "cross_attention_kwargs": own}


def _drop_grid(
    module: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Removes the grid for the other attentions, which would warn about an unknown argument."""
    if not isinstance(module.processor, GRIAttnProcessor):
        kwargs = {name: value for name, value in kwargs.items() if name != "gri_grid"}
    return args, kwargs


def apply_gri_attention(unet: Any, paths: Sequence[str] | None = None, window: int = 8, pool: int = 4) -> Any:
    """Replaces self-attention of a UNet with GRI attention, at any image size.

    An `ASDMUNet2DConditionModel` stores the change in its config. A stock UNet cannot, so saving loses it.
    GRI attention uses the backend of `unet.set_attention_backend`. It can be combined with LoRA and with an
    IP-Adapter, which changes the cross-attention, in either order. A deep copy of the UNet keeps it.

    Args:
        unet: a `UNet2DConditionModel`, or a pipeline that has one.
        paths: modules whose `attn1` are all replaced, such as "down_blocks.0" or a single
            "….transformer_blocks.0.attn1". None selects those at the highest resolution with attention, which
            need most of the compute.
        window: side of a window in tokens.
        pool: side of a pooled cell in tokens.

    Returns:
        The given `unet`.

    Raises:
        ValueError: the model is not supported or has GRI attention already, a path has no self-attention on
            images, an attention has a custom processor, or window or pool is invalid.
    """
    model = _unet_of(unet)
    GRIAttnProcessor(window, pool)
    if gri_attention_of(model) is not None:
        raise ValueError("GRI attention is on this UNet already: call remove_gri_attention(unet) first.")
    found = _self_attentions(model)
    chosen = _highest(model, found) if paths is None else _under(found, paths)
    for name in chosen:
        _check(name, model.get_submodule(name))
    for parent, names in _by_transformer(model, chosen).items():
        _install(model.get_submodule(parent), names, window, pool)
    _note_in_config(model)
    return unet


def remove_gri_attention(unet: Any) -> Any:
    """Removes GRI attention and restores the original processors. Does nothing if there is none.

    A processor that has replaced GRI attention since is kept.

    Returns:
        The given `unet`.

    Raises:
        ValueError: there is no `UNet2DConditionModel`, or the projections have been fused since.
    """
    hooks = [(module, hook) for _, module, hook in _hooks(_unet_of(unet))]
    attentions: list[tuple[Any, Any]] = [
        (module.get_submodule(name), original)
        for module, hook in hooks
        for name, original in hook.originals.items()
    ]
    # Unfusing later would restore GRI processors, but the hook that passes the image size would be gone.
    if any(isinstance(attn.processor, FusedAttnProcessor2_0) for attn, _ in attentions):
        raise ValueError("Call unet.unfuse_qkv_projections() first: it restores the GRI processors.")
    for attn, original in attentions:
        if isinstance(attn.processor, GRIAttnProcessor):
            attn.set_processor(original)
    for _, hook in hooks:
        for handle in hook.handles:
            handle.remove()
    _note_in_config(_unet_of(unet))
    return unet


def _note_in_config(unet: UNet2DConditionModel) -> None:
    """Updates the config of an `ASDMUNet2DConditionModel`, from which `from_pretrained` builds the UNet."""
    if "gri_attention" in unet.config:
        found = gri_attention_of(unet)
        noted = None if found is None else dict(zip(("paths", "window", "pool"), found))
        unet.register_to_config(gri_attention=noted)


def gri_attention_of(unet: Any) -> tuple[list[str], int, int] | None:
    """(paths, window, pool) of the GRI attention on a UNet or a pipeline, or None."""
    model = _found_unet(unet)
    found = [] if model is None else list(_hooks(model))
    if not found:
        return None
    paths = [f"{name}.{inner}" for name, _, hook in found for inner in hook.originals]
    return paths, found[0][2].window, found[0][2].pool


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError unless the pipeline's `unet` is a `UNet2DConditionModel`."""
    _unet_of(pipe)


def _found_unet(given: Any) -> UNet2DConditionModel | None:
    """A UNet, or that of a pipeline, without the wrapper of `torch.compile`."""
    for part in (given, getattr(given, "unet", None)):
        model = uncompiled(part)
        if isinstance(model, UNet2DConditionModel):
            return model
    return None


def _unet_of(given: Any) -> UNet2DConditionModel:
    unet = _found_unet(given)
    if unet is None:
        raise ValueError(
            "A-SDM and its GRI attention need a UNet2DConditionModel, or a pipeline whose .unet is one, got"
            f" {type(given).__name__}."
        )
    return unet


def _self_attentions(unet: UNet2DConditionModel) -> list[str]:
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and name.rpartition(".")[2] == "attn1"
    ]


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


def _under(found: list[str], paths: Sequence[str]) -> list[str]:
    if isinstance(paths, str) or not paths:
        raise ValueError(f"paths must be a sequence of one or more module names, got {paths!r}.")
    for path in paths:
        if not any(f"{name}.".startswith(f"{path}.") for name in found):
            raise ValueError(
                f"There is no attn1 at or under {path!r}. The UNet has: {', '.join(found) or 'none'}."
            )
    return [name for name in found if any(f"{name}.".startswith(f"{path}.") for path in paths)]


def _check(name: str, attn: Any) -> None:
    kind = type(attn.processor)
    if kind not in _REPLACEABLE:
        hint = f" Call {_UNDOES[kind]}() first." if kind in _UNDOES else ""
        raise ValueError(
            f"{name} has a {kind.__name__}, which GRI attention cannot replace: it replaces"
            f" {', '.join(k.__name__ for k in _REPLACEABLE)} only.{hint}"
        )
    if attn.is_cross_attention:
        raise ValueError(
            f"{name} is cross-attention (only_cross_attention): GRI attention needs self-attention."
        )


def _by_transformer(unet: UNet2DConditionModel, names: list[str]) -> dict[str, list[str]]:
    """{name of a `Transformer2DModel`: names of its attentions inside it}."""
    groups: dict[str, list[str]] = {}
    for name in names:
        parent = name.rpartition(".transformer_blocks.")[0]
        module = unet.get_submodule(parent)
        if not parent or not isinstance(module, Transformer2DModel) or not module.is_input_continuous:
            raise ValueError(
                f"{name} is not in a Transformer2DModel on images, so its tokens do not form a grid."
            )
        groups.setdefault(parent, []).append(name[len(parent) + 1 :])
    return groups


def _install(transformer: Any, names: list[str], window: int, pool: int) -> None:
    attentions: dict[str, Any] = {name: transformer.get_submodule(name) for name in names}
    hook = _GridHook(window, pool, {name: attn.processor for name, attn in attentions.items()})
    for attn in attentions.values():
        processor: Any = GRIAttnProcessor(window, pool)
        if isinstance(attn.processor, XFormersAttnProcessor):
            processor._attention_backend = AttentionBackendName.XFORMERS
        attn.set_processor(processor)
    hook.handles.append(transformer.register_forward_pre_hook(hook, with_kwargs=True))
    for module in transformer.modules():
        if isinstance(module, Attention):
            hook.handles.append(module.register_forward_pre_hook(_drop_grid, with_kwargs=True))


def _hooks(unet: UNet2DConditionModel) -> Iterator[tuple[str, Any, _GridHook]]:
    """(name, transformer, hook) for every transformer with GRI attention."""
    for name, module in unet.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _GridHook):
                yield name, module, hook


def describe(pipe: Any) -> str | None:
    """The line of `dx.summary` about GRI attention on `pipe`, or None if there is none."""
    found = gri_attention_of(pipe)
    if found is None:
        return None
    paths, window, pool = found
    return f"GRI attention in {len(paths)} layer(s), window {window}, pool {pool}"
