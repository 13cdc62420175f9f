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


def quality(statistics: Statistics, diversity: bool = False, values: bool = True) -> list[Measure]:
    """The measures of samples by both judges: prompt accuracy, FD∞, KID, density and coverage, diversity within a prompt.

    Args:
        statistics: of the kind of images; garments have no prompts.
        diversity: whether the rows have several images of a prompt.
        values: whether distances stand there themselves, beside their differences.
    """
    found: list[Measure] = []
    for judge in JUDGES:
        who = f" ({judge})" if len(JUDGES) > 1 else ""
        if statistics.kind == "scenes":
            found.append(_accuracy(statistics, judge, who))
        found.append(_distance(statistics, judge, who, values))
        if values:
            found += [
                Measure(
                    f"KID · 1000{who}", lambda ours, judge=judge: statistics.kernel_distance(ours, judge)
                ),
                Measure(
                    f"density / coverage{who}",
                    lambda ours, judge=judge: statistics.density_and_coverage(ours, judge),
                ),
            ]
        if diversity:
            found += [_diversity(statistics, judge, who, right_only) for right_only in (False, True)]
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


def _diversity(statistics: Statistics, judge: str, who: str, right_only: bool) -> Measure:
    among = " among right images" * right_only
    return Measure(
        "",
        None,
        lambda ours, control: statistics.diversity_change(ours, control, judge, right_only),
        digits=1,
        scale=100,
        header=f"diversity{among}{who}, less {{}}, %",
    )
