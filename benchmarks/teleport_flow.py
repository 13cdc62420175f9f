"""Teleportation on a flow, by shift and calls, against Euler's own first step and other controls."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import diffusers_ext as dx
from diffusers_ext.core.schedules import grid_levels
from diffusers_ext.teleport.skipping import steps_to_sigma
from diffusers_ext.testbed.flow_models import flow_solver
from diffusers_ext.testbed.runs import held_out_prompts, run_scenes

from .flow_runs import SHORT, flow_reads, model_folder
from .framework.bench import Bench
from .framework.cells import Cell
from .framework.plots import Panel, Series, draw
from .framework.samples import Samples, graded
from .framework.statistics import Statistics
from .framework.tables import Row, comparison, quality

WRITES = ("teleport_flow.md", "teleport_flow.png")
GUIDANCE = 2.0
# How far the map leads, as noise-to-signal ratios: what the calibration of the UNet found, and half of the way.
REACHES = (2.0, 4.0)
# What takes the place of the map with all that the statistics have, at the same shift, calls and reach.
CONTROLS = {
    "isotropic": "no directions",
    "no covariance": "the mean alone",
    "first call": "the mean of the run's first call",
    "first call, no covariance": "one Euler step as long as the map",
    "zero-init": "the first step left out",
}


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is."""

    images: int
    seeds: tuple[int, ...]
    solvers: tuple[str, ...] = ("Euler", "DPM++ 2M")
    shifts: tuple[float, ...] = (1.0, 3.0, 6.0)
    calls: tuple[int, ...] = (4, 6, 10)
    calibrated: tuple[int, ...] = (6, 10, 20)


@dataclass(frozen=True)
class Point:
    """A solver under a shift, the steps of its grid, and what replaces the first of them.

    `variant` is "plain" (the solver at `steps`), "teleport" (the map with the means of the prompt map, along the guided
    flow), "auto" (the same, as far as `skip="auto"` goes), or one of `CONTROLS`.
    """

    solver: str
    shift: float
    steps: int
    variant: str = "plain"
    skip: int = 0
    guidance: float = GUIDANCE


def points(settings: Settings) -> dict[Point, int]:
    """All rows, each with its number of calls; 0 where the calibration decides."""
    found: dict[Point, int] = {}
    for solver in settings.solvers:
        for shift in settings.shifts:
            for calls in settings.calls:
                found[Point(solver, shift, calls)] = calls
                # More guidance also raises alignment: the plain solver may have it too.
                more = (GUIDANCE + 0.5, GUIDANCE + 1) if calls <= 6 else ()
                found |= {Point(solver, shift, calls, guidance=w): calls for w in more}
                for reach in REACHES:
                    grid = grid_of(solver, shift, calls, reach)
                    if grid is not None:
                        found[Point(solver, shift, grid[0], "teleport", grid[1])] = calls
                found |= _controls(shift, calls) if solver == "Euler" else {}
            for steps in settings.calibrated:
                found[Point(solver, shift, steps)] = steps
                found[Point(solver, shift, steps, "auto")] = 0
    return found


def _controls(shift: float, calls: int) -> dict[Point, int]:
    found = {}
    for variant in CONTROLS:
        # The first call is one of the calls.
        left = calls - 1 if variant.startswith("first call") else calls
        grid = grid_of("Euler", shift, left, REACHES[0])
        grid = (calls + 1, 1) if variant == "zero-init" else grid
        if grid is not None and not (variant.startswith("first call") and grid[1] < 2):
            found[Point("Euler", shift, grid[0], variant, grid[1])] = calls
    return found


def make_solver(name: str, shift: float) -> Any:
    """A flow's solver under a static shift."""
    return FlowMatchEulerDiscreteScheduler(shift=shift) if name == "Euler" else flow_solver(shift)


