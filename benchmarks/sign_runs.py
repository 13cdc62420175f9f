"""The measurements of benchmarks/sign.py: samples, projections and a projector's own figures, kept in a folder."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import kept
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from pixel_pipeline import PixelPipeline
from torch import Tensor
from torch.nn import functional as F

import diffusers_ext as dx
from diffusers_ext.core.schedules import levels_at
from diffusers_ext.sign.projector import Projector, denoise, falling_timesteps, nearest_timestep
from diffusers_ext.sign.training import projector_figures
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.grader import garment_features, load_grader
from diffusers_ext.testbed.runs import run_garments

TEACHER = "fashion-ddpm"
# Larger ones leave the processor's cache.
BATCH = 64
SOLVERS: dict[str, Any] = {
    "DPM++ 2M": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "DDIM": DDIMScheduler,
}
SHOWN = 16
# Of the noise level that samples start from; what is added before projecting.
STRENGTHS = (0.05, 0.1, 0.2, 0.4)
CORRUPTIONS = ("noise 0.2", "noise 0.5", "noise 1", "blur", "mask", "salt and pepper")
SDEDIT_STEPS = (1, 10)


@lru_cache(maxsize=1)
def load_teacher() -> Any:
    """The embedded pixel model."""
    pipe: Any = PixelPipeline.from_pretrained(card_dir(TEACHER), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@lru_cache(maxsize=1)
def load_sign(folder: Path) -> Any:
    """A trained projector."""
    pipe: Any = dx.SIGNPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def samples(folder: Path | None, solver: str, steps: int, seed: int, num_images: int) -> dict[str, Any]:
    """Features of samples, and the first few.

    Args:
        folder: a projector's, or None for the teacher from noise.
        solver: of the teacher; with a folder the teacher starts from that projector's source. Empty: the projector itself.
        steps, seed, num_images: as for `run_garments`.
    """
    pipe = load_teacher() if solver else load_sign(folder)  # type: ignore[arg-type]
    if solver:
        pipe.scheduler = SOLVERS[solver].from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe.projector = None if folder is None else load_sign(folder).projector
    found = run_garments(pipe, num_images, seed=seed, batch_size=BATCH, num_inference_steps=steps)
    return {"features": found.features, "pictures": found.images[:SHOWN], "calls": found.calls}


def test_garments(data_dir: str, count: int) -> Tensor:
    """The first `count` test garments, (n, 1, 32, 32) in [−1, 1]."""
    images = fashion_scenes.load_garments(data_dir, "test")[0][:count]
    return torch.from_numpy(images).float()[:, None] / 127.5 - 1


@torch.no_grad()
def figures(folder: Path | None, data_dir: str, num_images: int) -> dict[str, Any]:
    """`projector_figures`; `folder` None is the teacher's network, held at the same level and not trained."""
    teacher = load_teacher()
    if folder is None:
        level = nearest_timestep(teacher.scheduler)
        projector = Projector(teacher.unet, teacher.scheduler, level)
    else:
        projector = load_sign(folder).projector
    data = test_garments(data_dir, num_images)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(31))
    found: dict[str, Any] = projector_figures(projector, noise, data)
    # How well the teacher denoises in one call at its lowest level that matters: the floor of any reconstruction.
    times = torch.full((len(data),), 20)
    alpha, sigma = levels_at(teacher.scheduler, times, data)
    clean = denoise(teacher.unet, teacher.scheduler, alpha * data + sigma * noise, times)
    return found | {"floor": float((clean - data).abs().mean())}


def corrupt(data: Tensor, name: str) -> Tensor:
    """Images (n, 1, h, w) in [−1, 1], corrupted; still in [−1, 1] but for noise, which is clipped."""
    draw = torch.Generator().manual_seed(17)
    if name.startswith("noise"):
        return (data + float(name.split()[1]) * torch.randn(data.shape, generator=draw)).clamp(-1, 1)
    if name == "blur":
        return F.avg_pool2d(F.pad(data, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    if name == "mask":
        corrupted = data.clone()
        corrupted[..., 12:20, 12:20] = -1
        return corrupted
    hit = torch.rand(data.shape, generator=draw)
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
def projections(folder: Path, data_dir: str, num_images: int) -> dict[str, Any]:
    """(psnr, features) of every corruption before and after, by name "corruption|method|strength"."""
    pipe, data, grader = load_sign(folder), test_garments(data_dir, num_images), load_grader()
    found: dict[str, Any] = {}

    def keep(name: str, pictures: Tensor) -> None:
        error = (pictures - data).square().mean((1, 2, 3))
        found[f"{name}|psnr"] = (10 * torch.log10(4 / error)).numpy()
        found[f"{name}|features"] = garment_features(grader, pictures / 2 + 0.5)
        found[f"{name}|shown"] = (pictures[:SHOWN] / 2 + 0.5).half().numpy()

    for corruption in CORRUPTIONS:
        y = corrupt(data, corruption)
        keep(f"{corruption}|before|0", y)
        for strength in (0.0, *STRENGTHS):
            draws = [torch.Generator().manual_seed(900 + i) for i in range(len(y))]
            call = {"strength": strength, "generator": draws, "output_type": "pt"}
            keep(f"{corruption}|SIGN|{strength:g}", 2 * pipe.project(y / 2 + 0.5, **call).images - 1)
        for steps in SDEDIT_STEPS:
            for strength in STRENGTHS:
                keep(f"{corruption}|SDEdit {steps}|{strength:g}", sdedit(y, strength, steps, pipe.sigma))
    return found


def run(kind: str, path: Path, arguments: tuple[Any, ...]) -> Path:
    """Makes one measurement and writes it, unless it is there."""
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "samples": samples,
        "figures": figures,
        "projections": projections,
    }
    return kept.measure(path, measures[kind], *arguments)


def kept_at(kind: str, cache_dir: Path, arguments: tuple[Any, ...]) -> Path:
    """Where a measurement is kept: under everything that it depends on but the code."""
    teacher = card_dir(TEACHER) / "unet/diffusion_pytorch_model.safetensors"
    folder = arguments[0]
    own = [] if folder is None else [folder / part / teacher.name for part in ("unet", "source")]
    # A projector that starts from white noise has no source.
    files = [teacher, *(path for path in own if path.is_file())]
    return kept.place(cache_dir, kind, arguments[1:], files)
