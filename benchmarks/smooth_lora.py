"""Smooth-LoRAs against the base model and a plain LoRA (λ = 0), on the embedded text-to-image model, same noise and prompts.

    python benchmarks/smooth_lora.py --train_data_dir DIR --lora "λ = 0" runs/plain/model \\
        --lora "λ = 1" model_cards/smooth-lora-fashion-scenes --control "λ = 0"

Every measurement is kept in --cache_dir, so an interrupted benchmark goes on where it stopped. Writes a Markdown table
and a image. Intervals are over prompts, by bootstrap. The Fréchet distance is on the small grader's features and is
not FID.
"""

import argparse
from pathlib import Path
from typing import Any

import kept
import matplotlib
import numpy as np
from smooth_lora_report import Found, write_tables
from smooth_lora_runs import STRIPS, Counts, kept_at, run

matplotlib.use("Agg")
KINDS = ("strip", "path", "quality", "inversion")
BASE = "base"


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train_data_dir", required=True, help="Fashion-MNIST's files; its test garments are inverted")
    add("--lora", nargs=2, action="append", default=[], metavar=("NAME", "FOLDER"))
    add("--control", required=True, help="name of the row that the others are compared with")
    add("--output_dir", type=Path, default=Path("benchmarks/results"))
    add("--cache_dir", type=Path, default=Path("runs/smooth_lora"))
    add("--num_paths", type=int, default=200)
    add("--num_images", type=int, default=1000)
    add("--num_inversions", type=int, default=200)
    add("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    if args.control not in [BASE, *(name for name, _ in args.lora)]:
        parser.error(f"--control {args.control} is none of the rows")
    return args


def draw(path: Path, models: dict[str, Found]) -> None:
    """Strips between the same noises with the size of every step, and `EDITS` of the same images."""
    from matplotlib import pyplot as plt

    names = list(models)
    heights = [0.42] * len(names) + [1.7, 0.5]
    figure = plt.figure(figsize=(13, sum(heights) + 0.5), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=[sum(heights[:-2]), *heights[-2:]])

    def show(axis: Any, picture: np.ndarray, title: str) -> None:
        axis.imshow(np.clip(picture.astype(np.float32), 0, 1))
        axis.set_title(title, fontsize=7, loc="left", pad=2)
        axis.axis("off")

    strips, steps, edits = (
        part.subplots(rows, columns, squeeze=False)
        for part, rows, columns in zip(parts, (len(names), 1, 1), (len(STRIPS), len(STRIPS), len(names) + 1))
    )
    for column, (prompt, _) in enumerate(STRIPS):
        for row, (name, found) in enumerate(models.items()):
            show(strips[row, column], np.concatenate(list(found[f"strip {column}"]), 1), f"{name}: {prompt}")
            steps[0, column].plot(found[f"changes {column}"], marker=".", label=name)
        steps[0, column].set_xlabel("step along the path", fontsize=7)
        steps[0, column].set_ylabel("distance to the next", fontsize=7)
        steps[0, column].set_ylim(bottom=0)
        steps[0, column].tick_params(labelsize=7)
        steps[0, column].legend(fontsize=6, ncols=3, loc="upper left")
    show(edits[0, 0], np.concatenate(list(models[names[0]]["to edit"]), 1), "real images")
    for axis, (name, found) in zip(edits[0, 1:], models.items()):
        show(axis, np.concatenate(list(found["edited"]), 1), f"edited, {name}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measures what is missing and writes the page."""
    args = parse_args()
    for folder in (args.output_dir, args.cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
    counts = Counts(args.num_paths, args.num_images, args.num_inversions)
    loras: dict[str, Path | None] = {BASE: None, **{name: Path(folder) for name, folder in args.lora}}
    paths = {
        (name, kind): kept_at(kind, lora, counts, args.cache_dir)
        for kind in KINDS
        for name, lora in loras.items()
    }
    calls = [(kind, loras[name], counts, args.train_data_dir, path) for (name, kind), path in paths.items()]
    kept.side_by_side(run, calls, args.workers, "measurements")
    models = {name: {k: v for kind in KINDS for k, v in np.load(paths[name, kind]).items()} for name in loras}
    page = write_tables(models, args.control)
    (args.output_dir / "smooth_lora.md").write_text(page)
    draw(args.output_dir / "smooth_lora.png", models)
    print(page)


if __name__ == "__main__":
    main()
