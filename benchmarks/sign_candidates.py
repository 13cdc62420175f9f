"""What SIGN can be trained with, on the embedded pixel model: every recipe and each part left out, for equal times."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_ext.metrics.comparison import Estimate
from diffusers_ext.sign.arguments import add_sign_arguments, parse, scores_of, weights_of
from diffusers_ext.sign.lora import lora_copy
from diffusers_ext.sign.teacher import untrained_projector
from diffusers_ext.sign.training import Scores, SIGNObjective, SIGNRows
from diffusers_ext.training.arguments import add_training_arguments
from diffusers_ext.training.rows import rows_of_step

from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .framework.samples import Samples
from .framework.statistics import UNKNOWN, Statistics
from .framework.tables import Measure, Row, comparison
from .framework.timing import take_turns
from .framework.trainings import Training
from .sign_runs import TEACHER, figures, load_teacher, reads, samples

DEFAULT, REGRESSION = "default: scores, rec, idem", "no scores: rec, idem, reg, flow"
_ALONE = {"rec_weight": 0, "idem_weight": 0}
# What the default leaves out is added, and what it has is left out.
_AGAIN: dict[str, Any] = (
    {"no rows noised again": {"renoised_share": 0}}
    if Scores.renoised_share
    else {"a quarter of the rows noised again": {"renoised_share": 0.25}}
)
_FIRST: dict[str, Any] = (
    {"fake score not first": {"fake_first_steps": 0}}
    if Scores.fake_first_steps
    else {"fake score first": {"fake_first_steps": 20}}
)
# The arguments that differ from those of the default, by name.
CANDIDATES: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "scores alone": _ALONE,
    "without idem": {"idem_weight": 0},
    "without rec": {"rec_weight": 0},
    **_AGAIN,
    **_FIRST,
    "both rates 1e-3": {"learning_rate": "1e-3", "fake_learning_rate": "1e-3"},
    # Its gradient is about ten times larger, beside which rec and idem keep their share.
    "gradient of DMD's paper": {"matching": "dmd_l1", "dmd_weight": 0.1},
    "SiD, α = 1": {"matching": "sid"},
    REGRESSION: {"recipe": "regression"},
    # Without rec, the constant is consistent.
    "consistency: flow, rec": {"recipe": "regression", "reg_weight": 0, "idem_weight": 0},
    "regression: reg": {"recipe": "regression", "flow_weight": 0, **_ALONE},
}


@dataclass(frozen=True)
class Settings:
    """How large the comparison is.

    Attributes:
        names: of `CANDIDATES`; the first is the control.
        seconds: of CPU time of each training, with the making of its pairs.
        pairs, pair_steps: images of the teacher for those that need them, and the steps of each.
        seeds: of the trainings; each has noise of its own for its samples, the same for all candidates.
        images, figures: samples of each training, and test garments for its figures.
        rounds: of measuring a step.
    """

    names: tuple[str, ...] = tuple(CANDIDATES)
    seconds: float = 70.0
    pairs: int = 1024
    pair_steps: int = 8
    batch_size: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    images: int = 900
    figures: int = 200
    rounds: int = 4
    more: tuple[tuple[str, Any], ...] = ()


FULL = Settings()
QUICK = Settings(
    (DEFAULT, REGRESSION),
    0.0,
    16,
    2,
    4,
    (0,),
    4,
    4,
    1,
    (("max_train_samples", 32), ("source_components", 2), ("source_rank", 2), ("ema_decay", 0.5)),
)


def needs_pairs(name: str) -> bool:
    """Whether a candidate learns from images of the teacher."""
    own = CANDIDATES[name]
    return own.get("recipe") == "regression" and bool(own.get("reg_weight", 1))


# --- seconds of a step ---


def step_seconds(
    names: tuple[str, ...], batch_size: int, pair_steps: int, rounds: int
) -> dict[str, np.ndarray]:
    """CPU seconds of a training step of every candidate, by its name, and of an image of the teacher, "pair"; (rounds,).

    The step is the objective's: of the optimizer and the averages, whose share is small, there is none.
    """
    torch.set_num_threads(1)
    teacher, draw = load_teacher(), torch.Generator().manual_seed(0)
    data = torch.randn(batch_size, 1, 32, 32, generator=draw).clamp(-1, 1)
    work = {name: partial(_step, objective_of(teacher, CANDIDATES[name]), data) for name in names}
    noise = torch.randn(64, 1, 32, 32, generator=draw)
    work["pair"] = partial(_forward, teacher.unet, noise)
    times = take_turns(work, rounds, 1, noise.device, "seconds of a step", time.process_time)
    times["pair"] *= pair_steps / len(noise)
    return times


def objective_of(teacher: Any, options: Mapping[str, Any], guidance_scale: float = 1.0) -> SIGNObjective:
    """What `train_sign.py` trains with these options, with networks of its own and without a source."""
    parser = argparse.ArgumentParser()
    add_sign_arguments(parser)
    add_training_arguments(parser)
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    args = parse(parser, ["--output_dir", "", *given])
    sign = untrained_projector(teacher, in_weights=False)
    projector, network, fake = sign.projector, sign.network.requires_grad_(False), None
    if args.rank:
        own, fake = (lora_copy(network, teacher, args.rank) for _ in range(2))
    else:
        own = copy.deepcopy(network).requires_grad_(True)
    setattr(projector, "unet" if sign.flow is None else "transformer", own)
    return SIGNObjective(projector, network, weights_of(args), scores_of(args, guidance_scale), fake=fake)


def _step(objective: SIGNObjective, data: torch.Tensor) -> None:
    rows = SIGNRows(data, tuple(data.shape[1:]), None, None)(rows_of_step(0, 0, 0, len(data)))
    # Past the first steps, which some candidates have of another kind.
    objective(**{**rows, "step": objective.scores.fake_first_steps}).backward()


@torch.no_grad()
def _forward(network: Any, sample: torch.Tensor) -> None:
    network(sample, 500)


def steps_of(name: str, times: Mapping[str, np.ndarray], s: Settings) -> int:
    """How many steps a candidate has time for, 1 or more."""
    left = s.seconds - (s.pairs * float(np.median(times["pair"])) if needs_pairs(name) else 0)
    first = CANDIDATES[name].get("fake_first_steps", Scores.fake_first_steps)
    return max(1 + first, round(left / float(np.median(times[name]))))


# --- trainings ---


def training(name: str, seed: int, steps: int, data_dir: Path, s: Settings) -> Training:
    """A projector. All candidates with images of the teacher share them."""
    options: dict[str, Any] = {
        "train_batch_size": s.batch_size,
        "max_train_steps": steps,
        "max_train_samples": 16_384,
        "ema_decay": 0.98,
        "checkpointing_steps": 1000,
        "seed": seed,
        **dict(s.more),
    }
    own = CANDIDATES[name]
    if own.get("recipe") == "regression":
        # As a share of its few steps.
        options["lr_warmup_steps"] = min(20, steps // 4)
    if needs_pairs(name):
        options |= {"num_pairs": s.pairs, "num_inference_steps": s.pair_steps}
        options["pairs_dir"] = "{cache}/sign-pairs-" + f"{s.pairs}-{s.pair_steps}"
    given = [part for key, value in {**options, **own}.items() for part in (f"--{key}", str(value))]
    model = ("--pretrained_model_name_or_path", TEACHER, "--dataset_name", "fashion-mnist")
    return Training("train_sign", (*model, "--train_data_dir", data_dir, "--use_ema", *given))


@dataclass(frozen=True)
class Candidate:
    """What was measured of one candidate, by training seed.

    Attributes:
        samples: of every seed, with noise of its own.
        figures: of `projector_figures`.
        seconds: wall-clock seconds of the training, without its pairs.
        steps: of each training.
        folders: of the trained projectors.
    """

    samples: tuple[Samples, ...]
    figures: tuple[Arrays, ...]
    seconds: tuple[float, ...]
    steps: int
    folders: tuple[Path, ...]

    def mean(self, figure: str) -> float:
        """Mean of a figure over the seeds."""
        return float(np.mean([float(found[figure]) for found in self.figures]))


def measured(bench: Bench, s: Settings) -> tuple[dict[str, Candidate], Arrays]:
    """Trains and measures all candidates: these by name, and `step_seconds`."""
    costs = Cell(step_seconds, (s.names, s.batch_size, s.pair_steps, s.rounds), reads(None), alone=True)
    times = bench.run([costs])[costs]
    steps = {name: steps_of(name, times, s) for name in s.names}
    wanted = {
        (name, seed): training(name, seed, steps[name], bench.data_dir, s)
        for seed in s.seeds
        for name in s.names
    }
    # The first makes the pairs that the others share.
    first = next((key for key in wanted if needs_pairs(key[0])), None)
    if first is not None:
        bench.train({str(first): wanted[first]})
    folders = bench.train({str(key): run for key, run in wanted.items()})
    places = {key: folders[str(key)] for key in wanted}
    drawn = {
        key: Cell(samples, (folder, "", 1, 41 + key[1], s.images), reads(folder))
        for key, folder in places.items()
    }
    own = {
        key: Cell(figures, (folder, bench.data_dir, s.figures), reads(folder))
        for key, folder in places.items()
    }
    found = bench.run([*drawn.values(), *own.values()])

    def candidate(name: str) -> Candidate:
        keys = [(name, seed) for seed in s.seeds]
        notes = [json.loads((places[k] / "training.json").read_text(encoding="utf-8")) for k in keys]
        return Candidate(
            tuple(Samples.of([found[drawn[key]]]) for key in keys),
            tuple(found[own[key]] for key in keys),
            tuple(float(note["seconds"]) for note in notes),
            steps[name],
            tuple(places[key] for key in keys),
        )

    return {name: candidate(name) for name in s.names}, times


# --- the table ---


def table(statistics: Statistics, s: Settings, found: Mapping[str, Candidate], times: Arrays) -> list[str]:
    """The text and the table of the candidates."""
    control = found[s.names[0]]
    rows = []
    for name, one in found.items():
        pairs = s.pairs * float(np.median(times["pair"])) if needs_pairs(name) else 0.0
        labels = (name, str(one.steps), f"{float(np.median(times[name])):.2f}", f"{pairs:.0f}")
        labels += (f"{np.mean(one.seconds):.0f}",)
        rows.append(Row(labels, one, None if one is control else control))
    header = ["", "steps", "CPU s a step", "CPU s for pairs", "seconds of training"]
    return [
        f"Projectors trained with {s.seconds:g} s of CPU time each, pairs of the teacher included, {s.batch_size} images a"
        f" step, {len(s.seeds)} training seeds, {s.images} samples of each in one step. The intervals are over training seeds,"
        " with noise of its own for each seed and the same for all rows.",
        comparison(header, rows, measures(statistics), f"{s.names[0].partition(':')[0]}'s"),
    ]


def measures(statistics: Statistics) -> list[Measure]:
    """Distances by both judges over the training seeds, precision and recall, and the figures of a projector."""

    def distances(one: Candidate, judge: str) -> np.ndarray:
        return np.array([statistics.distance(samples, judge).value for samples in one.samples])

    def distance(judge: str) -> Measure:
        return Measure(
            f"FD∞ ({judge})",
            lambda one: over_seeds(distances(one, judge)),
            lambda one, control: over_seeds(distances(one, judge) - distances(control, judge)),
        )

    def fidelity(one: Candidate) -> str:
        found = [statistics.coverage(samples, "grader", 3) for samples in one.samples]
        return " / ".join(f"{np.mean([getattr(f, n) for f in found]):.2f}" for n in ("precision", "recall"))

    figures: Sequence[tuple[str, str]] = (
        ("idempotence", "‖f(f(z)) − f(z)‖/‖f(z)‖"),
        ("motion", "‖f(z) − z‖/‖z‖"),
        ("variance", "variance, share of the data's"),
        ("reconstruction", "mean abs. f(x) − x"),
    )
    return [
        distance("grader"),
        distance("judge"),
        Measure("precision / recall", fidelity),
        *(Measure(label, partial(Candidate.mean, figure=name), digits=3) for name, label in figures),
    ]


def over_seeds(values: np.ndarray) -> Estimate:
    """Mean over training seeds with its t interval; not known for one seed."""
    if len(values) < 2 or np.isnan(values).any():
        return UNKNOWN
    return Estimate.of_contributions(float(values.mean()), (values - values.mean()) / len(values))
