"""A SIGN projector against its teacher and against projectors trained with other losses, on the embedded pixel model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.nn import functional as F

import diffusers_ext as dx
from diffusers_ext.core.schedules import levels_at
from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.sign.figures import projector_figures
from diffusers_ext.sign.projector import Projector, denoise, falling_timesteps, nearest_timestep
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import run_garments

from .framework.bench import Bench
from .framework.cells import Arrays, Cell
from .framework.plots import draw
from .framework.samples import CARDS, Samples, graded
from .framework.statistics import Statistics
from .framework.tables import Measure, Row, comparison, quality
from .framework.trainings import Training
from .pixel_pipeline import PixelPipeline

WRITES = ("sign.md", "sign.png")
TEACHER, SIGN = card_dir("fashion-ddpm"), card_dir("sign-fashion-ddpm")
# Larger ones leave the processor's cache.
BATCH = 64
SOLVERS: dict[str, Any] = {
    "DPM++ 2M": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "DDIM": DDIMScheduler,
}
# Of the noise level that samples start from; what is added before projecting.
STRENGTHS = (0.05, 0.1, 0.2, 0.4)
SDEDIT_STEPS = (1, 10)
FIGURES = ("idempotence", "motion", "variance", "reconstruction")
PLAIN = "rec + idem + reg + flow"
# Name: the arguments that differ from the first's.
CONTROLS: dict[str, dict[str, float]] = {
    PLAIN: {},
    "without idem": {"idem_weight": 0},
    "without flow": {"flow_weight": 0},
    "with scores (dmd)": {"dmd_weight": 1},
    "DMD: scores alone": {
        "dmd_weight": 1,
        "rec_weight": 0,
        "idem_weight": 0,
        "reg_weight": 0,
        "flow_weight": 0,
    },
}


@dataclass(frozen=True)
class Settings:
    """How large the benchmark is."""

    images: int = 300
    seeds: tuple[int, ...] = (21, 22, 23)
    solvers: tuple[str, ...] = ("DPM++ 2M", "UniPC")
    sign_steps: tuple[int, ...] = (1, 2, 4)
    teacher_steps: tuple[int, ...] = (1, 2, 4, 8)
    reference_steps: int = 50
    projections: int = 200
    corruptions: tuple[str, ...] = ("noise 0.2", "noise 0.5", "noise 1", "blur", "mask", "salt and pepper")
    controls: tuple[str, ...] = tuple(CONTROLS)
    train_steps: int = 112
    pairs: int = 6144
    batch_size: int = 64
    training: Mapping[str, int] = field(default_factory=dict)


QUICK = Settings(
    images=4,
    seeds=(21,),
    solvers=("DPM++ 2M",),
    sign_steps=(1,),
    teacher_steps=(1, 2),
    reference_steps=4,
    projections=4,
    corruptions=("noise 0.2",),
    controls=(PLAIN, "without idem"),
    train_steps=1,
    pairs=16,
    batch_size=4,
    training={"max_train_samples": 32, "source_components": 2, "source_rank": 2},
)


def training(name: str, data_dir: Path, s: Settings) -> Training:
    """A projector with other losses. All share the pairs."""
    options: dict[str, Any] = {
        "recipe": "regression",
        "num_pairs": s.pairs,
        "num_inference_steps": 8,
        "train_batch_size": s.batch_size,
        "learning_rate": "1e-3",
        "lr_warmup_steps": min(20, s.train_steps // 4),
        "ema_decay": 0.99,
        "checkpointing_steps": 50,
        "idem_weight": 1,
        "dmd_weight": 0,
        "reg_weight": 0.5,
        "max_train_steps": s.train_steps,
    }
    options |= {"pairs_dir": "{cache}/sign-pairs-" + str(s.pairs), **s.training, **CONTROLS[name]}
    given = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    model = ("--pretrained_model_name_or_path", TEACHER, "--dataset_name", "fashion-mnist")
    return Training("train_sign", (*model, "--train_data_dir", data_dir, "--use_ema", *given))


@lru_cache(maxsize=1)
def load_teacher() -> Any:
    """The embedded pixel model."""
    pipe: Any = PixelPipeline.from_pretrained(TEACHER, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@lru_cache(maxsize=1)
def load_sign(folder: Path) -> Any:
    """A trained projector."""
    pipe: Any = dx.SIGNPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def samples(folder: Path | None, solver: str, steps: int, seed: int, count: int) -> dict[str, Any]:
    """Images, graded.

    Args:
        folder: a projector's, or None for the teacher from noise.
        solver: of the teacher; with a folder the teacher starts from that projector's source. Empty: the projector itself.
        steps, seed, count: as for `run_garments`.
    """
    pipe = load_teacher() if solver else load_sign(folder)  # type: ignore[arg-type]
    if solver:
        pipe.scheduler = SOLVERS[solver].from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe.projector = None if folder is None else load_sign(folder).projector
    run = run_garments(pipe, count, seed=seed, batch_size=BATCH, num_inference_steps=steps)
    return graded(run.images, calls=run.calls)


def test_garments(data_dir: Path, count: int) -> Tensor:
    """The first `count` test garments, (n, 1, 32, 32) in [−1, 1]."""
    garments = fashion_scenes.load_garments(data_dir, "test")[0][:count]
    return torch.from_numpy(garments).float()[:, None] / 127.5 - 1


@torch.no_grad()
def figures(folder: Path | None, data_dir: Path, count: int) -> dict[str, Any]:
    """`projector_figures`; `folder` None is the teacher's network, held at the same level and not trained."""
    teacher = load_teacher()
    if folder is None:
        level = nearest_timestep(teacher.scheduler)
        projector = Projector(teacher.unet, teacher.scheduler, level)
    else:
        projector = load_sign(folder).projector
    data = test_garments(data_dir, count)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(31))
    found: dict[str, Any] = projector_figures(projector, noise, data)
    # How well the teacher denoises in one call at its lowest level that matters: the floor of any reconstruction.
    times = torch.full((len(data),), 20)
    alpha, sigma = levels_at(teacher.scheduler, times, data)
    clean = denoise(teacher.unet, teacher.scheduler, alpha * data + sigma * noise, times)
    return found | {"floor": float((clean - data).abs().mean())}


