"""`diffusers-ext demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.commands import Seed, one_line_errors


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of the testbed."""
    app.command()(one_line_errors(demo))


def demo(
    output_dir: Annotated[Path, typer.Option(help="Output folder.")] = Path("diffusers_ext_demo"),
    num_images: Annotated[int, typer.Option(min=8, help="Images per variant.")] = 64,
    seed: Seed = 0,
) -> None:
    """Runs the methods on the embedded models and writes one image that compares them."""
    from .demo import run

    run(output_dir, num_images, seed)
