"""One pipeline object: hooks on its methods, and what it does within one call, without a word about its class."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .families import noise_scale

# --- hooks, which several plug-ins may add and remove in any order ---

Hook = Callable[[dict[str, Any], Any], Any]


class HookHandle:
    """`remove()` takes one hook off again; with the last one the pipeline has its own method back."""

    def __init__(self, pipe: Any, name: str, hook: Hook) -> None:
        self._pipe, self._name, self._hook = pipe, name, hook

    def remove(self) -> None:
        """Takes the hook off."""
        hooks = self._pipe.__dict__[self._name].hooks
        hooks.remove(self._hook)
        if not hooks:
            own = self._pipe.__dict__.pop(self._name).own
            if own is not None:
                self._pipe.__dict__[self._name] = own


def add_hook(pipe: Any, name: str, hook: Hook) -> HookHandle:
    """Calls `hook(arguments, result)` after each `pipe.<name>(...)`, on this one pipeline object.

    Args:
        pipe: any object with that method.
        name: of the method.
        hook: given the call's arguments by name and its result, returns the result to use instead. Hooks run in
            the order in which they were added.

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


# --- for the time of a block ---


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """The pipeline's own progress bar off."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


@contextmanager
def scheduler_of(pipe: Any, scheduler: Any) -> Iterator[None]:
    """`scheduler` in the place of the pipeline's own."""
    original, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
    finally:
        pipe.scheduler = original


# --- the pipeline's parts ---


def denoiser_of(pipe: Any) -> Any:
    """The pipeline's `unet` or `transformer`; None where it has neither."""
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer"))
    return next((part for part in parts if isinstance(part, nn.Module)), None)


# --- a call whose signature is a base class's with one more argument ---


def adds_argument(
    base: type, name: str, default: Any, doc: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a `__call__` the signature and docstring of `base`'s, plus the keyword argument `name`.

    diffusers and this package read a pipeline's abilities off `inspect.signature(pipe.__call__)`.

    Args:
        base: the pipeline class that is extended.
        name, default: of the new argument.
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
        # A call that takes no further keyword arguments ends with an ordinary one.
        ordered = [*named, extra, rest] if rest.kind is rest.VAR_KEYWORD else [*named, rest, extra]
        wrapper.__dict__["__signature__"] = signature.replace(parameters=ordered)
        wrapper.__doc__ = f"{original.__doc__}\n\n        {doc}\n"
        return wrapper

    return decorate


def named_arguments(base: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `base` by name; a wrong call is left for `base` to refuse."""
    names = list(inspect.signature(base.__call__).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


# --- one call, read ---


class _Stop(Exception):
    """Ends a call of the pipeline once what it was made for is known."""


def initial_noise(pipe: Any, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The noise that `pipe(**call)` would start from, with unit variance, and the arguments that it was drawn by."""
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
    raise RuntimeError(f"{type(pipe).__name__} has generated images without calling prepare_latents.")


def model_output(pipe: Any, latents: Tensor, call: dict[str, Any]) -> Tensor:
    """The output of the pipeline's denoiser for `latents` at the first timestep of a call, guidance done, float32."""
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
    raise RuntimeError(f"{type(pipe).__name__} has not called its scheduler's step.")


# --- prompts ---

# What a call takes for each part of what encode_prompt returns, by their number.
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
    """Prompts as keyword arguments of the pipeline's call, a row each.

    Args:
        pipe: SD, SDXL, SD3, Flux or a pipeline whose `encode_prompt` returns the same parts.
        prompts: texts.
        guidance: encode the empty negative prompt too, which calls with guidance need.

    Raises:
        ValueError: the pipeline has no `encode_prompt`, or it returns other parts.
    """
    encoded = _encode(pipe, prompts, guidance)
    if not isinstance(encoded, tuple | list) or len(encoded) not in _ENCODED:
        raise ValueError(f"{type(pipe).__name__}.encode_prompt returns a layout that is not known here.")
    return {name: value for name, value in zip(_ENCODED[len(encoded)], encoded) if value is not None}


@torch.no_grad()
def prompt_embeddings(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """(n, tokens, width): the first part of what any pipeline's `encode_prompt` returns for prompts, unguided."""
    encoded = _encode(pipe, prompts, guidance=False)
    return encoded[0] if isinstance(encoded, tuple | list) else encoded


def _encode(pipe: Any, prompts: Sequence[str], guidance: bool) -> Any:
    if not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"{type(pipe).__name__} has no encode_prompt, so its prompts have no embeddings.")
    given: dict[str, Any] = {"prompt_2": None, "prompt_3": None, "device": pipe._execution_device}
    given |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": guidance}
    names = inspect.signature(pipe.encode_prompt).parameters
    options = {name: value for name, value in given.items() if name in names}
    return pipe.encode_prompt(prompt=list(prompts), **options)


def prompt_per_row(prompt: str | Sequence[str], latents: Tensor) -> list[str]:
    """A prompt for every row of `latents`.

    Raises:
        ValueError: neither one prompt nor as many as rows.
    """
    prompts = [prompt] * len(latents) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(latents):
        raise ValueError(f"{len(latents)} latents need one prompt or as many; got {len(prompts)}.")
    return prompts
