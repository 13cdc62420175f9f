"""What the weights of a training run depend on. Its checkpoints hold it, so that no other run continues them."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DistributedType

# Arguments that only say where something is. What is there is recorded by its content, or only acts on validations.
_PLACES = {
    *("pretrained_model_name_or_path", "revision", "variant", "cache_dir", "vae", "text_encoder"),
    *("grader", "scorer"),
    *("dataset_name", "train_data_dir", "pairs_dir", "plan", "preset", "gaussian", "projector"),
    *("output_dir", "logging_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id"),
}
# Arguments that may change from one part of a run to the next.
_FREE = {
    *("max_train_steps", "num_train_epochs", "checkpointing_steps", "checkpoints_total_limit", "report_to"),
    *("validation_steps", "validation_prompts", "num_validation_images", "cache_latents"),
    *("dataloader_num_workers",),
    *("gradient_checkpointing", "enable_xformers_memory_efficient_attention"),
}
# Images of a data set whose whole content is read for its digest.
_MOST_READ = 1024


@dataclass(frozen=True)
class Recipe:
    """What a run depends on.

    Attributes:
        fixed: what must not change when the run is resumed; values of JSON.
        free: arguments that may change; the changes are recorded.
    """

    fixed: dict[str, Any]
    free: dict[str, Any]


def run_recipe(
    accelerator: Accelerator,
    args: argparse.Namespace,
    made_of: Mapping[str, Any] | None = None,
    free: Sequence[str] = (),
) -> Recipe:
    """The recipe of a run.

    Args:
        accelerator: its processes are part of the recipe.
        args: all arguments of the script, after `make_accelerator`. They must stay the same, except for a few known
            ones.
        made_of: records of the models and of the data that the run starts from.
        free: further arguments that do not act on the weights, such as those of the validation.
    """
    names = vars(args).keys() - _PLACES
    may_change = names & (_FREE | set(free))
    fixed = {name: getattr(args, name) for name in sorted(names - may_change - {"train_batch_size"})}
    # Several processes train what one trains with as many rows.
    fixed["rows per step of all processes"] = args.train_batch_size * accelerator.num_processes
    if accelerator.distributed_type is DistributedType.FSDP:
        fixed["sharded by FSDP"] = True  # its checkpoints have other files
    found = {name: getattr(args, name) for name in sorted(may_change)}
    found |= {"processes": accelerator.num_processes}
    state: Any = accelerator.state
    found |= {"torch.compile": state.dynamo_plugin.backend.value.lower()}
    return Recipe({"arguments": fixed, **(made_of or {})}, found)


def dataset_record(args: argparse.Namespace, data: Any) -> dict[str, Any]:
    """Number of rows and digest of a data set.

    The digest covers all captions, the number of bytes of every image file, and the content of up to 1,024 image
    files evenly spread over the data. It does not cover names of files, so a folder can be moved.

    Args:
        args: see `add_data_arguments`.
        data: a `datasets.Dataset`, as from `load_dataset`.
    """
    import datasets

    found = hashlib.sha256()
    if args.caption_column in data.column_names:
        for caption in data[args.caption_column]:
            found.update(f"{caption!r}\n".encode())
    encoded = data.select_columns([args.image_column]).cast_column(
        args.image_column, datasets.Image(decode=False)
    )
    read = set(np.linspace(0, max(len(data) - 1, 0), min(len(data), _MOST_READ)).astype(int).tolist())
    for i, row in enumerate(encoded):
        image = row[args.image_column]
        content, path = image["bytes"], image["path"]
        # The images of an archive have a path that is no file.
        content = path.encode() if content is None and not Path(path).is_file() else content
        size = Path(path).stat().st_size if content is None else len(content)
        found.update(f"{size}\n".encode())
        if i in read:
            found.update(Path(path).read_bytes() if content is None else content)
    return {"rows": len(data), "digest": found.hexdigest()[:16]}
