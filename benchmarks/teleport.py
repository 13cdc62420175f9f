"""Teleportation against its controls on the embedded models, at the same seeds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import Run, held_out_prompts, run_garments, run_scenes

from .framework.bench import Bench
from .framework.cells import Cell
from .framework.plots import Panel, Series, draw
from .framework.samples import CARDS, Samples, graded
from .framework.statistics import Statistics
from .framework.tables import Row, comparison, quality
from .pixel_pipeline import PixelPipeline

WRITES = ("ddpm.md", "ddpm.png", "scenes.md", "scenes.png")
SOLVERS = {
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "DDIM": "DDIMScheduler",
    "Heun": "HeunDiscreteScheduler",
}
GUIDANCE = 2.0


@dataclass(frozen=True)
class Settings:
    """How large one model's part is. The skips were chosen on other seeds."""

    images: int
    seeds: tuple[int, ...]
    solvers: tuple[str, ...]
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Point:
    """A solver, its steps, and what replaces the first of them.

    `variant` is "plain" (the solver at `steps`), "teleport" (the map; with prompts: with the mean that the prompt
    map gives, along the guided flow), "auto" (the same, as far as `skip="auto"` goes), "unconditional" (the
    statistics of all samples), "implied mean" (the prompt's mean from one model call, along the guided flow), "first
    call" (the mean of the run's first guided call), "isotropic" (same mean and total variance, no directions) or
    "noise" (plain noise at σ_skip).
    """

    solver: str
    steps: int
    variant: str = "plain"
    skip: int = 0
    guidance: float = 1.0


def ddpm_points(settings: Settings) -> list[Point]:
    """All rows of the pixel model."""
    points = []
    for solver in settings.solvers:
        # Heun calls the model twice a step.
        steps = 10 if solver == "Heun" else 20
        skips = sorted({round(share * steps) for share in (0.2, 0.25, 0.3)})
        points += [Point(solver, steps), Point(solver, steps, "auto")]
        for skip in skips:
            points += [Point(solver, steps - skip), Point(solver, steps, "teleport", skip)]
        points += [Point(solver, steps, variant, skips[-1]) for variant in ("isotropic", "noise")]
    return list(dict.fromkeys(points))


def scenes_points(settings: Settings) -> list[Point]:
    """All rows of the text-to-image model."""
    w, points = GUIDANCE, []
    for steps, skips in ((6, (1, 2)), (10, (2, 3)), (20, (3, 5)), (30, (5,))):
        for solver in settings.solvers if steps in settings.steps else ():
            if solver == "DDIM" and steps in (6, 30):
                continue
            points += [Point(solver, steps, guidance=w), Point(solver, steps, "auto", guidance=w)]
            for skip in skips:
                points += [Point(solver, steps - skip, guidance=w), Point(solver, steps, "teleport", skip, w)]
            if solver == "DPM++ 2M" and steps < 20:
                # More guidance also raises alignment: the plain solver may have it too.
                points += [Point(solver, steps - k, guidance=g) for k in skips for g in (w + 0.5, w + 1)]
                points += [Point(solver, steps, "unconditional", skips[0], w)]
            if solver == "DPM++ 2M" and steps in (6, 20):
                points += [Point(solver, steps, "isotropic", skips[-1], w)]
            if solver == "DPM++ 2M" and steps == 6:
                for skip in skips:
                    points += [Point(solver, steps, "implied mean", skip, w)]
                    points += [Point(solver, steps, "first call", skip + 1, w)]
    return list(dict.fromkeys(points))


