"""SIGN projectors against their teacher and against projectors trained with other losses, on the embedded pixel model.

    python benchmarks/sign.py --control default runs/default/model --control "without reg" runs/no-reg/model ...

The projector of --sign is compared with the teacher, and its projections are measured; the controls, trained as long as each
other, are compared with the first of them. Every measurement is kept in
--cache_dir, so an interrupted benchmark goes on where it stopped. Writes a Markdown page and a image. Intervals are
over images, from the same noise in every row. The Fréchet distances are FD∞ on the small
grader's features and are not FID.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import kept
import matplotlib
import numpy as np
from sign_runs import CORRUPTIONS, SDEDIT_STEPS, SHOWN, SOLVERS, STRENGTHS, kept_at, run

from diffusers_ext.metrics.comparison import (
    bootstrap,
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
)
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.testbed.fashion_scenes import SAMPLE_DIR
from diffusers_ext.testbed.runs import load_reference

matplotlib.use("Agg")
SIGN_STEPS = (1, 2, 4)
FIGURES = ("idempotence", "motion", "variance", "reconstruction")
Task = tuple[str, tuple[Any, ...]]
Found = dict[Task, dict[str, np.ndarray]]
Row = tuple[Path | None, str, int]  # a projector's folder, the teacher's solver, steps


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sign", type=Path, default=Path("model_cards/sign-fashion-ddpm"))
    add("--control", nargs=2, action="append", default=[], metavar=("NAME", "FOLDER"))
    add("--output_dir", type=Path, default=Path("benchmarks/results"))
    add("--cache_dir", type=Path, default=Path("runs/sign_benchmark"))
    add("--num_images", type=int, default=1700, help="of every seed")
    add("--seeds", type=int, nargs="+", default=[21, 22, 23])
    add("--solvers", nargs="+", default=["DPM++ 2M"], choices=list(SOLVERS), help="of the teacher")
    add("--teacher_steps", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--reference_steps", type=int, default=50, help="of the teacher's first solver")
    add("--control_steps", type=int, nargs="+", default=[1])
    add("--train_data_dir", default=str(SAMPLE_DIR), help="Fashion-MNIST's files; default: 320 test garments")
    add("--num_projections", type=int, default=500, help="test images that are corrupted and projected")
    add("--workers", type=int, default=2, help="processes of one thread each")
    return parser.parse_args()


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """Everything to be measured."""
    folders = [args.sign, *args.controls.values()]
    found: list[Task] = [figures_of(folder, args) for folder in (None, *folders)]
    found += [("projections", (args.sign, args.train_data_dir, args.num_projections))]
    return found + [sampling(row, seed, args) for _, row in sampled(args) for seed in args.seeds]


def figures_of(folder: Path | None, args: argparse.Namespace) -> Task:
    """One network's own figures."""
    return "figures", (folder, args.train_data_dir, args.num_projections)


def sampled(args: argparse.Namespace) -> list[tuple[str, Row]]:
    """Label and row of every set of samples."""
    first = args.solvers[0]
    rows: list[tuple[str, Row]] = [("SIGN", (args.sign, "", n)) for n in SIGN_STEPS]
    rows += [(f"teacher, {solver}", (None, solver, n)) for solver in args.solvers for n in args.teacher_steps]
    rows += [(f"teacher, {first}", (None, first, args.reference_steps))]
    rows += [("SIGN's source without noise", (args.sign, first, 0))]
    rows += [(f"teacher, {first}, from SIGN's source", (args.sign, first, n)) for n in args.teacher_steps]
    for label, folder in args.controls.items():
        rows += [(label, (folder, "", n)) for n in args.control_steps]
    return rows


def sampling(row: Row, seed: int, args: argparse.Namespace) -> Task:
    """One model's samples of one seed."""
    return "samples", (*row, seed, args.num_images)


def features(found: Found, args: argparse.Namespace, row: Row) -> np.ndarray:
    """All seeds' features, (n, d)."""
    return np.concatenate([found[sampling(row, seed, args)]["features"] for seed in args.seeds])


def frechet_cells(found: Found, args: argparse.Namespace, row: Row, control: Row) -> list[str]:
    """The distance, its spread over seeds, and the difference to another row."""
    reference = load_reference("garments-test")
    mine = features(found, args, row)
    starts = range(0, len(mine), args.num_images)
    seeds = [FeatureStats.of(mine[low : low + args.num_images]) for low in starts]
    spread = np.std([frechet_distance(s, reference) for s in seeds], ddof=1) if len(seeds) > 1 else 0
    less = ""
    if row != control:
        less = paired_frechet_difference(mine, features(found, args, control), reference).format()
    return [frechet_interval(mine, reference).format(), f"{spread:.2f}", less]


def table_of_samples(found: Found, args: argparse.Namespace) -> str:
    """Fréchet distances of the projector, and of the teacher from noise and from the projector's source."""
    rows = []
    for label, row in sampled(args):
        if label not in args.controls:
            rows.append([label, str(row[-1]), *frechet_cells(found, args, row, (args.sign, "", 1))])
    header = ["", "NFE", "Fréchet distance", "std over seeds", "less SIGN's in one step"]
    return markdown_table(header, rows)


