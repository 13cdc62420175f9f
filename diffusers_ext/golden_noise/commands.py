"""`diffusers-ext convert npnet`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.commands import Push, one_line_errors, say


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of the method."""
    convert = typer.Typer(
        no_args_is_help=True, help="Converts published weights to the format of this package."
    )
    convert.command("npnet")(one_line_errors(npnet))
    app.add_typer(convert, name="convert")


def npnet(
    checkpoint: Annotated[Path, typer.Argument(help="The released .pth file, or its .safetensors port.")],
    output: Annotated[Path, typer.Argument(help="Output folder.")],
    svd_attention: Annotated[
        bool,
        typer.Option(
            help="Apply SVD attention, as in the official inference code; the SDXL training had none."
        ),
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
