"""The rows and tables of the pages of golden noise, on the UNet and on the flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .framework.plots import Panel, Series
from .framework.samples import Samples
from .framework.statistics import Statistics
from .framework.tables import Measure, Row, comparison

STEPS, BEST_OF = 6, 4
# Up to this guidance scale all controls are run.
FULL = 2.0
NAMES = {
    "plain": "plain",
    "npnet": "NPNet",
    "re-denoised": "re-denoised (the target)",
    "random": "random change, equal norm",
    "shuffled": "NPNet, another prompt",
    "rescaled": "mean and variance only",
}


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is."""

    prompts: int = 300
    seeds: int = 2
    guidances: tuple[float, ...] = (1.0, 2.0, 3.0)
    best_of: tuple[int, ...] = (2, BEST_OF)
    strengths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.5, 2.0)
    others: tuple[str, ...] = ("20 steps", "trailing timesteps")
    # Of re-denoising, for the target.
    rounds: int = 1
    # With all controls, besides the few steps of the page.
    more_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Job:
    """Images of all prompts: what the noise is and how it is sampled.

    Attributes:
        variant: one of `NAMES`, `ROUNDS` or `LOWEST`.
        guidance, steps, spacing: of the sampling; spacing is the scheduler's `timestep_spacing`.
        strength: of the change of the noise.
        candidate: which of the `BEST_OF` noises of every seed.
    """

    variant: str
    guidance: float = 1.0
    steps: int = STEPS
    spacing: str = "leading"
    strength: float = 1.0
    candidate: int = 0

    @property
    def cost(self) -> int:
        """Denoiser rows an image, without those of re-denoising: a guided step evaluates two."""
        return self.steps * (2 if self.guidance > 1 else 1)


