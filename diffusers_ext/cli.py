"""The command line, `diffusers-ext` or `python -m diffusers_ext`. Each method brings its own commands.

torch and diffusers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .registry import ROOMS
from .testbed.commands import add_commands as add_testbed_commands

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Published sampling, noise, smoothness, distillation and pruning methods as plug-ins for Diffusers.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Published sampling, noise, smoothness, distillation and pruning methods as plug-ins for Diffusers."""


for room in ROOMS:
    if room.commands is not None:
        room.load(room.commands)(app)
add_testbed_commands(app)


@app.command()
def version() -> None:
    """Prints the version."""
    from . import __version__

    typer.echo(__version__)