def corrupt(data: Tensor, name: str) -> Tensor:
    """Images (n, 1, h, w) in [−1, 1], corrupted; still in [−1, 1] but for noise, which is clipped."""
    draws = torch.Generator().manual_seed(17)
    if name.startswith("noise"):
        return (data + float(name.split()[1]) * torch.randn(data.shape, generator=draws)).clamp(-1, 1)
    if name == "blur":
        return F.avg_pool2d(F.pad(data, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    if name == "mask":
        corrupted = data.clone()
        corrupted[..., 12:20, 12:20] = -1
        return corrupted
    hit = torch.rand(data.shape, generator=draws)
    return torch.where(hit < 0.05, -1.0, torch.where(hit > 0.95, 1.0, data))


@torch.no_grad()
def sdedit(y: Tensor, strength: float, steps: int, sigma: float) -> Tensor:
    """Noise to the level strength · sigma, then the teacher's DDIM in `steps` calls (Meng et al., arXiv:2108.01073)."""
    teacher = load_teacher()
    scheduler = teacher.scheduler
    top = nearest_timestep(scheduler, strength * sigma)
    times = torch.tensor(falling_timesteps(top, steps))
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(19))
    alpha, level = levels_at(scheduler, times[:1].expand(len(y)), y)
    x = alpha * y + level * noise
    clean = y
    for i, t in enumerate(times):
        here = t.expand(len(y))
        alpha, level = levels_at(scheduler, here, y)
        clean = denoise(teacher.unet, scheduler, x, here)
        if i + 1 < len(times):
            alpha_after, level_after = levels_at(scheduler, times[i + 1].expand(len(y)), y)
            x = alpha_after * clean + level_after * (x - alpha * clean) / level
    return clean.clamp(-1, 1)


@torch.no_grad()
def projections(corruption: str, method: str, strength: float, data_dir: Path, count: int) -> dict[str, Any]:
    """Test garments, corrupted and projected, graded, with every image's PSNR in dB.

    Args:
        corruption: see `corrupt`.
        method: "before", "SIGN", or "SDEdit N" in N calls.
        strength, data_dir, count: of the method; of the garments.
    """
    pipe, data = load_sign(SIGN), test_garments(data_dir, count)
    pictures = corrupt(data, corruption)
    if method == "SIGN":
        draws = [torch.Generator().manual_seed(900 + i) for i in range(len(data))]
        call = {"strength": strength, "generator": draws, "output_type": "pt"}
        pictures = 2 * pipe.project(pictures / 2 + 0.5, **call).images - 1
    elif method != "before":
        pictures = sdedit(pictures, strength, int(method.split()[1]), pipe.sigma)
    psnr = 10 * torch.log10(4 / (pictures - data).square().mean((1, 2, 3)))
    return graded((pictures / 2 + 0.5).movedim(1, -1).numpy(), psnr=psnr.numpy())


# A projector's folder, the teacher's solver, steps; see `samples`.
Drawn = tuple[Path | None, str, int]


def drawn_of(s: Settings, controls: Mapping[str, Path]) -> dict[tuple[str, int], Drawn]:
    """Every set of samples, by label and NFE."""
    first = s.solvers[0]
    found: dict[tuple[str, int], Drawn] = {}
    found |= {("SIGN", n): (SIGN, "", n) for n in s.sign_steps}
    found |= {(f"teacher, {solver}", n): (None, solver, n) for solver in s.solvers for n in s.teacher_steps}
    found |= {(f"teacher, {first}", s.reference_steps): (None, first, s.reference_steps)}
    found |= {("SIGN's source without noise", 0): (SIGN, first, 0)}
    found |= {(f"teacher, {first}, from SIGN's source", n): (SIGN, first, n) for n in s.teacher_steps}
    return found | {(name, 1): (folder, "", 1) for name, folder in controls.items()}


def reads(folder: Path | None) -> tuple[Path, ...]:
    """What a measurement of a projector depends on beside it."""
    return (TEACHER / "unet", *CARDS.values(), *([folder] if folder else []))


def main(bench: Bench) -> None:
    """Trains and measures what is missing, and writes the page."""
    s = bench.pick(Settings(), QUICK)
    trainings = {name: training(name, bench.data_dir, s) for name in s.controls}
    # The first makes the pairs that the others share.
    bench.train({PLAIN: trainings[PLAIN]})
    controls = bench.train(trainings)
    drawn = drawn_of(s, controls)
    found = bench.samples(
        {
            key: [Cell(samples, (*row, seed, s.images), reads(row[0])) for seed in s.seeds]
            for key, row in drawn.items()
        }
    )
    own = {"teacher's network, held at the level": None, "SIGN": SIGN, **controls}
    cells = {n: Cell(figures, (f, bench.data_dir, s.projections), reads(f)) for n, f in own.items()}
    measured = bench.run(cells.values())
    of = {name: measured[cell] for name, cell in cells.items()}
    projected = project(bench, s)
    statistics = bench.statistics("garments")
    count = s.images * len(s.seeds)
    bench.write(
        "sign.md",
        f"{count} images a row ({len(s.seeds)} seeds), the same noise in every row:",
        samples_table(statistics, found, controls),
        f"{s.projections} test garments, and as many samples:",
        figures_table(of, list(own)[:2]),
        f"The teacher's one-call denoising at σ ≈ 0.03 has {float(next(iter(of.values()))['floor']):.3f}.",
        "The same garments, corrupted; every method at the strength of its highest PSNR:",
        projections_table(statistics, s, projected),
        f"Trained for {s.train_steps} steps of {s.batch_size} images, {count} samples a row in one step:",
        controls_table(statistics, found, of, controls),
    )
    strips = {f"{n}, {nfe} NFE": row.pictures for (n, nfe), row in found.items()}
    for corruption in s.corruptions:
        strips[corruption] = projected[corruption, "before", 0.0].pictures
        strength = best(projected, corruption, "SIGN")
        strips[f"{corruption}, projected, strength {strength:g}"] = projected[
            corruption, "SIGN", strength
        ].pictures
    draw(bench.path("sign.png"), strips)


def project(bench: Bench, s: Settings) -> dict[tuple[str, str, float], Samples]:
    """Every corruption by every method at every strength."""
    wanted = [("before", 0.0), *(("SIGN", x) for x in (0.0, *STRENGTHS))]
    wanted += [(f"SDEdit {n}", x) for n in SDEDIT_STEPS for x in STRENGTHS]
    return bench.samples(
        {
            (c, *how): [Cell(projections, (c, *how, bench.data_dir, s.projections), reads(SIGN))]
            for c in s.corruptions
            for how in wanted
        }
    )


def best(projected: Mapping[tuple[str, str, float], Samples], corruption: str, method: str) -> float:
    """The strength at which a method's PSNR is highest."""
    strengths = [x for c, m, x in projected if (c, m) == (corruption, method)]
    return max(strengths, key=lambda x: float(projected[corruption, method, x].rows["psnr"].mean()))


def samples_table(
    statistics: Statistics, found: Mapping[tuple[str, int], Samples], controls: Mapping[str, Path]
) -> str:
    """The projector, and the teacher from noise and from the projector's source."""
    ours = found["SIGN", 1]
    rows = [
        Row((name, str(nfe)), row, None if row is ours else ours)
        for (name, nfe), row in found.items()
        if name not in controls
    ]
    return comparison(["", "NFE"], rows, quality(statistics), "SIGN's in one step")


def figures_table(of: Mapping[str, Arrays], names: list[str]) -> str:
    """What tells a projector from the identity and from a constant."""
    rows = [[name, *(f"{float(of[name][figure]):.3f}" for figure in FIGURES)] for name in names]
    header = [
        "‖f(f(z)) − f(z)‖/‖f(z)‖",
        "‖f(z) − z‖/‖z‖",
        "variance, share of the data's",
        "mean abs. f(x) − x",
    ]
    return markdown_table(["", *header], rows)


def projections_table(
    statistics: Statistics, s: Settings, projected: Mapping[tuple[str, str, float], Samples]
) -> str:
    """PSNR and distance before and after."""
    rows = []
    for corruption in s.corruptions:
        sign = projected[corruption, "SIGN", best(projected, corruption, "SIGN")]
        for method in ("before", "SIGN", *(f"SDEdit {n}" for n in SDEDIT_STEPS)):
            strength = best(projected, corruption, method)
            label = f"teacher's SDEdit, {method[7:]} NFE" if method.startswith("SDEdit") else method
            shown = "" if method == "before" else f"{strength:g}"
            ours = projected[corruption, method, strength]
            rows.append(Row((corruption, label, shown), ours, None if method == "SIGN" else sign))
    psnr = Measure(
        "PSNR, dB",
        lambda ours: statistics.mean(ours.rows["psnr"]),
        lambda ours, control: statistics.difference(ours.rows["psnr"], control.rows["psnr"]),
        digits=1,
    )
    header = ["corrupted by", "", "strength"]
    return comparison(header, rows, [psnr, *quality(statistics)], "SIGN's")


def controls_table(
    statistics: Statistics,
    found: Mapping[tuple[str, int], Samples],
    of: Mapping[str, Arrays],
    controls: Mapping[str, Path],
) -> str:
    """The projectors that were trained for as many steps."""
    rows = []
    for name, folder in controls.items():
        made = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        labels = (name, str(made["seconds"]))
        labels += tuple(f"{float(of[name][figure]):.3f}" for figure in FIGURES[:3])
        rows.append(Row(labels, found[name, 1], None if name == PLAIN else found[PLAIN, 1]))
    header = ["", "seconds", *FIGURES[:3]]
    return comparison(header, rows, quality(statistics), f"{PLAIN}'s")
