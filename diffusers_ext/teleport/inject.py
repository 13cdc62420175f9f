"""Teleportation on a whole pipeline: `apply_teleport(pipe, stats)` and `remove_teleport(pipe)`."""

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

from .gaussian import GaussianStats
from .scheduler import TeleportScheduler

# The hooks of every pipeline that has teleportation on now.
_HANDLES: "WeakKeyDictionary[Any, list[RemovableHandle]]" = WeakKeyDictionary()

# Components that are shown the latents, and what they call them and the time.
_MODELS = ("unet", "transformer", "controlnet")
_LATENTS = ("sample", "hidden_states")
_TIME = ("timestep", "timesteps")


def apply_teleport(
    pipe: Any,
    stats: GaussianStats | None = None,
    skip: float | str = "auto",
    sigma: float | None = None,
    mean_from: str = "stats",
) -> Any:
    """Makes `pipe` skip its first steps; works for every pipeline, also those that scale no model input.

    Args:
        pipe: a `DiffusionPipeline` that starts from pure noise.
        stats: as for `TeleportScheduler`. None only for a pipeline whose scheduler is a `TeleportScheduler`
            already, as after loading a saved one: then just the hook it may need is added.
        skip, sigma, mean_from: as for `TeleportScheduler`.

    Returns:
        `pipe` itself.

    Pipelines that share one denoiser may take turns, but must not sample at the same time.

    Raises:
        ValueError: teleportation is on this pipeline already, or what `TeleportScheduler` refuses.
    """
    scheduler = pipe.scheduler
    on = isinstance(scheduler, TeleportScheduler)
    if on and (pipe in _HANDLES or stats is not None):
        raise ValueError(
            "Teleportation is on this pipeline already. Call dx.remove_teleport(pipe) first to change it."
        )
    if not on:
        if stats is None:
            raise ValueError("apply_teleport needs stats: a GaussianStats fitted on this pipeline's latents.")
        scheduler = TeleportScheduler.from_scheduler(scheduler, stats, skip, sigma=sigma, mean_from=mean_from)
        _drop_hooks(pipe)  # of an earlier one, if the user has replaced the scheduler by hand since
    needs_hook = scheduler.mean_from == "stats" and not _scales_its_input(pipe)
    _HANDLES[pipe] = _add_hooks(pipe, scheduler) if needs_hook else []
    pipe.scheduler = scheduler
    return pipe


def remove_teleport(pipe: Any) -> Any:
    """Gives `pipe` its original scheduler object back and takes the hooks off; no-op where none is on."""
    _drop_hooks(pipe)
    if isinstance(pipe.scheduler, TeleportScheduler):
        pipe.scheduler = pipe.scheduler.inner
    return pipe


def hook_count(pipe: Any) -> int:
    """How many denoisers of `pipe` carry a teleportation hook now."""
    return len(_HANDLES.get(pipe, []))


def _scales_its_input(pipe: Any) -> bool:
    """Whether the pipeline's own `__call__` passes the model input through `scheduler.scale_model_input`.

    A subclass that only wraps the call of its base answers no and is given a hook, which then stays idle:
    the scheduler knows whether it was shown the input.
    """
    code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None)
    return code is not None and "scale_model_input" in code.co_names


def _add_hooks(pipe: Any, scheduler: TeleportScheduler) -> list[RemovableHandle]:
    # torch's own pre-hooks and not diffusers' ModelHook: those replace `forward` and cannot be taken out from
    # under CPU offloading, which replaces it too; these compose, and leave nothing behind.
    models = [m for m in (getattr(pipe, name, None) for name in _MODELS) if isinstance(m, nn.Module)]
    if not models:
        raise ValueError(
            f"{type(pipe).__name__} has none of the components {', '.join(_MODELS)}; wrap its scheduler with "
            'mean_from="first_call", which needs no hook.'
        )
    return [model.register_forward_pre_hook(_hook(model, scheduler), with_kwargs=True) for model in models]


def _hook(model: nn.Module, scheduler: TeleportScheduler) -> Callable[..., Any]:
    names = list(inspect.signature(model.forward).parameters)
    latents = next((name for name in _LATENTS if name in names), names[0])
    time = next((name for name in _TIME if name in names), "timestep")

    def pre_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = {**dict(zip(names, args)), **kwargs}
        if latents not in given:
            return args, kwargs
        mapped = scheduler.map_model_input(given[latents], given.get(time))
        if mapped is given[latents]:
            return args, kwargs
        if latents in kwargs:
            return args, {**kwargs, latents: mapped}
        position = names.index(latents)
        return (*args[:position], mapped, *args[position + 1 :]), kwargs

    return pre_forward


def _drop_hooks(pipe: Any) -> None:
    for handle in _HANDLES.pop(pipe, []):
        handle.remove()
