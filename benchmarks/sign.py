"""SIGN projectors against their teacher and against projectors trained with other losses, on the embedded pixel model.

    python benchmarks/sign.py --sign SIGN model_cards/sign-fashion-ddpm --sign "without reg" runs/no-reg/model ...

The first one named is the one that the others are compared with and whose projections are measured. Every measurement is kept in
--cache_dir, so an interrupted benchmark goes on where it stopped. Writes a Markdown page and a picture. Intervals are by
bootstrap over pictures, from the same noise in every row. The Fréchet distance is on the small grader's features and is not FID.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from sign_runs import CORRUPTIONS, SDEDIT_STEPS, SHOWN, SOLVERS, STRENGTHS, kept_at, run
from tqdm.auto import tqdm

from diffusers_ext.data.fashion_scenes import SAMPLE_DIR
from diffusers_ext.evaluation.frechet import FeatureStats, frechet_distance
from diffusers_ext.evaluation.report import (
    bootstrap,
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
)
from diffusers_ext.evaluation.testbed import load_reference

matplotlib.use("Agg")
SIGN_STEPS = (1, 2, 4)
Task = tuple[str, tuple[Any, ...]]
Found = dict[Task, dict[str, np.ndarray]]


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sign", nargs=2, action="append", required=True, metavar=("NAME", "FOLDER"))
    add("--output_dir", type=Path, default=Path("benchmarks/results"))
    add("--cache_dir", type=Path, default=Path("runs/sign_benchmark"))
    add("--num_images", type=int, default=1700, help="of every seed")
    add("--seeds", type=int, nargs="+", default=[11, 12, 13])
    add("--teacher_steps", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--reference_steps", type=int, default=50, help="of the teacher's first solver")
    add("--train_data_dir", default=str(SAMPLE_DIR), help="Fashion-MNIST's files; default: 320 test garments")
    add("--num_projections", type=int, default=500, help="test pictures that are spoilt and projected")
    add("--workers", type=int, default=2, help="processes of one thread each")
    return parser.parse_args()


def tasks_of(args: argparse.Namespace, models: dict[str, Path]) -> list[Task]:
    """Everything to be measured."""
    ours = next(iter(models.values()))
    found: list[Task] = [
        ("figures", (folder, args.train_data_dir, args.num_projections))
        for folder in (None, *models.values())
    ]
    found += [("projections", (ours, args.train_data_dir, args.num_projections))]
    for folder in models.values():
        found += [sampling(folder, "", steps, seed, args) for steps in SIGN_STEPS for seed in args.seeds]
    for solver in SOLVERS:
        found += [sampling(None, solver, n, seed, args) for n in args.teacher_steps for seed in args.seeds]
    solver = next(iter(SOLVERS))
    return found + [sampling(None, solver, args.reference_steps, seed, args) for seed in args.seeds]


def sampling(folder: Path | None, solver: str, steps: int, seed: int, args: argparse.Namespace) -> Task:
    """One model's samples of one seed."""
    return "samples", (folder, solver, steps, seed, args.num_images)


def features(
    found: Found, args: argparse.Namespace, folder: Path | None, solver: str, steps: int
) -> np.ndarray:
    """All seeds' features, (n, d)."""
    parts = [found[sampling(folder, solver, steps, seed, args)]["features"] for seed in args.seeds]
    return np.concatenate(parts)


def table_of_samples(found: Found, args: argparse.Namespace, models: dict[str, Path]) -> str:
    """Fréchet distances of the teacher with every solver and of every projector."""
    reference = load_reference("garments-test")
    name, ours = next(iter(models.items()))
    control = features(found, args, ours, "", 1)
    rows = []

    def add(label: str, folder: Path | None, solver: str, steps: int) -> None:
        mine = features(found, args, folder, solver, steps)
        starts = range(0, len(mine), args.num_images)
        seeds = [FeatureStats.of(mine[low : low + args.num_images]) for low in starts]
        spread = np.std([frechet_distance(s, reference) for s in seeds], ddof=1) if len(seeds) > 1 else 0
        same = folder == ours and steps == 1
        difference = "" if same else paired_frechet_difference(mine, control, reference).format()
        interval = frechet_interval(mine, reference).format()
        rows.append([label, str(steps), interval, f"{spread:.2f}", difference])

    for label, folder in models.items():
        for steps in SIGN_STEPS:
            add(label, folder, "", steps)
    for solver in SOLVERS:
        for steps in args.teacher_steps:
            add(f"teacher, {solver}", None, solver, steps)
    solver = next(iter(SOLVERS))
    add(f"teacher, {solver}", None, solver, args.reference_steps)
    header = ["", "NFE", "Fréchet distance", "std over seeds", f"less {name}'s in one step"]
    return markdown_table(header, rows)


def table_of_figures(found: Found, args: argparse.Namespace, models: dict[str, Path]) -> str:
    """What tells a projector from the identity and from a constant."""
    rows = []
    for label, folder in {"teacher's network, held at the level": None, **models}.items():
        of = found["figures", (folder, args.train_data_dir, args.num_projections)]
        names = ("idempotence", "motion", "variance", "reconstruction")
        rows.append([label, *(f"{float(of[name]):.3f}" for name in names)])
    floor = float(found["figures", (None, args.train_data_dir, args.num_projections)]["floor"])
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
    header = ["spoilt by", "", "strength", "PSNR, dB", "less SIGN's", "Fréchet distance"]
    return markdown_table(header, rows)


def draw(path: Path, found: Found, args: argparse.Namespace, models: dict[str, Path]) -> None:
    """The same noise through every model; pictures spoilt and projected."""
    from matplotlib import pyplot as plt

    ours, seed = next(iter(models.values())), args.seeds[0]
    rows = []
    for label, folder in models.items():
        wanted = SIGN_STEPS if folder == ours else (1,)
        rows += [
            (f"{label}, {n} NFE", found[sampling(folder, "", n, seed, args)]["pictures"]) for n in wanted
        ]
    solver = next(iter(SOLVERS))
    for n in (*args.teacher_steps, args.reference_steps):
        rows.append((f"teacher, {solver}, {n} NFE", found[sampling(None, solver, n, seed, args)]["pictures"]))
    of = found["projections", (ours, args.train_data_dir, args.num_projections)]
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
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measures what is missing and writes the page."""
    args = parse_args()
    for folder in (args.output_dir, args.cache_dir):
        folder.mkdir(parents=True, exist_ok=True)
    models = {name: Path(folder) for name, folder in args.sign}
    paths = {task: kept_at(task[0], args.cache_dir, task[1]) for task in tasks_of(args, models)}
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(run, kind, path, given) for (kind, given), path in paths.items()]
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="measurements"):
            job.result()
    found: Found = {task: dict(np.load(path).items()) for task, path in paths.items()}
    count = args.num_images * len(args.seeds)
    page = "\n\n".join(
        [
            f"{count} pictures a row ({len(args.seeds)} seeds), 95% intervals:",
            table_of_samples(found, args, models),
            f"{args.num_projections} test garments, and as many samples:",
            table_of_figures(found, args, models),
            "The same garments, spoilt; every method at the strength of its highest PSNR:",
            table_of_projections(
                found["projections", (next(iter(models.values())), args.train_data_dir, args.num_projections)]
            ),
        ]
    )
    (args.output_dir / "sign.md").write_text(page + "\n")
    draw(args.output_dir / "sign.png", found, args, models)
    print(page)


if __name__ == "__main__":
    main()
