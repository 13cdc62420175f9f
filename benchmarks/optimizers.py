"""Muon and Drop-Muon against AdamW: a small pixel DDPM from scratch, and a Smooth-LoRA on Fashion Scenes.

Every optimizer is trained at four learning rates with one seed, and at the best of them with all seeds. Seconds are of the
CPU, not of the clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_ext.metrics.comparison import Estimate, markdown_table, paired_difference
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.embedded import card_dir

from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .framework.plots import Panel, Series, draw
from .framework.samples import CARDS, Samples, graded, reference
from .framework.tables import Measure, Row, comparison
from .optimizers_runs import ARMS, Run, seconds_per_step, train

WRITES = ("optimizers.md", "optimizers.png")
TITLES = {"pixel": "Pixel DDPM from scratch", "lora": "Smooth-LoRA on Fashion Scenes"}
BASE = card_dir("fashion-scenes")
READS = (BASE / "unet", BASE / "vae", BASE / "text_encoder", *CARDS.values())
RATES: dict[str, tuple[float, ...]] = {
    "pixel": (1e-3, 2.5e-3, 6.3e-3, 1.6e-2),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
}
# The best rate of Muon was the last of the others.
MUON_LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
# What the difference to a control answers: (optimizer, its control).
QUESTIONS = (
    ("Muon", "AdamW"),
    ("Muon", "Muon, 2-D only"),
    ("Drop-Muon", "AdamW"),
    ("Drop-Muon", "Muon"),
    ("Drop-Muon", "Drop-Muon, subset"),
    ("Drop-Muon", "AdamW, suffix"),
)


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is; pairs are of the pixel model and of the LoRA."""

    steps: tuple[int, int] = (120, 48)
    batch_sizes: tuple[int, int] = (16, 8)
    rounds: tuple[int, int] = (21, 10)
    seeds: int = 3
    rates: int = 4
    arms: tuple[str, ...] = tuple(ARMS)
    lora_arms: tuple[str, ...] = ("AdamW", "Muon")
    images: int = 200
    inference_steps: int = 8


@dataclass(frozen=True)
class Arm:
    """An optimizer on a task: its runs at the best rate, by seed, and the last losses at all rates."""

    name: str
    rate: float
    runs: Sequence[Run]
    records: Sequence[Arrays]
    losses: Mapping[float, float]
    seconds: float


def main(bench: Bench) -> None:
    """Trains what is missing, and writes the page."""
    quick = Settings((2, 2), (2, 2), (1, 1), 2, 1, ("AdamW", "Muon"), ("AdamW", "Muon"), 4, 2)
    s = bench.pick(Settings(), quick)
    parts, panels = [], []
    for number, task in enumerate(TITLES):
        arms, cost = arms_of(bench, s, number, task)
        parts += task_parts(s, number, task, arms, cost)
        panels += task_panels(task, arms)
    parts.append(floor(bench, s))
    bench.write("optimizers.md", *parts)
    draw(bench.path("optimizers.png"), panels=panels)


def arms_of(bench: Bench, s: Settings, number: int, task: str) -> tuple[dict[str, Arm], dict[str, float]]:
    """Every optimizer at its best rate, and CPU seconds of a step by name."""
    names = s.arms if task == "pixel" else s.lora_arms
    steps, batch = s.steps[number], s.batch_sizes[number]
    timed = Cell(seconds_per_step, (task, names, batch, s.rounds[number], bench.data_dir), READS, alone=True)
    rates = {n: MUON_LORA_RATES if (task, n) == ("lora", "Muon") else RATES[task] for n in names}
    first = {
        (name, rate): cell(bench, s, Run(task, name, rate, 0, steps, batch))
        for name in names
        for rate in rates[name][: s.rates]
    }
    found = bench.run([*first.values(), timed])
    cost = {name: float(value) for name, value in found[timed].items()}
    best: dict[str, tuple[float, dict[float, float]]] = {}
    for name in names:
        losses = {r: float(found[c]["loss"][-1]) for (n, r), c in first.items() if n == name}
        best[name] = min(losses, key=lambda r: losses[r] if np.isfinite(losses[r]) else float("inf")), losses
    runs = {name: runs_of(s, task, name, rate, steps, batch, cost) for name, (rate, _) in best.items()}
    cells = {run: cell(bench, s, run) for of_arm in runs.values() for run in of_arm}
    records = bench.run(cells.values())
    arms = {
        name: Arm(name, rate, runs[name], [records[cells[run]] for run in runs[name]], losses, cost[name])
        for name, (rate, losses) in best.items()
    }
    return arms, cost


def runs_of(
    s: Settings, task: str, name: str, rate: float, steps: int, batch: int, cost: Mapping[str, float]
) -> list[Run]:
    """All seeds, with images after the last step and after the evaluated one next to the equal time."""
    run = Run(task, name, rate, 0, steps, batch)
    if task == "pixel":
        target = equal_time(steps, cost) / cost[name]
        near = min(run.evaluated(), key=lambda step: abs(step - target))
        run = replace(run, sampled=(near, steps))
    return [replace(run, seed=seed) for seed in range(s.seeds)]


def cell(bench: Bench, s: Settings, run: Run) -> Cell:
    """One run."""
    return Cell(train, (run, bench.data_dir, s.images, s.inference_steps), READS)


