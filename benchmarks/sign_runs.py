"""The measurements of `sign`: samples, figures and projections of the embedded pixel model and its projectors."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.nn import functional as F

import diffusers_ext as dx
from diffusers_ext.core.schedules import levels_at
from diffusers_ext.sign.figures import projector_figures
from diffusers_ext.sign.pairs import teacher_flow
from diffusers_ext.sign.projector import Projector, denoise, nearest_timestep
from diffusers_ext.testbed import fashion_scenes
from diffusers_ext.testbed.embedded import card_dir
from diffusers_ext.testbed.runs import run_garments

from .framework.samples import CARDS, graded
from .pixel_pipeline import PixelPipeline

TEACHER, SIGN = card_dir("fashion-ddpm"), card_dir("sign-fashion-ddpm")
# Larger ones leave the processor's cache.
BATCH = 64
SOLVERS: dict[str, Any] = {
    "DPM++ 2M": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
    "DDIM": DDIMScheduler,
}


def reads(folder: Path | None) -> tuple[Path, ...]:
    """What a measurement of a projector depends on beside it."""
    return (TEACHER / "unet", *CARDS.values(), *([folder] if folder else []))


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
    """Images (n, C, h, w) in [−1, 1], corrupted; still in [−1, 1], to which noise is clipped.

    The mask hides the middle of every 32 columns. Salt and pepper hit all channels of a pixel.
    """
    draws = torch.Generator().manual_seed(17)
    if name.startswith("noise"):
        return (data + float(name.split()[1]) * torch.randn(data.shape, generator=draws)).clamp(-1, 1)
    if name == "blur":
        return F.avg_pool2d(F.pad(data, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    if name == "mask":
        corrupted = data.clone()
        for start in range(0, data.shape[3], 32):
            corrupted[..., 12:20, start + 12 : start + 20] = -1
        return corrupted
    hit = torch.rand(data[:, :1].shape, generator=draws)
    return torch.where(hit < 0.05, -1.0, torch.where(hit > 0.95, 1.0, data))


@torch.no_grad()
def sdedit(y: Tensor, strength: float, steps: int, sigma: float) -> Tensor:
    """Noise to the level strength · sigma, then the teacher in `steps` calls of DPM++ 2M (Meng et al., arXiv:2108.01073)."""
    teacher = load_teacher()
    top = nearest_timestep(teacher.scheduler, strength * sigma)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(19))
    alpha, level = levels_at(teacher.scheduler, torch.full((len(y),), top), y)
    noisy = alpha * y + level * noise
    return teacher_flow(teacher.unet, teacher.scheduler, noisy, steps, timestep=top).clamp(-1, 1)


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
