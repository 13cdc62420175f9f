"""The command line: `diffusers-ext fit-gaussian | istd | convert | asdm | demo | version`.

torch and diffusers are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .extras import MissingExtraError, require

if TYPE_CHECKING:
    from .asdm.plan import PruningPlan
    from .teleport.gaussian import GaussianStats

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Published sampling, noise, smoothness and pruning methods as plug-ins for Diffusers.",
)

_TOP = 8
_DTYPES = ("float32", "float16", "bfloat16")


def _one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What the user can mend is one red line and exit code 1; anything else keeps its traceback."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, MissingExtraError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            Console(stderr=True, soft_wrap=True).print(f"[red]Error: {escape(text)}[/red]", highlight=False)
            raise typer.Exit(1) from None

    return wrapper


@app.command("fit-gaussian")
@_one_line_errors
def fit_gaussian(
    model: Annotated[str, typer.Argument(help="Pipeline: a folder or a Hub repository.")],
    dataset: Annotated[
        str | None, typer.Option(help="Fit to pictures: a folder, or a data set on the Hub.")
    ] = None,
    from_samples: Annotated[
        int | None, typer.Option(metavar="N", help="Fit to N samples of the pipeline itself.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line, for --from-samples.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Eigenpairs to keep.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    num_inference_steps: Annotated[int | None, typer.Option(min=1, help="Of every sample.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Of every sample.")] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Resize and crop pictures to this.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set on the Hub.")] = "train",
    image_column: Annotated[str, typer.Option(help="Its column of pictures.")] = "image",
    label_column: Annotated[
        str | None, typer.Option(help="Its column of labels, for one mean a label.")
    ] = None,
    prompt_map: Annotated[
        bool, typer.Option("--prompt-map", help="Learn every prompt's mean from its embeddings.")
    ] = False,
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help=f"Of the pipeline: {', '.join(_DTYPES)}.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("gaussian-stats"),
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Upload there too.")] = None,
) -> None:
    """Fits the Gaussian statistics that teleportation needs, to pictures or to a pipeline's own samples."""
    if (dataset is None) == (from_samples is None):
        raise ValueError("Give either --dataset or --from-samples N.")
    if prompts is not None and from_samples is None:
        raise ValueError("--prompts goes with --from-samples: pictures have no prompts.")
    if prompt_map and prompts is None and label_column is None:
        raise ValueError("--prompt-map learns from prompts: give --prompts FILE or --label-column captions.")
    texts = None if prompts is None else _read_prompts(prompts)
    from .teleport.gaussian import GaussianStats
    from .teleport.pictures import open_pictures
    from .teleport.prompt_map import fit_prompt_map
    from .teleport.sources import check_rank, encoded_images, pipeline_samples

    if from_samples is not None:
        check_rank(rank, from_samples, texts)
        pipe = _load_pipeline(model, dtype, device)
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
        # Before the pipeline is loaded, which takes longer.
        pictures = open_pictures(
            _load_pictures(str(dataset), split), labels=label_column, image_column=image_column
        )
        pipe = _load_pipeline(model, dtype, device)
        batches = encoded_images(
            pipe,
            pictures,
            batch_size=batch_size,
            resolution=resolution,
            seed=seed,
        )
    stats = GaussianStats.fit(batches, rank)
    if prompt_map:
        stats = fit_prompt_map(pipe, stats)
    stats.save_pretrained(output)
    console = Console()
    console.print(_table(stats))
    console.print(f"Written to {escape(str(output))}", highlight=False, soft_wrap=True)
    if push_to_hub is not None:
        console.print(f"Uploaded to {escape(str(stats.push_to_hub(push_to_hub)))}", soft_wrap=True)


