"""`apply_gri_attention` and `remove_gri_attention` for a whole UNet or transformer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import (
    Attention,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from .gri_places import by_place, chosen_attentions, found_network, network_of, place_of, replaced_in
from .gri_processors import GRIAttnProcessor, GRIGrid, JointProcessor

_FUSED = (FusedAttnProcessor2_0, FusedJointAttnProcessor2_0)
_UNDOES: dict[type, str] = {
    **dict.fromkeys(_FUSED, "unfuse_qkv_projections"),
    SlicedAttnProcessor: "pipe.disable_attention_slicing",
}
_PROCESSORS = (GRIAttnProcessor, JointProcessor)


class _GridHook:
    """Passes the image size to the GRI processors of one `Transformer2DModel` of a UNet, or of one whole transformer.

    The size is passed as a keyword argument and not stored, so that gradient checkpointing, which repeats the
    inner calls later, uses the right size. Window and pool are passed too, because loading an IP-Adapter
    replaces the processors with new ones of the same class and default settings.

    Args:
        module: what it will be a hook of.
        window: side of a window in tokens.
        pool: side of a pooled cell in tokens.
        originals: {name of an attention inside the module: its replaced processor}.
    """

    def __init__(self, module: Any, window: int, pool: int, originals: dict[str, Any]) -> None:
        self.place, self.window, self.pool, self.originals = place_of(module), window, pool, originals
        # The arguments in their order, without self. Of the class: hooks of diffusers replace the module's own.
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.handles: list[Any] = []

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for name in self.originals:
            found: Any = module.get_submodule(name).processor
            if not isinstance(found, self.place.processor):
                raise ValueError(
                    f"{name} had GRI attention, but now has a {type(found).__name__} (set for example by"
                    " enable_xformers..., enable_attention_slicing, disable_attention_slicing,"
                    " fuse_qkv_projections, load_ip_adapter or set_attn_processor). Call remove_gri_attention, to"
                    " which apply_gri_attention can follow. For xFormers, use set_attention_backend('xformers')."
                )
        given = {**dict(zip(self.names, args)), **kwargs}
        grid = GRIGrid(*self.place.size(module, given), self.window, self.pool)
        own = {**(given.get(self.place.argument) or {}), "gri_grid": grid}
        at = self.names.index(self.place.argument)
        if len(args) > at:
            return (*args[:at], own, *args[at + 1 :]), kwargs
        return args, {**kwargs, self.place.argument: own}


def _drop_grid(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Removes the grid for the other attentions, which would warn about an unknown argument."""
    if not isinstance(module.processor, _PROCESSORS):
        kwargs = {name: value for name, value in kwargs.items() if name != "gri_grid"}
    return args, kwargs


def apply_gri_attention(
    model: Any, paths: Sequence[str] | None = None, window: int = 8, pool: int = 4
) -> Any:
    """Replaces self-attention with GRI attention, at any image size.

    In UNets it replaces the self-attention on the image. In the transformers of Stable Diffusion 3, Flux.1 and
    Qwen-Image it replaces the joint attention of image and text: image tokens attend to their window, to the pooled rest
    of the image and to all text tokens, and text tokens to everything. A text mask of Qwen-Image is honored.

    An `ASDMUNet2DConditionModel` stores the change in its config. Stock networks cannot, so saving loses it.
    GRI attention uses the backend of `set_attention_backend`. It can be combined with LoRA, and in a UNet with an
    IP-Adapter, which changes the cross-attention, in either order. A deep copy of the network keeps it.

    Args:
        model: a `UNet2DConditionModel`, `SD3Transformer2DModel`, `FluxTransformer2DModel` or
            `QwenImageTransformer2DModel`, or a pipeline that has one.
        paths: modules whose self-attentions are all replaced, such as "down_blocks.0", "single_transformer_blocks" or a
            single "transformer_blocks.3.attn". None selects those of a UNet at the highest resolution with attention,
            which need most of the compute, and all of a transformer.
        window: side of a window in tokens.
        pool: side of a pooled cell in tokens.

    Returns:
        The given `model`.

    Raises:
        ValueError: the model is not supported or has GRI attention already, a path has no self-attention on
            images, an attention has a custom processor, or window or pool is invalid. In a call: there is more than one
            image in a sequence, an attention mask, or context parallelism.
    """
    network = network_of(model)
    GRIAttnProcessor(window, pool)
    if gri_attention_of(network) is not None:
        raise ValueError(
            f"GRI attention is on this {type(network).__name__} already: call remove_gri_attention first."
        )
    chosen = chosen_attentions(network, paths)
    for name in chosen:
        _check(network, name)
    for parent, names in by_place(network, chosen).items():
        _install(network.get_submodule(parent), names, window, pool)
    _note_in_config(network)
    return model


