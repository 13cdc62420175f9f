"""Teleportation for a whole pipeline: `apply_teleport(pipe, stats)` and `remove_teleport(pipe)`."""

import copy
import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.pipeline import HookHandle, add_hook, embeddings_of, parameters_of
from .gaussian import GaussianStats
from .prompt_map import features_of
from .scheduler import TeleportScheduler

# Attribute of a pipeline with the handles of its hooks, which `remove_teleport` removes.
_ATTRIBUTE = "_teleport_handles"

# Components that take the latents, and their names for the latents and the timestep.
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
    """Makes `pipe` skip its first steps. Works with every pipeline, also without `scale_model_input`.

    With a prompt map in the statistics (`fit_prompt_map`), every image starts from the mean of its own
    prompt, and the transport follows the guidance of the call, including negative prompts. This costs no
    denoiser call.

    Pipelines that share one denoiser may take turns, or sample at the same time in threads of their own.

    Args:
        pipe: a `DiffusionPipeline` that starts from pure noise.
        stats: see `TeleportScheduler`. None only for a pipeline whose scheduler already is a
            `TeleportScheduler`, for example after loading a saved pipeline. Then only the missing hooks are
            added.
        skip, sigma, mean_from: see `TeleportScheduler`.

    Returns:
        `pipe` itself.

    Raises:
        ValueError: teleportation is on this pipeline already, an argument is invalid for `TeleportScheduler`,
            or the pipeline has no `encode_prompt` or `check_inputs` for the prompt map. With a prompt map, a call
            raises it if the pipeline does not tell its guidance scale or returns no tensor of embeddings.
    """
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
    before_first_call = scheduler.mean_from == "stats"
    # Added first, because it may raise an error: the pipeline is then still unchanged.
    reads_prompts = before_first_call and scheduler.stats.prompt_map is not None
    handles: list[Any] = _add_prompt_hooks(pipe, scheduler) if reads_prompts else []
    if before_first_call and not _scales_its_input(pipe):
        handles += _add_hooks(pipe, scheduler)
    vars(pipe)[_ATTRIBUTE] = handles
    pipe.scheduler = scheduler
    return pipe


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


def _add_prompt_hooks(pipe: Any, scheduler: TeleportScheduler) -> list[HookHandle]:
    """Sets the means of the prompts that each call of the pipeline encodes."""
    missing = [name for name in ("encode_prompt", "check_inputs") if not hasattr(pipe, name)]
    if missing:
        raise ValueError(
            f"The statistics have a prompt map, but {type(pipe).__name__} has no {' and no '.join(missing)}. Remove"
            " the map with dataclasses.replace(stats, prompt_map=None), and set the means with scheduler.set_mean."
        )
    reader = _PromptReader(pipe, scheduler)
    handles = [add_hook(pipe, "check_inputs", reader.start), add_hook(pipe, "encode_prompt", reader.read)]
    if hasattr(pipe, "prepare_latents"):
        handles.append(add_hook(pipe, "prepare_latents", reader.finish))
    return handles


