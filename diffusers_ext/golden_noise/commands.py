"""`diffusers-ext convert npnet`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.commands import Push, one_line_errors, say
from ..core.extras import find_path


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of the method."""
    convert = typer.Typer(
        no_args_is_help=True, help="Converts published weights to the format of this package."
    )
    convert.command("npnet")(one_line_errors(npnet))
    app.add_typer(convert, name="convert")


def apply_options(
    pipe: Any,
    golden_noise: Annotated[
        str | None,
        typer.Option(metavar="NPNET", help="Golden noise of this network: a folder or a Hub repository."),
    ] = None,
    golden_strength: Annotated[
        float, typer.Option(help="With --golden-noise: 0 for random noise, 1 for golden noise.")
    ] = 1.0,
) -> bool:
    """Applies golden noise as the options of the command line say, and returns whether they ask for it."""
    if golden_noise is None:
        if golden_strength != 1:
            raise ValueError("--golden-strength goes with --golden-noise NPNET.")
        return False
    from .apply import apply_golden_noise
    from .npnet import NPNetModel

    loaded: Any = NPNetModel.from_pretrained(find_path(golden_noise))
    apply_golden_noise(pipe, loaded.to(pipe.device), golden_strength)
    return True


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
