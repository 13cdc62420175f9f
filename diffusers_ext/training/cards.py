"""The output of a training script: a folder with the model and its model card, on disk and on the Hub."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from ..core.storage import whole_folder, write_json

PICTURE = "validation.png"
_NOT_RESULTS = ("steps", "images", "seconds", "hardware", "resumptions")


def create_hub_repo(args: argparse.Namespace) -> str | None:
    """Creates the repository for `--push_to_hub` before training, so that an invalid token fails early.

    Returns:
        The id of the repository, or None without `--push_to_hub`.
    """
    if not args.push_to_hub:
        return None
    return HfApi().create_repo(args.hub_model_id or Path(args.output_dir).name, exist_ok=True).repo_id


def publish(
    args: argparse.Namespace,
    argv: Sequence[str],
    record: dict[str, Any],
    save: Callable[[Path], Any],
    description: str,
    tags: Sequence[str],
    repo_id: str | None = None,
    pipeline_tag: str | None = None,
) -> Path:
    """Writes the weights, `training.json` and the card into OUTPUT_DIR/model, and uploads them if wanted.

    The last validation images become the picture of the card.

    Args:
        args: see `add_training_arguments`.
        argv: the script and its arguments, for the card.
        record: the result of `train`.
        save: writes the weights and configs into a given folder.
        description: Markdown text for the card: what the model is and how to use it. FOLDER in it becomes the
            repository or the folder, and BASE the base model.
        tags: tags of the card.
        repo_id: see `create_hub_repo`; None uploads nothing.
        pipeline_tag: the task of the model on the Hub, such as "text-to-image".

    Returns:
        The folder.
    """
    folder = Path(args.output_dir) / "model"
    with whole_folder(folder) as partial:
        save(partial)
        arguments = {name: portable(value) for name, value in vars(args).items()}
        write_json(partial / "training.json", {**arguments, **record})
        drawn = list(Path(args.output_dir).rglob("validation-*.png"))
        if drawn:
            shutil.copyfile(max(drawn, key=os.path.getmtime), partial / PICTURE)
            description = f"{description}\n\n![Images of the last validation]({PICTURE})"
        places = {
            "FOLDER": repo_id or os.path.join(portable(args.output_dir), folder.name),
            "BASE": str(portable(_base_of(args))),
        }
        text = re.sub(r"\b(FOLDER|BASE)\b", lambda found: places[found[1]], description)
        make_model_card(args, argv, record, text, tags, pipeline_tag).save(partial / "README.md")
    if repo_id is not None:
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message="End of training")
    return folder


def make_model_card(
    args: argparse.Namespace,
    argv: Sequence[str],
    record: dict[str, Any],
    description: str,
    tags: Sequence[str],
    pipeline_tag: str | None = None,
) -> ModelCard:
    """The model card of a training run: description, command, seed, cost and results. Needs no network."""
    command = shlex.join(["accelerate", "launch", *map(str, map(portable, argv))])
    results = {name: value for name, value in record.items() if name not in _NOT_RESULTS}
    changes = "".join(f"\n\n{_resumption(entry)}" for entry in record.get("resumptions", []))
    data = _card_data(args, results, pipeline_tag)
    rows = "\n".join(f"| {name} | {_figure(value)} |" for name, value in results.items())
    text = f"""---
{data.to_yaml()}
---

{description}

## Training

```
{command}
```

Seed {args.seed}, {record["steps"]} steps, {record["images"]} images in {record["seconds"]} s on
{record["hardware"]}. All arguments are in `training.json`.{changes}

## Results at the end of training

These are figures of one run, without intervals.

| Figure | Value |
| --- | --- |
{rows}
"""
    return populate_model_card(ModelCard(text), tags=["diffusers-ext", *tags])


def _card_data(args: argparse.Namespace, results: dict[str, Any], pipeline_tag: str | None) -> ModelCardData:
    """The YAML header: what the Hub shows and searches. Folders of this machine are no base models and no data sets."""
    data = vars(args)
    source = data.get("dataset_name") or data.get("train_data_dir")
    base, dataset = _hub_id(_base_of(args)), _hub_id(data.get("dataset_name"))
    figures = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=dataset or "custom",
            dataset_name=str(portable(source)),
            metric_type=re.sub(r"\W+", "-", name.lower()).strip("-"),
            metric_name=name,
            metric_value=float(_figure(value)),
        )
        for name, value in results.items()
        # Whole numbers are counts.
        if pipeline_tag is not None and source is not None and isinstance(value, float)
    ]
    return ModelCardData(
        license="apache-2.0",
        pipeline_tag=pipeline_tag,
        base_model=base,
        datasets=None if dataset is None else [dataset],
        model_name=_name(args),
        eval_results=figures or None,
    )


def _name(args: argparse.Namespace) -> str:
    return (getattr(args, "hub_model_id", None) or Path(args.output_dir).name).rpartition("/")[-1]


def _base_of(args: argparse.Namespace) -> str | None:
    return getattr(args, "pretrained_model_name_or_path", None)


def _hub_id(value: str | None) -> str | None:
    """The value, if it names a repository on the Hub and no folder."""
    named = value is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not os.path.exists(value)
    return value if named else None


def _resumption(entry: dict[str, Any]) -> str:
    changed = ", ".join(f"{name} {change}" for name, change in entry.items() if name not in ("step", "stage"))
    stage = f" of stage {entry['stage']}" if "stage" in entry else ""
    return f"Resumed at step {entry['step']}{stage} with other arguments: {changed}."


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def portable(value: Any) -> Any:
    """An absolute path without its folders, also after an option; any other value itself.

    Local paths are useless to readers of a card and should not be published.
    """
    if isinstance(value, str):
        option, equals, path = value.rpartition("=") if value.startswith("-") else ("", "", value)
        return f"{option}{equals}{Path(path).name}" if os.path.isabs(path) else value
    return value
