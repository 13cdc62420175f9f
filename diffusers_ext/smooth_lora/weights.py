"""LoRA files of every layout, as weights under PEFT's names that have scale 1.

diffusers 0.42 loads the released layout only if every key has the right prefix. Otherwise it loads nothing and
gives no error. Here, every key must match a layer, and a scale that stands outside the tensors is applied.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..training.lora import WEIGHT_NAME

Weights = dict[str, Tensor]
Config = dict[str, Any]

_CONFIG_NAME = "adapter_config.json"  # PEFT's, beside the weights
_METADATA_KEY = "lora_adapter_metadata"  # diffusers', in the header of the safetensors file
_PEFT_PREFIX = "base_model.model."
_PREFIXES = (_PEFT_PREFIX, "unet.", "transformer.")

_SIDES = {"down": "lora_A", "up": "lora_B", "lora_A": "lora_A", "lora_B": "lora_B"}
_ATTENTION = r"(?:\.processor)?\.(?P<to>to_(?:q|k|v|out))_lora"
# In this order: old attention processors and layers, current layers, PEFT.
_LAYOUTS = (
    re.compile(rf"(?P<layer>.+?){_ATTENTION}\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<side>lora_[AB])(?:\.[^.]+)?\.weight"),
)
_ALPHA = re.compile(rf"(?P<layer>.+?)(?:{_ATTENTION}(?:\.down\.weight)?)?\.alpha")
_KOHYA = re.compile(r"lora_(?:unet|te\d?|transformer|prior)_|.+\.lora_(?:down|up)\.")
_OTHER_ADAPTERS = {"magnitude_vector": "DoRA", "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}
# With these initializations, PEFT changes the weights of the model itself when it adds the adapter.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FUSED_LAYERS = {"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"}


def read_lora(
    path_or_repo: str | os.PathLike[str], weight_name: str | None, hub_kwargs: dict[str, Any]
) -> tuple[Weights, Config | None]:
    """The tensors of a LoRA file, and PEFT's configuration from its header or from the file beside it.

    Raises:
        ValueError: the file is not a safetensors file, a folder has not exactly one, or the configuration cannot
            be read.
        OSError: no such file or repository.
    """
    file = _resolve(path_or_repo, weight_name, hub_kwargs)
    try:
        weights = load_file(file)
        with safe_open(file, "pt") as opened:
            header = (opened.metadata() or {}).get(_METADATA_KEY)
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupted or not a safetensors file ({error}).") from error
    if header is not None:
        return weights, _parsed(header, f"The header of {file}")
    wraps = any(key.startswith(_PEFT_PREFIX) for key in weights)
    beside = _config_file(path_or_repo, file, hub_kwargs, needed=wraps)
    return weights, beside and _parsed(beside.read_text(encoding="utf-8"), str(beside))


def convert_lora(
    given: Weights, denoiser: nn.Module, source: str = "the file", config: Config | None = None
) -> Weights:
    """Converts LoRA weights of any supported layout to PEFT's names, with the scale in the second matrix.

    Args:
        given: the weights by key, as loaded from a file.
        denoiser: the UNet or transformer that the LoRA is for.
        source: name of the file, for error messages.
        config: PEFT's configuration, whose `lora_alpha`, `alpha_pattern` and `use_rslora` give the scale.
            Without it, `.alpha` keys give the scale, and a layer without one has scale 1.

    Raises:
        ValueError: see `apply_smooth_lora`.
    """
    layers = dict(denoiser.named_modules())
    found: Weights = {}
    alphas: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    unknown = []
    for key, value in given.items():
        name = _without_prefix(key)
        matches = (layout.fullmatch(name) for layout in (_ALPHA, *_LAYOUTS))
        match = next((m for m in matches if m), None)
        parts = match.groupdict() if match else {}
        layer = _layer_name(".".join(filter(None, (parts.get("layer"), parts.get("to")))), layers)
        if match is None or layer not in layers:
            unknown.append(key)
        elif match.re is _ALPHA:
            alphas[layer] = value
        else:
            found[f"{layer}.{_SIDES[parts['side']]}.weight"] = value
            origins[layer] = key.removeprefix(_PEFT_PREFIX).rpartition(".lora_")[0]
    unknown += [f"{layer}.alpha" for layer in alphas if layer not in origins]
    if unknown or not found:
        raise ValueError(
            f"{source} does not fit {type(denoiser).__name__}: {len(unknown)} of its {len(given)} keys have"
            f" no layer there ({', '.join(sorted(unknown)[:3]) or 'it is empty'}). {_what_it_is(unknown)}"
        )
    _check_shapes(found, layers, source)
    _check_not_fused(origins, layers)
    if alphas and config:
        raise ValueError(
            f"{source} has both .alpha keys and a configuration of PEFT, so its scale is not known: remove one."
        )
    for layer, origin in origins.items():
        up = f"{layer}.lora_B.weight"
        rank = found[up].shape[1]
        if config:
            scale = _scale(config, (layer, origin), rank, source)
        else:
            scale = float(alphas[layer]) / rank if layer in alphas else 1.0
        if scale != 1:
            found[up] = (found[up].float() * scale).to(found[up].dtype)
    return found


def from_kohya(given: Weights, pipe: Any, source: str) -> Weights:
    """Weights of kohya's layout with diffusers' names, converted by diffusers; others are returned as they are.

    Raises:
        ValueError: the pipeline has no converter, or the converter does not know all keys.
    """
    kohya = [key for key in given if _KOHYA.match(key)]
    if not kohya:
        return given
    advice = (
        "Convert the file with the scripts of kohya-ss/sd-scripts, or load it with pipe.load_lora_weights,"
        " which may skip keys."
    )
    if any(key.endswith("dora_scale") for key in given) or not hasattr(pipe, "lora_state_dict"):
        raise ValueError(
            f"{source} has keys of kohya's layout ({kohya[0]}), and diffusers has no complete converter for"
            f" {type(pipe).__name__} and this kind of adapter. {advice}"
        )
    options = {"unet_config": pipe.unet.config} if getattr(pipe, "unet", None) is not None else {}
    try:
        converted = pipe.lora_state_dict(dict(given), **options)
    except (ValueError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"{source} has keys of kohya's layout ({kohya[0]}), which diffusers' converter for"
            f" {type(pipe).__name__} does not understand: {str(error)[:200]} {advice}"
        ) from error
    weights, alphas = converted if isinstance(converted, tuple) else (converted, None)
    layers = [sum(side in key for key in given) for side in ("lora_down", "lora_A")]
    if sum(".down." in key or "lora_A" in key for key in weights) < sum(layers):
        raise ValueError(
            f"{source} has keys of kohya's layout ({kohya[0]}), of which diffusers' converter drops some. {advice}"
        )
    return {**weights, **{name: torch.tensor(float(alpha)) for name, alpha in (alphas or {}).items()}}


def fused_projections(layers: dict[str, nn.Module]) -> list[str]:
    """Names of the projections that `fuse_qkv_projections` has replaced, so that a LoRA has no effect there."""
    return [
        f"{name}.{child}"
        for name, module in layers.items()
        if _is_fused(module)
        for child in sorted(_FUSED_LAYERS & module._modules.keys())
    ]


def _is_fused(module: nn.Module) -> bool:
    # The older class never resets its flag: its processor tells.
    if isinstance(module, Attention):
        return "Fused" in type(module.processor).__name__
    return bool(getattr(module, "fused_projections", False))


def _check_not_fused(targets: dict[str, str], layers: dict[str, nn.Module]) -> None:
    fused = sorted(targets.keys() & set(fused_projections(layers)))
    if fused:
        raise ValueError(
            f"The projections of this model are fused, so that a LoRA on {fused[0]} and {len(fused) - 1} more"
            " layers would have no effect: call pipe.unfuse_qkv_projections() first."
        )


# --- names ---


def _without_prefix(key: str) -> str:
    for prefix in (*_PREFIXES, *_PREFIXES):  # twice, since a key can have two prefixes in any order
        key = key.removeprefix(prefix)
    return key


def _layer_name(name: str, layers: dict[str, nn.Module]) -> str:
    # Old files name the list of which the first is the layer. In the single blocks of Flux.2, it is the layer itself.
    first = f"{name}.0"
    return first if name.endswith(".to_out") and first in layers else name


def _what_it_is(unknown: list[str]) -> str:
    other = next((kind for key in unknown for part, kind in _OTHER_ADAPTERS.items() if part in key), None)
    if other:
        return f"It is a {other} adapter, which is not supported: load it with pipe.load_lora_weights."
    if any("text_encoder" in key for key in unknown):
        return "A Smooth-LoRA is for the denoiser only: load a LoRA for text encoders with pipe.load_lora_weights."
    return "The file is for another model or is not a LoRA."


# --- shapes ---


def _check_shapes(found: Weights, layers: dict[str, nn.Module], source: str) -> None:
    faults = []
    for layer in sorted({key.rsplit(".lora_", 1)[0] for key in found}):
        down, up = (found.get(f"{layer}.lora_{side}.weight") for side in "AB")
        # Not the shape of the weight, which is packed in a quantized layer.
        shape = _shape(layers[layer])
        if shape is None:
            kind = type(layers[layer]).__name__
            faults.append(f"{layer} is a {kind}, and PEFT adds LoRAs to linear layers and convolutions only")
        elif down is None or up is None:
            faults.append(f"{layer} has only one of its two matrices")
        elif down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
            ranks = down.shape[0], up.shape[1] if up.ndim > 1 else "none"
            faults.append(f"{layer} has rank {ranks[0]} down and {ranks[1]} up")
        elif (up.shape[0], *down.shape[1:]) != shape or tuple(up.shape[2:]) != (1,) * (len(shape) - 2):
            faults.append(f"{layer} has shape {shape}, the LoRA is for {(up.shape[0], *down.shape[1:])}")
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{source} does not fit: {'; '.join(faults[:3])}{more}.")


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    """(out, in) of a linear layer, (out, in, *kernel) of a convolution, below other adapters; None otherwise."""
    while hasattr(module, "base_layer"):
        module = module.base_layer  # type: ignore[assignment]
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1:
        return module.out_channels, module.in_channels, *module.kernel_size
    return None


# --- the scale ---


def _scale(config: Config, names: tuple[str, ...], rank: int, source: str) -> float:
    """PEFT's scale of a layer, alpha / rank, or alpha / √rank with `use_rslora`."""
    expected = _of_layer(config, "rank_pattern", names, config.get("r", rank))
    if expected != rank:
        raise ValueError(
            f"{source} has a LoRA of rank {rank} for {names[0]}, but its configuration says {expected}: they do"
            " not belong together."
        )
    alpha = float(_of_layer(config, "alpha_pattern", names, config.get("lora_alpha", rank)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(config: Config, pattern: str, names: tuple[str, ...], default: float) -> float:
    # The rule of PEFT: the first pattern that matches the end of the name.
    patterns: dict[str, float] = config.get(pattern) or {}
    return next(
        (value for key, value in patterns.items() for name in names if re.match(rf"(.*\.)?({key})$", name)),
        default,
    )


def _parsed(text: str, where: str) -> Config:
    """The part of a configuration that is about the denoiser; diffusers writes the component before each name."""
    try:
        whole = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} has no readable configuration of PEFT ({error}).") from error
    config = {key: value for key, value in whole.items() if "." not in key}
    for prefix in ("unet.", "transformer."):
        config |= {key.removeprefix(prefix): v for key, v in whole.items() if key.startswith(prefix)}
    kind, start = str(config.get("peft_type") or "LORA"), str(config.get("init_lora_weights") or "").lower()
    if kind.rpartition(".")[2] != "LORA" or config.get("use_dora"):
        raise ValueError(
            f"{where} is about a {'DoRA' if config.get('use_dora') else kind} adapter, which is not supported:"
            " load it with pipe.load_lora_weights."
        )
    if start.startswith(_CHANGES_THE_BASE):
        raise ValueError(
            f"{where} has init_lora_weights={start!r}, which changes the weights of the model too. Save the"
            " adapter with path_initial_model_for_weight_conversion of PEFT, which makes a plain LoRA of it."
        )
    return config


# --- files ---


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
    # A repository on the Hub is "name" or "owner/name".
    if path.suffix == ".safetensors" or path.is_file() or path.is_absolute() or len(path.parts) > 2:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist.")
        if path.suffix != ".safetensors":
            raise ValueError(f"{path} is not a safetensors file, and no other format is supported.")
        return path
    return Path(hf_hub_download(str(path_or_repo), weight_name or WEIGHT_NAME, **hub_kwargs))


def _config_file(
    path_or_repo: str | os.PathLike[str], file: Path, hub_kwargs: dict[str, Any], needed: bool
) -> Path | None:
    """PEFT's `adapter_config.json` beside the weights; None if there is none."""
    if Path(path_or_repo).exists():
        beside = file.with_name(_CONFIG_NAME)
        return beside if beside.is_file() else None
    try:
        return Path(hf_hub_download(str(path_or_repo), _CONFIG_NAME, **hub_kwargs))
    except LocalEntryNotFoundError:
        # Offline, and never looked for. Only PEFT writes the file, and only PEFT prefixes keys in this way.
        if needed:
            raise
        return None
    except EntryNotFoundError:
        return None
