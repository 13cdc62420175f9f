"""`diffusers-ext demo`: the embedded models without and with each method at the same seeds, in one image."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import diffusers_ext as dx

from ..core.shipped import pipeline_path
from ..metrics.comparison import proportion
from ..metrics.frechet import FeatureStats, frechet_distance
from .embedded import REPOSITORY, card_dir, has_card
from .fashion_scenes import SAMPLE_DIR, load_garments
from .runs import Run, held_out_prompts, load_reference, run_garments, run_scenes

# Settings of the benchmarks, whose tables have confidence intervals.
SCENE_STEPS, SCENE_SKIP, SCENE_GUIDANCE = 6, 0.34, 2.0
GARMENT_STEPS, GARMENT_SKIP = 20, 0.25
# Without guidance, where golden noise gains most.
GOLDEN_STEPS = 6
STRIP_PROMPT, STRIP_SEEDS, STRIP_STEPS = "a green bag", (4, 5), 10
SIGN_TEACHER_STEPS, CORRUPTION = (4, 8), 0.5

Strips = dict[str, np.ndarray]


def run(output_dir: str | Path = "diffusers_ext_demo", num_images: int = 64, seed: int = 0) -> Path:
    """Generates images, compares them, and writes `demo.png`. Methods without an embedded model are skipped.

    Args:
        output_dir: created if needed.
        num_images: images per variant, at least 8.
        seed: seed of the noise and the prompts.

    Returns:
        The path of the image.

    Raises:
        ValueError: `num_images` below 8.
    """
    if num_images < 8:
        raise ValueError(f"num_images must be at least 8 to compare anything, got {num_images}.")
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    prompts = held_out_prompts(num_images, seed)

    def generate_garments(pipe: Any, steps: int) -> Run:
        return run_garments(pipe, num_images, seed=seed, num_inference_steps=steps)

    def generate_scenes(pipe: Any, steps: int) -> Run:
        return run_scenes(pipe, prompts, seed=seed, num_inference_steps=steps, guidance_scale=SCENE_GUIDANCE)

    parts: dict[str, dict[str, Run]] = {}
    strips: Strips = {}
    with Progress(console=console) as progress:
        parts["fashion-ddpm: unconditional garments"] = _teleport(
            "fashion-ddpm", "teleport_ddpm", GARMENT_STEPS, GARMENT_SKIP, generate_garments, progress
        )
        if has_card("fashion-scenes"):
            scenes = _teleport(
                "fashion-scenes", "teleport_sd", SCENE_STEPS, SCENE_SKIP, generate_scenes, progress
            )
            parts["fashion-scenes: held-out prompts"] = scenes
            parts["fashion-scenes: golden noise"] = _golden_noise(prompts, seed, progress)
            strips = _smooth_lora(progress)
            parts["fashion-scenes: A-SDM"] = {
                "full UNet": scenes["DPM++ 2M"],
                "A-SDM": _asdm(generate_scenes, progress),
            }
        parts["fashion-ddpm: SIGN"], projected = _sign(num_images, seed, progress)
    for title, runs in parts.items():
        reference = "scenes-test" if title.startswith("fashion-scenes") else "garments-test"
        _print_table(console, title, runs, load_reference(reference))
    if strips:
        _print_smoothness(console, strips)
    else:
        console.print(
            "Golden noise, Smooth-LoRA, A-SDM and teleportation of prompts need the model fashion-scenes, which an"
            f" installed wheel does not contain: clone {REPOSITORY} and install it with pip install -e ."
        )
    path = output / "demo.png"
    titled = {f"{name}: {STRIP_PROMPT}, from one noise to another": frames for name, frames in strips.items()}
    _save_page(path, parts, prompts, titled | projected)
    console.print(f"Images from the same seeds: [bold]{path}[/bold]")
    return path


def _teleport(
    name: str, pipeline: str, steps: int, skip: float, generate: Callable[[Any, int], Run], progress: Progress
) -> dict[str, Run]:
    """One model plain, teleported, and plain with as many NFE; `generate` takes the pipeline and steps."""
    folder = card_dir(name)
    pipe: Any = DiffusionPipeline.from_pretrained(
        folder,
        dtype=torch.float32,
        custom_pipeline=pipeline_path(pipeline),
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
    # A prompt's mean may cost half a guided step, so `calls` need not be an integer.
    respaced = generate(pipe, math.ceil(teleported.calls))
    progress.advance(task)
    return {"DPM++ 2M": plain, f"teleport, skip={skip:g}": teleported, "DPM++ 2M, respaced": respaced}


def _golden_noise(prompts: list[str], seed: int, progress: Progress) -> dict[str, Run]:
    """The scenes without guidance, and with guidance in half the steps; from random and from golden noise."""
    pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    npnet: Any = dx.NPNetModel.from_pretrained(card_dir("npnet-fashion-scenes"), torch_dtype=torch.float32)
    task = progress.add_task("golden noise", total=4)

    def generate(guidance_scale: float, steps: int) -> Run:
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        result = run_scenes(pipe, prompts, seed=seed, **options)
        progress.advance(task)
        return result

    samplings = {"no guidance": (1.0, GOLDEN_STEPS)}
    samplings[f"guidance {SCENE_GUIDANCE:g}, half the steps"] = (SCENE_GUIDANCE, GOLDEN_STEPS // 2)
    plain = {name: generate(*sampling) for name, sampling in samplings.items()}
    dx.apply_golden_noise(pipe, npnet.eval())
    golden = {f"{name}, golden noise": generate(*sampling) for name, sampling in samplings.items()}
    dx.remove_golden_noise(pipe)
    return plain | golden


def _smooth_lora(progress: Progress) -> dict[str, np.ndarray]:
    """Frames of an interpolation between two noises, without and with the embedded Smooth-LoRA."""
    pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)
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
    dx.apply_smooth_lora(pipe, card_dir("smooth-lora-fashion-scenes"))
    return {"plain": plain, "Smooth-LoRA": frames()}


def _sign(num_images: int, seed: int, progress: Progress) -> tuple[dict[str, Run], dict[str, np.ndarray]]:
    """The SIGN model of the garments beside its teacher, and garments corrupted by noise and projected."""
    sign: Any = dx.SIGNPipeline.from_pretrained(card_dir("sign-fashion-ddpm"), dtype=torch.float32)
    teacher: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-ddpm"), dtype=torch.float32)
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
    corrupted = (clean + CORRUPTION / 2 * noise).clamp(0, 1)
    projected = sign.project(corrupted, output_type="np").images
    return runs, {"real garments, corrupted": corrupted[:, 0].numpy(), "SIGN, projected": projected[..., 0]}


def _asdm(generate: Callable[[Any, int], Run], progress: Progress) -> Run:
    """The scenes of the pruned UNet, in the same number of steps as with the full one."""
    task = progress.add_task("A-SDM", total=1)
    unet: Any = UNet2DConditionModel.from_pretrained(
        card_dir("asdm-fashion-scenes"), subfolder="unet", torch_dtype=torch.float32
    )
    pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), unet=unet, dtype=torch.float32)
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
    table.caption = "Distances between neighbouring images of one path; python -m benchmarks smooth_lora measures 200 paths."
    console.print(table)


def _print_table(console: Console, title: str, runs: dict[str, Run], reference: FeatureStats) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("", "NFE", "seconds", "prompt accuracy", "small-feature Fréchet distance"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in runs.items():
        aligned = proportion(result.grades["aligned"]).format(1, 100) + " %" if result.grades else "–"
        distance = frechet_distance(FeatureStats.of(result.features), reference)
        table.add_row(name, f"{result.calls:.3g}", f"{result.seconds:.1f}", aligned, f"{distance:.2f}")
    table.caption = (
        "A guided step counts as one NFE and evaluates the denoiser twice. The distance is larger for few"
        " images: compare the rows only with each other."
    )
    console.print(table)


def _save_page(path: Path, parts: dict[str, dict[str, Run]], prompts: list[str], strips: Strips) -> None:
    """One PNG with the first images of every run and every strip, each under its title."""
    rows: list[tuple[str, Image.Image | None]] = []
    for title, runs in parts.items():
        rows.append((title, None))
        for name, result in runs.items():
            shown = result.images[: 8 if result.grades else 16]
            rows.append((f"{name}: {result.calls:.3g} NFE", _band(shown)))
    rows.append(("interpolation and projection", None))
    for name, images in strips.items():
        # As wide as the other rows.
        wanted = min(len(images), 8 if images.shape[2] > 32 else 16)
        chosen = np.linspace(0, len(images) - 1, wanted).round().astype(int)
        rows.append((name, _band(images[chosen])))
    captions = [" · ".join(prompts[low : low + 4]) for low in (0, 4)]
    line, gap = 20, 6
    width = max(band.width for _, band in rows if band) + 2 * gap
    height = sum(line + gap + (band.height if band else gap) for _, band in rows) + len(captions) * 16 + gap
    page = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(page), gap
    for name, band in rows:
        if band is None:
            top += gap
        draw.text((gap, top), name, fill="black", font=ImageFont.load_default(size=13 if band else 16))
        top += line
        if band is not None:
            page.paste(band, (gap, top))
            top += band.height
        top += gap
    small = ImageFont.load_default(size=11)
    for number, caption in enumerate(captions):
        draw.text((gap, top + 16 * number), caption, fill="black", font=small)
    page.save(path)


def _band(images: np.ndarray, scale: int = 2) -> Image.Image:
    """Images (n, h, w[, channels]) in [0, 1] side by side, `scale` times their size."""
    strip = np.concatenate(list(images), 1).squeeze()
    band = Image.fromarray((strip.clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    return band.resize((band.width * scale, band.height * scale), Image.Resampling.NEAREST)
