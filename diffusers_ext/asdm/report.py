"""The profile of a network and a pruning plan as tables for the terminal and as a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..core.extras import require
from .networks import shape_of

if TYPE_CHECKING:
    from .cost import Cost
    from .plan import PruningPlan
    from .plan_search import SearchResult
    from .search import PruningProfile

_SIDES = {"down_blocks": "tab:blue", "mid_block": "tab:green", "up_blocks": "tab:orange"}


def profile_table(profile: PruningProfile) -> Table:
    """A table of all blocks, layers and attentions: cost, and the loss without each one.

    For the blocks of a transformer also 1 − cosine of the states that enter and leave them.
    """
    turns, kind = profile.sensitivity.turns, profile.kind
    columns = ("loss without it", "1 − cos(in, out)") if turns else ("loss without it",)
    table = _table("part", *columns, title=f"Parts of the {kind}, each skipped alone")
    for path, loss in profile.sensitivity.parts.items():
        whole = kind == "transformer" or (
            path.count(".") < 2 and "resnets" not in path and "attentions" not in path
        )
        turn = [_loss(turns[path])] if turns else []
        table.add_row(
            path if whole else f"  {path}", *_figures(profile.costs.parts[path]), _loss(loss), *turn
        )
    table.add_row(f"full {kind}", *_figures(profile.costs.total), "")
    return table


def cuts_table(profile: PruningProfile) -> Table:
    """A table of all cuts: what each one saves, and the loss that it causes alone."""
    table = _table("cut", "loss", title="Cuts, each made alone, and what they save")
    shape = shape_of(profile.config)
    for group, loss in profile.sensitivity.cuts.items():
        saved = profile.costs.total - profile.costs.of_shape(shape.cut(*group))
        name = group[0] if len(group) == 1 else f"{group[0]} × {len(group)}"
        table.add_row(name, *_figures(saved), _loss(loss))
    return table


def plan_table(plan: PruningPlan) -> Table:
    """A table of the stages of a plan and the cost that remains after each."""
    table = _table("after stage", "predicted loss", "cuts", title="Pruning plan")
    stages = [("0 (all)", ()), *((str(k), cuts) for k, cuts in enumerate(plan.stages, 1))]
    for index, (name, cuts) in enumerate(stages):
        figures, loss = ["", "", ""], None
        if plan.predictions:
            figures = _figures(plan.predictions[index].cost, plan.predictions[0].cost)
            loss = plan.predictions[index].loss
        table.add_row(name, *figures, _loss(loss), ", ".join(cuts))
    return table


def search_table(result: SearchResult) -> Table:
    """A table of the candidates of a search, best first: measured times, and losses by rung."""
    from .halving import ranking

    table = Table("rank", "plan", title="Students of the candidate plans")
    for rows in result.candidates[result.control].times:
        table.add_column(f"time, {rows} row{'s' if rows > 1 else ''}", justify="right")
    for rung in result.rungs:
        table.add_column(f"loss, {rung.steps} steps", justify="right")
    for name in ("searched by", "cuts"):
        table.add_column(name)
    for rank, name in enumerate(ranking(result.rungs), 1):
        candidate = result.candidates[name]
        losses = [_loss(rung.losses.get(name)) for rung in result.rungs]
        shown = f"{name} (control)" if name == result.control else name
        times = [f"{time:.1%}" for time in candidate.times.values()]
        table.add_row(str(rank), shown, *times, *losses, candidate.source, ", ".join(candidate.plan.cuts))
    return table


def comparison_text(result: SearchResult) -> str:
    """One sentence about the best plan and the control."""
    if result.comparison is None:
        return f"The best plan is {result.control}, that of the plain search (the control)."
    return (
        f"The loss of the best plan less that of the control, {result.control}, after {result.rungs[-1].steps} steps,"
        f" on other noise and timesteps: {result.comparison.format(4)} (95% interval)."
    )


def _table(first: str, *rest: str, title: str) -> Table:
    table = Table(first, title=title)
    for name in ("parameters", "MACs", "ms"):
        table.add_column(name, justify="right")
    for name in rest:
        table.add_column(name, justify="left" if name == "cuts" else "right")
    return table


def _figures(cost: Cost, whole: Cost | None = None) -> list[str]:
    found = [short(cost.parameters), short(cost.macs)]
    found.append("–" if cost.milliseconds is None else f"{cost.milliseconds:.3g}")
    if whole is not None:
        found[0] += f" ({cost.parameters / whole.parameters:.1%})"
        found[1] += f" ({cost.macs / whole.macs:.1%})"
        if cost.milliseconds is not None and whole.milliseconds:
            found[2] += f" ({cost.milliseconds / whole.milliseconds:.1%})"
    return found


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3g}"


def short(number: float) -> str:
    """A short form of a number, such as 859.5M or 401.6G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def require_matplotlib() -> None:
    """Raises MissingExtraError if matplotlib is not installed."""
    require("matplotlib.figure", "plots")


