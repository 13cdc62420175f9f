"""Options and helpers that the commands of all methods share.

Heavy packages are imported inside the functions, so that `--help` is fast.
"""

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
from .text import read_text

DTYPES = ("float32", "float16", "bfloat16")

Model = Annotated[str, typer.Argument(help="Folder or Hub repository of the pipeline.")]
Dtype = Annotated[str, typer.Option(help=f"Data type of the pipeline: {', '.join(DTYPES)}.")]
Device = Annotated[str | None, typer.Option(help="Device to run on; default: cuda if available, else cpu.")]
Seed = Annotated[int, typer.Option(help="Seed of the random noise.")]
Steps = Annotated[int, typer.Option(min=1, help="Number of inference steps.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale.")]
Height = Annotated[int | None, typer.Option(min=1, help="Image height in pixels; default: the pipeline's.")]
Width = Annotated[int | None, typer.Option(min=1, help="Image width in pixels; default: the pipeline's.")]
Push = Annotated[str | None, typer.Option(metavar="REPO", help="Also upload to this Hub repository.")]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Prints every error as one red line and exits with code 1; DIFFUSERS_EXT_DEBUG=1 shows the traceback."""

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
                # An unexpected error: its type helps in a bug report.
                text = f"{type(error).__name__}: {text} (DIFFUSERS_EXT_DEBUG=1 shows the traceback)"
            Console(stderr=True, soft_wrap=True).print(f"[red]Error: {escape(text)}[/red]", highlight=False)
            raise typer.Exit(1) from None

    return wrapper


def say(text: str) -> None:
    """Prints one line without wrapping or colours."""
    Console().print(escape(text), highlight=False, soft_wrap=True)


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file.

    Raises:
        ValueError: the file contains no prompts, or has another encoding.
        OSError: the file cannot be read.
    """
    # Not splitlines(), which also splits at characters inside a prompt, such as U+2028.
    lines = [line.strip() for line in read_text(path).split("\n")]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one prompt per line.")
    return prompts


def image_options(**options: Any) -> dict[str, Any]:
    """Keyword arguments for the call of a pipeline, without those that are None."""
    return {name: value for name, value in options.items() if value is not None}


def load_pipeline(model: str, dtype: str = "float32", device: str | None = None) -> Any:
    """Loads a pipeline from a folder or a Hub repository and moves it to the device.

    Args:
        model: the folder or the repository.
        dtype: one of `DTYPES`.
        device: None for cuda if it is available, else cpu.

    Raises:
        ValueError: an unknown dtype, or a CUDA device where PyTorch finds none.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    import torch
    from diffusers import DiffusionPipeline

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no CUDA device. Use --device cpu.")
    pipe: Any = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    return pipe.to(device)


def require_prompts(pipe: Any) -> None:
    """Raises a ValueError if the pipeline takes no prompt."""
    from .hooks import parameters_of

    if "prompt" not in parameters_of(pipe):
        raise ValueError(
            f"{type(pipe).__name__} takes no prompts: this command needs a text-to-image pipeline."
        )
