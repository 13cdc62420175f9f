"""Tiny random transformers that are deep enough to be pruned, in the pipelines of `tests/families.py`."""

from typing import Any

import torch

import diffusers_ext as dx
from diffusers_ext.asdm.networks import network_config
from diffusers_ext.asdm.transformers import LISTS
from tests import families

# The families of `tests/families.py` whose transformers can be pruned.
NAMES = (
    "sd3",
    "flux",
    "flux2",
    "qwen",
    "zimage",
    "sana",
    "pixart",
    "lumina2",
    "auraflow",
    "cogview4",
    "dit",
    "kandinsky5",
    "wan",
    "ltx",
    "cogvideox",
)
DEPTH = 4


def deep(name: str, depth: int = DEPTH, **changes: Any) -> Any:
    """The pipeline `name` with `depth` random blocks in every list."""
    pipe = families.build(name)
    config = {**network_config(pipe.transformer), **changes}
    kind = type(pipe.transformer)
    config |= dict.fromkeys(LISTS[config.pop("_class_name")].values(), depth)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformer = kind(**config).eval()
        for value in transformer.parameters():
            # Some layers are zero at first, and then their blocks would do nothing.
            if value.ndim > 1 and not value.any():
                torch.nn.init.normal_(value, std=0.1)
    pipe.register_modules(transformer=transformer)
    return pipe


def recorded(pipe: Any, name: str, count: int = 1) -> list[dict[str, Any]]:
    """The inputs of the transformer in a guided call of the pipeline with two prompts."""
    facts = families.FAMILIES[name]
    call = families.inputs(name, batch=2)
    call = {key: value for key, value in call.items() if key not in ("prompt", "class_labels", "output_type")}
    prompts = ["a red bag", "a blue boot"] if facts.prompted else [3, 5]
    return dx.record_calibration_inputs(
        pipe, prompts, **{**call, "num_timesteps": count, "num_inference_steps": 2}
    )
