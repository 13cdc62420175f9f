"""What a training step with the step-wise variation loss costs, as a share of a plain LoRA's.

    python benchmarks/smooth_lora_cost.py --sample_size 32

A UNet of Stable Diffusion 1.5's shape with random weights; a step is forward, backward and the optimiser's. The variants
take turns, so that a change of the machine's speed meets them all; each one's peak memory is that of a process of its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from diffusers_ext.metrics.comparison import markdown_table
from diffusers_ext.smooth_lora.training import SmoothLoraObjective, add_lora
from diffusers_ext.smooth_lora.variation import StepwiseVariationLoss

# Name: estimator (None for a plain LoRA), gradient checkpointing.
VARIANTS: dict[str, tuple[str | None, bool]] = {
    "plain LoRA": (None, False),
    "vjp": ("vjp", False),
    "finite difference": ("finite_difference", False),
    "plain LoRA, gradient checkpointing": (None, True),
    "finite difference, gradient checkpointing": ("finite_difference", True),
}


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sample_size", type=int, default=32, help="of the latents; 64 for 512 × 512 images")
    add("--batch_size", type=int, default=1)
    add("--width", type=int, default=320, help="of the first level; 320 for Stable Diffusion 1.5")
    add("--repetitions", type=int, default=3)
    add("--output_dir", type=Path, default=Path("benchmarks/results"))
    add("--variant", choices=list(VARIANTS), default=None, help="one alone: prints its peak memory as JSON")
    return parser.parse_args()


class Steps:
    """Training steps on one UNet, whose LoRA all variants share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        width = args.width
        unet: Any = UNet2DConditionModel(
            sample_size=args.sample_size,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            cross_attention_dim=768,
        )
        add_lora(unet, 8)
        self.unet = unet.to(self.device).train()
        shape = (args.batch_size, 4, args.sample_size, args.sample_size)
        self.batch = {
            name: torch.randn(shape, device=self.device) for name in ("latents", "noise", "direction")
        }
        self.batch["timesteps"] = torch.full((args.batch_size,), 500, device=self.device)
        self.batch["prompt_embeds"] = torch.randn(args.batch_size, 77, 768, device=self.device)
        self.optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], 1e-4)

    def run(self, variant: str) -> float:
        """Seconds of one step."""
        estimator, checkpointing = VARIANTS[variant]
        (
            self.unet.enable_gradient_checkpointing
            if checkpointing
            else self.unet.disable_gradient_checkpointing
        )()
        variation = None if estimator is None else StepwiseVariationLoss(estimator=estimator)
        objective = SmoothLoraObjective(self.unet, DDPMScheduler(), variation).to(self.device)
        self._wait()
        start = time.perf_counter()
        objective(**self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory(self, variant: str) -> float:
        """GiB that a step takes beyond the weights, at its peak."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            self.run(variant)
            return (torch.cuda.max_memory_allocated() - before) / 2**30
        before = _peak()
        self.run(variant)
        return _peak() - before


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_of(variant: str) -> float:
    """Of a fresh process with these arguments."""
    command = [sys.executable, *sys.argv, "--variant", variant]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Measures and writes the page."""
    args = parse_args()
    if args.variant is not None:
        print(json.dumps(Steps(args).memory(args.variant)))
        return
    memory = {name: peak_of(name) for name in VARIANTS}
    steps = Steps(args)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.repetitions + 1):
        for name in VARIANTS:
            seconds[name].append(steps.run(name))
    plain = next(iter(VARIANTS))
    rows = []
    for name in VARIANTS:
        # The first round warms up. Ratios within a round, so that a slower machine slows both.
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds[plain][1:])]
        rows.append(
            [
                name,
                f"{statistics.median(seconds[name][1:]):.2f}",
                f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                f"{memory[name]:.2f}",
                f"{memory[name] / memory[plain]:.2f}",
            ]
        )
    header = ["a step of", "seconds", f"of {plain}'s", "GiB beyond the weights", f"of {plain}'s"]
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads"
    )
    count = sum(p.numel() for p in steps.unet.parameters()) / 1e6
    about = (
        f"UNet of {count:.0f} million parameters, latents {args.batch_size} × 4 × {args.sample_size} × {args.sample_size},"
        f" float32, {device}; median and range of {args.repetitions} rounds."
    )
    page = f"{markdown_table(header, rows)}\n\n{about}\n"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "smooth_lora_cost.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
