"""Editing and repairing of scenes by SIGN projectors and prompts, beside SDEdit and inversion by the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_ext.metrics.comparison import markdown_table

from .framework.bench import Bench
from .framework.cells import Cell
from .framework.plots import draw
from .framework.samples import JUDGES, Samples
from .framework.statistics import Statistics
from .framework.tables import Measure, Row, comparison, quality
from .sign_editing_runs import (
    BEFORE,
    GUIDANCE,
    INVERSION,
    KINDS,
    SDEDIT,
    SIGN,
    edited,
    idempotent,
    restored,
    rows_an_image,
    to_edit,
)
from .sign_text_runs import Base, flow_base, unet_base

WRITES = ("sign_editing.md", "sign_editing.png", "sign_editing_flow.md", "sign_editing_flow.png")
SHOWN = 8

# A method, its steps, and how strong it is.
How = tuple[str, int, float]


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is.

    Attributes:
        scenes: of every edit and every corruption.
        sign_steps: of the projector in edits.
        steps: of the other methods.
        strengths: noise of an edit by the projector, as a share of its level.
        more: further strengths of SDEdit, above the level of the projector.
        shares: of the steps with the new prompt after an inversion; with one step all of them.
        projections: strengths of a projection, also of SDEdit but for 0.
        corruptions: see `corrupt`.
    """

    scenes: int = 200
    sign_steps: tuple[int, ...] = (1, 2)
    steps: tuple[int, ...] = (1, 10)
    strengths: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0)
    more: tuple[float, ...] = (2.0,)
    shares: tuple[float, ...] = (0.5, 0.7, 0.9)
    projections: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4)
    corruptions: tuple[str, ...] = ("noise 0.2", "noise 0.5", "mask", "blur", "salt and pepper")


QUICK = Settings(4, (1,), (1,), (0.5,), (), (0.7,), (0.0, 0.2), ("noise 0.2", "mask"))


def edits_of(s: Settings) -> list[How]:
    """Every method at every strength."""
    found: list[How] = [(BEFORE, 0, 0.0)]
    found += [(SIGN, n, x) for n in s.sign_steps for x in s.strengths]
    for n in s.steps:
        found += [(SDEDIT, n, x) for x in (*s.strengths, *s.more)]
        found += [(INVERSION, n, x) for x in (s.shares if n > 1 else (1.0,))]
    return found


def repairs_of(s: Settings) -> list[How]:
    """The same for spoilt scenes."""
    found: list[How] = [(BEFORE, 0, 0.0), *((SIGN, 1, x) for x in s.projections)]
    return found + [(SDEDIT, n, x) for n in s.steps for x in s.projections if x]


def main(bench: Bench) -> None:
    """Measures what is missing, and writes both pages, that of the UNet first."""
    s = bench.pick(Settings(), QUICK)
    for name, make in (("sign_editing", unet_base), ("sign_editing_flow", flow_base)):
        page(bench, s, make(bench), name)


def page(bench: Bench, s: Settings, base: Base, name: str) -> None:
    """The page of one teacher."""
    statistics, strips, repaired = bench.statistics("scenes"), {}, {}
    parts = [
        f"{s.scenes} real test scenes a row, the same noise in every row. SDEdit and inversion use the teacher at guidance"
        f" {GUIDANCE:g}, of which a step evaluates two rows; an inversion has one more for each step. Strength is the noise as"
        " a share of the projector's level, after an inversion the share of the steps with the new prompt."
    ]
    for kind in KINDS:
        found = samples_of(bench, s, base, edited, kind, edits_of(s))
        chosen = best(found, lambda one: (one.rows["new grader"] & one.rows["kept grader"]).mean())
        parts += [f"{kind.capitalize()}, at the strength with most images right:"]
        parts += [table(found, chosen, edit_measures(statistics))]
        strips |= {f"{kind}: {title(how)}": found[how].pictures[:SHOWN] for how in chosen if kind == KINDS[0]}
    for corruption in s.corruptions:
        found = samples_of(bench, s, base, restored, corruption, repairs_of(s))
        chosen = best(found, lambda one: one.rows["psnr"].mean())
        parts += [
            f"Spoilt by {corruption}, projected with the own prompt, at the strength of the highest PSNR:"
        ]
        parts += [table(found, chosen, [psnr(statistics), *quality(statistics)])]
        shown = [how for how in chosen if how[0] in (BEFORE, SIGN)]
        repaired |= {f"{corruption}: {title(how)}": found[how].pictures[:SHOWN] for how in shown}
    bench.write(f"{name}.md", *parts, *fixed_points(bench, s, base))
    captions = to_edit(bench.data_dir, KINDS[0], s.scenes)[2][:SHOWN]
    # The captions are those of the edits, which are last.
    draw(bench.path(f"{name}.png"), repaired | strips, captions=captions, small=True)


