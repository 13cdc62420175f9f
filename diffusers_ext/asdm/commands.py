"""The commands `diffusers-ext asdm plan` and `diffusers-ext asdm search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..core.commands import (
    Device,
    Dtype,
    Guidance,
    Height,
    Model,
    Seed,
    Width,
    image_options,
    load_pipeline,
    one_line_errors,
    read_prompts,
    require_prompts,
    say,
)

if TYPE_CHECKING:
    from .plan import PruningPlan


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of A-SDM to the command line."""
    asdm = typer.Typer(
        no_args_is_help=True, help="Prunes a UNet or transformer: A-SDM (arXiv:2312.15516) as rebuilt here."
    )

    @asdm.callback()
    def _group() -> None:
        """Prunes a UNet or transformer: A-SDM (arXiv:2312.15516) as rebuilt here."""

    asdm.command("plan")(one_line_errors(plan))
    asdm.command("search")(one_line_errors(search))
    app.add_typer(asdm, name="asdm")


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder or Hub repository of a pipeline, or with --preset of a UNet or transformer."
        ),
    ],
    target: Annotated[
        float | None, typer.Option(help="Share of the cost that may remain: 0.78 saves 22%.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Use a preset instead: bk-base, bk-small, bk-tiny or incubation; late, flux-lite, flux-mini or ppcl."
        ),
    ] = None,
    by: Annotated[str, typer.Option(help="Measure of the cost: macs, milliseconds or parameters.")] = "macs",
    criterion: Annotated[
        str, typer.Option(help="For transformers: drop, similarity or contiguous, see the documentation.")
    ] = "drop",
    stages: Annotated[int, typer.Option(min=1, help="Number of stages to divide the cuts into.")] = 3,
    stock_only: Annotated[
        bool, typer.Option("--stock-only", help="Only cuts after which plain diffusers loads the network.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line, for calibration.")
    ] = None,
    timesteps: Annotated[int, typer.Option(min=1, help="Number of timesteps to measure at.")] = 4,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Steps of the sampling run.")] = 20,
    guidance_scale: Guidance = 7.5,
    height: Height = None,
    width: Width = None,
    repeats: Annotated[int, typer.Option(min=0, help="Number of time measurements; 0: none.")] = 10,
    seed: Seed = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    output: Annotated[Path, typer.Option(help="File to write the plan to.")] = Path("pruning-plan.json"),
    plot: Annotated[
        Path | None, typer.Option(help="PNG for a plot, with --target; needs matplotlib.")
    ] = None,
) -> None:
    """Measures the cost of every part of a UNet or transformer and the loss without it, and plans the cuts."""
    if (target is None) == (preset is None):
        raise ValueError("Give either --target SHARE or --preset NAME.")
    if preset is not None and (plot, prompts, height, width) != (None,) * 4:
        raise ValueError("--prompts, --plot, --height and --width need --target: a preset is not measured.")
    if preset is None and prompts is None:
        raise ValueError("--target needs --prompts FILE: the network is measured while it samples for them.")
    if preset is not None:
        found = _preset_plan(model, preset)
    else:
        from .calibration import record_calibration_inputs
        from .networks import prunable
        from .report import cuts_table, profile_table, require_matplotlib, save_plot
        from .search import profile_network

        if plot is not None:
            require_matplotlib()
        texts = read_prompts(Path(str(prompts)))
        pipe = load_pipeline(model, dtype, device)
        require_prompts(pipe)
        call = image_options(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, height=height, width=width
        )
        inputs = record_calibration_inputs(pipe, texts, num_timesteps=timesteps, seed=seed, **call)
        profile = profile_network(prunable(pipe), inputs, repeats=repeats, criterion=criterion, progress=True)
        Console().print(profile_table(profile))
        if profile.kind == "UNet":  # those of a transformer are its parts, and intervals of them
            Console().print(cuts_table(profile))
        found = profile.plan(float(str(target)), by, stages, stock_only)
        if plot is not None:
            save_plot(profile, plot, found)
    _finish(found, output)


