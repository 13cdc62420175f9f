"""Teleportation against its controls on the embedded models, at the same seeds.

    python benchmarks/teleport.py ddpm   --output_dir benchmarks/results
    python benchmarks/teleport.py scenes --output_dir benchmarks/results

Every run is kept in `--cache_dir`, so an interrupted benchmark goes on where it stopped. Writes a Markdown
table and a plot per model. Fréchet distances are on the small grader's features and are not FID.
"""

import argparse
import dataclasses
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import kept
import matplotlib
import numpy as np
import torch
from diffusers import DiffusionPipeline
from pixel_pipeline import PixelPipeline
from tqdm.auto import tqdm

import diffusers_ext as dx
from diffusers_ext.metrics.comparison import (
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import Run, held_out_prompts, load_reference, run_garments, run_scenes

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}


# Colour and marker of each variant.
STYLES = {
    "plain": ("k", "o"),
    "teleport": ("tab:red", "s"),
    "auto": ("tab:purple", "D"),
    "unconditional": ("tab:brown", "p"),
    "implied mean": ("tab:blue", "^"),
    "first call": ("tab:green", "v"),
    "isotropic": ("tab:orange", "x"),
    "noise": ("tab:gray", "+"),
}


@dataclass(frozen=True)
class Point:
    """One cell of the benchmark: a solver, its steps, and what replaces the first of them.

    `variant` is "plain" (the solver at `steps`), "teleport" (the map; with prompts: with the mean that the prompt
    map gives, along the guided flow), "auto" (the same, as far as `skip="auto"` goes), "unconditional" (the
    statistics of all samples), "implied mean" (the prompt's mean from one model call, along the guided flow), "first
    call" (the mean of the run's first guided call), "isotropic" (same mean and total variance, no directions) or
    "noise" (plain noise at σ_skip).
    """

    solver: str
    steps: int
    variant: str = "plain"
    skip: int = 0
    guidance: float = 1.0


