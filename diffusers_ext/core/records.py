"""Records of what a result is made of: the weights and the configs of a pipeline and of its parts.

They are values of JSON and belong into the recipes of `storage`. A record is the same for the same weights in
another data type, as long as the type holds them exactly; so take it before weights are cast to a narrower one.
"""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from .storage import digest, weights_digest

# Entries of a config that do not act on the output of a part, or that `save_pretrained` changes.
_NO_SETTINGS = ("transformers_version", "architectures", "dtype", "torch_dtype")


def pipeline_record(pipe: Any) -> dict[str, Any]:
    """Class, settings and parts of a pipeline."""
    parts = {name: part for name, part in sorted(pipe.components.items()) if part is not None}
    config = dict(getattr(pipe, "config", {}))
    settings = {name: value for name, value in config.items() if name not in pipe.components}
    return {
        "class": type(pipe).__name__,
        "settings": json_settings(settings),
        **{name: part_record(part) for name, part in parts.items()},
    }


def part_record(part: Any) -> dict[str, Any]:
    """Class, config and weights of a network, the config of a scheduler, or the vocabulary of a tokenizer."""
    record: dict[str, Any] = {"class": type(part).__name__}
    config: Any = getattr(part, "config", None)
    if config is not None:
        # Of transformers only what differs from the defaults, to which new versions add.
        record["config"] = json_settings(config.to_diff_dict() if hasattr(config, "to_diff_dict") else config)
    if isinstance(part, nn.Module):
        record["weights"] = weights_digest(part)
    elif hasattr(part, "get_vocab"):
        record |= {"vocabulary": digest(part.get_vocab()), "model_max_length": part.model_max_length}
    return record


def json_settings(config: Any) -> dict[str, Any]:
    """The entries of a config that act on the output of a part, as values of JSON."""
    wanted = {k: v for k, v in dict(config).items() if not k.startswith("_") and k not in _NO_SETTINGS}
    return json.loads(json.dumps(wanted, default=_listed))


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
