"""Smooth-LoRAs at several weights against the base model and a plain LoRA (λ = 0), at the same noise and prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.core.images import as_tensor
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import held_out_prompts, run_scenes

from .flow_runs import call_options
from .framework.bench import Bench
from .framework.cells import Cell
from .framework.samples import CARDS, Samples, graded
from .framework.trainings import Training
from .smooth_lora_page import (
    CONTROL,
    FRAMES,
    GUIDANCE,
    INVERSION_STEPS,
    RECONSTRUCTION_GUIDANCES,
    STEPS,
    STRIPS,
    Model,
    Settings,
    page,
    picture,
    training_seeds,
)

WRITES = ("smooth_lora.md", "smooth_lora_seeds.md", "smooth_lora.png")
BASE = card_dir("fashion-scenes")
READS = (BASE / "unet", BASE / "vae", BASE / "text_encoder")
SIZE: dict[str, Any] = {"height": 32, "width": 64}
# An item in another colour: what an image shows, and what it shall show.
EDITS = (("a red bag", "a blue bag"), ("a green boot", "a yellow boot"), ("a white coat", "a red coat"))
# Trained on twice as many rows a step as the other ones.
INCLUDED = "included, λ = 1"


@dataclass(frozen=True)
class Subject:
    """What pages are about.

    Attributes:
        name: of the pages.
        solver: of the model, for the text.
        reads: what all images depend on.
        options: of the training of LoRAs, besides those that all have.
        base: the folder of the flow, or nothing for the UNet.
        included: the card with a LoRA for it, by the label of its row.
        weight: λ of the included card, which is trained with every seed.
    """

    name: str
    solver: str
    reads: tuple[Path, ...]
    options: tuple[tuple[str, Any], ...]
    base: tuple[Path, ...] = ()
    included: tuple[tuple[str, Path], ...] = ()
    weight: float = 1

    def sampled(self, lora: Path | None, count: int, guidance: float = GUIDANCE) -> tuple[Any, ...]:
        """The arguments of `paths` and `images`. Those of the UNet are the ones that differ from the defaults."""
        given = (lora, count, guidance, *self.base)
        return given[:2] if not self.base and guidance == GUIDANCE else given


UNET = Subject("smooth_lora", "DDIM", READS, (("snr_gamma", 5),))


def training(weight: float, seed: int, data_dir: Path, s: Settings, subject: Subject = UNET) -> Training:
    """A LoRA as on its card, such as model_cards/smooth-lora-fashion-scenes, in one process with its rows of a step."""
    options = {
        "max_train_samples": s.samples,
        "train_batch_size": s.batch_size,
        "max_train_steps": s.train_steps,
        "lr_warmup_steps": s.train_steps // 4,
        "checkpointing_steps": 100,
        **dict(subject.options),
        "rank": 8,
        "learning_rate": "1e-3",
        "variation_weight": f"{weight:g}",
        "seed": seed,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    base = subject.base[0] if subject.base else BASE
    model: list[str | Path] = ["--pretrained_model_name_or_path", base, "--dataset_name", "fashion-scenes"]
    data: list[str | Path] = ["--train_data_dir", data_dir, "--cache_latents"]
    return Training("train_smooth_lora", (*model, *data, *given))


@lru_cache(maxsize=1)
def load(lora: Path | None, base: Path = BASE) -> Any:
    """The base model, with a LoRA or without, sampling with DDIM, or as a flow with Euler."""
    pipe: Any = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if not call_options(pipe):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe if lora is None else dx.apply_smooth_lora(pipe, lora)


def options_of(pipe: Any, guidance: float = GUIDANCE, steps: int = STEPS) -> dict[str, Any]:
    """The arguments of calls."""
    return {**SIZE, **call_options(pipe), "num_inference_steps": steps, "guidance_scale": guidance}


def paths(lora: Path | None, count: int, guidance: float = GUIDANCE, base: Path = BASE) -> dict[str, Any]:
    """ISTD's three figures of every prompt."""
    pipe, prompts = load(lora, base), held_out_prompts(count, seed=21)
    found = dx.compute_istd(pipe, prompts, seed=21, progress=False, **options_of(pipe, guidance))
    arrays = {name: getattr(found, name) for name in ("deviations", "distances", "endpoints")}
    return {**arrays, "prompts": np.array(prompts)}


def strips(lora: Path | None, base: Path = BASE) -> dict[str, Any]:
    """Frames from one noise to another, and how far each is from the next."""
    pipe, found = load(lora, base), {}
    for i, (prompt, seeds) in enumerate(STRIPS):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {**options_of(pipe), "num_frames": FRAMES, "progress": False}
        frames = dx.interpolate(pipe, prompt, generator=generators, **options)
        found[f"strip {i}"] = frames.astype(np.float16)
        found[f"changes {i}"] = 2 * np.linalg.norm(np.diff(frames, axis=0).reshape(FRAMES - 1, -1), axis=1)
    return found


def images(lora: Path | None, count: int, guidance: float = GUIDANCE, base: Path = BASE) -> dict[str, Any]:
    """Images of held-out prompts, graded."""
    pipe, prompts = load(lora, base), held_out_prompts(count, seed=22)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": guidance, **call_options(pipe)}
    return graded(run_scenes(pipe, prompts, seed=22, **options).images, prompts)


