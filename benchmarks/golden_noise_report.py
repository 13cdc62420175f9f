"""The tables, the plot and the sheet of images of benchmarks/golden_noise.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from golden_noise_runs import BEST_OF, GUIDANCES, STEPS, Job, Outcome

from diffusers_ext.metrics.comparison import (
    Estimate,
    bootstrap,
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.testbed.runs import load_reference

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Collect = Callable[[Job], Outcome]

NAMES = {
    "plain": "plain",
    "npnet": "**NPNet**",
    "re-denoised": "re-denoised (the target)",
    "random": "random change, equal norm",
    "shuffled": "NPNet, another prompt",
    "rescaled": "mean and variance only",
}
HEADER = [
    "guidance",
    "noise",
    "rows an image",
    "prompt accuracy, %",
    "less plain's",
    "Fréchet distance",
    "less plain's",
    "diversity, less plain's, %",
    "the same among right images, %",
]


def write_report(
    folder: Path,
    prompts: list[str],
    seeds: int,
    collect: Collect,
    collect_best: Callable[[float, int], Outcome],
    real: Outcome | None,
) -> None:
    """Writes golden_noise.md, golden_noise.png and golden_noise_pictures.png."""
    reference = load_reference("scenes-test")
    found: dict[tuple[str, float], Outcome] = {}
    rows = []
    for guidance in GUIDANCES:
        for variant, name in NAMES.items():
            job = Job(variant, guidance, 0)
            found[variant, guidance] = collect(job)
            rows.append(_row(guidance, name, job.rows, found, (variant, guidance), reference, seeds))
        for count in (2, BEST_OF):
            found[f"best of {count}", guidance] = collect_best(guidance, count)
            cost = count * Job("plain", guidance, 0).rows
            key = (f"best of {count}", guidance)
            rows.append(_row(guidance, f"best of {count}", cost, found, key, reference, seeds))
    if real is not None:
        # Its noise is nobody's, so only the comparison with guidance 1 of two unpaired sets makes sense.
        found["real", 1.0] = real
        rows.append(
            [
                "",
                *_row(1.0, "real images, through the autoencoder", 0, found, ("real", 1.0), reference, seeds)[
                    1:
                ],
            ]
        )
    main_table = markdown_table(HEADER, rows)
    text = "\n\n".join(
        [
            f"DPM++ 2M, {STEPS} steps.",
            main_table,
            _note(len(prompts), seeds, reference),
            *_more(found, collect, reference, seeds),
        ]
    )
    (folder / "golden_noise.md").write_text(text + "\n")
    _plot(folder / "golden_noise.png", found, collect, seeds)
    _sheet(folder / "golden_noise_pictures.png", found, prompts)
    print(text)


def _row(
    guidance: float,
    name: str,
    cost: float,
    found: dict[tuple[str, float], Outcome],
    key: tuple[str, float],
    reference: FeatureStats,
    seeds: int,
) -> list[str]:
    ours, plain = found[key], found["plain", guidance]
    distance = frechet_interval(ours.features, reference, prompts_of(ours, seeds))
    cells = [f"{guidance:g}", name, f"{cost:g}", share(ours.aligned, seeds).format(1, 100)]
    if key[0] == "plain":
        return [*cells, "", distance.format(), "", "", ""]
    change = paired_frechet_difference(ours.features, plain.features, reference, prompts_of(ours, seeds))
    return [
        *cells,
        paired(ours.aligned, plain.aligned, seeds).marked(1, 100),
        distance.format(),
        change.marked(),
        diversity_change(ours, plain, seeds).marked(1, 100),
        diversity_change(ours, plain, seeds, right_only=True).marked(1, 100),
    ]


def prompts_of(outcome: Outcome, seeds: int) -> np.ndarray:
    """Number of every image's prompt: the images of one prompt follow each other."""
    return np.arange(len(outcome.features)) // seeds


