"""Pruned students of the embedded text-to-image model against it and against students that were pruned or trained otherwise.

    python benchmarks/asdm.py --control ours runs/asdm/ours/model --control "in one go" runs/asdm/one-shot/model ...

The finished student of --asdm is compared with the teacher. Of the controls, those with as many training steps as each other
are compared with the first of them: each is OUTPUT_DIR/model of a run of

    accelerate launch training/train_asdm.py --pretrained_model_name_or_path model_cards/fashion-scenes \\
        --dataset_name fashion-scenes --train_data_dir DIR --cache_latents --max_train_samples 8000 --snr_gamma 5 \\
        --train_batch_size 32 --learning_rate 5e-4 --lr_scheduler cosine --lr_warmup_steps 20 --mixed_precision bf16 \\
        --use_ema --ema_decay 0.99 --no_cond_convs --plan runs/asdm/plans/ours.json --steps_per_stage N N N --one_shot \\
        --output_dir runs/asdm/ours

after `python benchmarks/asdm_plans.py` has written the plans. The others differ in: the stages, by leaving out `--one_shot`;
CLME-CondConv, by leaving out `--no_cond_convs`; `--semantic_weight 0`; `--feature_weight 0`; `--from_scratch`; `--plan
runs/asdm/plans/bk.json` or random-1, -2, -3, which have one stage: `--steps_per_stage 3N`; and ours78 and ours78-gri, whose
stages are two and three, for GRI attention, which needs attention left at the finest resolution.

Every measurement is kept in --cache_dir, so an interrupted benchmark goes on where it stopped. Writes a Markdown page and a
image. Latency is of the UNet alone, in turns with the teacher's. Intervals are by bootstrap over images, from the same
prompts and noise in every row. The Fréchet distance is on the small grader's features and is not FID.
"""

import argparse
from pathlib import Path
from typing import Any

import kept
import matplotlib
import numpy as np
from asdm_runs import AS_IS, BATCHES, FOLDED, SHOWN, TEACHER, kept_at, run, training, variants
from tqdm.auto import tqdm

