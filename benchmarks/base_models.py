"""The embedded base models: prompt accuracy beside its ceilings, distances beside their floors, the flow beside the UNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from diffusers_ext.core.images import as_tensor, save_grid
from diffusers_ext.core.pipeline import call_pipeline
from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.flow_models import T5_TOKENS, flow_solver
from diffusers_ext.testbed.runs import held_out_prompts, run_garments, run_scenes

from .flow_runs import call_options, flow_reads, model_folder
from .framework.bench import Bench
from .framework.cells import Cell
from .framework.plots import draw
from .framework.samples import CARDS, graded
from .framework.statistics import paired_ratio
from .framework.tables import Row, comparison, quality
from .framework.timing import take_turns

WRITES = ("base_models.md", "base_models.png", "base_models_flow.png", "fashion_ddpm.png")
SCENES, DDPM = card_dir("fashion-scenes"), card_dir("fashion-ddpm")
READS = (SCENES / "unet", SCENES / "vae", SCENES / "text_encoder", *CARDS.values())
GRID, SHOWN = 48, 10
UNET, FLOW, DPM = "fashion-scenes", "fashion-flow", "DPM++ 2M"


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is."""

    images: int = 1000
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    steps: int = 20
    ddpm_steps: tuple[int, ...] = (10, 20, 50)
    seed: int = 0


@dataclass(frozen=True)
class FlowSettings:
    """How much of the flow is measured."""

    images: int = 600
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    steps: tuple[int, ...] = (8, 20)
    solvers: tuple[str, ...] = ("Euler", DPM)
    rounds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """A model and how it is sampled."""

    model: str
    solver: str
    steps: int
    guidance: float


