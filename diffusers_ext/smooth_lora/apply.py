"""Smooth-LoRA on a whole pipeline: `apply_smooth_lora` and `remove_smooth_lora`, in any layout of the weights.

diffusers 0.42 loads the released layout only with the right prefix on every key: without one it loads nothing and
says nothing. Here every key must find its layer.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.pipeline import denoiser_of

Weights = dict[str, Tensor]

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
_SIDES = {"down": "lora_A", "up": "lora_B", "lora_A": "lora_A", "lora_B": "lora_B"}
# Attention processors of old, today's layers, and what peft writes.
_LAYOUTS = (
    re.compile(r"(?P<layer>.+)\.processor\.(?P<to>to_(?:q|k|v|out))_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<to>to_(?:q|k|v|out))_lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<side>lora_[AB])(?:\.[^.]+)?\.weight"),
)
_LOADED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()
# peft freezes what it is put on, and leaves it frozen when it is taken off.
_WAS_TRAINABLE: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
_PREFIXES = ("base_model.model.", "unet.", "transformer.")


def apply_smooth_lora(
    pipe: Any,
    path_or_repo: str | os.PathLike[str],
    adapter_name: str = "smooth",
    *,
    weight_name: str | None = None,
    **hub_kwargs: Any,
) -> Any:
    """Puts a LoRA on the pipeline's denoiser, as one adapter beside others.

    Afterwards diffusers' own `set_adapters`, `fuse_lora` and the like apply. `pipe.save_pretrained` is refused while an
    adapter is on, because its layers would be saved under names that a reload fills with random weights.

    Args:
        pipe: a pipeline with a `unet` or `transformer`.
        path_or_repo: a safetensors file, a folder or a Hub repository.
        adapter_name: a new name.
        weight_name: the file in the folder or repository; by default the only safetensors file there.
        hub_kwargs: for the download, such as `revision` and `token`.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: the name is taken, the file is none or another kind, a key has no layer, or shapes or ranks don't
            fit; keys are named.
        OSError: nothing there.
    """
    denoiser = _denoiser(pipe)
    taken = list(getattr(denoiser, "peft_config", {}))
    if adapter_name in taken:
        raise ValueError(
            f"An adapter called {adapter_name!r} is on this pipeline already: give another adapter_name, or"
            f" dx.remove_smooth_lora(pipe, {adapter_name!r}) first."
        )
    file = _resolve(path_or_repo, weight_name, hub_kwargs)
    try:
        given = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}).") from error
    weights = convert_lora(given, denoiser, str(path_or_repo))
    if not taken:
        _WAS_TRAINABLE[denoiser] = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    denoiser.load_lora_adapter(weights, prefix=None, adapter_name=adapter_name)
    _LOADED.setdefault(denoiser, set()).add(adapter_name)
    _guard_saving(pipe)
    return pipe


def remove_smooth_lora(pipe: Any, adapter_name: str = "smooth") -> Any:
    """Takes the adapter off again; the pipeline is then as before. No-op where it is not on. Returns `pipe`."""
    denoiser = _denoiser(pipe)
    names = list(getattr(denoiser, "peft_config", {}))
    if adapter_name in names:
        if len(names) == 1:
            denoiser.unload_lora()
            # diffusers leaves it behind, as None.
            vars(denoiser).pop("_hf_peft_config_loaded", None)
            for name, trainable in _WAS_TRAINABLE.pop(denoiser, {}).items():
                denoiser.get_parameter(name).requires_grad_(trainable)
        else:
            denoiser.delete_adapters(adapter_name)
    if not getattr(denoiser, "peft_config", None) and hasattr(pipe.save_pretrained, "guards_adapters"):
        del pipe.save_pretrained
    return pipe


# diffusers' own verbs for LoRAs.
load_smooth_lora, unload_smooth_lora = apply_smooth_lora, remove_smooth_lora


def describe(pipe: Any) -> str | None:
    """The line of `dx.summary` about Smooth-LoRAs on `pipe`; None where there is none."""
    parts = [
        f"adapter {name!r} of rank {rank}{'' if active else ' (not active)'}"
        for name, (rank, active) in smooth_loras_of(pipe).items()
    ]
    return ", ".join(parts) or None


def smooth_loras_of(pipe: Any) -> dict[str, tuple[int, bool]]:
    """Rank, and whether it is active, of each adapter that `apply_smooth_lora` has put on the pipeline's denoiser."""
    denoiser = denoiser_of(pipe)
    live = getattr(denoiser, "peft_config", None)
    if not live:
        return {}
    names = [name for name in sorted(_LOADED.get(denoiser, ())) if name in live]
    return {name: (live[name].r, name in denoiser.active_adapters()) for name in names}


