"""Checkpoints of a training run, written atomically."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_STATE = "trained.safetensors"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in a run's folder, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if _is_checkpoint(p)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and re.fullmatch(r"checkpoint-\d+", path.name) is not None


def resolve_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` selects, or None to start from scratch.

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
        return None
    if wanted == "latest":
        if not found:
            logger.info("no checkpoint in %s yet: starting from scratch", args.output_dir)
        return found[-1] if found else None
    for path in (Path(wanted), Path(args.output_dir) / wanted):
        if _is_checkpoint(path):
            return path
    have = ", ".join(p.name for p in found) or "none"
    raise ValueError(
        f"--resume_from_checkpoint {wanted}: not a complete checkpoint, a folder called checkpoint-STEP."
        f" Checkpoints in {args.output_dir}: {have}."
    )


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, limit: int | None) -> None:
    """Writes `checkpoint-<step>` atomically, so that an interrupted run leaves no incomplete checkpoint."""
    final = Path(output_dir) / f"checkpoint-{step}"
    partial = final.with_name(f"partial-{final.name}")
    if accelerator.is_main_process:
        for stale in Path(output_dir).glob("partial-checkpoint-*"):
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
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


def checkpoint_only_what_is_trained(accelerator: Accelerator, buffers: Sequence[str] = ()) -> None:
    """Leaves the frozen weights out of the checkpoints, since they can be loaded from their source.

    Args:
        accelerator: an accelerator with a single model.
        buffers: name prefixes of the buffers that training changes.

    Loading raises a ValueError for a checkpoint of another network.
    """

    def trained(model: nn.Module) -> dict[str, Tensor]:
        wanted = {name for name, value in model.named_parameters() if value.requires_grad}
        wanted |= {name for name, _ in model.named_buffers() if name.startswith(tuple(buffers))}
        return {name: value for name, value in model.state_dict().items() if name in wanted}

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            state = trained(accelerator.unwrap_model(models[0]))
            save_file({name: value.contiguous() for name, value in state.items()}, Path(folder) / _STATE)
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        model = accelerator.unwrap_model(models.pop())
        state = load_file(Path(folder) / _STATE)
        missing = trained(model).keys() ^ state.keys()
        if missing:
            raise ValueError(
                f"The checkpoint belongs to another network: {', '.join(sorted(missing)[:3])}, ..."
            )
        model.load_state_dict(state, strict=False)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
