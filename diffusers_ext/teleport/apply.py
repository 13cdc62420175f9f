"""Teleportation for a whole pipeline: `apply_teleport(pipe, stats)` and `remove_teleport(pipe)`."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.families import (
    check_starts_from_noise,
    check_steps,
    denoisers_of,
    family_of,
    grid_shape,
    guidance_of,
    uncompiled,
)
from ..core.features import features_of
from ..core.hooks import add_hook, parameters_of
from ..core.prompts import PromptReader, check_encodes, differing_options
from ..core.schedules import scaling
from .gaussian import GaussianStats
from .scheduler import TeleportScheduler

# Attribute of a pipeline with the handles of its hooks, which `remove_teleport` removes.
_ATTRIBUTE = "_teleport_handles"

# Names that denoisers have for the latents and the timestep.
_LATENTS = ("sample", "hidden_states", "x")
_TIME = ("timestep", "timesteps", "t")


def apply_teleport(
    pipe: Any,
    stats: GaussianStats | None = None,
    skip: float | str = "auto",
    sigma: float | None = None,
    mean_from: str = "stats",
) -> Any:
    """Makes `pipe` skip its first steps.

    With a prompt map in the statistics (`fit_prompt_map`), every image starts from the mean of its own
    prompt, and the transport follows the guidance of the call, including negative prompts. Without a negative
    prompt, it follows it if the statistics have an `unconditional` part. This costs no denoiser call.

    Pipelines that share one denoiser may take turns, or sample at the same time in threads of their own.

    Args:
        pipe: a `DiffusionPipeline` that starts from pure noise and whose denoiser is one of
            `diffusers_ext.core.families.FAMILIES`.
        stats: statistics of the pipeline's latents, (C, H, W) or, of videos, (C, T, H, W), also if the pipeline
            packs them. None only for a pipeline whose scheduler already is a `TeleportScheduler`, for example
            after loading a saved pipeline. Then only the missing hooks are added.
        skip, sigma, mean_from: see `TeleportScheduler`.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: a pipeline that teleportation does not work on (see `check_pipeline`), statistics of packed
            latents, a prompt map for a pipeline without `encode_prompt`, an argument that is invalid for
            `TeleportScheduler`, or teleportation is on this pipeline already. With a prompt map, a guided call
            raises it if the pipeline changes the output u + w(c − u) of classifier-free guidance.
    """
    check_pipeline(pipe)
    scheduler = pipe.scheduler
    on = isinstance(scheduler, TeleportScheduler)
    if on and (teleport_is_on(pipe) or stats is not None):
        raise ValueError(
            "Teleportation is on this pipeline already. Call dx.remove_teleport(pipe) first to change it."
        )
    if not on:
        if stats is None:
            raise ValueError("apply_teleport needs stats: a GaussianStats fitted on this pipeline's latents.")
        scheduler = TeleportScheduler.from_scheduler(scheduler, stats, skip, sigma=sigma, mean_from=mean_from)
        _drop_hooks(pipe)  # left over if the user has replaced a TeleportScheduler by hand
    _check_stats(pipe, scheduler.stats, scheduler.mean_from)
    scheduler.set_layout(family_of(pipe).layout)
    start = _CallStart(pipe)
    handles: list[Any] = []
    if hasattr(pipe, "prepare_latents"):
        handles.append(add_hook(pipe, "prepare_latents", start.prepared))
    if scheduler.mean_from == "stats":
        if scheduler.stats.prompt_map is not None:
            handles.append(start.reader.attach())
        if not _scales_its_input(pipe):
            handles += _add_hooks(pipe, scheduler)
    vars(pipe)[_ATTRIBUTE] = handles
    pipe.scheduler = scheduler
    return pipe


def check_pipeline(pipe: Any) -> None:
    """Raises a ValueError if teleportation does not work on the pipeline.

    It does not work on a denoiser that is not in `diffusers_ext.core.families.FAMILIES`, a pipeline that starts from
    an image or is a projector, a scheduler whose noise levels are not known, and packed latents of unknown size (Modular Flux).
    """
    check_steps(pipe)
    family = family_of(pipe)
    if hasattr(pipe, "prepare_latents"):
        check_starts_from_noise(pipe)
    elif family.layout != "grid":
        raise ValueError(
            f"{type(pipe).__name__} packs its latents and has no prepare_latents, which tells their size. Use the"
            " classic pipeline of the same components, such as FluxPipeline."
        )
    scheduler = pipe.scheduler
    scaling(scheduler.inner if isinstance(scheduler, TeleportScheduler) else scheduler)


def _check_stats(pipe: Any, stats: GaussianStats, mean_from: str) -> None:
    if len(stats.shape) == 2 and family_of(pipe).layout != "grid":
        raise ValueError(
            f"The statistics were fitted on packed latents {stats.shape}, of which one number of tokens may belong to"
            " several sizes. Fit them again, to latents (C, H, W) as pipeline_samples and encoded_images give them."
        )
    if stats.prompt_map is None or mean_from != "stats":
        return
    check_prompt_map(pipe)


def check_prompt_map(pipe: Any) -> None:
    """Raises a ValueError if teleportation with a prompt map does not work on the pipeline."""
    check_pipeline(pipe)
    try:
        check_encodes(pipe)
    except ValueError as error:
        raise ValueError(
            f"A prompt map needs the prompts of the calls, and {error} Use statistics without the map,"
            " dataclasses.replace(stats, prompt_map=None), and set the means with scheduler.set_mean."
        ) from None


def remove_teleport(pipe: Any) -> Any:
    """Restores the pipeline's original scheduler object and removes the hooks; no-op if teleportation is off."""
    _drop_hooks(pipe)
    if isinstance(pipe.scheduler, TeleportScheduler):
        pipe.scheduler = pipe.scheduler.inner
    return pipe


