"""`apply_smooth_lora` and `remove_smooth_lora`: Smooth-LoRA weights of any layout in a pipeline.

diffusers 0.42 loads the released layout only if every key has the right prefix. Otherwise it loads nothing
and gives no error. Here, every key must match a layer.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.pipeline import InstanceMethod, denoiser_of

Weights = dict[str, Tensor]

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_SIDES = {"down": "lora_A", "up": "lora_B", "lora_A": "lora_A", "lora_B": "lora_B"}
# In this order: old attention processors, old attention layers, current layers, PEFT.
_LAYOUTS = (
    re.compile(r"(?P<layer>.+)\.processor\.(?P<to>to_(?:q|k|v|out))_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<to>to_(?:q|k|v|out))_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<side>lora_[AB])(?:\.[^.]+)?\.weight"),
)
_PREFIXES = ("base_model.model.", "unet.", "transformer.")
# Attribute of a denoiser with its `_Record`.
_ATTRIBUTE = "_smooth_lora"


@dataclass
class _Record:
    """What `apply_smooth_lora` has done to a denoiser.

    Attributes:
        adapters: names of the adapters that it has added.
        trainable: whether the parameters were trainable before. PEFT freezes the model when an adapter is
            added, and does not unfreeze it when the adapter is removed.
    """

    adapters: set[str] = field(default_factory=set)
    trainable: dict[str, bool] = field(default_factory=dict)


def apply_smooth_lora(
    pipe: Any,
    path_or_repo: str | os.PathLike[str],
    adapter_name: str = "smooth",
    *,
    weight_name: str | None = None,
    **hub_kwargs: Any,
) -> Any:
    """Adds a LoRA to the denoiser of a pipeline, as an adapter that can be combined with others.

    The adapter works with the methods of diffusers, such as `set_adapters` and `fuse_lora`.
    `pipe.save_pretrained` raises an error while an adapter is loaded, because diffusers would fill its layers
    with random weights on reload.

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
            layer, or shapes or ranks do not match. The message names the keys.
        OSError: the file or repository does not exist.
    """
    denoiser = _denoiser(pipe)
    taken = list(getattr(denoiser, "peft_config", {}))
    if adapter_name in taken:
        raise ValueError(
            f"An adapter called {adapter_name!r} is on this pipeline already: use another adapter_name or"
            f" call dx.remove_smooth_lora(pipe, {adapter_name!r}) first."
        )
    file = _resolve(path_or_repo, weight_name, hub_kwargs)
    try:
        given = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupted or not a safetensors file ({error}).") from error
    weights = convert_lora(given, denoiser, str(path_or_repo))
    if taken:
        record = getattr(denoiser, _ATTRIBUTE, _Record())
    else:
        record = _Record(trainable={name: p.requires_grad for name, p in denoiser.named_parameters()})
    denoiser.load_lora_adapter(weights, prefix=None, adapter_name=adapter_name)
    record.adapters.add(adapter_name)
    vars(denoiser)[_ATTRIBUTE] = record
    if not isinstance(pipe.save_pretrained, _GuardedSave):
        _GuardedSave(pipe, "save_pretrained")
    return pipe


def remove_smooth_lora(pipe: Any, adapter_name: str = "smooth") -> Any:
    """Removes the adapter and restores the pipeline; does nothing if it is not loaded. Returns `pipe`."""
    denoiser = _denoiser(pipe)
    names = list(getattr(denoiser, "peft_config", {}))
    if adapter_name in names:
        if len(names) == 1:
            denoiser.unload_lora()
            # diffusers sets this attribute to None instead of deleting it.
            vars(denoiser).pop("_hf_peft_config_loaded", None)
            for name, trainable in getattr(denoiser, _ATTRIBUTE, _Record()).trainable.items():
                denoiser.get_parameter(name).requires_grad_(trainable)
        else:
            denoiser.delete_adapters(adapter_name)
    if not getattr(denoiser, "peft_config", None):
        vars(denoiser).pop(_ATTRIBUTE, None)
        if isinstance(pipe.save_pretrained, _GuardedSave):
            pipe.save_pretrained.restore()
    return pipe


# The names that diffusers uses for LoRAs.
load_smooth_lora, unload_smooth_lora = apply_smooth_lora, remove_smooth_lora


def describe(pipe: Any) -> str | None:
    """The line of `dx.summary` about the Smooth-LoRAs of `pipe`, or None if there are none."""
    parts = [
        f"adapter {name!r} of rank {rank}{'' if active else ' (not active)'}"
        for name, (rank, active) in smooth_loras_of(pipe).items()
    ]
    return ", ".join(parts) or None


def smooth_loras_of(pipe: Any) -> dict[str, tuple[int, bool]]:
    """The adapters that `apply_smooth_lora` added to the denoiser: {name: (rank, whether it is active)}."""
    denoiser = denoiser_of(pipe)
    live = getattr(denoiser, "peft_config", None)
    if not live:
        return {}
    names = [name for name in sorted(getattr(denoiser, _ATTRIBUTE, _Record()).adapters) if name in live]
    return {name: (live[name].r, name in denoiser.active_adapters()) for name in names}


def convert_lora(given: Weights, denoiser: nn.Module, source: str = "the file") -> Weights:
    """Converts LoRA weights of any supported layout to PEFT's names and checks their shapes.

    Args:
        given: the weights by key, as loaded from a file.
        denoiser: the UNet or transformer that the LoRA is for.
        source: name of the file, for error messages.

    Raises:
        ValueError: see `apply_smooth_lora`.
    """
    layers = dict(denoiser.named_modules())
    found: Weights = {}
    alphas: dict[str, Tensor] = {}
    unknown = []
    for key, value in given.items():
        name = _without_prefix(key)
        if name.endswith(".alpha"):
            alphas[_layer_name(name.removesuffix(".alpha"))] = value
            continue
        match = next((m for m in (layout.fullmatch(name) for layout in _LAYOUTS) if m), None)
        layer = (
            ""
            if match is None
            else _layer_name(".".join(filter(None, (match["layer"], match.groupdict().get("to")))))
        )
        if match is None or layer not in layers:
            unknown.append(key)
            continue
        found[f"{layer}.{_SIDES[match['side']]}.weight"] = value
    if unknown or not found:
        raise ValueError(
            f"{source} does not fit {type(denoiser).__name__}: {len(unknown)} of its {len(given)} keys have"
            f" no layer there ({', '.join(sorted(unknown)[:3]) or 'it is empty'}). The file is for another model"
            " or is not a LoRA."
        )
    _check_shapes(found, layers, source)
    for layer, alpha in alphas.items():
        up = f"{layer}.lora_B.weight"
        if up in found:
            found[up] = found[up] * (alpha.to(found[up]) / found[up].shape[1])
    return found


def _without_prefix(key: str) -> str:
    for prefix in (*_PREFIXES, *_PREFIXES):  # twice, since a key can have two prefixes in any order
        key = key.removeprefix(prefix)
    return key


def _layer_name(name: str) -> str:
    return f"{name}.0" if name.endswith(".to_out") else name


def _check_shapes(found: Weights, layers: dict[str, nn.Module], source: str) -> None:
    faults = []
    for layer in sorted({key.rsplit(".lora_", 1)[0] for key in found}):
        down, up = (found.get(f"{layer}.lora_{side}.weight") for side in "AB")
        weight: Any = layers[layer].weight
        if down is None or up is None:
            faults.append(f"{layer} has only one of its two matrices")
        elif down.shape[0] != up.shape[1]:
            faults.append(f"{layer} has rank {down.shape[0]} down and {up.shape[1]} up")
        elif (up.shape[0], down.shape[1]) != tuple(weight.shape[:2]):
            faults.append(
                f"{layer} has shape {tuple(weight.shape[:2])}, the LoRA is for {(up.shape[0], down.shape[1])}"
            )
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{source} does not fit: {'; '.join(faults[:3])}{more}.")


def _denoiser(pipe: Any) -> Any:
    denoiser = denoiser_of(pipe)
    if denoiser is None:
        raise ValueError(f"{type(pipe).__name__} has neither a unet nor a transformer to add a LoRA to.")
    if not hasattr(denoiser, "load_lora_adapter"):
        raise ValueError(
            f"diffusers cannot load a LoRA into a {type(denoiser).__name__}, the denoiser of"
            f" {type(pipe).__name__}. Smooth-LoRA needs a text-to-image pipeline."
        )
    return denoiser


def _resolve(
    path_or_repo: str | os.PathLike[str], weight_name: str | None, hub_kwargs: dict[str, Any]
) -> Path:
    path = Path(path_or_repo)
    if path.is_dir():
        files = [path / weight_name] if weight_name else sorted(path.glob("*.safetensors"))
        if len(files) != 1 or not files[0].is_file():
            have = ", ".join(p.name for p in sorted(path.iterdir())) or "nothing"
            raise ValueError(
                f"{path} contains {have}: expected one safetensors file, or weight_name= to select it."
            )
        return files[0]
    if path.suffix == ".safetensors" or path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a safetensors file, and no other format is supported.")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist.")
        return path
    return Path(hf_hub_download(str(path_or_repo), weight_name or WEIGHT_NAME, **hub_kwargs))


class _GuardedSave(InstanceMethod):
    """The `save_pretrained` of a pipeline; raises a ValueError while an adapter is loaded."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names = list(getattr(_denoiser(self.owner), "peft_config", {}))
        if names:
            raise ValueError(
                f"The adapter(s) {', '.join(names)} are on this pipeline: their layers would be filled with"
                " random weights on reload. Remove them with dx.remove_smooth_lora, or merge them into the"
                " weights with pipe.fuse_lora() and pipe.unload_lora_weights()."
            )
        return super().__call__(*args, **kwargs)


def lora_state(denoiser: Any, adapter_name: str = "smooth") -> Weights:
    """The weights of an adapter (float32, on the CPU) under the names that diffusers loads.

    Every name starts with `unet.` or `transformer.`.
    """
    from peft.utils import get_peft_model_state_dict

    prefix = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
    state = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    return {
        f"{prefix}.{name}": value.detach().to("cpu", torch.float32).contiguous()
        for name, value in state.items()
    }
