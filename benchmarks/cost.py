"""What the map costs beside one denoiser call at Stable Diffusion 1.5's shape, and what a large fit costs.

The denoiser has Stable Diffusion 1.5's configuration and random weights; multiply-adds are counted, times are
medians in one process. The fit streams samples with known eigenvalues 1/k.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

import diffusers_ext as dx
from diffusers_ext.metrics.comparison import markdown_table

from .framework.bench import Bench
from .framework.cells import Cell
from .framework.timing import device_name, multiply_adds, peak_memory, take_turns

WRITES = ("cost.md",)
RANK, CPU = 256, torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """Repetitions, width of the denoiser's first resolution, side of its latents, dimensions and samples of the fit."""

    repeats: int = 3
    width: int = 320
    side: int = 64
    big: int = 65_536
    samples: int = 2_000


def main(bench: Bench) -> None:
    """Measures both and writes cost.md."""
    s = bench.pick(Settings(), Settings(1, 32, 16, 2048, 600))
    fit, once = Cell(fit_cost, (s,), alone=True), Cell(map_cost, (s,), alone=True)
    found = bench.run([fit, once])
    bench.write("cost.md", *(str(found[cell]["table"]) for cell in (fit, once)))


@torch.no_grad()
def map_cost(s: Settings) -> dict[str, Any]:
    """One image's map beside one call of the denoiser, as a table."""
    shape, w = (4, s.side, s.side), s.width
    unet: Any = UNet2DConditionModel(
        sample_size=s.side,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(w, 2 * w, 4 * w, 4 * w),
    ).eval()
    stats = random_stats(shape)
    x, context = torch.randn(1, *shape), torch.randn(1, 77, 768)
    work: dict[str, Callable[[], Any]] = {
        "one denoiser call": lambda: unet(x, 900, encoder_hidden_states=context),
        "the map": lambda: stats.transport(x, (1.0, 14.6), (1.0, 5.0)),
        "the map under guidance 7.5": lambda: stats.transport(x, (1.0, 14.6), (1.0, 5.0), guidance_scale=7.5),
    }
    # The first guided map also finds the basis it works in, once for the statistics: a later call is counted.
    times = take_turns(work, s.repeats, 1, CPU, "calls in turns")
    base, rows = (0.0, 0.0), []
    for name, function in work.items():
        figures = multiply_adds(function) / 1e9, 1e3 * float(np.median(times[name]))
        base = figures if not rows else base
        shares = [f"{100 * f / b:.4f} %" for f, b in zip(figures, base)]
        rows.append([name, f"{figures[0]:.4f}", shares[0], f"{figures[1]:.2f}", shares[1]])
    header = ["", "multiply-adds, 10⁹", "share", "milliseconds", "share"]
    note = f"Latents {shape}, D = {x.numel():,}, rank {RANK}; one image; {device_name(CPU)}."
    return {"table": np.array(f"{markdown_table(header, rows)}\n\n{note}")}


def random_stats(shape: tuple[int, ...]) -> dx.GaussianStats:
    """Within-prompt statistics of latents (c, h, w), with an unconditional part."""

    def one(top: float, unconditional: dx.GaussianStats | None = None) -> dx.GaussianStats:
        basis, _ = torch.linalg.qr(torch.randn(torch.Size(shape).numel(), RANK))
        values = top / torch.arange(1, RANK + 1)
        return dx.GaussianStats(torch.zeros(shape), basis, values, 0.2, 1000, unconditional=unconditional)

    return one(100.0, one(400.0))


def fit_cost(s: Settings) -> dict[str, Any]:
    """Peak memory and accuracy of a streamed fit whose exact eigenvalues are those of its small factor."""
    # x = z diag(√λ) Qᵀ with orthonormal Q: the sample covariance has the eigenvalues of that of z diag(√λ).
    inner = 1024
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(s.samples, inner, generator=generator) / torch.arange(1, inner + 1).sqrt()
    exact = torch.linalg.svdvals((z - z.mean(0)).double()).square() / (s.samples - 1)
    signs = torch.randint(0, 2, (s.big,), generator=generator).float() * 2 - 1
    start = time.perf_counter()
    stats = dx.GaussianStats.fit(spread(z, signs), RANK)
    took = time.perf_counter() - start
    error = (stats.eigenvalues.double() / exact[:RANK] - 1).abs()
    rows = [[f"first {n}", f"{100 * float(error[:n].max()):.3f} %"] for n in (16, 64, 128, 256)]
    note = (
        f"D = {s.big:,}, rank {RANK}, {s.samples:,} streamed samples, variances 1/k; peak memory of the process"
        f" {peak_memory(CPU):.2f} GiB; {took:.0f} s."
    )
    return {"table": np.array(f"{markdown_table(['eigenvalues', 'largest error'], rows)}\n\n{note}")}


def spread(z: torch.Tensor, signs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows (n, inner) isometrically as (n, D): each coordinate over D/inner places, with random signs."""
    copies = len(signs) // z.shape[1]
    for chunk in z.split(50):
        yield chunk.repeat_interleave(copies, 1) * signs / copies**0.5
