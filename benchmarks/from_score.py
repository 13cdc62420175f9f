"""Statistics for teleportation read off the denoiser, against those of the data and of the model's own samples."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import held_out_prompts, run_garments, run_scenes

from .flow_runs import PARTS, call_options
from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .framework.plots import Panel, Series, draw
from .framework.samples import CARDS, Samples, graded
from .framework.statistics import Statistics
from .framework.tables import Measure, Row, comparison, quality
from .pixel_pipeline import PixelPipeline
from .teleport_flow import grid_of, make_solver

WRITES = ("from_score.md", "from_score.png")
SIZE = {"height": fashion_scenes.HEIGHT, "width": fashion_scenes.WIDTH}
GUIDANCE = 2.0
SAMPLE_STEPS = 20
SHOWN = 12


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is.

    Attributes:
        models: whose statistics are fitted.
        calls: of the denoiser, for the score.
        samples: numbers of samples; the first costs as many calls as the score.
        prompts: of the score.
        images, seeds: of a row.
        fine: steps of the reference.
    """

    models: tuple[str, ...]
    calls: int
    samples: tuple[int, ...]
    prompts: int
    images: int
    seeds: tuple[int, ...]
    fine: int


@dataclass(frozen=True)
class Run:
    """How a model's images are made: a solver, its steps, and how many of them the map replaces."""

    solver: str
    steps: int
    skip: int
    shift: float = 1.0


def run_of(model: str) -> Run:
    """As on the pages of teleportation, where it matters most."""
    if model == "ddpm":
        return Run("DPM++ 2M", 20, 6)
    if model == "scenes":
        return Run("DPM++ 2M", 6, 2)
    steps, skip = grid_of("Euler", 3.0, 4, 2.0) or (5, 1)
    return Run("Euler", steps, skip, 3.0)


