"""A flow-matching transformer at a fixed noise level as a projector onto the data.

A noisy state is x_σ = (1 − σ)x₀ + σε, and v is an estimate of ε − x₀ (see `training.transformers`). The projector has
its input z in the scale of the data, as that of a UNet has: f(z) = x − σ*v(x, σ*) with x = (1 − σ*)z. Nothing is
divided by 1 − σ. The noise level of z is σ*/(1 − σ*).
"""

from __future__ import annotations

import copy
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
from ..training.transformers import FLOWS, Flow, encode_captions, flow_of, without_padding
from .held_time import hold_time, time_features, time_layer
from .projector import Projector
from .source import MixtureSource

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
        source: MixtureSource | None = None,
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
    def sigma(self) -> float:
        """The noise level σ*/(1 − σ*), at which samples start."""
        return self.timestep / (TIMES - self.timestep)

    def forward(self, x: Tensor, sigma: float | None = None, **conditions: Any) -> Tensor:
        """f(x).

        Args:
            x: (b, C, H, W) clean data, noisy data or the output of `start`, in the grid layout.
            sigma: noise level of x, for a time-conditional projector. None or 0 is the projector's own.
            conditions: from `conditions_of`, for b images.

        Returns:
            (b, C, H, W) in the dtype of x.
        """
        level = self.timestep / TIMES if self.held or not sigma else flow_sigma(sigma)
        times = torch.full((len(x),), level, device=x.device)
        sample = (1 - level) * x
        velocity = self.flow.velocity(self.transformer, sample, times, self.guidance, **conditions)
        clean = clean_prediction(velocity.float(), sample.float(), 1 - level, level, "flow_prediction")
        return clean.to(x.dtype)


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


def conditions_of(
    stock: Any, prompts: list[str], repeats: int, dtype: torch.dtype, max_sequence_length: int | None = None
) -> dict[str, Tensor]:
    """The prompt arguments of the transformer for `repeats` images of each prompt, one after the other."""
    texts = without_padding(encode_captions(stock, prompts, max_sequence_length))
    texts = {name: value.repeat_interleave(repeats, 0) for name, value in texts.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in texts.items()}


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
    """The arguments of `SIGNPipeline` for a projector with the network of a flow.

    Args:
        teacher: see `check_flow_teacher`.
        sigma: noise level of the projector, see `flow_sigma`.
        held: the network is a copy whose time is held, unless its embedder has no bias (Flux.2). Otherwise it is that of
            the teacher.
        max_sequence_length: see `SIGNPipeline`.
    """
    check_flow_teacher(teacher)
    level, transformer, flow = flow_sigma(sigma), teacher.transformer, flow_of(teacher)
    size = transformer.config.get(
        "sample_size"
    )  # one number: the side of the squares that most training was on
    embedded = guidance_of(teacher).embedded
    guidance = parameters_of(teacher)[embedded].default if embedded else None
    if held and time_layer(transformer).bias is not None:
        transformer = copy.deepcopy(transformer)
        side = 2 * token_side(teacher)
        zeros = torch.zeros(
            1, flow.channels(transformer), side, side, device=transformer.device, dtype=transformer.dtype
        )
        texts = conditions_of(teacher, [""], 1, transformer.dtype, max_sequence_length)
        times = torch.full((1,), level, device=transformer.device)
        features = time_features(
            transformer, lambda: flow.velocity(transformer, zeros, times, guidance, **texts)
        )
        hold_time(transformer, features)
    return {
        **{name: teacher.components.get(name) for name in ("vae", *TEXTS)},
        "unet": None,
        "transformer": transformer,
        "scheduler": projector_scheduler(held),
        "timestep": TIMES * level,
        "teacher": known_class(type(teacher), FLOWS),
        "held": held,
        "guidance": guidance,
        "max_sequence_length": max_sequence_length,
        "sample_size": (size, size) if isinstance(size, int) else None,
    }