def jobs_of(settings: Settings) -> list[Job]:
    """All rows, those that most depends on first."""
    plain, golden = Job("plain"), Job("npnet")
    guided = [g for g in settings.guidances if g > 1]
    found = [Job(variant, guidance) for guidance in settings.guidances for variant in noises(guidance)]
    found += [replace(golden, strength=s) for s in settings.strengths]
    found += [Job(variant) for variant in (*ROUNDS, *LOWEST)]
    found += [Job(variant, g, STEPS // 2) for g in guided for variant in ("plain", "npnet")]
    found += [replace(job, **OTHERS[name]) for name in settings.others for job in (plain, golden)]
    for steps in settings.more_steps:
        found += [Job(v, g, steps) for g in settings.guidances if g <= FULL for v in noises(g)]
    candidates = range(1, max(settings.best_of))
    return found + [Job("plain", g, candidate=k) for g in settings.guidances if g <= FULL for k in candidates]


def noises(guidance: float) -> list[str]:
    """The rows of the first table at a guidance scale: all controls up to `FULL`."""
    return [*NAMES] if guidance <= FULL else ["plain", "npnet"]


# Other changes of the noise, for the trade between prompts and diversity.
ROUNDS = {f"{n} rounds": n for n in (2, 3)}
# Of 8 × 16 frequencies.
LOWEST = {f"lowest {n} × {2 * n} frequencies": n for n in (1, 2, 4)}
OTHERS: dict[str, dict[str, Any]] = {"20 steps": {"steps": 20}, "trailing timesteps": {"spacing": "trailing"}}


def best_of(candidates: Sequence[Samples]) -> Samples:
    """Of each image's candidates the one that the grader is surest of: the most that choosing can give."""
    choice = np.stack([c.rows["confidence"] for c in candidates]).argmax(0)
    names = candidates[0].rows
    stacked = {name: np.stack([c.rows[name] for c in candidates]) for name in names}
    rows = {name: values[choice, np.arange(len(choice))] for name, values in stacked.items()}
    return Samples(rows, candidates[0].pictures)


def main_table(
    found: dict[Job, Samples], settings: Settings, measures: list[Measure], images_of_garments: Samples
) -> str:
    """Every noise at every guidance scale."""
    rows = noise_rows(found, settings, settings.guidances, STEPS, settings.best_of)
    # Its noise is nobody's: a comparison of two sets that share their prompts only.
    rows.append(
        Row(("", "real images, through the autoencoder", "0"), images_of_garments, found[Job("plain")])
    )
    return comparison(["guidance", "noise", "rows an image"], rows, measures, "plain's")


def noise_rows(
    found: dict[Job, Samples],
    settings: Settings,
    guidances: Sequence[float],
    steps: int,
    counts: Sequence[int] = (),
) -> list[Row]:
    """Every noise at every guidance scale, and the best of `counts` plain ones."""
    rows = []
    for guidance in guidances:
        plain = Job("plain", guidance, steps)
        for variant in noises(guidance):
            job = Job(variant, guidance, steps)
            control = None if job == plain else found[plain]
            # A guided step down and one without guidance up.
            extra = 3 * settings.rounds if variant == "re-denoised" else 0
            labels = (f"{guidance:g}", NAMES[variant], f"{job.cost + extra}")
            rows.append(Row(labels, found[job], control))
        for count in counts if guidance <= FULL else ():
            chosen = best_of([found[replace(plain, candidate=k)] for k in range(count)])
            labels = (f"{guidance:g}", f"best of {count}", f"{count * plain.cost:g}")
            rows.append(Row(labels, chosen, found[plain]))
    return rows


def more_tables(found: dict[Job, Samples], settings: Settings, measures: list[Measure]) -> list[str]:
    """Strength, equal cost, half the steps, and other samplings."""
    plain, golden = Job("plain"), Job("npnet")
    guided = [g for g in settings.guidances if g > 1]

    def table(rows: list[tuple[str, Job, Job | None]]) -> str:
        made = [Row((n, f"{j.cost:g}"), found[j], found[c] if c else None) for n, j, c in rows]
        return comparison(["", "rows an image"], made, measures)

    halves = [(g, Job("plain", g, STEPS // 2), Job("npnet", g, STEPS // 2)) for g in guided]
    cost: list[tuple[str, Job, Job | None]] = [
        (f"guidance {g:g}", replace(plain, guidance=g), golden) for g in guided
    ]
    return [
        "Accuracy against diversity, guidance 1: other strengths of the change, the network used several times, and only"
        " the lowest frequencies of the change; below them guidance without golden noise. The control is plain noise.",
        table([(name, job, plain) for jobs in front(settings).values() for name, job in jobs]),
        "Plain noise with guidance, against golden noise without (guidance 1, strength 1): the difference is to golden"
        " noise, so above 0 the guided plain noise is better.",
        table(cost + [(f"guidance {g:g}, half the steps", half, golden) for g, half, _ in halves]),
        f"Golden noise with guidance in half the steps ({STEPS // 2}), which costs what {STEPS} steps without guidance do;"
        " the control is plain noise in the same sampling.",
        table([(f"guidance {g:g}", ours, half) for g, half, ours in halves]),
        *other_tables(found, settings, measures),
    ]


def other_tables(found: dict[Job, Samples], settings: Settings, measures: list[Measure]) -> list[str]:
    """Other samplings at guidance 1, and all noises with more steps."""
    rows = []
    for name in settings.others:
        control = replace(Job("plain"), **OTHERS[name])
        golden = replace(control, variant="npnet")
        rows += [Row((f"{name}, plain", f"{control.cost:g}"), found[control])]
        rows += [Row((f"{name}, NPNet", f"{golden.cost:g}"), found[golden], found[control])]
    parts = []
    if rows:
        parts += [
            "Other samplings, guidance 1; the control is plain noise in the same sampling. Trailing timesteps begin at the"
            " highest noise level, which the default leaves out.",
            comparison(["", "rows an image"], rows, measures),
        ]
    for steps in settings.more_steps:
        scales = [g for g in settings.guidances if g <= FULL]
        header = ["guidance", "noise", "rows an image"]
        parts += [
            f"{steps} steps:",
            comparison(header, noise_rows(found, settings, scales, steps), measures, "plain's"),
        ]
    return parts


def front(settings: Settings) -> dict[str, list[tuple[str, Job]]]:
    """What trades diversity for prompts, by kind: names and jobs."""
    plain, golden = Job("plain"), Job("npnet")
    strengths = sorted({1.0, *settings.strengths})
    guided = [g for g in settings.guidances if g > 1]
    return {
        "strength": [(f"strength {s:g}", replace(golden, strength=s)) for s in strengths],
        "rounds": [(name, Job(name)) for name in ROUNDS],
        "low frequencies": [(name, Job(name)) for name in LOWEST],
        "guidance": [(f"guidance {g:g}", replace(plain, guidance=g)) for g in guided],
        f"guidance, {STEPS // 2} steps": [
            (f"guidance {g:g}, {STEPS // 2} steps", Job("plain", g, STEPS // 2)) for g in guided
        ],
    }


def panels(found: dict[Job, Samples], settings: Settings, statistics: Statistics) -> list[Panel]:
    """Accuracy by guidance scale, and by cost."""

    def accuracy(job: Job) -> Any:
        return statistics.accuracy(found[job], "grader")

    guidances = settings.guidances
    by_guidance = {
        name: Series(scales, [accuracy(Job(variant, g)) for g in scales])
        for variant, name in NAMES.items()
        if (scales := [g for g in guidances if variant in noises(g)])
    }
    by_cost = {}
    for steps in (STEPS, STEPS // 2):
        scales = guidances if steps == STEPS else [g for g in guidances if g > 1]
        for variant in ("plain", "npnet"):
            jobs = [Job(variant, g, steps) for g in scales]
            notes = [f"{g:g}" for g in scales]
            name = NAMES[variant] if steps == STEPS else f"{NAMES[variant]}, {steps} steps"
            by_cost[name] = Series([job.cost for job in jobs], [accuracy(job) for job in jobs], "", notes)
    for g in (1.0, 2.0):
        plain = Job("plain", g)
        counts = (1, *settings.best_of)
        chosen = [best_of([found[replace(plain, candidate=k)] for k in range(n)]) for n in counts]
        ys = [statistics.accuracy(c, "grader") for c in chosen]
        by_cost[f"best of {', '.join(map(str, counts))} at guidance {g:g}"] = Series(
            [n * plain.cost for n in counts], ys, "--"
        )
    costs = "denoiser rows an image; the numbers are guidance scales"
    base = found[Job("plain")]

    def loss(job: Job) -> float:
        return 100 * statistics.diversity_change(found[job], base, "grader").value

    traded = {
        kind: Series([loss(job) for _, job in jobs], [accuracy(job) for _, job in jobs], "-")
        for kind, jobs in front(settings).items()
    }
    return [
        Panel("", "guidance scale", "prompt accuracy", by_guidance),
        Panel("", costs, "prompt accuracy", by_cost, {"xscale": "log"}),
        Panel("", "diversity among right images, change in %", "prompt accuracy", traded),
    ]
