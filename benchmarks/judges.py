"""Golden noise by both graders, on three sets of prompts and with two timestep spacings, and the graders on real images.

    python benchmarks/judges.py --train_data_dir DIR

DIR holds Fashion-MNIST's four idx files. The images of every cell are kept in `--cache_dir`, so an interrupted benchmark goes on where
it stopped. Writes judges.md. All cells of one set of prompts start from the same noise, which no other benchmark uses.
Intervals are over prompts.
"""

import argparse
from pathlib import Path
from typing import Any

import kept
import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from golden_noise_runs import Job, load, prompts, starts

from diffusers_ext.core.images import as_tensor
from diffusers_ext.golden_noise.training import sample
from diffusers_ext.metrics.comparison import markdown_table, paired_difference, proportion
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import both_grades

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


def make(name: str, sampler: str, variant: str, count: int) -> dict[str, np.ndarray]:
    """The images of a cell, uint8 (n, 32, 64, 3)."""
    pipe, _ = load()
    texts = texts_of(name, count)
    latents = starts(Job(variant, 1.0, FIRST_DRAW + list(SETS).index(name)), texts)
    original = pipe.scheduler
    spacing = SAMPLERS[sampler]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(original.config, timestep_spacing=spacing)
    size = {"height": 32, "width": 64, "num_inference_steps": STEPS}
    pictures = sample(pipe, texts, latents, batch_size=64, guidance_scale=1.0, **size)
    pipe.scheduler = original
    return {"pictures": np.rint(pictures * 255).astype(np.uint8)}


def gains(cells: dict[tuple[str, str, str], Any], count: int) -> str:
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


def graders(data_dir: str, cells: dict[tuple[str, str, str], Any], count: int) -> str:
    """The table of both graders on real images, on the same through the autoencoder, and on generated ones."""
    rows = []

    def line(name: str, found: Any) -> None:
        cell = [proportion(found[key]).format(1, 100) for key in GRADERS.values()]
        cell += [
            proportion(found[part] == found[f"judge_{part}"]).format(1, 100)
            for part in ("aligned", "item", "color")
        ]
        rows.append([name, *cell])

    for split in ("test", "train"):
        garments, items = fashion_scenes.load_garments(data_dir, split)
        scenes, texts = fashion_scenes.compose("test", garments, items, count, seed=3)
        who = {"test": "the judge was trained on", "train": "the first grader was trained on"}[split]
        line(f"real, garments that {who}", both_grades(scenes, texts))
        decoded = reconstruct(load()[0].vae, as_tensor(scenes))
        line("the same through the autoencoder", both_grades(decoded, texts))
    for variant, title in VARIANTS.items():
        line(f"generated, {title}", cells["test split, random", "DPM++ 2M, leading", variant])
    columns = [
        "images",
        *(f"{title}, %" for title in GRADERS),
        "same verdict, %",
        "of items, %",
        "of colours, %",
    ]
    return markdown_table(columns, rows)


def main() -> None:
    """Runs what is missing and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train_data_dir", default=str(fashion_scenes.SAMPLE_DIR))
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/judges"))
    parser.add_argument("--num_images", type=int, default=1200, help="images a cell")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    args = parser.parse_args()
    for folder in (args.output_dir, args.cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    # The images do not depend on the graders.
    weights = [card_dir("fashion-scenes") / "unet", card_dir("npnet-fashion-scenes")]
    files = [file for folder in weights for file in sorted(folder.glob("*.safetensors"))]
    paths = {cell: kept.place(args.cache_dir, "cell", (*cell, args.num_images), files) for cell in CELLS}
    calls = [(path, make, *cell, args.num_images) for cell, path in paths.items()]
    kept.side_by_side(kept.measure, calls, args.workers, "cells")
    cells = {
        key: both_grades(np.load(path)["pictures"], texts_of(key[0], args.num_images))
        for key, path in paths.items()
    }
    text = "\n\n".join(
        [
            graders(args.train_data_dir, cells, args.num_images),
            f"{args.num_images} images a row, held-out prompts, Wilson intervals; those generated with DPM++ 2M, leading. The first grader was trained on Fashion-MNIST's training"
            " images, the judge on its test images: a grader's accuracy counts on garments that it was not trained on.",
            gains(cells, args.num_images),
            f"{args.num_images} images a row, guidance 1, {STEPS} steps; 95% intervals over prompts, bold where"
            " they exclude 0. The random change was only sampled with leading timesteps.",
        ]
    )
    (args.output_dir / "judges.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