def teleport_is_on(pipe: Any) -> bool:
    """Whether `apply_teleport` has added teleportation to `pipe`."""
    return _ATTRIBUTE in vars(pipe)


def hook_count(pipe: Any) -> int:
    """Number of denoisers of `pipe` that have a teleportation hook."""
    return sum(isinstance(handle, RemovableHandle) for handle in vars(pipe).get(_ATTRIBUTE, []))


class _CallStart:
    """Tells the pipeline's `TeleportScheduler` the size of a call's latents and the means of its prompts.

    Attributes:
        reader: has the prompts, if it is attached.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.reader = pipe, PromptReader(pipe)

    def prepared(self, given: dict[str, Any], prepared: Any) -> Any:
        """Hook of `prepare_latents`, which pipelines call after `encode_prompt` and before the first step."""
        scheduler = self.pipe.scheduler
        if isinstance(scheduler, TeleportScheduler):
            latents = prepared[0] if isinstance(prepared, tuple) else prepared
            scheduler.set_layout(family_of(self.pipe).layout, grid_shape(self.pipe, latents, given))
            # A subclass is a probe, which needs no mean.
            reads = type(scheduler) is TeleportScheduler and scheduler.mean_from == "stats"
            if reads and scheduler.stats.prompt_map is not None:
                self._tell_mean(scheduler, len(latents))
        return prepared

    def _tell_mean(self, scheduler: TeleportScheduler, rows: int) -> None:
        """Sets the means of `rows` images, or the reason why there are none; see `apply_teleport`.

        The unconditional Gaussian represents the empty prompt. A negative prompt has its own mean and the same
        covariance. With equal covariances, guidance only shifts the mean: μ₋ + w(μ − μ₋).
        """
        reader, stats, name = self.reader, scheduler.stats, type(self.pipe).__name__
        if not reader.present or reader.prompt is None:
            scheduler.refuse_mean(
                f"{name} encoded no prompt in this call: give it a prompt and no prompt_embeds, or remove the map with"
                " dataclasses.replace(stats, prompt_map=None)."
            )
            return
        assert stats.prompt_map is not None
        differing = differing_options(stats.prompt_map.options, reader.arguments)
        if differing:
            scheduler.refuse_mean(
                f"The prompt map was fitted to other embeddings of the prompts than this call has: {differing}"
            )
            return
        guidance = guidance_of(self.pipe)
        weight = guidance.weight(reader.arguments)
        altered = guidance.altered(reader.arguments) if weight != 1 else None
        mean = stats.prompt_mean(features_of(self.pipe, reader.prompt.repeat_to(rows)))
        if altered is not None:
            scheduler.refuse_mean(
                f"The transport follows the guided flow u + w(c − u), and {name} does not in this call. {altered}"
                ' Or use mean_from="first_call".'
            )
        elif weight == 1 or not _has_negative(reader.arguments):
            scheduler.set_mean(mean, weight if stats.unconditional is not None else 1.0)
        elif reader.negative is None:
            scheduler.refuse_mean(
                f"{name}.encode_prompt returns no embeddings of the negative prompt. Call it without a negative"
                " prompt."
            )
        else:
            away = stats.prompt_mean(features_of(self.pipe, reader.negative.repeat_to(rows)))
            scheduler.set_mean(away + weight * (mean - away))


def _has_negative(call: Mapping[str, Any]) -> bool:
    """Whether there is a negative prompt other than the empty one, for any of the text encoders."""
    given = [value for name, value in call.items() if name.startswith("negative_prompt")]
    parts = [part for value in given for part in (value if isinstance(value, list | tuple) else [value])]
    return any(isinstance(part, Tensor) or bool(part) for part in parts)


@contextmanager
def telling_layout(pipe: Any) -> Iterator[None]:
    """Within the block, a `TeleportScheduler` set on the pipeline by hand is told the layout of its latents."""
    if not hasattr(pipe, "prepare_latents"):
        yield
        return
    handle = add_hook(pipe, "prepare_latents", _CallStart(pipe).prepared)
    try:
        yield
    finally:
        handle.remove()


def _scales_its_input(pipe: Any) -> bool:
    """Whether the pipeline's own `__call__` passes the model input through `scheduler.scale_model_input`.

    This is False for a subclass that only wraps the call of its base class. Such a pipeline gets a hook that
    does nothing, because the scheduler knows whether `scale_model_input` was called.
    """
    code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None)
    return code is not None and "scale_model_input" in code.co_names


def _add_hooks(pipe: Any, scheduler: TeleportScheduler) -> list[Any]:
    # torch's pre-hooks and not diffusers' ModelHook, which replaces `forward` as CPU offloading does and
    # cannot be removed while offloading is on. Pre-hooks compose and can be removed completely.
    parts = [*denoisers_of(pipe), getattr(pipe, "controlnet", None)]
    models = [part for part in parts if isinstance(part, nn.Module)]
    return [
        model.register_forward_pre_hook(_InputHook(pipe, model, scheduler), with_kwargs=True)
        for model in models
    ]


class _InputHook:
    """A pre-hook of a denoiser of `pipe`: passes the latents through `scheduler.map_model_input`."""

    def __init__(self, pipe: Any, model: nn.Module, scheduler: TeleportScheduler) -> None:
        self.pipe, self.scheduler = pipe, scheduler
        self.reversed_time = family_of(pipe).reversed_time
        # The forward of torch.compile(model) takes any arguments; the names are those of the model inside.
        self.names = list(parameters_of(uncompiled(model), "forward"))
        self.latents = next((name for name in (*_LATENTS, *self.names) if name in self.names), None)
        self.time = next((name for name in _TIME if name in self.names), "timestep")

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        given = {**dict(zip(self.names, args)), **kwargs}
        if self.latents not in given:
            return args, kwargs
        time = given.get(self.time)
        if time is not None and self.reversed_time:
            time = 1 - time
        mapped = self._mapped(given[self.latents], time)
        if mapped is given[self.latents]:
            return args, kwargs
        if self.latents in kwargs:
            return args, {**kwargs, self.latents: mapped}
        position = self.names.index(self.latents)
        return (*args[:position], mapped, *args[position + 1 :]), kwargs

    def _mapped(self, latents: Any, time: Any) -> Any:
        if isinstance(latents, Tensor):
            return self.scheduler.map_model_input(latents, time)
        # Z-Image: a list of (C, 1, H, W), for a pipeline with latents (B, C, H, W).
        stacked = torch.stack(latents).squeeze(2)
        mapped = self.scheduler.map_model_input(stacked, time)
        return latents if mapped is stacked else list(mapped.unsqueeze(2))

    def __deepcopy__(self, memo: dict[int, Any]) -> "_InputHook":
        # A copy of the denoiser alone still belongs to the original pipeline, as a shared denoiser does.
        copied = copy.copy(self)
        if id(self.pipe) in memo:
            copied.pipe, copied.scheduler = copy.deepcopy((self.pipe, self.scheduler), memo)
        return copied


def _drop_hooks(pipe: Any) -> None:
    for handle in vars(pipe).pop(_ATTRIBUTE, []):
        handle.remove()


def describe(pipe: Any) -> str | None:
    """The line of `dx.summary` about teleportation on `pipe`; None if it is off."""
    scheduler = getattr(pipe, "scheduler", None)
    if not isinstance(scheduler, TeleportScheduler):
        return None
    reach = f"skip={scheduler.skip!r}" if scheduler.sigma is None else f"sigma={scheduler.sigma:g}"
    parts = [
        type(scheduler.inner).__name__,
        reach,
        f"mean from {scheduler.mean_from}",
        f"rank {scheduler.stats.rank}",
        f"{hook_count(pipe)} hook(s)",
    ]
    if scheduler.skipped_to is not None:
        parts.append(f"last run skipped {scheduler.num_skipped_steps} steps to σ={scheduler.skipped_to:.3g}")
    return ", ".join(parts)
