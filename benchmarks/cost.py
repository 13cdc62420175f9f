"""What the map costs beside one denoiser call at Stable Diffusion 1.5's shape, and what a large fit costs.

    python benchmarks/cost.py --output_dir benchmarks/results

The denoiser has Stable Diffusion 1.5's configuration and random weights; multiply-adds are counted, times are
medians in one process. The fit streams 2,000 samples of 65,536 dimensions with known eigenvalues 1/k.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

import diffusers_ext as dx
from diffusers_ext.metrics.comparison import markdown_table

SHAPE, RANK = (4, 64, 64), 256
BIG, BIG_SAMPLES = 65_536, 2_000


def main() -> None:
    """Measures both and writes cost.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    # First, as the peak of a process never falls.
    text = f"{fit_cost()}\n\n{map_cost(args.repeats)}\n"
    (args.output_dir / "cost.md").write_text(text)
    print(text)


def map_cost(repeats: int) -> str:
    """One image's map beside one call of the denoiser."""
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    ).eval()
    stats = random_stats()
    x, context = torch.randn(1, *SHAPE), torch.randn(1, 77, 768)
    work: dict[str, Callable[[], Any]] = {
        "one denoiser call": lambda: unet(x, 900, encoder_hidden_states=context),
        "the map": lambda: stats.transport(x, (1.0, 14.6), (1.0, 5.0)),
        "the map under guidance 7.5": lambda: stats.transport(x, (1.0, 14.6), (1.0, 5.0), guidance_scale=7.5),
    }
    base, rows = (0.0, 0.0), []
    for name, function in work.items():
        figures = multiply_adds(function), seconds(function, repeats)
        base = figures if not rows else base
        shares = [f"{100 * f / b:.4f} %" for f, b in zip(figures, base)]
        rows.append([name, f"{figures[0] / 1e9:.4f}", shares[0], f"{1e3 * figures[1]:.2f}", shares[1]])
    header = ["", "multiply-adds, 10⁹", "share", "milliseconds", "share"]
    note = f"\n\nLatents {SHAPE}, D = 16,384, rank {RANK}; one image; {torch.get_num_threads()} CPU threads."
    return markdown_table(header, rows) + note


def random_stats() -> dx.GaussianStats:
    """Within-prompt statistics of Stable Diffusion's latent size, with an unconditional part."""
    size = torch.Size(SHAPE).numel()

    def one(top: float, unconditional: dx.GaussianStats | None = None) -> dx.GaussianStats:
        basis, _ = torch.linalg.qr(torch.randn(size, RANK))
        values = top / torch.arange(1, RANK + 1)
        return dx.GaussianStats(torch.zeros(SHAPE), basis, values, 0.2, 1000, unconditional=unconditional)

    return one(100.0, one(400.0))


def multiply_adds(function: Callable[[], Any]) -> float:
    """Of the matrix products and convolutions of a later call; the counter counts two operations for each.

    The first guided map also finds the basis it works in, once for the statistics.
    """
    function()
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def fit_cost() -> str:
    """Peak memory and accuracy of a streamed fit whose exact eigenvalues are those of its small factor."""
    # x = z diag(√λ) Qᵀ with orthonormal Q: the sample covariance has the eigenvalues of that of z diag(√λ).
    inner = 1024
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(BIG_SAMPLES, inner, generator=generator) / torch.arange(1, inner + 1).sqrt()
    exact = torch.linalg.svdvals((z - z.mean(0)).double()).square() / (BIG_SAMPLES - 1)
    signs = torch.randint(0, 2, (BIG,), generator=generator).float() * 2 - 1
    start = time.perf_counter()
    stats = dx.GaussianStats.fit(spread(z, signs), RANK)
    took = time.perf_counter() - start
    error = (stats.eigenvalues.double() / exact[:RANK] - 1).abs()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows = [[f"first {n}", f"{100 * float(error[:n].max()):.3f} %"] for n in (16, 64, 128, 256)]
    note = f"\n\nD = {BIG:,}, rank {RANK}, {BIG_SAMPLES:,} streamed samples, variances 1/k; peak memory of the process"
    return markdown_table(["eigenvalues", "largest error"], rows) + f"{note} {peak:.2f} GiB; {took:.0f} s."


def spread(z: torch.Tensor, signs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows (n, 1024) isometrically as (n, 65,536): each coordinate over 64 places, with random signs."""
    copies = BIG // z.shape[1]
    for chunk in z.split(50):
        yield chunk.repeat_interleave(copies, 1) * signs / copies**0.5


if __name__ == "__main__":
    main()
