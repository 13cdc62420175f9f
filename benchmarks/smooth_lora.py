"""Smooth-LoRAs against the base model and a plain LoRA (λ = 0), on the embedded text-to-image model, same noise and prompts.

    python benchmarks/smooth_lora.py --train_data_dir DIR --lora "λ = 0" runs/plain/model \\
        --lora "λ = 1" model_cards/smooth-lora-fashion-scenes --control "λ = 0"

Every measurement is kept in --cache_dir, so an interrupted benchmark goes on where it stopped. Writes a Markdown table
and a picture. Intervals are over prompts, by bootstrap. The Fréchet distance is on the small grader's features and is
not FID.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib
import numpy as np
from smooth_lora_runs import (
    EDITS,
    GUIDANCE,
    INVERSION_STEPS,
    RECONSTRUCTION_GUIDANCES,
    STEPS,
    Counts,
    kept_at,
    run,
)
from tqdm.auto import tqdm

from diffusers_ext.evaluation.report import (
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.evaluation.testbed import load_reference

matplotlib.use("Agg")
KINDS = ("path", "quality", "inversion")
BASE = "base"
Found = dict[str, np.ndarray]


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


def squared_errors(found: Found, guidance: float) -> np.ndarray:
    """(n,) mean squared error of every redrawn picture, pictures in [−1, 1]."""
    return _mse(found[f"redrawn {guidance:g}"], found["real"])


def _mse(pictures: np.ndarray, real: np.ndarray) -> np.ndarray:
    difference = 2 * (pictures.astype(np.float64) - real.astype(np.float64) / 255)
    return (difference**2).mean((1, 2, 3))


def less(ours: np.ndarray, theirs: np.ndarray, digits: int) -> str:
    """Ours less the control's, and the share of the control's that this is."""
    change = paired_difference(ours, theirs)
    return f"{change.format(digits)} ({change.value / theirs.mean():+.0%})"


def smoothness(models: dict[str, Found], control: str) -> str:
    """ISTD, and what tells an even change from none."""
    theirs = models[control]
    rows = []
    for name, ours in models.items():
        relative, other = (found["deviations"] / found["distances"] for found in (ours, theirs))
        same = name == control
        rows.append(
            [
                name,
                f"{ours['deviations'].mean():.3f}",
                "" if same else less(ours["deviations"], theirs["deviations"], 3),
                f"{ours['distances'].mean():.2f}",
                f"{relative.mean():.3f}",
                "" if same else paired_difference(relative, other).format(3),
                f"{ours['endpoints'].mean():.1f}",
            ]
        )
    compared = f"less {control}'s"
    header = [
        "model",
        "ISTD",
        compared,
        "mean adjacent distance",
        "std/mean",
        compared,
        "distance of the ends",
    ]
    return markdown_table(header, rows)


def quality(models: dict[str, Found], control: str) -> str:
    """Alignment and Fréchet distance."""
    reference, theirs = load_reference("scenes-test"), models[control]
    rows = []
    for name, ours in models.items():
        gain = farther = ""
        if name != control:
            gain = paired_difference(ours["aligned"].astype(float), theirs["aligned"].astype(float)).format(
                1, 100
            )
            farther = paired_frechet_difference(ours["features"], theirs["features"], reference).format()
        aligned = proportion(ours["aligned"]).format(1, 100)
        rows.append([name, aligned, gain, frechet_interval(ours["features"], reference).format(), farther])
    compared = f"less {control}'s"
    return markdown_table(["model", "every word right, %", compared, "Fréchet distance", compared], rows)


def reconstruction(models: dict[str, Found], control: str) -> str:
    """Errors of pictures that were inverted and redrawn."""
    rows, header = [], ["model"]
    for guidance in RECONSTRUCTION_GUIDANCES:
        header += [f"guidance {guidance:g}", f"less {control}'s"]
    for name, ours in models.items():
        row = [name]
        for guidance in RECONSTRUCTION_GUIDANCES:
            error, other = (squared_errors(found, guidance) for found in (ours, models[control]))
            row.append(f"{error.mean():.4f}, {-10 * np.log10(error / 4).mean():.1f} dB")
            row.append("" if name == control else less(error, other, 4))
        rows.append(row)
    return markdown_table(header, rows)


def write_tables(models: dict[str, Found], control: str) -> str:
    """The page: smoothness, quality and reconstruction of every model, each less the control's."""
    theirs = models[control]
    floor = _mse(theirs["autoencoder"], theirs["real"]).mean()
    parts = [
        f"{len(theirs['deviations'])} paths of 11 pictures, {STEPS} DDIM steps, guidance {GUIDANCE:g}:",
        smoothness(models, control),
        f"{len(theirs['aligned'])} pictures, the same sampling:",
        quality(models, control),
        f"{len(theirs['real'])} real test scenes inverted in {INVERSION_STEPS} DDIM steps without guidance and redrawn,"
        f" squared error in [−1, 1] and PSNR; the autoencoder alone has {floor:.4f}:",
        reconstruction(models, control),
    ]
    return "\n\n".join(parts) + "\n"


def draw(path: Path, models: dict[str, Found]) -> None:
    """Strips between the same two noises, and the same pictures edited."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2 * len(models) + 1, 1, figsize=(12, 0.72 * (2 * len(models) + 1)))
    for axis, (name, found) in zip(axes, models.items()):
        axis.imshow(np.concatenate(list(found["strip"]), 1))
        axis.set_title(f"{name}: from one noise to another", fontsize=7, loc="left", pad=2)
    edits = ", ".join(f"{a} → {b}" for a, b in EDITS)
    shown = [("real pictures", "to edit"), *((name, "edited") for name in models)]
    for axis, (name, key) in zip(axes[len(models) :], shown):
        source = next(iter(models.values())) if key == "to edit" else models[name]
        axis.imshow(np.concatenate(list(source[key]), 1))
        axis.set_title(f"{name}: {edits if key == 'edited' else 'before'}", fontsize=7, loc="left", pad=2)
    for axis in axes:
        axis.axis("off")
    figure.tight_layout(h_pad=0.3)
    figure.savefig(path, dpi=130)
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
    with ProcessPoolExecutor(args.workers) as pool:
        tasks = [
            pool.submit(run, kind, loras[name], counts, args.train_data_dir, path)
            for (name, kind), path in paths.items()
        ]
        for task in tqdm(as_completed(tasks), total=len(tasks), desc="measurements"):
            task.result()
    models = {name: {k: v for kind in KINDS for k, v in np.load(paths[name, kind]).items()} for name in loras}
    page = write_tables(models, args.control)
    (args.output_dir / "smooth_lora.md").write_text(page)
    draw(args.output_dir / "smooth_lora.png", models)
    print(page)


if __name__ == "__main__":
    main()
