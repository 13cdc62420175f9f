"""Smooth-LoRAs at several weights against the base model and a plain LoRA (λ = 0), at the same noise and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.core.images import as_tensor
from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.metrics.ssim import ssim
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import held_out_prompts, run_scenes

from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .framework.plots import Panel, Series, draw
from .framework.samples import CARDS, Samples, graded
from .framework.statistics import Statistics
from .framework.tables import Measure, Row, comparison, quality
from .framework.trainings import Training

WRITES = ("smooth_lora.md", "smooth_lora_seeds.md", "smooth_lora.png")
BASE = card_dir("fashion-scenes")
READS = (BASE / "unet", BASE / "vae", BASE / "text_encoder")
SIZE: dict[str, Any] = {"height": 32, "width": 64}
GUIDANCE, STEPS, INVERSION_STEPS, FRAMES = 2.0, 10, 20, 12
RECONSTRUCTION_GUIDANCES = (1.0, 2.0, 5.0)
# Prompts and seeds of the two ends.
STRIPS = (("a green bag", (4, 5)), ("a red sandal left of a blue dress", (1, 2)))
# An item in another colour: what an image shows, and what it shall show.
EDITS = (("a red bag", "a blue bag"), ("a green boot", "a yellow boot"), ("a white coat", "a red coat"))
CONTROL = "λ = 0"
# Trained on twice as many rows a step as the other ones.
INCLUDED = "included, λ = 1"


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is: weights, training seeds, and how much is measured."""

    weights: tuple[float, ...] = (0, 0.1, 1, 10)
    seeds: tuple[int, ...] = (0, 1)
    paths: int = 100
    images: int = 500
    inversions: int = 100
    train_steps: int = 200
    batch_size: int = 32
    samples: int = 10_000
    # Of the base model, and the highest of them of the control.
    guidances: tuple[float, ...] = (1.5, 2.5, 3.0)