@lru_cache(maxsize=3)
def load(folder: Path, solver: str = DPM) -> Any:
    """A base model with DPM++ 2M, or with "Euler", the flow's own."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if solver == DPM:
        config = pipe.scheduler.config
        # from_config would take the flow's config for that of a diffusion.
        flow = bool(call_options(pipe))
        pipe.scheduler = flow_solver() if flow else DPMSolverMultistepScheduler.from_config(config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scenes(guidance: float, settings: Settings) -> dict[str, Any]:
    """Images of held-out prompts, graded."""
    prompts = held_out_prompts(settings.images, settings.seed)
    options: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": guidance}
    return kept(run_scenes(load(SCENES), prompts, seed=settings.seed, **options), prompts)


def flow_scenes(folder: Path, point: Point, tokens: int, settings: FlowSettings) -> dict[str, Any]:
    """Images of the flow for the same prompts from the same noise, graded."""
    prompts = held_out_prompts(settings.images, settings.seed)
    options: dict[str, Any] = {"num_inference_steps": point.steps, "guidance_scale": point.guidance}
    options["max_sequence_length"] = tokens
    return kept(run_scenes(load(folder, point.solver), prompts, seed=settings.seed, **options), prompts)


def seconds(folder: Path, settings: FlowSettings) -> dict[str, Any]:
    """Seconds of a call of both models for eight images in 20 guided steps of DPM++ 2M, in turns, on one thread."""
    # Until the end of the cell.
    torch.set_num_threads(1)
    prompts = held_out_prompts(8, settings.seed)
    options: dict[str, Any] = {"height": 32, "width": 64, "num_inference_steps": max(settings.steps)}
    options |= {"guidance_scale": 2.0, "output_type": "np"}
    few, many = ({"max_sequence_length": tokens} for tokens in T5_TOKENS)
    calls = {UNET: (SCENES, {}), FLOW: (folder, few), f"{FLOW}, {T5_TOKENS[1]} T5 tokens": (folder, many)}
    work = {
        name: partial(call_pipeline, load(place), prompts, **options, **more)
        for name, (place, more) in calls.items()
    }
    return take_turns(work, settings.rounds, 1, torch.device("cpu"), "seconds of a call")


def garments(steps: int, settings: Settings) -> dict[str, Any]:
    """Garments of the pixel model."""
    return kept(run_garments(load(DDPM), settings.images, seed=settings.seed, num_inference_steps=steps))


def kept(run: Any, prompts: list[str] | None = None) -> dict[str, Any]:
    """Grades, features, and a grid of images."""
    found = graded(run.images, prompts, calls=run.calls)
    return found | {"pictures": run.images[:GRID].astype("float16")}


@torch.no_grad()
def real(data_dir: Path, decoded: bool, settings: Settings) -> dict[str, Any]:
    """Real test scenes, as they are or through the autoencoder."""
    drawn, prompts = fashion_scenes.scene_arrays(data_dir, "test", settings.images, seed=settings.seed)
    pictures = as_tensor(drawn)
    if decoded:
        pictures = reconstruct(load(SCENES).vae, pictures)
    return graded(pictures.movedim(1, -1).numpy(), prompts)


def main(bench: Bench) -> None:
    """Makes the images that are missing, and writes the page."""
    s = bench.pick(Settings(), Settings(8, (1.0, 2.0), 4, (4,)))
    rows = {
        "real test scenes": Cell(real, (bench.data_dir, False, s), READS),
        "the same through the autoencoder": Cell(real, (bench.data_dir, True, s), READS),
    }
    rows |= {f"guidance {g:g}": Cell(scenes, (g, s), READS) for g in s.guidances}
    pixel = {
        f"DPM++ 2M, {n} steps": Cell(garments, (n, s), (DDPM / "unet", *CARDS.values())) for n in s.ddpm_steps
    }
    found = bench.samples({name: [cell] for name, cell in (rows | pixel).items()})
    parts = []
    for title, kind, names in (("Fashion Scenes", "scenes", rows), ("Fashion DDPM", "garments", pixel)):
        statistics = bench.statistics(kind)
        shown = [Row((name,), found[name]) for name in names]
        parts += [f"## {title}", comparison([""], shown, quality(statistics))]
        parts += [f"Floor (8,000 real train against test images) {statistics.floor('grader'):.3f}."]
    bench.write(
        "base_models.md",
        *parts,
        f"{s.images} images a row, held-out prompts, DPM++ 2M, for scenes {s.steps} steps; 95% intervals over prompts.",
        *flow(bench, s),
    )
    for name, row in (("base_models.png", "guidance 2"), ("fashion_ddpm.png", next(reversed(pixel)))):
        save_grid(as_tensor(found[row].pictures), 8 if row == "guidance 2" else 16, bench.path(name))


# --- the flow beside the UNet ---


def flow(bench: Bench, s: Settings) -> list[str]:
    """The part of the page about the flow: the same prompts and noise by steps, guidance and solver, and seconds."""
    f = bench.pick(FlowSettings(), FlowSettings(8, (1.0, 2.0), (4,), rounds=2))
    folder = model_folder(bench)
    reads, (few, many) = flow_reads(folder), T5_TOKENS
    cells: dict[Point, Cell] = {}
    for steps in f.steps:
        for g in f.guidances:
            unet = replace(s, images=f.images, steps=steps)
            cells[Point(UNET, DPM, steps, g)] = Cell(scenes, (g, unet), READS)
            for solver in f.solvers:
                point = Point(FLOW, solver, steps, g)
                cells[point] = Cell(flow_scenes, (folder, point, few, f), reads)
    most = Point(FLOW, "Euler", max(f.steps), 2.0)
    # With fewer steps, as its calls take several times longer.
    fast = replace(most, steps=min(f.steps))
    slow = replace(fast, model=f"{FLOW}, {many} T5 tokens")
    cells[slow] = Cell(flow_scenes, (folder, fast, many, f), reads)
    found = bench.samples({point: [cell] for point, cell in cells.items()})
    measures = quality(bench.statistics("scenes"))

    def row(point: Point) -> Row:
        control = None if point.model == UNET else found[replace(point, model=UNET, solver=DPM)]
        words = (str(point.steps), f"{point.guidance:g}", point.model, point.solver)
        return Row((*words, f"{found[point].calls:.3g}"), found[point], control)

    header = ["steps", "guidance", "model", "solver", "NFE"]
    table = comparison(header, [row(point) for point in cells if point != slow], measures, "the UNet's")
    pair = [Row((str(few),), found[fast]), Row((str(many),), found[slow], found[fast])]
    unet = replace(most, model=UNET, solver=DPM)
    strips = {f"{p.model}, {p.solver}": found[p].pictures[:SHOWN] for p in (unet, most)}
    draw(bench.path("base_models_flow.png"), strips, captions=held_out_prompts(f.images, f.seed)[:SHOWN])
    timed = Cell(seconds, (folder, f), (*READS, *reads), alone=True)
    return [
        f"## {FLOW} beside {UNET}",
        table,
        f"{f.images} images a row, the same held-out prompts and noise for both models, {few} T5 tokens. A step with"
        " guidance evaluates two rows and counts as one NFE.",
        f"The number of T5's zero tokens, {fast.steps} steps of Euler at guidance {fast.guidance:g}:",
        comparison(["T5 tokens"], pair, measures, f"{few} tokens'"),
        f"Seconds of a call for eight images, {most.steps} steps of DPM++ 2M at guidance {most.guidance:g}, on one thread:",
        seconds_table(bench.run([timed])[timed]),
    ]


def seconds_table(times: Mapping[str, np.ndarray]) -> str:
    """Median seconds, and the share of the UNet's in the same round."""
    rows = []
    for name, values in times.items():
        share = "" if name == UNET else paired_ratio(values, times[UNET]).format(2)
        rows.append([name, f"{np.median(values):.2f}", share])
    return markdown_table(["model", "seconds", "of the UNet's"], rows)
