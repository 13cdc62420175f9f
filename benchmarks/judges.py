"""Golden noise by both graders, on three sets of prompts and with two timestep spacings, and the graders on real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler

from diffusers_ext.core.images import as_tensor
from diffusers_ext.golden_noise.training import sample
from diffusers_ext.metrics.comparison import markdown_table, paired_difference, proportion
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.runs import both_grades

from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .golden_noise import NPNET, READS, load, prompts, starts
from .golden_noise_page import Job

WRITES = ("judges.md",)
STEPS = 6
VARIANTS = {"plain": "plain", "npnet": "NPNet", "random": "random change, equal norm"}
SAMPLERS = {"DPM++ 2M, leading": "leading", "DPM++ 2M, trailing": "trailing"}
# Each with the number of draws of a prompt.
SETS = {"held out, the page's": 3, "test split, random": 2, "training split, random": 2}
GRADERS = {"first grader": "aligned", "judge": "judge_aligned"}
# All variants with the sampler of the golden noise page; of the other one what shows whether the gain depends on it.
CELLS = [(name, "DPM++ 2M, leading", variant) for name in SETS for variant in VARIANTS]
CELLS += [
    (name, "DPM++ 2M, trailing", variant)
    for name in SETS
    if not name.startswith("test")
    for variant in ("plain", "npnet")
]
# Seeds of the noise that no page has.
FIRST_DRAW = 1000


def texts_of(name: str, count: int) -> list[str]:
    """The prompts of a set, each as often as it is drawn, about `count` in all."""
    draws = SETS[name]
    if name.startswith("held out"):
        return prompts(count // draws) * draws
    split: Any = name.partition(" ")[0].replace("training", "train")
    drawn = fashion_scenes.draw_scenes(split, count // draws, seed=20)
    return [fashion_scenes.caption(scene) for scene in drawn] * draws


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is."""

    images: int = 1200


@torch.no_grad()
def generated(name: str, sampler: str, variant: str, count: int) -> dict[str, Any]:
    """The grades of a cell's images by both graders, (n,) each."""
    pipe = load()
    texts = texts_of(name, count)
    latents = starts(Job(variant), FIRST_DRAW + list(SETS).index(name), texts)
    original = pipe.scheduler
    spacing = SAMPLERS[sampler]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(original.config, timestep_spacing=spacing)
    size: dict[str, Any] = {"height": 32, "width": 64, "num_inference_steps": STEPS}
    pictures = sample(pipe, texts, latents, batch_size=64, guidance_scale=1.0, **size)
    pipe.scheduler = original
    return both_grades(pictures, texts)


@torch.no_grad()
def real(data_dir: Path, split: Any, decoded: bool, count: int) -> dict[str, Any]:
    """The grades of real scenes, as they are or through the autoencoder; `split` is that of the garments."""
    garments, items = fashion_scenes.load_garments(data_dir, split)
    scenes, texts = fashion_scenes.compose("test", garments, items, count, seed=3)
    return both_grades(reconstruct(load().vae, as_tensor(scenes)) if decoded else scenes, texts)


def gains(cells: dict[tuple[str, str, str], Arrays], count: int) -> str:
    """The table of golden noise."""
    rows = []
    for name, sampler in dict.fromkeys((name, sampler) for name, sampler, _ in CELLS):
        texts = texts_of(name, count)
        for title, key in GRADERS.items():
            right = {v: cells[name, sampler, v][key] for v in VARIANTS if (name, sampler, v) in cells}
            row = [
                sampler,
                name,
                title,
                *(proportion(right[v], texts).format(1, 100) for v in ("plain", "npnet")),
            ]
            for variant in ("npnet", "random"):
                there = variant in right
                change = paired_difference(right[variant], right["plain"], texts) if there else None
                row.append("" if change is None else change.marked(1, 100))
            rows.append(row)
    columns = ["sampler", "prompts", "by", "plain, %", "NPNet, %", "NPNet less plain", "random less plain"]
    return markdown_table(columns, rows)


def graders(rows: dict[str, Arrays]) -> str:
    """The table of both graders on real images, on the same through the autoencoder, and on generated ones."""
    lines = []
    for name, found in rows.items():
        line = [proportion(found[key]).format(1, 100) for key in GRADERS.values()]
        line += [
            proportion(found[part] == found[f"judge_{part}"]).format(1, 100)
            for part in ("aligned", "item", "color")
        ]
        lines.append([name, *line])
    judged = [f"{title}, %" for title in GRADERS]
    return markdown_table(["images", *judged, "same verdict, %", "of items, %", "of colours, %"], lines)


def main(bench: Bench) -> None:
    """Makes the images that are missing, and writes the page."""
    count = bench.pick(Settings(), Settings(12)).images
    wanted = {key: Cell(generated, (*key, count), (*READS, NPNET)) for key in CELLS}
    shown = {
        "real, garments that the judge was trained on": ("test", False),
        "the same garments through the autoencoder": ("test", True),
        "real, garments that the first grader was trained on": ("train", False),
        "these garments through the autoencoder": ("train", True),
    }
    ceilings = {name: Cell(real, (bench.data_dir, *given, count), READS) for name, given in shown.items()}
    found = bench.run([*wanted.values(), *ceilings.values()])
    cells = {key: found[cell] for key, cell in wanted.items()}
    rows = {name: found[cell] for name, cell in ceilings.items()}
    for variant, title in VARIANTS.items():
        rows[f"generated, {title}"] = cells["test split, random", "DPM++ 2M, leading", variant]
    bench.write(
        "judges.md",
        graders(rows),
        f"{count} images a row, held-out prompts, Wilson's intervals; those generated with DPM++ 2M, leading. The first"
        " grader was trained on Fashion-MNIST's training images, the judge on its test images: a grader's accuracy counts"
        " on garments that it was not trained on.",
        gains(cells, count),
        f"{count} images a row, guidance 1, {STEPS} steps; 95% intervals over prompts, bold where they exclude 0. The"
        " random change was only sampled with leading timesteps.",
    )