@lru_cache(maxsize=1)
def load(model: str) -> Any:
    """The pipeline with the solver of its images."""
    pipe: Any = DiffusionPipeline.from_pretrained(card_dir(f"fashion-{model}"), dtype=torch.float32)
    run, config = run_of(model), pipe.scheduler.config
    solver: Any = diffusers.DPMSolverMultistepScheduler
    scheduler = make_solver(run.solver, run.shift) if model == "flow" else solver.from_config(config)
    pipe.scheduler = scheduler
    if model == "ddpm":
        pipe = PixelPipeline(pipe.unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- the statistics ---


def training_prompts(count: int) -> list[str]:
    """As frequent as in training, so that some are there more than once."""
    return [fashion_scenes.caption(scene) for scene in fashion_scenes.draw_scenes("train", count, 5)]


def arrays_of(stats: dx.GaussianStats, calls: int, start: float) -> dict[str, Any]:
    """What a cell keeps of statistics."""
    return {**stats.to_dict_of_arrays(), "calls made": calls, "seconds": time.perf_counter() - start}


@torch.no_grad()
def from_score(model: str, calls: int, count: int) -> dict[str, Any]:
    """The statistics of the score."""
    pipe, start = load(model), time.perf_counter()
    prompts = None if model == "ddpm" else training_prompts(count)
    options = {} if prompts is None else {**SIZE, **call_options(pipe)}
    stats = dx.GaussianStats.from_score(pipe, prompts, calls=calls, batch_size=50, progress=False, **options)
    spent = stats.calibration["score"]["calls"] if stats.unconditional is None else calls
    return arrays_of(with_map(pipe, stats), spent, start)


@torch.no_grad()
def samples(model: str, count: int) -> dict[str, Any]:
    """The model's own samples, two for each prompt, as a covariance within prompts needs."""
    pipe, start = load(model), time.perf_counter()
    if model == "ddpm":
        run = run_garments(pipe, count, seed=99, batch_size=50, num_inference_steps=SAMPLE_STEPS)
        return {
            "samples": 2 * run.images.reshape(count, 1, 32, 32) - 1,
            "seconds": time.perf_counter() - start,
        }
    prompts = [name for name in training_prompts(count // 2 + 1) for _ in (0, 1)]
    options = {**SIZE, **call_options(pipe), "num_inference_steps": SAMPLE_STEPS, "guidance_scale": 1.0}
    batches = dx.pipeline_samples(
        pipe, count, prompts=prompts, seed=10_000, batch_size=50, progress=False, **options
    )
    drawn = torch.cat([batch[0] for batch in batches])
    return {"samples": drawn.numpy(), "seconds": time.perf_counter() - start}


def from_samples(model: str, kept: Arrays, count: int) -> dx.GaussianStats:
    """The statistics of the first samples."""
    drawn = torch.from_numpy(kept["samples"][:count])
    if model == "ddpm":
        return dx.GaussianStats.fit([drawn], rank=min(64, count - 1))
    names = [name for name in training_prompts(len(kept["samples"]) // 2 + 1) for _ in (0, 1)][:count]
    fitted = dx.GaussianStats.fit([(drawn, names)], rank=min(64, count - len(set(names))))
    return with_map(load(model), fitted)


def with_map(pipe: Any, stats: dx.GaussianStats) -> dx.GaussianStats:
    """With a prompt map, if there are prompts; with too few of them for a map, what is left is the part of all samples."""
    if stats.class_means is None or stats.unconditional is None:
        return stats
    try:
        return dx.fit_prompt_map(pipe, stats, rank=min(256, len(stats.class_means) - 1), **call_options(pipe))
    except ValueError:
        return stats.unconditional


def statistics_of(bench: Bench, model: str, settings: Settings) -> tuple[dict[str, Path], dict[str, Any]]:
    """A folder of each kind of statistics, and by name (calls, seconds)."""
    card = card_dir(f"fashion-{model}")
    reads = tuple(card / part for part in (("unet",) if model == "ddpm" else parts_of(model)))
    score = Cell(from_score, (model, settings.calls, settings.prompts), reads)
    drawn = Cell(samples, (model, settings.samples[-1]), reads)
    found = bench.run([score, drawn])
    made, spent = found[score], found[drawn]
    data = dx.GaussianStats.from_pretrained(card / "gaussian")
    costs = {"data": ("", ""), "score": (str(int(made["calls made"])), f"{float(made['seconds']):.0f}")}
    arrays = {name: value for name, value in made.items() if name not in ("calls made", "seconds")}
    kinds = {"data": data, "score": dx.GaussianStats.from_arrays(arrays), "isotropic": data.isotropic()}
    for count in settings.samples:
        name, share = f"{count} samples", count / settings.samples[-1]
        kinds[name] = from_samples(model, spent, count)
        costs[name] = (f"{count * SAMPLE_STEPS:,}", f"{share * float(spent['seconds']):.0f}")
    folders = {name: bench.cache_dir / "from_score" / model / name.replace(" ", "-") for name in kinds}
    for name, stats in kinds.items():
        stats.save_pretrained(folders[name])
    return folders, costs


def parts_of(model: str) -> tuple[str, ...]:
    """The folders of a text-to-image model that its predictions depend on."""
    return PARTS if model == "flow" else ("unet", "vae", "text_encoder")


# --- the images ---


@torch.no_grad()
def images(model: str, folder: Path | None, steps: int, skip: int, seed: int, count: int) -> dict[str, Any]:
    """One seed's images, graded; without statistics those of the solver alone."""
    pipe = load(model)
    if folder is not None:
        dx.apply_teleport(pipe, dx.GaussianStats.from_pretrained(folder), skip=(skip + 0.5) / steps)
    try:
        if model == "ddpm":
            run = run_garments(pipe, count, seed=seed, num_inference_steps=steps)
            return graded(run.images, calls=run.calls, whole=run.images.astype(np.float16))
        prompts = held_out_prompts(count, seed)
        options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, **call_options(pipe)}
        run = run_scenes(pipe, prompts, seed=seed, **options)
        return graded(run.images, prompts, calls=run.calls, whole=run.images.astype(np.float16))
    finally:
        dx.remove_teleport(pipe)


def rows_of(bench: Bench, model: str, settings: Settings, folders: dict[str, Path]) -> dict[str, Samples]:
    """The images by statistics, those of plain solvers at the calls of teleportation, and the reference."""
    card, run = card_dir(f"fashion-{model}"), run_of(model)
    reads = (*(card / p for p in (("unet",) if model == "ddpm" else parts_of(model))), *CARDS.values())
    kinds: dict[str, tuple[Path | None, int, int]] = {
        name: (folder, run.steps, run.skip) for name, folder in folders.items()
    }
    kinds |= {"plain": (None, run.steps - run.skip, 0), "reference": (None, settings.fine, 0)}
    return bench.samples(
        {
            name: [Cell(images, (model, *kind, seed, settings.images), reads) for seed in settings.seeds]
            for name, kind in kinds.items()
        }
    )


# --- the page ---


def main(bench: Bench) -> None:
    """Makes what is missing, and writes the page."""
    settings = bench.pick(
        Settings(("ddpm", "scenes", "flow"), 500, (25, 64, 256, 2000), 600, 72, (31, 32, 33), 50),
        Settings(("ddpm",), 150, (8, 16), 20, 4, (31,), 8),
    )
    parts, panels, strips = [], [], {}
    for model in settings.models:
        folders, costs = statistics_of(bench, model, settings)
        found = rows_of(bench, model, settings, folders)
        reference = found.pop("reference")
        statistics = bench.statistics("garments" if model == "ddpm" else "scenes")
        control = {name: None if name == "data" else found["data"] for name in found}
        rows = [Row((name, *costs.get(name, ("", ""))), ours, control[name]) for name, ours in found.items()]
        measures = [error_measure(statistics, reference), *quality(statistics)]
        run, count = run_of(model), settings.images * len(settings.seeds)
        header = ["statistics", "calls", "seconds"]
        parts += [
            f"`fashion-{model}`, {run.solver}, {run.skip} of {run.steps} steps replaced, {count} images a row:"
        ]
        parts += [comparison(header, rows, measures, "with data statistics")]
        kinds = {name: dx.GaussianStats.from_pretrained(folder) for name, folder in folders.items()}
        parts += ["What the score gives, against the statistics of the data:", agreement(kinds)]
        panels.append(spectrum(model, kinds))
        if model == "ddpm":
            strips = pictures(kinds, settings)
    bench.write("from_score.md", *parts)
    draw(bench.path("from_score.png"), strips, panels, columns=len(panels))


def error_measure(statistics: Statistics, reference: Samples) -> Measure:
    """The squared error of the images to those of the model itself in many steps, from the same noise."""

    def errors(ours: Samples) -> np.ndarray:
        difference = ours.rows["whole"].astype(np.float64) - reference.rows["whole"].astype(np.float64)
        return (difference**2).reshape(len(difference), -1).mean(1)

    return Measure(
        "squared error · 1000",
        lambda ours: statistics.mean(errors(ours), ours.prompts),
        lambda ours, control: statistics.difference(errors(ours), errors(control), ours.prompts),
        scale=1000,
    )


def agreement(kinds: dict[str, dx.GaussianStats]) -> str:
    """Eigenvalues, principal cosines, means, and what two halves of the responses say about them."""
    lines = []
    for name in [name for name in kinds if name not in ("data", "isotropic")]:
        pairs = [("", kinds["data"], kinds[name])]
        pairs += [(", all samples", kinds["data"].unconditional, kinds[name].unconditional)]
        if kinds[name].prompt_map is None and kinds["data"].unconditional is not None:
            pairs = [(", all samples, no map", kinds["data"].unconditional, kinds[name])]
        for part, data, ours in pairs:
            if data is None or ours is None:
                continue
            count = min(8, ours.rank)
            vectors = ours.eigenvectors[:, :count].T @ data.eigenvectors[:, :count]
            report = ours.calibration.get("score", {})
            lines.append(
                [
                    name + part,
                    _numbers(ours.eigenvalues[:8], 1),
                    _numbers(data.eigenvalues[:8], 1),
                    _numbers(torch.linalg.svdvals(vectors), 2) if count else "",
                    f"{float((ours.mean - data.mean).norm() / data.mean.norm()):.2f}",
                    f"{report['error']:.0%}" if "error" in report else "",
                    "" if ours.prompt_map is None else f"{ours.prompt_map.score:.2f}",
                ]
            )
    header = ["statistics", "eigenvalues", "of the data", "principal cosines", "error of the mean", "own estimate", "R² of the map"]  # fmt: skip
    return markdown_table(header, lines)


def _numbers(values: Any, digits: int) -> str:
    return " ".join(f"{float(value):.{digits}f}" for value in values)


def spectrum(model: str, kinds: dict[str, dx.GaussianStats]) -> Panel:
    """The eigenvalues of all statistics with directions."""
    series = {
        name: Series(range(1, 1 + min(32, stats.rank)), stats.eigenvalues[:32].tolist())
        for name, stats in kinds.items()
        if name != "isotropic"
    }
    return Panel(f"fashion-{model}", "number", "eigenvalue", series, {"yscale": "log"})


def pictures(kinds: dict[str, dx.GaussianStats], settings: Settings) -> dict[str, np.ndarray]:
    """The leading eigenvectors as images, each with the sign that it has for the data."""
    data = kinds["data"]
    shown: dict[str, np.ndarray] = {}
    for name in ("data", "score", f"{settings.samples[0]} samples"):
        stats = kinds[name]
        count = min(SHOWN, stats.rank)
        vectors = stats.eigenvectors[:, :count]
        vectors = vectors * torch.where((vectors * data.eigenvectors[:, :count]).sum(0) < 0, -1.0, 1.0)
        scaled = vectors / vectors.abs().amax(0)
        rows = (scaled.T.reshape(count, *stats.shape[1:]) / 2 + 0.5).numpy()
        # White where there are fewer, so that one stands below the other.
        blank = np.ones((SHOWN - count, *rows.shape[1:]), rows.dtype)
        shown[f"leading eigenvectors: {name}"] = np.concatenate([rows, blank])
    return shown
