"""Checkpoints of a training run, written atomically, with the recipe of the run that they belong to."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.storage import differences, show_differences, write_json
from .recipes import Recipe, run_recipe

logger = logging.getLogger(__name__)

_STATE = "trained.safetensors"
_RECORD = "recipe.json"

# One entry for every resumption with other arguments: its step, and {argument: "before → after"}.
Changes = list[dict[str, Any]]


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if _is_checkpoint(p)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name) is not None


def resolve_checkpoint(args: argparse.Namespace) -> list[Path]:
    """The checkpoints that `--resume_from_checkpoint` selects, in the order to try them; none to start from scratch.

    Raises:
        ValueError: no such checkpoint, or a new run in the folder of an earlier one.
    """
    wanted, found = args.resume_from_checkpoint, list_checkpoints(args.output_dir)
    if wanted is None and found:
        raise ValueError(
            f"{args.output_dir} holds {found[-1].name} of an earlier run: resume it with"
            " --resume_from_checkpoint latest, delete its checkpoints, or choose another --output_dir."
        )
    if wanted is None:
        return []
    if wanted == "latest":
        return found[::-1]
    for path in (Path(wanted), Path(args.output_dir) / wanted):
        if _is_checkpoint(path):
            return [path]
    have = ", ".join(p.name for p in found) or "none"
    raise ValueError(
        f"--resume_from_checkpoint {wanted}: not a complete checkpoint, a folder called checkpoint-STEP."
        f" Checkpoints in {args.output_dir}: {have}."
    )


# What the loaders of torch, safetensors and accelerate raise for damaged files.
_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError)


def check_resume(accelerator: Accelerator, args: argparse.Namespace, free: Sequence[str] = ()) -> None:
    """Refuses at the start of a script, before it loads a model, what `resume` refuses of the arguments alone.

    Args:
        accelerator, args, free: see `run_recipe`.

    Raises:
        ValueError: see `resume`.
    """
    recipe = run_recipe(accelerator, args, free=free)
    for path in resolve_checkpoint(args):
        with contextlib.suppress(ValueError):  # damaged: `resume` says so
            found = _read_record(path)["fixed"]
            break
    else:
        return
    _check(path, {"arguments": found.get("arguments", {})}, recipe, args.max_train_steps)


def _check(path: Path, fixed: dict[str, Any], recipe: Recipe, max_train_steps: int | None) -> None:
    differ = differences(fixed, recipe.fixed)
    if differ:
        raise ValueError(
            f"{path} was made with other settings ({show_differences(differ)}): resume it with its own, or"
            " choose another --output_dir."
        )
    # None: not known before the data are loaded, see `set_train_steps`.
    if max_train_steps is not None and _step(path) > max_train_steps:
        raise ValueError(
            f"{path} has more steps than --max_train_steps {max_train_steps}: give at least {_step(path)}, or"
            " resume from an earlier checkpoint."
        )


def resume(accelerator: Accelerator, args: argparse.Namespace, recipe: Recipe) -> tuple[Path | None, Changes]:
    """Loads the checkpoint that `--resume_from_checkpoint` selects into the accelerator.

    `latest` goes back to the newest checkpoint that is not damaged. Later checkpoints in the folder, which do not
    belong to the continued run, are moved aside.

    Returns:
        The checkpoint, or None to start from scratch; and the changes of arguments so far, with the current one.

    Raises:
        ValueError: see `resolve_checkpoint`; or the checkpoint is damaged, that of another run,
            or beyond `--max_train_steps`.
    """
    candidates, damaged = resolve_checkpoint(args), []
    accelerator.wait_for_everyone()  # before any process writes the first checkpoint or moves one
    for path in candidates:
        try:
            record = _read_record(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        _check(path, record["fixed"], recipe, args.max_train_steps)
        try:
            accelerator.load_state(str(path))
        except torch.cuda.OutOfMemoryError:
            raise
        except _UNREADABLE as error:
            damaged.append(f"{path} cannot be loaded ({error})")
            continue
        if damaged:
            logger.warning("%s: going back to %s", "; ".join(damaged), path.name)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            _move_aside(Path(args.output_dir), path)
        accelerator.wait_for_everyone()
        logger.info("resumed from %s", path)
        return path, _with_changes(record, recipe, _step(path))
    if damaged:
        raise ValueError(
            f"{'; '.join(damaged)}: there is no checkpoint to resume from. Name an earlier one with"
            " --resume_from_checkpoint, or delete it to start from scratch."
        )
    if args.resume_from_checkpoint is not None:
        logger.info("no checkpoint in %s yet: starting from scratch", args.output_dir)
    return None, []


def _with_changes(record: dict[str, Any], recipe: Recipe, step: int) -> Changes:
    free = differences(record["free"], recipe.free)
    changed = {name: f"{before} → {after}" for name, (before, after) in free.items()}
    return [*record["changes"], {"step": step, **changed}] if changed else record["changes"]


def _read_record(checkpoint: Path) -> dict[str, Any]:
    """The record of a checkpoint.

    Raises:
        ValueError: it is missing, or a file of the checkpoint has another size than when it was written.
    """
    try:
        record = json.loads((checkpoint / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} is damaged, or of an earlier version: its {_RECORD} cannot be read"
        ) from error
    wrong = [
        name for name, size in _sizes(checkpoint).items() if record["files"].get(name) not in (None, size)
    ]
    wrong += sorted(record["files"].keys() - _sizes(checkpoint).keys())
    if wrong:
        raise ValueError(f"{checkpoint} is damaged: {', '.join(wrong)} is missing or has another size")
    return record


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _RECORD)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _move_aside(output_dir: Path, resumed: Path) -> None:
    """Moves what is not older than the resumed checkpoint, so that it is neither continued nor published."""
    later = [
        path
        for path in list_checkpoints(output_dir)
        if _step(path) >= _step(resumed) and path.resolve() != resumed.resolve()
    ]
    if not later:
        return
    number = 1
    while (output_dir / f"set-aside-{number}").exists():
        number += 1
    folder = output_dir / f"set-aside-{number}"
    folder.mkdir()
    for path in reversed(later):
        os.replace(path, folder / path.name)
    names = ", ".join(path.name for path in later)
    logger.warning(
        "%s do not belong to the run that continues from %s: moved to %s", names, resumed.name, folder
    )


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    limit: int | None,
    recipe: Recipe | None = None,
    changes: Changes | None = None,
) -> None:
    """Writes `checkpoint-<step>` atomically, so that an interrupted run leaves no incomplete checkpoint.

    Args:
        accelerator: holds the state.
        output_dir: the folder of the run.
        step: number of the optimization steps done.
        limit: number of checkpoints to keep; None or 0 for all.
        recipe: what the run depends on.
        changes: from `resume`.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"partial-{final.name}")
    if accelerator.is_main_process:
        for stale in Path(output_dir).glob("partial-checkpoint-*"):
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        made_of = {"fixed": {}, "free": {}} if recipe is None else asdict(recipe)
        write_json(partial / _RECORD, {**made_of, "changes": changes or [], "files": _sizes(partial)})
        if final.exists():
            _remove(final)
        os.replace(partial, final)
        for old in list_checkpoints(output_dir)[:-limit] if limit else []:
            _remove(old)
    accelerator.wait_for_everyone()


def _remove(checkpoint: Path) -> None:
    # Renamed first, so that an interrupted removal leaves no incomplete checkpoint.
    doomed = checkpoint.with_name(f"partial-{checkpoint.name}-removed")
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def changed_by_training(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters and the buffers by name. The frozen weights can be loaded from their source."""
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    wanted |= {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model.state_dict().items() if name in wanted}


def check_names(own: Collection[str], found: Collection[str]) -> None:
    """Raises a ValueError unless a checkpoint has the same tensors as the model."""
    differ = sorted(set(own) ^ set(found))
    if differ:
        raise ValueError(f"The checkpoint belongs to another network: {', '.join(differ[:3])}, ...")


def save_with_checkpoints(accelerator: Accelerator, model: nn.Module) -> None:
    """Lets checkpoints hold `changed_by_training`, with the names of `model` itself.

    They are the same with several processes and with `torch.compile`, so that a run can be resumed without.

    Loading raises a ValueError for a checkpoint of another network.
    """

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            state = {name: value.contiguous() for name, value in changed_by_training(model).items()}
            save_file(state, Path(folder) / _STATE)
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        models.clear()
        state = load_file(Path(folder) / _STATE)
        check_names(changed_by_training(model), state)
        model.load_state_dict(state, strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
