"""The embedded base models: prompt accuracy beside its ceilings, and distances beside their floors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from diffusers_ext.core.images import as_tensor, save_grid
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import held_out_prompts, run_garments, run_scenes

from .framework.bench import Bench
from .framework.cells import Cell
from .framework.samples import CARDS, graded
from .framework.tables import Row, comparison, quality

WRITES = ("base_models.md", "base_models.png", "fashion_ddpm.png")
SCENES, DDPM = card_dir("fashion-scenes"), card_dir("fashion-ddpm")
READS = (SCENES / "unet", SCENES / "vae", SCENES / "text_encoder", *CARDS.values())
GRID = 48


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is."""

    images: int = 1000
    guidances: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    steps: int = 20
    ddpm_steps: tuple[int, ...] = (10, 20, 50)
    seed: int = 0


@lru_cache(maxsize=1)
def load(folder: Path) -> Any:
    """A base model with the solver of the page."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scenes(guidance: float, settings: Settings) -> dict[str, Any]:
    """Images of held-out prompts, graded."""
    prompts = held_out_prompts(settings.images, settings.seed)
    options: dict[str, Any] = {"num_inference_steps": settings.steps, "guidance_scale": guidance}
    return kept(run_scenes(load(SCENES), prompts, seed=settings.seed, **options), prompts)


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
    )
    for name, row in (("base_models.png", "guidance 2"), ("fashion_ddpm.png", next(reversed(pixel)))):
        save_grid(as_tensor(found[row].pictures), 8 if row == "guidance 2" else 16, bench.path(name))
