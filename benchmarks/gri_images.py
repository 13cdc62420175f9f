"""What GRI attention does to the embedded model's images without training, with cells counted in full and counted once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import diffusers_ext as dx
from diffusers_ext.asdm import gri_attention
from diffusers_ext.testbed.runs import held_out_prompts, run_scenes

from .asdm_runs import TEACHER, load
from .framework.bench import Bench
from .framework.cells import Cell
from .framework.samples import CARDS, graded
from .framework.tables import Row, comparison, quality
from .gri_error import counted_once

WRITES = ("gri_images.md",)
READS = (TEACHER / "unet", TEACHER / "vae", TEACHER / "text_encoder", *CARDS.values())
FULL, ONCE, GRI = "full attention", "cells counted once", "GRI attention"


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is: images of every seed, and (window, pool) in tokens."""

    images: int = 334
    seeds: tuple[int, ...] = (31, 32, 33)
    grids: tuple[tuple[int, int], ...] = ((8, 4), (4, 4))


def images(kind: str, grid: tuple[int, int], seed: int, count: int) -> dict[str, Any]:
    """One seed's images, graded; GRI attention on all self-attention that it changes."""
    pipe = load()
    if kind != FULL:
        dx.apply_gri_attention(pipe, window=grid[0], pool=grid[1])

    def once(*arguments: Any, **_: Any) -> Any:
        return counted_once(*arguments)

    function = once if kind == ONCE else gri_attention.gri_attention
    prompts = held_out_prompts(count, seed)
    with patch.object(gri_attention, "gri_attention", function):
        run = run_scenes(pipe, prompts, seed=seed, num_inference_steps=6, guidance_scale=2.0)
    return graded(run.images, prompts)


def main(bench: Bench) -> None:
    """Makes the images that are missing, and writes the page."""
    s = bench.pick(Settings(), Settings(6, (31,), ((4, 4),)))
    keys = [(FULL, (0, 0)), *((kind, grid) for grid in s.grids for kind in (ONCE, GRI))]
    cells = {key: [Cell(images, (*key, seed, s.images), READS) for seed in s.seeds] for key in keys}
    found = bench.samples(cells)
    full = found[FULL, (0, 0)]
    rows = [Row((FULL, "", ""), full)]
    rows += [Row((kind, *map(str, grid)), found[kind, grid], full) for kind, grid in keys[1:]]
    against = [
        Row((f"{GRI} less cells counted once", *map(str, grid)), found[GRI, grid], found[ONCE, grid])
        for grid in s.grids
    ]
    measures, header = quality(bench.statistics("scenes")), ["", "window", "pool"]
    bench.write(
        "gri_images.md",
        comparison(header, rows, measures, f"{FULL}'s"),
        comparison(header, against, measures, "those of cells counted once"),
        "The embedded model with GRI attention at its finest resolution (8 × 16 tokens) and no training for it: 6 steps at"
        f" guidance 2, {s.images * len(s.seeds):,} held-out prompts ({len(s.seeds)} seeds), the same noise in every row;"
        " intervals over prompts.",
    )
