"""Tools for one pipeline object of any class: method hooks, temporary settings, values read from a call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .families import noise_scale

# --- hooks; several plug-ins may add and remove them in any order ---

Hook = Callable[[dict[str, Any], Any], Any]


class HookHandle:
    """Removes one hook. When the last hook is removed, the pipeline has its own method back."""

    def __init__(self, pipe: Any, name: str, hook: Hook) -> None:
        self._pipe, self._name, self._hook = pipe, name, hook

    def remove(self) -> None:
        """Removes the hook."""
        hooks = self._pipe.__dict__[self._name].hooks
        hooks.remove(self._hook)
        if not hooks:
            own = self._pipe.__dict__.pop(self._name).own
            if own is not None:
                self._pipe.__dict__[self._name] = own


def add_hook(pipe: Any, name: str, hook: Hook) -> HookHandle:
    """Calls `hook(arguments, result)` after each `pipe.<name>(...)`, on this pipeline object only.

    Args:
        pipe: any object with that method.
        name: name of the method.
        hook: takes the arguments of the call by name and its result, and returns the result to use instead.
            Hooks run in the order in which they were added.

    Raises:
        AttributeError: the pipeline has no such method.
    """
    method: Any = getattr(pipe, name)
    if not hasattr(method, "hooks"):
        method = _hooked(method, pipe.__dict__.get(name))
        pipe.__dict__[name] = method
    method.hooks.append(hook)
    return HookHandle(pipe, name, hook)


def _hooked(original: Callable[..., Any], own: Any) -> Any:
    signature = inspect.signature(original)
    hooks: list[Hook] = []

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        for hook in tuple(hooks):
            result = hook(given, result)
        return result

    wrapper.__dict__.update(hooks=hooks, own=own)
    return wrapper


# --- temporary settings ---


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Turns off the pipeline's progress bar within the block."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


@contextmanager
def scheduler_of(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Replaces the pipeline's scheduler with `scheduler` within the block."""
    original, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = original


# --- the pipeline's parts ---


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's `unet` or `transformer`; None if it has neither."""
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    return next((part for part in parts if isinstance(part, nn.Module)), None)


# --- an additional argument for the call of a pipeline class ---