def table_of_controls(found: Found, args: argparse.Namespace) -> str:
    """Fréchet distances and figures of the projectors that were trained equally long."""
    rows, first = [], next(iter(args.controls.values()))
    for label, folder in args.controls.items():
        of = found[figures_of(folder, args)]
        made = json.loads((folder / "training.json").read_text())
        row = [label, str(made["steps"]), str(made["seconds"])]
        for n in args.control_steps:
            cells = frechet_cells(found, args, (folder, "", n), (first, "", n))
            row += [cells[0], cells[2]]
        rows.append([*row, *(f"{float(of[name]):.3f}" for name in FIGURES[:3])])
    header = ["", "steps", "seconds"]
    for n in args.control_steps:
        header += [f"Fréchet distance, {n} NFE", f"less {next(iter(args.controls))}'s"]
    return markdown_table([*header, "idempotence", "motion", "variance"], rows)


def table_of_figures(found: Found, args: argparse.Namespace) -> str:
    """What tells a projector from the identity and from a constant."""
    rows = []
    for label, folder in (("teacher's network, held at the level", None), ("SIGN", args.sign)):
        of = found[figures_of(folder, args)]
        rows.append([label, *(f"{float(of[name]):.3f}" for name in FIGURES)])
    floor = float(found[figures_of(None, args)]["floor"])
    header = [
        "", "‖f(f(z)) − f(z)‖/‖f(z)‖", "‖f(z) − z‖/‖z‖", "variance, share of the data's", "mean abs. f(x) − x",
    ]  # fmt: skip
    return markdown_table(header, rows) + f"\n\nThe teacher's one-call denoising at σ ≈ 0.03 has {floor:.3f}."


def best_strength(of: dict[str, np.ndarray], corruption: str, method: str) -> str:
    """The strength at which a method's PSNR is highest."""
    strengths = STRENGTHS if method.startswith("SDEdit") else (0.0, *STRENGTHS)
    return max(
        (f"{s:g}" for s in strengths), key=lambda s: float(of[f"{corruption}|{method}|{s}|psnr"].mean())
    )


def table_of_projections(of: dict[str, np.ndarray]) -> str:
    """PSNR and Fréchet distance before and after, every method at its best strength."""
    reference = load_reference("garments-test")
    rows = []
    for corruption in CORRUPTIONS:
        sign = f"{corruption}|SIGN|{best_strength(of, corruption, 'SIGN')}"
        for method in ("before", "SIGN", *(f"SDEdit {steps}" for steps in SDEDIT_STEPS)):
            strength = "0" if method == "before" else best_strength(of, corruption, method)
            key = f"{corruption}|{method}|{strength}"
            psnr = of[f"{key}|psnr"]
            mean = bootstrap(lambda i, x=psnr: float(x[i].mean()), len(psnr)).format(1)
            less = "" if method == "SIGN" else paired_difference(psnr, of[f"{sign}|psnr"]).format(1)
            label = f"teacher's {method[:6]}, {method[7:]} NFE" if method.startswith("SDEdit") else method
            distance = frechet_interval(of[f"{key}|features"], reference).format()
            rows.append([corruption, label, "" if method == "before" else strength, mean, less, distance])
    header = ["corrupted by", "", "strength", "PSNR, dB", "less SIGN's", "Fréchet distance"]
    return markdown_table(header, rows)


def draw(path: Path, found: Found, args: argparse.Namespace) -> None:
    """The same noise through every model; images corrupted and projected."""
    from matplotlib import pyplot as plt

    seed, shown = args.seeds[0], set(args.controls)
    rows = []
    for label, row in sampled(args):
        if label not in shown or row[-1] == args.control_steps[0]:
            rows.append((f"{label}, {row[-1]} NFE", found[sampling(row, seed, args)]["pictures"]))
    of = found["projections", (args.sign, args.train_data_dir, args.num_projections)]
    for corruption in CORRUPTIONS:
        rows.append((corruption, of[f"{corruption}|before|0|shown"]))
        strength = best_strength(of, corruption, "SIGN")
        rows.append((f"projected, strength {strength}", of[f"{corruption}|SIGN|{strength}|shown"]))
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.75 * len(rows)))
    for axis, (title, pictures) in zip(axes, rows):
        strip = pictures.reshape(-1, 32, 32)[:SHOWN].astype(np.float32)
        axis.imshow(np.concatenate(list(strip), 1), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=7, loc="left", pad=2)
        axis.axis("off")
    figure.tight_layout(h_pad=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Measures what is missing and writes the page."""
    args = parse_args()
    for folder in (args.output_dir, args.cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
    args.controls = {name: Path(folder) for name, folder in args.control}
    paths = {task: kept_at(task[0], args.cache_dir, task[1]) for task in tasks_of(args)}
    calls = [(kind, path, given) for (kind, given), path in paths.items()]
    kept.side_by_side(run, calls, args.workers, "measurements")
    found: Found = {task: dict(np.load(path).items()) for task, path in paths.items()}
    count = args.num_images * len(args.seeds)
    projections = found["projections", (args.sign, args.train_data_dir, args.num_projections)]
    parts = [
        f"{count} images a row ({len(args.seeds)} seeds), 95% intervals:",
        table_of_samples(found, args),
        f"{args.num_projections} test garments, and as many samples:",
        table_of_figures(found, args),
        "The same garments, corrupted; every method at the strength of its highest PSNR:",
        table_of_projections(projections),
    ]
    if args.controls:
        parts += [f"Trained equally long, {count} images a row:", table_of_controls(found, args)]
    page = "\n\n".join(parts)
    (args.output_dir / "sign.md").write_text(page + "\n")
    draw(args.output_dir / "sign.png", found, args)
    print(page)


if __name__ == "__main__":
    main()
