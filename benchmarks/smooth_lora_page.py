"""The tables and the picture of the pages of Smooth-LoRA, on the UNet and on the flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.metrics.ssim import ssim

from .framework.cells import Arrays
from .framework.plots import Panel, Series, draw
from .framework.samples import Samples
from .framework.statistics import Statistics
from .framework.tables import Measure, Row, comparison, quality

GUIDANCE, STEPS, INVERSION_STEPS, FRAMES = 2.0, 10, 20, 12
RECONSTRUCTION_GUIDANCES = (1.0, 2.0, 5.0)
# Prompts and seeds of the two ends.
STRIPS = (("a green bag", (4, 5)), ("a red sandal left of a blue dress", (1, 2)))
CONTROL = "λ = 0"


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is: weights, training seeds, and how much is measured."""

    weights: tuple[float, ...] = (0, 0.1, 1, 10)
    seeds: tuple[int, ...] = (0, 1)
    paths: int = 100
    images: int = 500
    inversions: int = 100
    train_steps: int = 200
    batch_size: int = 32
    samples: int = 10_000
    # Of the base model, and the highest of them of the control.
    guidances: tuple[float, ...] = (1.5, 2.5, 3.0)


@dataclass(frozen=True)
class Model:
    """All that was measured of one model. At another guidance scale only paths and images are."""

    paths: Arrays
    images: Samples
    strips: Arrays = field(default_factory=dict)
    inversion: Arrays = field(default_factory=dict)

    def errors(self, guidance: float) -> np.ndarray:
        """(n,) mean squared error of every redrawn image, images in [−1, 1]."""
        return squared_error(self.inversion[f"redrawn {guidance:g}"], self.inversion["real"])

    @property
    def floor(self) -> np.ndarray:
        """(n,) error of the autoencoder alone."""
        return squared_error(self.inversion["autoencoder"], self.inversion["real"])


def squared_error(pictures: np.ndarray, real: np.ndarray) -> np.ndarray:
    """(n,) mean squared error of images in [0, 1] to uint8 ones, both taken to [−1, 1]."""
    difference = 2 * (pictures.astype(np.float64) - real.astype(np.float64) / 255)
    return (difference**2).mean((1, 2, 3))


def page(
    s: Settings, statistics: Statistics, models: dict[str, Model], guided: dict[str, Model], solver: str
) -> list[str]:
    """Smoothness, quality and reconstruction of every model, each less the control's."""

    def table(measures: Sequence[Measure], part: Any = lambda model: model, also: Any = ()) -> str:
        theirs = part(models[CONTROL])
        shown = {**models, **dict(also)}
        rows = [Row((n,), part(m), None if n == CONTROL else theirs) for n, m in shown.items()]
        return comparison(["model"], rows, measures, f"{CONTROL}'s")

    parts = [
        f"{s.paths} paths of 11 images, {STEPS} {solver} steps, guidance {GUIDANCE:g}:",
        table(smoothness(statistics), also=guided),
        f"{s.images} images, the same sampling:",
        table(quality(statistics, diversity=True), lambda model: model.images, guided),
        f"{s.inversions} real test scenes inverted in {INVERSION_STEPS} {solver} steps without guidance and redrawn, squared"
        f" error in [−1, 1] and PSNR; the autoencoder alone has {models[CONTROL].floor.mean():.4f}.",
    ]
    for guidance in RECONSTRUCTION_GUIDANCES:
        parts += [f"Redrawn at guidance {guidance:g}:", table(reconstruction(statistics, guidance))]
    return parts


def smoothness(statistics: Statistics) -> list[Measure]:
    """ISTD, and what tells an even change from none. Intervals are over prompts."""

    def difference(name: str) -> Any:
        return lambda a, b: statistics.difference(a.paths[name], b.paths[name], a.paths["prompts"])

    def relative(model: Model) -> np.ndarray:
        return model.paths["deviations"] / model.paths["distances"]

    return [
        Measure("ISTD", lambda m: m.paths["deviations"].mean(), difference("deviations"), 3),
        Measure("", None, lambda a, b: change(statistics, a, b), 0, 100, "ISTD, less {}, %", tested=False),
        Measure("mean adjacent distance", lambda m: m.paths["distances"].mean()),
        Measure(
            "std/mean",
            lambda m: relative(m).mean(),
            lambda a, b: statistics.difference(relative(a), relative(b), a.paths["prompts"]),
            3,
        ),
        Measure("distance of the ends", lambda m: m.paths["endpoints"].mean(), digits=1),
    ]