def search(
    model: Model,
    target: Annotated[
        float, typer.Option(help="Share of the network's time that may remain: 0.6 saves 40%.")
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder of the search; an interrupted one continues.")],
    batch_size: Annotated[
        list[int],
        typer.Option(min=1, help="Rows of a call that has to reach the target; repeat for several."),
    ] = [8, 1],  # noqa: B006
    dataset_name: Annotated[
        str | None, typer.Option(help="Data set, as for --dataset_name of the training scripts.")
    ] = None,
    train_data_dir: Annotated[
        str | None, typer.Option(help="Image folder with captions in metadata.jsonl.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Resize and crop images to this size.")
    ] = None,
    max_train_samples: Annotated[int | None, typer.Option(min=1, help="Use the first images only.")] = None,
    num_validation_images: Annotated[
        int, typer.Option(min=2, help="Images to keep from training, for the loss.")
    ] = 256,
    num_candidates: Annotated[int, typer.Option(min=1, help="Number of plans to train students of.")] = 12,
    rungs: Annotated[int, typer.Option(min=1, help="Number of rungs of successive halving.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the first rung.")] = 100,
    eta: Annotated[
        int, typer.Option(min=2, help="The best 1/eta of a rung are trained to eta times as many steps.")
    ] = 2,
    train_batch_size: Annotated[int, typer.Option(min=1, help="Images of a training step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Learning rate, constant after a warmup.")] = 1e-3,
    optimizer: Annotated[str, typer.Option(help="As --optimizer of the training scripts.")] = "adamw",
    weighting_scheme: Annotated[
        str | None, typer.Option(help="Of flow-matching models, as for the training scripts.")
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Of flow-matching models: tokens of a caption.")
    ] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, fp16 or bf16.")] = None,
    stock_only: Annotated[
        bool, typer.Option("--stock-only", help="Only cuts after which plain diffusers loads the network.")
    ] = False,
    num_inference_steps: Annotated[
        int, typer.Option(min=1, help="Steps of the sampling run that cuts are measured on.")
    ] = 20,
    guidance_scale: Guidance = 7.5,
    repeats: Annotated[int, typer.Option(min=1, help="Number of time measurements.")] = 10,
    seed: Seed = 0,
) -> None:
    """Finds plans that reach a target of measured time, trains a student of each for a few steps, the better ones for longer, and writes the best plan."""
    from .halving import Halving
    from .plan_search import search_plans
    from .report import comparison_text, search_table

    result = search_plans(
        model,
        output_dir,
        target,
        batch_sizes=batch_size,
        num_candidates=num_candidates,
        halving=Halving(steps, rungs, eta),
        stock_only=stock_only,
        num_validation_images=num_validation_images,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        repeats=repeats,
        dataset_name=dataset_name,
        train_data_dir=train_data_dir,
        resolution=resolution,
        max_train_samples=max_train_samples,
        train_batch_size=train_batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer,
        weighting_scheme=weighting_scheme,
        max_sequence_length=max_sequence_length,
        mixed_precision=mixed_precision,
        seed=seed,
    )
    Console().print(search_table(result))
    if len(result.candidates) < num_candidates:
        say(f"There are {len(result.candidates)} different plans, not {num_candidates}.")
    say(comparison_text(result))
    say(f"Written to {output_dir / 'plan.json'}")


def _finish(found: PruningPlan, output: Path) -> None:
    from .report import plan_table

    found.save(output)
    Console().print(plan_table(found))
    if not found.predictions:
        from .presets import parameters_of

        before, *_, after = parameters_of(found)
        say(f"{after:,} of {before:,} parameters are left ({after / before:.1%}).")
    say(f"Written to {output}")


def _preset_plan(model: str, preset: str) -> PruningPlan:
    """A preset needs no weights, so only the config of the pipeline's network or of the network is read."""
    import diffusers
    import torch
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    from .networks import empty_network
    from .presets import preset_plan
    from .transformers import LISTS
    from .unet import ASDMUNet2DConditionModel

    config: Any = None
    for folder in ("unet", "transformer", None):
        named: dict[str, Any] = {} if folder is None else {"subfolder": folder}
        try:
            config = UNet2DConditionModel.load_config(model, **named)
            break
        except OSError:
            if folder is None:
                raise
    kind = config.get("_class_name")
    if kind in LISTS:
        names = getattr(diffusers, kind)._get_init_keys(getattr(diffusers, kind))
        given = {name: value for name, value in config.items() if name in names}
        with init_empty_weights():
            return preset_plan(preset, empty_network({"_class_name": kind, **given}))
    with torch.device("meta"):
        # This class accepts the configs of stock UNets too.
        unet: Any = ASDMUNet2DConditionModel.from_config(config)
    return preset_plan(preset, unet)
