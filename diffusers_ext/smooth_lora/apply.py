"""`apply_smooth_lora` and `remove_smooth_lora`: Smooth-LoRA weights of any layout in a pipeline."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any, NamedTuple

from torch import nn

from ..core.families import denoiser_of, uncompiled
from ..core.hooks import InstanceMethod
from .weights import WEIGHT_NAME, Config, Weights, convert_lora, from_kohya, read_lora

__all__ = ["WEIGHT_NAME", "apply_smooth_lora", "remove_smooth_lora"]


class _State(NamedTuple):
    """What `apply_smooth_lora` notes on a denoiser, where deep copies take it along.

    PEFT freezes the model when an adapter is added, and does not unfreeze it when the adapter is removed.

    Attributes:
        names: the adapters, each with the file, folder or repository that it came from.
        trainable: which parameters were trainable before the first one.
    """

    names: dict[str, str | None]
    trainable: dict[str, bool]


_STATE = "_smooth_lora"


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError if `apply_smooth_lora` does not work on the pipeline."""
    lora_denoiser(pipe)
    _check_only_denoiser(pipe)


def apply_smooth_lora(
    pipe: Any,
    path_or_repo: str | os.PathLike[str],
    adapter_name: str = "smooth",
    *,
    weight_name: str | None = None,
    **hub_kwargs: Any,
) -> Any:
    """Adds a LoRA to the denoiser of a pipeline, as an adapter that can be combined with others.

    The adapter works with the methods of diffusers, such as `set_adapters` and `fuse_lora`, and is added to a
    denoiser before or after `torch.compile`. The scale of the file is applied, wherever it stands: in `.alpha`
    keys, in the header that diffusers writes, or in PEFT's `adapter_config.json` beside the file. Files of
    kohya's layout are converted by diffusers.

    `save_pretrained` raises an error while an adapter is loaded, because diffusers would fill its layers with
    random weights on reload. So does `fuse_qkv_projections`, because the adapter would lose its effect.
    `set_attn_processor` with a fused processor is not noticed.

    Args:
        pipe: a pipeline with a `unet` or `transformer`.
        path_or_repo: a safetensors file, a folder or a Hub repository.
        adapter_name: a name that is not in use yet.
        weight_name: the file in the folder or repository. The default in a folder is its only safetensors
            file, in a repository `pytorch_lora_weights.safetensors`.
        hub_kwargs: arguments of the download, such as `revision` and `token`.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: the name is in use, the file is corrupted or not a safetensors file, a key has no matching
            layer, shapes, ranks or the configuration do not match, the attention projections are fused, or the
            pipeline has two denoisers. The message names the keys.
        OSError: the file or repository does not exist.
    """
    source = str(path_or_repo)
    check_pipeline(pipe)
    _check_free(pipe, adapter_name)
    given, config = read_lora(path_or_repo, weight_name, hub_kwargs)
    return add_weights(pipe, given, adapter_name, source, config)


def _check_free(pipe: Any, adapter_name: str) -> None:
    if adapter_name in adapters_of(pipe):
        raise ValueError(
            f"An adapter called {adapter_name!r} is on this pipeline already: use another adapter_name or"
            f" call dx.remove_smooth_lora(pipe, {adapter_name!r}) first."
        )


def add_weights(
    pipe: Any, given: Weights, adapter_name: str, source: str | None, config: Config | None = None
) -> Any:
    """`apply_smooth_lora` of weights in memory, `source` of which is noted.

    Raises:
        ValueError: see `apply_smooth_lora`.
    """
    check_pipeline(pipe)
    _check_free(pipe, adapter_name)
    denoiser = lora_denoiser(pipe)
    taken = list(getattr(denoiser, "peft_config", {}))
    name = source or "the weights"
    weights = convert_lora(from_kohya(given, pipe, name), denoiser, name, config)
    if not taken or _STATE not in vars(denoiser):
        trainable = {name: p.requires_grad for name, p in denoiser.named_parameters()} if not taken else {}
        vars(denoiser)[_STATE] = _State({}, trainable)
    denoiser.load_lora_adapter(
        weights, prefix=None, adapter_name=adapter_name, metadata=_peft_config(weights), _pipeline=pipe
    )
    _undo_casting(denoiser, adapter_name, weights)
    vars(denoiser)[_STATE].names[adapter_name] = source
    for owner, method in _guarded(pipe):
        if not isinstance(vars(owner).get(method), _Guard):
            _Guard(owner, method)
    return pipe


def remove_smooth_lora(pipe: Any, adapter_name: str = "smooth") -> Any:
    """Removes the adapter and restores the pipeline; does nothing if it is not loaded.

    The weights are those from before, bit for bit, unless `fuse_lora` and `unfuse_lora` were called in between,
    which round.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: the adapter is fused into the weights.
    """
    denoiser = lora_denoiser(pipe)
    names = list(getattr(denoiser, "peft_config", {}))
    if adapter_name in names:
        if any(adapter_name in getattr(part, "merged_adapters", ()) for part in denoiser.modules()):
            raise ValueError(
                f"The adapter {adapter_name!r} is fused into the weights, and would stay there. Call"
                " pipe.unfuse_lora() first, which restores the weights up to rounding, or load the pipeline again."
                " To keep it in the weights, call pipe.unload_lora_weights() instead."
            )
        if len(names) == 1:
            denoiser.unload_lora()
            # diffusers sets this attribute to None instead of deleting it.
            vars(denoiser).pop("_hf_peft_config_loaded", None)
            state = vars(denoiser).get(_STATE)
            for name, trainable in state.trainable.items() if state else ():
                denoiser.get_parameter(name).requires_grad_(trainable)
        else:
            denoiser.delete_adapters(adapter_name)
    if not getattr(denoiser, "peft_config", None):
        vars(denoiser).pop(_STATE, None)
        for owner, method in _guarded(pipe):
            guard = vars(owner).get(method)
            if isinstance(guard, _Guard):
                guard.restore()
    return pipe


