"""`diffusers-ext convert npnet`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.commands import Push, one_line_errors, say


def add_commands(app: typer.Typer) -> None:
    """Adds the method's commands."""
    convert = typer.Typer(no_args_is_help=True, help="Converts published weights to this package's layout.")
    convert.command("npnet")(one_line_errors(npnet))
    app.add_typer(convert, name="convert")


def npnet(
    checkpoint: Annotated[Path, typer.Argument(help="The released .pth, or its .safetensors port.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    svd_attention: Annotated[
        bool,
        typer.Option(help="As the official inference code runs them; the SDXL weights were trained without."),
    ] = True,
    push_to_hub: Push = None,
) -> None:
    """Converts released golden-noise weights to a folder for NPNetModel.from_pretrained."""
    from .npnet import NPNetModel

    model = NPNetModel.from_original(checkpoint, svd_attention=svd_attention)
    model.save_pretrained(output)
    say(f"{model.num_parameters():,} parameters written to {output}")
    if push_to_hub is not None:
        model.push_to_hub(push_to_hub)
        say(f"Uploaded to {push_to_hub}")
