"""Muon and Drop-Muon against AdamW: a small pixel DDPM from scratch, and a Smooth-LoRA on Fashion Scenes.

    OMP_NUM_THREADS=1 python benchmarks/optimizers.py --train_data_dir DIR

DIR holds Fashion-MNIST's four idx files. Every optimizer is trained at four learning rates with one seed, and at the
best of them with the other seeds. Every run is kept in --cache_dir, so an interrupted benchmark goes on where it
stopped. Writes optimizers.md and optimizers.png into --output_dir. Seconds are of the CPU, not of the clock.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from optimizers_runs import ARMS, Run, features, seconds_per_step, train
from tqdm.auto import tqdm

from diffusers_ext.core.storage import write_json

RATES = {"pixel": (1e-3, 2.5e-3, 6.3e-3, 1.6e-2), "lora": (3e-4, 1e-3, 3e-3, 1e-2)}
# The best rate of Muon was the last of the others.
MUON_LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TASK_ARMS = {"pixel": tuple(ARMS), "lora": ("AdamW", "Muon")}


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train_data_dir", required=True, help="Fashion-MNIST's files")
    add("--output_dir", type=Path, default=Path("benchmarks/results"))
    add("--cache_dir", type=Path, default=Path("runs/optimizers"))
    add("--steps", type=int, nargs=2, default=[120, 48], metavar=("PIXEL", "LORA"))
    add("--batch_sizes", type=int, nargs=2, default=[16, 8], metavar=("PIXEL", "LORA"))
    add("--seeds", type=int, default=3)
    add("--num_images", type=int, default=200, help="for the Fréchet distance")
    add("--num_inference_steps", type=int, default=8)
    return parser.parse_args()


def runs_of(args: argparse.Namespace, task: str, arm: str, bar: tqdm) -> dict[float, list[Run]]:
    """{learning rate: runs}: one run each, and all seeds of the best, which comes first."""
    number = list(RATES).index(task)
    found, losses = {}, {}
    rates = MUON_LORA_RATES if (task, arm) == ("lora", "Muon") else RATES[task]
    for rate in rates:
        run = Run(task, arm, rate, 0, args.steps[number], args.batch_sizes[number])
        bar.set_postfix_str(f"{task} {arm} {rate:g}")
        losses[rate] = train(run, args.train_data_dir, args.cache_dir)["loss"][-1]
        found[rate] = [run]
        bar.update()
    best = min(losses, key=lambda rate: losses[rate] if losses[rate] == losses[rate] else float("inf"))
    for seed in range(1, args.seeds):
        run = Run(task, arm, best, seed, args.steps[number], args.batch_sizes[number])
        bar.set_postfix_str(f"{task} {arm} {best:g} seed {seed}")
        train(run, args.train_data_dir, args.cache_dir)
        found[best].append(run)
        bar.update()
    return {best: found.pop(best), **found}


def costs(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """CPU seconds of a step, by task and optimizer."""
    path = args.cache_dir / f"costs-{'-'.join(map(str, args.batch_sizes))}.json"
    if not path.is_file():
        found = {}
        for (task, arms), batch, rounds in zip(TASK_ARMS.items(), args.batch_sizes, (21, 10)):
            found[task] = seconds_per_step(task, arms, batch, rounds, args.train_data_dir)
        write_json(path, found)
    return json.loads(path.read_text())


def main() -> None:
    """Trains what is not there yet, samples, and writes the page."""
    args = parse_args()
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    total = sum((len(RATES[task]) + args.seeds - 1) * len(arms) for task, arms in TASK_ARMS.items())
    found: dict[str, dict[str, dict[float, list[Run]]]] = {task: {} for task in TASK_ARMS}
    # The main comparison first, so that an interrupted benchmark has it.
    order = [(task, arm) for task in TASK_ARMS for arm in TASK_ARMS[task] if arm in TASK_ARMS["lora"]]
    order += [(task, arm) for task in TASK_ARMS for arm in TASK_ARMS[task] if arm not in TASK_ARMS["lora"]]
    with tqdm(total=total, desc="runs", dynamic_ncols=True) as bar:
        for task, arm in order:
            found[task][arm] = runs_of(args, task, arm, bar)
    # Torch's Muon iterates in bfloat16: does float32, which these runs use, change the result?
    best, *_ = found["pixel"]["Muon"].values()
    first = best[0]
    control = Run(first.task, first.arm, first.rate, first.seed, first.steps, first.batch, bf16=True)
    train(control, args.train_data_dir, args.cache_dir)
    seconds = costs(args)

    from optimizers_report import equal_time_step, write

    sampled_features: dict[tuple[str, int, int], np.ndarray] = {}
    sampled = [
        (arm, run, step)
        for arm, runs in found["pixel"].items()
        for run in next(iter(runs.values()))
        for step in dict.fromkeys([run.steps, equal_time_step(run, seconds["pixel"])])
    ]
    for arm, run, step in tqdm(sampled, desc="images", dynamic_ncols=True):
        sampled_features[arm, run.seed, step] = features(
            run, step, args.num_images, args.num_inference_steps, args.cache_dir
        )
    print(write(args, found, control, seconds, sampled_features))


if __name__ == "__main__":
    main()
