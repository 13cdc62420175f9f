"""Images per second of the trainers: reading in the step, in workers, and from cached encodings.

Trains the models of the testbed on a folder of JPEGs of 512 × 512 for a few steps. The network has one CPU thread, as if
a device computed beside the CPU; workers have the other cores. The baseline, the version without workers, and this checkout
take turns. Images per second are those of the steps after the first few, without the start of the workers and the encoding
of the cache. The CPU time of the process that trains, without that of its workers, depends less on what else the machine does.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusers_ext.core.storage import whole_folder, write_json
from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.testbed import fashion_scenes

from .framework.bench import Bench
from .framework.cells import Cell

WRITES = ("training_throughput.md", "training_throughput.json")
# The last commit that reads images in the step.
BASELINE = "45ec133"
ROOT = Path(__file__).parents[1]
# Runs several trainings in one process, since importing takes longer than training. Both checkouts have `_Clock.tick`.
RUNNER = """
import json, runpy, sys, time
from accelerate.state import AcceleratorState, GradientState
from diffusers_ext.training import loop
tick = loop._Clock.tick
def timed(self, images):
    tick(self, images)
    ticks.append((time.monotonic(), time.process_time()))
loop._Clock.tick = timed
runs = json.loads(sys.argv[1])
for name, argv in runs.items():
    ticks = []
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    sys.argv = argv
    start = time.monotonic()
    runpy.run_path(argv[0], run_name="__main__")
    print("TIMES " + json.dumps([name, ticks[0][0] - start, ticks]), flush=True)
"""


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is; `warmup` steps come before those that count."""

    num_images: int = 512
    batch_size: int = 8
    steps: int = 12
    warmup: int = 5
    repetitions: int = 3
    trainers: tuple[str, ...] = ("Smooth-LoRA", "A-SDM", "SIGN")
    workers: tuple[int, ...] = (0, 1, 2)