def equal_time(steps: int, cost: Mapping[str, float]) -> float:
    """CPU seconds after which all optimizers are compared: those of `steps` steps of the cheapest."""
    return steps * min(cost.values())


def t_interval(values: np.ndarray) -> Estimate:
    """Mean with its 95% t interval over seeds."""
    if len(values) < 2:
        return Estimate(float(np.mean(values)), float("-inf"), float("inf"), 1.0)
    return paired_difference(values, np.zeros(len(values)))


def measures_of(s: Settings, task: str, steps: int, cost: Mapping[str, float]) -> list[Measure]:
    """Losses, and of the pixel model Fréchet distances, at equal steps and at equal time."""

    def final(arm: Arm) -> np.ndarray:
        return np.array([record["loss"][-1] for record in arm.records])

    def timely(arm: Arm) -> np.ndarray:
        at = equal_time(steps, cost) / arm.seconds
        return np.array([np.interp(at, record["steps"], record["loss"]) for record in arm.records])

    found = {"loss, equal steps": (final, 4), "loss, equal time": (timely, 4)}
    if task == "pixel":
        found["Fréchet, equal steps"] = (lambda arm: distances(arm, -1), 2)
        found["Fréchet, equal time"] = (lambda arm: distances(arm, 0), 2)
    return [
        Measure(
            label,
            lambda arm, of=of: t_interval(of(arm)),
            lambda a, b, of=of: t_interval(of(a) - of(b)),
            digits,
            header=label,
        )
        for label, (of, digits) in found.items()
    ]


def distances(arm: Arm, place: int) -> np.ndarray:
    """Fréchet distance of every seed's images after one of the sampled steps."""
    found = []
    for run, record in zip(arm.runs, arm.records):
        start = f"{run.sampled[place]} "
        of_step = {k.removeprefix(start): v for k, v in record.items() if k.startswith(start)}
        found.append(distance(Samples.of([of_step])))
    return np.array(found)


def distance(samples: Samples) -> float:
    """Fréchet distance to real test garments."""
    return frechet_distance(FeatureStats.of(samples.features()), reference("garments-test", "grader"))


def task_parts(
    s: Settings, number: int, task: str, arms: Mapping[str, Arm], cost: Mapping[str, float]
) -> list[str]:
    """One task's tables."""
    steps = s.steps[number]
    measures = measures_of(s, task, steps, cost)
    rows = [Row((a.name, f"{a.rate:g}", f"{a.seconds:.2f}"), a) for a in arms.values()]
    asked = [(a, b) for a, b in QUESTIONS if a in arms and b in arms]
    differences = [Row((f"{a} − {b}",), arms[a], arms[b]) for a, b in asked]
    rates = sorted({rate for arm in arms.values() for rate in arm.losses})
    losses = [
        [arm.name, *(f"{arm.losses[rate]:.4f}" if rate in arm.losses else "–" for rate in rates)]
        for arm in arms.values()
    ]
    at = equal_time(steps, cost)
    return [
        f"## {TITLES[task]}",
        comparison(["optimizer", "learning rate", "CPU s a step"], rows, measures),
        "Paired by seed:",
        comparison(["difference"], differences, [replace(m, value=None) for m in measures]),
        "Loss of seed 0 by learning rate:",
        markdown_table(["optimizer", *(f"{rate:g}" for rate in rates)], losses),
        f"{steps} steps with {s.batch_sizes[number]} rows, constant learning rate after a warm-up, averaged weights,"
        f" {s.seeds} seeds, 95% t intervals. Equal time is {at:.0f} CPU seconds. Seconds are means of steps in"
        " turns.",
    ]


def task_panels(task: str, arms: Mapping[str, Arm]) -> list[Panel]:
    """Losses at the best rate over steps and over CPU seconds; bars are the range of the seeds."""
    panels = []
    for label in ("steps", "CPU seconds"):
        series = {}
        for arm in arms.values():
            losses = np.array([record["loss"] for record in arm.records])
            xs = arm.records[0]["steps"] * (1.0 if label == "steps" else arm.seconds)
            ranges = zip(losses.mean(0), losses.min(0), losses.max(0))
            series[f"{arm.name}, {arm.rate:g}"] = Series(list(xs), [Estimate(*map(float, r)) for r in ranges])
        panels.append(Panel(TITLES[task], label, "validation loss", series, {"yscale": "log"}))
    return panels


def real(data_dir: Path, count: int) -> dict[str, Any]:
    """Real training garments, graded."""
    garments = fashion_scenes.load_garments(data_dir, "train")[0]
    chosen = np.random.default_rng(0).choice(len(garments), count, replace=False)
    return graded(garments[chosen, ..., None].astype(np.float32) / 255)


def floor(bench: Bench, s: Settings) -> str:
    """What as many real images have."""
    drawn = Cell(real, (bench.data_dir, s.images), READS)
    return (
        f"Fréchet distances of {s.images} images in {s.inference_steps} steps of DPM++ 2M, the same noise for all, at the"
        f" evaluated step next to the equal time; {s.images} real training garments have"
        f" {distance(bench.samples({0: [drawn]})[0]):.2f}. They are on the grader's features and no FID."
    )
