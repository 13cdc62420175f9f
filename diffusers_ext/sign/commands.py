"""`diffusers-ext project`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.commands import Device, Dtype, Output, Seed, load_pipeline, model_and, one_line_errors, say


def add_commands(app: typer.Typer) -> None:
    """Adds the command of the method."""
    app.command()(one_line_errors(project))


def project(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] IMAGE",
            help="Folder or embedded model of a SIGN projector, by default sign-fashion-ddpm; and the file of the image.",
        ),
    ],
    mask: Annotated[
        Path | None,
        typer.Option(help="Image that is white where a new content is generated; keeps the rest."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Description, if the projector takes prompts.")] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Noise to add first, as a share; default: 0, with --mask 1."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Network evaluations; default: 1, with --mask 2.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    output_dir: Output = Path("projection"),
) -> None:
    """Projects a corrupted image onto the data of a SIGN projector, or fills a part of it."""
    model, path = model_and(words, "sign-fashion-ddpm", "IMAGE")
    import torch
    from PIL import Image

    from ..core.images import save_png
    from .pipelines import SIGNPipeline

    pipe = load_pipeline(model, dtype, device, SIGNPipeline)
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "prompt": prompt}
    if strength is not None:
        given["strength"] = strength
    with Image.open(path) as opened:
        image = opened.copy()
    if mask is None:
        images = pipe.project(image, num_projections=steps or 1, **given).images
    else:
        with Image.open(mask) as opened:
            images = pipe.edit(image, opened.convert("L"), num_inference_steps=steps or 2, **given).images
    output_dir.mkdir(parents=True, exist_ok=True)
    about = {
        "prompt": prompt or "",
        "seed": str(seed),
        "strength": "default" if strength is None else strength,
    }
    save_png(images[0], output_dir / "projected.png", about)
    say(f"projected.png written to {output_dir}")