def convert_lora(given: Weights, denoiser: nn.Module, source: str = "the file") -> Weights:
    """LoRA weights of any layout under peft's names, each checked against the denoiser's layer.

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
            f"{source} does not fit {type(denoiser).__name__}: {len(unknown)} of its {len(given)} keys have no layer"
            f" there ({', '.join(sorted(unknown)[:3]) or 'it is empty'}). It belongs to another model, or is no LoRA."
        )
    _check_shapes(found, layers, source)
    for layer, alpha in alphas.items():
        up = f"{layer}.lora_B.weight"
        if up in found:
            found[up] = found[up] * (alpha.to(found[up]) / found[up].shape[1])
    return found


def _without_prefix(key: str) -> str:
    for prefix in (*_PREFIXES, *_PREFIXES):  # one may hide another
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
                f"{layer} is {tuple(weight.shape[:2])}, the LoRA is for {(up.shape[0], down.shape[1])}"
            )
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{source} does not fit: {'; '.join(faults[:3])}{more}.")


def _denoiser(pipe: Any) -> Any:
    denoiser = denoiser_of(pipe)
    if denoiser is None:
        raise ValueError(f"{type(pipe).__name__} has no unet and no transformer to put a LoRA on.")
    if not hasattr(denoiser, "load_lora_adapter"):
        raise ValueError(
            f"diffusers loads no LoRA on a {type(denoiser).__name__}, the denoiser of {type(pipe).__name__}. Smooth-LoRA"
            " is for text-to-image pipelines."
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
                f"{path} holds {have}: expected one safetensors file, or weight_name= to name it."
            )
        return files[0]
    if path.suffix == ".safetensors" or path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a safetensors file, and no other kind is loaded here.")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist.")
        return path
    return Path(hf_hub_download(str(path_or_repo), weight_name or WEIGHT_NAME, **hub_kwargs))


def _guard_saving(pipe: Any) -> None:
    if hasattr(pipe.save_pretrained, "guards_adapters"):
        return
    original = pipe.save_pretrained

    @functools.wraps(original)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        names = list(getattr(_denoiser(pipe), "peft_config", {}))
        if names:
            raise ValueError(
                f"The adapter(s) {', '.join(names)} are on this pipeline: saved like this, their layers would be filled"
                " with random weights when it is loaded. Take them off (dx.remove_smooth_lora), or make them part of"
                " the weights: pipe.fuse_lora(), then pipe.unload_lora_weights()."
            )
        return original(*args, **kwargs)

    save_pretrained.__dict__["guards_adapters"] = True
    pipe.save_pretrained = save_pretrained


def lora_state(denoiser: Any, adapter_name: str = "smooth") -> Weights:
    """The adapter's weights under the names that diffusers loads without help: `unet.` or `transformer.` before them."""
    from peft.utils import get_peft_model_state_dict

    prefix = "unet" if "UNet" in type(denoiser).__name__ else "transformer"
    state = get_peft_model_state_dict(denoiser, adapter_name=adapter_name)
    return {
        f"{prefix}.{name}": value.detach().to("cpu", torch.float32).contiguous()
        for name, value in state.items()
    }
