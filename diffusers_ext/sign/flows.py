"""A flow-matching transformer at a fixed noise level as a projector onto the data.

A noisy state is x_σ = (1 − σ)x₀ + σε, and v is an estimate of ε − x₀ (see `training.transformers`). The projector has
its input z in the scale of the data, as that of a UNet has: f(z) = x − σ*v(x, σ*) with x = (1 − σ*)z. Nothing is
divided by 1 − σ. The noise level of z is σ*/(1 − σ*).
"""

from __future__ import annotations

import math
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..core.families import guidance_of, known_class, token_side
from ..core.hooks import parameters_of
from ..core.predictions import clean_prediction
from ..core.schedules import prediction_type
from ..training.transformers import FLOWS, Flow, flow_of
from .held_time import hold_time, time_features, time_layer
from .projector import Projector
from .source import Source

TIMES = 1000  # timesteps of a flow's scheduler
TEXTS = tuple(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))


def flow_sigma(level: float) -> float:
    """σ of the state (1 − σ)x₀ + σε whose noise level σ/(1 − σ), relative to unscaled data, is `level`.

    Raises:
        ValueError: the level is not a finite number above 0. At infinity, σ = 1, there is nothing to project.
    """
    if not (math.isfinite(level) and level > 0):
        raise ValueError(f"sigma must be a finite noise level above 0, got {level:g}.")
    return level / (1 + level)


def unshifted(sigma: float, shift: float) -> float:
    """What a scheduler with this static shift has to be asked for to step at σ: the inverse of its shift.

    The scheduler makes s·u/(1 + (s − 1)u) of u (Esser et al., arXiv:2403.03206, equation 23), so u = σ/(s − (s − 1)σ).
    """
    return sigma / (shift - (shift - 1) * sigma)


