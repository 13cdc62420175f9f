"""Pruned students of the embedded text-to-image model against it and against students pruned or trained otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusers_ext.metrics.comparison import Estimate, markdown_table
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import held_out_prompts

from .asdm_plans import plans_of
from .asdm_runs import AS_IS, BATCHES, FOLDED, TEACHER, latency, pictures, plan, size, training, variants
from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .framework.plots import draw
from .framework.samples import CARDS, Samples
from .framework.tables import Measure, Row, comparison, quality
from .framework.trainings import Training

WRITES = ("asdm.md", "asdm.png")
STUDENT = card_dir("asdm-fashion-scenes")
READS = (TEACHER / "unet", TEACHER / "vae", TEACHER / "text_encoder", *CARDS.values())
SHOWN = 10
ONE_GO = "in one go"
MAIN = "A-SDM: three stages, 300, 300, 900"


@dataclass(frozen=True)
class Control:
    """A student: the steps of its stages, its plan, and what else differs; the first of as many steps is the control."""

    steps: tuple[int, ...]
    plan: str = "ours"
    options: tuple[str, ...] = ("--no_cond_convs",)

    @property
    def total(self) -> int:
        """Training steps."""
        return sum(self.steps)


AT_ONCE = ("--no_cond_convs", "--one_shot")
PLANS = {"BK mapping": "bk", **{f"random plan {n}": f"random-{n}" for n in (1, 2, 3)}}
CONTROLS: dict[str, Control] = {
    f"{ONE_GO}, 201 steps": Control((67, 67, 67), options=AT_ONCE),
    "in three stages, 67 each": Control((67, 67, 67)),
    "in three stages, 20, 20, 161": Control((20, 20, 161)),
    "from scratch": Control((67, 67, 67), options=(*AT_ONCE, "--from_scratch")),
    "with CLME-CondConv": Control((67, 67, 67), options=("--one_shot",)),
    "without SAS": Control((67, 67, 67), options=(*AT_ONCE, "--semantic_weight", "0")),
    "without feature KD": Control((67, 67, 67), options=(*AT_ONCE, "--feature_weight", "0")),
    **{name: Control((201,), plan) for name, plan in PLANS.items()},
    "22% plan": Control((100, 101), "ours78", AT_ONCE),
    "22% plan with GRI": Control((67, 67, 67), "ours78-gri", AT_ONCE),
    f"{ONE_GO}, 600 steps": Control((200, 200, 200), options=AT_ONCE),
    "in three stages, 100, 100, 400": Control((100, 100, 400)),
    **{f"{name}, 600 steps": Control((600,), plan) for name, plan in PLANS.items()},
    f"{ONE_GO}, 1500 steps": Control((300, 300, 900), options=AT_ONCE),
    MAIN: Control((300, 300, 900)),
}


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is."""

    images: int = 334
    seeds: tuple[int, ...] = (31, 32, 33)
    steps: int = 6
    guidance: float = 2.0
    rounds: int = 60
    # By total steps: rows of a step, and images to train on.
    batch_sizes: tuple[tuple[int, int, int], ...] = ((201, 32, 8000), (600, 32, 8000), (1500, 64, 20_000))


QUICK = Settings(3, (31,), 2, 2.0, 1, ((3, 4, 16),))
QUICK_CONTROLS = {
    ONE_GO: Control((1, 1, 1), options=AT_ONCE),
    "in three stages": Control((1, 1, 1)),
}