def adds_argument(
    base: type, name: str, default: Any, doc: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a `__call__` the signature and docstring of `base`'s, plus the keyword argument `name`.

    diffusers and this package inspect the signature of `pipe.__call__` to find out what a pipeline supports.

    Args:
        base: the pipeline class that is extended.
        name, default: name and default value of the new argument.
        doc: its line in the docstring.
    """
    original: Any = base.__call__

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        wrapper = functools.wraps(original)(function)
        signature = inspect.signature(original)
        extra = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default)
        )
        *named, rest = signature.parameters.values()
        # Without **kwargs, the last parameter is an ordinary one that the new one follows.
        ordered = [*named, extra, rest] if rest.kind is rest.VAR_KEYWORD else [*named, rest, extra]
        wrapper.__dict__["__signature__"] = signature.replace(parameters=ordered)
        wrapper.__doc__ = f"{original.__doc__}\n\n        {doc}\n"
        return wrapper

    return decorate


def named_arguments(base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `base` by name. They are not checked: `base` raises the errors."""
    names = list(inspect.signature(base.__call__).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


# --- components of a pipeline class ---


class FromPipeMixin:
    """Before a pipeline class: `from_pipe` takes over components of subclasses too, such as pruned UNets.

    diffusers looks for the exact class of a component among the annotations of `__init__`.

    Raises:
        ValueError: `DiffusionPipeline.from_pipe(..., custom_pipeline=...)` for a class with optional components,
            of which diffusers passes the names instead of the objects.
    """

    def register_modules(self, **modules: Any) -> None:
        """Same as in the base class."""
        entries = {name: module for name, module in modules.items() if isinstance(module, tuple | list)}
        named = [name for name, (library, _) in entries.items() if library is not None]
        if named:
            raise ValueError(
                f"Expected components, got their names for {', '.join(named)}: DiffusionPipeline.from_pipe does"
                f" not pass optional components on. Use {type(self).__name__}.from_pipe(pipe) instead."
            )
        super().register_modules(**{**modules, **dict.fromkeys(entries)})  # type: ignore[misc]

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        types = super()._get_signature_types()  # type: ignore[misc]
        return {name: _AndSubclasses(kinds) for name, kinds in types.items()}


class _AndSubclasses(tuple[Any, ...]):
    def __contains__(self, kind: Any) -> bool:
        return any(isinstance(own, type) and issubclass(kind, own) for own in self)


# --- values read from one call ---


class _Stop(Exception):
    """Ends a call of the pipeline when the wanted value has been read."""


def initial_noise(pipe: Any, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The unit-variance noise that `pipe(**call)` would start from, and the arguments of `prepare_latents`.

    Raises:
        RuntimeError: the pipeline does not call `prepare_latents`.
    """
    found: list[tuple[Tensor, dict[str, Any]]] = []

    def stop(given: dict[str, Any], prepared: Any) -> Any:
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        found.append((latents / noise_scale(pipe), given))
        raise _Stop

    handle = add_hook(pipe, "prepare_latents", stop)
    try:
        pipe(**call, output_type="latent")
    except _Stop:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipe).__name__} did not call prepare_latents.")


def model_output(pipe: Any, latents: Tensor, call: dict[str, Any]) -> Tensor:
    """The denoiser's guided output for `latents` at the first timestep of a call, float32.

    Raises:
        RuntimeError: the pipeline does not call its scheduler's `step`.
    """
    found: list[Tensor] = []

    def read(given: dict[str, Any], result: Any) -> Any:
        found.append(given["model_output"].float())
        raise _Stop

    handle = add_hook(pipe.scheduler, "step", read)
    try:
        with quiet(pipe):
            pipe(**call, latents=latents, output_type="latent")
    except _Stop:
        return found[0]
    finally:
        handle.remove()
    raise RuntimeError(f"{type(pipe).__name__} did not call its scheduler's step.")


# --- prompts ---

# Call arguments for the values that encode_prompt returns, by the number of values.
_ENCODED = {
    2: ("prompt_embeds", "negative_prompt_embeds"),
    3: ("prompt_embeds", "pooled_prompt_embeds"),
    4: (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str], guidance: bool = True) -> dict[str, Tensor]:
    """Encodes prompts to keyword arguments of the pipeline's call, with one row per prompt.

    Args:
        pipe: SD, SDXL, SD3, Flux or a pipeline whose `encode_prompt` returns the same values.
        prompts: texts.
        guidance: also encode the empty negative prompt, which calls with guidance need.

    Raises:
        ValueError: the pipeline has no `encode_prompt`, or it returns other values.
    """
    encoded = _encode(pipe, prompts, guidance)
    if not isinstance(encoded, tuple | list) or len(encoded) not in _ENCODED:
        raise ValueError(f"{type(pipe).__name__}.encode_prompt returns values in an unknown layout.")
    return {name: value for name, value in zip(_ENCODED[len(encoded)], encoded) if value is not None}


@torch.no_grad()
def prompt_embeddings(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """Prompt embeddings (n, tokens, width) without guidance: the first value that `encode_prompt` returns.

    Raises:
        ValueError: the pipeline has no `encode_prompt`.
    """
    encoded = _encode(pipe, prompts, guidance=False)
    return encoded[0] if isinstance(encoded, tuple | list) else encoded


def _encode(pipe: Any, prompts: Sequence[str], guidance: bool) -> Any:
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{type(pipe).__name__} has no encode_prompt, so its prompts cannot be encoded.")
    given: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "device": pipe._execution_device}
    given |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": guidance}
    names = inspect.signature(pipe.encode_prompt).parameters
    options = {name: value for name, value in given.items() if name in names}
    return pipe.encode_prompt(prompt=list(prompts), **options)


def prompt_per_row(prompt: str | Sequence[str], latents: Tensor) -> list[str]:
    """One prompt for each row of `latents`.

    Raises:
        ValueError: the number of prompts is neither 1 nor the number of rows.
    """
    prompts = [prompt] * len(latents) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(latents):
        raise ValueError(f"{len(latents)} latents need 1 or {len(latents)} prompts, got {len(prompts)}.")
    return prompts