def grid_of(solver: str, shift: float, calls: int, reach: float) -> tuple[int, int] | None:
    """The fewest steps of which `calls` are left at noise-to-signal ratios below `reach`, and how many are not.

    None if there are no such steps: without shift, 4 calls leave no step above a ratio of 4.
    """
    scheduler = make_solver(solver, shift)
    for steps in range(calls + 1, 20 * calls):
        scheduler.set_timesteps(steps)
        skipped = steps_to_sigma(grid_levels(scheduler), reach)
        if skipped and steps - skipped == calls:
            return steps, skipped
    return None


@lru_cache(maxsize=1)
def load(folder: Path) -> tuple[Any, dx.GaussianStats]:
    """The pipeline and its statistics."""
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, dx.GaussianStats.from_pretrained(folder / "gaussian")


# --- one row ---


@torch.no_grad()
def images(folder: Path, point: Point, seed: int, count: int) -> dict[str, Any]:
    """One seed's images, graded."""
    pipe, whole = load(folder)
    own, pipe.scheduler = pipe.scheduler, make_solver(point.solver, point.shift)
    options: dict[str, Any] = {**SHORT, "num_inference_steps": point.steps}
    try:
        if point.variant == "zero-init":
            pipe.scheduler.set_timesteps(point.steps)
            # The state stays the noise, while the level is that of the second step (CFG-Zero*, arXiv:2503.18886).
            options["sigmas"] = pipe.scheduler.sigmas[point.skip : -1].tolist()
            pipe.scheduler = make_solver("Euler", 1.0)
        elif point.variant != "plain":
            skip = "auto" if point.variant == "auto" else (point.skip + 0.5) / point.steps
            mean_from = "first_call" if point.variant.startswith("first call") else "stats"
            dx.apply_teleport(pipe, statistics_of(point.variant, whole), skip=skip, mean_from=mean_from)
        prompts = held_out_prompts(count, seed)
        run = run_scenes(pipe, prompts, seed=seed, guidance_scale=point.guidance, **options)
        return graded(run.images, prompts, calls=run.calls)
    finally:
        dx.remove_teleport(pipe)
        pipe.scheduler = own


def statistics_of(variant: str, whole: dx.GaussianStats) -> dx.GaussianStats:
    """What a variant teleports with."""
    if variant.startswith("first call"):
        whole = dataclasses.replace(whole, prompt_map=None)
    if variant == "isotropic":
        return whole.isotropic()
    return without_covariance(whole) if variant.endswith("no covariance") else whole


def without_covariance(stats: dx.GaussianStats) -> dx.GaussianStats:
    """The same means, and no spread about them."""
    flat: dict[str, Any] = {"eigenvalues": torch.zeros(0), "residual": 0.0}
    flat["eigenvectors"] = torch.zeros(stats.mean.numel(), 0)
    part = stats.unconditional
    return dataclasses.replace(stats, **flat, unconditional=part and without_covariance(part))


# --- the page ---