def change(statistics: Statistics, ours: Model, control: Model) -> Any:
    """Of the ISTD, as a share of the control's."""
    a, b = (model.paths["deviations"] for model in (ours, control))
    return statistics.ratio_change(a, b, ours.paths["prompts"])


def reconstruction(statistics: Statistics, guidance: float) -> list[Measure]:
    """Errors of images that were inverted and redrawn."""

    def likeness(model: Model) -> float:
        drawn, real = model.inversion[f"redrawn {guidance:g}"], model.inversion["real"]
        return float(ssim(drawn, real / 255).mean())

    def difference(a: Model, b: Model) -> Any:
        return statistics.difference(a.errors(guidance), b.errors(guidance), a.inversion["prompts"])

    def above_floor(a: Model, b: Model) -> Any:
        own, other = a.errors(guidance) - a.floor, b.errors(guidance) - b.floor
        return statistics.ratio_change(own, other, a.inversion["prompts"])

    return [
        Measure("squared error", lambda m: m.errors(guidance).mean(), difference, 4),
        Measure("", None, above_floor, 0, 100, "above the autoencoder's, less {}, %", tested=False),
        Measure("PSNR, dB", lambda m: -10 * np.log10(m.errors(guidance) / 4).mean(), digits=1),
        Measure("SSIM", likeness, digits=3),
    ]


def training_seeds(statistics: Statistics, s: Settings, models: dict[str, Model], ours: str) -> str:
    """Every seed's figures, and the mean and spread of what the weight `ours` does to λ = 0."""

    def figures(model: Model) -> list[float]:
        deviations, distances = model.paths["deviations"], model.paths["distances"]
        return [
            float(deviations.mean()),
            float((deviations / distances).mean()),
            100 * float(model.images.aligned().mean()),
            statistics.distance(model.images, "grader").value,
            *(float(model.errors(g).mean()) for g in RECONSTRUCTION_GUIDANCES),
        ]

    digits = (3, 3, 1, 2, *[4] * len(RECONSTRUCTION_GUIDANCES))
    values = {name: figures(model) for name, model in models.items()}
    rows = [[name, *(f"{x:.{d}f}" for x, d in zip(row, digits))] for name, row in values.items()]
    changes = np.array(
        [np.subtract(values[f"{ours}, seed {n}"], values[f"λ = 0, seed {n}"]) for n in s.seeds]
    )
    if len(s.seeds) > 1:
        spread = changes.std(0, ddof=1)
        cells = [f"{m:.{d}f} ± {v:.{d}f}" for m, v, d in zip(changes.mean(0), spread, digits)]
        rows.append([f"{ours} less λ = 0, mean ± std", *cells])
    scales = [f"squared error, guidance {g:g}" for g in RECONSTRUCTION_GUIDANCES]
    return markdown_table(["model", "ISTD", "std/mean", "prompt accuracy, %", "FD∞", *scales], rows)


def picture(path: Path, statistics: Statistics, models: dict[str, Model], guided: dict[str, Model]) -> None:
    """Strips between the same noises with the size of every step, `EDITS` of the same images, and ISTD against FD∞."""
    shown, panels = {}, []
    for i, (prompt, _) in enumerate(STRIPS):
        shown |= {f"{name}: {prompt}": model.strips[f"strip {i}"] for name, model in models.items()}
        series = {
            name: Series(range(FRAMES - 1), model.strips[f"changes {i}"].tolist())
            for name, model in models.items()
        }
        axis = "step along the path"
        panels.append(Panel(prompt, axis, "distance to the next image", series, {"ylim": (0, None)}))
    by_kind = {
        "λ, guidance 2": {name: model for name, model in models.items() if name != "base"},
        "base, guidance": {
            "base": models["base"],
            **{n: m for n, m in guided.items() if n.startswith("base")},
        },
        f"{CONTROL}, guidance": {n: m for n, m in guided.items() if not n.startswith("base")},
    }
    front = {
        kind: Series(
            [float(m.paths["deviations"].mean()) for m in of.values()],
            [statistics.distance(m.images, "grader") for m in of.values()],
            "",
            [n.removeprefix("base, ").removeprefix("λ = ").partition(",")[0] for n in of],
        )
        for kind, of in by_kind.items()
    }
    panels.append(Panel("smoothness and distance", "ISTD", "FD∞", front))
    shown["real images"] = models[CONTROL].inversion["to edit"]
    shown |= {f"edited, {name}": model.inversion["edited"] for name, model in models.items()}
    draw(path, shown, panels)