def _undo_casting(denoiser: Any, adapter_name: str, weights: Weights) -> None:
    """Gives the adapter of a denoiser with layerwise casting the dtype that the denoiser computes in.

    PEFT gives a new adapter the dtype of the layer's weights, which is the storage dtype here. The casting hooks
    do not know the adapter, so it would compute in that dtype, and float8 has no multiplication.
    """
    for name, layer in denoiser.named_modules():
        if adapter_name in getattr(layer, "lora_A", {}):
            hooks = getattr(layer.get_base_layer(), "_diffusers_hook", None)
            casting: Any = hooks and hooks.get_hook("layerwise_casting")
            for part in ("lora_A", "lora_B") if casting else ():
                matrix = getattr(layer, part)[adapter_name].to(casting.compute_dtype)
                matrix.weight.data.copy_(weights[f"{name}.{part}.weight"])


# The names that diffusers uses for LoRAs.
load_smooth_lora, unload_smooth_lora = apply_smooth_lora, remove_smooth_lora


def describe(pipe: Any) -> str | None:
    """The line of `dx.summary` about the Smooth-LoRAs of `pipe`, or None if there are none."""
    parts = [
        f"adapter {name!r} of rank {rank}{'' if active else ' (not active)'}"
        for name, (rank, active) in smooth_loras_of(pipe).items()
    ]
    return ", ".join(parts) or None


def adapters_of(pipe: Any) -> list[str]:
    """The names of all adapters on the denoiser, whoever has added them."""
    return list(getattr(lora_denoiser(pipe), "peft_config", {}))


def smooth_loras_of(pipe: Any) -> dict[str, tuple[int, bool]]:
    """The adapters that `apply_smooth_lora` added to the denoiser: {name: (rank, whether it is active)}."""
    denoiser = uncompiled(denoiser_of(pipe))
    live, state = getattr(denoiser, "peft_config", None), getattr(denoiser, _STATE, None)
    if not live or state is None:
        return {}
    names = [name for name in sorted(state.names) if name in live]
    return {name: (live[name].r, name in denoiser.active_adapters()) for name in names}


def _peft_config(weights: Weights) -> dict[str, Any]:
    """The arguments of `LoraConfig` with scale 1 in every layer."""
    ranks = {
        key.removesuffix(".lora_A.weight"): len(value)
        for key, value in weights.items()
        if key.endswith(".lora_A.weight")
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(layer)}": r for layer, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "target_modules": list(ranks),
    }


# --- the denoiser ---


def sources_of(pipe: Any) -> dict[str, str | None]:
    """Where the adapters that `apply_smooth_lora` added came from, by their names."""
    return dict(vars(lora_denoiser(pipe))[_STATE].names)


def lora_denoiser(pipe: Any) -> Any:
    denoiser = uncompiled(denoiser_of(pipe))
    if denoiser is None:
        raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer to add a LoRA to.")
    if not hasattr(denoiser, "load_lora_adapter"):
        raise ValueError(
            f"diffusers cannot load a LoRA into a {type(denoiser).__name__}, the denoiser of"
            f" {type(pipe).__name__}. Use a pipeline whose denoiser has load_lora_adapter, such as those of Stable"
            " Diffusion, SD3, Flux, Qwen-Image, Z-Image and Sana."
        )
    return denoiser


def _check_only_denoiser(pipe: Any) -> None:
    more = [
        name
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and re.fullmatch(r"(?:unet|transformer)_\d+", name)
    ]
    if more:
        raise ValueError(
            f"{type(pipe).__name__} has further denoisers ({', '.join(more)}), and a Smooth-LoRA file is for one:"
            " load one file into each with pipe.load_lora_weights, which has an argument that selects it, such as"
            " load_into_transformer_2."
        )


# --- methods that would lose the adapter ---

_WHY = {
    "save_pretrained": "their layers would be filled with random weights on reload",
    "fuse_qkv_projections": "the fused projections would be made without them",
}


def _guarded(pipe: Any) -> list[tuple[Any, str]]:
    denoiser = lora_denoiser(pipe)
    methods = [(pipe, "save_pretrained"), (denoiser, "save_pretrained"), (denoiser, "fuse_qkv_projections")]
    return [(owner, method) for owner, method in methods if hasattr(owner, method)]


class _Guard(InstanceMethod):
    """Refuses a method while the denoiser of its owner has adapters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        denoiser = self.owner if isinstance(self.owner, nn.Module) else lora_denoiser(self.owner)
        names = list(getattr(denoiser, "peft_config", {}))
        if names:
            raise ValueError(
                f"The adapter(s) {', '.join(names)} are on this pipeline: {_WHY[self.name]}. Remove"
                " them with dx.remove_smooth_lora, or merge them into the weights with pipe.fuse_lora() and"
                " pipe.unload_lora_weights()."
            )
        return super().__call__(*args, **kwargs)