def save_plot(profile: PruningProfile, path: str | Path, plan: PruningPlan | None = None) -> None:
    """Saves a plot as a PNG file.

    The left half shows the MACs of the parts and their losses. The right half shows the saved MACs and the
    loss of every cut, with filled markers for the cuts of the plan.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = profile.sensitivity.parts
    if profile.kind == "UNet":
        parts = {path: loss for path, loss in parts.items() if "resnets" in path or "attentions" in path}
    units = dict(parts)
    # Not pyplot, because it sets a backend for the whole process.
    figure = Figure(figsize=(13, max(4, 0.17 * len(units) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 0.6, 1.4))
    names, rows = list(units), range(len(units))
    sides = dict.fromkeys(name.split(".")[0] for name in names)
    palette = {side: _SIDES.get(side, f"C{number}") for number, side in enumerate(sides)}
    colors = [palette[name.split(".")[0]] for name in names]
    left.barh(
        rows, [100 * profile.costs.parts[n].macs / profile.costs.total.macs for n in names], color=colors
    )
    left.set_yticks(rows, names, fontsize=6)
    left.set_xlabel("share of MACs, %")
    middle.barh(rows, [units[name] or 0.0 for name in names], color=colors)
    middle.set_yticks([])
    middle.set_xscale("symlog", linthresh=1e-4)
    middle.set_xlabel("loss if skipped")
    for axes in (left, middle):
        axes.invert_yaxis()
    _plot_cuts(profile, right, plan)
    figure.savefig(path, dpi=120, format="png")


def _plot_cuts(profile: PruningProfile, axes: Any, plan: PruningPlan | None) -> None:
    shape, chosen = shape_of(profile.config), list(plan.cuts) if plan else []
    labels: dict[tuple[int, int], tuple[tuple[float, float], list[str]]] = {}
    for group, loss in profile.sensitivity.cuts.items():
        cost = profile.costs.of_shape(shape.cut(*group))
        saved = 100 * (1 - cost.macs / profile.costs.total.macs)
        taken = chosen.count(group[0]) == len(group)
        face = "tab:red" if taken else "none"
        axes.scatter(saved, loss, s=30, facecolors=face, edgecolors="tab:red" if taken else "gray")
        name = group[0] if len(group) == 1 else f"{group[0]} × {len(group)}"
        if not name.startswith(("attention:", "block:")) or taken:
            # Points that are close together share a label.
            place = round(saved / 4), round(2 * math.log10(max(loss, 1e-5)))
            labels.setdefault(place, ((saved, loss), []))[1].append(name)
    for point, names in labels.values():
        axes.annotate(
            "\n".join(names),
            point,
            fontsize=6,
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=True,
        )
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.set_xlabel("MACs saved, %")
    axes.set_ylabel("loss, the cut made alone")
    axes.set_title("filled: the plan's cuts" if chosen else "cuts", fontsize=9)