class FlowProjector(Projector):
    """The projector f of a flow: one transformer at one noise level, or at several if it is time-conditional.

    Args:
        transformer: of the flow's class.
        flow: how it is called.
        timestep: 1000σ*, above 0 and below 1000.
        source: see `Projector`.
        held: the time input is always σ*. A time-conditional projector is called at the level of its input.
        guidance: scale for a transformer with embedded guidance.

    Raises:
        ValueError: the timestep is not above 0 and below 1000.
    """

    def __init__(
        self,
        transformer: Any,
        flow: Flow,
        timestep: float,
        source: Source | None = None,
        held: bool = True,
        guidance: float | None = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        if not 0 < timestep < TIMES:
            raise ValueError(
                f"timestep must be above 0 and below {TIMES} for a flow, 1000 times its σ*, got {timestep:g}."
            )
        self.transformer, self.flow, self.timestep = transformer, flow, timestep
        self.source, self.held, self.guidance = source, held, guidance

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.transformer

    @property
    def sigma(self) -> float:
        """The noise level σ*/(1 − σ*), at which samples start."""
        return self.timestep / (TIMES - self.timestep)

    @property
    def num_times(self) -> int:
        """1000: a timestep is 1000σ."""
        return TIMES

    def time_at(self, level: float) -> float:
        """1000σ of the noise level σ/(1 − σ)."""
        return TIMES * flow_sigma(level)

    def times(self, values: Tensor) -> Tensor:
        """Timesteps 1000σ, (b,) float, unchanged: σ is continuous."""
        return values

    def levels(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(1 − σ, σ) at timesteps (b,), shaped to multiply `like`."""
        sigma = (times.float() / TIMES).reshape(-1, *[1] * (like.ndim - 1))
        return 1 - sigma, sigma

    def denoise(self, network: Any, noisy: Tensor, times: Tensor, **conditions: Any) -> Tensor:
        """The clean prediction x − σv of a transformer of this kind, see `Projector.denoise`."""
        alpha, sigma = self.levels(times, noisy)
        velocity = self.flow.velocity(network, noisy, times.float() / TIMES, self.guidance, **conditions)
        clean = clean_prediction(velocity.float(), noisy.float(), alpha, sigma, "flow_prediction")
        return clean.to(noisy.dtype)

    def forward(self, x: Tensor, sigma: float | None = None, **conditions: Any) -> Tensor:
        """f(x).

        Args:
            x: (b, C, H, W) clean data, noisy data or the output of `start`, in the grid layout.
            sigma: noise level of x, for a time-conditional projector. None or 0 is the projector's own.
            conditions: from `conditions_for`, for b images.

        Returns:
            (b, C, H, W) in the dtype of x.
        """
        return self._project(self.transformer, x, sigma, **conditions)

    def _project(self, network: Any, x: Tensor, sigma: float | None = None, **conditions: Any) -> Tensor:
        time = self.timestep if self.held or not sigma else TIMES * flow_sigma(sigma)
        times = torch.full((len(x),), float(time), device=x.device)
        alpha, _ = self.levels(times, x)
        return self.denoise(network, alpha.to(x.dtype) * x, times, **conditions)


def projector_scheduler(held: bool) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler with which the teacher's pipeline is the projector: asked for `sigmas`, it uses these.

    The shift of the teacher is left out. With stochastic sampling, a step is x₀ = x − σv and then (1 − σ')x₀ + σ'ε,
    as multistep sampling of a consistency model (Song et al., arXiv:2303.01469, algorithm 1).

    Args:
        held: False for a time-conditional network.
    """
    return FlowMatchEulerDiscreteScheduler(stochastic_sampling=not held)


def stock_pipeline(pipe: Any) -> Any:
    """The teacher's class of pipelines with the networks of a SIGNPipeline."""
    kind = getattr(diffusers, pipe.config.teacher)
    names = set(kind._get_signature_keys(kind)[0]) - set(kind._optional_components)
    return kind(**{name: getattr(pipe, name, None) for name in names})


def check_flow_teacher(pipe: Any) -> None:
    """Raises a ValueError unless a projector can be made of the flow: see `flow_of`."""
    flow_of(pipe)
    known = {"transformer", "scheduler", "vae", *TEXTS}
    extra = sorted(name for name, part in pipe.components.items() if part is not None and name not in known)
    if extra:
        raise ValueError(
            f"{type(pipe).__name__} has {', '.join(extra)}, which a projector does not have: expected the text-to-image"
            " pipeline without image prompts."
        )
    kind = prediction_type(pipe.scheduler)
    if kind != "flow_prediction":
        raise ValueError(
            f"{type(pipe).__name__} has a {type(pipe.scheduler).__name__} with prediction_type {kind!r}, expected"
            " 'flow_prediction', as of FlowMatchEulerDiscreteScheduler."
        )
    time_layer(pipe.transformer)


def flow_parts(
    teacher: Any, sigma: float, held: bool, max_sequence_length: int | None = None
) -> dict[str, Any]:
    """The arguments of `SIGNPipeline` for a projector with the network of a flow, which it shares.

    Args:
        teacher: see `check_flow_teacher`.
        sigma: noise level of the projector, see `flow_sigma`.
        held, max_sequence_length: see `SIGNPipeline`.
    """
    check_flow_teacher(teacher)
    level, transformer = flow_sigma(sigma), teacher.transformer
    # One number: the side of the squares that most training was on.
    size = transformer.config.get("sample_size")
    embedded = guidance_of(teacher).embedded
    return {
        **{name: teacher.components.get(name) for name in ("vae", *TEXTS)},
        "unet": None,
        "transformer": transformer,
        "scheduler": projector_scheduler(held),
        "timestep": TIMES * level,
        "teacher": known_class(type(teacher), FLOWS),
        "held": held,
        "guidance": parameters_of(teacher)[embedded].default if embedded else None,
        "max_sequence_length": max_sequence_length,
        "sample_size": (size, size) if isinstance(size, int) else None,
    }


def holds_in_weights(pipe: Any) -> bool:
    """Whether the time of a `SIGNPipeline` can be held in its weights: it is a flow's, and its embedder has a bias."""
    held = pipe.flow is not None and pipe.config["held"]
    return held and time_layer(pipe.transformer).bias is not None


def hold_in_weights(pipe: Any) -> None:
    """Holds the transformer of a `SIGNPipeline` at the projector's time, in place; see `hold_time`."""
    transformer, side = pipe.transformer, 2 * token_side(pipe.stock_pipeline)
    shape = 1, pipe.flow.channels(transformer), side, side
    zeros = torch.zeros(shape, device=transformer.device, dtype=transformer.dtype)
    texts, projector = pipe._conditions("", 1), pipe.projector
    hold_time(transformer, time_features(transformer, lambda: projector(zeros, **texts)))