@lru_cache(maxsize=1)
def load(model: str) -> tuple[Any, Any, dx.GaussianStats]:
    """The pipeline, its own scheduler, and its statistics."""
    folder = card_dir(f"fashion-{model}")
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if model == "ddpm":
        pipe = PixelPipeline(pipe.unet, pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.scheduler, dx.GaussianStats.from_pretrained(folder / "gaussian")


@torch.no_grad()
def images(model: str, point: Point, seed: int, count: int) -> dict[str, Any]:
    """One seed's images, graded."""
    pipe, base, whole = load(model)
    pipe.scheduler = getattr(diffusers, SOLVERS[point.solver]).from_config(base.config)
    stats = statistics_of(point, whole)
    if stats is not None:
        mean_from = "first_call" if point.variant == "first call" else "stats"
        skip = "auto" if point.variant == "auto" else (point.skip + 0.5) / point.steps
        dx.apply_teleport(pipe, stats, skip=skip, mean_from=mean_from)
    try:
        if model == "ddpm":
            run = run_garments(pipe, count, seed=seed, num_inference_steps=point.steps)
            return graded(run.images, calls=run.calls)
        prompts = held_out_prompts(count, seed)
        run = scenes_run(pipe, point, stats, prompts, seed)
        return graded(run.images, prompts, calls=run.calls)
    finally:
        dx.remove_teleport(pipe)
        pipe.scheduler = base


def statistics_of(point: Point, whole: dx.GaussianStats) -> dx.GaussianStats | None:
    """What a point teleports with."""
    if point.variant == "plain":
        return None
    if point.variant in ("implied mean", "first call"):
        return dataclasses.replace(whole, prompt_map=None)
    if point.variant == "isotropic":
        return whole.isotropic()
    if point.variant == "noise":
        # The map only rescales the noise: nothing of the data but pure noise at the new level.
        r = torch.zeros(whole.mean.numel(), 0)
        return dx.GaussianStats(torch.zeros_like(whole.mean), r, torch.zeros(0), 0.0, whole.num_samples)
    return whole.unconditional if point.variant == "unconditional" else whole


def scenes_run(pipe: Any, point: Point, stats: Any, prompts: list[str], seed: int) -> Run:
    """The images of prompts; the implied mean is asked for before every batch."""
    options: dict[str, Any] = {"num_inference_steps": point.steps, "guidance_scale": point.guidance}
    if point.variant != "implied mean":
        return run_scenes(pipe, prompts, seed=seed, **options)
    teleport, size, parts = pipe.scheduler, 64, []
    for low in range(0, len(prompts), size):
        chunk = prompts[low : low + size]
        dx.remove_teleport(pipe)
        means = dx.prompt_means(pipe, stats, chunk, height=32, width=64)
        pipe.scheduler = teleport
        teleport.set_mean(means, point.guidance)
        parts.append(run_scenes(pipe, chunk, seed=seed, offset=low, **options))
    # The mean's own call is without guidance, so it costs half a guided step.
    return Run.join(parts, extra_calls=1.0 if point.guidance <= 1 else 0.5)


def main(bench: Bench) -> None:
    """Makes the images that are missing, and writes both pages."""
    ddpm = bench.pick(
        Settings(80, (1, 2, 3), ("DPM++ 2M", "UniPC", "DDIM", "Heun")), Settings(4, (1,), ("DDIM",))
    )
    scenes = bench.pick(
        Settings(72, (11, 12, 13), ("DPM++ 2M", "DDIM"), (6, 10, 20, 30)),
        Settings(4, (11,), ("DPM++ 2M",), (6,)),
    )
    page(bench, "scenes", scenes, scenes_points(scenes))
    page(bench, "ddpm", ddpm, ddpm_points(ddpm))


def page(bench: Bench, model: str, settings: Settings, points: list[Point]) -> None:
    """One model's page and plot."""
    folder = card_dir(f"fashion-{model}")
    parts = ("unet", "gaussian") if model == "ddpm" else ("unet", "vae", "text_encoder", "gaussian")
    reads = (*(folder / part for part in parts), *CARDS.values())
    cells = {
        p: [Cell(images, (model, p, seed, settings.images), reads) for seed in settings.seeds] for p in points
    }
    found = bench.samples(cells)
    statistics = bench.statistics("garments" if model == "ddpm" else "scenes")
    measures = quality(statistics)
    rows = [Row((*labels(p), f"{found[p].calls:.3g}"), found[p], respaced(p, found)) for p in points]
    tables = [
        comparison(["solver", "steps", "variant", "NFE"], rows, measures, "the solver's at no fewer calls")
    ]
    pairs = [Row((p.solver, f"{found[p].calls:.3g}"), found[p], isotropic(p, found)) for p in points]
    pairs = [row for row in pairs if row.control is not None]
    tables += ["Teleportation against the isotropic map, in pairs:"]
    tables += [comparison(["solver", "NFE"], pairs, measures, "the isotropic map's")]
    if model == "scenes":
        header = ["steps", "NFE", "plain's best guidance"]
        tables += ["Against the plain solver at equal calls and the best of three guidance scales for it:"]
        tables += [comparison(header, guided_rows(found), measures, "plain's")]
    count = settings.images * len(settings.seeds)
    floor = statistics.floor("grader")
    bench.write(
        f"{model}.md",
        tables[0],
        f"{count} images a row ({len(settings.seeds)} seeds), the same noise{' and prompts' * (model == 'scenes')} in every"
        f" row; floor (real train against real test images) {floor:.2f}.",
        *tables[1:],
    )
    panels = [p for kind in ("accuracy", "distance") for p in panels_of(found, statistics, kind, floor)]
    draw(bench.path(f"{model}.png"), panels=panels, columns=len(settings.solvers))


def labels(point: Point) -> tuple[str, str, str]:
    """Of a row."""
    own = point.guidance in (1.0, GUIDANCE)
    return point.solver, str(point.steps), point.variant if own else f"plain, guidance {point.guidance:g}"


def respaced(point: Point, found: dict[Point, Samples]) -> Samples | None:
    """The plain solver that spends the same calls, or the next it can spend; half a guided step rounds up."""
    calls, plain = found[point].calls, replace(point, variant="plain", skip=0)
    others = [p for p in found if replace(p, steps=point.steps) == plain and found[p].calls >= calls - 0.01]
    control = min(others, key=lambda p: found[p].calls, default=None)
    return None if point.variant == "plain" or control is None else found[control]


def isotropic(point: Point, found: dict[Point, Samples]) -> Samples | None:
    """The isotropic map instead of the whole one."""
    return found.get(replace(point, variant="isotropic")) if point.variant == "teleport" else None


def guided_rows(found: dict[Point, Samples]) -> list[Row]:
    """Teleportation against the plain solver at equal calls and the guidance that puts most words right."""
    rows = []
    for point, ours in found.items():
        if point.variant == "teleport" and point.solver == "DPM++ 2M" and point.steps < 20:
            calls = math.ceil(ours.calls - 0.01)
            plain = [p for p in found if (p.solver, p.variant, p.steps) == (point.solver, "plain", calls)]
            best = max(plain, key=lambda p: found[p].aligned().mean())
            rows.append(Row((str(point.steps), f"{ours.calls:.3g}", f"{best.guidance:g}"), ours, found[best]))
    return rows


def panels_of(found: dict[Point, Samples], statistics: Statistics, kind: str, floor: float) -> list[Panel]:
    """A panel for each solver: a measure against the calls."""
    if kind == "accuracy" and statistics.kind == "garments":
        return []
    accuracy = kind == "accuracy"
    measure = statistics.accuracy if accuracy else statistics.distance
    name = "prompt accuracy" if accuracy else "FD∞"
    panels = []
    for solver in dict.fromkeys(p.solver for p in found):
        series: dict[str, Series] = {}
        for variant in dict.fromkeys(p.variant for p in found):
            chosen = [p for p in found if (p.solver, p.variant) == (solver, variant)]
            chosen = sorted(
                (p for p in chosen if p.guidance in (1.0, GUIDANCE)), key=lambda p: found[p].calls
            )
            if chosen:
                ys = [measure(found[p], "grader") for p in chosen]
                xs = [found[p].calls for p in chosen]
                series[variant] = Series(xs, ys, "-" if variant == "plain" else "")
        options = {} if accuracy else {"yscale": "symlog"}
        panels.append(Panel(solver, "NFE", name, series, options, None if accuracy else floor))
    return panels
