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
    from_score: Annotated[
        bool, typer.Option("--from-score", help="Read them off the denoiser, without data and samples.")
    ] = False,
    calls: Annotated[
        int | None, typer.Option(metavar="N", help="Rows that --from-score shows the denoiser; default: 500.")
    ] = None,
    resume_dir: Annotated[
        Path | None, typer.Option(help="Folder that keeps the answers for --from-score, to resume.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with one prompt per line, for --from-samples and --from-score."),
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Number of eigenpairs to keep.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 8,
    num_inference_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Inference steps of the samples; default: the pipeline's. Grid of --from-score; default: 50.",
        ),
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
    """Fits the Gaussian statistics for teleportation, to images, to a pipeline's own samples, or to its denoiser."""
    if (dataset is not None) + (from_samples is not None) + from_score != 1:
        raise ValueError("Give either --dataset, --from-samples N or --from-score.")
    if prompts is not None and dataset is not None:
        raise ValueError("--prompts goes with --from-samples and --from-score: images have no prompts.")
    _check_from_score(from_score, calls=calls, resume_dir=resume_dir, guidance_scale=guidance_scale)
    if prompt_map and prompts is None and label_column is None:
        raise ValueError("--prompt-map needs prompts: give --prompts FILE, or a --label-column of captions.")
    texts = None if prompts is None else read_prompts(prompts)
    from ..core.images import open_images
    from .gaussian import GaussianStats
    from .prompts import fit_prompt_map
    from .sources import check_rank, encoded_images, pipeline_samples

    batches: Iterable[Any] = ()
    if from_score:
        pipe = load_pipeline(model, dtype, device)
    elif from_samples is not None:
        check_rank(rank, from_samples, texts)
        pipe = load_pipeline(model, dtype, device)
        batches = pipeline_samples(
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
    if from_score:
        given = {"calls": calls, "num_inference_steps": num_inference_steps, "resume_dir": resume_dir}
        options = {name: value for name, value in given.items() if value is not None}
        stats = GaussianStats.from_score(pipe, texts, rank, batch_size=batch_size, seed=seed, **options)
    else:
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


def _check_from_score(from_score: bool, *, guidance_scale: Any, **own: Any) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in own.items() if value is not None]
    if given and not from_score:
        raise ValueError(f"{' and '.join(given)} go with --from-score.")
    if from_score and guidance_scale is not None:
        raise ValueError(
            "--from-score asks for predictions without guidance: leave --guidance-scale out. Teleportation adds the"
            " guidance of each call."
        )


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
    if "score" in stats.calibration:
        score = stats.calibration["score"]
        table.add_row("denoiser calls", f"{score['calls']}, at σ = {score['sigma']:.3g}")
        table.add_row("error of the covariance", f"{score['error']:.0%} (standard error, from two halves)")
    table.add_row("top eigenvalues", ", ".join(f"{value:.4g}" for value in stats.eigenvalues[:_TOP].tolist()))
    return table