class _PromptReader:
    """Gives the scheduler the means of a call's prompts; its methods are hooks of the pipeline.

    A call starts with `check_inputs`. What it encodes first are the prompts, with the negative prompts if
    `encode_prompt` has an argument for them, and otherwise the negative prompts are second, as in Flux and
    Qwen-Image. Anything after that is for another text encoder, as in Hunyuan-DiT.
    """

    def __init__(self, pipe: Any, scheduler: TeleportScheduler) -> None:
        self.pipe, self.scheduler = pipe, scheduler
        self.reading = False
        self.mean: Tensor | None = None

    def start(self, given: dict[str, Any], result: Any) -> Any:
        self.reading, self.mean = self.pipe.scheduler is self.scheduler, None
        if self.reading:
            self.scheduler.set_mean(None)
        return result

    def finish(self, given: dict[str, Any], result: Any) -> Any:
        self.reading = False
        return result

    def read(self, given: dict[str, Any], encoded: Any) -> Any:
        if not self.reading:  # encoded by the user, outside of a call
            return encoded
        parameters = parameters_of(self.pipe, "encode_prompt")
        embeds = embeddings_of(self.pipe, encoded)
        mean = self.scheduler.stats.prompt_mean(features_of(embeds[0]))
        if self.mean is None:
            switch = parameters.get("do_classifier_free_guidance")
            scale = self._scale(bool(switch and given.get(switch.name, switch.default)))
            self.mean = mean
            if scale != 1 and _has_negative(given):
                if len(embeds) < 2:
                    raise ValueError(
                        f"{type(self.pipe).__name__}.encode_prompt returns no embeddings of the negative prompt that"
                        " the prompt map could read. Call the pipeline without a negative prompt."
                    )
                away = self.scheduler.stats.prompt_mean(features_of(embeds[1]))
                self.scheduler.set_mean(away + scale * (mean - away))
            else:
                follows = self.scheduler.stats.unconditional is not None
                self.scheduler.set_mean(mean, scale if follows else 1.0)
        elif "negative_prompt" not in parameters:
            self.reading = False
            self.scheduler.set_mean(mean + self._scale(True) * (self.mean - mean))
        return encoded

    def _scale(self, guided: bool) -> float:
        """The scale of classifier-free guidance, which the pipeline sets before it encodes; 1 without guidance.

        Args:
            guided: whether the call is guided, for pipelines that do not tell it.

        Raises:
            ValueError: the call is guided, and the pipeline does not tell its scale.
        """
        known = all(
            hasattr(type(self.pipe), name) for name in ("do_classifier_free_guidance", "guidance_scale")
        )
        if known and self.pipe.do_classifier_free_guidance:
            return float(self.pipe.guidance_scale) + (1 if _is_free_at_zero(self.pipe) else 0)
        if guided and not known:
            raise ValueError(
                f"{type(self.pipe).__name__} does not tell the scale of its classifier-free guidance, which the"
                " transport has to follow. Call it without classifier-free guidance or, where it is off without a"
                " negative prompt, without one; or remove the prompt map with"
                " dataclasses.replace(stats, prompt_map=None)."
            )
        return 1.0


def _is_free_at_zero(pipe: Any) -> bool:
    """Whether guidance is off at scale 0 and not at 1, as in Z-Image and Krea 2: c + w(c − u) for u + w(c − u)."""
    scale = vars(pipe).get("_guidance_scale")
    if scale is None:
        return False
    pipe._guidance_scale = 0.5
    try:
        return bool(pipe.do_classifier_free_guidance)
    finally:
        pipe._guidance_scale = scale


def _has_negative(given: dict[str, Any]) -> bool:
    """Whether there is a negative prompt other than the empty one.

    The unconditional Gaussian represents the empty prompt. A negative prompt has its own mean and the same
    covariance. With equal covariances, guidance only shifts the mean: μ₋ + w(μ − μ₋).
    """
    negative = given.get("negative_prompt")
    texts = [negative] if isinstance(negative, str) or negative is None else negative
    return given.get("negative_prompt_embeds") is not None or any(texts)


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
    models = [m for m in (getattr(pipe, name, None) for name in _MODELS) if isinstance(m, nn.Module)]
    if not models:
        raise ValueError(
            f"{type(pipe).__name__} has none of the components {', '.join(_MODELS)}; wrap its scheduler with "
            'mean_from="first_call", which needs no hook.'
        )
    return [
        model.register_forward_pre_hook(_InputHook(pipe, model, scheduler), with_kwargs=True)
        for model in models
    ]


class _InputHook:
    """A pre-hook of a denoiser of `pipe`: passes the latents through `scheduler.map_model_input`."""

    def __init__(self, pipe: Any, model: nn.Module, scheduler: TeleportScheduler) -> None:
        self.pipe, self.scheduler = pipe, scheduler
        # The forward of torch.compile(model) takes any arguments; the names are those of the model inside.
        self.names = list(parameters_of(getattr(model, "_orig_mod", model), "forward"))
        self.latents = next((name for name in (*_LATENTS, *self.names) if name in self.names), None)
        self.time = next((name for name in _TIME if name in self.names), "timestep")

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        given = {**dict(zip(self.names, args)), **kwargs}
        if self.latents not in given:
            return args, kwargs
        mapped = self.scheduler.map_model_input(given[self.latents], given.get(self.time))
        if mapped is given[self.latents]:
            return args, kwargs
        if self.latents in kwargs:
            return args, {**kwargs, self.latents: mapped}
        position = self.names.index(self.latents)
        return (*args[:position], mapped, *args[position + 1 :]), kwargs

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
