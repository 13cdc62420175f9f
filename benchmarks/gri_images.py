"""What GRI attention does to the embedded model's images without training, with cells counted in full and counted once.

    python benchmarks/gri_images.py

The same prompts and noise for every row. Intervals are over prompts, as some repeat. Every row's images
are kept in --cache_dir. Writes gri_images.md.
"""

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import kept
import numpy as np
from asdm_runs import TEACHER, load
from gri_error import counted_once

import diffusers_ext as dx
from diffusers_ext.asdm import gri_attention
from diffusers_ext.metrics.comparison import markdown_table, paired_difference, paired_frechet_difference
from diffusers_ext.testbed.runs import held_out_prompts, load_reference, run_scenes

SETTINGS = [(8, 4), (4, 4)]
FULL, ONCE, IN_FULL = "full attention", "cells counted once", "GRI attention"


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("benchmarks/results"))
    add("--cache_dir", type=Path, default=Path("runs/gri_images"))
    add("--num_images", type=int, default=334, help="of every seed")
    add("--seeds", type=int, nargs="+", default=[31, 32, 33])
    return parser.parse_args()


def images(kind: str, window: int, pool: int, seed: int, num_images: int) -> dict[str, Any]:
    """Which images show their prompt, and their features; GRI attention on all self-attention that it changes."""
    pipe = load()
    if kind != FULL:
        dx.apply_gri_attention(pipe, window=window, pool=pool)

    def once(*arguments: Any, **_: Any) -> Any:
        return counted_once(*arguments)

    function = once if kind == ONCE else gri_attention.gri_attention
    with patch.object(gri_attention, "gri_attention", function):
        prompts = held_out_prompts(num_images, seed)
        found = run_scenes(pipe, prompts, seed=seed, num_inference_steps=6, guidance_scale=2.0)
    return {"aligned": found.grades["aligned"], "features": found.features}


def all_seeds(args: argparse.Namespace, kind: str, window: int, pool: int) -> dict[str, np.ndarray]:
    """`images` of every seed, joined."""
    weights = [TEACHER / "unet/config.json", TEACHER / "unet/diffusion_pytorch_model.safetensors"]
    found = []
    for seed in args.seeds:
        given = (kind, window, pool, seed, args.num_images)
        path = kept.measure(kept.place(args.cache_dir, "images", given, weights), images, *given)
        found.append(dict(np.load(path)))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], prompts: list[str]) -> list[str]:
    """Accuracy in points and FD∞, ours less theirs, over prompts."""
    accuracy = paired_difference(ours["aligned"], theirs["aligned"], prompts)
    reference = load_reference("scenes-test")
    distance = paired_frechet_difference(ours["features"], theirs["features"], reference, prompts)
    return [accuracy.marked(1, 100), distance.marked(3)]


def main() -> None:
    """Makes the missing images and writes the page."""
    args = parse_args()
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    prompts = [text for seed in args.seeds for text in held_out_prompts(args.num_images, seed)]
    plain = all_seeds(args, FULL, 0, 0)
    rows = [[FULL, "", "", f"{100 * plain['aligned'].mean():.1f}", *[""] * 4]]
    for window, pool in SETTINGS:
        once, ours = (all_seeds(args, kind, window, pool) for kind in (ONCE, IN_FULL))
        for kind, found in ((ONCE, once), (IN_FULL, ours)):
            cells = [kind, str(window), str(pool), f"{100 * found['aligned'].mean():.1f}"]
            against = difference(ours, once, prompts) if kind == IN_FULL else ["", ""]
            rows.append([*cells, *difference(found, plain, prompts), *against])
    quality = ["accuracy", "FD∞"]
    header = ["", "window", "pool", "prompt accuracy, %"]
    header += [f"{name} less {of}" for of in ("full attention's", "“counted once”") for name in quality]
    page = (
        f"{markdown_table(header, rows)}\n\nThe embedded model with GRI attention at its finest resolution (8 × 16 tokens)"
        f" and no training for it: 6 steps at guidance 2, {len(prompts)} held-out prompts ({len(args.seeds)} seeds), the"
        " same noise in every row. 95% intervals over distinct prompts; bold where they exclude 0."
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "gri_images.md").write_text(page + "\n")
    print(page)


if __name__ == "__main__":
    main()