def write_images(folder: Path, count: int) -> None:
    """JPEGs of 512 × 512: garments, enlarged, with noise."""
    images, prompts = fashion_scenes.scene_arrays(fashion_scenes.SAMPLE_DIR, "train", count, 0)
    draw, lines = np.random.default_rng(0), []
    for i, (image, prompt) in enumerate(zip(images, prompts)):
        large = np.asarray(Image.fromarray(image[:, 16:48]).resize((512, 512)), np.float32)
        noisy = (large + draw.normal(0, 8, large.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{i:04d}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{i:04d}.jpg", "text": prompt}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def commands(args: Settings, root: Path, before: bool, images: Path, output: Path) -> dict[str, list[str]]:
    """{"trainer|variant": arguments of its run}."""
    cards = ROOT / "model_cards"
    scenes = ["--pretrained_model_name_or_path", str(cards / "fashion-scenes"), "--resolution", "32"]
    one_stage = ["--plan", str(cards / "asdm-fashion-scenes" / "plan.json"), "--one_shot"]
    white = ["--source_components", "0"] if before else ["--recipe", "regression", "--source", "white"]
    trainers = {
        "Smooth-LoRA": (
            "train_smooth_lora",
            [*scenes, "--variation_weight", "0", "--max_train_steps", str(args.steps)],
        ),
        "A-SDM": ("train_asdm", [*scenes, *one_stage, "--steps_per_stage", str(args.steps)]),
        "SIGN": (
            "train_sign",
            [
                *("--pretrained_model_name_or_path", str(cards / "fashion-ddpm"), "--resolution", "32"),
                *(*white, "--reg_weight", "0", "--max_train_samples", "64"),
                *("--max_train_steps", str(args.steps)),
            ],
        ),
    }
    variants = (
        {"before": []}
        if before
        else {f"{n} workers": ["--dataloader_num_workers", str(n)] for n in args.workers}
    )
    found = {}
    for trainer in args.trainers:
        script, own = trainers[trainer]
        more: dict[str, list[str]] = dict(variants)
        if trainer == "SIGN" and not before:
            more |= {f"{name}, mirrored": [*extra, "--random_flip"] for name, extra in variants.items()}
        elif trainer != "SIGN":
            more["before, --cache_latents" if before else "--cache_latents"] = ["--cache_latents"]
        for variant, extra in more.items():
            name = f"{trainer}|{variant}"
            folder = output / name.replace("|", "-").replace(" ", "-")
            shared = ["--train_data_dir", str(images), "--output_dir", str(folder)]
            shared += ["--train_batch_size", str(args.batch_size)]
            found[name] = [str(root / "training" / f"{script}.py"), *shared, *own, *extra]
    return found


def in_turn(before: bool, root: str, repetition: int, args: Settings) -> dict[str, Any]:
    """Of every "trainer|variant": images per second, CPU ms per image, seconds to the end of the first step.

    `before` says whether `root` is the baseline's checkout; `repetition` only tells the cells apart.
    """
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        write_images(images, args.num_images)
        return measure(args, Path(root), before, images, Path(folder))


def measure(args: Settings, root: Path, before: bool, images: Path, output: Path) -> dict[str, Any]:
    """`in_turn` on images that are there."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    argv = [sys.executable, "-c", RUNNER, json.dumps(commands(args, root, before, images, output))]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, cwd=output)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("TIMES "):
            name, first, ticks = json.loads(line[6:])
            counted = ticks[args.warmup - 1 :]
            count = args.batch_size * (len(counted) - 1)
            wall, own = (counted[-1][i] - counted[0][i] for i in (0, 1))
            found[name] = np.array([count / wall, 1000 * own / count, first])
    return found


def main(bench: Bench) -> None:
    """Measures in turns and writes the table."""
    s = bench.pick(Settings(), Settings(8, 2, 3, 2, 1, ("Smooth-LoRA",), (0,)))
    # For a quick run this checkout stands for the baseline's.
    roots = {True: ROOT if bench.quick else checkout(bench.cache_dir / f"before-{BASELINE}"), False: ROOT}
    cells: list[tuple[bool, Cell]] = []
    for repetition in range(s.repetitions):
        for before in (True, False) if repetition % 2 == 0 else (False, True):
            # The folders themselves, as texts: what is measured is their code.
            cells.append((before, Cell(in_turn, (before, str(roots[before]), repetition, s), alone=True)))
    measured = bench.run(cell for _, cell in cells)
    found: dict[str, list[np.ndarray]] = {}
    for _, cell in cells:
        for name, values in measured[cell].items():
            found.setdefault(name, []).append(values)
    write(bench, s, found)


def checkout(folder: Path) -> Path:
    """The baseline's files, taken from this repository's history."""
    if not folder.is_dir():
        with whole_folder(folder) as partial:
            archive = subprocess.run(
                ["git", "-C", str(ROOT), "archive", BASELINE], check=True, stdout=subprocess.PIPE
            )
            subprocess.run(["tar", "-x", "-C", str(partial)], input=archive.stdout, check=True)
    return folder


def write(bench: Bench, args: Settings, found: dict[str, list[np.ndarray]]) -> None:
    """Writes the measurements as JSON and as a table."""
    record: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int)},
        "runs": {},
    }
    lines = []
    for name, times in found.items():
        trainer, variant = name.split("|")
        rates, own, starts = ([float(values[i]) for values in times] for i in range(3))
        rate = statistics.median(rates)
        ratio = rate / statistics.median(float(values[0]) for values in found[f"{trainer}|before"])
        record["runs"][name] = {
            "images per second": rates,
            "CPU ms per image": own,
            "s to the first step": starts,
        }
        spread = f"{rate:.1f} ({min(rates):.1f} to {max(rates):.1f})"
        rest = [f"{ratio:.2f}", f"{statistics.median(own):.1f}", f"{statistics.median(starts):.1f}"]
        lines.append([trainer, variant, spread, *rest])
    lines.sort(key=lambda line: line[0])
    write_json(bench.path("training_throughput.json"), record)
    head = [
        "trainer",
        "variant",
        "images/s (range)",
        "ratio to before",
        "CPU ms per image",
        "s to the first step",
    ]
    bench.write("training_throughput.md", markdown_table(head, lines))