def student(control: Control, plans: dict[str, Path], data_dir: Path, s: Settings) -> Training:
    """The training of a student."""
    _, rows, images = next(size for size in s.batch_sizes if size[0] == control.total)
    options = {
        "max_train_samples": images,
        "train_batch_size": rows,
        "snr_gamma": 5,
        "ema_decay": 0.99,
        "learning_rate": "5e-4",
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(20, control.total // 4),
        "mixed_precision": "bf16",
        "checkpointing_steps": 100,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    model = ("--pretrained_model_name_or_path", TEACHER, "--dataset_name", "fashion-scenes")
    data = ("--train_data_dir", data_dir, "--cache_latents", "--use_ema")
    steps = ("--steps_per_stage", *map(str, control.steps))
    return Training(
        "train_asdm", (*model, *data, *given, "--plan", plans[control.plan], *steps, *control.options)
    )


@dataclass(frozen=True)
class Student:
    """What was measured of one way to run one UNet."""

    size: Arrays
    times: Arrays
    samples: Samples


def main(bench: Bench) -> None:
    """Trains and measures what is missing, and writes the page."""
    s, controls = bench.pick(Settings(), QUICK), bench.pick(CONTROLS, QUICK_CONTROLS)
    plans = plans_of(bench)
    folders = bench.train({name: student(c, plans, bench.data_dir, s) for name, c in controls.items()})
    rows = {
        label if how == AS_IS else f"{label}, {how}": (folder, how)
        for label, folder in (("teacher", TEACHER), ("A-SDM", STUDENT))
        for how in variants(folder)
    }
    found = measured(bench, s, rows | {name: (folder, AS_IS) for name, folder in folders.items()})
    changes = {name: Cell(plan, (folder,), READS) for name, folder in folders.items()}
    changed = bench.run(changes.values())
    measures = [*columns(), *of_samples(quality(bench.statistics("scenes")))]
    theirs = found["teacher"]
    shown = [Row((name,), found[name], None if name == "teacher" else theirs) for name in rows]
    parts = [
        f"{s.steps} steps of DPM++ 2M at guidance {s.guidance:g}, {s.images * len(s.seeds)} held-out prompts a row"
        f" ({len(s.seeds)} seeds). Time: one thread, {s.rounds} calls in turns with the teacher's, median and quartiles of the"
        " ratio.",
        comparison([""], shown, measures, "the teacher's"),
    ]
    for steps in dict.fromkeys(control.total for control in controls.values()):
        names = [name for name, control in controls.items() if control.total == steps]
        first = found[names[0]]
        seconds = {name: str(training(folders[name])["seconds"]) for name in names}
        shown = [Row((n, seconds[n]), found[n], None if n == names[0] else first) for n in names]
        parts += [
            f"Trained for {steps} steps:",
            comparison(["", "seconds"], shown, measures, f"“{names[0]}”'s"),
        ]
    parts += [
        "Relative change of the teacher's output by a plan's cuts, before any training:",
        plans_table({name: changed[cell] for name, cell in changes.items()}),
    ]
    bench.write("asdm.md", *parts)
    total = next(iter(controls.values())).total
    drawn = ["teacher", "A-SDM", *(name for name, control in controls.items() if control.total == total)]
    prompts = held_out_prompts(s.images, s.seeds[0])[:SHOWN]
    draw(bench.path("asdm.png"), {n: found[n].samples.pictures[:SHOWN] for n in drawn}, captions=prompts)


def measured(bench: Bench, s: Settings, rows: dict[str, tuple[Path, str]]) -> dict[str, Student]:
    """Images, size and times of every row. Folded layers compute the same images."""
    cells = {}
    for name, (folder, how) in rows.items():
        drawn = AS_IS if how == FOLDED else how
        seeds = [
            Cell(pictures, (folder, drawn, seed, s.images, s.steps, s.guidance), READS) for seed in s.seeds
        ]
        timed = Cell(latency, (folder, how, s.rounds), (TEACHER / "unet",), alone=True)
        cells[name] = (seeds, Cell(size, (folder,), (TEACHER / "unet",)), timed)
    samples = bench.samples({name: seeds for name, (seeds, *_) in cells.items()})
    found = bench.run(cell for _, *others in cells.values() for cell in others)
    return {name: Student(found[own], found[timed], samples[name]) for name, (_, own, timed) in cells.items()}


def columns() -> list[Measure]:
    """Sizes, and times as a share of the teacher's of the same round."""

    def share(batch: int) -> Any:
        return lambda of: Estimate(
            *np.percentile(of.times[f"own {batch}"] / of.times[f"teacher {batch}"], [50, 25, 75])
        )

    found = [
        Measure(f"{name}, M", lambda of, name=name: float(of.size[name]), scale=1e-6)
        for name in ("parameters", "MACs")
    ]
    for batch in BATCHES:
        label = f"UNet's time, {batch} row{'s' * (batch > 1)}, % of the teacher's"
        found.append(Measure(label, share(batch), digits=1, scale=100))
    return found


def of_samples(measures: list[Measure]) -> list[Measure]:
    """The same measures of a student's images."""

    def of(function: Any) -> Any:
        return function and (lambda *students: function(*(student.samples for student in students)))

    return [replace(m, value=of(m.value), difference=of(m.difference)) for m in measures]


def plans_table(changes: dict[str, Arrays]) -> str:
    """What the plans cut, and how much that was predicted to change and changes."""
    rows: dict[str, list[str]] = {}
    for name, of in changes.items():
        cuts = ", ".join(f"`{cut}`" for cut in of["cuts"])
        # Several students have the same cuts: the first is the plan's.
        rows.setdefault(cuts, [name, cuts, f"{of['alone'].sum():.3f}", f"{float(of['together']):.3f}"])
    return markdown_table(["", "cuts", "each alone, summed", "all together"], list(rows.values()))
