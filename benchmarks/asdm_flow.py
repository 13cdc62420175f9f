"""Pruned students of the flow-matching transformer against it and against students of all other blocks.

The transformer has four blocks of equal cost, and the cut of a transformer is a whole block, so there are three sizes of
students. Those of two blocks are compared with all other pairs of blocks, which is more than a few random plans.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import diffusers_ext as dx
from diffusers_ext.asdm.networks import network_config
from diffusers_ext.asdm.prune import prune_network
from diffusers_ext.asdm.sensitivity import measure_sensitivity
from diffusers_ext.asdm.transformers import block_cut, possible_block_cuts
from diffusers_ext.core.storage import digest
from diffusers_ext.testbed.runs import held_out_prompts, run_scenes

from .asdm import Student, columns, measured, of_samples
from .asdm_runs import ALL_TOKENS, AS_IS, Sampling, load, probes_of
from .flow_runs import SHORT, flow_reads, included, model_folder
from .framework.bench import Bench
from .framework.cells import Cell, content
from .framework.plots import draw
from .framework.tables import Measure, Row, comparison, quality
from .framework.trainings import Training

WRITES = ("asdm_flow.md", "asdm_flow_controls.md", "asdm_flow.png")
CARD, BLOCKS = "asdm-fashion-flow", "transformer_blocks"
OURS, SHOWN = "the included plan", 10


@dataclass(frozen=True)
class Settings(Sampling):
    """How large the benchmark is.

    Attributes:
        cuts: numbers of blocks that are removed from the students of the second page, in turn.
        first: of how many students of each number there are images, besides the untrained one; None: of all.
        fewer_steps: of the teacher, which take about as long as students with more steps.
    """

    steps: int = 10
    cuts: tuple[int, ...] = (2, 1)
    fewer_steps: tuple[int, ...] = (5, 8)
    train_steps: int = 150
    interval_steps: int = 75
    batch_size: int = 32
    samples: int = 2000
    first: int | None = None


QUICK = Settings(3, (31,), 2, 2.0, 1, (1,), (1,), 2, 1, 4, 16, 1)


# --- plans ---


def choices(folder: Path, count: int) -> dict[str, Any]:
    """The blocks that each criterion removes, by its name."""
    pipe = load(folder, folder)
    found = measure_sensitivity(pipe.transformer, probes_of(pipe, 8), criterion="contiguous")
    single = {cuts[0]: loss for cuts, loss in found.cuts.items() if "-" not in cuts[0]}
    turns = {cut: found.turns[cut.removeprefix("block:")] for cut in single}
    chosen = {name: sorted(losses, key=losses.__getitem__)[:count] for name, losses in _named(single, turns)}
    numbers = {name: sorted(int(cut.rpartition(".")[2]) for cut in cuts) for name, cuts in chosen.items()}
    runs = {
        first: found.cuts.get((block_cut(BLOCKS, first, first + count - 1),)) for first in range(len(single))
    }
    known = {first: loss for first, loss in runs.items() if loss is not None}
    first = min(known, key=known.__getitem__)
    return {**numbers, "interval": list(range(first, first + count))}


def _named(single: dict[str, float], turns: dict[str, float]) -> list[tuple[str, dict[str, float]]]:
    return [("change of the output", single), ("similarity", turns)]


def write_plan(bench: Bench, folder: Path, removed: tuple[int, ...]) -> Path:
    """The file of a plan that removes these blocks in one stage."""
    cuts = tuple(f"block:{BLOCKS}.{number}" for number in removed)
    plan = dx.PruningPlan(network_config(load(folder, folder).transformer), (cuts,))
    path = bench.cache_dir / "plans" / f"flow-{'-'.join(map(str, removed))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.save(path)
    return path


def untrained(bench: Bench, folder: Path, plan: Path) -> Path:
    """A folder with the pruned transformer of a plan as it is before any training."""
    # Of another model, the weights are others.
    made_of = digest([content(folder / "transformer"), content(plan)])
    found = bench.cache_dir / "untrained" / f"{plan.stem}-{made_of}"
    if not (found / "transformer").is_dir():
        made = dx.PruningPlan.load(plan)
        prune_network(load(folder, folder).transformer, made).save_pretrained(found / "transformer")
        made.save(found / "plan.json")
    return found


def student(plan: Path, folder: Path, bench: Bench, s: Settings, *options: str) -> Training:
    """The training of a student, as on the card but for the number of steps and rows."""
    named = {
        "max_train_samples": s.samples,
        "train_batch_size": s.batch_size,
        "ema_decay": 0.99,
        "optimizer": "muon",
        "learning_rate": "2e-3",
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(20, s.train_steps // 4),
        "checkpointing_steps": 100,
        "weighting_scheme": "none",
        "steps_per_stage": s.train_steps,
        **SHORT,
    }
    given = [part for name, value in named.items() for part in (f"--{name}", str(value))]
    model = ("--pretrained_model_name_or_path", folder, "--dataset_name", "fashion-scenes", "--plan", plan)
    data = ("--train_data_dir", bench.data_dir, "--cache_latents", "--use_ema", "--one_shot")
    return Training("train_asdm", (*model, *data, *given, *options))


# --- a process without this package ---

PLAIN = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel

own, folder, prompt, tokens, path = sys.argv[1:]
transformer = SD3Transformer2DModel.from_pretrained(own, torch_dtype=torch.float32)
pipe = DiffusionPipeline.from_pretrained(folder, transformer=transformer, torch_dtype=torch.float32)
call = dict(height=32, width=64, num_inference_steps=4, guidance_scale=2.0, max_sequence_length=int(tokens))
images = pipe([prompt], generator=[torch.Generator().manual_seed(0)], output_type="np", **call).images
assert not any(name.split(".")[0] == "diffusers_ext" for name in sys.modules)
np.save(path, images)
"""


