"""The command `diffusers-ext istd`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..core.commands import (
    Device,
    Dtype,
    Guidance,
    Height,
    Model,
    Seed,
    Steps,
    Width,
    image_options,
    load_pipeline,
    one_line_errors,
    read_prompts,
    require_prompts,
)


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of Smooth-LoRA to the command line."""
    app.command()(one_line_errors(istd))


def istd(
    model: Model,
    prompts: Annotated[Path, typer.Option(help="Text file with one prompt per line; the paper uses 500.")],
    smooth_lora: Annotated[
        str | None, typer.Option(help="Smooth-LoRA to apply first: a file, a folder or a Hub repository.")
    ] = None,
    num_inference_steps: Steps = 50,
    guidance_scale: Guidance = 7.5,
    height: Height = None,
    width: Width = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pipeline call.")] = 11,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder for finished prompts, so that an interrupted run resumes.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """Measures how evenly the images of a text-to-image model change between two noises (ISTD)."""
    texts = read_prompts(prompts)
    from ..metrics.istd import compute_istd
    from .apply import apply_smooth_lora

    pipe = load_pipeline(model, dtype, device)
    require_prompts(pipe)
    if smooth_lora is not None:
        apply_smooth_lora(pipe, smooth_lora)
    call = image_options(
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, height=height, width=width
    )
    found = compute_istd(pipe, texts, seed=seed, batch_size=batch_size, cache_dir=cache_dir, **call)
    table = Table("figure", "value", title=f"{len(texts)} paths of 11 images in [−1, 1]")
    table.add_row("ISTD", f"{found.istd:.4g}")
    table.add_row("mean adjacent distance", f"{found.mean_distance:.4g}")
    table.add_row("std/mean", f"{found.relative:.4g}")
    table.add_row("distance of the ends", f"{found.endpoint_distance:.4g}")
    Console().print(table)
