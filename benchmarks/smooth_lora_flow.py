"""Smooth-LoRAs on the flow-matching transformer against it and a plain LoRA (λ = 0), at the same noise and prompts."""

from __future__ import annotations

from typing import Any

from .flow_runs import SHORT, flow_reads, model_folder
from .framework.bench import Bench
from .smooth_lora import Settings, Subject, write

WRITES = ("smooth_lora_flow.md", "smooth_lora_flow_seeds.md", "smooth_lora_flow.png")
# As on the card of smooth-lora-fashion-flow, which is the row λ = 10. Levels are drawn evenly, since the noise decides
# on the image at the high ones.
OPTIONS: dict[str, Any] = {"weighting_scheme": "none", "running_mean": "per_timestep", **SHORT}


def main(bench: Bench) -> None:
    """Trains and measures what is missing, and writes the pages."""
    s = bench.pick(
        Settings(weights=(0, 1, 10), paths=60, images=400, samples=4000, guidances=(3.0,)),
        Settings((0, 1), (0,), 2, 4, 2, 1, 4, 16, (3.0,)),
    )
    base = model_folder(bench)
    weight = max(s.weights)
    options = tuple(OPTIONS.items())
    write(bench, s, Subject("smooth_lora_flow", "Euler", flow_reads(base), options, (base,), weight=weight))
