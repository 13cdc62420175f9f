"""What the commands of all methods share. Nothing heavy is imported here, so that `--help` answers at once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .extras import MissingExtraError

DTYPES = ("float32", "float16", "bfloat16")

Model = Annotated[str, typer.Argument(help="Pipeline: a folder or a Hub repository.")]
Dtype = Annotated[str, typer.Option(help=f"Of the pipeline: {', '.join(DTYPES)}.")]
Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")]
Seed = Annotated[int, typer.Option(help="Of all noise.")]
Steps = Annotated[int, typer.Option(min=1, help="Number of inference steps of every image.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale of every image.")]
Height = Annotated[int | None, typer.Option(min=1, help="Of the images in pixels; default: the pipeline's.")]
Width = Annotated[int | None, typer.Option(min=1, help="Of the images in pixels; default: the pipeline's.")]
Push = Annotated[str | None, typer.Option(metavar="REPO", help="Upload to this Hub repository too.")]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Every error is one red line and exit code 1; DIFFUSERS_EXT_DEBUG=1 shows tracebacks instead."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except typer.Exit:
            raise
        except Exception as error:
            if os.environ.get("DIFFUSERS_EXT_DEBUG"):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, ValueError | OSError | MissingExtraError):
                # Not foreseen: its type helps whoever reports it.
                text = f"{type(error).__name__}: {text} (DIFFUSERS_EXT_DEBUG=1 shows where)"
            Console(stderr=True, soft_wrap=True).print(f"[red]Error: {escape(text)}[/red]", highlight=False)
            raise typer.Exit(1) from None

    return wrapper


def say(text: str) -> None:
    """Prints one line as it is, without wrapping or colours."""
    Console().print(escape(text), highlight=False, soft_wrap=True)


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        ValueError: there are none.
        OSError: no such file.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one a line.")
    return prompts


def image_options(**options: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def load_pipeline(model: str, dtype: str = "float32", device: str | None = None) -> Any:
    """The pipeline in a folder or a Hub repository, where it is to run.

    Raises:
        ValueError: an unknown dtype, or a device that is not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    import torch
    from diffusers import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this PyTorch sees no CUDA device. Use --device cpu.")
    pipe: Any = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    return pipe.to(device)


def require_prompts(pipe: Any) -> None:
    """ValueError for a pipeline that takes no prompt."""
    import inspect

    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(
            f"{type(pipe).__name__} takes no prompts: this command needs a text-to-image pipeline."
        )
