"""`diffusers-ext demo`: the embedded models without and with each method, at the same seeds, on one page."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import diffusers_ext as dx

from .data.fashion_scenes import SAMPLE_DIR, load_garments
from .evaluation.frechet import FeatureStats, frechet_distance
from .evaluation.report import proportion
from .evaluation.testbed import Run, held_out_prompts, load_reference, run_garments, run_scenes
from .resources import resource_dir

matplotlib.use("Agg")

# Chosen by benchmarks/teleport.py; the README shows its tables.
SCENE_STEPS, SCENE_SKIP, SCENE_GUIDANCE = 6, 0.34, 2.0
GARMENT_STEPS, GARMENT_SKIP = 20, 0.25
# Of benchmarks/golden_noise.py: without guidance, where golden noise pays most.
GOLDEN_STEPS = 6
# Of benchmarks/smooth_lora.py.
STRIP_PROMPT, STRIP_SEEDS, STRIP_STEPS = "a green bag", (4, 5), 10
# Of benchmarks/sign.py.
SIGN_TEACHER_STEPS, SPOILING_NOISE = (4, 8), 0.5


def run(output_dir: str | Path = "diffusers_ext_demo", num_images: int = 64, seed: int = 0) -> Path:
    """Generates, compares, and writes `demo.png`.

    Args:
        output_dir: created if need be.
        num_images: pictures a variant, at least 8.
        seed: of the noise and the prompts.

    Returns:
        The path of the picture.

    Raises:
        ValueError: `num_images` below 8.
    """
    if num_images < 8:
        raise ValueError(f"num_images must be at least 8 to compare anything, got {num_images}.")
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    prompts = held_out_prompts(num_images, seed)

    def draw_garments(pipe: Any, steps: int) -> Run:
        return run_garments(pipe, num_images, seed=seed, num_inference_steps=steps)

    def draw_scenes(pipe: Any, steps: int) -> Run:
        return run_scenes(pipe, prompts, seed=seed, num_inference_steps=steps, guidance_scale=SCENE_GUIDANCE)

    with Progress(console=console) as progress:
        garments = _teleport(
            "fashion-ddpm", "teleport_ddpm", GARMENT_STEPS, GARMENT_SKIP, draw_garments, progress
        )
        scenes = _teleport("fashion-scenes", "teleport_sd", SCENE_STEPS, SCENE_SKIP, draw_scenes, progress)
        golden = _golden_noise(prompts, seed, progress)
        strips = _smooth_lora(progress)
        projector, projected = _sign(num_images, seed, progress)
        pruned = {"the whole UNet": scenes["DPM++ 2M"], "A-SDM": _asdm(draw_scenes, progress)}
    parts = {
        "fashion-ddpm: unconditional garments": (garments, load_reference("garments-test")),
        "fashion-scenes: held-out prompts": (scenes, load_reference("scenes-test")),
        "fashion-scenes: golden noise": (golden, load_reference("scenes-test")),
        "fashion-ddpm: SIGN": (projector, load_reference("garments-test")),
        "fashion-scenes: A-SDM": (pruned, load_reference("scenes-test")),
    }
    for title, (runs, reference) in parts.items():
        _print_table(console, title, runs, reference)
    path = output / "demo.png"
    _print_smoothness(console, strips)
    titled = {f"{name}: {STRIP_PROMPT}, from one noise to another": frames for name, frames in strips.items()}
    _picture(path, {title: runs for title, (runs, _) in parts.items()}, prompts, titled | projected)
    console.print(f"The same seeds side by side: [bold]{path}[/bold]")
    return path


def _teleport(
    name: str, pipeline: str, steps: int, skip: float, generate: Callable[[Any, int], Run], progress: Progress
) -> dict[str, Run]:
    """One embedded model plain, teleported, and plain with no fewer calls; `generate` takes pipeline and steps."""
    folder = resource_dir("model_cards") / name
    pipe: Any = DiffusionPipeline.from_pretrained(
        folder,
        dtype=torch.float32,
        custom_pipeline=str(resource_dir("pipelines") / pipeline),
        trust_remote_code=True,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    task = progress.add_task(name, total=3)
    plain = generate(pipe, steps)
    progress.advance(task)
    pipe.load_teleport(folder / "gaussian", skip=skip)
    teleported = generate(pipe, steps)
    progress.advance(task)
    pipe.unload_teleport()
    # The prompts' means cost half a guided step each, so the calls need not be whole.
    respaced = generate(pipe, math.ceil(teleported.calls))
    progress.advance(task)
    return {"DPM++ 2M": plain, f"teleport, skip={skip:g}": teleported, "DPM++ 2M, respaced": respaced}


def _golden_noise(prompts: list[str], seed: int, progress: Progress) -> dict[str, Run]:
    """The scenes without guidance and, at the same cost, guided in half the steps; plain and from golden noise."""
    cards = resource_dir("model_cards")
    pipe: Any = DiffusionPipeline.from_pretrained(cards / "fashion-scenes", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    npnet: Any = dx.NPNetModel.from_pretrained(cards / "npnet-fashion-scenes", torch_dtype=torch.float32)
    task = progress.add_task("golden noise", total=4)

    def draw(guidance_scale: float, steps: int) -> Run:
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        result = run_scenes(pipe, prompts, seed=seed, **options)
        progress.advance(task)
        return result

    samplings = {"no guidance": (1.0, GOLDEN_STEPS)}
    samplings[f"guidance {SCENE_GUIDANCE:g}, half the steps"] = (SCENE_GUIDANCE, GOLDEN_STEPS // 2)
    plain = {name: draw(*sampling) for name, sampling in samplings.items()}
    dx.apply_golden_noise(pipe, npnet.eval())
    golden = {f"{name}, golden noise": draw(*sampling) for name, sampling in samplings.items()}
    dx.remove_golden_noise(pipe)
    return plain | golden


def _smooth_lora(progress: Progress) -> dict[str, np.ndarray]:
    """Frames from one noise to another, without and with the embedded Smooth-LoRA."""
    cards = resource_dir("model_cards")
    pipe: Any = DiffusionPipeline.from_pretrained(cards / "fashion-scenes", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    task = progress.add_task("Smooth-LoRA", total=2)

    def frames() -> np.ndarray:
        found = dx.interpolate(
            pipe,
            STRIP_PROMPT,
            generator=[torch.Generator().manual_seed(seed) for seed in STRIP_SEEDS],
            num_frames=12,
            num_inference_steps=STRIP_STEPS,
            guidance_scale=SCENE_GUIDANCE,
            height=32,
            width=64,
            progress=False,
        )
        progress.advance(task)
        return found

    plain = frames()
    dx.load_smooth_lora(pipe, cards / "smooth-lora-fashion-scenes")
    return {"plain": plain, "Smooth-LoRA": frames()}


def _sign(num_images: int, seed: int, progress: Progress) -> tuple[dict[str, Run], dict[str, np.ndarray]]:
    """The projector distilled from the garments' model beside its teacher; pictures spoilt by noise and projected."""
    cards = resource_dir("model_cards")
    sign: Any = dx.SIGNPipeline.from_pretrained(cards / "sign-fashion-ddpm", dtype=torch.float32)
    teacher: Any = DiffusionPipeline.from_pretrained(cards / "fashion-ddpm", dtype=torch.float32)
    teacher.scheduler = DPMSolverMultistepScheduler.from_config(teacher.scheduler.config)
    runs: dict[str, Run] = {}
    task = progress.add_task("SIGN", total=2 + len(SIGN_TEACHER_STEPS))
    for label, pipe, steps in (
        *(("SIGN", sign, n) for n in (1, 4)),
        *(("DPM++ 2M", teacher, n) for n in SIGN_TEACHER_STEPS),
    ):
        pipe.set_progress_bar_config(disable=True)
        runs[f"{label}, {steps} step{'s' * (steps > 1)}"] = run_garments(
            pipe, num_images, seed=seed, num_inference_steps=steps
        )
        progress.advance(task)
    images, _ = load_garments(SAMPLE_DIR, "test")
    clean = torch.from_numpy(images[:16]).float()[:, None] / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    spoilt = (clean + SPOILING_NOISE / 2 * noise).clamp(0, 1)
    projected = sign.project(spoilt, output_type="np").images
    return runs, {"real garments, spoilt": spoilt[:, 0].numpy(), "SIGN, projected": projected[..., 0]}