def samples_of(
    bench: Bench, s: Settings, base: Base, function: Any, what: str, wanted: Sequence[How]
) -> dict[How, Samples]:
    """One edit or corruption by every method."""

    def cell(how: How) -> Cell:
        given = (base.sign, base.folder, what, *how, bench.data_dir, s.scenes)
        return Cell(function, given, base.reads)

    return bench.samples({how: [cell(how)] for how in wanted})


def best(found: Mapping[How, Samples], score: Any) -> list[How]:
    """Of every method and number of steps, the strength of the highest score."""
    methods = dict.fromkeys(how[:2] for how in found)
    return [max((how for how in found if how[:2] == m), key=lambda how: score(found[how])) for m in methods]


def title(how: How) -> str:
    """Of a row of images."""
    method, steps, strength = how
    return method if method == BEFORE else f"{method}, {steps} step{'s' * (steps > 1)}, strength {strength:g}"


def table(found: Mapping[How, Samples], chosen: Sequence[How], measures: list[Measure]) -> str:
    """The chosen rows, against the projector in one step."""
    ours = next(how for how in chosen if how[:2] == (SIGN, 1))
    rows = []
    for how in chosen:
        method, steps, strength = how
        labels = (method, str(rows_an_image(method, steps)), "" if method == BEFORE else f"{strength:g}")
        rows.append(Row(labels, found[how], None if how == ours else found[ours]))
    return comparison(["", "rows an image", "strength"], rows, measures, "SIGN's in one step")


def edit_measures(statistics: Statistics) -> list[Measure]:
    """New and kept words by both judges, and the distance outside of the edit."""

    def measure(label: str, key: str, digits: int, scale: float) -> Measure:
        return Measure(
            label,
            lambda one: statistics.mean(one.rows[key], one.prompts),
            lambda one, control: statistics.difference(one.rows[key], control.rows[key], one.prompts),
            digits=digits,
            scale=scale,
        )

    shares = [
        measure(f"{word} right, % ({judge})", f"{key} {judge}", 1, 100)
        for key, word in (("new", "new word"), ("kept", "kept words"))
        for judge in JUDGES
    ]
    return [*shares, measure("mean abs. change outside", "outside", 3, 1)]


def psnr(statistics: Statistics) -> Measure:
    """Mean PSNR."""
    return Measure(
        "PSNR, dB",
        lambda one: statistics.mean(one.rows["psnr"]),
        lambda one, control: statistics.difference(one.rows["psnr"], control.rows["psnr"]),
        digits=1,
    )


def fixed_points(bench: Bench, s: Settings, base: Base) -> list[str]:
    """Idempotence with prompts: the projector and the teacher's network at the same level."""
    cells = {
        name: Cell(idempotent, (base.sign, base.folder, trained, bench.data_dir, s.scenes), base.reads)
        for name, trained in ((SIGN, True), ("teacher's network, held at the level", False))
    }
    found = bench.run(cells.values())
    figures = ("idempotence", "motion", "variance", "reconstruction", "no prompt")
    rows = []
    for name, cell in cells.items():
        of: Any = found[cell]
        shares = [f"{100 * float(of[f'{key} {judge}']):.1f}" for key in ("own", "other") for judge in JUDGES]
        rows.append([name, *(f"{float(of[figure]):.3f}" for figure in figures), *shares])
    header = [
        "‖f(f(z, c), c) − f(z, c)‖/‖f(z, c)‖",
        "‖f(z, c) − z‖/‖z‖",
        "variance, share of the data's",
        "mean abs. f(x, c) − x",
        "mean abs. f(y, ∅) − y, y = f(z, c)",
        *(f"{what} ({judge})" for what in ("c right, %", "c' right in f(y, c'), %") for judge in JUDGES),
    ]
    return [
        f"Idempotence with prompts, {s.scenes} test scenes x with their prompts c and as many samples; c' is the prompt of"
        " another scene:",
        markdown_table(["", *header], rows),
    ]
