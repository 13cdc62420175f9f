"""`diffusers-ext fit-gaussian`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..core.commands import (
    Device,
    Dtype,
    Model,
    Push,
    Seed,
    load_pipeline,
    one_line_errors,
    read_prompts,
    say,
)
from ..core.extras import find_path, require

if TYPE_CHECKING:
    from .gaussian import GaussianStats

_TOP = 8


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of the method."""
    app.command("fit-gaussian")(one_line_errors(fit_gaussian))


def fit_gaussian(
    model: Model,
    dataset: Annotated[
        str | None, typer.Option(help="Fit to images: a folder or a data set on the Hub.")
    ] = None,
    from_samples: Annotated[
        int | None, typer.Option(metavar="N", help="Fit to N samples that the pipeline generates.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line, for --from-samples.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Number of eigenpairs to keep.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    num_inference_steps: Annotated[
        int | None, typer.Option(min=1, help="Inference steps of the samples; default: the pipeline's.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Guidance scale of the samples; default: the pipeline's.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Resize and crop images to this size.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a data set on the Hub.")] = "train",
    image_column: Annotated[str, typer.Option(help="Image column of the data set.")] = "image",
    label_column: Annotated[
        str | None, typer.Option(help="Label column of the data set, for one mean per label.")
    ] = None,
    prompt_map: Annotated[
        bool,
        typer.Option("--prompt-map", help="Fit a map that predicts a prompt's mean from its embeddings."),
    ] = False,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path("gaussian-stats"),
    push_to_hub: Push = None,
) -> None:
    """Fits the Gaussian statistics for teleportation, to images or to a pipeline's own samples."""
    if (dataset is None) == (from_samples is None):
        raise ValueError("Give either --dataset or --from-samples N.")
    if prompts is not None and from_samples is None:
        raise ValueError("--prompts goes with --from-samples: images have no prompts.")
    if prompt_map and prompts is None and label_column is None:
        raise ValueError("--prompt-map needs prompts: give --prompts FILE, or a --label-column of captions.")
    texts = None if prompts is None else read_prompts(prompts)
    from ..core.images import open_images
    from .gaussian import GaussianStats
    from .prompts import fit_prompt_map
    from .sources import check_rank, encoded_images, pipeline_samples

    if from_samples is not None:
        check_rank(rank, from_samples, texts)
        pipe = load_pipeline(model, dtype, device)
        batches: Iterable[Any] = pipeline_samples(
            pipe,
            from_samples,
            batch_size=batch_size,
            prompts=texts,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
    else:
        # Opened before the pipeline, which takes longer to load, so that errors show early.
        images = open_images(
            _find_images(str(dataset), split), labels=label_column, image_column=image_column
        )
        pipe = load_pipeline(model, dtype, device)
        batches = encoded_images(pipe, images, batch_size=batch_size, resolution=resolution, seed=seed)
    stats = GaussianStats.fit(batches, rank)
    if prompt_map:
        stats = fit_prompt_map(pipe, stats)
    stats.save_pretrained(output)
    Console().print(_table(stats))
    say(f"Written to {output}")
    if push_to_hub is not None:
        say(f"Uploaded to {stats.push_to_hub(push_to_hub)}")


def apply_options(
    pipe: Any,
    teleport: Annotated[
        str | None,
        typer.Option(
            metavar="STATS", help="Teleportation with these statistics: a folder or a Hub repository."
        ),
    ] = None,
    skip: Annotated[
        str, typer.Option(help='With --teleport: share of the steps to skip, or "auto" as calibrated.')
    ] = "auto",
) -> bool:
    """Applies teleportation as the options of the command line say, and returns whether they ask for it."""
    if teleport is None:
        if skip != "auto":
            raise ValueError("--skip goes with --teleport STATS.")
        return False
    from .apply import apply_teleport
    from .gaussian import GaussianStats

    try:
        share: float | str = skip if skip == "auto" else float(skip)
    except ValueError as error:
        raise ValueError(f'--skip must be a number in [0, 1) or "auto", got {skip!r}.') from error
    stats = GaussianStats.from_pretrained(find_path(teleport))
    stats._note_source(teleport)
    apply_teleport(pipe, stats, share)
    return True


def _find_images(dataset: str, split: str) -> Any:
    if Path(dataset).is_dir():
        return dataset
    if Path(dataset).exists() or dataset.startswith((".", "/", "~")):
        raise ValueError(f"{dataset} is not a folder of images.")
    return require("datasets", "train").load_dataset(dataset, split=split)


def _table(stats: GaussianStats) -> Table:
    total = stats.total_variance
    explained = float(stats.eigenvalues.double().sum()) / total if total else 0.0
    table = Table("statistic", "value", title="Gaussian statistics")
    table.add_row("shape", " × ".join(map(str, stats.shape)))
    table.add_row("samples", str(stats.num_samples))
    if stats.class_names:
        table.add_row("means", f"{len(stats.class_names)} (covariance within each)")
    table.add_row("rank", str(stats.rank))
    table.add_row("explained variance", f"{explained:.2%} of {total:.4g}")
    table.add_row("residual variance", f"{stats.residual:.4g} per dimension")
    table.add_row("top eigenvalues", ", ".join(f"{value:.4g}" for value in stats.eigenvalues[:_TOP].tolist()))
    return table