def _asdm(generate: Callable[[Any, int], Run], progress: Progress) -> Run:
    """The scenes by the pruned UNet, in the same steps as by the whole one."""
    task = progress.add_task("A-SDM", total=1)
    pipe: Any = DiffusionPipeline.from_pretrained(
        resource_dir("model_cards") / "asdm-fashion-scenes", dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    found = generate(pipe, SCENE_STEPS)
    progress.advance(task)
    return found


def _print_smoothness(console: Console, strips: dict[str, np.ndarray]) -> None:
    table = Table(title=f"fashion-scenes: from one noise to another, {STRIP_PROMPT}", title_justify="left")
    for column in ("", "mean step", "standard deviation of the steps"):
        table.add_column(column, justify="left" if not column else "right")
    for name, frames in strips.items():
        steps = 2 * np.linalg.norm(np.diff(frames, axis=0).reshape(len(frames) - 1, -1), axis=1)
        table.add_row(name, f"{steps.mean():.2f}", f"{steps.std():.2f}")
    table.caption = "Distances between neighbouring pictures of one path; benchmarks/smooth_lora.py has 200."
    console.print(table)


def _print_table(console: Console, title: str, runs: dict[str, Run], reference: FeatureStats) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "NFE", "seconds", "every word right", "small-feature Fréchet distance"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in runs.items():
        aligned = proportion(result.grades["aligned"]).format(1, 100) + " %" if result.grades else "–"
        distance = frechet_distance(FeatureStats.of(result.features), reference)
        table.add_row(name, f"{result.calls:.3g}", f"{result.seconds:.1f}", aligned, f"{distance:.2f}")
    table.caption = (
        "A guided step counts as one NFE and evaluates the denoiser twice. Few pictures raise the distance: compare"
        " the rows with each other, not with other pages."
    )
    console.print(table)


def _picture(
    path: Path, parts: dict[str, dict[str, Run]], prompts: list[str], strips: dict[str, np.ndarray]
) -> None:
    from matplotlib import pyplot as plt

    rows = [(name, result) for runs in parts.values() for name, result in runs.items()]
    count = len(rows) + len(strips)
    figure, axes = plt.subplots(count, 1, figsize=(11, 0.95 * count + 0.3))
    for axis, (name, result) in zip(axes, rows):
        count = 8 if result.grades else 16
        axis.imshow(np.concatenate(list(result.pictures[:count].squeeze()), 1), cmap="gray", vmin=0, vmax=1)
        axis.set_title(f"{name}: {result.calls:.3g} NFE", fontsize=9, loc="left")
        axis.axis("off")
    for axis, (name, frames) in zip(axes[len(rows) :], strips.items()):
        axis.imshow(np.concatenate(list(np.clip(frames, 0, 1)), 1), cmap="gray", vmin=0, vmax=1)
        axis.set_title(name, fontsize=9, loc="left")
        axis.axis("off")
    captions = " · ".join(prompts[:8])
    figure.text(0.01, 0.005, captions, fontsize=5.2)
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
