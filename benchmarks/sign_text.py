"""SIGN projectors of the text-to-image models against the front of their teachers, and other ways to train them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusers_ext.metrics.comparison import Estimate, markdown_table
from diffusers_ext.testbed.runs import held_out_prompts

from .flow_runs import SHORT
from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .framework.plots import Panel, Series, draw
from .framework.samples import Samples
from .framework.statistics import Statistics, paired_ratio, pairs_of
from .framework.tables import Measure, Row, comparison, quality
from .framework.trainings import Training
from .sign_text_runs import (
    Base,
    flow_base,
    memory,
    projected,
    real,
    sampled,
    seconds,
    source_alone,
    step_seconds,
    teacher_images,
    unet_base,
)

WRITES = ("sign_text.md", "sign_text.png", "sign_text_flow.md", "sign_text_flow.png")
SHOWN = 8
OURS, LORA, SFT = "SIGN", "SIGN, LoRA of rank 16", "SFT: denoising of the teacher's images"
_NO = dict.fromkeys(("rec_weight", "idem_weight", "reg_weight", "flow_weight"), 0)
# Options of `train_sign.py` by name. Those but SIGN have the learning rate of their recipe, 1e-3.
CONTROLS: dict[str, dict[str, Any]] = {
    OURS: {},
    "consistency: flow, rec": {"recipe": "regression", **_NO, "flow_weight": 1, "rec_weight": 1},
    "regression: reg": {"recipe": "regression", **_NO, "reg_weight": 1},
    SFT: {"recipe": "regression", **_NO, "denoise_weight": 1},
    LORA: {"rank": 16, "learning_rate": "1e-3", "fake_learning_rate": "3e-3"},
}


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is.

    Attributes:
        images, seed: held-out prompts, and the seed of prompts and noise.
        sign_steps: of the projector.
        steps, guidances: of the teacher's first solver, each with each.
        second: steps of its second solver, at the guidance scale of the training.
        guidance: of the real score, and of the teacher's images.
        seconds: of CPU time of each training, with the making of the teacher's images.
        drawn, draw_steps: how many images of the teacher, and in how many steps.
        rows: training images.
        rounds: of what is timed.
        controls: which are trained, of `CONTROLS`.
    """

    images: int = 1000
    seed: int = 51
    sign_steps: tuple[int, ...] = (1, 2, 4)
    steps: tuple[int, ...] = (4, 8, 16)
    guidances: tuple[float, ...] = (1.5, 2.0, 3.0)
    second: tuple[int, ...] = (8, 16)
    guidance: float = 2.0
    seconds: float = 150.0
    drawn: int = 768
    draw_steps: int = 8
    batch_size: int = 16
    rows: int = 2000
    rounds: int = 7
    controls: tuple[str, ...] = tuple(CONTROLS)


QUICK = Settings(4, 51, (1, 2), (2,), (2.0,), (), 2.0, 0.0, 4, 2, 2, 8, 2, (OURS, SFT, LORA))


@dataclass(frozen=True)
class Shown:
    """A row: what was drawn, and with how many rows of the denoiser for an image."""

    samples: Samples
    rows: int


# --- trainings ---


