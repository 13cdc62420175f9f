"""The page of benchmarks/optimizers.py: losses and Fréchet distances at equal steps and at equal time."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from optimizers_runs import Run
from scipy import stats

from diffusers_ext.metrics.comparison import Estimate, markdown_table
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.grader import garment_features, load_grader
from diffusers_ext.testbed.runs import load_reference

matplotlib.use("Agg")
# What the difference to a control answers: (optimizer, its control).
QUESTIONS = (
    ("Muon", "AdamW"),
    ("Muon", "Muon, 2-D only"),
    ("Drop-Muon", "AdamW"),
    ("Drop-Muon", "Muon"),
    ("Drop-Muon", "Drop-Muon, subset"),
    ("Drop-Muon", "AdamW, suffix"),
)
Runs = Mapping[str, Mapping[float, Sequence[Run]]]


def equal_time(steps: int, seconds: Mapping[str, float]) -> float:
    """CPU seconds after which all optimizers are compared: those of `steps` steps of the cheapest."""
    return steps * min(value for name, value in seconds.items() if "bf16" not in name)


def equal_time_step(run: Run, seconds: Mapping[str, float]) -> int:
    """The evaluated step that is nearest to the equal time."""
    target = equal_time(run.steps, seconds) / seconds[run.arm]
    return min(run.evaluated(), key=lambda step: abs(step - target))


def t_interval(values: np.ndarray) -> Estimate:
    """Mean with its 95% t interval over seeds."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, float("-inf"), float("inf"))
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return Estimate(mean, mean - half, mean + half)


def write(
    args: argparse.Namespace,
    found: Mapping[str, Runs],
    control: Run,
    seconds: Mapping[str, Mapping[str, float]],
    features: Mapping[tuple[str, int, int], np.ndarray],
) -> str:
    """Writes optimizers.md and optimizers.png, and returns the page.

    Args:
        args: of the benchmark.
        found: {task: {optimizer: {learning rate: runs}}}, of which the best rate comes first.
        control: Muon with torch's own iteration in bfloat16.
        seconds: CPU seconds of a step by task and optimizer.
        features: of samples, by optimizer, seed and step.
    """
    reference = load_reference("garments-test")
    distances = {key: frechet_distance(FeatureStats.of(value), reference) for key, value in features.items()}
    text = []
    for task, title in (("pixel", "Pixel DDPM from scratch"), ("lora", "Smooth-LoRA on Fashion Scenes")):
        runs, cost = found[task], seconds[task]
        measures = _measures(args, runs, cost, distances if task == "pixel" else {})
        text += [f"## {title}", _table(runs, cost, measures), _differences(measures), _rates(args, runs)]
        text.append(_remarks(args, runs, cost))
    text += [_iteration(args, found["pixel"], control), _floor(args, reference)]
    page = "\n\n".join(part for part in text if part) + "\n"
    (args.output_dir / "optimizers.md").write_text(page)
    _draw(args, found, seconds)
    return page