def plain_process(own: Path, folder: Path) -> dict[str, Any]:
    """The largest difference between an image here and one of a process that never imports this package."""
    (prompt,) = held_out_prompts(1, seed=5)
    tokens = SHORT["max_sequence_length"]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "image.npy"
        given = (own / "transformer", folder, prompt, tokens, path)
        subprocess.run([sys.executable, "-c", PLAIN, *map(str, given)], check=True, cwd=place)
        theirs = np.load(path)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 2.0, **SHORT}
    ours = run_scenes(load(own, folder), [prompt], seed=0, **options).images
    return {"difference": float(np.abs(ours - theirs).max())}


# --- the pages ---


def main(bench: Bench) -> None:
    """Trains and measures what is missing, and writes the pages."""
    s = bench.pick(Settings(), QUICK)
    folder = model_folder(bench, layers=3)
    if bench.quick:
        card = untrained(bench, folder, write_plan(bench, folder, (1,)))
    else:
        card = included(CARD, "training/train_asdm.py, as for asdm-fashion-scenes")
    measures = [*columns("transformer"), *of_samples(quality(bench.statistics("scenes")))]
    drawn = page(bench, s, folder, card, measures)
    drawn |= controls(bench, s, folder, card, measures)
    prompts = held_out_prompts(s.images, s.seeds[0])[:SHOWN]
    strips = {name: one.samples.pictures[:SHOWN] for name, one in drawn.items()}
    draw(bench.path("asdm_flow.png"), strips, captions=prompts)