def training(bench: Bench, base: Base, name: str, steps: int, s: Settings) -> Training:
    """A projector; that of the included card but for the number of steps and images."""
    options: dict[str, Any] = {
        "guidance_scale": s.guidance,
        "train_batch_size": s.batch_size,
        "max_train_steps": steps,
        "ema_decay": 0.97,
        "checkpointing_steps": 1000,
        **(SHORT if base.name == "fashion-flow" else {}),
    }
    own = CONTROLS[name]
    if own.get("recipe") == "regression":
        options["lr_warmup_steps"] = min(20, steps // 4)
    if own.get("reg_weight"):
        options |= {"num_pairs": s.drawn, "num_inference_steps": s.draw_steps}
    given = [part for key, value in {**options, **own}.items() for part in (f"--{key}", str(value))]
    model: tuple[Any, ...] = ("--pretrained_model_name_or_path", base.folder, "--use_ema")
    if name == SFT:
        images = teacher_images(bench, base, s.drawn, s.draw_steps, s.guidance)
        return Training("train_sign", (*model, "--train_data_dir", images, *given))
    data = ("--dataset_name", "fashion-scenes", "--train_data_dir", bench.data_dir)
    return Training("train_sign", (*model, *data, "--max_train_samples", str(s.rows), *given))


def uses_images(name: str) -> bool:
    """Whether the teacher draws images for a training."""
    return name == SFT or bool(CONTROLS[name].get("reg_weight"))


def steps_of(name: str, times: Arrays, s: Settings) -> int:
    """How many steps there is time for, 1 or more. The LoRA has those of the whole network, to which it is compared."""
    drawing = s.drawn * s.draw_steps * float(np.median(times["image"])) if uses_images(name) else 0.0
    timed = OURS if name == LORA else name
    return max(1, round((s.seconds - drawing) / float(np.median(times[timed]))))


# --- the page of one teacher ---


def main(bench: Bench) -> None:
    """Trains and measures what is missing, and writes both pages, that of the UNet first."""
    s = bench.pick(Settings(), QUICK)
    for name, make in (("sign_text", unet_base), ("sign_text_flow", flow_base)):
        page(bench, s, make(bench), name)


def page(bench: Bench, s: Settings, base: Base, name: str) -> None:
    """The page of one teacher."""
    reads, whole = base.reads, (base.reads, s.seed, s.images)
    _, seed, count = whole
    rows = rows_of(s, base)
    trained, times, steps = controls(bench, s, base)
    cells = {label: cell for label, (cell, _) in rows.items()}
    cells |= {
        label: Cell(projected, (folder, base.folder, 1, seed, count), reads)
        for label, folder in trained.items()
    }
    scenes = Cell(real, (base.folder, bench.data_dir, seed, count), reads)
    found = bench.samples({label: [cell] for label, cell in {**cells, "real": scenes}.items()})
    shown = {label: Shown(found[label], cost) for label, (_, cost) in rows.items()}
    shown |= {f"trained: {label}": Shown(found[label], 1) for label in trained}
    statistics = bench.statistics("scenes")
    measures = columns(statistics, found["real"])
    ours = shown["SIGN, 1 step"]
    front = [Row((label, str(one.rows)), one, None if one is ours else ours) for label, one in shown.items()]
    front = [row for row in front if not row.labels[0].startswith("trained: ")]
    front.append(Row(("real images, through the autoencoder", ""), Shown(found["real"], 0)))
    parts = [
        f"{count:,} held-out prompts, the same noise in every row. A guided step evaluates two rows; SIGN's are without"
        f" guidance. {base.solvers[0]} and {base.solvers[1]} start at the highest noise level.",
        comparison(["", "rows an image"], front, measures, "SIGN's in one step"),
        "Seconds of a call for eight images on one thread, prompts and autoencoder included, and their share of that of"
        f" {max(s.steps)} guided steps:",
        seconds_table(bench, s, base),
        f"Projectors trained with {s.seconds:g} s of CPU time each, the teacher's images ({s.drawn}, {s.draw_steps} steps,"
        f" guidance {s.guidance:g}) included, {s.batch_size} rows a step, one training seed:",
        controls_table(s, shown, trained, times, steps, measures),
    ]
    if LORA in trained:
        parts += [
            "MB (10⁶ bytes) of one training step of AdamW in float32, counted, without averages. The peak is that of"
            " the process above what it had before the networks were copied:",
            memory_table(bench, s, base),
        ]
    bench.write(f"{name}.md", *parts)
    picture(bench, f"{name}.png", s, shown, statistics)


def rows_of(s: Settings, base: Base) -> dict[str, tuple[Cell, int]]:
    """The cells of the projector, of its source and of the teacher, and the denoiser's rows for an image, by label."""
    run = s.seed, s.images
    first, other = base.solvers
    found: dict[str, tuple[Cell, int]] = {}
    for n in s.sign_steps:
        label = f"SIGN, {n} step{'s' * (n > 1)}"
        found[label] = Cell(projected, (base.sign, base.folder, n, *run), base.reads), n
    for called, label in ((False, "SIGN's source"), (True, "SIGN's source, one call of the teacher")):
        cell = Cell(source_alone, (base.sign, base.folder, called, *run), base.reads)
        found[label] = cell, int(called)
    front = [(first, n, g) for g in s.guidances for n in s.steps]
    for solver, n, g in [*front, *((other, n, s.guidance) for n in s.second)]:
        cell = Cell(sampled, (base.folder, solver, n, g, *run), base.reads)
        found[f"{solver}, {n} steps, guidance {g:g}"] = cell, n * (2 if g > 1 else 1)
    return found


def controls(bench: Bench, s: Settings, base: Base) -> tuple[dict[str, Any], Arrays, dict[str, int]]:
    """Trains the controls, the LoRA of the UNet only: their folders, the seconds of a step, and their steps."""
    names = [name for name in s.controls if name != LORA or base.name == "fashion-scenes"]
    timed = tuple((name, tuple(CONTROLS[name].items())) for name in names if name != LORA)
    cost = Cell(
        step_seconds, (base.folder, s.guidance, timed, s.batch_size, s.rounds), base.reads, alone=True
    )
    times = bench.run([cost])[cost]
    steps = {name: steps_of(name, times, s) for name in names}
    return bench.train({n: training(bench, base, n, steps[n], s) for n in names}), times, steps


# --- tables ---


def columns(statistics: Statistics, scenes: Samples) -> list[Measure]:
    """The measures of `quality`, and the variance within a prompt as a share of that of real images of the same prompts."""
    found = [of_shown(measure) for measure in quality(statistics)]
    within = Measure(
        "variance within a prompt, share of real images'", lambda one: variance(statistics, one, scenes)
    )
    return [*found, within]


def of_shown(measure: Measure) -> Measure:
    """The measure of a row's samples."""
    value, difference = measure.value, measure.difference
    return Measure(
        measure.label,
        None if value is None else lambda one: value(one.samples),
        None if difference is None else lambda one, control: difference(one.samples, control.samples),
        measure.digits,
        measure.scale,
        measure.header,
        measure.tested,
    )


def variance(statistics: Statistics, one: Shown, scenes: Samples) -> Estimate:
    """Mean squared distance of the grader's features of two images of a prompt, over that of real images."""
    first, second, group = pairs_of(one.samples.prompts)
    if len(np.unique(group)) < 2:
        return Estimate(float("nan"), float("nan"), float("nan"))

    def apart(samples: Samples) -> np.ndarray:
        features = samples.features()
        return np.square(features[first] - features[second]).sum(1)

    change = statistics.ratio_change(apart(one.samples), apart(scenes), group)
    return Estimate(1 + change.value, 1 + change.low, 1 + change.high)


def seconds_table(bench: Bench, s: Settings, base: Base) -> str:
    """Median seconds of calls."""
    calls = tuple((n, s.guidance) for n in s.steps)
    cell = Cell(seconds, (base.folder, base.sign, s.sign_steps, calls, s.rounds), base.reads, alone=True)
    times = bench.run([cell])[cell]
    most = f"teacher, {max(s.steps)} steps, guidance {s.guidance:g}"
    rows = []
    for name, values in times.items():
        share = "" if name == most else paired_ratio(values, times[most]).format(3)
        rows.append([name, f"{np.median(values):.2f}", share])
    return markdown_table(["", "seconds", "of the longest"], rows)


def controls_table(
    s: Settings,
    shown: Mapping[str, Shown],
    trained: Mapping[str, Any],
    times: Arrays,
    steps: Mapping[str, int],
    measures: list[Measure],
) -> str:
    """The projectors that were trained for equal times."""
    ours, rows = shown[f"trained: {OURS}"], []
    for name, folder in trained.items():
        drawing = s.drawn * s.draw_steps * float(np.median(times["image"])) if uses_images(name) else 0.0
        note = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        labels = (name, str(steps[name]), f"{drawing:.0f}", str(note["seconds"]))
        one = shown[f"trained: {name}"]
        rows.append(Row(labels, one, None if one is ours else ours))
    header = ["", "steps", "CPU s for the teacher's images", "seconds of training"]
    return comparison(header, rows, measures, "SIGN's")


def memory_table(bench: Bench, s: Settings, base: Base) -> str:
    """The whole network and the LoRA."""
    cells = {
        name: Cell(memory, (base.folder, tuple(CONTROLS[name].items()), s.batch_size), base.reads, alone=True)
        for name in (OURS, LORA)
    }
    found = bench.run(cells.values())
    names = ("parameters", "trained", "gradients", "optimizer", "peak")
    rows = [[n, *(f"{float(found[cell][part]):.1f}" for part in names)] for n, cell in cells.items()]
    header = ["all parameters", "trained ones", "gradients", "states of the optimizer", "peak"]
    return markdown_table(["", *header], rows)


def picture(bench: Bench, name: str, s: Settings, shown: Mapping[str, Shown], statistics: Statistics) -> None:
    """Images of most rows, and accuracy and distance against the rows of the denoiser for an image."""
    kinds: dict[str, list[Shown]] = {}
    for label, one in shown.items():
        if one.rows and not label.startswith(("trained: ", "SIGN's source")):
            solver, _, rest = label.partition(", ")
            guidance = rest.partition(", ")[2]
            kinds.setdefault(f"{solver}, {guidance}" if guidance else solver, []).append(one)
    panels = []
    for title, measure in (("prompt accuracy", statistics.accuracy), ("FD∞", statistics.distance)):
        series = {
            kind: Series([one.rows for one in of], [measure(one.samples, "grader") for one in of])
            for kind, of in kinds.items()
        }
        panels.append(Panel("", "denoiser rows an image", title, series, {"xscale": "log"}))
    guided = f"guidance {s.guidance:g}"
    strips = {
        label: one.samples.pictures[:SHOWN]
        for label, one in shown.items()
        if label.endswith(guided) or "guidance" not in label
    }
    captions = held_out_prompts(s.images, s.seed)[:SHOWN]
    draw(bench.path(name), strips, panels, captions=captions, small=True)
