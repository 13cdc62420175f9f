"""A projector whose network is a LoRA on the teacher: the LoRA alone is trained and saved.

The folder has the LoRA as `pipe.load_lora_weights` loads it, `projector.json` with what else makes a projector of the
teacher's pipeline, and its source.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffusers.training_utils import cast_training_params
from huggingface_hub import snapshot_download
from torch import nn

from ..core.families import denoiser_of
from ..core.storage import write_json
from ..training.lora import TARGETS, WEIGHT_NAME, add_lora, lora_state, save_lora, shared_copy
from ..training.transformers import flow_of_class
from .source import MixtureSource, PromptSource
from .teacher import untrained_projector

ADAPTER = "sign"
_CONFIG = "projector.json"
# Entries of the config of a `SIGNPipeline` that its network does not tell.
_SETTINGS = ("guidance", "sample_size", "max_sequence_length")


def lora_copy(network: Any, stock: Any, rank: int) -> nn.Module:
    """A copy of a frozen network that shares its weights, with LoRA layers to be trained, in float32.

    Args:
        network: the denoiser.
        stock: its pipeline.
        rank: of the LoRA, 1 or more.

    Raises:
        ValueError: the rank is below 1, or no layer of the network is one of those that get a LoRA.
    """
    found, flow = shared_copy(network), flow_of_class(type(stock))
    add_lora(found, rank, ADAPTER, flow.targets if flow else TARGETS)
    cast_training_params(found)  # PEFT gives the layers the data type of the frozen ones
    return found


def save_sign_lora(pipe: Any, stock: Any, folder: Path) -> None:
    """Writes a projector whose network is from `lora_copy` into a folder, in float16.

    Args:
        pipe: the `SIGNPipeline`.
        stock: the teacher's pipeline.
        folder: exists.
    """
    state = {key: value.half() for key, value in lora_state(pipe.network, ADAPTER).items()}
    save_lora(stock, state, folder)
    settings = {name: pipe.config.get(name) for name in _SETTINGS}
    write_json(folder / _CONFIG, {"teacher": type(stock).__name__, "sigma": pipe.sigma, **settings})
    if pipe.source is not None:
        pipe.source.to("cpu").half().save_pretrained(folder / "source")


def load_sign_lora(pipe: Any, path_or_repo: str | os.PathLike[str], **hub_kwargs: Any) -> Any:
    """A `SIGNPipeline` of the teacher's pipeline and a LoRA that was trained with `train_sign.py --rank`.

    The LoRA is loaded into the denoiser of `pipe`, which both pipelines share, as the adapter "sign".
    `pipe.unload_lora_weights()` restores the teacher.

    Args:
        pipe: the pipeline that was distilled.
        path_or_repo: the folder OUTPUT_DIR/model, or a repository on the Hub.
        hub_kwargs: arguments of the download, such as `revision` and `token`.

    Returns:
        A `SIGNPipeline`.

    Raises:
        ValueError: the folder is not that of such a LoRA, or the LoRA is of another class of pipelines.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path_or_repo), **hub_kwargs))
    missing = [name for name in (_CONFIG, WEIGHT_NAME) if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{path_or_repo} has no {' and no '.join(missing)}: expected the result of train_sign.py --rank. Load that of"
            " a whole network with SIGNPipeline.from_pretrained."
        )
    made = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if made["teacher"] != type(pipe).__name__:
        raise ValueError(
            f"The LoRA is of a projector of {made['teacher']}, got {type(pipe).__name__}: load the pipeline that was"
            " distilled."
        )
    sign = untrained_projector(
        pipe, made["sigma"], max_sequence_length=made["max_sequence_length"], in_weights=False
    )
    if sign.flow is not None:
        sign.register_to_config(**{name: made[name] for name in _SETTINGS})
    if (folder / "source").is_dir():
        sign.register_modules(source=_load_source(folder / "source").to(denoiser_of(pipe).device))
    pipe.load_lora_weights(str(folder), weight_name=WEIGHT_NAME, adapter_name=ADAPTER)
    return sign


def _load_source(folder: Path) -> Any:
    kinds = {kind.__name__: kind for kind in (MixtureSource, PromptSource)}
    name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if name not in kinds:
        raise ValueError(f"{folder} holds a {name}, expected one of {', '.join(kinds)}.")
    return kinds[name].from_pretrained(folder)
