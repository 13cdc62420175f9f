"""What a training step with the step-wise variation loss costs, as a share of a plain LoRA's.

A UNet of Stable Diffusion 1.5's shape with random weights; a step is forward, backward and the optimiser's. The variants
take turns, so that a change of the machine's speed meets them all; each one's peak memory is that of a process of its own.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from diffusers_ext.metrics.comparison import Estimate, markdown_table
from diffusers_ext.smooth_lora.training import SmoothLoraObjective
from diffusers_ext.smooth_lora.variation import StepwiseVariationLoss
from diffusers_ext.training.lora import add_lora

from .framework.bench import Bench
from .framework.cells import Cell
from .framework.timing import device_name, peak_memory, take_turns

WRITES = ("smooth_lora_cost.md",)
# Name: estimator (None for a plain LoRA), gradient checkpointing.
VARIANTS: dict[str, tuple[str | None, bool]] = {
    "plain LoRA": (None, False),
    "vjp": ("vjp", False),
    "finite difference": ("finite_difference", False),
    "plain LoRA, gradient checkpointing": (None, True),
    "finite difference, gradient checkpointing": ("finite_difference", True),
}


@dataclass(frozen=True)
class Settings:
    """Side of the latents (64 for 512 × 512 images), width of the first level, rounds."""

    sample_size: int = 32
    width: int = 320
    repetitions: int = 3
    batch_size: int = 1


class Steps:
    """Training steps on one UNet, whose LoRA all variants share."""

    def __init__(self, args: Settings) -> None:
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

    def run(self, variant: str) -> None:
        """One step."""
        estimator, checkpointing = VARIANTS[variant]
        (
            self.unet.enable_gradient_checkpointing
            if checkpointing
            else self.unet.disable_gradient_checkpointing
        )()
        variation = None if estimator is None else StepwiseVariationLoss(estimator=estimator)
        objective = SmoothLoraObjective(self.unet, DDPMScheduler(), variation).to(self.device)
        objective(**self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def memory(variant: str, s: Settings) -> dict[str, Any]:
    """GiB that a step takes beyond the weights, at its peak."""
    steps = Steps(s)
    gpu = steps.device.type == "cuda"
    before = torch.cuda.memory_allocated() / 2**30 if gpu else peak_memory(steps.device)
    steps.run(variant)
    return {"GiB": peak_memory(steps.device) - before}


def seconds(s: Settings) -> dict[str, Any]:
    """Seconds of every variant's step, in turns, and what they were measured on."""
    steps = Steps(s)
    work = {name: partial(steps.run, name) for name in VARIANTS}
    times = take_turns(work, s.repetitions, 1, steps.device, "steps in turns")
    count = sum(p.numel() for p in steps.unet.parameters())
    return {**times, "parameters": count, "device": np.array(device_name(steps.device))}


def main(bench: Bench) -> None:
    """Measures and writes the page."""
    s = bench.pick(Settings(), Settings(8, 32, 1))
    peaks, timed = (
        {name: Cell(memory, (name, s), alone=True) for name in VARIANTS},
        Cell(seconds, (s,), alone=True),
    )
    found = bench.run([*peaks.values(), timed])
    times, plain = found[timed], next(iter(VARIANTS))
    gib = {name: float(found[cell]["GiB"]) for name, cell in peaks.items()}
    rows = []
    for name in VARIANTS:
        # Ratios within a round, so that a slower machine slows both.
        ratios = times[name] / times[plain]
        spread = Estimate(float(np.median(ratios)), float(ratios.min()), float(ratios.max()))
        share = gib[name] / gib[plain] if gib[plain] else float("nan")
        rows.append(
            [name, f"{np.median(times[name]):.2f}", spread.format(), f"{gib[name]:.2f}", f"{share:.2f}"]
        )
    header = ["a step of", "seconds", f"of {plain}'s", "GiB beyond the weights", f"of {plain}'s"]
    bench.write(
        "smooth_lora_cost.md",
        markdown_table(header, rows),
        f"UNet of {int(times['parameters']) / 1e6:.0f} million parameters, latents {s.batch_size} × 4 × {s.sample_size} ×"
        f" {s.sample_size}, float32, {times['device']}; median and range of {s.repetitions} rounds.",
    )