def training(weight: float, seed: int, data_dir: Path, s: Settings) -> Training:
    """A LoRA as on the card of model_cards/smooth-lora-fashion-scenes, in one process with its rows of a step."""
    options = {
        "max_train_samples": s.samples,
        "train_batch_size": s.batch_size,
        "max_train_steps": s.train_steps,
        "lr_warmup_steps": s.train_steps // 4,
        "checkpointing_steps": 100,
        "snr_gamma": 5,
        "rank": 8,
        "learning_rate": "1e-3",
        "variation_weight": f"{weight:g}",
        "seed": seed,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    model: list[str | Path] = ["--pretrained_model_name_or_path", BASE, "--dataset_name", "fashion-scenes"]
    data: list[str | Path] = ["--train_data_dir", data_dir, "--cache_latents"]
    return Training("train_smooth_lora", (*model, *data, *given))


@lru_cache(maxsize=1)
def load(lora: Path | None) -> Any:
    """The base model, with a LoRA or without, sampling with DDIM."""
    pipe: Any = DiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe if lora is None else dx.apply_smooth_lora(pipe, lora)


def paths(lora: Path | None, count: int, guidance: float = GUIDANCE) -> dict[str, Any]:
    """ISTD's three figures of every prompt."""
    options = {**SIZE, "num_inference_steps": STEPS, "guidance_scale": guidance}
    prompts = held_out_prompts(count, seed=21)
    found = dx.compute_istd(load(lora), prompts, seed=21, progress=False, **options)
    arrays = {name: getattr(found, name) for name in ("deviations", "distances", "endpoints")}
    return {**arrays, "prompts": np.array(prompts)}


def strips(lora: Path | None) -> dict[str, Any]:
    """Frames from one noise to another, and how far each is from the next."""
    options = {**SIZE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    found = {}
    for i, (prompt, seeds) in enumerate(STRIPS):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        frames = dx.interpolate(
            load(lora), prompt, generator=generators, num_frames=FRAMES, progress=False, **options
        )
        found[f"strip {i}"] = frames.astype(np.float16)
        found[f"changes {i}"] = 2 * np.linalg.norm(np.diff(frames, axis=0).reshape(FRAMES - 1, -1), axis=1)
    return found


def images(lora: Path | None, count: int, guidance: float = GUIDANCE) -> dict[str, Any]:
    """Images of held-out prompts, graded."""
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": guidance}
    prompts = held_out_prompts(count, seed=22)
    return graded(run_scenes(load(lora), prompts, seed=22, **options).images, prompts)


@torch.no_grad()
def inversion(lora: Path | None, count: int, data_dir: Path) -> dict[str, Any]:
    """Real test scenes inverted and redrawn at several guidance scales, and some edited."""
    pipe = load(lora)
    real, prompts = fashion_scenes.scene_arrays(data_dir, "test", count, seed=23)
    latents = dx.encode_images(pipe, real.astype(np.float32) / 255)
    noise = dx.ddim_invert(pipe, latents, prompts, num_inference_steps=INVERSION_STEPS)
    found: dict[str, Any] = {"real": real, "prompts": np.array(prompts)}
    for guidance in RECONSTRUCTION_GUIDANCES:
        options = {**SIZE, "num_inference_steps": INVERSION_STEPS, "guidance_scale": guidance}
        drawn = pipe(prompts, latents=noise, output_type="np", **options).images
        found[f"redrawn {guidance:g}"] = drawn.astype(np.float16)
    found["autoencoder"] = reconstruct(pipe.vae, as_tensor(real)).movedim(1, -1).numpy().astype(np.float16)
    return found | edited(pipe, data_dir)


def edited(pipe: Any, data_dir: Path) -> dict[str, Any]:
    """Real garments of `EDITS`, before and after."""
    source, target = (list(texts) for texts in zip(*EDITS))
    scenes = [fashion_scenes.parse_caption(text) for text in source]
    garments, items = fashion_scenes.load_garments(data_dir, "test")
    shown = as_tensor(np.stack(list(fashion_scenes.render(scenes, garments, items, seed=3))))
    latents = dx.encode_images(pipe, shown)
    noise = dx.ddim_invert(pipe, latents, source, num_inference_steps=INVERSION_STEPS)
    options = {"num_inference_steps": INVERSION_STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    pictures = dx.edit(pipe, source, target, latents=noise, strength=0.7, **options).images
    return {"to edit": shown.movedim(1, -1).numpy(), "edited": pictures}


@dataclass(frozen=True)
class Model:
    """All that was measured of one model. At another guidance scale only paths and images are."""

    paths: Arrays
    images: Samples
    strips: Arrays = field(default_factory=dict)
    inversion: Arrays = field(default_factory=dict)

    def errors(self, guidance: float) -> np.ndarray:
        """(n,) mean squared error of every redrawn image, images in [−1, 1]."""
        return squared_error(self.inversion[f"redrawn {guidance:g}"], self.inversion["real"])

    @property
    def floor(self) -> np.ndarray:
        """(n,) error of the autoencoder alone."""
        return squared_error(self.inversion["autoencoder"], self.inversion["real"])


def squared_error(pictures: np.ndarray, real: np.ndarray) -> np.ndarray:
    """(n,) mean squared error of images in [0, 1] to uint8 ones, both taken to [−1, 1]."""
    difference = 2 * (pictures.astype(np.float64) - real.astype(np.float64) / 255)
    return (difference**2).mean((1, 2, 3))


def main(bench: Bench) -> None:
    """Trains and measures what is missing, and writes the pages."""
    s = bench.pick(Settings(), Settings((0, 1), (0,), 2, 4, 2, 1, 4, 16, (3.0,)))
    # The weights with one seed, and the other seeds of the two that the cards compare.
    wanted = [(w, s.seeds[0]) for w in s.weights] + [(w, seed) for seed in s.seeds[1:] for w in (0, 1)]
    names = {(w, seed): f"λ = {w:g}, seed {seed}" for w, seed in wanted}
    trained = bench.train({names[key]: training(*key, bench.data_dir, s) for key in wanted})
    found = measured(bench, s, {"base": None, INCLUDED: card_dir("smooth-lora-fashion-scenes"), **trained})
    weights = {f"λ = {w:g}": found[names[w, s.seeds[0]]] for w in s.weights}
    first = {"base": found["base"], **weights, INCLUDED: found[INCLUDED]}
    guided = at_guidances(bench, s, trained[names[0, s.seeds[0]]])
    statistics = bench.statistics("scenes")
    page(bench, s, statistics, first, guided)
    bench.write(
        "smooth_lora_seeds.md",
        "As in smooth_lora.md, by training seed:",
        training_seeds(
            statistics, s, {names[w, seed]: found[names[w, seed]] for seed in s.seeds for w in (0, 1)}
        ),
    )
    picture(bench, statistics, first, guided)


def measured(bench: Bench, s: Settings, loras: dict[str, Path | None]) -> dict[str, Model]:
    """All measurements of all models."""
    cells = {
        name: (
            Cell(paths, (lora, s.paths), READS),
            Cell(strips, (lora,), READS),
            Cell(images, (lora, s.images), (*READS, *CARDS.values())),
            Cell(inversion, (lora, s.inversions, bench.data_dir), READS),
        )
        for name, lora in loras.items()
    }
    found = bench.run(cell for of_model in cells.values() for cell in of_model)
    return {
        name: Model(found[a], Samples.of([found[c]]), found[b], found[d])
        for name, (a, b, c, d) in cells.items()
    }


def at_guidances(bench: Bench, s: Settings, control: Path) -> dict[str, Model]:
    """The base model at other guidance scales, and the plain LoRA at the highest of them."""
    wanted: dict[str, tuple[Path | None, float]] = {f"base, guidance {g:g}": (None, g) for g in s.guidances}
    highest = max(s.guidances)
    wanted[f"{CONTROL}, guidance {highest:g}"] = (control, highest)
    cells = {
        name: (
            Cell(paths, (lora, s.paths, guidance), READS),
            Cell(images, (lora, s.images, guidance), (*READS, *CARDS.values())),
        )
        for name, (lora, guidance) in wanted.items()
    }
    found = bench.run(cell for of_model in cells.values() for cell in of_model)
    return {name: Model(found[a], Samples.of([found[b]])) for name, (a, b) in cells.items()}


def page(
    bench: Bench, s: Settings, statistics: Statistics, models: dict[str, Model], guided: dict[str, Model]
) -> None:
    """Smoothness, quality and reconstruction of every model, each less the control's."""

    def table(measures: Sequence[Measure], part: Any = lambda model: model, also: Any = ()) -> str:
        theirs = part(models[CONTROL])
        shown = {**models, **dict(also)}
        rows = [Row((n,), part(m), None if n == CONTROL else theirs) for n, m in shown.items()]
        return comparison(["model"], rows, measures, f"{CONTROL}'s")

    parts = [
        f"{s.paths} paths of 11 images, {STEPS} DDIM steps, guidance {GUIDANCE:g}:",
        table(smoothness(statistics), also=guided),
        f"{s.images} images, the same sampling:",
        table(quality(statistics, diversity=True), lambda model: model.images, guided),
        f"{s.inversions} real test scenes inverted in {INVERSION_STEPS} DDIM steps without guidance and redrawn, squared"
        f" error in [−1, 1] and PSNR; the autoencoder alone has {models[CONTROL].floor.mean():.4f}.",
    ]
    for guidance in RECONSTRUCTION_GUIDANCES:
        parts += [f"Redrawn at guidance {guidance:g}:", table(reconstruction(statistics, guidance))]
    bench.write("smooth_lora.md", *parts)


def smoothness(statistics: Statistics) -> list[Measure]:
    """ISTD, and what tells an even change from none. Intervals are over prompts."""

    def difference(name: str) -> Any:
        return lambda a, b: statistics.difference(a.paths[name], b.paths[name], a.paths["prompts"])

    def relative(model: Model) -> np.ndarray:
        return model.paths["deviations"] / model.paths["distances"]

    return [
        Measure("ISTD", lambda m: m.paths["deviations"].mean(), difference("deviations"), 3),
        Measure("", None, lambda a, b: change(statistics, a, b), 0, 100, "ISTD, less {}, %", tested=False),
        Measure("mean adjacent distance", lambda m: m.paths["distances"].mean()),
        Measure(
            "std/mean",
            lambda m: relative(m).mean(),
            lambda a, b: statistics.difference(relative(a), relative(b), a.paths["prompts"]),
            3,
        ),
        Measure("distance of the ends", lambda m: m.paths["endpoints"].mean(), digits=1),
    ]


def change(statistics: Statistics, ours: Model, control: Model) -> Any:
    """Of the ISTD, as a share of the control's."""
    a, b = (model.paths["deviations"] for model in (ours, control))
    return statistics.ratio_change(a, b, ours.paths["prompts"])


def reconstruction(statistics: Statistics, guidance: float) -> list[Measure]:
    """Errors of images that were inverted and redrawn."""

    def likeness(model: Model) -> float:
        drawn, real = model.inversion[f"redrawn {guidance:g}"], model.inversion["real"]
        return float(ssim(drawn, real / 255).mean())

    def difference(a: Model, b: Model) -> Any:
        return statistics.difference(a.errors(guidance), b.errors(guidance), a.inversion["prompts"])

    def above_floor(a: Model, b: Model) -> Any:
        own, other = a.errors(guidance) - a.floor, b.errors(guidance) - b.floor
        return statistics.ratio_change(own, other, a.inversion["prompts"])

    return [
        Measure("squared error", lambda m: m.errors(guidance).mean(), difference, 4),
        Measure("", None, above_floor, 0, 100, "above the autoencoder's, less {}, %", tested=False),
        Measure("PSNR, dB", lambda m: -10 * np.log10(m.errors(guidance) / 4).mean(), digits=1),
        Measure("SSIM", likeness, digits=3),
    ]


def training_seeds(statistics: Statistics, s: Settings, models: dict[str, Model]) -> str:
    """Every seed's figures, and the mean and spread of what λ = 1 does to λ = 0."""

    def figures(model: Model) -> list[float]:
        deviations, distances = model.paths["deviations"], model.paths["distances"]
        return [
            float(deviations.mean()),
            float((deviations / distances).mean()),
            100 * float(model.images.aligned().mean()),
            statistics.distance(model.images, "grader").value,
            *(float(model.errors(g).mean()) for g in RECONSTRUCTION_GUIDANCES),
        ]

    digits = (3, 3, 1, 2, *[4] * len(RECONSTRUCTION_GUIDANCES))
    values = {name: figures(model) for name, model in models.items()}
    rows = [[name, *(f"{x:.{d}f}" for x, d in zip(row, digits))] for name, row in values.items()]
    changes = np.array([np.subtract(values[f"λ = 1, seed {n}"], values[f"λ = 0, seed {n}"]) for n in s.seeds])
    if len(s.seeds) > 1:
        spread = changes.std(0, ddof=1)
        cells = [f"{m:.{d}f} ± {v:.{d}f}" for m, v, d in zip(changes.mean(0), spread, digits)]
        rows.append(["λ = 1 less λ = 0, mean ± std", *cells])
    scales = [f"squared error, guidance {g:g}" for g in RECONSTRUCTION_GUIDANCES]
    return markdown_table(["model", "ISTD", "std/mean", "prompt accuracy, %", "FD∞", *scales], rows)


def picture(bench: Bench, statistics: Statistics, models: dict[str, Model], guided: dict[str, Model]) -> None:
    """Strips between the same noises with the size of every step, `EDITS` of the same images, and ISTD against FD∞."""
    shown, panels = {}, []
    for i, (prompt, _) in enumerate(STRIPS):
        shown |= {f"{name}: {prompt}": model.strips[f"strip {i}"] for name, model in models.items()}
        series = {
            name: Series(range(FRAMES - 1), model.strips[f"changes {i}"].tolist())
            for name, model in models.items()
        }
        axis = "step along the path"
        panels.append(Panel(prompt, axis, "distance to the next image", series, {"ylim": (0, None)}))
    by_kind = {
        "λ, guidance 2": {name: model for name, model in models.items() if name != "base"},
        "base, guidance": {
            "base": models["base"],
            **{n: m for n, m in guided.items() if n.startswith("base")},
        },
        f"{CONTROL}, guidance": {n: m for n, m in guided.items() if not n.startswith("base")},
    }
    front = {
        kind: Series(
            [float(m.paths["deviations"].mean()) for m in of.values()],
            [statistics.distance(m.images, "grader") for m in of.values()],
            "",
            [n.removeprefix("base, ").removeprefix("λ = ").partition(",")[0] for n in of],
        )
        for kind, of in by_kind.items()
    }
    panels.append(Panel("smoothness and distance", "ISTD", "FD∞", front))
    shown["real images"] = models[CONTROL].inversion["to edit"]
    shown |= {f"edited, {name}": model.inversion["edited"] for name, model in models.items()}
    draw(bench.path("smooth_lora.png"), shown, panels)
