"""`diffusers-ext istd`, `interpolate`, `invert` and `edit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..core.commands import (
    Device,
    Dtype,
    Guidance,
    Height,
    Model,
    OptionalGuidance,
    OptionalSteps,
    Output,
    RecipeOption,
    Scheduler,
    Seed,
    Steps,
    Width,
    call_options,
    image_options,
    load_pipeline,
    model_and,
    one_line_errors,
    read_prompts,
    require_prompts,
    say,
    set_scheduler,
)
from ..core.extras import find_path

_MODEL = "fashion-scenes"
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] PROMPT",
        help="Folder, Hub repository or embedded model, by default fashion-scenes; and the prompt of the first image.",
    ),
]
ImageWords = Annotated[
    list[str],
    typer.Argument(
        metavar="[MODEL] IMAGE",
        help="Folder, Hub repository or embedded model, by default fashion-scenes; and the file of the image.",
    ),
]
Lora = Annotated[str | None, typer.Option(help="Smooth-LoRA to apply: a file, a folder or a Hub repository.")]
Prompt = Annotated[str, typer.Option(help="Description of the image.")]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands of Smooth-LoRA to the command line."""
    for command in (istd, interpolate, invert, edit):
        app.command()(one_line_errors(command))


def apply_options(
    pipe: Any,
    smooth_lora: Annotated[
        str | None, typer.Option(metavar="LORA", help="Smooth-LoRA: a file, a folder or a Hub repository.")
    ] = None,
    lora_scale: Annotated[float, typer.Option(help="With --smooth-lora: scale of the LoRA.")] = 1.0,
) -> bool:
    """Applies a Smooth-LoRA as the options of the command line say, and returns whether they ask for it."""
    if smooth_lora is None:
        if lora_scale != 1:
            raise ValueError("--lora-scale goes with --smooth-lora LORA.")
        return False
    from .apply import apply_smooth_lora

    apply_smooth_lora(pipe, find_path(smooth_lora))
    if lora_scale != 1:
        pipe.set_adapters("smooth", lora_scale)
    return True


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
        apply_smooth_lora(pipe, find_path(smooth_lora))
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


