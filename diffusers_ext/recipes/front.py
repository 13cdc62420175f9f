"""The Pareto front of time against score, as a list, a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..core.extras import require
from ..metrics.comparison import markdown_table
from ..metrics.estimate import Estimate

if TYPE_CHECKING:
    from .recipe import Recipe


class Point(NamedTuple):
    """A recipe and what was measured with it.

    Attributes:
        recipe: methods and call.
        seconds: of one image.
        score: mean over images, with its 95% interval over prompts.
    """

    recipe: Recipe
    seconds: float
    score: Estimate


class Front(list[Point]):
    """Points of which none is faster and better than another, fastest first. `str()` is a Markdown table.

    Attributes:
        others: points that were measured on the same images and are not on the front, fastest first.
    """

    others: list[Point]

    @classmethod
    def of(cls, points: Sequence[Point]) -> Front:
        """The front of points."""
        best = layers([(point.seconds, point.score.value) for point in points])[0]
        found = cls(sorted((points[i] for i in best), key=lambda point: point.seconds))
        found.others = sorted(
            (point for i, point in enumerate(points) if i not in best), key=lambda point: point.seconds
        )
        return found

    def __str__(self) -> str:
        rows = [(point, True) for point in self] + [(point, False) for point in self.others]
        rows.sort(key=lambda row: row[0].seconds)
        cells = [
            [label(point), f"{point.seconds:.3g}", point.score.format(3), "yes" if on else ""]
            for point, on in rows
        ]
        return markdown_table(["recipe", "seconds of an image", "score", "front"], cells)

    def plot(self, path: str | Path) -> None:
        """Saves a plot of score against time as a PNG file.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        require("matplotlib.figure", "plots")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        # Not pyplot, because it sets a backend for the whole process.
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        times = [point.seconds for point in (*self, *self.others)]
        middle = (min(times) * max(times)) ** 0.5
        for points, color, name in ((self, "tab:blue", "front"), (self.others, "gray", "others")):
            scores = [point.score for point in points]
            ends = [[s.value - s.low for s in scores], [s.high - s.value for s in scores]]
            seconds = [point.seconds for point in points]
            axes.errorbar(
                seconds, [s.value for s in scores], ends, fmt="o", color=color, capsize=3, label=name
            )
            for point in points:
                place, right = (point.seconds, point.score.value), point.seconds > middle
                axes.annotate(
                    label(point),
                    place,
                    fontsize=7,
                    xytext=(-5 if right else 5, -9),
                    textcoords="offset points",
                    horizontalalignment="right" if right else "left",
                )
        axes.plot([p.seconds for p in self], [p.score.value for p in self], color="tab:blue", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("seconds of an image")
        axes.set_ylabel("score, with 95% interval")
        axes.legend()
        figure.savefig(path, dpi=120, format="png")


def label(point: Point) -> str:
    """The methods of a point and its call, in a few words."""
    recipe = point.recipe
    methods = " + ".join(recipe.lines()) or "plain"
    call = dict(recipe.call)
    parts = [methods, f"{call.pop('num_inference_steps', '?')} steps"]
    scales = [
        f"guidance {value:g}" for name, value in call.items() if name in ("guidance_scale", "true_cfg_scale")
    ]
    return ", ".join(parts + scales)


def layers(measured: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Numbers of the points (seconds, score) of the front, of the front without these, and so on.

    Of two points with the same time and score, both are in the same layer.
    """
    left, found = list(range(len(measured))), []
    while left:
        front = [i for i in left if not any(_beats(measured[j], measured[i]) for j in left)]
        found.append(front)
        left = [i for i in left if i not in front]
    return found


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other
