"""A SIGN projector against its teacher, and every way to train it for equal times, on the embedded pixel model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers_ext.metrics.comparison import markdown_table

from . import sign_candidates
from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .framework.plots import draw
from .framework.samples import Samples
from .framework.statistics import Statistics
from .framework.tables import Measure, Row, comparison, quality
from .sign_runs import SIGN, figures, projections, reads, samples

WRITES = ("sign.md", "sign.png")
# Of the noise level that samples start from; what is added before projecting.
STRENGTHS = (0.05, 0.1, 0.2, 0.4)
SDEDIT_STEPS = (1, 10)
FIGURES = ("idempotence", "motion", "variance", "reconstruction")


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is."""

    images: int = 250
    seeds: tuple[int, ...] = (21, 22, 23)
    solvers: tuple[str, ...] = ("DPM++ 2M", "UniPC")
    sign_steps: tuple[int, ...] = (1, 2, 4)
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 50)
    source_steps: tuple[int, ...] = (1, 2, 4)
    projections: int = 200
    corruptions: tuple[str, ...] = ("noise 0.2", "noise 0.5", "noise 1", "blur", "mask", "salt and pepper")
    candidates: sign_candidates.Settings = sign_candidates.FULL


QUICK = Settings(
    images=4,
    seeds=(21,),
    solvers=("DPM++ 2M",),
    sign_steps=(1,),
    teacher_steps=(1, 2),
    source_steps=(1,),
    projections=4,
    corruptions=("noise 0.2",),
    candidates=sign_candidates.QUICK,
)

# A projector's folder, the teacher's solver, steps; see `samples`.
Drawn = tuple[Path | None, str, int]


def drawn_of(s: Settings) -> dict[tuple[str, int], Drawn]:
    """Every set of samples, by label and NFE."""
    first = s.solvers[0]
    found: dict[tuple[str, int], Drawn] = {("SIGN", n): (SIGN, "", n) for n in s.sign_steps}
    found |= {(teacher(solver), n): (None, solver, n) for solver in s.solvers for n in s.teacher_steps}
    found |= {("SIGN's source without noise", 0): (SIGN, first, 0)}
    return found | {(f"teacher, {first}, from SIGN's source", n): (SIGN, first, n) for n in s.source_steps}


def teacher(solver: str) -> str:
    """The label of the teacher's rows."""
    return f"teacher, {solver}"


def main(bench: Bench) -> None:
    """Trains and measures what is missing, and writes the page."""
    s = bench.pick(Settings(), QUICK)
    found = bench.samples(
        {
            key: [Cell(samples, (*row, seed, s.images), reads(row[0])) for seed in s.seeds]
            for key, row in drawn_of(s).items()
        }
    )
    own = {"teacher's network, held at the level": None, "SIGN": SIGN}
    cells = {n: Cell(figures, (f, bench.data_dir, s.projections), reads(f)) for n, f in own.items()}
    measured = bench.run(cells.values())
    of = {name: measured[cell] for name, cell in cells.items()}
    projected = project(bench, s)
    candidates, times = sign_candidates.measured(bench, s.candidates)
    statistics = bench.statistics("garments")
    count = s.images * len(s.seeds)
    bench.write(
        "sign.md",
        f"{count} images a row ({len(s.seeds)} seeds), the same noise in every row:",
        samples_table(statistics, found),
        best_of_teacher(statistics, s, found),
        f"{s.projections} test garments, and as many samples:",
        figures_table(of),
        f"The teacher's one-call denoising at σ ≈ 0.03 has {float(next(iter(of.values()))['floor']):.3f}.",
        "The same garments, corrupted; every method at the strength of its highest PSNR:",
        projections_table(statistics, s, projected),
        *sign_candidates.table(statistics, s.candidates, candidates, times),
    )
    strips = {f"{n}, {nfe} NFE": row.pictures for (n, nfe), row in found.items()}
    strips |= {f"trained: {name}": one.samples[0].pictures for name, one in candidates.items()}
    for corruption in s.corruptions:
        strips[corruption] = projected[corruption, "before", 0.0].pictures
        strength = best(projected, corruption, "SIGN")
        strips[f"{corruption}, projected, strength {strength:g}"] = projected[
            corruption, "SIGN", strength
        ].pictures
    draw(bench.path("sign.png"), strips, small=True)


def best_of_teacher(statistics: Statistics, s: Settings, found: Mapping[tuple[str, int], Samples]) -> str:
    """Which of the teacher's rows has the smallest distance."""
    rows = [(teacher(solver), n) for solver in s.solvers for n in s.teacher_steps]
    distances = {row: statistics.distance(found[row], "grader").value for row in rows}
    name, steps = min(rows, key=distances.__getitem__)
    return f"The best row of the teacher by the grader: {name}, {steps} NFE."


def project(bench: Bench, s: Settings) -> dict[tuple[str, str, float], Samples]:
    """Every corruption by every method at every strength."""
    wanted = [("before", 0.0), *(("SIGN", x) for x in (0.0, *STRENGTHS))]
    wanted += [(f"SDEdit {n}", x) for n in SDEDIT_STEPS for x in STRENGTHS]
    return bench.samples(
        {
            (c, *how): [Cell(projections, (c, *how, bench.data_dir, s.projections), reads(SIGN))]
            for c in s.corruptions
            for how in wanted
        }
    )


def best(projected: Mapping[tuple[str, str, float], Samples], corruption: str, method: str) -> float:
    """The strength at which a method's PSNR is highest."""
    strengths = [x for c, m, x in projected if (c, m) == (corruption, method)]
    return max(strengths, key=lambda x: float(projected[corruption, method, x].rows["psnr"].mean()))


def samples_table(statistics: Statistics, found: Mapping[tuple[str, int], Samples]) -> str:
    """The projector, and the teacher from noise and from the projector's source."""
    ours = found["SIGN", 1]
    rows = [Row((name, str(nfe)), row, None if row is ours else ours) for (name, nfe), row in found.items()]
    return comparison(["", "NFE"], rows, quality(statistics), "SIGN's in one step")


def figures_table(of: Mapping[str, Arrays]) -> str:
    """What tells a projector from the identity and from a constant."""
    rows = [[name, *(f"{float(of[name][figure]):.3f}" for figure in FIGURES)] for name in of]
    header = [
        "‖f(f(z)) − f(z)‖/‖f(z)‖",
        "‖f(z) − z‖/‖z‖",
        "variance, share of the data's",
        "mean abs. f(x) − x",
    ]
    return markdown_table(["", *header], rows)


def projections_table(
    statistics: Statistics, s: Settings, projected: Mapping[tuple[str, str, float], Samples]
) -> str:
    """PSNR and distance before and after."""
    rows = []
    for corruption in s.corruptions:
        sign = projected[corruption, "SIGN", best(projected, corruption, "SIGN")]
        for method in ("before", "SIGN", *(f"SDEdit {n}" for n in SDEDIT_STEPS)):
            strength = best(projected, corruption, method)
            label = f"teacher's SDEdit, {method[7:]} NFE" if method.startswith("SDEdit") else method
            shown = "" if method == "before" else f"{strength:g}"
            ours = projected[corruption, method, strength]
            rows.append(Row((corruption, label, shown), ours, None if method == "SIGN" else sign))
    psnr = Measure(
        "PSNR, dB",
        lambda ours: statistics.mean(ours.rows["psnr"]),
        lambda ours, control: statistics.difference(ours.rows["psnr"], control.rows["psnr"]),
        digits=1,
    )
    header = ["corrupted by", "", "strength"]
    return comparison(header, rows, [psnr, *quality(statistics)], "SIGN's")
