"""Tables of rows against controls: the columns are declared, and Holm's correction decides what is bold."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_ext.metrics.comparison import Estimate, holm, markdown_table

from .samples import JUDGES
from .statistics import Statistics

Cells = str | float | Estimate


@dataclass(frozen=True)
class Measure:
    """A figure of a row, its difference to the control's, or both, each a column.

    Attributes:
        label: of the column of values; the other is "less CONTROL".
        value: of a row's subject.
        difference: of a row's subject and its control's.
        digits, scale: of the printed numbers.
        header: of the column of differences, where "less CONTROL" would not tell what differs.
        tested: whether the difference counts for Holm's correction; not if another column tests the same.
    """

    label: str
    value: Callable[[Any], Cells] | None = None
    difference: Callable[[Any, Any], Estimate] | None = None
    digits: int = 2
    scale: float = 1.0
    header: str = "less {}"
    tested: bool = True


@dataclass(frozen=True)
class Row:
    """A row of a table: its first cells, what is measured, and what it is compared with."""

    labels: tuple[str, ...]
    subject: Any
    control: Any = None


def comparison(
    header: Sequence[str], rows: Sequence[Row], measures: Sequence[Measure], control: str = "the control's"
) -> str:
    """A Markdown table, and below it the number of its differences, as Holm's correction counts them.

    Args:
        header: of the rows' labels.
        rows: in order.
        measures: the columns. A row without a subject has none, and one without a control no differences; if no row has
            one, there are no columns of differences.
        control: what the controls are called.
    """
    head = list(header)
    values: list[list[Cells]] = [[] for _ in rows]
    compared_at_all = any(row.control is not None for row in rows)
    for measure in measures:
        if measure.value:
            head.append(measure.label)
        if measure.difference and compared_at_all:
            head.append(measure.header.format(control))
        for cells, row in zip(values, rows):
            there = row.subject is not None
            if measure.value:
                cells.append(measure.value(row.subject) if there else "")
            if measure.difference and compared_at_all:
                compared = there and row.control is not None
                cells.append(_difference(measure, row) if compared else "")
    differences = [cell.estimate for cells in values for cell in cells if isinstance(cell, _Difference)]
    marks = iter(holm(differences) if differences else [])
    formats = [
        (m.digits, m.scale) for m in measures for part in (m.value, compared_at_all and m.difference) if part
    ]
    lines = [
        [*row.labels, *(_text(cell, *how, marks) for cell, how in zip(cells, formats))]
        for row, cells in zip(rows, values)
    ]
    table = markdown_table(head, lines)
    if not differences:
        return table
    return (
        f"{table}\n\nBold: differs from 0 at a level of 5% for the {len(differences)} differences of the table together"
        " (Holm's correction). Intervals are 95% each."
    )


def _difference(measure: Measure, row: Row) -> Any:
    assert measure.difference
    found = measure.difference(row.subject, row.control)
    if math.isnan(found.value):
        return "–"
    return _Difference(found) if measure.tested else found


@dataclass(frozen=True)
class _Difference:
    estimate: Estimate


def _text(cell: Any, digits: int, scale: float, marks: Any) -> str:
    if isinstance(cell, _Difference):
        text = cell.estimate.format(digits, scale)
        return f"**{text}**" if next(marks) else text
    if isinstance(cell, Estimate):
        return "–" if math.isnan(cell.value) else cell.format(digits, scale)
    return cell if isinstance(cell, str) else f"{scale * cell:.{digits}f}"


def quality(statistics: Statistics, diversity: bool = False) -> list[Measure]:
    """The measures of samples: prompt accuracy, FD∞ and diversity within a prompt by both judges, KID, density and coverage.

    Args:
        statistics: of the kind of images; garments have no prompts.
        diversity: whether the rows have several images of a prompt.
    """
    first = next(iter(JUDGES))
    who = {judge: f" ({judge})" if len(JUDGES) > 1 else "" for judge in JUDGES}
    found: list[Measure] = []
    if statistics.kind == "scenes":
        found += [_accuracy(statistics, judge, name) for judge, name in who.items()]
    # Distances of other features have another scale, so the other judges' differences are enough.
    found += [_distance(statistics, judge, name, judge == first) for judge, name in who.items()]
    found += [
        Measure("KID · 1000", lambda ours: statistics.kernel_distance(ours, first)),
        Measure("density / coverage", lambda ours: statistics.density_and_coverage(ours, first)),
    ]
    if diversity:
        found += [_diversity(statistics, judge, name) for judge, name in who.items()]
    return found


def _accuracy(statistics: Statistics, judge: str, who: str) -> Measure:
    return Measure(
        f"prompt accuracy, %{who}",
        lambda ours: statistics.accuracy(ours, judge),
        lambda ours, control: statistics.accuracy_difference(ours, control, judge),
        digits=1,
        scale=100,
    )


def _distance(statistics: Statistics, judge: str, who: str, value: bool) -> Measure:
    return Measure(
        f"FD∞{who}",
        (lambda ours: statistics.distance(ours, judge)) if value else None,
        lambda ours, control: statistics.distance_difference(ours, control, judge),
        header="less {}" if value else f"FD∞{who}, less {{}}",
    )


def _diversity(statistics: Statistics, judge: str, who: str) -> Measure:
    return Measure(
        "",
        None,
        lambda ours, control: statistics.diversity_change(ours, control, judge),
        digits=1,
        scale=100,
        header=f"diversity among right images{who}, less {{}}, %",
    )
