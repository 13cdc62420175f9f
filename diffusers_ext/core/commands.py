"""Options and helpers that the commands of all methods share.

Heavy packages are imported inside the functions, so that `--help` is fast.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from .extras import CARD_DIR, MissingExtraError, find_path, load_function
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
OptionalSteps = Annotated[
    int | None,
    typer.Option(
        "--steps", "--num-inference-steps", min=1, help="Number of inference steps; default: the pipeline's."
    ),
]
OptionalGuidance = Annotated[
    float | None,
    typer.Option("--guidance", "--guidance-scale", help="Guidance scale; default: the pipeline's."),
]
Scheduler = Annotated[
    str | None,
    typer.Option(help="Scheduler of Diffusers, such as DPMSolverMultistep; default: the pipeline's."),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="Recipe to apply: a folder or a Hub repository.")
]
Output = Annotated[Path, typer.Option(help="Output folder.")]
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


def model_and(words: Sequence[str] | None, embedded: str, what: str) -> tuple[str, str]:
    """MODEL and another argument of a command, of which MODEL may be missing.

    Args:
        words: the arguments.
        embedded: the embedded model that MODEL is by default.
        what: name of the other argument, for the error message.

    Raises:
        ValueError: there are not one or two arguments.
        FileNotFoundError: the embedded model is not installed.
    """
    words = list(words or ())
    if len(words) not in (1, 2):
        raise ValueError(f"Expected {what}, or MODEL and {what}, got {len(words)} arguments.")
    return (words[0] if len(words) == 2 else default_model(embedded)), words[-1]


def default_model(embedded: str) -> str:
    """The folder of an embedded model.

    Raises:
        FileNotFoundError: it is not installed.
    """
    return str(load_function(CARD_DIR, "embedded model")(embedded))


def with_options_of(command: Callable[..., None], functions: Mapping[str, Callable[..., Any]]) -> Any:
    """`command` with the options of other functions, of which it gets the values as its argument `extra`.

    Args:
        command: takes `extra`, {key: {name of an option: value}}.
        functions: each has options for typer after its first parameter.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    added = {
        key: list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        for key, function in functions.items()
    }

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        extra = {
            key: {option.name: given.pop(option.name) for option in options} for key, options in added.items()
        }
        command(**given, extra=extra)

    shown = [p for p in own if p.name != "extra"] + [
        option for options in added.values() for option in options
    ]
    wrapper.__dict__["__signature__"] = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in shown])
    wrapper.__annotations__ = {p.name: p.annotation for p in shown}
    return wrapper


def set_scheduler(pipe: Any, name: str | None) -> None:
    """Gives the pipeline the scheduler of that class of Diffusers, with the config of its own.

    Args:
        pipe: the pipeline.
        name: such as "DPMSolverMultistep", with or without "Scheduler" at the end; None changes nothing.

    Raises:
        ValueError: there is no such scheduler.
    """
    if name is None:
        return
    import diffusers

    full = name.removesuffix("Scheduler") + "Scheduler"
    kind = getattr(diffusers, full, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        from .schedules import SUPPORTED

        raise ValueError(
            f"--scheduler {name}: Diffusers has no {full}. Known schedulers: {', '.join(SUPPORTED)}."
        )
    pipe.scheduler = getattr(diffusers, full).from_config(pipe.scheduler.config)


def call_options(
    pipe: Any, steps: int | None, guidance: float | None, height: int | None = None, width: int | None = None
) -> dict[str, Any]:
    """Arguments of a call of `pipe` from the options of a command, without those that are None.

    Raises:
        ValueError: a guidance scale or a size for a pipeline that takes none.
    """
    from .hooks import parameters_of

    given = image_options(num_inference_steps=steps, height=height, width=width)
    if guidance is not None:
        from .families import guidance_of

        scale = guidance_of(pipe).scale
        if scale is None:
            raise ValueError(f"--guidance: {type(pipe).__name__} has no guidance scale.")
        given[scale] = guidance
    unknown = [name for name in given if name not in parameters_of(pipe)]
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}.")
    return given


def load_pipeline(
    model: str, dtype: str = "float32", device: str | None = None, pipeline_class: Any = None
) -> Any:
    """Loads a pipeline and moves it to the device.

    Args:
        model: a folder, a Hub repository, or the name of an embedded model, such as "fashion-scenes".
        dtype: one of `DTYPES`.
        device: None for cuda if it is available, else cpu.
        pipeline_class: None for `DiffusionPipeline`, which finds the class.

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
    kind: Any = pipeline_class or DiffusionPipeline
    pipe: Any = kind.from_pretrained(find_path(model), dtype=getattr(torch, dtype))
    return pipe.to(device)


def require_prompts(pipe: Any) -> None:
    """Raises a ValueError if the pipeline takes no prompt."""
    from .hooks import parameters_of

    if "prompt" not in parameters_of(pipe):
        raise ValueError(
            f"{type(pipe).__name__} takes no prompts: this command needs a text-to-image pipeline."
        )