def main() -> None:
    """Runs what is missing in the cache and writes table and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=["ddpm", "scenes"])
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache_dir", type=Path, default=Path("runs/teleport"))
    parser.add_argument("--num_images", type=int, default=500, help="per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--skips", type=float, nargs="+", default=None, help="ddpm: fractions of the steps")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.cache_dir.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    points = ddpm_points(args) if args.model == "ddpm" else scene_points(args)
    bench = Bench(args)
    runs = {point: bench.run(point) for point in tqdm(points, desc=args.model)}
    report(args, runs)


def ddpm_points(args: argparse.Namespace) -> list[Point]:
    points = []
    for solver in args.solvers:
        # Heun calls the model twice a step.
        steps = 10 if solver == "Heun" else 20
        skips = sorted({round(s * steps) for s in args.skips or (0.2, 0.25, 0.3)})
        points += [Point(solver, steps), Point(solver, steps, "auto")]
        for skip in skips:
            points += [Point(solver, steps - skip), Point(solver, steps, "teleport", skip)]
        points += [Point(solver, steps, v, skips[-1]) for v in ("isotropic", "noise")]
    return list(dict.fromkeys(points))


def scene_points(args: argparse.Namespace) -> list[Point]:
    w = args.guidance_scale
    points = []
    for steps, skips in ((6, (1, 2)), (10, (2, 3)), (20, (3, 5)), (30, (5,))):
        for solver in args.solvers:
            points += [Point(solver, steps, guidance=w), Point(solver, steps, "auto", guidance=w)]
            for skip in skips:
                points += [Point(solver, steps - skip, guidance=w), Point(solver, steps, "teleport", skip, w)]
            if solver == "DPM++ 2M" and steps < 20:
                # More guidance also raises alignment: the plain solver may have it too.
                points += [Point(solver, steps - k, guidance=g) for k in skips for g in (w + 0.5, w + 1)]
                points += [Point(solver, steps, "unconditional", k, w) for k in skips[:1]]
            if solver == "DPM++ 2M" and steps == 6:
                for skip in skips:
                    points += [
                        Point(solver, steps, "implied mean", skip, w),
                        Point(solver, steps, "first call", skip + 1, w),
                    ]
    return list(dict.fromkeys(points))


class Bench:
    """The model of a benchmark, its statistics, and the cache of its runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder = card_dir(f"fashion-{args.model}")
        self.pipe = DiffusionPipeline.from_pretrained(self.folder, dtype=torch.float32)
        if args.model == "ddpm":
            self.pipe = PixelPipeline(self.pipe.unet, self.pipe.scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        self.base = self.pipe.scheduler
        self.stats = dx.GaussianStats.from_pretrained(self.folder / "gaussian")
        self.within = dataclasses.replace(self.stats, prompt_map=None)
        self.prompt_mean_cache: dict[str, torch.Tensor] = {}
        # Runs of other weights or statistics must not be taken for these.
        files = [
            self.folder / "unet/diffusion_pytorch_model.safetensors",
            *sorted((self.folder / "gaussian").glob("*.safetensors")),
        ]
        self.fingerprint = kept.digest(files)

    def run(self, point: Point) -> list[Run]:
        """One run per seed."""
        return [self._cached(point, seed) for seed in self.args.seeds]

    def _cached(self, point: Point, seed: int) -> Run:
        identity = {**asdict(point), "seed": seed, "n": self.args.num_images, "weights": self.fingerprint}
        name = kept.name_of(json.dumps(identity, sort_keys=True), 16)
        path = self.args.cache_dir / f"{name}.npz"
        if not path.is_file():
            run = self._sample(point, seed)
            arrays: dict[str, Any] = {f"grade_{k}": v for k, v in run.grades.items()}
            arrays |= {"pictures": np.rint(run.images[:64] * 255).astype(np.uint8)}
            arrays |= {"features": run.features, "calls": run.calls, "seconds": run.seconds}
            kept.write(path, arrays)
        saved = np.load(path)
        grades = {k.removeprefix("grade_"): saved[k] for k in saved.files if k.startswith("grade_")}
        return Run(
            saved["pictures"], saved["features"], grades, float(saved["calls"]), float(saved["seconds"])
        )

    def _sample(self, point: Point, seed: int) -> Run:
        name, options = SOLVERS[point.solver]
        self.pipe.scheduler = getattr(diffusers, name).from_config(self.base.config, **options)
        stats = self._stats(point)
        if stats is not None:
            mean_from = "first_call" if point.variant == "first call" else "stats"
            skip = "auto" if point.variant == "auto" else (point.skip + 0.5) / point.steps
            dx.apply_teleport(self.pipe, stats, skip=skip, mean_from=mean_from)
        try:
            if self.args.model == "ddpm":
                return run_garments(
                    self.pipe, self.args.num_images, seed=seed, num_inference_steps=point.steps
                )
            return self._sample_scenes(point, seed)
        finally:
            dx.remove_teleport(self.pipe)

    def _stats(self, point: Point) -> dx.GaussianStats | None:
        if point.variant == "plain":
            return None
        if point.variant in ("implied mean", "first call"):
            return self.within
        if point.variant == "isotropic":
            return self.stats.isotropic()
        if point.variant == "noise":
            return _white(self.stats)
        return self.stats.unconditional if point.variant == "unconditional" else self.stats

    def _sample_scenes(self, point: Point, seed: int) -> Run:
        prompts = held_out_prompts(self.args.num_images, seed)
        kwargs = {"num_inference_steps": point.steps, "guidance_scale": point.guidance}
        if point.variant != "implied mean":
            return run_scenes(self.pipe, prompts, seed=seed, **kwargs)
        teleport, size, parts = self.pipe.scheduler, 64, []
        for low in range(0, len(prompts), size):
            chunk = prompts[low : low + size]
            dx.remove_teleport(self.pipe)
            means = self._prompt_means(chunk)
            self.pipe.scheduler = teleport
            teleport.set_mean(means, point.guidance)
            part = run_scenes(self.pipe, chunk, seed=seed, offset=low, **kwargs)
            parts.append(part)
        # The mean's own call is without guidance, so it costs half a guided step.
        extra = 1.0 if point.guidance <= 1 else 0.5
        return Run.join(parts, extra_calls=extra)

    def _prompt_means(self, prompts: list[str]) -> torch.Tensor:
        missing = sorted(set(prompts) - set(self.prompt_mean_cache))
        if missing:
            means = dx.prompt_means(self.pipe, self.within, missing, height=32, width=64)
            self.prompt_mean_cache |= dict(zip(missing, means))
        return torch.stack([self.prompt_mean_cache[p] for p in prompts])


def _white(stats: dx.GaussianStats) -> dx.GaussianStats:
    """Statistics whose map only rescales the noise: nothing of the data but pure noise at the new level."""
    r = torch.zeros(stats.mean.numel(), 0)
    return dx.GaussianStats(torch.zeros_like(stats.mean), r, torch.zeros(0), 0.0, stats.num_samples)


def report(args: argparse.Namespace, runs: dict[Point, list[Run]]) -> None:
    """Writes `<model>.md` and `<model>.png`."""
    reference = load_reference("garments-test" if args.model == "ddpm" else "scenes-test")
    kind = "garments" if args.model == "ddpm" else "scenes"
    floor = frechet_distance(load_reference(f"{kind}-train"), reference)
    features = {p: np.concatenate([run.features for run in r]) for p, r in runs.items()}
    calls = {p: float(np.mean([run.calls for run in r])) for p, r in runs.items()}
    prompts = [p for seed in args.seeds for p in held_out_prompts(args.num_images, seed)]
    groups = prompts if args.model == "scenes" else None
    distances = {p: frechet_interval(f, reference, groups) for p, f in features.items()}
    header = [
        "solver",
        "steps",
        "variant",
        "NFE",
        "Fréchet distance",
        "less the solver's at no fewer calls",
    ]
    header += ["prompt accuracy, %", "less the solver's at no fewer calls"] if args.model == "scenes" else []
    rows = []
    for p in runs:
        variant = p.variant if p.guidance in (1.0, args.guidance_scale) else f"plain, guidance {p.guidance:g}"
        row = [p.solver, str(p.steps), variant, f"{calls[p]:.3g}", distances[p].format(2)]
        control = _respaced(p, runs, calls)
        row.append(_difference(features[p], features[control], reference, groups) if control else "")
        if args.model == "scenes":
            right = _aligned(runs[p])
            row.append(proportion(right, groups).format(1, 100))
            row.append(
                paired_difference(right, _aligned(runs[control]), groups).format(1, 100) if control else ""
            )
        rows.append(row)
    n = args.num_images * len(args.seeds)
    note = (
        f"\n\n{n} images a row ({len(args.seeds)} seeds), the same noise"
        f"{' and prompts' if args.model == 'scenes' else ''} in every row; 95% intervals{' over prompts' if groups else ''};"
        f" floor (real train against real test images) {floor:.2f}."
    )
    table = markdown_table(header, rows) + note + "\n"
    if args.model == "scenes":
        table += "\n" + guidance_table(runs, calls, features, reference, prompts) + "\n"
    (args.output_dir / f"{args.model}.md").write_text(table)
    print(table)
    plot(args, runs, calls, distances, floor, groups)


def guidance_table(
    runs: dict[Point, list[Run]],
    calls: dict[Point, float],
    features: dict[Point, np.ndarray],
    reference: FeatureStats,
    prompts: list[str],
) -> str:
    """Teleportation against the plain solver at equal calls and the best of three guidance scales for it."""
    header = ["steps", "NFE", "plain's best guidance", "prompt accuracy, less plain's, %"]
    rows = []
    for p in runs:
        if p.variant == "teleport" and p.solver == "DPM++ 2M" and p.steps < 20:
            best = _most_aligned(p, runs, calls)
            right = paired_difference(_aligned(runs[p]), _aligned(runs[best]), prompts)
            distance = _difference(features[p], features[best], reference, prompts)
            rows.append(
                [str(p.steps), f"{calls[p]:.3g}", f"{best.guidance:g}", right.format(1, 100), distance]
            )
    return markdown_table([*header, "Fréchet distance, less plain's"], rows)


def _aligned(runs: list[Run]) -> np.ndarray:
    return np.concatenate([run.grades["aligned"] for run in runs])


def _respaced(point: Point, runs: dict[Point, list[Run]], calls: dict[Point, float]) -> Point | None:
    """The plain solver that spends the same calls, or the next it can spend; half a guided step rounds up."""
    plain = [
        p
        for p in runs
        if (p.solver, p.variant, p.guidance) == (point.solver, "plain", point.guidance)
        and calls[p] >= calls[point] - 0.01
    ]
    control = min(plain, key=calls.__getitem__, default=None)
    return None if point.variant == "plain" or control is None else control


def _most_aligned(point: Point, runs: dict[Point, list[Run]], calls: dict[Point, float]) -> Point:
    """The plain solver at the same calls and the guidance that puts most words right."""
    needed = math.ceil(calls[point] - 0.01)
    plain = [p for p in runs if (p.solver, p.variant, calls[p]) == (point.solver, "plain", needed)]
    return max(plain, key=lambda p: _aligned(runs[p]).mean())


def _difference(
    ours: np.ndarray, control: np.ndarray, reference: FeatureStats, groups: list[str] | None
) -> str:
    return paired_frechet_difference(ours, control, reference, groups).marked()


def plot(
    args: argparse.Namespace,
    runs: dict[Point, list[Run]],
    calls: dict[Point, float],
    distances: dict[Point, Any],
    floor: float,
    groups: list[str] | None,
) -> None:
    """One column per solver, one row per measure against the calls, one colour per variant."""
    solvers = list(dict.fromkeys(p.solver for p in runs))
    measures: list[tuple[str, dict[Point, Any]]] = [("small-feature Fréchet distance", distances)]
    if args.model == "scenes":
        measures.insert(0, ("prompt accuracy", {p: proportion(_aligned(r), groups) for p, r in runs.items()}))
    figure, axes = plt.subplots(
        len(measures),
        len(solvers),
        figsize=(4 * len(solvers), 3.4 * len(measures)),
        sharey="row",
        squeeze=False,
    )
    for row, (label, values) in zip(axes, measures):
        for axis, solver in zip(row, solvers):
            for variant, (color, marker) in STYLES.items():
                chosen = [p for p in runs if (p.solver, p.variant) == (solver, variant)]
                chosen = [p for p in chosen if p.guidance in (1.0, args.guidance_scale)]
                if not chosen:
                    continue
                chosen.sort(key=calls.__getitem__)
                y = [values[p].value for p in chosen]
                error = [
                    [values[p].value - values[p].low for p in chosen],
                    [values[p].high - values[p].value for p in chosen],
                ]
                line = "-" if variant == "plain" else "none"
                axis.errorbar(
                    [calls[p] for p in chosen],
                    y,
                    error,
                    color=color,
                    marker=marker,
                    linestyle=line,
                    label=variant,
                    capsize=2,
                    alpha=0.8,
                )
            if values is distances:
                axis.axhline(floor, color="0.7", linestyle=":", label="floor")
                axis.set(yscale="log", xlabel="NFE")
            axis.set_title(solver)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(label)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.output_dir / f"{args.model}.png", dpi=110)


if __name__ == "__main__":
    main()
