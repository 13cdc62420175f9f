"""Images per second of the trainers: reading in the step, in workers, and from cached encodings.

    git worktree add ../before 45ec133
    python benchmarks/training_throughput.py --baseline ../before

Trains the models of the testbed on a folder of JPEGs of 512 × 512 for a few steps. The network has one CPU thread, as if
a device computed beside the CPU; workers have the other cores. The baseline and this checkout take turns. Images per
second are those of the steps after the first few, without the start of the workers and the encoding of the cache. The CPU
time of the process that trains, without that of its workers, depends less on what else the machine does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.testbed import fashion_scenes

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


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--baseline", type=Path, required=True, help="checkout to compare with")
    add("--num_images", type=int, default=512)
    add("--batch_size", type=int, default=8)
    add("--steps", type=int, default=12)
    add("--warmup", type=int, default=5, help="steps before those that count")
    add("--repetitions", type=int, default=3)
    add("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


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


def commands(args: argparse.Namespace, root: Path, images: Path, output: Path) -> dict[str, list[str]]:
    """{"trainer|variant": arguments of its run}."""
    cards = ROOT / "model_cards"
    scenes = ["--pretrained_model_name_or_path", str(cards / "fashion-scenes"), "--resolution", "32"]
    one_stage = ["--plan", str(cards / "asdm-fashion-scenes" / "plan.json"), "--one_shot"]
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
                *("--reg_weight", "0", "--source_components", "0", "--max_train_samples", "64"),
                *("--max_train_steps", str(args.steps)),
            ],
        ),
    }
    before = root != ROOT
    variants = (
        {"before": []} if before else {f"{n} workers": ["--dataloader_num_workers", str(n)] for n in range(3)}
    )
    found = {}
    for trainer, (script, own) in trainers.items():
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


def measure(
    args: argparse.Namespace, root: Path, images: Path, output: Path
) -> dict[str, tuple[float, float, float]]:
    """{"trainer|variant": images per second, CPU ms per image, seconds to the end of the first step} of a checkout."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    argv = [sys.executable, "-c", RUNNER, json.dumps(commands(args, root, images, output))]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False, cwd=output)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("TIMES "):
            name, first, ticks = json.loads(line[6:])
            counted = ticks[args.warmup - 1 :]
            images = args.batch_size * (len(counted) - 1)
            wall, own = (counted[-1][i] - counted[0][i] for i in (0, 1))
            found[name] = images / wall, 1000 * own / images, first
    return found


def main() -> None:
    """Measures in turns and writes the table."""
    args = parse_args()
    args.baseline = args.baseline.resolve()
    found: dict[str, list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        write_images(images, args.num_images)
        for repetition in range(args.repetitions):
            roots = [args.baseline, ROOT]
            for root in roots if repetition % 2 == 0 else reversed(roots):
                output = Path(folder) / f"{repetition}-{root.name}"
                output.mkdir()
                for name, times in measure(args, root, images, output).items():
                    found.setdefault(name, []).append(times)
                    print(f"{name}: {times[0]:.1f} images/s, {times[1]:.1f} ms, {times[2]:.1f} s", flush=True)
    write(args, found)


def write(args: argparse.Namespace, found: dict[str, list[tuple[float, float, float]]]) -> None:
    """Writes the measurements as JSON and as a table."""
    record: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if isinstance(v, int)},
        "runs": {},
    }
    lines = []
    for name, times in found.items():
        trainer, variant = name.split("|")
        rates, own, starts = ([values[i] for values in times] for i in range(3))
        rate = statistics.median(rates)
        ratio = rate / statistics.median(values[0] for values in found[f"{trainer}|before"])
        record["runs"][name] = {
            "images per second": rates,
            "CPU ms per image": own,
            "s to the first step": starts,
        }
        spread = f"{rate:.1f} ({min(rates):.1f} to {max(rates):.1f})"
        rest = [f"{ratio:.2f}", f"{statistics.median(own):.1f}", f"{statistics.median(starts):.1f}"]
        lines.append([trainer, variant, spread, *rest])
    lines.sort(key=lambda line: line[0])
    (args.output_dir / "training_throughput.json").write_text(json.dumps(record, indent=1) + "\n")
    head = [
        "trainer",
        "variant",
        "images/s (range)",
        "ratio to before",
        "CPU ms per image",
        "s to the first step",
    ]
    table = markdown_table(head, lines)
    (args.output_dir / "training_throughput.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