from diffusers_ext.metrics.comparison import (
    Estimate,
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.testbed.runs import held_out_prompts, load_reference

matplotlib.use("Agg")
Task = tuple[str, tuple[Any, ...]]
Found = dict[Task, dict[str, np.ndarray]]
Row = tuple[Path, str]  # a pipeline's folder, how its UNet is run
QUALITY = ["prompt accuracy, %", "less {}", "Fréchet distance", "less {}"]


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--asdm", type=Path, default=Path("model_cards/asdm-fashion-scenes"))
    add("--control", nargs=2, action="append", default=[], metavar=("NAME", "FOLDER"))
    add("--output_dir", type=Path, default=Path("benchmarks/results"))
    add("--cache_dir", type=Path, default=Path("runs/asdm_benchmark"))
    add("--num_images", type=int, default=500, help="of every seed")
    add("--seeds", type=int, nargs="+", default=[31, 32, 33])
    add("--num_inference_steps", type=int, default=6)
    add("--guidance_scale", type=float, default=2.0)
    add("--rounds", type=int, default=60, help="calls of each UNet whose time is taken")
    add("--workers", type=int, default=2, help="processes of one thread each")
    return parser.parse_args()


def labelled(args: argparse.Namespace) -> dict[str, Row]:
    """The rows of the first table."""
    found = {}
    for label, folder in (("teacher", TEACHER), ("A-SDM", args.asdm)):
        for variant in variants(folder):
            found[label if variant == AS_IS else f"{label}, {variant}"] = (folder, variant)
    return found


def pictures_of(row: Row, seed: int, args: argparse.Namespace) -> Task:
    """One student's images of one seed; folded layers compute the same."""
    folder, variant = row
    how = AS_IS if variant == FOLDED else variant
    return "pictures", (folder, how, seed, args.num_images, args.num_inference_steps, args.guidance_scale)


def tasks_of(rows: dict[str, Row], args: argparse.Namespace) -> tuple[list[Task], list[Task]]:
    """Everything to be measured: what may run side by side, and what is timed."""
    own = [*rows.values(), *((Path(folder), AS_IS) for _, folder in args.control)]
    folders = dict.fromkeys(folder for folder, _ in own)
    found = [pictures_of(row, seed, args) for row in own for seed in args.seeds]
    found += [("size", (folder,)) for folder in folders]
    found += [("plan", (folder,)) for folder in folders if folder != TEACHER]
    timed: list[Task] = [("latency", (*row, args.rounds)) for row in own]
    return list(dict.fromkeys(found)), list(dict.fromkeys(timed))


def gathered(found: Found, args: argparse.Namespace, row: Row, name: str) -> np.ndarray:
    """One figure of all seeds' images."""
    return np.concatenate([found[pictures_of(row, seed, args)][name] for seed in args.seeds])


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts of the gathered images."""
    return [prompt for seed in args.seeds for prompt in held_out_prompts(args.num_images, seed)]


def quality_cells(found: Found, args: argparse.Namespace, row: Row, control: Row) -> list[str]:
    """Alignment and Fréchet distance, and what they are less another row's."""
    reference = load_reference("scenes-test")
    aligned, features = (gathered(found, args, row, name) for name in ("aligned", "features"))
    prompts = prompts_of(args)
    cells = [proportion(aligned, prompts).format(1, 100), ""]
    cells += [frechet_interval(features, reference, prompts).format(), ""]
    if row != control:
        cells[1] = paired_difference(aligned, gathered(found, args, control, "aligned"), prompts).marked(
            1, 100
        )
        theirs = gathered(found, args, control, "features")
        cells[3] = paired_frechet_difference(features, theirs, reference, prompts).marked()
    return cells


def latency_cells(found: Found, args: argparse.Namespace, row: Row) -> list[str]:
    """The ratio to the teacher's time of the same round, median and quartiles, by batch size."""
    of = found["latency", (*row, args.rounds)]
    ratios = [np.percentile(of[f"own {b}"] / of[f"teacher {b}"], [50, 25, 75]) for b in BATCHES]
    return [Estimate(*ratio).format(1, 100) for ratio in ratios]


def size_cells(found: Found, folder: Path) -> list[str]:
    """Parameters and MACs in millions."""
    of = found["size", (folder,)]
    return [f"{float(of[name]) / 1e6:.2f}" for name in ("parameters", "MACs")]


LATENCY = [f"UNet's time, {b} row{'s' if b > 1 else ''}, % of the teacher's" for b in BATCHES]
SIZES = ["parameters, M", "MACs, M"]


def table_of_student(found: Found, args: argparse.Namespace, rows: dict[str, Row]) -> str:
    """The finished student against the teacher."""
    cells = []
    for label, row in rows.items():
        quality = [""] * 4 if row[1] == FOLDED else quality_cells(found, args, row, rows["teacher"])
        cells.append([label, *size_cells(found, row[0]), *latency_cells(found, args, row), *quality])
    return markdown_table(["", *SIZES, *LATENCY, *(name.format("the teacher's") for name in QUALITY)], cells)


def by_steps(controls: list[list[str]]) -> dict[int, dict[str, Path]]:
    """The controls in groups of as many training steps."""
    found: dict[int, dict[str, Path]] = {}
    for label, folder in controls:
        found.setdefault(training(Path(folder))["steps"], {})[label] = Path(folder)
    return found


def table_of_controls(found: Found, args: argparse.Namespace, controls: dict[str, Path]) -> str:
    """Students trained as long as each other."""
    rows, (first, control) = [], next(iter(controls.items()))
    for label, folder in controls.items():
        row = (folder, AS_IS)
        cells = [label, str(training(folder)["seconds"]), *size_cells(found, folder)]
        cells += latency_cells(found, args, row)
        rows.append([*cells, *quality_cells(found, args, row, (control, AS_IS))])
    header = ["", "seconds", *SIZES, *LATENCY, *(name.format(f"“{first}”") for name in QUALITY)]
    return markdown_table(header, rows)


def table_of_plans(found: Found, args: argparse.Namespace, controls: dict[str, Path]) -> str:
    """What the plans cut, and how much that was predicted to change and changes."""
    rows: dict[str, list[str]] = {}
    for label, folder in controls.items():
        of = found["plan", (folder,)]
        cuts = ", ".join(f"`{cut}`" for cut in of["cuts"])
        aligned = gathered(found, args, (folder, AS_IS), "aligned")
        share = proportion(aligned, prompts_of(args)).format(1, 100)
        # Several students have the same cuts: the first is the plan's.
        rows.setdefault(
            cuts, [label, cuts, f"{of['alone'].sum():.3f}", f"{float(of['together']):.3f}", share]
        )
    header = ["", "cuts", "each alone, summed", "all together", "prompt accuracy after training, %"]
    return markdown_table(header, list(rows.values()))


def draw(path: Path, found: Found, args: argparse.Namespace) -> None:
    """The same prompts and noise through the models, of the controls the first group."""
    from matplotlib import pyplot as plt

    seed = args.seeds[0]
    rows = {"teacher": TEACHER, "A-SDM": args.asdm}
    for steps, controls in list(by_steps(args.control).items())[:1]:
        rows |= {f"{label}, {steps} steps": folder for label, folder in controls.items()}
    figure, axes = plt.subplots(len(rows), 1, figsize=(12, 0.78 * len(rows) + 0.4))
    for axis, (label, folder) in zip(axes, rows.items()):
        of = found[pictures_of((folder, AS_IS), seed, args)]
        strip = np.pad(of["pictures"].astype(np.float32), ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=1)
        axis.imshow(np.clip(np.concatenate(list(strip), 1), 0, 1))
        axis.set_title(label, fontsize=7, loc="left", pad=2)
        axis.axis("off")
    prompts = held_out_prompts(args.num_images, seed)[:SHOWN]
    for number, prompt in enumerate(prompts):
        axes[-1].text(66 * number, 36, prompt.replace(" left of ", "\nleft of "), fontsize=5.5, va="top")
    figure.tight_layout(h_pad=0.3, rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)


def measured(args: argparse.Namespace, rows: dict[str, Row]) -> Found:
    """Measures what is missing, what is timed by itself."""
    side_by_side, timed = tasks_of(rows, args)
    paths = {(kind, given): kept_at(kind, args.cache_dir, given) for kind, given in [*side_by_side, *timed]}
    calls = [(task[0], paths[task], task[1]) for task in side_by_side]
    kept.side_by_side(run, calls, args.workers, "measurements")
    for task in tqdm(timed, desc="latencies"):
        run(task[0], paths[task], task[1])
    return {task: dict(np.load(path).items()) for task, path in paths.items()}


def main() -> None:
    """Measures what is missing and writes the page."""
    args = parse_args()
    for folder in (args.output_dir, args.cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
    rows = labelled(args)
    found = measured(args, rows)
    count = args.num_images * len(args.seeds)
    parts = [
        f"{args.num_inference_steps} steps of DPM++ 2M at guidance {args.guidance_scale:g}, {count} held-out prompts a row"
        f" ({len(args.seeds)} seeds), 95% intervals over prompts; bold where they exclude 0. Time: one thread, {args.rounds} calls in"
        " turns with the teacher's, median and quartiles of the ratio.",
        table_of_student(found, args, rows),
    ]
    groups = by_steps(args.control)
    for steps, controls in groups.items():
        parts += [f"Trained for {steps} steps:", table_of_controls(found, args, controls)]
    if groups:
        parts += [
            "Relative change of the teacher's output by a plan's cuts, before any training:",
            table_of_plans(found, args, next(iter(groups.values()))),
        ]
    page = "\n\n".join(parts)
    (args.output_dir / "asdm.md").write_text(page + "\n")
    draw(args.output_dir / "asdm.png", found, args)
    print(page)


if __name__ == "__main__":
    main()
