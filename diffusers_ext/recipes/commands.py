"""`diffusers-ext generate`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.commands import (
    Device,
    Dtype,
    Height,
    OptionalGuidance,
    OptionalSteps,
    Output,
    RecipeOption,
    Scheduler,
    Width,
    call_options,
    default_model,
    load_pipeline,
    one_line_errors,
    read_prompts,
    say,
    set_scheduler,
    with_options_of,
)
from ..core.extras import find_path
from ..core.methods import ROOMS

DEFAULT_MODEL = "fashion-scenes"


def add_commands(app: typer.Typer) -> None:
    """Adds the command, with the options of all methods."""
    options = {room.key: room.load(room.options) for room in ROOMS if room.options is not None}
    app.command()(one_line_errors(with_options_of(generate, options)))


def generate(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help="Folder, Hub repository or embedded model, by default fashion-scenes; and the prompt.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line, in place of PROMPT.")
    ] = None,
    recipe: RecipeOption = None,
    scheduler: Scheduler = None,
    steps: OptionalSteps = None,
    guidance: OptionalGuidance = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image; the next ones have the next seeds.")
    ] = 0,
    num_images: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    height: Height = None,
    width: Width = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call of the pipeline.")] = 4,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also generate the images of the same seeds without the methods."),
    ] = False,
    save_recipe: Annotated[
        Path | None, typer.Option(help="Folder to save the methods and the call to, as a recipe.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    output_dir: Output = Path("images"),
    extra: Any = None,
) -> None:
    """Generates images, with methods or a recipe, and writes them with their metadata."""
    model, texts = _model_and_texts(list(words or ()), prompts)
    from ..core.images import side_by_side
    from ..core.schedules import unwrapped
    from ..training.cards import portable
    from .recipe import Recipe

    pipe = load_pipeline(model, dtype, device)
    pipe.set_progress_bar_config(disable=True)
    _check_pipeline(pipe, texts)
    set_scheduler(pipe, scheduler)
    used = _apply(pipe, recipe, extra or {})
    if (compare or save_recipe) and used is None:
        raise ValueError("--compare and --save-recipe need a --recipe or a method, such as --teleport STATS.")
    call = {**(used.call if used else {}), **call_options(pipe, steps, guidance, height, width)}
    rows = [(text, seed + n) for n, text in enumerate(t for t in texts for _ in range(num_images))]
    output_dir.mkdir(parents=True, exist_ok=True)
    about = {
        "model": portable(model),
        "scheduler": type(unwrapped(pipe.scheduler)).__name__,
        "options": call,
        "software": _software(),
    }
    images, seconds = _images(pipe, rows, call, batch_size)
    lines = used.lines() if used else {}
    records = _write(output_dir, "", images, rows, {**about, "methods": lines})
    say(f"{len(images)} images in {seconds:.3g} s, {seconds / len(images):.3g} s each" + _with(lines))
    if used is not None and save_recipe is not None:
        Recipe(used.methods, used.base, call).save_pretrained(save_recipe)
        say(f"Recipe written to {save_recipe}")
    if used is not None and compare:
        used.remove(pipe)
        plain, seconds = _images(pipe, rows, call, batch_size)
        records += _write(output_dir, "-plain", plain, rows, {**about, "methods": {}})
        side_by_side(plain, images).save(output_dir / "comparison.png")
        say(f"{len(plain)} images in {seconds:.3g} s, {seconds / len(plain):.3g} s each without them")
    lines_of_json = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (output_dir / "metadata.jsonl").write_text(lines_of_json, encoding="utf-8")
    say(f"Written to {output_dir}")


def _model_and_texts(words: list[str], prompts: Path | None) -> tuple[str, list[str | None]]:
    """The model, and the prompts or [None]."""
    if len(words) > (2 if prompts is None else 1):
        expected = "[MODEL] PROMPT" if prompts is None else "[MODEL] with --prompts"
        raise ValueError(
            f"Expected {expected}, got {len(words)} arguments: put a prompt of several words into quotes."
        )
    if prompts is not None:
        return (words[0] if words else default_model(DEFAULT_MODEL)), list(read_prompts(prompts))
    if not words:
        raise ValueError('Give a prompt, such as diffusers-ext generate "a red bag", or --prompts FILE.')
    if len(words) == 2:
        return words[0], [words[1]]
    if (Path(find_path(words[0])) / "model_index.json").is_file():
        return words[0], [None]
    return default_model(DEFAULT_MODEL), [words[0]]


def _check_pipeline(pipe: Any, texts: Sequence[str | None]) -> None:
    from ..core.hooks import parameters_of

    names, kind = parameters_of(pipe), type(pipe).__name__
    if "num_frames" in names:
        raise ValueError(f"{kind} makes videos: generate is for images.")
    if "prompt" in names and texts == [None]:
        raise ValueError(f"{kind} needs a prompt: give it after the model, or --prompts FILE.")
    if "prompt" not in names and texts != [None]:
        raise ValueError(f"{kind} takes no prompts: give the model alone.")
    if "prompt" not in names and "batch_size" not in names:
        raise ValueError(f"{kind} takes neither prompts nor batch_size: it is not supported.")


def _apply(pipe: Any, name: str | None, extra: dict[str, dict[str, Any]]) -> Any:
    """The recipe of what the options put on the pipeline; None if they ask for nothing."""
    from .recipe import Recipe

    rooms = {room.key: room for room in ROOMS}
    asked = [rooms[key].load(str(rooms[key].options))(pipe, **options) for key, options in extra.items()]
    if name is None:
        return Recipe.from_pipe(pipe) if any(asked) else None
    if any(asked):
        raise ValueError("Give either --recipe or options of methods: a recipe has its methods already.")
    recipe = Recipe.from_pretrained(find_path(name))
    recipe.apply(pipe)
    return recipe


def _images(
    pipe: Any, rows: Sequence[tuple[str | None, int]], call: dict[str, Any], batch_size: int
) -> tuple[list[Any], float]:
    """Images of (prompt, seed), and the seconds of the calls. Every image has a generator of its own."""
    import torch

    from ..core.pipeline import call_pipeline

    images: list[Any] = []
    start = time.perf_counter()
    for low in range(0, len(rows), batch_size):
        batch = rows[low : low + batch_size]
        texts = [text for text, _ in batch]
        given: dict[str, Any] = {"batch_size": len(batch)} if texts[0] is None else {"prompt": texts}
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        images += call_pipeline(pipe, **given, **call, generator=generators, return_dict=False)[0]
    return images, time.perf_counter() - start


def _write(
    folder: Path,
    suffix: str,
    images: Sequence[Any],
    rows: Sequence[tuple[str | None, int]],
    about: dict[str, Any],
) -> list[dict[str, Any]]:
    """Writes the images, and returns the lines of `metadata.jsonl` about them."""
    from ..core.images import save_png

    records = []
    for number, (image, (text, seed)) in enumerate(zip(images, rows)):
        found = {"prompt": text or "", "seed": seed, **about}
        name = f"{number:04d}{suffix}.png"
        save_png(image, folder / name, found)
        records.append({"file_name": name, **found})
    return records


def _software() -> str:
    from .files import version

    return f"diffusers-ext {version()}"


def _with(lines: dict[str, str]) -> str:
    return f" with {', '.join(lines)}" if lines else ""