def share(right: np.ndarray, seeds: int) -> Estimate:
    """Mean with an interval over prompts."""
    return proportion(right, np.arange(len(right)) // seeds)


def paired(ours: np.ndarray, control: np.ndarray, seeds: int) -> Estimate:
    """Mean difference on the same prompts and seeds, with an interval over prompts."""
    return paired_difference(ours, control, np.arange(len(ours)) // seeds)


def diversity_change(ours: Outcome, plain: Outcome, seeds: int, right_only: bool = False) -> Estimate:
    """Relative change of the mean feature distance between two images of one prompt, with an interval over prompts.

    `right_only`: of those pairs of seeds whose images are right in both variants, as wrong images are
    diverse too.
    """
    upper = np.triu_indices(seeds, 1)

    def distances(outcome: Outcome) -> np.ndarray:
        x = outcome.features.reshape(-1, seeds, outcome.features.shape[-1])
        return np.linalg.norm(x[:, upper[0]] - x[:, upper[1]], axis=-1)

    def both_right(outcome: Outcome) -> np.ndarray:
        right = outcome.aligned.reshape(-1, seeds)
        return right[:, upper[0]] & right[:, upper[1]]

    a, b = distances(ours), distances(plain)
    counted = both_right(ours) & both_right(plain) if right_only else np.ones_like(a, bool)

    def change(rows: np.ndarray) -> float:
        mask = counted[rows]
        return float(a[rows][mask].mean() / b[rows][mask].mean() - 1)

    return bootstrap(change, len(a))


def _note(num_prompts: int, seeds: int, reference: FeatureStats) -> str:
    floor = frechet_distance(load_reference("scenes-train"), reference)
    return (
        f"{num_prompts * seeds:,} images a row: {num_prompts} held-out prompts, {seeds} seeds each, the same in every"
        " row; 95% intervals over prompts, bold where they exclude 0. A row is one evaluation of the denoiser"
        " for one image; guided steps take two. *Best of N* is chosen by the grader that the table is made with, the"
        f" most that choosing can give. Fréchet floor (real train against real test images) {floor:.2f}."
    )


def _more(
    found: dict[tuple[str, float], Outcome], collect: Collect, reference: FeatureStats, seeds: int
) -> list[str]:
    """The tables of dose, of equal cost and of other samplings."""
    plain, golden = found["plain", 1.0], found["npnet", 1.0]

    def line(name: str, job: Job, control: Outcome) -> list[str]:
        ours = collect(job)
        return [
            name,
            f"{job.rows:g}",
            share(ours.aligned, seeds).format(1, 100),
            paired(ours.aligned, control.aligned, seeds).marked(1, 100),
            paired_frechet_difference(
                ours.features, control.features, reference, prompts_of(ours, seeds)
            ).marked(),
            diversity_change(ours, control, seeds).marked(1, 100),
        ]

    columns = [
        "",
        "rows an image",
        "prompt accuracy, %",
        "less the control's",
        "Fréchet, less",
        "diversity, less, %",
    ]
    dose = [line(f"strength {s:g}", Job("npnet", 1.0, 0, strength=s), plain) for s in (0.5, 1.0, 2.0)]
    guided = [("guidance 1.25", Job("plain", 1.25, 0))]
    guided += [(f"guidance {g:g}", Job("plain", g, 0)) for g in GUIDANCES[1:]]
    guided += [
        (f"guidance {g:g}, half the steps", Job("plain", g, 0, steps=STEPS // 2)) for g in GUIDANCES[1:]
    ]
    cost = [line(name, job, golden) for name, job in guided]
    half = []
    for g in GUIDANCES[1:]:
        control = collect(Job("plain", g, 0, steps=STEPS // 2))
        half.append(line(f"guidance {g:g}", Job("npnet", g, 0, steps=STEPS // 2), control))
    other = []
    for name, options in (("20 steps", {"steps": 20}), ("trailing timesteps", {"spacing": "trailing"})):
        settings: dict[str, Any] = options
        control = collect(Job("plain", 1.0, 0, **settings))
        other.append(
            [
                f"{name}, plain",
                f"{Job('plain', 1.0, 0, **settings).rows:g}",
                share(control.aligned, seeds).format(1, 100),
                "",
                "",
                "",
            ]
        )
        other.append(line(f"{name}, NPNet", Job("npnet", 1.0, 0, **settings), control))
    return [
        "Strength of the change, guidance 1; the control is plain noise.",
        markdown_table(columns, dose),
        "Plain noise with guidance, against golden noise without (guidance 1, strength 1): the difference is to golden"
        " noise, so above 0 the guided plain noise is better.",
        markdown_table(columns, cost),
        f"Golden noise with guidance in half the steps ({STEPS // 2}), which costs what {STEPS} steps without guidance do; the"
        " control is plain noise in the same sampling.",
        markdown_table(columns, half),
        "Other samplings, guidance 1; the control is plain noise in the same sampling. Trailing timesteps begin at the"
        " highest noise level, which the default leaves out.",
        markdown_table(columns, other),
    ]


def _plot(path: Path, found: dict[tuple[str, float], Outcome], collect: Collect, seeds: int) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    styles = {"plain": ("k", "o"), "npnet": ("tab:red", "s"), "re-denoised": ("tab:purple", "D")}
    styles |= {"random": ("tab:gray", "+"), "shuffled": ("tab:brown", "v"), "rescaled": ("tab:orange", "x")}
    for variant, (color, marker) in styles.items():
        values = [share(found[variant, g].aligned, seeds) for g in GUIDANCES]
        middle = np.array([v.value for v in values])
        spread = np.array([[v.value - v.low, v.high - v.value] for v in values]).T
        name = NAMES[variant].replace("*", "")
        left.errorbar(
            GUIDANCES, 100 * middle, 100 * spread, color=color, marker=marker, label=name, capsize=2
        )
    left.set_xlabel("guidance scale")
    left.set_ylabel("prompt accuracy, %")
    left.legend(fontsize=7)
    for variant in ("plain", "npnet"):
        color, marker = styles[variant]
        rows = [Job(variant, g, 0).rows for g in GUIDANCES]
        values = [100 * share(found[variant, g].aligned, seeds).value for g in GUIDANCES]
        right.scatter(
            rows,
            values,
            color=color,
            marker=marker,
            label=f"{NAMES[variant].replace('*', '')}, {STEPS} steps",
        )
        for g, x, y in zip(GUIDANCES, rows, values):
            right.annotate(f"{g:g}", (x, y), textcoords="offset points", xytext=(5, -3), fontsize=7)
    for variant in ("plain", "npnet"):
        halves = [collect(Job(variant, g, 0, steps=STEPS // 2)) for g in GUIDANCES[1:]]
        heights = [100 * share(o.aligned, seeds).value for o in halves]
        label = f"{NAMES[variant].replace('*', '')}, {STEPS // 2} steps"
        right.scatter([STEPS] * len(halves), heights, color=styles[variant][0], marker="^", label=label)
        for g, y in zip(GUIDANCES[1:], heights):
            right.annotate(f"{g:g}", (STEPS, y), textcoords="offset points", xytext=(5, -3), fontsize=7)
    for g in (1.0, 2.0):
        outcomes = [found["plain", g], found["best of 2", g], found[f"best of {BEST_OF}", g]]
        xs = [n * Job("plain", g, 0).rows for n in (1, 2, BEST_OF)]
        ys = [100 * share(o.aligned, seeds).value for o in outcomes]
        right.plot(xs, ys, "--", lw=1, marker=".", label=f"best of 1, 2, {BEST_OF} at guidance {g:g}")
    right.set_xscale("log")
    ticks = [3, 6, 12, 24, 48]
    right.set_xticks(ticks, [str(t) for t in ticks])
    right.minorticks_off()
    right.set_xlabel("denoiser rows an image; the numbers are guidance scales")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _sheet(path: Path, found: dict[tuple[str, float], Outcome], prompts: list[str]) -> None:
    lines = [("plain", 1.0), ("npnet", 1.0), ("re-denoised", 1.0), ("plain", 2.0), ("npnet", 2.0)]
    figure, axes = plt.subplots(len(lines), 1, figsize=(12, 0.85 * len(lines) + 0.4))
    for axis, key in zip(axes, lines):
        strip = torch.from_numpy(found[key].pictures[:8]).movedim(-1, 1)
        strip = torch.cat(list(torch.nn.functional.pad(strip, (0, 2))), 2).movedim(0, 2)
        axis.imshow(strip.clamp(0, 1))
        axis.set_title(f"{NAMES[key[0]].replace('*', '')}, guidance {key[1]:g}", fontsize=9, loc="left")
        axis.axis("off")
    figure.text(0.01, 0.005, " · ".join(prompts[:8]), fontsize=5.2)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)
