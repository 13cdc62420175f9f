"""Pruned students of the embedded text-to-image model against it and against students pruned or trained otherwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import diffusers_ext as dx
from diffusers_ext.metrics.comparison import Estimate, markdown_table
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import held_out_prompts

from .asdm_plans import NUM_DRAWS, plans_of
from .asdm_runs import (
    AS_IS,
    BATCHES,
    FOLDED,
    TEACHER,
    Sampling,
    latency,
    pictures,
    plan,
    size,
    training,
    variants,
)
from .flow_runs import flow_reads
from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .framework.plots import draw
from .framework.samples import CARDS, Samples
from .framework.tables import Measure, Row, comparison, quality
from .framework.trainings import Training

WRITES = ("asdm.md", "asdm_controls.md", "asdm.png")
STUDENT = card_dir("asdm-fashion-scenes")
READS = (TEACHER / "unet", TEACHER / "vae", TEACHER / "text_encoder", *CARDS.values())
SHOWN = 10
ONE_GO = "in one go"


@dataclass(frozen=True)
class Control:
    """A student: its plan, whether its cuts are made in stages, and what else differs."""

    plan: str
    staged: bool = False
    options: tuple[str, ...] = ("--no_cond_convs",)


def controls_of(depth: str) -> dict[str, Control]:
    """The students of one depth, the share of the UNet's time that is left in percent; the first is the others' control."""
    plain = Control(depth)
    found = {ONE_GO: plain, "in stages": replace(plain, staged=True)}
    found |= {f"random plan {n}": Control(f"{depth}-random-{n}") for n in range(1, NUM_DRAWS[depth] + 1)}
    if depth in ("63", "40"):
        found |= {
            "with CLME-CondConv": replace(plain, options=()),
            "without SAS": replace(plain, options=(*plain.options, "--semantic_weight", "0")),
            "without feature KD": replace(plain, options=(*plain.options, "--feature_weight", "0")),
        }
    if depth == "80":
        found["with GRI"] = Control("80-gri")
    if depth == "63":
        found |= {"BK mapping": Control("bk"), "plan of the search": Control("search")}
        found["from scratch"] = replace(plain, options=(*plain.options, "--from_scratch"))
    return found


@dataclass(frozen=True)
class Settings(Sampling):
    """How large the benchmark is."""

    depths: tuple[str, ...] = ("80", "63", "50", "40")
    train_steps: int = 150
    # Of every stage but the last.
    first_steps: int = 20
    batch_size: int = 32
    samples: int = 8000
    controls: int | None = None


QUICK = Settings(3, (31,), 2, 2.0, 1, ("80",), 4, 1, 4, 16, 2)


def student(control: Control, plans: dict[str, Path], data_dir: Path, s: Settings) -> Training:
    """The training of a student."""
    path = plans[control.plan]
    early = len(dx.PruningPlan.load(path).stages) - 1
    options = {
        "max_train_samples": s.samples,
        "train_batch_size": s.batch_size,
        "snr_gamma": 5,
        "ema_decay": 0.99,
        "learning_rate": "5e-4",
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(20, s.train_steps // 4),
        "checkpointing_steps": 100,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    model = ("--pretrained_model_name_or_path", TEACHER, "--dataset_name", "fashion-scenes")
    data = ("--train_data_dir", data_dir, "--cache_latents", "--use_ema")
    stages = [s.first_steps] * early + [s.train_steps - s.first_steps * early]
    steps = ("--plan", path, "--steps_per_stage", *map(str, stages))
    at_once = () if control.staged else ("--one_shot",)
    return Training("train_asdm", (*model, *data, *given, *steps, *at_once, *control.options))


@dataclass(frozen=True)
class Student:
    """What was measured of one way to run one UNet."""

    size: Arrays
    times: Arrays
    samples: Samples


def main(bench: Bench) -> None:
    """Trains and measures what is missing, and writes the pages."""
    s = bench.pick(Settings(), QUICK)
    measures = [*columns(), *of_samples(quality(bench.statistics("scenes")))]
    rows = {
        label if how == AS_IS else f"{label}, {how}": (folder, how)
        for label, folder in (("teacher", TEACHER), ("A-SDM", STUDENT))
        for how in variants(folder)
    }
    found = measured(bench, s, rows)
    theirs = found["teacher"]
    shown = [Row((name,), found[name], None if name == "teacher" else theirs) for name in rows]
    bench.write(
        "asdm.md",
        f"{s.steps} steps of DPM++ 2M at guidance {s.guidance:g}, {s.images * len(s.seeds)} held-out prompts a row"
        f" ({len(s.seeds)} seeds). Time: one thread, {s.rounds} calls in turns with the teacher's, median and quartiles of the"
        " ratio.",
        comparison([""], shown, measures, "the teacher's"),
    )
    found |= controls(bench, s, measures)
    drawn = ["teacher", "A-SDM", *(name for name in found if name.endswith((ONE_GO, "random plan 1")))]
    prompts = held_out_prompts(s.images, s.seeds[0])[:SHOWN]
    draw(bench.path("asdm.png"), {n: found[n].samples.pictures[:SHOWN] for n in drawn}, captions=prompts)


def controls(bench: Bench, s: Settings, measures: list[Measure]) -> dict[str, Student]:
    """Students by depth of the cut, and their page."""
    plans = plans_of(bench, () if bench.quick else s.depths)
    depths = {depth: dict(list(controls_of(depth).items())[: s.controls]) for depth in s.depths}
    wanted = {f"{depth}%, {name}": c for depth, of in depths.items() for name, c in of.items()}
    trained = bench.train({name: student(c, plans, bench.data_dir, s) for name, c in wanted.items()})
    found = measured(bench, s, {name: (folder, AS_IS) for name, folder in trained.items()})
    changes = {name: Cell(plan, (folder,), READS) for name, folder in trained.items()}
    changed = bench.run(changes.values())
    parts = [
        "As in asdm.md, by depth of the cut, the share of the UNet's time that a plan should leave. Every student was"
        f" trained for {s.train_steps} steps of {s.batch_size} images; “in stages” has {s.first_steps} steps in every stage but the"
        " last. The control is the student of the same depth in one go:",
    ]
    for depth, of_depth in depths.items():
        names = {name: f"{depth}%, {name}" for name in of_depth}
        first = found[names[ONE_GO]]
        seconds = {name: str(training(trained[full])["seconds"]) for name, full in names.items()}
        shown = [
            Row((n, seconds[n]), found[full], None if n == ONE_GO else first) for n, full in names.items()
        ]
        parts += [f"{depth}%:", comparison(["", "seconds"], shown, measures, f"“{ONE_GO}”'s")]
    parts += [
        "Relative change of the teacher's output by a plan's cuts, before any training:",
        plans_table({name: changed[cell] for name, cell in changes.items()}),
    ]
    bench.write("asdm_controls.md", *parts)
    return found


def measured(
    bench: Bench, s: Sampling, rows: dict[str, tuple[Path, str]], flow: Path | None = None
) -> dict[str, Student]:
    """Images, size and times of every row, of the UNet or of a flow. Folded layers compute the same images."""
    more, cells = () if flow is None else (flow,), {}
    reads = READS if flow is None else flow_reads(flow)
    network = (TEACHER / "unet",) if flow is None else reads
    for name, (folder, how) in rows.items():
        drawn = AS_IS if how == FOLDED else how
        seeds = [
            Cell(pictures, (folder, drawn, seed, s.images, s.steps, s.guidance, *more), reads)
            for seed in s.seeds
        ]
        timed = Cell(latency, (folder, how, s.rounds, *more), network, alone=True)
        cells[name] = (seeds, Cell(size, (folder, *more), network), timed)
    samples = bench.samples({name: seeds for name, (seeds, *_) in cells.items()})
    found = bench.run(cell for _, *others in cells.values() for cell in others)
    return {name: Student(found[own], found[timed], samples[name]) for name, (_, own, timed) in cells.items()}


def columns(network: str = "UNet") -> list[Measure]:
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
        label = f"{network}'s time, {batch} row{'s' * (batch > 1)}, % of the teacher's"
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