def remove_gri_attention(model: Any) -> Any:
    """Removes GRI attention and restores the original processors. Does nothing if there is none.

    A processor that has replaced GRI attention since is kept.

    Returns:
        The given `model`.

    Raises:
        ValueError: there is no network that can have GRI attention, or the projections have been fused since.
    """
    network = network_of(model)
    hooks = [(module, hook) for _, module, hook in _hooks(network)]
    attentions: list[tuple[Any, Any]] = [
        (module.get_submodule(name), original)
        for module, hook in hooks
        for name, original in hook.originals.items()
    ]
    # Unfusing later would restore GRI processors, but the hook that passes the image size would be gone.
    if any(isinstance(attn.processor, _FUSED) for attn, _ in attentions):
        raise ValueError("Call unfuse_qkv_projections() first: it restores the GRI processors.")
    for attn, original in attentions:
        if isinstance(attn.processor, _PROCESSORS):
            attn.set_processor(original)
    for _, hook in hooks:
        for handle in hook.handles:
            handle.remove()
    _note_in_config(network)
    return model


def _note_in_config(network: Any) -> None:
    """Updates the config of an `ASDMUNet2DConditionModel`, from which `from_pretrained` builds the UNet."""
    if "gri_attention" in network.config:
        found = gri_attention_of(network)
        noted = None if found is None else dict(zip(("paths", "window", "pool"), found))
        network.register_to_config(gri_attention=noted)


def gri_attention_of(model: Any) -> tuple[list[str], int, int] | None:
    """(paths, window, pool) of the GRI attention on a network or a pipeline, or None."""
    network = found_network(model)
    found = [] if network is None else list(_hooks(network))
    if not found:
        return None
    paths = [".".join(filter(None, (name, inner))) for name, _, hook in found for inner in hook.originals]
    return paths, found[0][2].window, found[0][2].pool


def check_gri_attention(pipe: Any) -> None:
    """Raises a ValueError unless the pipeline has a network that can have GRI attention."""
    network_of(pipe)


def _check(network: Any, name: str) -> None:
    attn, replaces = network.get_submodule(name), replaced_in(network)
    kind = type(attn.processor)
    if kind not in replaces:
        hint = f" Call {_UNDOES[kind]}() first." if kind in _UNDOES else ""
        raise ValueError(
            f"{name} has a {kind.__name__}, which GRI attention cannot replace: it replaces"
            f" {', '.join(k.__name__ for k in replaces)} only.{hint}"
        )
    if getattr(attn, "is_cross_attention", False):
        raise ValueError(
            f"{name} is cross-attention (only_cross_attention): GRI attention needs self-attention."
        )


def _install(module: Any, names: list[str], window: int, pool: int) -> None:
    attentions: dict[str, Any] = {name: module.get_submodule(name) for name in names}
    hook = _GridHook(module, window, pool, {name: attn.processor for name, attn in attentions.items()})
    for attn in attentions.values():
        # On its own, without a grid, the processor of a UNet uses its own settings; the others refuse.
        unet = hook.place.processor is GRIAttnProcessor
        processor: Any = GRIAttnProcessor(window, pool) if unet else hook.place.processor()
        if isinstance(attn.processor, XFormersAttnProcessor):
            processor._attention_backend = AttentionBackendName.XFORMERS
        attn.set_processor(processor)
    hook.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    part: Any
    for part in module.modules():
        if isinstance(part, Attention | AttentionModuleMixin):
            hook.handles.append(part.register_forward_pre_hook(_drop_grid, with_kwargs=True))


def _hooks(network: Any) -> Iterator[tuple[str, Any, _GridHook]]:
    """(name, module, hook) for every hook of GRI attention."""
    for name, module in network.named_modules():
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
