"""Golden noise against its controls on the embedded text-to-image model, at the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from scipy.fft import dctn, idctn
from torch import Tensor

import diffusers_ext as dx
from diffusers_ext.core.images import as_tensor
from diffusers_ext.core.prompts import prompt_embeddings
from diffusers_ext.golden_noise.apply import predict
from diffusers_ext.golden_noise.training import equal_norm, rescaled, sample
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.grader import confidence, load_grader

from .framework.bench import Bench
from .framework.cells import Cell
from .framework.plots import Panel, Series, draw
from .framework.samples import CARDS, Samples, graded
from .framework.statistics import Statistics
from .framework.tables import Measure, Row, comparison, quality

WRITES = ("golden_noise.md", "golden_noise.png", "golden_noise_pictures.png")
BASE, NPNET = card_dir("fashion-scenes"), card_dir("npnet-fashion-scenes")
READS = (BASE / "unet", BASE / "vae", BASE / "text_encoder", *CARDS.values())
SIZE: dict[str, Any] = {"height": 32, "width": 64}
# Of training/collect_noise_pairs.py, for the true re-denoised noise.
PAIRS: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 5.5}
STEPS, BEST_OF, PLACES = 6, 4, 8
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
    def cost(self) -> float:
        """Denoiser rows an image: a guided step evaluates two."""
        extra = 3.0 if self.variant == "re-denoised" else 0.0
        return self.steps * (2 if self.guidance > 1 else 1) + extra


def jobs_of(settings: Settings) -> list[Job]:
    """All rows, those that most depends on first."""
    plain, golden = Job("plain"), Job("npnet")
    guided = [g for g in settings.guidances if g > 1]
    found = [Job(variant, guidance) for guidance in settings.guidances for variant in noises(guidance)]
    found += [replace(golden, strength=s) for s in settings.strengths]
    found += [Job(variant) for variant in (*ROUNDS, *LOWEST)]
    found += [Job(variant, g, STEPS // 2) for g in guided for variant in ("plain", "npnet")]
    found += [replace(job, **options) for options in OTHERS.values() for job in (plain, golden)]
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


def cells_of(job: Job, settings: Settings) -> list[Cell]:
    """A cell for each seed."""
    # Plain and re-denoised noise don't depend on the network.
    reads = READS if job.variant in ("plain", "re-denoised") else (*READS, NPNET)
    return [Cell(images, (job, seed, settings.prompts), reads) for seed in range(settings.seeds)]


def prompts(count: int) -> list[str]:
    """Held-out prompts, all different: pairs that training never showed, and single garments."""
    scenes = [*fashion_scenes.scenes("test"), *fashion_scenes.single_scenes()]
    order = np.random.default_rng(1).permutation(len(scenes))[:count]
    return [fashion_scenes.caption(scenes[i]) for i in order]


@lru_cache(maxsize=1)
def load() -> tuple[Any, dx.NPNetModel]:
    """The pipeline and its network."""
    pipe: Any = DiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    npnet: Any = dx.NPNetModel.from_pretrained(NPNET, torch_dtype=torch.float32)
    return pipe, npnet.eval()


@torch.no_grad()
def starts(job: Job, draw: int, texts: list[str]) -> Tensor:
    """The noise that a job starts from, (n, 4, 8, 16)."""
    pipe, npnet = load()
    seeds = [10_000_019 * draw + i for i in range(len(texts))]
    noise = torch.stack([torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])
    if job.variant == "plain":
        return noise
    if job.variant == "re-denoised":
        parts = [
            dx.redenoise(pipe, x, prompt=texts[low : low + 64], **SIZE, **PAIRS)
            for low, x in zip(range(0, len(texts), 64), noise.split(64))
        ]
        return torch.cat(parts)
    embeds = prompt_embeddings(pipe, texts)
    if job.variant == "shuffled":
        embeds = embeds.rows(torch.arange(len(texts)).roll(1))
    golden = predict(npnet, noise, embeds)
    for _ in range(1, ROUNDS.get(job.variant, 1)):
        golden = predict(npnet, golden, embeds)
    if job.variant in LOWEST:
        golden = noise + low_frequencies(golden - noise, LOWEST[job.variant])
    if job.variant == "random":
        golden = noise + equal_norm(golden - noise, torch.Generator().manual_seed(draw))
    if job.variant == "rescaled":
        golden = rescaled(noise, golden)
    return noise + job.strength * (golden - noise)


def low_frequencies(change: Tensor, count: int) -> Tensor:
    """The `count` lowest frequencies of the height and twice as many of the width of (n, c, h, w), by the cosine transform."""
    waves: Any = dctn(change.numpy(), axes=(2, 3), norm="ortho")
    waves[:, :, count:], waves[:, :, :, 2 * count :] = 0, 0
    return torch.from_numpy(idctn(waves, axes=(2, 3), norm="ortho"))


def images(job: Job, seed: int, num_prompts: int) -> dict[str, Any]:
    """One seed's images, graded."""
    pipe, _ = load()
    texts = prompts(num_prompts)
    latents = starts(job, BEST_OF * seed + job.candidate, texts)
    original = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(original.config, timestep_spacing=job.spacing)
    options = {"num_inference_steps": job.steps, "guidance_scale": job.guidance, **SIZE}
    pictures = sample(pipe, texts, latents, batch_size=64, **options)
    pipe.scheduler = original
    return graded(pictures, texts, confidence=confidence(load_grader(), pictures, texts))