@torch.no_grad()
def inversion(lora: Path | None, count: int, data_dir: Path, base: Path = BASE) -> dict[str, Any]:
    """Real test scenes inverted and redrawn at several guidance scales, and some edited."""
    pipe = load(lora, base)
    real, prompts = fashion_scenes.scene_arrays(data_dir, "test", count, seed=23)
    noise = inverted(pipe, real.astype(np.float32) / 255, prompts)
    found: dict[str, Any] = {"real": real, "prompts": np.array(prompts)}
    for guidance in RECONSTRUCTION_GUIDANCES:
        options = options_of(pipe, guidance, INVERSION_STEPS)
        drawn = pipe(prompts, latents=noise, output_type="np", **options).images
        found[f"redrawn {guidance:g}"] = drawn.astype(np.float16)
    found["autoencoder"] = reconstruct(pipe.vae, as_tensor(real)).movedim(1, -1).numpy().astype(np.float16)
    return found | edited(pipe, data_dir)


def inverted(pipe: Any, shown: Any, prompts: list[str]) -> torch.Tensor:
    """The noise of images."""
    more = {**call_options(pipe), "num_inference_steps": INVERSION_STEPS}
    return dx.ddim_invert(pipe, dx.encode_images(pipe, shown), prompts, **more)


def edited(pipe: Any, data_dir: Path) -> dict[str, Any]:
    """Real garments of `EDITS`, before and after."""
    source, target = (list(texts) for texts in zip(*EDITS))
    scenes = [fashion_scenes.parse_caption(text) for text in source]
    garments, items = fashion_scenes.load_garments(data_dir, "test")
    shown = as_tensor(np.stack(list(fashion_scenes.render(scenes, garments, items, seed=3))))
    noise = inverted(pipe, shown, source)
    options = {**options_of(pipe, GUIDANCE, INVERSION_STEPS), "output_type": "np"}
    pictures = dx.edit(pipe, source, target, latents=noise, strength=0.7, **options).images
    return {"to edit": shown.movedim(1, -1).numpy(), "edited": pictures}


def main(bench: Bench) -> None:
    """Trains and measures what is missing, and writes the pages."""
    s = bench.pick(Settings(), Settings((0, 1), (0,), 2, 4, 2, 1, 4, 16, (3.0,)))
    included = ((INCLUDED, card_dir("smooth-lora-fashion-scenes")),)
    write(bench, s, replace(UNET, included=included))


def write(bench: Bench, s: Settings, subject: Subject) -> None:
    """Trains and measures what is missing, and writes the pages of a model."""
    # The weights with one seed, and the other seeds of the two that the card compares.
    compared = (0, subject.weight)
    wanted = [(w, s.seeds[0]) for w in s.weights] + [(w, seed) for seed in s.seeds[1:] for w in compared]
    names = {(w, seed): f"λ = {w:g}, seed {seed}" for w, seed in wanted}
    trained = bench.train({names[key]: training(*key, bench.data_dir, s, subject) for key in wanted})
    found = measured(bench, s, subject, {"base": None, **dict(subject.included), **trained})
    weights = {f"λ = {w:g}": found[names[w, s.seeds[0]]] for w in s.weights}
    first = {"base": found["base"], **weights, **{label: found[label] for label, _ in subject.included}}
    guided = at_guidances(bench, s, subject, trained[names[0, s.seeds[0]]])
    statistics = bench.statistics("scenes")
    bench.write(f"{subject.name}.md", *page(s, statistics, first, guided, subject.solver))
    bench.write(
        f"{subject.name}_seeds.md",
        f"As in {subject.name}.md, by training seed:",
        training_seeds(
            statistics,
            s,
            {names[w, seed]: found[names[w, seed]] for seed in s.seeds for w in compared},
            f"λ = {subject.weight:g}",
        ),
    )
    picture(bench.path(f"{subject.name}.png"), statistics, first, guided)


def measured(bench: Bench, s: Settings, subject: Subject, loras: dict[str, Path | None]) -> dict[str, Model]:
    """All measurements of all models."""
    base, reads = subject.base, subject.reads
    cells = {
        name: (
            Cell(paths, subject.sampled(lora, s.paths), reads),
            Cell(strips, (lora, *base), reads),
            Cell(images, subject.sampled(lora, s.images), (*reads, *CARDS.values())),
            Cell(inversion, (lora, s.inversions, bench.data_dir, *base), reads),
        )
        for name, lora in loras.items()
    }
    found = bench.run(cell for of_model in cells.values() for cell in of_model)
    return {
        name: Model(found[a], Samples.of([found[c]]), found[b], found[d])
        for name, (a, b, c, d) in cells.items()
    }


def at_guidances(bench: Bench, s: Settings, subject: Subject, control: Path) -> dict[str, Model]:
    """The base model at other guidance scales, and the plain LoRA at the highest of them."""
    wanted: dict[str, tuple[Path | None, float]] = {f"base, guidance {g:g}": (None, g) for g in s.guidances}
    highest = max(s.guidances)
    wanted[f"{CONTROL}, guidance {highest:g}"] = (control, highest)
    cells = {
        name: (
            Cell(paths, subject.sampled(lora, s.paths, guidance), subject.reads),
            Cell(images, subject.sampled(lora, s.images, guidance), (*subject.reads, *CARDS.values())),
        )
        for name, (lora, guidance) in wanted.items()
    }
    found = bench.run(cell for of_model in cells.values() for cell in of_model)
    return {name: Model(found[a], Samples.of([found[b]])) for name, (a, b) in cells.items()}
