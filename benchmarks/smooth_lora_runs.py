"""The measurements of benchmarks/smooth_lora.py: one model on all of them, kept in a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import kept
import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

import diffusers_ext as dx
from diffusers_ext.core.images import as_tensor
from diffusers_ext.smooth_lora.apply import WEIGHT_NAME
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.base_training import reconstruct
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import held_out_prompts, run_scenes

SIZE: dict[str, Any] = {"height": 32, "width": 64}
GUIDANCE, STEPS = 2.0, 10
INVERSION_STEPS = 20
RECONSTRUCTION_GUIDANCES = (1.0, 2.0, 5.0)
FRAMES = 12
PICTURES_SEED = 22  # of the held-out prompts and their noise
# Prompts and seeds of the two ends.
STRIPS = (("a green bag", (4, 5)), ("a red sandal left of a blue dress", (1, 2)))
# An item in another colour: what a image shows, and what it shall show.
EDITS = (("a red bag", "a blue bag"), ("a green boot", "a yellow boot"), ("a white coat", "a red coat"))


@dataclass(frozen=True)
class Counts:
    """How many prompts have a path, images are graded, and images are reconstructed."""

    paths: int
    pictures: int
    inversions: int


@lru_cache(maxsize=1)
def load(lora: Path | None) -> Any:
    """The base model, with a LoRA or without, sampling with DDIM."""
    pipe: Any = DiffusionPipeline.from_pretrained(card_dir("fashion-scenes"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe if lora is None else dx.apply_smooth_lora(pipe, lora)


def measure_path(lora: Path | None, counts: Counts) -> dict[str, np.ndarray]:
    """ISTD's three figures of every prompt."""
    pipe = load(lora)
    options = {**SIZE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    found = dx.compute_istd(pipe, held_out_prompts(counts.paths, seed=21), seed=21, progress=False, **options)
    return {
        "deviations": found.deviations,
        "distances": found.distances,
        "endpoints": found.endpoints,
    }


def measure_strip(lora: Path | None) -> dict[str, np.ndarray]:
    """Frames from one noise to another, and how far each is from the next."""
    options = {**SIZE, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    found = {}
    for i, (prompt, seeds) in enumerate(STRIPS):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        frames = dx.interpolate(
            load(lora), prompt, generator=generators, num_frames=FRAMES, progress=False, **options
        )
        found[f"strip {i}"] = frames.astype(np.float16)
        found[f"changes {i}"] = 2 * np.linalg.norm(np.diff(frames, axis=0).reshape(FRAMES - 1, -1), axis=1)
    return found


def measure_quality(lora: Path | None, counts: Counts) -> dict[str, np.ndarray]:
    """Which images show every word of their prompt, and their features."""
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    result = run_scenes(
        load(lora), held_out_prompts(counts.pictures, PICTURES_SEED), seed=PICTURES_SEED, **options
    )
    return {"aligned": result.grades["aligned"], "features": result.features}


@torch.no_grad()
def measure_inversion(lora: Path | None, counts: Counts, data_dir: str) -> dict[str, np.ndarray]:
    """Real test scenes inverted and redrawn at several guidance scales, and some edited."""
    pipe = load(lora)
    real, prompts = fashion_scenes.scene_arrays(data_dir, "test", counts.inversions, seed=23)
    latents = dx.encode_images(pipe, real.astype(np.float32) / 255)
    noise = dx.ddim_invert(pipe, latents, prompts, num_inference_steps=INVERSION_STEPS)
    found = {}
    for guidance in RECONSTRUCTION_GUIDANCES:
        options = {**SIZE, "num_inference_steps": INVERSION_STEPS, "guidance_scale": guidance}
        drawn = pipe(prompts, latents=noise, output_type="np", **options).images
        found[f"redrawn {guidance:g}"] = drawn.astype(np.float16)
    found["real"] = real
    found["autoencoder"] = reconstruct(pipe.vae, as_tensor(real)).movedim(1, -1).numpy().astype(np.float16)
    return found | edited(pipe, data_dir)


def edited(pipe: Any, data_dir: str) -> dict[str, np.ndarray]:
    """Real garments of `EDITS`, before and after."""
    source, target = (list(texts) for texts in zip(*EDITS))
    scenes = [fashion_scenes.parse_caption(text) for text in source]
    garments, items = fashion_scenes.load_garments(data_dir, "test")
    shown = as_tensor(np.stack(list(fashion_scenes.render(scenes, garments, items, seed=3))))
    latents = dx.encode_images(pipe, shown)
    noise = dx.ddim_invert(pipe, latents, source, num_inference_steps=INVERSION_STEPS)
    options = {"num_inference_steps": INVERSION_STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
    pictures = dx.edit(pipe, source, target, latents=noise, strength=0.7, **options).images
    return {"to edit": shown.movedim(1, -1).numpy(), "edited": pictures}


def run(kind: str, lora: Path | None, counts: Counts, data_dir: str, path: Path) -> Path:
    """Makes one measurement of one model and writes it, unless it is there."""
    measures: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "strip": lambda: measure_strip(lora),
        "path": lambda: measure_path(lora, counts),
        "quality": lambda: measure_quality(lora, counts),
        "inversion": lambda: measure_inversion(lora, counts, data_dir),
    }
    return kept.measure(path, measures[kind])


def kept_at(kind: str, lora: Path | None, counts: Counts, folder: Path) -> Path:
    """Where a measurement is kept: under everything that it depends on but the code."""
    base = card_dir("fashion-scenes") / "unet/diffusion_pytorch_model.safetensors"
    weights = kept.digest([base] if lora is None else [base, lora / WEIGHT_NAME])
    counted = {"path": counts.paths, "quality": counts.pictures, "inversion": counts.inversions}
    count = counted.get(kind, repr((STRIPS, FRAMES)))
    key = f"{kind}|{count}|{GUIDANCE}|{STEPS}|{INVERSION_STEPS}|{weights}"
    return folder / f"{kind}-{kept.name_of(key, 16)}.npz"