def interpolate(
    words: Words,
    to: Annotated[str | None, typer.Option(help="Prompt of the last image; default: the same.")] = None,
    num_frames: Annotated[int, typer.Option(min=2, help="Number of images, with both ends.")] = 12,
    recipe: RecipeOption = None,
    smooth_lora: Lora = None,
    scheduler: Scheduler = None,
    steps: OptionalSteps = None,
    guidance: OptionalGuidance = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the last one has the next seed.")] = 0,
    height: Height = None,
    width: Width = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call of the pipeline.")] = 8,
    dtype: Dtype = "float32",
    device: Device = None,
    output_dir: Output = Path("interpolation"),
) -> None:
    """Generates images along a path between two noises and two prompts, and an animation of them."""
    model, prompt = model_and(words, _MODEL, "PROMPT")
    import torch

    from . import interpolation

    pipe = _load(model, dtype, device, scheduler, recipe, smooth_lora)
    frames = interpolation.interpolate(
        pipe,
        [prompt, prompt if to is None else to],
        generator=[torch.Generator().manual_seed(seed + end) for end in range(2)],
        num_frames=num_frames,
        batch_size=batch_size,
        **call_options(pipe, steps, guidance, height, width),
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    images = _pil(frames)
    about = {"prompt": prompt, "to": prompt if to is None else to, "seed": str(seed)}
    for number, image in enumerate(images):
        _save(image, output_dir / f"{number:04d}.png", {**about, "frame": f"{number + 1} of {num_frames}"})
    images[0].save(
        output_dir / "animation.gif", save_all=True, append_images=images[1:], duration=100, loop=0
    )
    say(f"{num_frames} images and animation.gif written to {output_dir}")


def invert(
    words: ImageWords,
    prompt: Prompt = "",
    recipe: RecipeOption = None,
    smooth_lora: Lora = None,
    steps: Steps = 50,
    guidance: Annotated[
        float,
        typer.Option("--guidance", help="Guidance scale; larger values than 1 do not return to the image."),
    ] = 1.0,
    dtype: Dtype = "float32",
    device: Device = None,
    output_dir: Output = Path("inversion"),
) -> None:
    """Computes the noise from which the model generates an image, and generates the image again from it."""
    model, path = model_and(words, _MODEL, "IMAGE")
    import torch

    from ..core.storage import write_tensors
    from .editing import edit as edit_images

    pipe = _load(model, dtype, device, None, recipe, smooth_lora)
    image, noise, call = _inverted(pipe, path, prompt, steps, guidance)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_tensors(output_dir / "noise.safetensors", {"noise": noise.cpu()})
    call |= call_options(pipe, None, guidance)
    images = edit_images(pipe, prompt, prompt, latents=noise, strength=0.0, output_type="np", **call).images
    error = float((torch.from_numpy(images[0]) - image).square().mean())
    _save(_pil(images)[0], output_dir / "reconstruction.png", {"prompt": prompt, "options": call})
    say(f"The image that is generated again differs by {error:.3g} (mean square of values in [0, 1])")
    say(f"noise.safetensors and reconstruction.png written to {output_dir}")


def edit(
    words: ImageWords,
    to: Annotated[str, typer.Option(help="Description of the edited image.")],
    prompt: Prompt = "",
    strength: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps that use the new description.")
    ] = 0.7,
    recipe: RecipeOption = None,
    smooth_lora: Lora = None,
    steps: Steps = 50,
    guidance: OptionalGuidance = None,
    dtype: Dtype = "float32",
    device: Device = None,
    output_dir: Output = Path("edit"),
) -> None:
    """Edits an image: inverts it, and generates it again with another prompt."""
    model, path = model_and(words, _MODEL, "IMAGE")
    from .editing import edit as edit_images

    pipe = _load(model, dtype, device, None, recipe, smooth_lora)
    _, noise, call = _inverted(pipe, path, prompt, steps, 1.0)
    call |= call_options(pipe, None, guidance)
    images = edit_images(pipe, prompt, to, latents=noise, strength=strength, output_type="np", **call).images
    output_dir.mkdir(parents=True, exist_ok=True)
    about = {"prompt": prompt, "to": to, "strength": strength, "options": call}
    _save(_pil(images)[0], output_dir / "edited.png", about)
    say(f"edited.png written to {output_dir}")


# --- shared by the commands ---


def _load(
    model: str,
    dtype: str,
    device: str | None,
    scheduler: str | None,
    recipe: str | None,
    smooth_lora: str | None,
) -> Any:
    from ..recipes.recipe import Recipe
    from .apply import apply_smooth_lora

    pipe = load_pipeline(model, dtype, device)
    require_prompts(pipe)
    set_scheduler(pipe, scheduler)
    if recipe is not None:
        Recipe.from_pretrained(find_path(recipe)).apply(pipe)
    if smooth_lora is not None:
        apply_smooth_lora(pipe, find_path(smooth_lora))
    return pipe


def _inverted(
    pipe: Any, path: str, prompt: str, steps: int, guidance: float
) -> tuple[Any, Any, dict[str, Any]]:
    """The image (h, w, 3) in [0, 1], its noise, and the arguments of the call that generates it again."""
    from PIL import Image

    from ..core.images import as_tensor, encode_images
    from ..core.latents import latents_layout
    from .inversion import ddim_invert

    with Image.open(path) as opened:
        image = as_tensor(opened.convert("RGB"))
    call: dict[str, Any] = {"num_inference_steps": steps}
    noise = ddim_invert(pipe, encode_images(pipe, image), prompt, guidance_scale=guidance, **call)
    if latents_layout(pipe) == "patches":  # packed noise does not tell the size of its image
        call |= {"height": image.shape[2], "width": image.shape[3]}
    return image[0].movedim(0, -1), noise, call


def _pil(images: Any) -> list[Any]:
    from PIL import Image

    return [Image.fromarray((image * 255).round().astype("uint8")) for image in images]


def _save(image: Any, path: Path, texts: dict[str, Any]) -> None:
    from ..core.images import save_png

    save_png(image, path, texts)
