"""The command `diffusers-ext asdm plan`."""

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
    asdm = typer.Typer(no_args_is_help=True, help="Prunes a UNet: A-SDM (arXiv:2312.15516) as rebuilt here.")

    @asdm.callback()
    def _group() -> None:
        """Prunes a UNet: A-SDM (arXiv:2312.15516) as rebuilt here."""

    asdm.command("plan")(one_line_errors(plan))
    app.add_typer(asdm, name="asdm")


def plan(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub repository of a pipeline, or with --preset of a UNet.")
    ],
    target: Annotated[
        float | None, typer.Option(help="Share of the cost that may remain: 0.78 saves 22%.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Use a preset instead: bk-base, bk-small, bk-tiny or incubation."),
    ] = None,
    by: Annotated[str, typer.Option(help="Measure of the cost: macs, milliseconds or parameters.")] = "macs",
    stages: Annotated[int, typer.Option(min=1, help="Number of stages to divide the cuts into.")] = 3,
    stock_only: Annotated[
        bool, typer.Option("--stock-only", help="Only cuts after which plain diffusers loads the UNet.")
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
    """Measures the cost of every part of a UNet and the loss without it, and plans the cuts."""
    if (target is None) == (preset is None):
        raise ValueError("Give either --target SHARE or --preset NAME.")
    if preset is not None and (plot, prompts, height, width) != (None,) * 4:
        raise ValueError("--prompts, --plot, --height and --width need --target: a preset is not measured.")
    if preset is None and prompts is None:
        raise ValueError("--target needs --prompts FILE: the UNet is measured while it samples for them.")
    if preset is not None:
        found = _preset_plan(model, preset)
    else:
        from .calibration import record_calibration_inputs
        from .report import cuts_table, profile_table, require_matplotlib, save_plot
        from .search import profile_unet

        if plot is not None:
            require_matplotlib()
        texts = read_prompts(Path(str(prompts)))
        pipe = load_pipeline(model, dtype, device)
        require_prompts(pipe)
        call = image_options(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, height=height, width=width
        )
        inputs = record_calibration_inputs(pipe, texts, num_timesteps=timesteps, seed=seed, **call)
        profile = profile_unet(pipe.unet, inputs, repeats=repeats, progress=True)
        Console().print(profile_table(profile), cuts_table(profile), sep="\n")
        found = profile.plan(float(str(target)), by, stages, stock_only)
        if plot is not None:
            save_plot(profile, plot, found)
    _finish(found, output)


def _finish(found: PruningPlan, output: Path) -> None:
    from .report import plan_table

    found.save(output)
    Console().print(plan_table(found))
    say(f"Written to {output}")


def _preset_plan(model: str, preset: str) -> PruningPlan:
    """A preset needs no weights, so only the config of the pipeline's UNet or of the UNet is read."""
    import torch
    from diffusers import UNet2DConditionModel

    from .plan import preset_plan
    from .unet import ASDMUNet2DConditionModel

    config: Any
    try:
        config = UNet2DConditionModel.load_config(model, subfolder="unet")
    except OSError:
        config = UNet2DConditionModel.load_config(model)
    with torch.device("meta"):
        # This class accepts the configs of stock UNets too.
        unet: Any = ASDMUNet2DConditionModel.from_config(config)
    return preset_plan(preset, unet)