def main(bench: Bench) -> None:
    """Makes the images that are missing, and writes the page."""
    settings = bench.pick(
        Settings(72, (21, 22, 23)),
        Settings(4, (21,), ("Euler",), shifts=(3.0,), calls=(4,), calibrated=(6,)),
    )
    folder = model_folder(bench, "gaussian")
    reads = (*flow_reads(folder), folder / "gaussian")
    wanted = points(settings)
    found = bench.samples(
        {
            p: [Cell(images, (folder, p, seed, settings.images), reads) for seed in settings.seeds]
            for p in wanted
        }
    )
    statistics = bench.statistics("scenes")
    measures = quality(statistics)
    rows = [Row((*labels(p), f"{found[p].calls:.3g}"), found[p], respaced(p, found)) for p in found]
    header = ["solver", "shift", "steps", "variant", "NFE"]
    tables = [comparison(header, rows, measures, "the solver's at no fewer calls")]
    tables += ["What the map adds, in pairs at the same shift and calls:"]
    tables += [comparison(["shift", "NFE", "control"], added(wanted, found), measures, "the control's")]
    tables += [
        "Against the same solver at equal calls, with the best of all shifts and guidance scales for it:"
    ]
    header = ["solver", "shift", "NFE", "plain's best"]
    tables += [comparison(header, tuned(wanted, found), measures, "plain's")]
    count, floor = settings.images * len(settings.seeds), statistics.floor("grader")
    bench.write(
        "teleport_flow.md",
        tables[0],
        f"{count} images a row ({len(settings.seeds)} seeds), the same noise and prompts in every row; floor (real train"
        f" against real test images) {floor:.2f}.",
        *tables[1:],
    )
    panels = [p for kind in ("accuracy", "distance") for p in panels_of(settings, found, statistics, kind)]
    draw(bench.path("teleport_flow.png"), panels=panels, columns=len(panels) // 2)


def labels(point: Point) -> tuple[str, str, str, str]:
    """Of a row."""
    guided = "" if point.guidance == GUIDANCE else f", guidance {point.guidance:g}"
    return point.solver, f"{point.shift:g}", str(point.steps), point.variant + guided


def respaced(point: Point, found: dict[Point, Samples]) -> Samples | None:
    """The plain solver under the same shift that spends the same calls, or the next it can spend."""
    if point.variant == "plain":
        return None
    plain = [p for p in found if p == Point(point.solver, point.shift, p.steps)]
    enough = [p for p in plain if found[p].calls >= found[point].calls - 0.01]
    control = min(enough, key=lambda p: found[p].calls, default=None)
    return None if control is None else found[control]


def added(wanted: dict[Point, int], found: dict[Point, Samples]) -> list[Row]:
    """The map, as far as the controls go, against each control."""
    rows = []
    for point, calls in wanted.items():
        reach = grid_of("Euler", point.shift, calls, REACHES[0]) if point.variant == "teleport" else None
        if point.solver != "Euler" or (point.steps, point.skip) != reach:
            continue
        for other in wanted:
            if other.variant in CONTROLS and (other.shift, wanted[other]) == (point.shift, calls):
                name = f"{other.variant} ({CONTROLS[other.variant]})"
                rows.append(Row((f"{point.shift:g}", str(calls), name), found[point], found[other]))
    return rows


def tuned(wanted: dict[Point, int], found: dict[Point, Samples]) -> list[Row]:
    """Teleportation against the plain solver with the shift and the guidance that put most words right."""
    rows = []
    for point, calls in wanted.items():
        if point.variant == "teleport":
            plain = [p for p in wanted if (p.solver, p.variant, p.steps) == (point.solver, "plain", calls)]
            best = max(plain, key=lambda p: found[p].aligned().mean())
            name = f"shift {best.shift:g}, guidance {best.guidance:g}"
            rows.append(Row((point.solver, f"{point.shift:g}", str(calls), name), found[point], found[best]))
    return rows


def panels_of(
    settings: Settings, found: dict[Point, Samples], statistics: Statistics, kind: str
) -> list[Panel]:
    """A panel for each shift: a measure of Euler's rows against the calls."""
    accuracy = kind == "accuracy"
    measure = statistics.accuracy if accuracy else statistics.distance
    panels = []
    for shift in settings.shifts:
        series: dict[str, Series] = {}
        for variant in ("plain", "teleport", *CONTROLS):
            chosen = [p for p in found if p == Point("Euler", shift, p.steps, variant, p.skip)]
            chosen.sort(key=lambda p: found[p].calls)
            xs, ys = [found[p].calls for p in chosen], [measure(found[p], "grader") for p in chosen]
            series |= {variant: Series(xs, ys, "-" if variant == "plain" else "")} if chosen else {}
        options = {} if accuracy else {"yscale": "symlog"}
        floor = None if accuracy else statistics.floor("grader")
        name = "prompt accuracy" if accuracy else "FD∞"
        panels.append(Panel(f"shift {shift:g}", "NFE", name, series, options, floor))
    return panels