@torch.no_grad()
def real(data_dir: Path, num_prompts: int, seeds: int) -> dict[str, Any]:
    """Real test garments composed for the same prompts, through the autoencoder."""
    texts = prompts(num_prompts) * seeds
    garments, items = fashion_scenes.load_garments(data_dir, "test")
    scenes = [fashion_scenes.parse_caption(text) for text in texts]
    drawn = np.stack(list(fashion_scenes.render(scenes, garments, items, seed=0)))
    pictures = reconstruct(load()[0].vae, as_tensor(drawn)).movedim(1, -1).numpy()
    return graded(pictures, texts)


def best_of(candidates: Sequence[Samples]) -> Samples:
    """Of each image's candidates the one that the grader is surest of: the most that choosing can give."""
    choice = np.stack([c.rows["confidence"] for c in candidates]).argmax(0)
    names = candidates[0].rows
    stacked = {name: np.stack([c.rows[name] for c in candidates]) for name in names}
    rows = {name: values[choice, np.arange(len(choice))] for name, values in stacked.items()}
    return Samples(rows, candidates[0].pictures)


def main(bench: Bench) -> None:
    """Makes the images that are missing, and writes the page."""
    settings = bench.pick(Settings(), Settings(3, 2, (1.0, 2.0), (2,), (0.5,)))
    found = bench.samples({job: cells_of(job, settings) for job in jobs_of(settings)})
    cell = Cell(real, (bench.data_dir, settings.prompts, settings.seeds), READS)
    statistics = bench.statistics("scenes")
    measures = quality(statistics, diversity=True)
    count = settings.prompts * settings.seeds
    bench.write(
        "golden_noise.md",
        f"DPM++ 2M, {STEPS} steps, {count:,} images a row: {settings.prompts} held-out prompts, {settings.seeds} seeds each,"
        " the same in every row.",
        main_table(found, settings, measures, Samples.of([bench.run([cell])[cell]])),
        "Intervals are over prompts. A row is one evaluation of the denoiser for one image; guided steps take two. *Best of"
        " N* is chosen by the first grader, the most that choosing can give. FD∞ of a perfect model (real train against real test"
        f" images) {statistics.floor('grader'):.2f}.",
        *more_tables(found, settings, measures),
    )
    draw(bench.path("golden_noise.png"), panels=panels(found, settings, statistics), columns=3)
    shown = [("plain", 1.0), ("npnet", 1.0), ("re-denoised", 1.0), ("plain", 2.0), ("npnet", 2.0)]
    strips = {f"{NAMES[v]}, guidance {g:g}": found[Job(v, g)].pictures[:PLACES] for v, g in shown}
    draw(bench.path("golden_noise_pictures.png"), strips, captions=prompts(settings.prompts)[:PLACES])


def main_table(
    found: dict[Job, Samples], settings: Settings, measures: list[Measure], images_of_garments: Samples
) -> str:
    """Every noise at every guidance scale."""
    rows = []
    for guidance in settings.guidances:
        plain = Job("plain", guidance)
        for variant in noises(guidance):
            job = Job(variant, guidance)
            control = None if job == plain else found[plain]
            rows.append(Row((f"{guidance:g}", NAMES[variant], f"{job.cost:g}"), found[job], control))
        for count in settings.best_of if guidance <= FULL else ():
            chosen = best_of([found[replace(plain, candidate=k)] for k in range(count)])
            labels = (f"{guidance:g}", f"best of {count}", f"{count * plain.cost:g}")
            rows.append(Row(labels, chosen, found[plain]))
    # Its noise is nobody's: a comparison of two sets that share their prompts only.
    rows.append(
        Row(("", "real images, through the autoencoder", "0"), images_of_garments, found[Job("plain")])
    )
    return comparison(["guidance", "noise", "rows an image"], rows, measures, "plain's")


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
    others: list[tuple[str, Job, Job | None]] = []
    for name, options in OTHERS.items():
        control = replace(plain, **options)
        others += [(f"{name}, plain", control, None), (f"{name}, NPNet", replace(golden, **options), control)]
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
        "Other samplings, guidance 1; the control is plain noise in the same sampling. Trailing timesteps begin at the"
        " highest noise level, which the default leaves out.",
        table(others),
    ]


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
