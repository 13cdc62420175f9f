"""The pictures of the pages: strips of images, and panels of figures with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from diffusers_ext.metrics.comparison import Estimate

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MARKERS = "osD^vpxP*h+"


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Attributes:
        xs: (n,).
        ys: numbers, or estimates whose intervals become bars.
        line: style of the line between them; "": none.
        notes: a word beside every point.
    """

    xs: Sequence[float]
    ys: Sequence[float | Estimate]
    line: str = "-"
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        title, xlabel, ylabel: of the plot.
        series: by name; equal names look equal in all panels of a picture.
        options: of matplotlib's `Axes.set`, such as `xscale`.
        floor: height of a dotted line.
    """

    title: str
    xlabel: str
    ylabel: str
    series: Mapping[str, Series]
    options: Mapping[str, Any] = field(default_factory=dict)
    floor: float | None = None


def draw(
    path: Path,
    strips: Mapping[str, np.ndarray] | None = None,
    panels: Sequence[Panel] = (),
    columns: int = 2,
    captions: Sequence[str] = (),
    small: bool = False,
) -> None:
    """Writes a picture: strips of images one below the other, and panels below them.

    Args:
        path: of the PNG.
        strips: images (n, h, w[, 3]) in [0, 1] by title.
        panels: in rows of `columns`.
        captions: prompts of the strips' columns.
        small: with a palette of 256 colours, a third of the bytes.
    """
    strips = strips or {}
    rows = -(-len(panels) // columns)
    heights = [0.78 * len(strips) + 0.3 * bool(captions), 3.6 * rows]
    width = max(5.4 * min(columns, len(panels)), 11.0 if strips else 0.0)
    figure = plt.figure(figsize=(width, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights) if strips and panels else [figure, figure]
    if strips:
        axes = np.ravel(parts[0].subplots(len(strips), 1))
        for axis, (title, pictures) in zip(axes, strips.items()):
            _strip(axis, title, pictures)
        for number, caption in enumerate(captions):
            high, wide = next(iter(strips.values())).shape[1:3]
            words = caption.replace(" left of ", "\nleft of ")
            axes[-1].text((wide + 2) * number, high + 4, words, fontsize=5.5, va="top")
    if panels:
        names = list(dict.fromkeys(name for panel in panels for name in panel.series))
        axes = np.ravel(parts[1].subplots(rows, min(columns, len(panels))))
        for axis, panel in zip(axes, panels):
            _panel(axis, panel, names)
        for axis in axes[len(panels) :]:
            axis.axis("off")
        handles: dict[str, Any] = {}
        for axis in axes[: len(panels)]:
            handles |= dict(zip(*axis.get_legend_handles_labels()[::-1]))
        # Beside the axes, where it hides no point.
        place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(len(handles), 8)}
        parts[1].legend(handles.values(), handles, **place, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    if small:
        with Image.open(path) as picture:
            picture.convert("RGB").quantize(256).save(path, optimize=True)


def _strip(axis: Any, title: str, pictures: np.ndarray) -> None:
    pictures = pictures[..., 0] if pictures.shape[-1] == 1 else pictures
    gap = [(0, 0), (0, 0), (0, 2), *[(0, 0)] * (pictures.ndim - 3)]
    padded = np.pad(np.clip(pictures.astype(np.float32), 0, 1), gap, constant_values=1)
    axis.imshow(np.concatenate(list(padded), 1), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=7, loc="left", pad=2)
    axis.axis("off")


def _panel(axis: Any, panel: Panel, names: Sequence[str]) -> None:
    every = [x for series in panel.series.values() for x in series.xs]
    # Points without a line stand beside each other where the abscissas are equal.
    apart = 0.0 if panel.options.get("xscale") == "log" or not every else 0.012 * (max(every) - min(every))
    for name, series in panel.series.items():
        number = names.index(name)
        aside = 0.0 if series.line else apart * number
        values = [y if isinstance(y, Estimate) else Estimate(y, y, y) for y in series.ys]
        middle = np.array([v.value for v in values])
        spread = np.array([[v.value - v.low, v.high - v.value] for v in values]).T
        axis.errorbar(
            [x + aside for x in series.xs],
            middle,
            np.maximum(spread, 0) if len(values) else None,
            color=f"C{number % 10}",
            marker=MARKERS[number % len(MARKERS)],
            linestyle=series.line or "none",
            label=name,
            capsize=2,
            alpha=0.85,
        )
        for x, y, note in zip(series.xs, middle, series.notes):
            axis.annotate(note, (x, y), textcoords="offset points", xytext=(5, -3), fontsize=7)
    if panel.floor is not None:
        axis.axhline(panel.floor, color="0.7", linestyle=":", label="floor")
    axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel, **panel.options)
    if panel.options.get("xscale") == "log":
        xs = sorted({float(x) for series in panel.series.values() for x in series.xs})
        axis.set_xticks(xs, [f"{x:g}" for x in xs])
        axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
