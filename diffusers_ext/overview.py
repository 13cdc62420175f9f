"""`summary(pipe)`: which methods of this package are on a pipeline now."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Summary:
    """What is on one pipeline; `str()` of it is the report.

    Attributes:
        pipeline: class name of the pipeline.
        methods: one line for every method that is on, by its name; empty for a plain pipeline.
    """

    pipeline: str
    methods: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"  {name}: {text}" for name, text in self.methods.items()] or ["  nothing added"]
        return "\n".join([self.pipeline, *lines])


def summary(pipe: Any) -> Summary:
    """A small report of the methods on `pipe`; `print(dx.summary(pipe))`."""
    found = {
        "teleport": _teleport(pipe),
        "golden noise": _golden_noise(pipe),
        "Smooth-LoRA": _smooth_lora(pipe),
        "SIGN": _sign(pipe),
        "A-SDM": _asdm(pipe),
    }
    return Summary(type(pipe).__name__, {name: text for name, text in found.items() if text})


def _teleport(pipe: Any) -> str | None:
    from .teleport.inject import hook_count
    from .teleport.scheduler import TeleportScheduler

    scheduler = getattr(pipe, "scheduler", None)
    if not isinstance(scheduler, TeleportScheduler):
        return None
    reach = f"skip={scheduler.skip!r}" if scheduler.sigma is None else f"sigma={scheduler.sigma:g}"
    parts = [
        type(scheduler.inner).__name__,
        reach,
        f"mean from {scheduler.mean_from}",
        f"rank {len(scheduler.stats.eigenvalues)}",
        f"{hook_count(pipe)} hook(s)",
    ]
    if scheduler.skipped_to is not None:
        parts.append(f"last run skipped {scheduler.num_skipped_steps} steps to σ={scheduler.skipped_to:.3g}")
    return ", ".join(parts)


def _golden_noise(pipe: Any) -> str | None:
    from .golden_noise.inject import golden_noise_of

    applied = golden_noise_of(pipe)
    npnet = applied.npnet if applied else getattr(pipe, "npnet", None)
    if npnet is None:
        return None
    kind = "released architecture" if npnet.config.legacy else "compact"
    parts = [f"{kind} NPNet, {npnet.num_parameters() / 1e6:.2f}M parameters"]
    parts.append(f"strength {applied.strength:g}" if applied else "a component of the pipeline")
    return ", ".join(parts)


def _smooth_lora(pipe: Any) -> str | None:
    from .smooth_lora.adapter import smooth_loras_of

    parts = [
        f"adapter {name!r} of rank {rank}{'' if active else ' (not active)'}"
        for name, (rank, active) in smooth_loras_of(pipe).items()
    ]
    return ", ".join(parts) or None


def _sign(pipe: Any) -> str | None:
    from .sign.pipelines import SIGNPipeline

    if not isinstance(pipe, SIGNPipeline):
        return None
    return f"projector at timestep {pipe.config.timestep}, σ={pipe.sigma:.3g}"


def _asdm(pipe: Any) -> str | None:
    from .asdm.gri_attention import gri_attention_of

    found = gri_attention_of(pipe)
    if found is None:
        return None
    paths, window, pool = found
    return f"GRI attention in {len(paths)} layer(s), window {window}, pool {pool}"