@app.command()
@_one_line_errors
def istd(
    model: Annotated[str, typer.Argument(help="Pipeline: a folder or a Hub repository.")],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line; the paper takes 500.")],
    smooth_lora: Annotated[str | None, typer.Option(help="Put this Smooth-LoRA on first.")] = None,
    num_inference_steps: Annotated[int, typer.Option(min=1)] = 50,
    guidance_scale: float = 7.5,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 11,
    cache_dir: Annotated[Path | None, typer.Option(help="Go on there after an interruption.")] = None,
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help=f"Of the pipeline: {', '.join(_DTYPES)}.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
) -> None:
    """Measures how evenly a text-to-image model's pictures change between two noises (ISTD)."""
    texts = _read_prompts(prompts)
    from .evaluation.istd import compute_istd
    from .smooth_lora.adapter import load_smooth_lora

    pipe = _load_pipeline(model, dtype, device)
    if smooth_lora is not None:
        load_smooth_lora(pipe, smooth_lora)
    call: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    call |= {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    found = compute_istd(pipe, texts, seed=seed, batch_size=batch_size, cache_dir=cache_dir, **call)
    table = Table("figure", "value", title=f"{len(texts)} paths of 11 pictures in [−1, 1]")
    table.add_row("ISTD", f"{found.istd:.4g}")
    table.add_row("mean adjacent distance", f"{found.mean_distance:.4g}")
    table.add_row("std/mean", f"{found.relative:.4g}")
    table.add_row("distance of the ends", f"{found.endpoint_distance:.4g}")
    Console().print(table)


def _read_prompts(path: Path) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one a line.")
    return prompts


def _load_pipeline(model: str, dtype: str, device: str | None) -> Any:
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    import torch
    from diffusers import DiffusionPipeline

    import diffusers_ext.registration  # noqa: F401  so that saved pipelines with our components load

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe: Any = DiffusionPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    return pipe.to(device)


def _load_pictures(dataset: str, split: str) -> Any:
    if Path(dataset).is_dir():
        return dataset
    if Path(dataset).exists() or dataset.startswith((".", "/", "~")):
        raise ValueError(f"{dataset} is not a folder of pictures.")
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
    table.add_row("residual variance", f"{stats.residual:.4g} a dimension")
    table.add_row("top eigenvalues", ", ".join(f"{value:.4g}" for value in stats.eigenvalues[:_TOP].tolist()))
    return table


convert = typer.Typer(no_args_is_help=True, help="Turns published weights into folders of this package.")
app.add_typer(convert, name="convert")


@convert.command("npnet")
@_one_line_errors
def convert_npnet(
    checkpoint: Annotated[Path, typer.Argument(help="The released .pth, or its .safetensors port.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    svd_attention: Annotated[
        bool,
        typer.Option(help="As the official inference code runs them; the SDXL weights were trained without."),
    ] = True,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Upload there too.")] = None,
) -> None:
    """Turns released golden-noise weights into a folder for NPNetModel.from_pretrained."""
    from .golden_noise.npnet import NPNetModel

    npnet = NPNetModel.from_original(checkpoint, svd_attention=svd_attention)
    npnet.save_pretrained(output)
    console = Console()
    console.print(
        f"{npnet.num_parameters():,} parameters written to {escape(str(output))}",
        highlight=False,
        soft_wrap=True,
    )
    if push_to_hub is not None:
        npnet.push_to_hub(push_to_hub)
        console.print(f"Uploaded to {escape(push_to_hub)}", soft_wrap=True)


asdm = typer.Typer(no_args_is_help=True, help="Prunes a UNet: A-SDM (arXiv:2312.15516) as rebuilt here.")
app.add_typer(asdm, name="asdm")


@asdm.command("plan")
@_one_line_errors
def asdm_plan(
    model: Annotated[
        str, typer.Argument(help="Pipeline, or with --preset a UNet: a folder or a Hub repository.")
    ],
    target: Annotated[
        float | None, typer.Option(help="Share of the cost that may be left: 0.78 saves 22%.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Instead: bk-base, bk-small, bk-tiny or incubation.")
    ] = None,
    by: Annotated[str, typer.Option(help="The cost: macs, milliseconds or parameters.")] = "macs",
    stages: Annotated[int, typer.Option(min=1, help="Divide the cuts into so many stages.")] = 3,
    stock_only: Annotated[
        bool, typer.Option("--stock-only", help="Only what loads in diffusers without this package.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file, one prompt a line, each a picture to measure on.")
    ] = None,
    timesteps: Annotated[int, typer.Option(min=1, help="Noise levels to measure at.")] = 4,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Of the run they are taken from.")] = 20,
    guidance_scale: float = 7.5,
    height: Annotated[int | None, typer.Option(min=1, help="Of the pictures.")] = None,
    width: Annotated[int | None, typer.Option(min=1)] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Measure milliseconds so often; 0: not at all.")] = 10,
    seed: int = 0,
    dtype: Annotated[str, typer.Option(help=f"Of the pipeline: {', '.join(_DTYPES)}.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    output: Annotated[Path, typer.Option(help="Plan to write.")] = Path("pruning-plan.json"),
    plot: Annotated[Path | None, typer.Option(help="PNG to write, with --target.")] = None,
) -> None:
    """Measures what every part of a UNet costs and is worth, and plans which to cut for a speed-up."""
    if (target is None) == (preset is None):
        raise ValueError("Give either --target SHARE or --preset NAME.")
    if preset is not None and (plot, prompts, height, width) != (None,) * 4:
        raise ValueError(
            "--prompts, --plot, --height and --width go with --target: a preset measures nothing."
        )
    if preset is None and prompts is None:
        raise ValueError("--target needs --prompts FILE: the UNet is measured on what it samples for them.")
    if preset is not None:
        plan = _preset_plan(model, preset)
    else:
        from .asdm.report import analysis_table, cuts_table, save_plot
        from .asdm.search import analyse_pruning
        from .asdm.sensitivity import record_probes

        texts = _read_prompts(Path(str(prompts)))
        pipe = _load_pipeline(model, dtype, device)
        call: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        call |= {name: value for name, value in (("height", height), ("width", width)) if value is not None}
        probes = record_probes(pipe, texts, num_timesteps=timesteps, seed=seed, **call)
        analysis = analyse_pruning(pipe.unet, probes, repeats=repeats, progress=True)
        Console().print(analysis_table(analysis), cuts_table(analysis), sep="\n")
        plan = analysis.plan(float(str(target)), by, stages, stock_only)
        if plot is not None:
            save_plot(analysis, plot, plan)
    _finish_plan(plan, output)


def _finish_plan(plan: PruningPlan, output: Path) -> None:
    from .asdm.report import plan_table

    plan.save(output)
    console = Console()
    console.print(plan_table(plan))
    console.print(f"Written to {escape(str(output))}", highlight=False, soft_wrap=True)


def _preset_plan(model: str, preset: str) -> PruningPlan:
    """It needs no weights, so only the config is read: a pipeline's UNet's or a UNet's own."""
    import torch
    from diffusers import UNet2DConditionModel

    from .asdm.plan import preset_plan
    from .asdm.unet import ASDMUNet2DConditionModel

    config: Any
    try:
        config = UNet2DConditionModel.load_config(model, subfolder="unet")
    except OSError:
        config = UNet2DConditionModel.load_config(model)
    with torch.device("meta"):
        # This class takes the configs of both.
        unet: Any = ASDMUNet2DConditionModel.from_config(config)
    return preset_plan(preset, unet)


@app.command()
@_one_line_errors
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder to write.")] = Path("diffusers_ext_demo"),
    num_images: Annotated[int, typer.Option(min=8, help="Pictures a variant.")] = 64,
    seed: int = 0,
) -> None:
    """Runs the methods on the embedded models and writes one page that compares them."""
    from .demo import run

    run(output_dir, num_images, seed)


@app.command()
def version() -> None:
    """Prints the version."""
    from . import __version__

    typer.echo(__version__)