def page(bench: Bench, s: Settings, folder: Path, card: Path, measures: list[Measure]) -> dict[str, Student]:
    """The included student against the teacher, also with the teacher's fewer steps."""
    rows = {
        "teacher": (folder, AS_IS),
        "A-SDM": (card, AS_IS),
        f"A-SDM, {ALL_TOKENS}": (card, ALL_TOKENS),
    }
    found = measured(bench, s, rows, folder)
    theirs = found["teacher"]
    fewer = {
        f"teacher, {steps} steps": measured(bench, replace(s, steps=steps), {"": (folder, AS_IS)}, folder)[""]
        for steps in s.fewer_steps
    }
    shown = [
        Row((name,), one, None if name == "teacher" else theirs) for name, one in (found | fewer).items()
    ]
    alone = Cell(plain_process, (card, folder), flow_reads(folder))
    difference = float(bench.run([alone])[alone]["difference"])
    plan = dx.PruningPlan.load(card / "plan.json")
    bench.write(
        "asdm_flow.md",
        f"{s.steps} steps of Euler at guidance {s.guidance:g}, {s.images * len(s.seeds)} held-out prompts a row"
        f" ({len(s.seeds)} seeds). Time of one call: one thread, {s.rounds} calls in turns with the teacher's, median and quartiles"
        f" of the ratio. Removed: {', '.join(f'`{cut}`' for cut in plan.cuts)}.",
        comparison([""], shown, measures, "the teacher's"),
        "The teacher with fewer steps takes about as long in all as the student.",
        f"An image of a process that never imports this package differs by {difference:.2g} at most (values in [0, 1]).",
    )
    return {name: found[name] for name in ("teacher", "A-SDM")}


def controls(
    bench: Bench, s: Settings, folder: Path, card: Path, measures: list[Measure]
) -> dict[str, Student]:
    """Students by the number of removed blocks, all trained alike, and their page."""
    ours = removed_by(dx.PruningPlan.load(card / "plan.json"))
    count = len(possible_block_cuts(network_config(load(folder, folder).transformer)))
    parts = [
        f"Sampled as in asdm_flow.md. Every student but the untrained one was trained for {s.train_steps} steps of"
        f" {s.batch_size} images. Students with equally many blocks have the same layers, so they take the same time."
        " The control is the first row."
    ]
    drawn = {}
    for number in s.cuts:
        criteria = Cell(choices, (folder, number), flow_reads(folder))
        chosen = {name: tuple(map(int, blocks)) for name, blocks in bench.run([criteria])[criteria].items()}
        best = ours if len(ours) == number else chosen["change of the output"]
        sets = [best, *(b for b in itertools.combinations(range(count), number) if b != best)]
        labels = {blocks: label(blocks, chosen, ours) for blocks in sets}
        plans = {blocks: write_plan(bench, folder, blocks) for blocks in sets}
        wanted = {labels[blocks]: student(plans[blocks], folder, bench, s) for blocks in sets}
        variants = {
            "from random weights": ("--from_scratch",),
            "without the feature loss": ("--feature_weight", "0"),
            "intervals first": ("--interval_steps", str(s.interval_steps)),
        }
        # Of the most blocks alone, to keep the page short.
        for name, more in variants.items() if number == max(s.cuts) else ():
            wanted[name] = student(plans[best], folder, bench, s, *more)
        trained = bench.train(dict(list(wanted.items())[: s.first]))
        rows = {name: (place, AS_IS) for name, place in trained.items()}
        rows["not trained"] = (untrained(bench, folder, plans[best]), AS_IS)
        found = measured(bench, s, rows, folder)
        first = labels[best]
        shown = [Row((n,), one, None if n == first else found[first]) for n, one in found.items()]
        parts += [
            f"Without {number} of {count} blocks:",
            comparison([""], shown, measures, "the first row's"),
        ]
        drawn[f"{count - number} blocks, {first}"] = found[first]
        drawn[f"{count - number} blocks, not trained"] = found["not trained"]
    bench.write("asdm_flow_controls.md", *parts)
    return drawn


def removed_by(plan: dx.PruningPlan) -> tuple[int, ...]:
    """The numbers of the blocks that a plan removes."""
    return tuple(
        sorted(int(path.rpartition(".")[2]) for path in plan.shape().removed() if path.count(".") == 1)
    )


def label(blocks: tuple[int, ...], chosen: dict[str, tuple[int, ...]], ours: tuple[int, ...]) -> str:
    """The blocks, and what would have chosen them."""
    names = [OURS] * (blocks == ours) + [name for name, of in chosen.items() if of == blocks]
    return f"without {', '.join(map(str, blocks))}" + (f" ({'; '.join(names)})" if names else "")