def _record(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    return json.loads(run.path(args.cache_dir).read_text())


def _measures(
    args: argparse.Namespace, runs: Runs, cost: Mapping[str, float], distances: Mapping[Any, float]
) -> dict[str, dict[str, np.ndarray]]:
    """{measure: {optimizer: values (seeds,)}} at the best rate."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for arm, rates in runs.items():
        best = next(iter(rates.values()))
        records = [_record(args, run) for run in best]
        at = equal_time(best[0].steps, cost) / cost[arm]
        values = {
            "loss, equal steps": [r["loss"][-1] for r in records],
            "loss, equal time": [float(np.interp(at, r["steps"], r["loss"])) for r in records],
        }
        if distances:
            near = equal_time_step(best[0], cost)
            values["Fréchet, equal steps"] = [distances[arm, run.seed, run.steps] for run in best]
            values["Fréchet, equal time"] = [distances[arm, run.seed, near] for run in best]
        for name, numbers in values.items():
            found.setdefault(name, {})[arm] = np.array(numbers)
    return found


def _digits(measure: str) -> int:
    return 2 if "Fréchet" in measure else 4


def _table(runs: Runs, cost: Mapping[str, float], measures: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    rows = []
    for arm, rates in runs.items():
        values = [t_interval(by_arm[arm]).format(_digits(name)) for name, by_arm in measures.items()]
        rows.append([arm, f"{next(iter(rates)):g}", f"{cost[arm]:.2f}", *values])
    return markdown_table(["optimizer", "learning rate", "CPU s a step", *measures], rows)


def _differences(measures: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    there = next(iter(measures.values()))
    rows = [
        [
            f"{ours} − {other}",
            *(t_interval(m[ours] - m[other]).marked(_digits(name)) for name, m in measures.items()),
        ]
        for ours, other in QUESTIONS
        if ours in there and other in there
    ]
    return "Paired by seed:\n\n" + markdown_table(["difference", *measures], rows)


def _rates(args: argparse.Namespace, runs: Runs) -> str:
    names = sorted({rate for rates in runs.values() for rate in rates})
    rows = [
        [arm, *(_last_loss(args, rates[rate][0]) if rate in rates else "–" for rate in names)]
        for arm, rates in runs.items()
    ]
    return "Loss of seed 0 by learning rate:\n\n" + markdown_table(
        ["optimizer", *(f"{rate:g}" for rate in names)], rows
    )


def _last_loss(args: argparse.Namespace, run: Run) -> str:
    return f"{_record(args, run)['loss'][-1]:.4f}"


def _remarks(args: argparse.Namespace, runs: Runs, cost: Mapping[str, float]) -> str:
    run = next(iter(runs["AdamW"].values()))[0]
    at = equal_time(run.steps, cost) / cost["Muon, bf16"]
    records = [_record(args, run) for run in next(iter(runs["Muon"].values()))]
    slow = np.mean([np.interp(at, record["steps"], record["loss"]) for record in records])
    return (
        f"{run.steps} steps with {run.batch} rows, constant learning rate after a warm-up, averaged weights,"
        f" {args.seeds} seeds, 95% t intervals. Equal time is {equal_time(run.steps, cost):.0f} CPU seconds. Seconds are"
        f" means of steps in turns, with Newton–Schulz in float32; as torch computes it, in bfloat16, which this CPU has"
        f" no instructions for, a step of Muon takes {cost['Muon, bf16']:.2f} s, and its loss at equal time is {slow:.4f}."
    )


def _iteration(args: argparse.Namespace, runs: Runs, control: Run) -> str:
    single = next(run for run in next(iter(runs["Muon"].values())) if run.seed == control.seed)
    losses = [_record(args, run)["loss"][-1] for run in (single, control)]
    return (
        f"The loss of Muon with seed {control.seed} is {losses[0]:.5f} with Newton–Schulz in float32 and {losses[1]:.5f}"
        " in bfloat16."
    )


def _floor(args: argparse.Namespace, reference: FeatureStats) -> str:
    garments = fashion_scenes.load_garments(args.train_data_dir, "train")[0]
    chosen = np.random.default_rng(0).choice(len(garments), args.num_images, replace=False)
    real = garments[chosen].astype(np.float32) / 255
    floor = frechet_distance(FeatureStats.of(garment_features(load_grader(), real)), reference)
    return (
        f"Fréchet distances of {args.num_images} images in {args.num_inference_steps} steps of DPM++ 2M, the same noise"
        f" for all, at the evaluated step next to the equal time; {args.num_images} real training garments have"
        f" {floor:.2f}. They are on the grader's features and no FID."
    )


def _draw(
    args: argparse.Namespace, found: Mapping[str, Runs], seconds: Mapping[str, Mapping[str, float]]
) -> Path:
    """Losses of all seeds at the best rate, over steps and over CPU seconds."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained", sharey="row")
    for row, (task, title) in zip(axes, (("pixel", "Pixel DDPM"), ("lora", "Smooth-LoRA"))):
        for number, (arm, rates) in enumerate(found[task].items()):
            rate, runs = next(iter(rates.items()))
            records = [_record(args, run) for run in runs]
            steps = np.array(records[0]["steps"])
            losses = np.array([record["loss"] for record in records])
            for axis, scale in zip(row, (1.0, seconds[task][arm])):
                axis.plot(steps * scale, losses.mean(0), f"C{number}", label=f"{arm}, {rate:g}")
                axis.fill_between(
                    steps * scale, losses.min(0), losses.max(0), color=f"C{number}", alpha=0.15, lw=0
                )
        for axis, label in zip(row, ("steps", "CPU seconds")):
            axis.set(xlabel=label, yscale="log")
            axis.grid(alpha=0.3, which="both")
        row[0].set(ylabel="validation loss", title=title)
        row[0].legend(fontsize=8)
    path = args.output_dir / "optimizers.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
