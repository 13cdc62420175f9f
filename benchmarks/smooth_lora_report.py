"""The tables of benchmarks/smooth_lora.py."""

import numpy as np
from smooth_lora_runs import GUIDANCE, INVERSION_STEPS, PICTURES_SEED, RECONSTRUCTION_GUIDANCES, STEPS

from diffusers_ext.metrics.comparison import (
    bootstrap,
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance
from diffusers_ext.metrics.ssim import ssim
from diffusers_ext.testbed.runs import held_out_prompts, load_reference

Found = dict[str, np.ndarray]
SEED = ", seed "


def squared_errors(found: Found, guidance: float) -> np.ndarray:
    """(n,) mean squared error of every redrawn image, images in [−1, 1]."""
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
    prompts = held_out_prompts(len(theirs["aligned"]), PICTURES_SEED)
    rows = []
    for name, ours in models.items():
        gain = farther = ""
        if name != control:
            gain = paired_difference(ours["aligned"], theirs["aligned"], prompts).format(1, 100)
            change = paired_frechet_difference(ours["features"], theirs["features"], reference, prompts)
            farther = change.format()
        aligned = proportion(ours["aligned"], prompts).format(1, 100)
        distance = frechet_interval(ours["features"], reference, prompts).format()
        rows.append([name, aligned, gain, distance, farther])
    compared = f"less {control}'s"
    return markdown_table(["model", "prompt accuracy, %", compared, "Fréchet distance", compared], rows)


def reconstruction(models: dict[str, Found], control: str) -> str:
    """Errors of images that were inverted and redrawn."""
    floor = _mse(models[control]["autoencoder"], models[control]["real"])
    rows = []
    for guidance in RECONSTRUCTION_GUIDANCES:
        other = squared_errors(models[control], guidance)
        for name, ours in models.items():
            error = squared_errors(ours, guidance)
            likeness = ssim(ours[f"redrawn {guidance:g}"], ours["real"] / 255)
            same = name == control
            rows.append(
                [
                    f"{guidance:g}",
                    name,
                    f"{error.mean():.4f}",
                    "" if same else less(error, other, 4),
                    "" if same else _share(error - floor, other - floor),
                    f"{-10 * np.log10(error / 4).mean():.1f}",
                    f"{likeness.mean():.3f}",
                ]
            )
    compared = f"less {control}'s"
    header = [
        "guidance",
        "model",
        "squared error",
        compared,
        "above the autoencoder's, less",
        "PSNR, dB",
        "SSIM",
    ]
    return markdown_table(header, rows)


def _share(ours: np.ndarray, theirs: np.ndarray) -> str:
    """The change of a mean as a share of the control's, by bootstrap over the pairs."""
    return (
        bootstrap(lambda rows: float(ours[rows].mean() / theirs[rows].mean() - 1), len(ours)).format(0, 100)
        + "%"
    )


def training_seeds(models: dict[str, Found]) -> str:
    """Of rows "NAME, seed N": every seed's figures, and the mean and spread of what NAME does to the first NAME's."""
    reference = load_reference("scenes-test")

    def figures(found: Found) -> list[float]:
        deviations, distances = found["deviations"], found["distances"]
        return [
            float(deviations.mean()),
            float((deviations / distances).mean()),
            100 * float(found["aligned"].mean()),
            frechet_distance(FeatureStats.of(found["features"]), reference),
            *(float(squared_errors(found, g).mean()) for g in RECONSTRUCTION_GUIDANCES),
        ]

    digits = (3, 3, 1, 2, *[4] * len(RECONSTRUCTION_GUIDANCES))
    values = {name: figures(found) for name, found in models.items() if SEED in name}
    rows = [[name, *(f"{x:.{d}f}" for x, d in zip(row, digits))] for name, row in values.items()]
    kinds = list(dict.fromkeys(name.split(SEED)[0] for name in values))
    first = kinds[0]
    for kind in kinds[1:]:
        seeds = [name.split(SEED)[1] for name in values if name.split(SEED)[0] == kind]
        changes = np.array(
            [np.subtract(values[f"{kind}{SEED}{s}"], values[f"{first}{SEED}{s}"]) for s in seeds]
        )
        cells = [f"{m:.{d}f} ± {s:.{d}f}" for m, s, d in zip(changes.mean(0), changes.std(0, ddof=1), digits)]
        rows.append([f"{kind} less {first}, mean ± std", *cells])
    scales = [f"squared error, guidance {g:g}" for g in RECONSTRUCTION_GUIDANCES]
    header = ["model", "ISTD", "std/mean", "prompt accuracy, %", "Fréchet distance", *scales]
    return markdown_table(header, rows)


def write_tables(models: dict[str, Found], control: str) -> str:
    """The page: smoothness, quality and reconstruction of every model, each less the control's."""
    theirs = models[control]
    floor = _mse(theirs["autoencoder"], theirs["real"]).mean()
    parts = [
        f"{len(theirs['deviations'])} paths of 11 images, {STEPS} DDIM steps, guidance {GUIDANCE:g}:",
        smoothness(models, control),
        f"{len(theirs['aligned'])} images, the same sampling:",
        quality(models, control),
        f"{len(theirs['real'])} real test scenes inverted in {INVERSION_STEPS} DDIM steps without guidance and redrawn,"
        f" squared error in [−1, 1] and PSNR; the autoencoder alone has {floor:.4f}:",
        reconstruction(models, control),
    ]
    if sum(SEED in name for name in models) > 1:
        parts += ["Training seeds:", training_seeds(models)]
    return "\n\n".join(parts) + "\n"
